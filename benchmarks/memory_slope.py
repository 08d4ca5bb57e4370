"""Memory of ``kd pretrain`` and of its data-loading workers over a long run: how much it grows per thousand steps.

    python benchmarks/memory_slope.py --minutes 10

Trains a tiny student with two workers, checkpoints and validation, reads the memory of each process every second,
leaves out the first fifth of the run, and fits a line. For the training process it is the resident memory: its private part
rises and falls as forked workers come and go, which share its pages. For a worker it is the private part, since the
resident one counts the training process's pages. The run is then stopped by SIGTERM. Exits with 1 if any process grows by more than ``--limit-mb`` in a thousand steps.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "robustness"))
sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from soak import ENVIRONMENT
from soak_stages import pretrain_arguments, write_pretrain_scene

from audio_datasets.system.command import STOPPED, parse
from kd import pretrain
from kd.training.checkpoint import checkpoints

MB = 1e6


@dataclass(frozen=True)
class SlopeConfig:
    """Measure whether memory grows."""

    minutes: float = 10.0
    """How long to train."""
    limit_mb: float = 2.0
    """Growth of a process per thousand steps, in MB, that is too much."""


def steps_done(out: Path) -> int:
    """Steps at the newest checkpoint."""
    found = checkpoints(out / "checkpoints")
    return int(found[-1].name.removeprefix("step-")) if found else 0


def measure(out: Path, process: psutil.Process, seconds: float) -> dict[str, np.ndarray]:
    """(step, bytes) pairs of each process that lived from beginning to end; (n, 2) each."""
    samples: dict[int, list[tuple[int, int]]] = {}
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.is_running(), "the run ended"
        step = steps_done(out)
        if step:
            for each in [process, *process.children()]:
                try:
                    memory = each.memory_full_info()
                    samples.setdefault(each.pid, []).append((step, memory.rss if each == process else memory.uss))
                except psutil.NoSuchProcess:  # a worker of the validation
                    continue
        time.sleep(1.0)
    longest = max(len(values) for values in samples.values())
    lasting = [pid for pid, values in samples.items() if len(values) > 0.9 * longest]
    names = {pid: "training process" if pid == process.pid else f"worker {index}" for index, pid in enumerate(lasting)}
    return {names[pid]: np.array(samples[pid], dtype=float) for pid in lasting}


def main(command_line: Sequence[str] | None = None) -> int:
    config = parse(SlopeConfig, command_line, "memory_slope.py")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pretrain_scene(folder)
        out = folder / "run"
        values = pretrain_arguments(folder, out, processes=1, epochs=1_000_000)
        values += ["--workers", "2", "--checkpoint-every-steps", "20", "--validate-every-epochs", "20"]
        with open(folder / "run.log", "w") as log:
            run = subprocess.Popen(
                [sys.executable, pretrain.__file__, *values], env={**os.environ, **ENVIRONMENT}, stdout=log, stderr=log
            )
        samples = measure(out, psutil.Process(run.pid), 60 * config.minutes)
        steps = steps_done(out)
        run.send_signal(signal.SIGTERM)
        assert run.wait() == STOPPED, (folder / "run.log").read_text()[-3000:]
    print(f"{machine()}; {steps} steps in {config.minutes:g} minutes")
    print("| process | memory at the end, MB | growth per 1,000 steps, MB |")
    print("|---|---|---|")
    worst = 0.0
    for process, pairs in samples.items():
        settled = pairs[len(pairs) // 5 :]
        slope = np.polyfit(settled[:, 0], settled[:, 1], 1)[0] * 1000 / MB
        worst = max(worst, slope)
        print(f"| {process} | {settled[-1, 1] / MB:.1f} | {slope:+.2f} |")
    return 1 if worst > config.limit_mb else 0


if __name__ == "__main__":
    raise SystemExit(main())
