"""An exported model in ONNX Runtime: its outputs, and what it costs.

Shapes: B batch, N samples, C classes, E embedding size.
"""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from students.frontend import LogMel, LogMelConfig
from teacher_logits.teachers.onnx_session import BatchRunner, open_session

_MEMORY_SCRIPT = """
import sys
import numpy as np, onnxruntime
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
before = peak()
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options, providers=["CPUExecutionProvider"])
inputs = np.zeros([int(size) for size in sys.argv[2:]], dtype=np.float32)
session.run(None, {session.get_inputs()[0].name: inputs})
print(peak() - before)
"""


class ExportedModel:
    """A model file that takes waveforms; for one that takes log-mels, ours are computed first."""

    def __init__(self, path: Path, frontend: LogMelConfig, threads: int = 1) -> None:
        self.session = open_session(path, threads)
        self._run = BatchRunner(self.session, path)
        (self.input,) = self.session.get_inputs()
        self.log_mel = LogMel(frontend) if self.input.name == "mel" else None

    def inputs(self, waveform: np.ndarray) -> np.ndarray:
        """(B, N) -> what the model takes"""
        if self.log_mel is None:
            return waveform
        with torch.inference_mode():
            return self.log_mel(torch.from_numpy(waveform)).numpy()

    def __call__(self, waveform: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(B, N) -> scores (B, C), logits (B, C), embedding (B, E)"""
        inputs = self.inputs(waveform)
        parts = inputs[:, None] if self.input.shape[0] == 1 else [inputs]
        found = [self._run(["scores", "logits", "embedding"], self.input.name, part) for part in parts]
        scores, logits, embedding = (np.concatenate(values) for values in zip(*found, strict=True))
        return scores, logits, embedding


def measure_costs(path: Path, frontend: LogMelConfig, samples: int, repeats: int = 10) -> dict[str, Any]:
    """Size, latency of one window with one and two threads, real-time factor, and memory beyond that of the runtime."""
    waveform = 0.1 * np.random.default_rng(0).standard_normal((1, samples)).astype(np.float32)
    latency = {}
    for threads in (1, 2):
        model = ExportedModel(path, frontend, threads)
        inputs = {model.input.name: model.inputs(waveform)}
        model.session.run(None, inputs)
        latency[str(threads)] = statistics.median(_seconds(model.session, inputs) for _ in range(repeats))
    seconds = samples / frontend.sample_rate_hz
    return {
        "bytes": path.stat().st_size,
        "window_seconds": seconds,
        "latency_seconds": latency,
        "real_time_factor": {threads: value / seconds for threads, value in latency.items()},
        "memory_bytes": _memory(path, inputs[model.input.name].shape),
        "cpus": os.cpu_count(),
    }


def _seconds(session: Any, inputs: dict[str, np.ndarray]) -> float:
    started = time.perf_counter()
    session.run(None, inputs)
    return time.perf_counter() - started


def _memory(path: Path, shape: tuple[int, ...]) -> int | None:
    """Peak memory of loading and running the model in a process of its own, beyond NumPy and the runtime; None if unknown."""
    command = [sys.executable, "-c", _MEMORY_SCRIPT, str(path), *map(str, shape)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    return int(done.stdout) if done.returncode == 0 else None
