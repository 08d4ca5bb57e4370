"""Damaged and generated files through everything that reads some, and command lines through every command.

    python tests/robustness/fuzz.py                                  # 10,000 inputs
    python tests/robustness/fuzz.py --inputs 500 --only mp3 --keep failures/

Each input is made from a good file by a number and a seed alone: bits are flipped, bytes overwritten, runs of them removed,
doubled, moved or taken from another file, the end cut off, numbers in headers made absurd; or what it holds (attributes,
arrays, values, cells, tensors) is replaced by others. Each is then refused with a ValueError or OSError that names the file,
or accepted, and then what is read must be right: equal to what was written, or, where a format has no checksum, fit to be used
(finite, of the right shape). Anything else is a failure: another exception, a process that crashes, one that takes longer than the limit or
more than 4 GB.

Prints a table in Markdown and the failures; exit code 1 if there are any.
"""

import io
import multiprocessing
import os
import resource
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import fuzz_runs
import fuzz_stores
import fuzz_tasks
import fuzz_teachers
import torch
from fuzz_damage import damage
from fuzz_targets import Target, Wrong

from audio_datasets.system.command import parse, progress
from audio_datasets.system.randomness import generator

TARGETS = {**fuzz_stores.TARGETS, **fuzz_tasks.TARGETS, **fuzz_teachers.TARGETS, **fuzz_runs.TARGETS}

MOST_MEMORY = 4 * 2**30
LONGEST_MESSAGE = 2000


@dataclass(frozen=True)
class FuzzConfig:
    """Send damaged and generated files through our readers."""

    inputs: int = 10_000
    """Inputs in all, shared by the targets according to their weight."""
    seed: int = 0
    """Seed of the damage."""
    only: tuple[str, ...] = ()
    """Names of targets to try; all if left out."""
    seconds: float = 30.0
    """Time that one input may take."""
    keep: Path | None = None
    """Folder for the inputs that failed."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.only if name not in TARGETS]
        if unknown:
            raise ValueError(f"there are no targets {unknown}; known: {sorted(TARGETS)}")
        if self.inputs < 1 or not self.seconds > 0:
            raise ValueError(f"inputs and seconds must be positive; found {self.inputs} and {self.seconds}")


# -- Running -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What became of one input."""

    kind: str
    """``accepted``, ``refused`` or ``failed``."""
    detail: str = ""


def make_input(
    target: Target, good_files: list[Path], folder: Path, name: str, seed: int, number: int
) -> tuple[Path, Path]:
    """Writes input ``number`` into an empty folder: (damaged file, the good file it was made from)."""
    draws = generator(seed, f"fuzz {name}", 0, number)
    good = good_files[number % len(good_files)]
    path = folder / f"input{good.suffix}"
    if target.change is not None and draws.random() < target.changed:
        shutil.copy(good, path)
        target.change(path, draws)
    else:
        path.write_bytes(damage(good.read_bytes(), [file.read_bytes() for file in good_files], draws))
    return path, good


def try_input(target: Target, path: Path, good: Path) -> Outcome:
    """Reads one input; what is printed is thrown away."""
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            target.read(path, good)
    except (ValueError, OSError) as error:
        message = str(error)
        named = not target.names_file or str(path.parent) in message
        if not message or not named or len(message) > LONGEST_MESSAGE or "Traceback" in message:
            return Outcome("failed", f"no plain message: {message[:300]!r}")
        return Outcome("refused", message)
    except Wrong as error:
        return Outcome("failed", f"accepted, but {error}")
    except BaseException as error:
        frame = error.__traceback__
        while frame.tb_next is not None:
            frame = frame.tb_next
        where = f"{Path(frame.tb_frame.f_code.co_filename).name}:{frame.tb_lineno}"
        return Outcome("failed", f"{type(error).__name__} in {where}: {str(error)[:300]}")
    return Outcome("accepted")


def work(connection: Connection, name: str, good_files: list[Path], seed: int, numbers: range, scratch: Path) -> None:
    """A process that tries some inputs of one target and reports the outcome of each."""
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY + memory_in_use(), resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # libmpg123 writes to standard error by itself.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    sys.path.insert(0, str(Path(__file__).parent))
    for number in numbers:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        path, good = make_input(TARGETS[name], good_files, scratch, name, seed, number)
        connection.send(try_input(TARGETS[name], path, good))
    connection.close()


def memory_in_use() -> int:
    """Bytes of address space of this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def outcomes(name: str, good_files: list[Path], count: int, config: FuzzConfig, scratch: Path) -> Iterator[Outcome]:
    """The outcomes of all inputs of a target, in order; a process that crashes or hangs is replaced by another."""
    context = multiprocessing.get_context("fork")
    number = 0
    while number < count:
        receiving, sending = context.Pipe(duplex=False)
        process = context.Process(
            target=work, args=(sending, name, good_files, config.seed, range(number, count), scratch)
        )
        process.start()
        sending.close()
        try:
            while number < count:
                if not receiving.poll(config.seconds):
                    yield Outcome("failed", f"hangs: more than {config.seconds:g} s")
                    number += 1
                    break
                yield receiving.recv()
                number += 1
        except EOFError:
            process.join()
            yield Outcome("failed", f"crashes: exit code {process.exitcode}")
            number += 1
        finally:
            process.kill()
            process.join()
            receiving.close()


def fuzz(config: FuzzConfig) -> int:
    """Tries all inputs, prints the table and the failures, and returns how many there are."""
    targets = {name: target for name, target in TARGETS.items() if not config.only or name in config.only}
    total = sum(target.weight for target in targets.values())
    counts = {name: max(1, round(config.inputs * target.weight / total)) for name, target in targets.items()}
    rows, failures = [], []
    with tempfile.TemporaryDirectory() as scratch, progress(total=sum(counts.values()), unit="input") as bar:
        for name, target in targets.items():
            bar.set_description(name)
            folder = Path(scratch) / name.replace(" ", "_")
            folder.mkdir()
            good_files = target.prepare(folder)
            for good in good_files:
                (folder / "check").mkdir()
                copy = Path(shutil.copy(good, folder / "check" / f"input{good.suffix}"))
                sys.path.insert(0, str(Path(__file__).parent))
                found = try_input(target, copy, good)
                assert found.kind == "accepted", (name, good, found)
                shutil.rmtree(folder / "check")
            start, kinds = time.perf_counter(), Counter()
            for number, outcome in enumerate(outcomes(name, good_files, counts[name], config, folder / "scratch")):
                kinds[outcome.kind] += 1
                bar.update()
                if outcome.kind == "failed":
                    failures.append(f"{name} {number}: {outcome.detail}")
                    keep_input(config, target, good_files, name, number)
            seconds = time.perf_counter() - start
            rows.append((name, counts[name], kinds["refused"], kinds["accepted"], kinds["failed"], f"{seconds:.0f}"))
    rows.append(
        ("all", *(sum(row[column] for row in rows) for column in range(1, 5)), sum(int(row[5]) for row in rows))
    )
    print("| input | tried | refused | accepted and correct | failures | seconds |")
    print("|---|---:|---:|---:|---:|---:|")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")
    for failure in failures:
        print(failure)
    return len(failures)


def keep_input(config: FuzzConfig, target: Target, good_files: list[Path], name: str, number: int) -> None:
    """Writes an input that failed to ``config.keep``, if that is given."""
    if config.keep is None:
        return
    folder = config.keep / f"{name.replace(' ', '_')}-{number}"
    folder.mkdir(parents=True, exist_ok=True)
    make_input(target, good_files, folder, name, config.seed, number)


def main() -> int:
    return min(1, fuzz(parse(FuzzConfig, None, "fuzz.py")))


if __name__ == "__main__":
    raise SystemExit(main())
