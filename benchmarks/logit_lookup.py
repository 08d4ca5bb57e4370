"""Logit look-up by clip id: rows per second, seconds to open and private memory, against a Python dict of ids and h5py.

    python benchmarks/logit_lookup.py --folder /somewhere/with/space

Writes a store of 2 million clips × 527 classes (2.2 GB, removed afterwards) and reads random batches of 120 clips from it. The
baseline is what is usually written: all ids in a dict, and one h5py read per clip. Each of the two is measured in a
process of its own. Private memory is what /proc/self/smaps_rollup calls Private_Clean + Private_Dirty, less what the
process had before it opened the store: pages of the file that only this process has mapped count in full.
"""

import hashlib
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from machine import processor_name

from audio_datasets.system.command import parse
from teacher_logits.store import LogitStore, write_logit_store

NUM_CLASSES = 527
ROWS_PER_BLOCK = 10_000

Read = Callable[[list[str]], np.ndarray]


@dataclass(frozen=True)
class LookupConfig:
    """Measure look-up in a large logit store."""

    folder: Path | None = None
    """Where to write the store; the system's folder for temporary files if left out."""
    clips: int = 2_000_000
    """Clips in the store."""
    batch_size: int = 120
    """Clips in a batch."""
    seconds: float = 10.0
    """How long each is read."""


@dataclass(frozen=True)
class Measurement:
    """What one way of reading took."""

    open_seconds: float
    first_rows_per_second: float
    """Over the first ten batches."""
    rows_per_second: float
    private_megabytes: float
    """The most seen after opening and after every 101 batches."""


def clip_name(index: int) -> str:
    """An id in no order, as AudioSet's are."""
    return "Y" + hashlib.blake2b(index.to_bytes(8, "little"), digest_size=6).hexdigest()


def write_store(path: Path, clips: int) -> None:
    rng = np.random.default_rng(0)

    def blocks() -> Iterator[np.ndarray]:
        block = rng.normal(-4, 2, (ROWS_PER_BLOCK, NUM_CLASSES)).astype(np.float16)
        for start in range(0, clips, ROWS_PER_BLOCK):
            yield block[: min(ROWS_PER_BLOCK, clips - start)]

    write_logit_store(
        path,
        clip_ids=[clip_name(index) for index in range(clips)],
        audio_digests=np.zeros((clips, 16), np.uint8),
        logit_blocks=blocks(),
        class_names=[f"class {index}" for index in range(NUM_CLASSES)],
        teacher={"name": "noise", "link": "sigmoid"},
        clip_store_fingerprint="",
    )


def open_ours(path: Path) -> Read:
    return LogitStore.open(path).read


def open_plain(path: Path) -> Read:
    file = h5py.File(path, "r")
    logits = file["logits"]
    rows = {name.decode(): row for row, name in enumerate(file["clip_id"][:])}
    return lambda ids: np.stack([logits[rows[name]] for name in ids]).astype(np.float32)


def private_megabytes() -> float:
    """Private memory of this process, file pages that no other process has mapped included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def measure(way: Callable[[Path], Read], path: Path, config: LookupConfig, queue: multiprocessing.Queue) -> None:
    rng = np.random.default_rng(1)

    def draw() -> list[str]:
        return [clip_name(index) for index in rng.integers(0, config.clips, config.batch_size).tolist()]

    before = private_megabytes()
    start = time.perf_counter()
    read = way(path)
    open_seconds = time.perf_counter() - start
    most = private_megabytes() - before

    batch_seconds: list[float] = []
    while sum(batch_seconds) < config.seconds:
        ids = draw()
        start = time.perf_counter()
        read(ids)
        batch_seconds.append(time.perf_counter() - start)
        if len(batch_seconds) % 101 == 0:  # in step with nothing that happens every so many batches
            most = max(most, private_megabytes() - before)
    first = config.batch_size * 10 / sum(batch_seconds[:10])
    later = config.batch_size * len(batch_seconds[10:]) / sum(batch_seconds[10:])
    queue.put(Measurement(open_seconds, first, later, most))


def measured_alone(way: Callable[[Path], Read], path: Path, config: LookupConfig) -> Measurement:
    """The measurement, made in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=measure, args=(way, path, config, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(LookupConfig, arguments, "logit_lookup.py")
    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        path = Path(folder) / "logits.h5"
        start = time.perf_counter()
        write_store(path, config.clips)
        print(
            f"{processor_name()}, NumPy {np.__version__}; {config.clips:,} clips × {NUM_CLASSES} classes, "
            f"{path.stat().st_size / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s; batches of "
            f"{config.batch_size}"
        )
        plain = measured_alone(open_plain, path, config)
        ours = measured_alone(open_ours, path, config)
    print("| | dict of ids and h5py | LogitStore | ratio |")
    print("|---|---|---|---|")
    for name, one, other, ratio in [
        ("seconds to open", plain.open_seconds, ours.open_seconds, plain.open_seconds / ours.open_seconds),
        ("rows/s", plain.rows_per_second, ours.rows_per_second, ours.rows_per_second / plain.rows_per_second),
        (
            "rows/s, first ten batches",
            plain.first_rows_per_second,
            ours.first_rows_per_second,
            ours.first_rows_per_second / plain.first_rows_per_second,
        ),
        (
            "private memory, MB",
            plain.private_megabytes,
            ours.private_megabytes,
            plain.private_megabytes / ours.private_megabytes,
        ),
    ]:
        digits = 0 if max(one, other) >= 100 else 3
        print(f"| {name} | {one:,.{digits}f} | {other:,.{digits}f} | {ratio:.1f}× |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
