"""Kills ``kd teach`` at random moments, runs it again, and compares the store with that of an uninterrupted run.

    python tests/robustness/kill_teach.py --kills 100

Half of the kills hit a run of one process. The others hit a run of two: in turn one of the two (the launcher then ends
the other) and everything at once, launcher and data loaders included. Every fifth is SIGTERM, to the process or launcher
that was started; the others are SIGKILL. A moment is drawn evenly from the time between the first trace of the run on
disk and its end; a run that ends before its moment is drawn again. Clips are noise, the teacher is a random mn01. Exits
with 1 if any store differs by a byte or any rerun fails, whose output it shows.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import psutil
import torch

from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.command import parse
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits import precompute
from teacher_logits.stores.shards import PLAN_FILE

CLASSES = ("a", "b", "c")
CLIP_SECONDS = 2.0
SAMPLE_RATE_HZ = 32000
ONE = [precompute.__file__]
TWO = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", precompute.__file__]


@dataclass(frozen=True)
class KillConfig:
    """Kill kd teach again and again."""

    kills: int = 20
    """How many kills."""
    clips: int = 600
    """Clips of two seconds; each process works some seconds on them."""
    shard_clips: int = 16
    """Clips in a shard."""
    seed: int = 0
    """Seed of the moments."""


class Scene:
    """A folder with clips and a teacher, and the command that runs one over the other."""

    def __init__(self, folder: Path, config: KillConfig) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        self.shard_clips = config.shard_clips
        rng = np.random.default_rng(0)
        noise = rng.normal(0, 2000, (config.clips, round(CLIP_SECONDS * SAMPLE_RATE_HZ))).astype(np.int16)
        records = [ClipRecord(f"clip{index}", samples, ("a",)) for index, samples in enumerate(noise)]
        write_clip_store(folder / "clips.h5", records, CLASSES, audio_kind="pcm16", sample_rate_hz=SAMPLE_RATE_HZ)
        torch.manual_seed(0)
        student = create_student("mn01", num_classes=len(CLASSES))
        # With the batch norms' initial statistics the logits of a random network are all but zero, whatever it hears.
        for layer in student.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        student.train()(torch.randn(8, 1, 128, 200))
        torch.nn.init.normal_(student.get_parameter("classifier.5.weight"))
        save_student(folder / "teacher", student, CLASSES, LogMelConfig(), {"clip_seconds": CLIP_SECONDS})

    def start(self, command: list[str], out: Path) -> subprocess.Popen:
        """Starts ``kd teach`` into the folder ``out``; what it prints goes into the file ``output``."""
        arguments = [
            *("--clips", str(self.folder / "clips.h5"), "--teacher", str(self.folder / "teacher"), "--out", str(out)),
            *("--shard-clips", str(self.shard_clips), "--batch-size", "8", "--workers", "1"),
        ]
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        with open(self.output, "wb") as output:
            return subprocess.Popen(
                [sys.executable, *command, *arguments], env=environment, stdout=output, stderr=output
            )


def wait_for_plan(process: subprocess.Popen, out: Path) -> None:
    """Returns when the run has written its plan."""
    plan = out / "teacher.h5.partial" / PLAN_FILE
    while not plan.exists():
        if process.poll() is not None:
            raise RuntimeError(f"the run ended with exit code {process.returncode} before it began to work")
        time.sleep(0.002)


def kill(process: subprocess.Popen, what: str, random: Random) -> bool:
    """SIGKILL for one of the two processes that a launcher started, or for a process and all below it; or SIGTERM.

    False if the run had already ended.
    """
    killed = False
    try:
        top = psutil.Process(process.pid)
        below = top.children(recursive=what == "all")
        victims = [top, *below] if what == "all" else random.sample(below, min(1, len(below)))
        if what == "SIGTERM":
            victims = [top]
    except psutil.NoSuchProcess:
        victims = []
    for victim in victims:
        try:
            victim.terminate() if what == "SIGTERM" else victim.kill()
            killed = True
        except psutil.NoSuchProcess:
            continue
    process.wait()
    return killed


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(KillConfig, arguments, "kill_teach.py")
    random = Random(config.seed)
    with tempfile.TemporaryDirectory() as name:
        scene = Scene(Path(name), config)
        working_seconds = {}
        for processes, command in ((1, ONE), (2, TWO)):
            out = scene.folder / f"whole-{processes}"
            run = scene.start(command, out)
            wait_for_plan(run, out)
            start = time.monotonic()
            assert run.wait() == 0
            working_seconds[processes] = time.monotonic() - start
        expected = digest(scene.folder / "whole-1" / "teacher.h5")
        same = digest(scene.folder / "whole-2" / "teacher.h5") == expected
        num_shards = -(-config.clips // config.shard_clips)
        print(
            f"uninterrupted: {num_shards} shards in {working_seconds[1]:.1f} s with one process, "
            f"{working_seconds[2]:.1f} s with two; their stores are {'equal' if same else 'NOT equal'}"
        )
        print("| kill | processes | killed | after s | finished shards | store after the rerun |")
        print("|---|---|---|---|---|---|")
        failures = int(not same)
        done = 0
        while done < config.kills:
            processes = 1 if done < config.kills // 2 else 2
            what = "SIGTERM" if done % 5 == 4 else "all" if processes == 1 or done % 2 else "one of two"
            command = ONE if processes == 1 else TWO
            out = scene.folder / "killed"
            shutil.rmtree(out, ignore_errors=True)
            moment = random.uniform(0, working_seconds[processes])
            run = scene.start(command, out)
            wait_for_plan(run, out)
            time.sleep(moment)
            if run.poll() is not None or not kill(run, what, random):
                continue
            partial = out / "teacher.h5.partial"
            shards = len(list(partial.glob("shard-*.npy")))
            again = scene.start(command, out).wait()
            store = out / "teacher.h5"
            equal = again == 0 and digest(store) == expected and not partial.exists()
            failures += not equal
            done += 1
            print(
                f"| {done} | {processes} | {what} | {moment:.2f} | {shards} of {num_shards} "
                f"| {'equal' if equal else f'NOT EQUAL (exit code {again})'} |",
                flush=True,
            )
            if again:
                print(scene.output.read_text(errors="replace")[-5000:], flush=True)
    print(f"{config.kills} kills, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
