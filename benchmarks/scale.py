"""Both stages at the size of AudioSet: 2,000,000 clips × 527 classes, with time, peak memory and bytes of each step.

    python benchmarks/scale.py --folder /somewhere/with/10/GB/free

The clips are of 4 ms, so that what is measured is what depends on their number; the logits are noise. Every step runs in
a process of its own, on files that the steps before it wrote (all are removed at the end). Seconds of the processor leave
out waiting for the disk, for other programs on the machine, and for data-loading workers. Peak memory is the most that
was resident during the step, less what was so before it; pages of mapped files, which processes share, are counted. For
data-loading workers, which are forked, it is the memory that is theirs alone (Private_Clean + Private_Dirty in
/proc/self/smaps_rollup); the last line is for a hundredth of the clips.
"""

import hashlib
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from machine import machine
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, concatenate, write_clip_store
from audio_datasets.system.command import parse
from kd.data.examples import TrainingExamples
from kd.data.sampling import ClipRequest, EpochBatches, SamplingConfig
from kd.data.windows import Window
from students.frontend import LogMelConfig
from teacher_logits.compact import write_compact
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.stores.class_precisions import class_precisions
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.shards import ShardFolder, shard_rows
from teacher_logits.verify import check_clips, check_content

SAMPLE_RATE_HZ = 32000
SAMPLES = 128
LABELS_PER_CLIP = 2
CLIPS_PER_PART = 50_000
SHARD_CLIPS = 4096
WORKERS = 2
PRIVATE_MEMORY_EVERY = 100  # clips


@dataclass(frozen=True)
class ScaleConfig:
    """Measure both stages on a synthetic collection of AudioSet's size."""

    folder: Path | None = None
    """Where to write the files; the system's folder for temporary files if left out."""
    clips: int = 2_000_000
    """Clips."""
    classes: int = 527
    """Classes."""
    batch_size: int = 120
    """Clips in a batch."""
    keep: int = 50
    """Logits kept of each clip in the compact store."""
    clips_loaded: int = 24_000
    """Clips that the data-loading workers load."""
    seconds: float = 10.0
    """How long random reading is measured."""
    average_precision: bool = True
    """Also measure mAP over all clips, which takes some minutes."""

    def class_names(self) -> list[str]:
        return [f"class {index}" for index in range(self.classes)]


@dataclass(frozen=True)
class Files:
    """Where the files of one collection lie."""

    folder: Path

    @property
    def parts(self) -> Path:
        return self.folder / "parts"

    @property
    def clips(self) -> Path:
        return self.folder / "clips.h5"

    @property
    def logits(self) -> Path:
        return self.folder / "teacher.h5"

    @property
    def compact(self) -> Path:
        return self.folder / "compact.h5"

    def shards(self, config: ScaleConfig) -> ShardFolder:
        return ShardFolder(self.logits, {}, shard_rows(config.clips, SHARD_CLIPS), config.classes)


# -- Steps: what they return is what the table says of them besides time and memory, "{rate}" being MB/s -----------------


def write_parts(files: Files, config: ScaleConfig) -> str:
    names = config.class_names()
    rng = np.random.default_rng(0)
    for start in range(0, config.clips, CLIPS_PER_PART):
        count = min(CLIPS_PER_PART, config.clips - start)
        samples = rng.integers(-20000, 20000, (count, SAMPLES)).astype(np.int16)
        labels = (rng.random((count, LABELS_PER_CLIP)) ** 3 * config.classes).astype(int)  # the first classes mostly
        records = [
            ClipRecord(clip_name(start + place), samples[place], tuple({names[index] for index in labels[place]}))
            for place in range(count)
        ]
        part = files.parts / f"{start:09d}.h5"
        write_clip_store(part, records, names, audio_kind="pcm16", sample_rate_hz=SAMPLE_RATE_HZ)
    return f"{len(list(files.parts.iterdir()))} parts"


def join_parts(files: Files, config: ScaleConfig) -> str:
    concatenate(sorted(files.parts.iterdir()), files.clips)
    return megabytes(files.clips)


def write_shards(files: Files, config: ScaleConfig) -> str:
    work = files.shards(config)
    work.begin()
    noise = np.random.default_rng(1).normal(-6, 2, (SHARD_CLIPS, config.classes)).astype(np.float16)
    for index, rows in enumerate(work.shards):
        work.write(index, np.roll(noise, index)[: len(rows)])
    return f"{len(work.shards)} shards, {megabytes(*work.folder.iterdir())}, {{rate}}"


def merge_shards(files: Files, config: ScaleConfig) -> str:
    work, clips = files.shards(config), ClipStore.open(files.clips)
    merged = work.folder / "merged.h5"
    write_logit_store(
        merged,
        clip_ids=clips.encoded_clip_ids,
        audio_digests=clips.audio_digests(np.arange(len(clips))),
        logit_blocks=work.blocks(),
        class_names=clips.class_names,
        teacher={"name": "noise", "fingerprint": "0" * 32, "link": "sigmoid"},
        clip_store_fingerprint=clips.fingerprint,
    )
    work.publish(merged)
    return f"{megabytes(files.logits)}, {{rate}}"


def open_logits(files: Files, config: ScaleConfig) -> str:
    return f"{len(LogitStore.open(files.logits)):,} clips"


def open_clips(files: Files, config: ScaleConfig) -> str:
    return f"{len(ClipStore.open(files.clips)):,} clips"


def check_values(files: Files, config: ScaleConfig) -> str:
    assert check_content(LogitStore.open(files.logits)) == []
    return "ids, finite values, fingerprint"


def check_coverage(files: Files, config: ScaleConfig) -> str:
    assert check_clips(LogitStore.open(files.logits), ClipStore.open(files.clips), False, False) == []
    return "every clip has logits, of the same audio"


def measure_precision(files: Files, config: ScaleConfig) -> str:
    found = class_precisions(LogitEnsemble.open([files.logits]), ClipStore.open(files.clips))
    return f"mAP over {int((found.positives > 0).sum())} classes"


def make_compact(files: Files, config: ScaleConfig) -> str:
    write_compact(LogitStore.open(files.logits), files.compact, config.keep)
    return megabytes(files.compact)


def read_logits(files: Files, config: ScaleConfig) -> str:
    return read_at_random(files.logits, config)


def read_compact(files: Files, config: ScaleConfig) -> str:
    return read_at_random(files.compact, config)


def check_training_data(files: Files, config: ScaleConfig) -> str:
    missing = LogitEnsemble.open([files.logits]).check_against(ClipStore.open(files.clips))
    assert not missing.any()
    return "once in a run"


def weigh_clips(files: Files, config: ScaleConfig) -> str:
    sampler = make_sampler(files, config)
    start = time.perf_counter()
    next(iter(sampler))
    return f"once in a run; {time.perf_counter() - start:.2f} s more in each epoch"


def load_clips(files: Files, config: ScaleConfig) -> str:
    clips = ClipStore.open(files.clips)
    dataset = MeasuredClips(
        clips,
        np.arange(len(clips)),
        Window(SAMPLE_RATE_HZ, SAMPLES / SAMPLE_RATE_HZ),
        frontend=LogMelConfig(),
        augment=AugmentConfig(),
        seed=0,
        teachers=LogitEnsemble.open([files.logits]),
    )
    sampler = make_sampler(files, config)
    loader = DataLoader(dataset, batch_sampler=sampler, num_workers=WORKERS, multiprocessing_context="fork")
    most = max(float(batch["private_megabytes"].max()) for batch in loader)
    return f"{len(dataset.clips):,} clips; private memory of a worker {most:.0f} MB"


# -- What the steps need -------------------------------------------------------------------------------------------------


def clip_name(index: int) -> str:
    """An id in no order, as AudioSet's are."""
    return "Y" + hashlib.blake2b(index.to_bytes(8, "little"), digest_size=6).hexdigest()


def read_at_random(path: Path, config: ScaleConfig) -> str:
    before = private_megabytes()
    store = LogitStore.open(path)
    rng = np.random.default_rng(2)
    clips, seconds = 0, 0.0
    while seconds < config.seconds:
        ids = [clip_name(index) for index in rng.integers(0, config.clips, config.batch_size).tolist()]
        start = time.perf_counter()
        store.read(ids)
        seconds += time.perf_counter() - start
        clips += len(ids)
    return f"{clips / seconds:,.0f} rows/s, private memory {private_megabytes() - before:.0f} MB"


def make_sampler(files: Files, config: ScaleConfig) -> EpochBatches:
    clips = ClipStore.open(files.clips)
    sampling = SamplingConfig(clips_per_epoch=min(config.clips_loaded, len(clips)))
    return EpochBatches(
        clips, np.arange(len(clips)), sampling, batch_size=config.batch_size, batches_per_step=1, seed=0
    )


class MeasuredClips(TrainingExamples):
    """Training clips that tell, now and then, the private memory of the worker that made them."""

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        due = request.position % PRIVATE_MEMORY_EVERY == 0
        return {**super().__getitem__(request), "private_megabytes": private_megabytes() if due else 0.0}


def private_megabytes() -> float:
    """Memory that only this process has, pages of files that no other process has mapped included."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("Private_Clean", "Private_Dirty"))) / 1024


def resident_megabytes(field: str) -> float:
    """``VmRSS``, what is resident now, or ``VmHWM``, the most that was."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def megabytes(*paths: Path) -> str:
    return f"{sum(path.stat().st_size for path in paths) / 1e6:,.0f} MB"


# -- Measuring -----------------------------------------------------------------------------------------------------------

Step = Callable[[Files, ScaleConfig], str]


def run_step(step: Step, files: Files, config: ScaleConfig) -> tuple[float, float, float, str]:
    """Seconds, seconds of the processor, peak memory in MB, and remark."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    before = resident_megabytes("VmRSS")
    start, busy_before = time.perf_counter(), time.process_time()
    remark = step(files, config)
    seconds, busy = time.perf_counter() - start, time.process_time() - busy_before
    rate = ""
    if "{rate}" in remark:
        written = files.logits if files.logits.exists() else files.shards(config).folder
        size = written.stat().st_size if written.is_file() else sum(path.stat().st_size for path in written.iterdir())
        rate = f"{size / 1e6 / seconds:,.0f} MB/s"
    return seconds, busy, resident_megabytes("VmHWM") - before, remark.format(rate=rate)


def main(arguments: Sequence[str] | None = None) -> int:
    config = parse(ScaleConfig, arguments, "scale.py")
    steps: list[tuple[str, str, Step]] = [
        ("clips: write parts", "", write_parts),
        ("clips: join them", "", join_parts),
        ("clips: open", "1 s", open_clips),
        ("logits: write shards", "", write_shards),
        ("logits: merge them", "200 MB/s", merge_shards),
        ("logits: open", "1 s", open_logits),
        ("logits: random batches", "50,000 rows/s, 100 MB", read_logits),
        (f"logits: keep {config.keep} of a clip", "", make_compact),
        ("logits: random batches of these", "50,000 rows/s, 100 MB", read_compact),
        ("verify: content", "120 s with the next", check_values),
        ("verify: against the clips", "", check_coverage),
        *([("verify: average precision", "", measure_precision)] if config.average_precision else []),
        ("pretrain: check the logits", "", check_training_data),
        ("pretrain: weigh the clips", "", weigh_clips),
        (f"pretrain: load {config.clips_loaded:,} clips", "100 MB", load_clips),
    ]
    print(f"{machine()}; {config.clips:,} clips × {config.classes} classes, batches of {config.batch_size}\n")
    print("| step | seconds | of the processor | peak memory, MB | | aim |\n|---|---|---|---|---|---|")

    def measure(name: str, aim: str, step: Step, files: Files, config: ScaleConfig) -> None:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            seconds, busy, memory, remark = pool.submit(run_step, step, files, config).result()
        print(f"| {name} | {seconds:,.2f} | {busy:,.2f} | {memory:,.0f} | {remark} | {aim} |", flush=True)

    with tempfile.TemporaryDirectory(dir=config.folder) as folder:
        whole, few = Files(Path(folder) / "whole"), Files(Path(folder) / "few")
        for name, aim, step in steps:
            measure(name, aim, step, whole, config)
            if step is join_parts:
                shutil.rmtree(whole.parts)
        fewer = replace(config, clips=config.clips // 100)
        for step in (write_parts, join_parts, write_shards, merge_shards):
            step(few, fewer)
        measure(*steps[-1], few, fewer)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
