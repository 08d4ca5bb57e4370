"""``kd teach``: runs teachers over a clip store and keeps their logits, one logit store for each teacher.

Any number of processes share the work, shard by shard (see ``shards.py``). What is computed for a clip depends on
neither their number nor on who computes it, and a run that was killed continues: each process loses at most the shard
that it was working on. Two processes on a CPU machine:

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 teacher_logits/precompute.py …

On a CPU each process computes with one thread, unless OMP_NUM_THREADS says otherwise: sums come out the same on any number
of cores, and threads do not fight with the data loaders for them. More processes, not more threads, use more cores.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from audio_datasets.audio.bad_clips import BadClipError, ClipList, OnBadClip, summary
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import read_manifest
from audio_datasets.system.command import parse, progress, run_command
from audio_datasets.system.disk_space import require_space
from audio_datasets.system.stop_signals import Stopped, StopSignals, outlive_stop_signals
from teacher_logits.processes import LONGEST_WAIT, locked_by_main_process, on_main_process, start_accelerator
from teacher_logits.store import LogitStore, to_float16, write_logit_store
from teacher_logits.stores.rows import check_keep, row_bytes
from teacher_logits.stores.shards import ShardBatches, ShardFolder, batches_of, shard_rows
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.class_mapping import MappedTeacher, read_class_map, with_classes_of_clips
from teacher_logits.teachers.heard_views import heard_views
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher


@dataclass(frozen=True)
class TeachConfig:
    """Run one or more teachers over a clip store and keep their logits.

    A run that was killed goes on when the same command is given again.
    """

    clips: Path
    """Clip store with the clips to hear."""
    teacher: tuple[str, ...]
    """One or more of: a run folder, NAME@WEIGHTS (as mn04@mn04_as_mAP_432.pt or passt@passt-s.pt), FILE.onnx,
    ast:FOLDER_OR_NAME, module:function."""
    out: Path
    """Folder for the logit stores, one file NAME.h5 for each teacher."""
    name: tuple[str, ...] = ()
    """Names of the teachers, as many as there are teachers; their own if left out."""
    class_names: Path | None = None
    """Class list for weights or clip stores that carry none (AudioSet's class_labels_indices.csv, or one name a line)."""
    teacher_class_names: Path | None = None
    """Class list of teachers that carry none, where it is not that of the clips (see class_map)."""
    class_map: Path | None = None
    """CSV file (columns teacher_class, class) for teachers whose classes are not those of the clips: each class of the clips
    is the maximum over the teacher's classes that are mapped to it."""
    clip_seconds: float | None = None
    """Length of clip that the teachers hear, in seconds; their own (mostly 10) if left out."""
    batch_size: int = 32
    """Clips in a batch of one process."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision in which the teachers compute; logits are stored as float16 in any case."""
    workers: int = 2
    """Data-loading processes for each process."""
    shard_clips: int = 4096
    """Clips in a shard, which is what a process loses at most when it is killed."""
    keep: int | None = None
    """Store only so many logits of each clip, the largest, with one floor for each class in place of the rest (all if left
    out)."""
    views: Annotated[ViewConfig, tyro.conf.arg(name="")] = field(default_factory=ViewConfig)
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops with its name; skip leaves it out of the logit stores and lists it."""
    restart: bool = False
    """Give up unfinished work, and replace a finished store, that was made with other settings or of other clips."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("give at least one --teacher")
        if self.name and len(self.name) != len(self.teacher):
            raise ValueError(f"as many names as teachers are needed; found {len(self.name)} for {len(self.teacher)}")
        if len(set(self.name)) < len(self.name):
            raise ValueError(f"names of teachers must differ; found {list(self.name)}")
        if min(self.batch_size, self.shard_clips) < 1 or self.workers < 0:
            raise ValueError(
                "batch_size and shard_clips must be at least 1 and workers at least 0; "
                f"found {self.batch_size}, {self.shard_clips} and {self.workers}"
            )


def teach(config: TeachConfig) -> list[Path]:
    """Makes, or completes, the logit store of every teacher and returns their paths.

    Raises ValueError for files that are missing or of another kind, class lists that differ, a clip that cannot be
    decoded, logits that are not finite, work or stores that were made otherwise and would be lost, and a store that another
    run is making. Raises Stopped on SIGTERM and SIGUSR1; finished shards are kept.
    """
    torch.set_flush_denormal(True)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
    )
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = ClipStore.open(config.clips, class_names=class_names)
    check_keep(config.keep, len(clips.class_names))
    # All of them before the first starts: a mistake in the last should not show after hours.
    teachers = [_load(accelerator, config, spec, clips) for spec in config.teacher]
    if config.class_map is not None and not any(isinstance(teacher, MappedTeacher) for teacher in teachers):
        raise ValueError("--class-map would not be used: all teachers have the classes of the clips; leave it out")
    if config.teacher_class_names is not None and all(map(knows_its_classes, config.teacher)):
        raise ValueError("--teacher-class-names would not be used: all teachers know their own classes; leave it out")
    for teacher, name in zip(teachers, config.name, strict=False):
        teacher.name = name
    names = unique_names([teacher.name for teacher in teachers])
    paths = [config.out / f"{name}.h5" for name in names]
    with StopSignals() as signals:
        for teacher, path in zip(teachers, paths, strict=True):
            with locked_by_main_process(accelerator, path.with_name(f"{path.name}.lock"), str(path)):
                make_store(accelerator, teacher, clips, path, config, signals)
    return paths


def unique_names(names: Sequence[str]) -> list[str]:
    """Names made fit for files; one that occurs again gets a number: a, a-2, a-3."""
    result: list[str] = []
    for name in names:
        plain = re.sub(r"[^\w.-]+", "_", name).strip("._") or "teacher"
        number, candidate = 1, plain
        while candidate in result:
            number += 1
            candidate = f"{plain}-{number}"
        result.append(candidate)
    return result


def make_store(
    accelerator: Accelerator,
    teacher: Teacher,
    clips: ClipStore,
    path: Path,
    config: TeachConfig,
    signals: StopSignals | None = None,
) -> None:
    """Makes the logit store of one teacher at ``path``, or completes it, or finds that it is complete.

    Called on every process of the ``accelerator`` alike. Raises ValueError and Stopped as ``teach`` does.
    """
    signals = signals or StopSignals()
    views = views_for(teacher, config.views)
    described_views = {"views": asdict(views)} if views else {}
    description = json.loads(
        json.dumps({**teacher.describe(), "mixed_precision": accelerator.mixed_precision, **described_views})
    )
    plan = {
        "teacher": description,
        "clip_store_fingerprint": clips.fingerprint,
        "clips": len(clips),
        "batch_size": config.batch_size,
        "shard_clips": config.shard_clips,
    }
    shards = shard_rows(len(clips), config.shard_clips)
    work = ShardFolder(path, plan, shards, len(teacher.class_names), views.views if views else 1)

    skipped_clips = ClipList(skipped_path(path))

    def prepare() -> list[int] | None:
        """Numbers of the shards to do; None if the store is complete."""
        if path.exists() and _is_complete(path, description, clips, config):
            _refuse_skipped(config, skipped_clips.read(), len(clips))
            work.clean_up()
            return None
        work.begin(config.restart)
        _refuse_skipped(config, work.skipped(), len(clips))
        unfinished = work.unfinished()
        shard_bytes = row_bytes(len(teacher.class_names)) * sum(len(work.shards[index]) for index in unfinished)
        store_bytes = row_bytes(len(teacher.class_names), config.keep) * len(clips)
        needed = (shard_bytes + store_bytes) * work.views
        require_space(config.out, needed, f"the logits of {teacher.name} for {len(clips)} clips")
        return unfinished

    unfinished = on_main_process(accelerator, prepare)
    if unfinished is None:
        accelerator.print(f"{path} is complete: nothing to do")
        return
    accelerator.print(
        f"{teacher.name}: {len(work.shards) - len(unfinished)} of {len(work.shards)} shards are there, "
        f"{sum(len(work.shards[index]) for index in unfinished)} of {len(clips)} clips to do on "
        f"{accelerator.num_processes} × {accelerator.device.type}"
    )
    share = unfinished[accelerator.process_index :: accelerator.num_processes]
    teacher.to(accelerator.device).eval()
    with _one_thread_on_cpu(accelerator.device):
        compute_shards(accelerator, teacher, clips, work, share, config, views, signals)
    teacher.to("cpu")
    accelerator.wait_for_everyone()

    def unless_stopped(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for block in blocks:
            stop_if_asked(signals, work)
            yield block

    def merge() -> dict[str, str]:
        """Makes the store from the shards; returns the clips that were skipped, and why."""
        skipped = work.skipped()
        rows = np.delete(np.arange(len(clips)), clips.rows(list(skipped)))
        if not len(rows):
            raise ValueError(f"{summary(skipped, len(clips), 'cannot be used')}; no clip is left")
        merged = work.folder / "merged.h5"
        write_logit_store(
            merged,
            clip_ids=clips.encoded_clip_ids[rows],
            audio_digests=clips.audio_digests(rows),
            logit_blocks=unless_stopped(work.blocks()),
            class_names=teacher.class_names,
            teacher=description,
            clip_store_fingerprint=clips.fingerprint,
            keep=config.keep,
        )
        skipped_clips.replace(skipped)
        work.publish(merged)
        return skipped

    skipped = on_main_process(accelerator, merge)
    accelerator.print(f"{path} written: {len(clips) - len(skipped)} clips × {len(teacher.class_names)} classes")
    if skipped:
        accelerator.print(f"{summary(skipped, len(clips), 'skipped')}; all are listed in {skipped_clips.path}")


def stop_if_asked(signals: StopSignals, work: ShardFolder) -> None:
    """Stopped if a signal came."""
    if signals.requested:
        raise Stopped(
            f"{signals.reason} came; finished shards are kept in {work.folder}, and the same command goes on with the others"
        )


def skipped_path(store_path: Path) -> Path:
    """``mn04.h5`` -> ``mn04.skipped.txt``: the clips that were left out, one per line with the reason."""
    return store_path.with_suffix(".skipped.txt")


def _refuse_skipped(config: TeachConfig, skipped: dict[str, str], num_clips: int) -> None:
    """ValueError if an earlier run has skipped clips and this one is not to."""
    if skipped and config.on_bad_clip == "refuse":
        raise ValueError(
            f"{summary(skipped, num_clips, 'cannot be used')}; go on without them by --on-bad-clip skip, or pack the clips "
            "again without them"
        )


def compute_shards(
    accelerator: Accelerator,
    teacher: Teacher,
    clips: ClipStore,
    work: ShardFolder,
    indices: Sequence[int],
    config: TeachConfig,
    views: ViewConfig | None,
    signals: StopSignals,
) -> None:
    """Computes the shards with these numbers and keeps each as soon as it is finished.

    Raises Stopped between two batches if ``signals`` ask for it; the shard it was working on is then given up.
    """
    clips_in_batch = max(1, config.batch_size // work.views)
    shards = [work.shards[index] for index in indices]
    batches = ShardBatches(shards, clips_in_batch)
    loader = DataLoader(
        ClipBatches(clips, batches, teacher, views),
        batch_size=None,  # the data set's items are batches
        num_workers=min(config.workers, len(batches)),
        worker_init_fn=outlive_stop_signals,
        pin_memory=accelerator.device.type == "cuda",
    )
    loaded = iter(loader)
    share = f" (1 of {accelerator.num_processes} processes)" if accelerator.num_processes > 1 else ""
    with progress(
        total=sum(map(len, shards)), shown=accelerator.is_main_process, desc=f"{teacher.name}{share}", unit="clip"
    ) as bar:
        for index in indices:
            parts, skipped = [np.empty((0, len(teacher.class_names)), dtype=np.float16)], {}
            for rows in batches_of(work.shards[index], clips_in_batch):
                stop_if_asked(signals, work)
                batch = next(loaded)
                for row, reason in batch.pop("bad_clips").items():
                    if config.on_bad_clip == "refuse":
                        raise ValueError(
                            f"clip {clips.clip_id(row)!r} of {clips.path}: {reason}; pack the clips again without it, or go "
                            "on without it by --on-bad-clip skip"
                        )
                    skipped[clips.clip_id(row)] = reason
                heard = [clip_id for clip_id in map(clips.clip_id, rows) if clip_id not in skipped]
                if heard:
                    logits = run_teacher(accelerator, teacher, **batch)
                    parts.append(to_float16(logits, [clip_id for clip_id in heard for _ in range(work.views)]))
                bar.update(len(rows))
            work.write(index, np.concatenate(parts), skipped)


@torch.inference_mode()
def run_teacher(
    accelerator: Accelerator,
    teacher: Teacher,
    waveform: Tensor,
    band_edges: Tensor | None = None,
    stripes: Tensor | None = None,
) -> np.ndarray:
    """Waveforms (batch, samples), and what ``Teacher.hear_view`` takes -> logits float32 (batch, classes).

    Raises ValueError if the teacher returns another shape.
    """
    with accelerator.autocast():
        logits = teacher.hear_view(waveform.to(accelerator.device, non_blocking=True), band_edges, stripes)
    expected = (len(waveform), len(teacher.class_names))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"teacher {teacher.name!r} returned {found}; logits of shape {expected} are needed")
    return logits.float().cpu().numpy()


def views_for(teacher: Teacher, config: ViewConfig) -> ViewConfig | None:
    """The views that a teacher is to hear, with their length filled in; None if it is to hear the clips as they are.

    Raises ValueError if it cannot hear such views.
    """
    if not config.views:
        if config != ViewConfig():
            raise ValueError("settings of views are given, but no --views NUMBER of views for each clip")
        return None
    if teacher.log_mel is None and (config.view_mel_jitter or config.masks):
        raise ValueError(
            f"teacher {teacher.name!r} has a front end of its own and can hear neither jittered mel bands nor masks; turn "
            "them off with --no-view-mel-jitter and masks of 0"
        )
    seconds = teacher.clip_seconds if config.view_seconds is None else config.view_seconds
    if seconds > teacher.clip_seconds:
        raise ValueError(
            f"views of {seconds:g} s are longer than the {teacher.clip_seconds:g} s that teacher {teacher.name!r} hears; "
            "shorten --view-seconds or lengthen --clip-seconds"
        )
    return replace(config, view_seconds=seconds)


class ClipBatches(Dataset[dict[str, Any]]):
    """Map from a batch's number to what the teacher hears: ``waveform`` float32 (clips, samples), each clip's first seconds.

    With views it is (clips times views, samples), all views of a clip one after the other, and what else
    ``heard_views`` gives. Zeros follow the end of a clip or view that is shorter than what the teacher hears.

    ``bad_clips`` tells why, by row, of the clips that cannot be used; they have no part in the batch, which is empty if no clip is left. Nothing is raised here:
    an exception would reach the main process wrapped in the worker's traceback.
    """

    def __init__(self, clips: ClipStore, batches: Sequence[range], teacher: Teacher, views: ViewConfig | None) -> None:
        self.clips = clips
        self.batches = batches
        self.sample_rate_hz = teacher.sample_rate_hz
        self.clip_seconds = teacher.clip_seconds
        self.frontend = teacher.log_mel.config if teacher.log_mel else None
        self.views = views

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        heard, bad_clips = [], {}
        for row in self.batches[index]:
            try:
                self.clips.verify_audio(row)
                heard.append(self._heard(row))
            except BadClipError as error:
                bad_clips[row] = error.reason
        if not heard:
            return {"bad_clips": bad_clips}
        batch = {name: torch.cat([clip[name] for clip in heard]) for name in heard[0]}
        missing = round(self.clip_seconds * self.sample_rate_hz) - batch["waveform"].shape[1]
        return {**batch, "waveform": functional.pad(batch["waveform"], (0, missing)), "bad_clips": bad_clips}

    def _heard(self, row: int) -> dict[str, Tensor]:
        """What the teacher hears of one clip: all its views, or its beginning."""
        if self.views is None:
            samples = round(self.clip_seconds * self.sample_rate_hz)
            waveform = fit_length(self.clips.waveform(row, self.sample_rate_hz, seconds=self.clip_seconds), samples)
            return {"waveform": torch.from_numpy(waveform)[None]}
        return heard_views(
            self.clips,
            row,
            range(self.views.views),
            self.views,
            seconds=self.views.view_seconds,
            sample_rate_hz=self.sample_rate_hz,
            frontend=self.frontend,
        )


def _load(accelerator: Accelerator, config: TeachConfig, spec: str, clips: ClipStore) -> Teacher:
    """One teacher, checked against the clip store."""
    class_names = clips.class_names
    if config.teacher_class_names is not None:
        class_names = read_class_names(config.teacher_class_names)
    elif config.class_names is None and not knows_its_classes(spec):
        accelerator.print(f"{spec} carries no class names; taking those of {clips.path}")
    class_map = read_class_map(config.class_map) if config.class_map else None
    teacher = load_teacher(spec, class_names=class_names, clip_seconds=config.clip_seconds)
    teacher = with_classes_of_clips(teacher, spec, clips, class_map)
    if accelerator.is_main_process and views_for(teacher, config.views) is None:
        longer = _count_longer(clips, teacher.clip_seconds)
        if longer:
            print(f"{spec} hears only the first {teacher.clip_seconds:g} s of {longer} longer clips")
    return teacher


def _count_longer(clips: ClipStore, seconds: float) -> int:
    """How many clips are longer, as far as the manifest tells."""
    manifest = read_manifest(clips.path, ["duration_seconds"])
    if manifest is None:
        return 0
    durations = manifest.column("duration_seconds").to_numpy(zero_copy_only=False).astype(float)
    return int((durations > seconds + 0.05).sum())


def _is_complete(path: Path, description: dict[str, Any], clips: ClipStore, config: TeachConfig) -> bool:
    """Whether ``path`` is the store that is to be made; ValueError if it is another one, and may not be given up."""
    store = LogitStore.open(path)
    same_teacher = store.teacher == description and store.keep == config.keep
    if same_teacher and store.clip_store_fingerprint == clips.fingerprint:
        return True
    if not config.restart:
        what = "other clips" if same_teacher else "another teacher or other settings"
        raise ValueError(
            f"{path} exists and was made with {what}; choose another --out or --name, or --restart to replace it"
        )
    return False


@contextmanager
def _one_thread_on_cpu(device: torch.device) -> Iterator[None]:
    """For as long as it lasts, one thread for arithmetic on a CPU (see the top of this file)."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: teach(parse(TeachConfig, arguments, "kd teach")))


if __name__ == "__main__":
    raise SystemExit(main())
