"""Training clips as tensors: decoded, augmented, with labels and teacher logits, ready for an objective.

Everything here runs in data-loader workers. What is held per worker is one open file per store and the rows chosen.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio_datasets.audio.augment import AugmentConfig, augment_waveform, draw_mix_weight
from audio_datasets.audio.bad_clips import BadClipError, ClipList, OnBadClip
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.randomness import generator
from kd.data.sampling import ClipRequest
from students.frontend import LogMelConfig, draw_band_edges
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.teachers.heard_views import heard_views

Example = TypeVar("Example")

MOST_REPLACEMENTS = 100
"""Bad clips in a row, drawn at random, after which a run stops: most of its clips must be bad."""


@dataclass(frozen=True)
class Replacements:
    """Training without the clips that cannot be used: another clip takes the place of each.

    It is drawn uniformly, by a generator keyed by the place in the epoch, so that it depends neither on the number of
    processes or workers nor on where a run was resumed; batches keep their size.
    """

    rows: np.ndarray
    """int64: what is drawn from."""
    skipped: ClipList
    """Where each clip that was replaced is listed, by every worker of every process."""
    listed: set[int] = field(default_factory=set)
    """Rows of the bad clips that this process has listed."""

    def first_usable(
        self, row: int, read: Callable[[int], Example], draws: np.random.Generator, clip_id: Callable[[int], str]
    ) -> Example:
        """What ``read`` gives for ``row`` or, as long as it raises a BadClipError, for another row that is drawn.

        Raises:
            ValueError: one clip after the other is bad.
        """
        for _ in range(MOST_REPLACEMENTS):
            try:
                return read(row)
            except BadClipError as error:
                if row not in self.listed:
                    self.listed.add(row)
                    self.skipped.add(clip_id(row), error.reason)
                row = int(draws.choice(self.rows))
        raise ValueError(
            f"{MOST_REPLACEMENTS} clips drawn at random one after the other cannot be used; mend or leave out the bad ones"
        )


class TrainingClips(Dataset[dict[str, Any]]):
    """Map from a ``ClipRequest`` to one training example; all randomness is keyed by (seed, epoch, position).

    An example holds ``row`` int (of the clip that is really there, see ``Replacements``), ``waveform`` (samples,), ``targets`` (classes,), ``sample_key`` int for the student's
    dropout, and as configured ``band_edges`` (2,), ``stripes`` (4,), ``mix_weight``, ``teacher_logits`` (classes,) and
    ``has_teacher``.
    """

    def __init__(
        self,
        clips: ClipStore,
        teachers: LogitEnsemble | None,
        *,
        frontend: LogMelConfig,
        clip_seconds: float,
        augment: AugmentConfig,
        seed: int,
        views: ViewConfig | None = None,
        replacements: Replacements | None = None,
    ) -> None:
        """
        Args:
            views: show the views that the teachers heard, in place of augmenting the clips' waveforms and mel bands.
            replacements: what to show in place of a clip that cannot be used; without them it is a ``BadClipError``.
        """
        self.clips = clips
        self.teachers = teachers
        self.frontend = frontend
        self.clip_seconds = clip_seconds
        self.samples = round(clip_seconds * frontend.sample_rate_hz)
        self.augment = augment
        self.seed = seed
        self.views = views
        self.replacements = replacements

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        epoch, position, row = request
        if self.replacements is None:
            return self._example(request)
        return self.replacements.first_usable(
            row,
            lambda usable: self._example(ClipRequest(epoch, position, usable)),
            generator(self.seed, "replacement", epoch, position),
            self.clips.clip_id,
        )

    def _example(self, request: ClipRequest) -> dict[str, Any]:
        epoch, position, row = request
        view = None
        if self.views is not None:
            view = int(generator(self.seed, "stored view", epoch, position).integers(self.views.views))
        example: dict[str, Any] = {
            "row": row,
            **(self._augmented(request) if view is None else self._stored_view(row, view)),
            "targets": torch.from_numpy(self.clips.targets(np.array([row]))[0]),
            "sample_key": int(generator(self.seed, "dropout", epoch, position).integers(2**62)),
        }
        if self.augment.mixup_alpha:
            weight = draw_mix_weight(self.seed, epoch, position, self.augment.mixup_alpha)
            example["mix_weight"] = torch.tensor(weight, dtype=torch.float32)
        if self.teachers is not None:
            logits, present = self.teachers.read([self.clips.clip_id(row)], None if view is None else np.array([view]))
            if not np.isfinite(logits).all():
                raise ValueError(
                    f"the teacher logits of clip {self.clips.clip_id(row)!r} are not finite: a damaged logit store, which "
                    "kd verify finds; make it again"
                )
            example["teacher_logits"] = torch.from_numpy(logits[0])
            example["has_teacher"] = bool(present[0])
        return example

    def _augmented(self, request: ClipRequest) -> dict[str, Tensor]:
        """The clip with augmentation of this run's own."""
        epoch, position, row = request
        rate = self.frontend.sample_rate_hz
        seconds = self.clip_seconds if self.augment.crop == "start" else None
        waveform = augment_waveform(
            self.clips.waveform(row, rate, seconds=seconds),
            self.samples,
            rate,
            self.augment,
            generator(self.seed, "waveform", epoch, position),
        )
        example = {"waveform": torch.from_numpy(np.ascontiguousarray(waveform))}
        if self.augment.mel_jitter:
            edges = draw_band_edges(self.frontend, generator(self.seed, "mel jitter", epoch, position))
            example["band_edges"] = torch.tensor(edges, dtype=torch.float32)
        return example

    def _stored_view(self, row: int, view: int) -> dict[str, Tensor]:
        """A view as the teachers heard it."""
        heard = heard_views(
            self.clips,
            row,
            [view],
            self.views,
            seconds=self.clip_seconds,
            sample_rate_hz=self.frontend.sample_rate_hz,
            frontend=self.frontend,
        )
        return {name: values[0] for name, values in heard.items()}


class EvaluationClips(Dataset[tuple[int, Tensor]]):
    """(index into ``rows``, waveform): the first ``clip_seconds`` of each clip, padded with silence; nothing is random.

    A clip that cannot be used is a ``BadClipError``; or, with ``on_bad_clip="skip"``, silence with the index ``~index``,
    which is negative.
    """

    def __init__(
        self,
        clips: ClipStore,
        rows: np.ndarray,
        *,
        sample_rate_hz: int,
        clip_seconds: float,
        on_bad_clip: OnBadClip = "refuse",
    ) -> None:
        self.clips = clips
        self.rows = rows
        self.sample_rate_hz = sample_rate_hz
        self.clip_seconds = clip_seconds
        self.on_bad_clip = on_bad_clip

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, Tensor]:
        samples = round(self.clip_seconds * self.sample_rate_hz)
        try:
            return index, torch.from_numpy(fit_length(self._waveform(index), samples))
        except BadClipError:
            if self.on_bad_clip == "refuse":
                raise
            return ~index, torch.zeros(samples)

    def clip_id(self, index: int) -> str:
        """The clip at an index into ``rows``."""
        return self.clips.clip_id(int(self.rows[index]))

    def reason(self, index: int) -> str:
        """Why a clip cannot be used; "" if it can."""
        try:
            self._waveform(index)
            return ""
        except BadClipError as error:
            return error.reason

    def _waveform(self, index: int) -> np.ndarray:
        return self.clips.waveform(int(self.rows[index]), self.sample_rate_hz, seconds=self.clip_seconds)
