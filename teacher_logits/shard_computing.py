"""Computes shards of a logit store: runs a teacher over clips, batch by batch, and saves each finished shard."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import functional
from torch.utils.data import Dataset

from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import progress
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.system.workers.loading import create_loader
from audio_datasets.tasks.unlabelled import SoundFolder
from teacher_logits.computed_with import what_bits_depend_on
from teacher_logits.store import to_float16
from teacher_logits.stores.shards import ShardBatches, ShardFolder, batches_of
from teacher_logits.teachers.base import Teacher
from teacher_logits.teachers.heard_views import heard_views

HeardClips = ClipStore | SoundFolder
"""What a teacher hears."""


def compute_shards(
    accelerator: Accelerator,
    teacher: Teacher,
    clips: HeardClips,
    work: ShardFolder,
    indices: Sequence[int],
    *,
    views: ViewConfig | None,
    batch_size: int,
    workers: int,
    on_bad_clip: OnBadClip,
    signals: StopSignals,
) -> None:
    """Computes the shards with these numbers and saves each one as soon as it is finished.

    Raises Stopped between two batches after a stop signal; the current shard is then discarded.
    """
    clips_in_batch = max(1, batch_size // work.views)
    shards = [work.shards[index] for index in indices]
    batches = ShardBatches(shards, clips_in_batch)
    loader = create_loader(
        ClipBatches(clips, batches, teacher, views),
        batch_size=None,  # the data set's items are batches
        workers=min(workers, len(batches)),
        on_gpu=accelerator.device.type == "cuda",
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
                    if on_bad_clip == "refuse" and teacher.silent_about(clips.clip_id(row)) is None:
                        raise ValueError(
                            f"clip {clips.clip_id(row)!r} of {clips.path}: {reason}; pack the clips again without it, or "
                            "continue without it with --on-bad-clip skip"
                        )
                    skipped[clips.clip_id(row)] = reason
                heard = [clip_id for clip_id in map(clips.clip_id, rows) if clip_id not in skipped]
                if heard:
                    each_view = [clip_id for clip_id in heard for _ in range(work.views)]
                    logits = run_teacher(accelerator, teacher, each_view, **batch)
                    parts.append(to_float16(logits, each_view))
                bar.update(len(rows))
            work.write(index, np.concatenate(parts), skipped)


@torch.inference_mode()
def run_teacher(
    accelerator: Accelerator,
    teacher: Teacher,
    clip_ids: Sequence[str],
    waveform: Tensor,
    band_edges: Tensor | None = None,
    stripes: Tensor | None = None,
) -> np.ndarray:
    """Clip ids, waveforms (batch, samples), and the arguments of ``Teacher.hear_view`` -> logits float32 (batch, classes).

    Raises ValueError if the teacher returns another shape.
    """
    with accelerator.autocast():
        logits = teacher.hear_clips(clip_ids, waveform.to(accelerator.device, non_blocking=True), band_edges, stripes)
    expected = (len(waveform), len(teacher.class_names))
    if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
        found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"teacher {teacher.name!r} must return logits of shape {expected}; found {found}")
    return logits.float().cpu().numpy()


def views_for(teacher: Teacher, config: ViewConfig) -> ViewConfig | None:
    """The views for a teacher, with their length filled in; None if it gets the clips themselves.

    Raises ValueError if it cannot process such views.
    """
    if not config.views:
        if config != ViewConfig():
            raise ValueError("settings of views are given, but not the number of views per clip (--views)")
        return None
    if teacher.log_mel is None and (config.view_mel_jitter or config.masks):
        raise ValueError(
            f"teacher {teacher.name!r} has its own front end, so jittered mel bands and masks cannot be applied; turn "
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
    """The teacher's inputs by batch number: ``waveform`` float32 (clips, samples), the first seconds of each clip.

    With views the shape is (clips times views, samples), with all views of a clip in a row, and there are also the other
    outputs of ``heard_views``. Clips and views shorter than the teacher's input are padded with zeros at the end.

    ``bad_clips`` maps the row of each unusable clip to the reason. Such clips, and those that the teacher may not
    teach, are left out of the batch. If no clip remains,
    ``bad_clips`` is the only entry. Bad clips raise no exception here, because it would reach the main process wrapped in the
    worker's traceback.
    """

    def __init__(self, clips: HeardClips, batches: Sequence[range], teacher: Teacher, views: ViewConfig | None) -> None:
        self.clips = clips
        self.batches = batches
        self.sample_rate_hz = teacher.sample_rate_hz
        self.clip_seconds = teacher.clip_seconds
        self.short_clips = teacher.short_clips
        self.frontend = teacher.log_mel.config if teacher.log_mel else None
        self.views = views
        self.silent_about: dict[int, str] = {}
        """Rows of the clips that the teacher has nothing to say of, and why."""
        if teacher.is_choosy:
            reasons = ((row, teacher.silent_about(clips.clip_id(row))) for batch in batches for row in batch)
            self.silent_about = {row: reason for row, reason in reasons if reason is not None}

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> dict[str, Any]:
        heard, bad_clips = [], {}
        for row in self.batches[index]:
            if row in self.silent_about:
                bad_clips[row] = self.silent_about[row]
                continue
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
        """The teacher's inputs for one clip: all its views, or its beginning."""
        if self.views is None:
            samples = round(self.clip_seconds * self.sample_rate_hz)
            waveform = self.clips.waveform(row, self.sample_rate_hz, seconds=self.clip_seconds)
            if self.short_clips == "repeat" and 0 < len(waveform) < samples:
                waveform = np.resize(waveform, samples)
            waveform = fit_length(waveform, samples)
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


def stop_if_asked(signals: StopSignals, work: ShardFolder) -> None:
    """Raises Stopped after a stop signal."""
    if signals.requested:
        raise Stopped(
            f"{signals.reason}; finished shards are kept in {work.folder}, and the same command continues with the rest"
        )


@contextmanager
def one_thread_on_cpu(device: torch.device) -> Iterator[None]:
    """Inside the context, computations on a CPU use one thread (see precompute.py)."""
    before = torch.get_num_threads()
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bits_depend_on(teacher: Teacher, device: torch.device) -> dict[str, str]:
    """What the last bits of a teacher's logits depend on besides settings and clips (``computed_with``)."""
    with one_thread_on_cpu(device):
        return what_bits_depend_on(device, ("onnxruntime",) if "onnx" in teacher.architecture else ())
