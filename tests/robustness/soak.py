"""Kills a stage again and again at random moments, goes on each time, and compares with the uninterrupted run.

    python tests/robustness/soak.py --kills 50
    python tests/robustness/soak.py --kills 50 --stage finetune
    python tests/robustness/soak.py --kills 50 --stage pack
    python tests/robustness/soak.py --kills 50 --start command

Half of the kills hit a run of one process, the others a run of two, of which in turn one or both are hit. Of four kills
three are SIGKILL and one is SIGTERM or SIGUSR1, which a single process gets. Each run is started with the same arguments
until it ends by itself; then its student, log and newest checkpoint must equal those of the uninterrupted run byte for
byte, and the next run begins. Every third kill waits for a checkpoint that is being written.

A run of ``kd finetune`` is four, of two folds and two seeds, with a cache, a linear probe and early stopping. Of ``kd pack``
the processes are its workers, beside the one that was started, and the files that it makes are compared; SIGTERM and
SIGUSR1 go to all of them, SIGKILL to all or to one worker. What it writes are shards and the store made from them.

``--start command`` starts whole commands (two processes through torch.distributed.run, which is what gets SIGTERM then);
by default they are forked from a process that has imported everything, which takes a tenth of the time. Clips are
noise, the student is an mn01, with gradient accumulation, a moving average and validation. Exits with 1 at a difference,
or if a signal led to another exit code than 75; a run that hangs ends it with a traceback.
"""

import importlib.util
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

import psutil

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent))
from machine import machine
from preloaded import Preloaded
from soak_stages import STAGES, Stage

from audio_datasets.system.command import STOPPED, parse

LONGEST_SECONDS = 600
"""A run that has not ended by then hangs; an uninterrupted one takes some ten seconds."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


@dataclass(frozen=True)
class SoakConfig:
    """Kill a stage again and again."""

    stage: Literal["pretrain", "finetune", "pack"] = "pretrain"
    """Which one."""

    kills: int = 50
    """How many kills, half of them with two processes."""
    epochs: int = 8
    """Epochs of a run; an epoch is some steps of eight clips, and a checkpoint follows each step."""
    start: Literal["preloaded", "command"] = "preloaded"
    """Fork runs from a process that has imported everything, or start whole commands."""
    seed: int = 0
    """Seed of the moments."""


class Started(Protocol):
    """A run at work: one process or several."""

    def running(self) -> bool: ...

    def hit(self, number: signal.Signals, both: bool) -> bool:
        """Sends a signal to the run, or, of several processes, perhaps to one only; False if it had ended."""

    def wait(self) -> list[int]:
        """Exit codes; negative for a signal."""


class StartedCommand:
    """Whole commands, several processes through torch.distributed.run."""

    def __init__(self, stage: Stage, arguments: list[str], processes: int, random: Random, output: Path) -> None:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
        script = importlib.util.find_spec(stage.module).origin
        several = stage.launched and processes > 1
        command = [sys.executable, *(launcher if several else []), script, *arguments]
        with open(output, "ab") as file:
            self.process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=file, stderr=file)
        self.stage = stage
        self.processes = processes
        self.random = random

    def running(self) -> bool:
        return self.process.poll() is None

    def hit(self, number: signal.Signals, both: bool) -> bool:
        if not self.stage.launched:
            return hit_workers(self.process.pid, number, both, self.random)
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
        return send_to(victims, number)

    def wait(self) -> list[int]:
        return [self.process.wait(LONGEST_SECONDS)]


def hit_workers(pid: int, number: signal.Signals, both: bool, random: Random) -> bool:
    """Sends a signal to a process and those below it, or to one of the latter; False if there is none."""
    try:
        top = psutil.Process(pid)
        below = top.children(recursive=True)
        victims = [*below, top] if both else [random.choice(below or [top])]
    except psutil.NoSuchProcess:
        return False
    return send_to(victims, number)


def send_to(processes: Sequence[psutil.Process], number: signal.Signals) -> bool:
    """False if none of them is there any more."""
    hits = 0
    for process in processes:
        try:
            process.send_signal(number)
            hits += 1
        except psutil.NoSuchProcess:
            continue
    return hits > 0


class StartedPreloaded:
    """Processes forked from a preloaded one, each with the environment that a launcher would give it."""

    def __init__(
        self,
        starter: Preloaded,
        stage: Stage,
        arguments: list[str],
        processes: int,
        random: Random,
        output: Path,
    ) -> None:
        processes = processes if stage.launched else 1
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        several = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        self.runs = [
            starter.start(
                arguments,
                {**several, "RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {},
                output,
                stage.module,
            )
            for rank in range(processes)
        ]
        self.stage = stage
        self.random = random

    def running(self) -> bool:
        return all(run.running() for run in self.runs)

    def hit(self, number: signal.Signals, both: bool) -> bool:
        if not self.stage.launched:
            return self.runs[0].running() and hit_workers(self.runs[0].pid, number, both, self.random)
        victims = self.runs if both else [self.random.choice(self.runs)]
        return sum(run.send(number) for run in victims) > 0

    def wait(self) -> list[int]:
        """As a launcher does it: when one has failed, the others are ended."""
        end = time.monotonic() + LONGEST_SECONDS
        while any(run.running() for run in self.runs):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"a run has not ended after {LONGEST_SECONDS} s; its processes are left for a look at them"
                )
            failed = [run for run in self.runs if not run.running() and run.wait() not in (0, STOPPED)]
            for run in self.runs if failed else []:
                run.send(signal.SIGKILL)
            time.sleep(0.01)
        return [run.wait() for run in self.runs]


@dataclass
class Tally:
    """What happened to the runs of so many processes."""

    kills: Counter = field(default_factory=Counter)
    writing: int = 0
    one_of_two: int = 0
    saved_on_request: int = 0
    runs: int = 0
    differences: list[str] = field(default_factory=list)


class Soak:
    """Runs, kills and compares; ``start`` is told the arguments, the number of processes and a file for their output."""

    def __init__(self, folder: Path, config: SoakConfig, starter: Preloaded | None) -> None:
        self.folder = folder
        self.config = config
        self.starter = starter
        self.random = Random(config.seed)
        self.stage = STAGES[config.stage]
        self.stage.write_scene(folder)

    def start(self, out: Path, processes: int) -> Started:
        values = self.stage.arguments(self.folder, out, processes, self.config.epochs)
        output = out.with_suffix(".log")
        if self.starter is None:
            return StartedCommand(self.stage, values, processes, self.random, output)
        return StartedPreloaded(self.starter, self.stage, values, processes, self.random, output)

    def whole(self, processes: int) -> tuple[dict[str, str], float]:
        """Result and seconds of an uninterrupted run."""
        out = self.folder / f"whole-{processes}"
        begun = time.monotonic()
        codes = self.start(out, processes).wait()
        assert not any(codes), out.with_suffix(".log").read_text()
        return self.stage.result(out), time.monotonic() - begun

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
            found = self.stage.result(out)
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
        both = both or (name != "SIGKILL" and not self.stage.launched)
        moment = time.monotonic() + self.random.uniform(0, seconds)
        while run.running() and time.monotonic() < moment:
            time.sleep(0.01)
        while number % 3 == 0 and run.running() and not self.stage.being_written(out):
            time.sleep(0.002)
        if not run.hit(signal.Signals[name], both):
            return
        codes = run.wait()
        tally.kills[name] += 1
        # One that comes before the command has begun just ends it; the other of two may end of an error then.
        if name != "SIGKILL" and any(codes) and not {STOPPED, -signal.Signals[name]} & set(codes):
            tally.differences.append(f"{out.name}: {name} led to exit codes {codes}")
        tally.writing += self.stage.being_written(out)
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
    print(f"{machine()}, stage {config.stage}")
    print(
        "| processes | kills | of which SIGTERM, SIGUSR1 | one of two | in a write | saved on request | runs "
        "| differences |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for processes, tally in tallies.items():
        kills = sum(tally.kills.values())
        print(
            f"| {processes} | {kills} | {kills - tally.kills['SIGKILL']} | {tally.one_of_two} | {tally.writing} "
            f"| {tally.saved_on_request} | {tally.runs} | {len(tally.differences)} |"
        )
    differences = [name for tally in tallies.values() for name in tally.differences]
    for name in differences:
        print(f"differs: {name}")
    print(f"{config.kills} kills in {time.monotonic() - begun:.0f} s, {len(differences)} differences")
    return 1 if differences else 0


if __name__ == "__main__":
    raise SystemExit(main())
