"""Exported students against plain PyTorch: processor time of one thread, batch 1, clips of 10 s and 1 s.

    python benchmarks/deployed.py
    python benchmarks/deployed.py --students mn04 dymn04 --turns 30
    python benchmarks/deployed.py --students mn04 --profile

"Plain" is how these networks and their front end are usually written in PyTorch (benchmarks/student_speed.py and
benchmarks/frontend.py). "Ours" is the student with its batch norms folded, and our front end. "ONNX" is the exported model in ONNX
Runtime; of a DyMN both forms, for any batch and for a batch of one. All take turns in one process, so that a busy machine slows
them alike; a ratio is that of the medians. The script first checks that all give the same logits. With ``--profile`` it prints
which operators of the exported model take the time.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from frontend import plain_log_mel
from machine import processor_name
from student_speed import PlainStudent, settled

from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.graph.network import ExportedNetwork, Input
from kd.deploy.graph.onnx_file import onnx_model
from students.frontend import LogMel, LogMelConfig
from students.interface import Student

CLASSES = 527
FRONTEND = LogMelConfig()
STREAM_WINDOW_SECONDS, STREAM_HOP_SECONDS = 2.0, 0.5

Run = Callable[[], np.ndarray]


def exported(student: Student, takes: Input, one_clip: bool, folder: Path) -> Path:
    """The model file of a student."""
    space = LabelSpace.single([f"class {index}" for index in range(CLASSES)], exclusive=False)
    network = ExportedNetwork(student, FRONTEND, space, takes=takes, one_clip=one_clip)
    waveform = 0.1 * torch.randn(1 if one_clip else 2, 64_000)
    example = waveform if takes == "waveform" else LogMel(FRONTEND)(waveform)
    path = folder / f"{student.config.name}-{takes}-{'one' if one_clip else 'any'}.onnx"
    path.write_bytes(onnx_model(network, example).SerializeToString())
    return path


def session(path: Path, profile: Path | None = None) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runs_of(student: Student, takes: Input, models: dict[str, Path], waveform: torch.Tensor) -> dict[str, Run]:
    """What takes turns: each gives the logits of one clip."""
    plain, folded, log_mel = PlainStudent(student).eval(), student.fuse(), LogMel(FRONTEND)
    mel = log_mel(waveform)

    def in_pytorch(network: torch.nn.Module, front: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        def run() -> np.ndarray:
            with torch.inference_mode():
                return network(front(waveform) if takes == "waveform" else mel).logits.numpy()

        return run

    def in_onnx(path: Path) -> Run:
        model, inputs = session(path), (waveform if takes == "waveform" else mel).numpy()
        return lambda: model.run(["logits"], {takes: inputs})[0]

    runs = {
        "plain": in_pytorch(plain, lambda heard: plain_log_mel(heard, FRONTEND, FRONTEND.fmin_hz, FRONTEND.fmax_hz)),
        "ours": in_pytorch(folded, log_mel),
    }
    return runs | {name: in_onnx(path) for name, path in models.items()}


def medians(runs: dict[str, Run], turns: int) -> dict[str, float]:
    """Median seconds of processor time of each, after two turns that do not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(turns + 2):
        for name, run in runs.items():
            started = time.process_time()
            run()
            if turn >= 2:
                times[name].append(time.process_time() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def check_same(runs: dict[str, Run]) -> None:
    wanted = runs["plain"]()
    for name, run in runs.items():
        difference = np.abs(run() - wanted).max() / np.abs(wanted).max()
        assert difference < 1e-3, f"{name} differs from plain by {difference:.1e} of the largest logit"


def operators(path: Path, waveform: torch.Tensor, folder: Path) -> Counter[str]:
    """Milliseconds of the exported model's operators, front end and student apart, as the mean of 20 runs."""
    model = session(path, folder / "profile")
    for _ in range(20):
        model.run(None, {"waveform": waveform.numpy()})
    spent: Counter[str] = Counter()
    for event in json.loads(Path(model.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            part = "front end" if event["name"].startswith("frontend") else "student"
            spent[f"{part}: {event['args']['op_name']}"] += event["dur"] / 1e3 / 20
    return spent


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--students", nargs="+", default=["mn04", "mn10", "dymn04"])
    parser.add_argument("--seconds", nargs="+", type=float, default=[10.0, 1.0])
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    print(f"{processor_name()}, torch {torch.__version__}, onnxruntime {onnxruntime.__version__}; one thread, batch 1")
    print(
        "| student | input | clip | plain, ms | ours folded | ONNX, any batch | ONNX, batch 1 |\n|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for student_name in args.students:
            student = settled(student_name, torch.device("cpu")).eval()
            forms = (False, True) if student_name.startswith("dymn") else (False,)
            for takes in ("mel", "waveform"):
                models = {str(one): exported(student, takes, one, folder) for one in forms}
                for seconds in args.seconds:
                    waveform = 0.1 * torch.randn(1, round(seconds * FRONTEND.sample_rate_hz))
                    runs = runs_of(student, takes, models, waveform)
                    check_same(runs)
                    found = medians(runs, args.turns)
                    cells = [f"{1e3 * found['plain']:.1f}"]
                    for form in ("ours", "False", "True"):
                        ratio = found["plain"] / found[form] if form in found else 0.0
                        cells.append(f"{1e3 * found[form]:.1f} ({ratio:.1f}×)" if form in found else "")
                    print(f"| {student_name} | {takes} | {seconds:g} s | {' | '.join(cells)} |", flush=True)
            waveform = 0.1 * torch.randn(1, round(STREAM_WINDOW_SECONDS * FRONTEND.sample_rate_hz))
            found = medians(runs_of(student, "waveform", models, waveform), args.turns)
            best = min(value for form, value in found.items() if form in models)
            print(
                f"{student_name} as a stream, window {STREAM_WINDOW_SECONDS:g} s, hop {STREAM_HOP_SECONDS:g} s: real-time factor"
                f" {best / STREAM_HOP_SECONDS:.4f}; hop 1 s: {best:.4f}",
                flush=True,
            )
            if args.profile:
                waveform = 0.1 * torch.randn(1, 10 * FRONTEND.sample_rate_hz)
                for form, path in models.items():
                    print(f"{student_name}, 10 s, {'batch 1' if form == 'True' else 'any batch'}, milliseconds:")
                    for operator, spent in operators(path, waveform, folder).most_common(14):
                        print(f"  {spent:6.2f}  {operator}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
