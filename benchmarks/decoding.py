"""Clips decoded per second on one core, per way of storing them, against MP3.

Each clip store holds the same 10 s clips (noise, tones that move, pauses) at 32 kHz, mono; the ways take turns in every
round, so that a change in the machine's speed meets them all. Also shown: 44.1 kHz stereo files that have to be mixed and
resampled on reading, and 1 s cut from the middle.

    python benchmarks/decoding.py
"""

import argparse
import io
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import soundfile
import torch
from machine import processor_name

from audio_datasets.audio.codec import encode, to_pcm16
from audio_datasets.audio.resampling import resample
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.randomness import generator

SAMPLE_RATE_HZ = 32000
CLIP_SECONDS = 10.0
BASELINE = "MP3"


def test_clip(index: int) -> np.ndarray:
    """float32 (320000,): noise that swells, three gliding tones, a pause."""
    rng = generator(0, "decoding benchmark", 0, index)
    time_s = np.arange(round(CLIP_SECONDS * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = 0.05 * rng.standard_normal(len(time_s)) * (1 + np.sin(2 * np.pi * rng.uniform(0.1, 1.0) * time_s))
    for _ in range(3):
        start_hz, glide_hz = rng.uniform(100, 6000), rng.uniform(-50, 300)
        wave += 0.1 * np.sin(2 * np.pi * (start_hz + glide_hz * time_s / 2) * time_s)
    pause = rng.integers(0, len(time_s) // 2)
    wave[pause : pause + SAMPLE_RATE_HZ] = 0.0
    return wave.astype(np.float32)


def vorbis(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, SAMPLE_RATE_HZ, format="OGG", subtype="VORBIS")
    return buffer.getvalue()


def wav_stereo_44100(wave: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([resample(wave, SAMPLE_RATE_HZ, 44100)] * 2, axis=1), 44100, format="WAV")
    return buffer.getvalue()


def write_stores(folder: Path, clips: int, class_names: Sequence[str] = ("any",)) -> dict[str, ClipStore]:
    """One clip store per way of keeping the same clips; they have no labels."""
    ways = {
        "MP3": lambda wave: encode(wave, SAMPLE_RATE_HZ, "mp3"),
        "Ogg Vorbis": vorbis,
        "FLAC": lambda wave: encode(wave, SAMPLE_RATE_HZ, "flac"),
        "WAV": lambda wave: encode(wave, SAMPLE_RATE_HZ, "wav"),
        "int16 PCM": to_pcm16,
        "WAV, 44.1 kHz stereo": wav_stereo_44100,
    }
    waves = [test_clip(index) for index in range(clips)]
    stores = {}
    for number, (name, store_audio) in enumerate(ways.items()):
        path = folder / f"{number}.h5"
        options = {"audio_kind": "pcm16", "sample_rate_hz": SAMPLE_RATE_HZ} if name == "int16 PCM" else {}
        write_clip_store(
            path, [ClipRecord(str(i), store_audio(waves[i])) for i in range(clips)], class_names, **options
        )
        stores[name] = ClipStore.open(path)
    return stores


def seconds_per_clip(store: ClipStore, **part: float) -> float:
    start = time.perf_counter()
    for row in range(len(store)):
        store.waveform(row, SAMPLE_RATE_HZ, **part)
    return (time.perf_counter() - start) / len(store)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=24, help="clips per store")
    parser.add_argument("--rounds", type=int, default=7, help="rounds; the median counts")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        stores = write_stores(Path(folder), arguments.clips)
        whole = {name: [] for name in stores}
        part = {name: [] for name in stores}
        for round_number in range(arguments.rounds + 1):
            for name, store in stores.items():
                times = seconds_per_clip(store), seconds_per_clip(store, start_seconds=4.5, seconds=1.0)
                if round_number > 0:  # the first round fills caches
                    whole[name].append(times[0])
                    part[name].append(times[1])
        sizes = {name: store.path.stat().st_size / len(store) / 1e3 for name, store in stores.items()}
    print(f"{processor_name()}, one core, soundfile {soundfile.__version__}")
    print(f"10 s clips at {SAMPLE_RATE_HZ} Hz; median of {arguments.rounds} rounds over {arguments.clips} clips\n")
    print(f"{'stored as':22} {'kB/clip':>8} {'clips/s':>9} {'× ' + BASELINE:>7} {'1 s cuts/s':>11}")
    baseline = float(np.median(whole[BASELINE]))
    for name in stores:
        each = float(np.median(whole[name]))
        print(
            f"{name:22} {sizes[name]:8.0f} {1 / each:9.0f} {baseline / each:7.1f} {1 / float(np.median(part[name])):11.0f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
