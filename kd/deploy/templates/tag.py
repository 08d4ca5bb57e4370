"""Tags audio files with the model beside this file: python tag.py FILE… [--top 5] [--json]

Needs numpy, soundfile and onnxruntime. A file may have any rate, number of channels and length.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import soundfile

FOLDER = Path(__file__).resolve().parent
ZEROS, ROLLOFF = (
    6,
    0.99,
)  # of the low-pass filter: zero crossings on each side, and cutoff as a share of the lower Nyquist rate


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """(samples,) -> (ceil(samples * to_hz / from_hz),): Hann-windowed sinc interpolation."""
    if from_hz == to_hz:
        return waveform
    divisor = math.gcd(from_hz, to_hz)
    old, new = from_hz // divisor, to_hz // divisor
    width = math.ceil(ZEROS * old / (min(old, new) * ROLLOFF))
    cutoff = min(old, new) * ROLLOFF / old
    moment = np.arange(-(-len(waveform) * new // old)) * old
    whole, phase = np.divmod(moment, new)
    padded = np.pad(waveform.astype(np.float64), (width, width + 1))
    result = np.zeros(len(moment))
    for offset in range(-width, width + 2):
        distance = np.clip((offset - np.arange(new) / new) * cutoff, -ZEROS, ZEROS)
        tap = np.sinc(distance) * np.cos(distance * np.pi / ZEROS / 2) ** 2 * cutoff
        result += padded[whole + width + offset] * tap[phase]
    return result.astype(np.float32)


def windows(waveform: np.ndarray, rate_hz: int, card: dict) -> np.ndarray:
    """(samples,) at any rate -> (windows, samples): spread evenly from start to end, a short clip filled up."""
    seconds, to_hz = card["window_seconds"], card["sample_rate_hz"]
    size, duration = round(seconds * to_hz), len(waveform) / rate_hz
    count = max(1, math.ceil(duration / seconds - 0.05))
    starts = [0.0] if count == 1 else np.linspace(0.0, duration - seconds, count).tolist()
    waveform = resample(waveform, rate_hz, to_hz)
    parts = [waveform[round(start * to_hz) :][:size] for start in starts]
    if card["short_clips"] == "repeat":
        parts = [np.resize(part, size) if len(part) < size else part for part in parts]
    return np.stack([np.pad(part, (0, size - len(part))) for part in parts]).astype(np.float32)


def probabilities(logits: np.ndarray, card: dict) -> np.ndarray:
    """(classes,) -> (classes,): softmax in groups of exclusive classes, sigmoid in others."""
    found, start = [], 0
    for group in card["label_groups"]:
        part = logits[start : start + len(group["class_names"])].astype(np.float64)
        start += len(part)
        if group["exclusive"]:
            part = np.exp(part - part.max())
            found.append(part / part.sum())
        else:
            found.append(0.5 * (1.0 + np.tanh(0.5 * part)))
    return np.concatenate(found)


def tag(path: str, session: onnxruntime.InferenceSession, card: dict) -> np.ndarray:
    """A file's scores, (classes,)."""
    waveform, rate_hz = soundfile.read(path, dtype="float32", always_2d=True)
    if len(waveform) == 0:
        raise ValueError("it holds no samples")
    parts = windows(waveform.mean(axis=1), rate_hz, card)
    logits = [session.run(["logits"], {"waveform": part[None]})[0][0] for part in parts]
    return probabilities(np.mean(logits, axis=0), card)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tags audio files.")
    parser.add_argument("files", nargs="+", help="audio files, in any format that libsndfile reads")
    parser.add_argument("--top", type=int, default=5, help="classes to show for each file (default: 5)")
    parser.add_argument("--json", action="store_true", help="print one JSON line for each file, with all scores")
    parser.add_argument("--threads", type=int, default=1, help="threads that compute (default: 1)")
    arguments = parser.parse_args()
    card = json.loads((FOLDER / "export.json").read_text(encoding="utf-8"))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = arguments.threads
    session = onnxruntime.InferenceSession(FOLDER / card["model"], options, providers=["CPUExecutionProvider"])
    failed = 0
    for path in arguments.files:
        try:
            scores = tag(path, session, card)
        except soundfile.LibsndfileError as error:
            print(f"error: {path}: {error} (convert other formats first: ffmpeg -i IN OUT.wav)", file=sys.stderr)
            failed += 1
            continue
        except (OSError, RuntimeError, ValueError) as error:
            print(f"error: {path}: {error}", file=sys.stderr)
            failed += 1
            continue
        ranked = [(card["class_names"][index], float(scores[index])) for index in np.argsort(-scores, kind="stable")]
        if arguments.json:
            print(json.dumps({"file": path, "scores": dict(ranked)}, ensure_ascii=False))
        else:
            shown = "  ".join(f"{name} {score:.3f}" for name, score in ranked[: arguments.top])
            print(f"{path}: {shown}")
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
