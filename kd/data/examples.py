"""Training clips as tensors: decoded, augmented, with labels and teacher logits, ready for an objective.

Both stages train on these. Everything here runs in data-loader workers; all randomness is keyed by (seed, epoch, position).

Shapes: S samples, C classes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio_datasets.audio.augment import AugmentConfig, augment_waveform, draw_mix_weight
from audio_datasets.audio.impulse_responses import convolve
from audio_datasets.audio.views import ViewConfig
from audio_datasets.system.randomness import generator
from kd.data.replacements import Replacements
from kd.data.sampling import ClipRequest, are_labelled
from kd.data.windows import Clips, Window
from students.frontend import LogMelConfig, draw_band_edges
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.teachers.heard_views import heard_views

MIXED_WITH = "mixed_with_"
"""Prefix of entries that belong to the clip with which an example's waveform is mixed."""


class TrainingExamples(Dataset[dict[str, Any]]):
    """Training examples by ``ClipRequest``.

    An example contains ``row`` int (of the clip that is used, see ``Replacements``), ``waveform`` (S,), ``targets``
    (C,), ``sample_key`` int for the student's dropout and, depending on the configuration,

    - ``known`` (C,) bool: which targets are known;
    - ``band_edges`` (2,) in Hz; ``stripes`` (4,) of a stored view; ``mix_weight``; ``style_weight``;
    - ``time_masks`` and ``frequency_masks`` (masks, 2): start and end as fractions of the axis;
    - ``teacher_logits`` (C,) with ``has_teacher`` bool;
    - with waveform mixup and teachers also ``mixed_with_teacher_logits``, ``mixed_with_has_teacher`` and
      ``waveform_mix_weight``, the weight of the clip itself (1 for a clip that is not mixed). The objective mixes
      probabilities, because logits cannot be mixed.
    """

    def __init__(
        self,
        clips: Clips,
        rows: np.ndarray,
        window: Window,
        *,
        frontend: LogMelConfig,
        augment: AugmentConfig,
        seed: int,
        teachers: LogitEnsemble | None = None,
        views: ViewConfig | None = None,
        impulse_responses: Sequence[np.ndarray] = (),
        replacements: Replacements | None = None,
    ) -> None:
        """
        Args:
            rows: the training clips, among which waveform mixup finds its partners: for a clip with labels another one with
                labels, for one without another one without.
            views: show the views that the teachers heard, in place of augmenting waveforms and mel bands.
            replacements: what to show in place of a clip that cannot be used; without them it is a ``BadClipError``.
        """
        self.clips = clips
        self.rows = rows
        self.window = window
        self.frontend = frontend
        self.augment = augment
        self.seed = seed
        self.teachers = teachers
        self.views = views
        self.impulse_responses = impulse_responses
        self.replacements = replacements
        self._heard_seconds = float("inf") if teachers is None else teachers.heard_seconds
        has_labels = are_labelled(clips, rows) if augment.waveform_mixup else np.ones(len(rows), dtype=bool)
        # A mixed clip's label is known only where both parts' are: clips without labels would take it from the few that have some.
        self._partners = {True: rows[has_labels], False: rows[~has_labels]}

    def __getitem__(self, request: ClipRequest) -> dict[str, Any]:
        epoch, position, row = request
        example = self._usable_clip(row, epoch, position)
        if self.augment.waveform_mixup:
            example = self._mixed_with_another(example, epoch, position)
        example["sample_key"] = int(generator(self.seed, "dropout", epoch, position).integers(2**62))
        example |= self._draws_for_the_spectrogram(epoch, position)
        return {
            name: torch.from_numpy(np.ascontiguousarray(value)) if isinstance(value, np.ndarray) else value
            for name, value in example.items()
        }

    def _usable_clip(self, row: int, epoch: int, position: int, of_partner: bool = False) -> dict[str, Any]:
        """``_clip`` of a row, or of a replacement if the clip cannot be used."""

        def read(row: int) -> dict[str, Any]:
            return self._clip(row, epoch, position, of_partner)

        if self.replacements is None:
            return read(row)
        purpose = "replacement of partner" if of_partner else "replacement"
        draws = generator(self.seed, purpose, epoch, position)
        return self.replacements.first_usable(row, read, draws, self.clips.clip_id)

    def _clip(self, row: int, epoch: int, position: int, of_partner: bool) -> dict[str, Any]:
        """The entries of one clip: waveform, targets, which of them are known, and teacher logits."""

        def draws(purpose: str) -> np.random.Generator:
            return generator(self.seed, f"{purpose} of partner" if of_partner else purpose, epoch, position)

        view = None if self.views is None else int(draws("stored view").integers(self.views.views))
        clip: dict[str, Any] = {"row": row}
        clip |= {"waveform": self._augmented(row, draws)} if view is None else self._stored_view(row, view)
        clip["targets"] = self.clips.targets(np.array([row]))[0]
        if self.clips.is_masked:
            clip["known"] = self.clips.mask(np.array([row]))[0]
        if self.teachers is not None:
            clip_id = self.clips.clip_id(row)
            logits, present = self.teachers.read([clip_id], None if view is None else np.array([view]))
            if not np.isfinite(logits).all():
                raise ValueError(
                    f"the teacher logits of clip {clip_id!r} are not finite: the logit store is damaged (check it with "
                    "kd verify); run kd teach again"
                )
            clip |= {"teacher_logits": logits[0], "has_teacher": bool(present[0])}
        return clip

    def _augmented(self, row: int, draws: Callable[[str], np.random.Generator]) -> np.ndarray:
        """The clip's waveform with this run's own augmentation; (S,)."""
        window, start = self.window, 0.0
        if self.augment.crop == "random":
            spare = min(self.clips.duration_seconds(row), self._heard_seconds) - window.seconds
            start = draws("crop").random() * max(0.0, spare)
        waveform = self.clips.waveform(row, window.sample_rate_hz, start, window.seconds)
        if self.impulse_responses:
            rng = draws("impulse response")
            if rng.random() < self.augment.impulse_response_share:
                choice = int(rng.random() * len(self.impulse_responses))
                waveform = convolve(waveform, self.impulse_responses[choice])
        return augment_waveform(
            window.repeated(waveform), window.samples, window.sample_rate_hz, self.augment, draws("waveform")
        )

    def _stored_view(self, row: int, view: int) -> dict[str, Tensor]:
        """A view as the teachers heard it."""
        heard = heard_views(
            self.clips,
            row,
            [view],
            self.views,
            seconds=self.window.seconds,
            sample_rate_hz=self.frontend.sample_rate_hz,
            frontend=self.frontend,
        )
        return {name: values[0] for name, values in heard.items()}

    def _mixed_with_another(self, one: dict[str, Any], epoch: int, position: int) -> dict[str, Any]:
        """The clip, possibly mixed with another one: waveforms and targets are mixed, teacher logits of both clips are kept."""
        rng = generator(self.seed, "waveform mixup", epoch, position)
        # Always drawn in this order, even if unused, so that one setting does not change the random numbers of others.
        is_mixed = rng.random() < self.augment.waveform_mixup
        partners = self._partners[bool("known" not in one or one["known"].any())]
        partner_row = int(partners[int(rng.random() * len(partners))]) if len(partners) else one["row"]
        if not is_mixed:
            return one | self._teacher_of_partner(one, 1.0)
        alpha = self.augment.waveform_mixup_alpha
        weight = float(rng.beta(alpha, alpha)) if alpha else 0.5
        weight = max(weight, 1 - weight)
        other = self._usable_clip(partner_row, epoch, position, of_partner=True)
        mixed = {
            name: (weight * one[name] + (1 - weight) * other[name]).astype(np.float32)
            for name in ("waveform", "targets")
        }
        if "known" in one:  # a label is known only if it is known for both clips
            mixed["known"] = one["known"] & other["known"]
        return one | mixed | self._teacher_of_partner(other, weight)

    @staticmethod
    def _teacher_of_partner(other: dict[str, Any], weight: float) -> dict[str, Any]:
        """The entries with which the objective mixes the teachers of two clips; empty without teachers."""
        if "teacher_logits" not in other:
            return {}
        return {
            f"{MIXED_WITH}teacher_logits": other["teacher_logits"],
            f"{MIXED_WITH}has_teacher": other["has_teacher"],
            "waveform_mix_weight": torch.tensor(weight, dtype=torch.float32),
        }

    def _draws_for_the_spectrogram(self, epoch: int, position: int) -> dict[str, Any]:
        """Random values that the objective applies to the batch's spectrograms."""
        augment, drawn = self.augment, {}
        if augment.mel_jitter and self.views is None:
            edges = draw_band_edges(self.frontend, generator(self.seed, "mel jitter", epoch, position))
            drawn["band_edges"] = torch.tensor(edges, dtype=torch.float32)
        if augment.mixup_alpha:
            weight = draw_mix_weight(self.seed, epoch, position, augment.mixup_alpha)
            drawn["mix_weight"] = torch.tensor(weight, dtype=torch.float32)
        if augment.freq_mixstyle:
            drawn["style_weight"] = self._style_weight(epoch, position)
        for name, count, widest in (
            ("time", augment.time_masks, augment.time_mask_share),
            ("frequency", augment.frequency_masks, augment.frequency_mask_share),
        ):
            if count:
                rng = generator(self.seed, f"{name} masks", epoch, position)
                width = rng.random(count) * widest
                start = rng.random(count) * (1 - width)
                drawn[f"{name}_masks"] = np.stack([start, start + width], axis=1).astype(np.float32)
        return drawn

    def _style_weight(self, epoch: int, position: int) -> Tensor:
        """The weight of a clip's own style; 1 if it is not mixed."""
        rng = generator(self.seed, "freq-mixstyle", epoch, position)
        is_mixed = rng.random() < self.augment.freq_mixstyle
        alpha = self.augment.freq_mixstyle_alpha
        return torch.tensor(float(rng.beta(alpha, alpha)) if is_mixed else 1.0, dtype=torch.float32)
