"""``kd teach``: runs teachers over a clip store and saves their logits, one logit store for each teacher.

Any number of processes share the work, shard by shard (see ``shards.py``). The logits of a clip do not depend on the number of
processes or on which of them computes it. A killed run can be continued: each process loses at most the shard that it was
working on. Two processes on a CPU machine:

    ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 -m teacher_logits.precompute …

On a CPU each process computes with one thread unless OMP_NUM_THREADS is set. This gives the same sums on any number of cores,
and threads do not compete with the data loaders for them. To use more cores, start more processes.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator, InitProcessGroupKwargs

from audio_datasets.audio.bad_clips import ClipList, OnBadClip, summary
from audio_datasets.audio.heard import Heard
from audio_datasets.audio.views import ViewConfig
from audio_datasets.command_line.help_pages import HelpGroups
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.manifest import heard_of
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.disk_space import require_space
from audio_datasets.system.paths.outputs import Output, check_outputs, is_hdf5, refuse_links
from audio_datasets.system.stop_signals import StopSignals
from audio_datasets.tasks.task import usable_durations
from audio_datasets.tasks.unlabelled import SoundFolder
from teacher_logits.computed_with import note_on_bits
from teacher_logits.processes import LONGEST_WAIT, locked_by_main_process, on_main_process, start_accelerator
from teacher_logits.shard_computing import (
    HeardClips,
    bits_depend_on,
    compute_shards,
    one_thread_on_cpu,
    stop_if_asked,
    views_for,
)
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.stores.links import LinkKind
from teacher_logits.stores.rows import check_keep, row_bytes
from teacher_logits.stores.shards import ShardFolder, shard_rows
from teacher_logits.teachers.base import Teacher, without_link
from teacher_logits.teachers.class_mapping import MappedTeacher, read_class_map, with_classes_of_clips
from teacher_logits.teachers.loaders import knows_its_classes, load_teacher


@dataclass(frozen=True)
class TeachConfig:
    """Run one or more teachers over a clip store and store their logits.

    The same command continues a run that was killed.
    """

    help_groups: ClassVar[HelpGroups] = {
        "Teachers and clips": ("clips", "teacher", "out", "name", "cross_fitted"),
        "Classes": ("class_names", "teacher_class_names", "class_map"),
        "Computing": ("clip_seconds", "batch_size", "mixed_precision", "workers", "shard_clips"),
        "Logit stores": ("keep", "on_bad_clip", "restart"),
    }
    main_options: ClassVar[tuple[str, ...]] = (
        *("clips", "teacher", "out", "name", "class_names", "class_map", "batch_size", "mixed_precision", "workers"),
        *("keep", "on_bad_clip", "restart", "views"),
    )

    clips: Path
    """Clip store, or a folder of unlabelled sounds (every audio file in it, at any depth)."""
    teacher: tuple[str, ...]
    """One or more of: a run folder, NAME@WEIGHTS (such as mn04@mn04_as_mAP_432.pt or passt@passt-s.pt), FILE.onnx,
    ast:FOLDER_OR_NAME, module:function."""
    out: Path
    """Folder for the logit stores, one file NAME.h5 for each teacher."""
    name: tuple[str, ...] = ()
    """One name for each teacher (default: its own)."""
    class_names: Path | None = None
    """Class list for weights or clips without one (AudioSet's class_labels_indices.csv, or one name per line)."""
    teacher_class_names: Path | None = None
    """Class list of teachers that have none of their own, if it differs from the clips' (see --class-map)."""
    cross_fitted: bool = False
    """For a run with several students, such as one per fold: only the students that were not trained on a clip's labels teach it.
    Clips that all of them were trained on get no logits."""
    teacher_link: LinkKind | None = None
    """The activation that the teachers were trained with, where they do not tell: sigmoid (several labels for a clip, as AudioSet) or
    softmax (one label). It is stored with the logits."""
    class_map: Path | None = None
    """CSV file (columns teacher_class, class) that maps the teachers' classes to those of the clips. A class of the clips gets the
    maximum over the teacher's classes that are mapped to it."""
    clip_seconds: float | None = None
    """Seconds of each clip that the teachers hear (default: the teacher's own input length, usually 10)."""
    batch_size: int = 32
    """Clips in a batch of one process."""
    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    """Precision of the teachers' computation. Logits are always stored as float16."""
    workers: int = 2
    """Data-loading processes for each process."""
    shard_clips: int = 4096
    """Clips in a shard: the most work that a killed process loses."""
    keep: int | None = None
    """Store only the N largest logits of each clip, and one floor value per class in place of the rest (default: store all)."""
    views: Annotated[ViewConfig, tyro.conf.arg(name="")] = field(default_factory=ViewConfig)
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops and names it; skip leaves it out of the logit stores and lists it."""
    restart: bool = False
    """Delete unfinished work, or a finished store, that was made with other settings or from other clips, and start over."""

    def __post_init__(self) -> None:
        if not self.teacher:
            raise ValueError("give at least one --teacher")
        if self.name and len(self.name) != len(self.teacher):
            raise ValueError(f"--name needs one name for each teacher; found {len(self.name)} for {len(self.teacher)}")
        if len(set(self.name)) < len(self.name):
            raise ValueError(f"the names of the teachers must differ; found {list(self.name)}")
        if min(self.batch_size, self.shard_clips) < 1 or self.workers < 0:
            raise ValueError(
                "batch_size and shard_clips must be at least 1 and workers at least 0; "
                f"found {self.batch_size}, {self.shard_clips} and {self.workers}"
            )


def teach(config: TeachConfig) -> list[Path]:
    """Creates or completes the logit store of every teacher and returns their paths.

    Raises ValueError for files that are missing or of another kind, class lists that differ, a clip that cannot be
    decoded, logits that are not finite, work or stores made with other settings that would be lost, and a store that another
    run is writing. Raises Stopped on SIGTERM, SIGUSR1 and SIGHUP; finished shards are kept.
    """
    torch.set_flush_denormal(True)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision, kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)]
    )
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = open_heard_clips(config, class_names)
    if isinstance(clips, SoundFolder):
        accelerator.print(clips.note)
        clips.know_contents(on_main_process(accelerator, clips.take_down_contents))
    check_keep(config.keep, len(clips.class_names))
    # Load all of them before the first one runs, so that a mistake in the last one shows now and not after hours.
    teachers = [_load(accelerator, config, spec, clips) for spec in config.teacher]
    if config.class_map is not None and not any(isinstance(teacher, MappedTeacher) for teacher in teachers):
        raise ValueError("--class-map has no effect: all teachers have the classes of the clips; leave it out")
    if config.teacher_class_names is not None and all(map(knows_its_classes, config.teacher)):
        raise ValueError("--teacher-class-names has no effect: all teachers know their own classes; leave it out")
    for teacher, name in zip(teachers, config.name, strict=False):
        teacher.name = name
    names = unique_names([teacher.name for teacher in teachers])
    paths = [config.out / f"{name}.h5" for name in names]
    check_teach_outputs(config, paths)
    with StopSignals() as signals:
        for teacher, path in zip(teachers, paths, strict=True):
            with locked_by_main_process(accelerator, path.with_name(f"{path.name}.lock"), str(path)):
                make_store(accelerator, teacher, clips, path, config, signals)
    return paths


def check_teach_outputs(config: TeachConfig, paths: Sequence[Path]) -> None:
    """Raises ValueError if a logit store, or the list beside it, would replace an input, or its work lies behind a link."""
    outputs = [Output(path, is_hdf5, "a logit store") for path in paths]
    outputs += [Output(skipped_path(path), lambda path: True, "a list of skipped clips") for path in paths]
    check_outputs(config, outputs, advice="remove it")
    names = {f"{path.name}{ending}" for path in paths for ending in (".partial", ".lock")}
    refuse_links(config.out, names.__contains__)


def open_heard_clips(config: TeachConfig, class_names: Sequence[str] | None) -> HeardClips:
    """The clips to hear. Those of a folder get the classes of the first teacher, unless ``class_names`` are given.

    Raises:
        ValueError: no such folder or store, or a folder and a teacher without class names.
    """
    if not config.clips.is_dir():
        return ClipStore.open(config.clips, class_names=class_names)
    if class_names is None:
        if not knows_its_classes(config.teacher[0]):
            raise ValueError(
                f"{config.clips} is a folder of sounds and {config.teacher[0]} has no class names; give them with --class-names"
            )
        class_names = load_teacher(config.teacher[0]).class_names
    return SoundFolder(config.clips, class_names)


def unique_names(names: Sequence[str]) -> list[str]:
    """Names as valid file names; repeated ones get a number: a, a-2, a-3."""
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
    clips: HeardClips,
    path: Path,
    config: TeachConfig,
    signals: StopSignals | None = None,
) -> None:
    """Creates or completes the logit store of one teacher at ``path``; does nothing if it is complete.

    Called on every process of the ``accelerator``. Raises ValueError and Stopped as ``teach`` does.
    """
    signals = signals or StopSignals()
    making = StoreInProgress(teacher, clips, path, config, accelerator)
    work = making.work
    unfinished = on_main_process(accelerator, making.begin)
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
    with one_thread_on_cpu(accelerator.device):
        compute_shards(
            accelerator,
            teacher,
            clips,
            work,
            share,
            views=making.views,
            batch_size=config.batch_size,
            workers=config.workers,
            on_bad_clip=config.on_bad_clip,
            signals=signals,
        )
    teacher.to("cpu")
    accelerator.wait_for_everyone()
    skipped = on_main_process(accelerator, lambda: making.merge(signals))
    accelerator.print(f"{path} written: {len(clips) - len(skipped)} clips × {len(teacher.class_names)} classes")
    if skipped:
        accelerator.print(
            f"{summary(skipped, len(clips), 'get no logits')}; all are listed in {making.skipped_clips.path}"
        )


class StoreInProgress:
    """An unfinished logit store of one teacher: a description of its contents, and its shards so far.

    Only the main process calls ``begin`` and ``merge``, before and after the shards are computed.
    """

    def __init__(
        self, teacher: Teacher, clips: HeardClips, path: Path, config: TeachConfig, accelerator: Accelerator
    ) -> None:
        self.teacher = teacher
        self.clips = clips
        self.path = path
        self.config = config
        self.computed_with = bits_depend_on(teacher, accelerator.device)
        self.views = views_for(teacher, config.views)
        described_views = {"views": asdict(self.views)} if self.views else {}
        description = {**teacher.describe(), "mixed_precision": accelerator.mixed_precision, **described_views}
        self.description: dict[str, Any] = json.loads(json.dumps(description))
        plan = {
            "teacher": without_link(self.description),  # work may be continued that an older version began
            "clip_store_fingerprint": clips.fingerprint,
            "clips": len(clips),
            "batch_size": config.batch_size,
            "shard_clips": config.shard_clips,
        }
        shards = shard_rows(len(clips), config.shard_clips)
        views = self.views.views if self.views else 1
        self.work = ShardFolder(path, plan, shards, len(teacher.class_names), views)
        self.skipped_clips = ClipList(skipped_path(path))

    def begin(self) -> list[int] | None:
        """The numbers of the shards to compute; None if the store is complete.

        Raises ValueError if an earlier run made a store with other settings, if it skipped clips that may not be skipped
        now, or if there is not enough free disk space.
        """
        if self.path.exists() and self._is_complete():
            self._refuse_skipped(self.skipped_clips.read())
            self.work.clean_up()
            return None
        before = self.work.begin(self.config.restart, self.computed_with)
        for note in note_on_bits(before, self.computed_with, str(self.path)):
            print(note)
        self._refuse_skipped(self.work.skipped())
        unfinished = self.work.unfinished()
        num_classes, num_clips = len(self.teacher.class_names), len(self.clips)
        shard_bytes = row_bytes(num_classes) * sum(len(self.work.shards[index]) for index in unfinished)
        store_bytes = row_bytes(num_classes, self.config.keep) * num_clips
        needed = (shard_bytes + store_bytes) * self.work.views
        require_space(self.config.out, needed, f"the logits of {self.teacher.name} for {num_clips} clips")
        return unfinished

    def merge(self, signals: StopSignals) -> dict[str, str]:
        """Merges the shards into the store. Returns the reasons for skipped clips, by clip id."""
        clips, skipped = self.clips, self.work.skipped()
        rows = np.delete(np.arange(len(clips)), clips.rows(list(skipped)))
        if not len(rows):
            raise ValueError(f"{summary(skipped, len(clips), 'cannot be used')}; no clip is left")
        merged = self.work.folder / "merged.h5"
        write_logit_store(
            merged,
            clip_ids=clips.encoded_clip_ids[rows],
            audio_digests=clips.audio_digests(rows),
            logit_blocks=self._blocks(signals),
            class_names=self.teacher.class_names,
            teacher=self.description,
            clip_store_fingerprint=clips.fingerprint,
            keep=self.config.keep,
        )
        self.skipped_clips.replace(skipped)
        self.work.publish(merged)
        return skipped

    def _blocks(self, signals: StopSignals) -> Iterator[np.ndarray]:
        """The logits of all shards in order. Raises Stopped between two blocks after a stop signal."""
        for block in self.work.blocks():
            stop_if_asked(signals, self.work)
            yield block

    def _is_complete(self) -> bool:
        """Whether ``path`` is already the wanted store. ValueError if it is another one that may not be replaced."""
        store = LogitStore.open(self.path)
        same_teacher = store.teacher in (self.description, without_link(self.description))
        same_teacher = same_teacher and store.keep == self.config.keep
        if same_teacher and store.clip_store_fingerprint == self.clips.fingerprint:
            return True
        if not self.config.restart:
            what = "other clips" if same_teacher else "another teacher or other settings"
            raise ValueError(
                f"{self.path} exists and was made with {what}; choose another --out or --name, or --restart to replace it"
            )
        return False

    def _refuse_skipped(self, skipped: dict[str, str]) -> None:
        """Raises ValueError if an earlier run has skipped clips but this one may not.

        Those that the teacher has nothing to say of do not count.
        """
        skipped = {clip_id: why for clip_id, why in skipped.items() if self.teacher.silent_about(clip_id) is None}
        if skipped and self.config.on_bad_clip == "refuse":
            raise ValueError(
                f"{summary(skipped, len(self.clips), 'cannot be used')}; continue without them with --on-bad-clip skip, or "
                "pack the clips again without them"
            )


def skipped_path(store_path: Path) -> Path:
    """``mn04.h5`` -> ``mn04.skipped.txt``: the list of skipped clips, one per line with the reason."""
    return store_path.with_suffix(".skipped.txt")


def _load(accelerator: Accelerator, config: TeachConfig, spec: str, clips: HeardClips) -> Teacher:
    """Loads a teacher and checks it against the clips."""
    class_names = clips.class_names
    if config.teacher_class_names is not None:
        class_names = read_class_names(config.teacher_class_names)
    elif config.class_names is None and not knows_its_classes(spec):
        accelerator.print(f"{spec} has no class names; using those of {clips.path}")
    class_map = read_class_map(config.class_map) if config.class_map else None
    teacher = load_teacher(spec, class_names, config.clip_seconds, cross_fitted=config.cross_fitted)
    if config.teacher_link is not None:
        teacher.tell_link(config.teacher_link)
    elif teacher.link is None:
        accelerator.print(
            f"{spec} does not tell whether it was trained with a sigmoid or a softmax; training will ask for it "
            "(--teacher-link stores it with the logits)"
        )
    teacher = with_classes_of_clips(teacher, spec, clips, class_map)
    if views_for(teacher, config.views) is None and accelerator.is_main_process:
        left_out = str(_heard(clips, teacher.clip_seconds))
        if left_out:
            print(f"{spec} hears only the first {teacher.clip_seconds:g} s of each clip: {left_out}")
    return teacher


def _heard(clips: HeardClips, seconds: float) -> Heard:
    """How much is heard, according to the manifest or to the files themselves; no clips without a manifest."""
    if not isinstance(clips, SoundFolder):
        return heard_of([clips.path], seconds)
    return Heard.of_beginnings(usable_durations(clips, "skip"), seconds)


def main(arguments: Sequence[str] | None = None) -> int:
    return run_command(lambda: teach(parse(TeachConfig, arguments, "kd teach")))


if __name__ == "__main__":
    raise SystemExit(main())
