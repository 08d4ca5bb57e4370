"""Kills ``kd pretrain`` again and again at random moments, goes on each time, and compares with the uninterrupted run.

    python benchmarks/soak.py --kills 50
    python benchmarks/soak.py --kills 50 --start command

Half of the kills hit a run of one process, the others a run of two, of which in turn one or both are hit. Of four kills
three are SIGKILL and one is SIGTERM or SIGUSR1, which a single process gets. Each run is started with the same arguments
until it ends by itself; then its student, log and newest checkpoint must equal those of the uninterrupted run byte for
byte, and the next run begins. Every third kill waits for a checkpoint that is being written.

``--start command`` starts whole commands (two processes through torch.distributed.run, which is what gets SIGTERM then);
by default they are forked from a process that has imported everything, which takes a tenth of the time. Clips are
noise, the student is an mn01, with gradient accumulation, a moving average and validation. Exits with 1 at a difference.
"""

import hashlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Literal, Protocol

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from preloaded import Preloaded

from audio_datasets.clip_store import ClipRecord, ClipStore, write_clip_store
from audio_datasets.command import STOPPED, parse
from audio_datasets.manifest import ManifestRow, manifest_path, write_manifest
from kd import pretrain
from kd.checkpoint import checkpoints
from teacher_logits.store import write_logit_store

CLASSES = ("a", "b", "c")
SAMPLE_RATE_HZ = 32000
CLIPS = 40
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class SoakConfig:
    """Kill kd pretrain again and again."""

    kills: int = 50
    """How many kills, half of them with two processes."""
    epochs: int = 8
    """Epochs of a run; an epoch is four steps of eight clips, and a checkpoint follows each step."""
    start: Literal["preloaded", "command"] = "preloaded"
    """Fork runs from a process that has imported everything, or start whole commands."""
    seed: int = 0
    """Seed of the moments."""


def write_scene(folder: Path) -> None:
    """Clips with labels and folds, and a teacher's logits for them."""
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2000, (CLIPS, round(0.4 * SAMPLE_RATE_HZ))).astype(np.int16)
    records = [ClipRecord(f"clip{index}", samples, tuple(CLASSES[index % 3 :])) for index, samples in enumerate(noise)]
    store = folder / "clips.h5"
    write_clip_store(store, records, CLASSES, audio_kind="pcm16", sample_rate_hz=SAMPLE_RATE_HZ)
    write_manifest(
        manifest_path(store),
        [ManifestRow(record.clip_id, fold=1 + (index >= 32)) for index, record in enumerate(records)],
    )
    clips = ClipStore.open(store)
    write_logit_store(
        folder / "logits.h5",
        clip_ids=clips.clip_ids,
        audio_digests=clips.audio_digests(np.arange(CLIPS)),
        logit_blocks=[rng.normal(0, 2, (CLIPS, len(CLASSES))).astype(np.float16)],
        class_names=CLASSES,
        teacher={"name": "noise", "fingerprint": "0" * 32},
        clip_store_fingerprint=clips.fingerprint,
    )


def arguments(folder: Path, out: Path, processes: int, epochs: int) -> list[str]:
    """Arguments of a run whose step has eight clips, however many processes share it."""
    return [
        *("--clips", str(folder / "clips.h5"), "--logits", str(folder / "logits.h5"), "--out", str(out)),
        *("--student", "mn01", "--n-mels", "64", "--hop-samples", "640", "--clip-seconds", "0.4"),
        *("--folds", "1", "--valid-folds", "2", "--epochs", str(epochs), "--ema-decay", "0.9", "--workers", "1"),
        *("--batch-size", str(4 // processes), "--gradient-accumulation-steps", "2"),
        *("--checkpoint-every-steps", "1", "--log-every-steps", "3"),
    ]


class Started(Protocol):
    """A run at work: one process or several."""

    def running(self) -> bool: ...

    def hit(self, number: signal.Signals, both: bool) -> bool:
        """Sends a signal to the run, or, of several processes, perhaps to one only; False if it had ended."""

    def wait(self) -> list[int]:
        """Exit codes; negative for a signal."""


class StartedCommand:
    """Whole commands, several processes through torch.distributed.run."""

    def __init__(self, arguments: list[str], processes: int, random: Random, output: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), pretrain.__file__, *arguments]
        with open(output, "ab") as file:
            self.process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=file)
        self.processes = processes
        self.random = random

    def running(self) -> bool:
        return self.process.poll() is None

    def hit(self, number: signal.Signals, both: bool) -> bool:
        try:
            top = psutil.Process(self.process.pid)
            victims = [top]
            if number == signal.SIGKILL:
                below = top.children(recursive=both)
                victims = (
                    [top, *below] if both or self.processes == 1 else self.random.sample(below, min(1, len(below)))
                )
            elif self.processes > 1 and number == signal.SIGUSR1:  # the launcher passes on SIGTERM only
                victims = self.random.sample(top.children(), min(1, len(top.children())))
        except psutil.NoSuchProcess:
            return False
        hits = 0
        for victim in victims:
            try:
                victim.send_signal(number)
                hits += 1
            except psutil.NoSuchProcess:
                continue
        return hits > 0

    def wait(self) -> list[int]:
        return [self.process.wait()]


class StartedPreloaded:
    """Processes forked from a preloaded one, each with the environment that a launcher would give it."""

    def __init__(self, starter: Preloaded, arguments: list[str], processes: int, random: Random, output: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.runs = [
            starter.start(
                arguments,
                {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {},
                output,
            )
            for rank in range(processes)
        ]
        self.random = random

    def running(self) -> bool:
        return all(run.running() for run in self.runs)

    def hit(self, number: signal.Signals, both: bool) -> bool:
        victims = self.runs if both else [self.random.choice(self.runs)]
        return sum(run.send(number) for run in victims) > 0

    def wait(self) -> list[int]:
        """As a launcher does it: when one has failed, the others are ended."""
        while any(run.running() for run in self.runs):
            failed = [run for run in self.runs if not run.running() and run.wait() not in (0, STOPPED)]
            for run in self.runs if failed else []:
                run.send(signal.SIGKILL)
            time.sleep(0.01)
        return [run.wait() for run in self.runs]


@dataclass
class Tally:
    """What happened to the runs of so many processes."""

    kills: Counter = field(default_factory=Counter)
    in_checkpoint: int = 0
    one_of_two: int = 0
    saved_on_request: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)


def result(out: Path) -> dict[str, str]:
    """Digests of everything that a run ends with; of ``student.json`` only that it is there, since it names the folder."""
    newest = checkpoints(out / "checkpoints")[-1]
    files = [out / "student.safetensors", out / "metrics.jsonl", *sorted(newest.iterdir())]
    found = {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    return found | {"student.json": str((out / "student.json").exists())}


def being_written(out: Path) -> bool:
    """Whether a checkpoint is being written, or was when its process ended."""
    return any((out / "checkpoints").glob(".step-*.tmp"))


class Soak:
    """Runs, kills and compares; ``start`` is told the arguments, the number of processes and a file for their output."""

    def __init__(self, folder: Path, config: SoakConfig, starter: Preloaded | None) -> None:
        self.folder = folder
        self.config = config
        self.starter = starter
        self.random = Random(config.seed)
        write_scene(folder)

    def start(self, out: Path, processes: int) -> Started:
        values = arguments(self.folder, out, processes, self.config.epochs)
        output = out.with_suffix(".log")
        if self.starter is None:
            return StartedCommand(values, processes, self.random, output)
        return StartedPreloaded(self.starter, values, processes, self.random, output)

    def whole(self, processes: int) -> tuple[dict[str, str], float]:
        """Result and seconds of an uninterrupted run."""
        out = self.folder / f"whole-{processes}"
        begun = time.monotonic()
        codes = self.start(out, processes).wait()
        assert not any(codes), out.with_suffix(".log").read_text()
        return result(out), time.monotonic() - begun

    def kill_again_and_again(self, processes: int, kills: int) -> Tally:
        """Kills runs of so many processes; the last run is brought to its end."""
        expected, seconds = self.whole(processes)
        tally = Tally()
        out = self.folder / f"run-{processes}-0"
        done = False
        while not done:
            run = self.start(out, processes)
            if sum(tally.kills.values()) < kills:
                self.kill_once(run, out, processes, seconds, tally)
            codes = run.wait()
            if any(codes):
                tally.saved_on_request += STOPPED in codes
                continue
            tally.runs += 1
            found = result(out)
            for name in expected.keys() | found.keys():
                if expected.get(name) != found.get(name):
                    tally.differences.append(f"{out.name}: {name}")
            done = sum(tally.kills.values()) == kills
            out = self.folder / f"run-{processes}-{tally.runs}"
        return tally

    def kill_once(self, run: Started, out: Path, processes: int, seconds: float, tally: Tally) -> None:
        """One signal at a random moment, unless the run ends before it."""
        number = sum(tally.kills.values())
        name = ("SIGTERM", "SIGUSR1")[number // 4 % 2] if number % 4 == 1 else "SIGKILL"
        both = name == "SIGKILL" and (processes == 1 or number % 4 != 2)
        moment = time.monotonic() + self.random.uniform(0, seconds)
        while run.running() and time.monotonic() < moment:
            time.sleep(0.002)
        while number % 3 == 0 and run.running() and not being_written(out):
            time.sleep(0.0005)
        if not run.hit(signal.Signals[name], both):
            return
        run.wait()
        tally.kills[name] += 1
        tally.in_checkpoint += being_written(out)
        tally.one_of_two += processes == 2 and not both


def soak(config: SoakConfig, folder: Path, starter: Preloaded | None) -> dict[int, Tally]:
    """Kills so many runs of one process and of two; the tally of each. Without a ``starter`` runs are whole commands."""
    runner = Soak(folder, config, starter)
    shares = {1: config.kills - config.kills // 2, 2: config.kills // 2}
    return {processes: runner.kill_again_and_again(processes, kills) for processes, kills in shares.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(SoakConfig, arguments, "soak.py")
    begun = time.monotonic()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        starter = stack.enter_context(Preloaded(ENVIRONMENT)) if config.start == "preloaded" else None
        tallies = soak(config, folder, starter)
    print(machine())
    print(
        "| processes | kills | of which SIGTERM, SIGUSR1 | one of two | inside a checkpoint write | saved on request | runs "
        "| differences |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for processes, tally in tallies.items():
        kills = sum(tally.kills.values())
        print(
            f"| {processes} | {kills} | {kills - tally.kills['SIGKILL']} | {tally.one_of_two} | {tally.in_checkpoint} "
            f"| {tally.saved_on_request} | {tally.runs} | {len(tally.differences)} |"
        )
    differences = [name for tally in tallies.values() for name in tally.differences]
    for name in differences:
        print(f"differs: {name}")
    print(f"{config.kills} kills in {time.monotonic() - begun:.0f} s, {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
