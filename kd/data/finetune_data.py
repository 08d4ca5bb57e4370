"""A task's clips as tensors: training examples with everything random about them, and windows to evaluate.

Shapes: S samples, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from scipy.special import expit, softmax
from torch import Tensor
from torch.utils.data import Dataset

from audio_datasets.audio.augment import AugmentConfig, augment_waveform, draw_mix_weight
from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.impulse_responses import convolve
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.task import TaskClips
from kd.data.sampling import ClipRequest
from kd.data.training_data import Replacements
from students.frontend import LogMelConfig, draw_band_edges
from teacher_logits.stores.ensemble import LogitEnsemble

WINDOW_TOLERANCE = 0.05
"""A rest of a clip shorter than this share of a window gets no window of its own: clips are seldom cut to the sample."""


@dataclass(frozen=True)
class TaskAugmentConfig:
    """Augmentation for small data sets, besides that of pretraining."""

    waveform_mixup: float = 0.5
    """Share of the training clips that are mixed with another one as waveforms; 0 turns it off."""
    waveform_mixup_alpha: float = 2.0
    """Their weights are drawn from Beta(alpha, alpha), the larger one for the clip itself; 0: one half each."""
    freq_mixstyle: float = 0.0
    """Share of the training clips that take over part of another clip's statistics in each mel band (Freq-MixStyle)."""
    freq_mixstyle_alpha: float = 0.3
    """The part is drawn from Beta(alpha, alpha)."""
    impulse_responses: Path | None = None
    """Folder with impulse responses of recording devices (WAV)."""
    impulse_response_share: float = 0.6
    """Share of the training clips that are convolved with one of them."""
    time_masks: int = 0
    """SpecAugment: stretches of time in each clip that are set to the clip's mean."""
    time_mask_share: float = 0.1
    """The longest such stretch, as a share of the clip."""
    frequency_masks: int = 0
    """SpecAugment: ranges of mel bands in each clip that are set to the clip's mean."""
    frequency_mask_share: float = 0.1
    """The widest such range, as a share of the bands."""

    def __post_init__(self) -> None:
        for name in (
            "waveform_mixup", "freq_mixstyle", "impulse_response_share", "time_mask_share", "frequency_mask_share",
        ):  # fmt: skip
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]; found {getattr(self, name)}")
        for name in ("time_masks", "frequency_masks", "waveform_mixup_alpha"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; found {getattr(self, name)}")
        if not self.freq_mixstyle_alpha > 0:
            raise ValueError(f"freq_mixstyle_alpha must be positive; found {self.freq_mixstyle_alpha}")


@dataclass(frozen=True)
class Hearing:
    """How clips become waveforms of one length."""

    sample_rate_hz: int
    clip_seconds: float
    short_clips: Literal["pad", "repeat"] = "pad"

    @property
    def samples(self) -> int:
        return round(self.clip_seconds * self.sample_rate_hz)

    def lengthened(self, waveform: np.ndarray) -> np.ndarray:
        """(any,) -> the same, repeated up to ``samples`` where short clips are; padding is left to ``fit_length``."""
        if self.short_clips == "repeat" and 0 < len(waveform) < self.samples:
            return np.resize(waveform, self.samples)
        return waveform


class TaskExamples(Dataset[dict[str, Any]]):
    """Map from a ``ClipRequest`` to one training example; all randomness is keyed by (seed, epoch, position).

    An example holds ``row`` int (of the clip that is really there, see ``Replacements``), ``waveform`` (S,), ``targets``
    (C,), ``sample_key`` int and, as configured, ``known`` (C,) bool, ``band_edges`` (2,), ``mix_weight``,
    ``style_weight``, ``time_masks`` and ``frequency_masks`` (masks, 2) as shares from start to end, ``teacher`` (C,)
    probabilities with ``has_teacher``.
    """

    def __init__(
        self,
        clips: TaskClips,
        rows: np.ndarray,
        hearing: Hearing,
        *,
        frontend: LogMelConfig,
        augment: AugmentConfig,
        task_augment: TaskAugmentConfig,
        impulse_responses: Sequence[np.ndarray] = (),
        teachers: LogitEnsemble | None = None,
        teacher_temperature: float = 1.0,
        exclusive: bool = False,
        seed: int,
        replacements: Replacements | None = None,
    ) -> None:
        """
        Args:
            rows: the training clips, among which mixing finds its partners.
            exclusive: the classes have a softmax.
            replacements: what to show in place of a clip that cannot be used; without them it is a ``BadClipError``.
        """
        self.clips = clips
        self.rows = rows
        self.hearing = hearing
        self.frontend = frontend
        self.augment = augment
        self.task_augment = task_augment
        self.impulse_responses = impulse_responses
        self.teachers = teachers
        self.teacher_temperature = teacher_temperature
        self.exclusive = exclusive
        self.seed = seed
        self.replacements = replacements

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        epoch, position, row = request
        parts = self._usable_clip(row, epoch, position)
        row = parts.pop("row")
        partner = generator(self.seed, "waveform mixup", epoch, position)
        # Drawn in this order whether or not it is used, so that each setting leaves the others' numbers alone.
        is_mixed = partner.random() < self.task_augment.waveform_mixup
        partner_row = int(self.rows[int(partner.random() * len(self.rows))])
        if is_mixed:
            alpha = self.task_augment.waveform_mixup_alpha
            weight = float(partner.beta(alpha, alpha)) if alpha else 0.5
            partner_parts = self._usable_clip(partner_row, epoch, position, of_partner=True)
            parts = _mixed(parts, partner_parts, max(weight, 1 - weight))
        example: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in parts.items()
        }
        example["row"] = row
        example["sample_key"] = int(generator(self.seed, "dropout", epoch, position).integers(2**62))
        if self.augment.mel_jitter:
            edges = draw_band_edges(self.frontend, generator(self.seed, "mel jitter", epoch, position))
            example["band_edges"] = torch.tensor(edges, dtype=torch.float32)
        if self.augment.mixup_alpha:
            weight = draw_mix_weight(self.seed, epoch, position, self.augment.mixup_alpha)
            example["mix_weight"] = torch.tensor(weight, dtype=torch.float32)
        if self.task_augment.freq_mixstyle:
            example["style_weight"] = self._style_weight(epoch, position)
        for name in ("time", "frequency"):
            count = getattr(self.task_augment, f"{name}_masks")
            if count:
                widest = getattr(self.task_augment, f"{name}_mask_share")
                rng = generator(self.seed, f"{name} masks", epoch, position)
                width = rng.random(count) * widest
                start = rng.random(count) * (1 - width)
                example[f"{name}_masks"] = torch.from_numpy(np.stack([start, start + width], axis=1).astype(np.float32))
        return example

    def _usable_clip(self, row: int, epoch: int, position: int, of_partner: bool = False) -> dict[str, Any]:
        """As ``_clip``, with the ``row`` that it is of; another clip if this one cannot be used and is to be replaced."""

        def read(row: int) -> dict[str, Any]:
            return {"row": row, **self._clip(row, epoch, position, of_partner)}

        if self.replacements is None:
            return read(row)
        purpose = "replacement of partner" if of_partner else "replacement"
        draws = generator(self.seed, purpose, epoch, position)
        return self.replacements.first_usable(row, read, draws, self.clips.clip_id)

    def _clip(self, row: int, epoch: int, position: int, of_partner: bool = False) -> dict[str, Any]:
        """What mixing mixes: one clip's augmented waveform, targets, what is known of them, and its teacher's."""

        def draws(purpose: str) -> np.random.Generator:
            return generator(self.seed, f"{purpose} of partner" if of_partner else purpose, epoch, position)

        hearing, start = self.hearing, 0.0
        if self.augment.crop == "random":
            spare = self.clips.duration_seconds(row) - hearing.clip_seconds
            start = draws("crop").random() * max(0.0, spare)
        waveform = self.clips.waveform(row, hearing.sample_rate_hz, start, hearing.clip_seconds)
        if self.impulse_responses:
            rng = draws("impulse response")
            if rng.random() < self.task_augment.impulse_response_share:
                choice = int(rng.random() * len(self.impulse_responses))
                waveform = convolve(waveform, self.impulse_responses[choice])
        waveform = augment_waveform(
            hearing.lengthened(waveform), hearing.samples, hearing.sample_rate_hz, self.augment, draws("waveform")
        )
        parts: dict[str, Any] = {"waveform": waveform, "targets": self.clips.targets(np.array([row]))[0]}
        if self.clips.is_masked:
            parts["known"] = self.clips.mask(np.array([row]))[0]
        if self.teachers is not None:
            logits, present = self.teachers.read([self.clips.clip_id(row)])
            softened = logits[0] / np.float32(self.teacher_temperature)
            parts["teacher"] = softmax(softened) if self.exclusive else expit(softened)
            parts["has_teacher"] = bool(present[0])
        return parts

    def _style_weight(self, epoch: int, position: int) -> Tensor:
        """How much of its own style a clip keeps; 1 where it is not mixed."""
        rng = generator(self.seed, "freq-mixstyle", epoch, position)
        is_mixed = rng.random() < self.task_augment.freq_mixstyle
        alpha = self.task_augment.freq_mixstyle_alpha
        return torch.tensor(float(rng.beta(alpha, alpha)) if is_mixed else 1.0, dtype=torch.float32)


def _mixed(one: dict[str, Any], other: dict[str, Any], weight: float) -> dict[str, Any]:
    """weight · one + (1 − weight) · other; a label is known, and a teacher there, only where both parts have it."""
    mixed = {}
    for name, value in one.items():
        if name in ("known", "has_teacher"):
            mixed[name] = value & other[name]
        else:
            mixed[name] = (weight * value + (1 - weight) * other[name]).astype(np.float32)
    return mixed


def equal_batches(clips: int, largest: int, batches_per_step: int, pairs: bool) -> int:
    """The batch size that cuts an epoch into equal batches of at most ``largest``, nearly all clips taking part.

    A batch of what is left over would be small, at worst one clip, from which batch norm learns nothing or fails. 320
    clips in batches of at most 128 make three of 106. Clips that do not fit are others in every epoch.

    Args:
        batches_per_step: processes times accumulated batches.
        pairs: whether a batch must be even, since clips are mixed in pairs.

    Raises:
        ValueError: fewer clips than a step needs.
    """
    fewest_steps = -(-clips // (largest * batches_per_step))
    for steps in range(fewest_steps, 0, -1):
        size = min(largest, clips // (steps * batches_per_step))
        size -= size % 2 if pairs else 0
        if size >= 2:
            return size
    raise ValueError(
        f"{clips} training clips are too few: {batches_per_step} batches (processes x accumulation) of at least 2 clips are "
        "needed"
    )


class EvaluationWindows(Dataset[tuple[int, Tensor]]):
    """(number, waveform (S,)) of windows that together cover each clip whole; nothing is random.

    A clip longer than a window has several, evenly spread, the first at its start and the last at its end. What cannot be
    used is a ``BadClipError``; or, with ``on_bad_clip="skip"``, silence with the number ``~number``, which is negative.
    """

    def __init__(self, clips: TaskClips, rows: np.ndarray, hearing: Hearing, on_bad_clip: OnBadClip = "refuse") -> None:
        self.clips = clips
        self.rows = rows
        self.hearing = hearing
        self.on_bad_clip = on_bad_clip
        self.clip_of: list[int] = []
        """For each window, the place in ``rows`` of its clip."""
        self.starts: list[float] = []
        """For each window, where it begins in its clip, in seconds."""
        for place, row in enumerate(rows):
            starts = self._window_starts(int(row))
            self.clip_of += [place] * len(starts)
            self.starts += starts

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        hearing = self.hearing
        try:
            waveform = self._waveform(number)
        except BadClipError:
            if self.on_bad_clip == "refuse":
                raise
            return ~number, torch.zeros(hearing.samples)
        return number, torch.from_numpy(fit_length(hearing.lengthened(waveform), hearing.samples))

    def _waveform(self, number: int) -> np.ndarray:
        row, hearing = int(self.rows[self.clip_of[number]]), self.hearing
        return self.clips.waveform(row, hearing.sample_rate_hz, self.starts[number], hearing.clip_seconds)

    def _window_starts(self, row: int) -> list[float]:
        try:
            return window_starts(self.clips.duration_seconds(row), self.hearing.clip_seconds)
        except BadClipError:
            if self.on_bad_clip == "refuse":
                raise
            return [0.0]  # which tells why when it is read

    def clip_id(self, number: int) -> str:
        """The clip of a window."""
        return self.clips.clip_id(int(self.rows[self.clip_of[number]]))

    def reason(self, number: int) -> str:
        """Why a window cannot be used; "" if it can."""
        try:
            self._waveform(number)
            return ""
        except BadClipError as error:
            return error.reason

    def mean_of_clips(self, values: np.ndarray) -> np.ndarray:
        """(windows, any) -> (rows, any): the mean over each clip's windows; NaN where one of them is."""
        sums = np.zeros((len(self.rows), values.shape[1]), dtype=np.float64)
        np.add.at(sums, self.clip_of, values)
        return (sums / np.bincount(self.clip_of, minlength=len(self.rows))[:, None]).astype(np.float32)


def window_starts(duration_seconds: float, clip_seconds: float) -> list[float]:
    """Where the windows of a clip begin, in seconds."""
    count = max(1, int(np.ceil(duration_seconds / clip_seconds - WINDOW_TOLERANCE)))
    return [0.0] if count == 1 else np.linspace(0.0, duration_seconds - clip_seconds, count).tolist()
