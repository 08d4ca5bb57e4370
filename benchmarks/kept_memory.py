"""What keeping freed memory costs and gains (``students.kept_memory``): processor time of a step, and peak memory.

    python benchmarks/kept_memory.py [--turns 3]

Each measurement is a process of its own with one thread. Runs with and without alternate.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time

import torch

from audio_datasets.system.text_tables import text_table
from students import create_student
from students.kept_memory import OFF, keep_freed_memory

WORK = (("mn10", "train", 8), ("mn10", "evaluate", 16), ("mn04", "train", 16), ("dymn04", "train", 8))
STEPS = 6


def measure(name: str, work: str, batch: int) -> None:
    """Prints seconds of a step and the process's peak memory in MB."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    keep_freed_memory()
    torch.manual_seed(0)
    student = create_student(name, 10).train(work == "train")
    mel = torch.randn(batch, 1, 128, 1000)
    seconds = []
    for _ in range(STEPS):
        started = time.process_time()
        if work == "train":
            student(mel).logits.square().mean().backward()
            student.zero_grad()
        else:
            with torch.inference_mode():
                student(mel)
        seconds.append(time.process_time() - started)
    print(statistics.median(seconds[1:]), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def measured(arguments: tuple[str, str, int], kept: bool) -> tuple[float, float]:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    environment = {**os.environ, OFF: "1" if kept else "0"}
    text = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout
    seconds, megabytes = map(float, text.split())
    return seconds, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], options.one[1], int(options.one[2]))
        return
    rows = [("step", "s, given back", "s, kept", "ratio", "MB, given back", "MB, kept")]
    for work in WORK:
        turns = [(measured(work, kept=False), measured(work, kept=True)) for _ in range(options.turns)]
        (off, off_mb), (on, on_mb) = (
            tuple(statistics.median(turn[kept][item] for turn in turns) for item in (0, 1)) for kept in (0, 1)
        )
        row = (f"{off:.2f}", f"{on:.2f}", f"{off / on:.2f}", f"{off_mb:.0f}", f"{on_mb:.0f}")
        rows.append((f"{work[0]}, {work[1]}, batch {work[2]}", *row))
    print(text_table(rows))


if __name__ == "__main__":
    main()
