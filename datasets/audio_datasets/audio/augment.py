"""Augmentation of clips: what is drawn for a clip, and how two clips are mixed.

Draws come from ``randomness.generator``, so a clip's augmentation depends on (seed, epoch, position) and on nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from torch import Tensor

from audio_datasets.audio.codec import fit_length
from audio_datasets.system.randomness import generator


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training clips."""

    help_title: ClassVar[str] = "Augmentation"

    mixup_alpha: float = 0.3
    """Spectrogram mixup: draw the weights from Beta(alpha, alpha); the clip itself gets the larger one. 0 turns it off."""
    mel_jitter: bool = True
    """Vary the lowest and highest mel frequency from clip to clip (--fmin-jitter-hz, --fmax-jitter-hz)."""
    gain_db: float = 0.0
    """Change the volume by up to +/- this many decibels."""
    roll_seconds: float = 0.0
    """Shift the waveform in time, with wrap-around, by up to +/- this many seconds."""
    crop: Literal["start", "random"] = "start"
    """Part of a long clip to train on. Teacher logits that were stored without views belong to the start."""
    waveform_mixup: float = 0.0
    """Share of the training clips whose waveform is mixed with another clip's. 0 turns it off."""
    waveform_mixup_alpha: float = 2.0
    """Waveform mixup: draw the weights from Beta(alpha, alpha); the clip itself gets the larger one. 0: one half each."""
    freq_mixstyle: float = 0.0
    """Freq-MixStyle: share of the training clips whose statistics in each mel band are mixed with another clip's."""
    freq_mixstyle_alpha: float = 0.3
    """Freq-MixStyle: draw the weights from Beta(alpha, alpha)."""
    impulse_responses: Path | None = None
    """Folder with impulse responses of recording devices (WAV)."""
    impulse_response_share: float = 0.6
    """Share of the training clips that are convolved with an impulse response."""
    time_masks: int = 0
    """SpecAugment: number of time masks in each clip. Masked parts are set to the clip's mean."""
    time_mask_share: float = 0.1
    """SpecAugment: longest time mask, as a share of the clip."""
    frequency_masks: int = 0
    """SpecAugment: number of frequency masks in each clip."""
    frequency_mask_share: float = 0.1
    """SpecAugment: widest frequency mask, as a share of the mel bands."""

    def __post_init__(self) -> None:
        for name in (
            "mixup_alpha", "gain_db", "roll_seconds", "time_masks", "frequency_masks", "waveform_mixup_alpha",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; found {getattr(self, name)}")
        for name in (
            "waveform_mixup", "freq_mixstyle", "impulse_response_share", "time_mask_share", "frequency_mask_share",
        ):  # fmt: skip
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1]; found {getattr(self, name)}")
        if not self.freq_mixstyle_alpha > 0:
            raise ValueError(f"freq_mixstyle_alpha must be positive; found {self.freq_mixstyle_alpha}")

    @property
    def in_pairs(self) -> bool:
        """Whether clips are mixed with their neighbours in the batch, which must then be even."""
        return self.mixup_alpha > 0 or self.freq_mixstyle > 0


def augment_waveform(
    waveform: np.ndarray, samples: int, sample_rate_hz: int, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Pads or cuts to ``samples`` from the start, then rolls and changes the gain; float32 (samples,).

    A random crop was made when the clip was read (``kd.data.examples``). Each effect draws from ``rng`` in this order, whether or not it is turned on, so that turning one off leaves the
    others' numbers alone.
    """
    _, roll, gain = rng.random(3)  # the first was a crop in runs of version 0.1
    waveform = fit_length(waveform, samples)
    if config.roll_seconds:
        waveform = np.roll(waveform, round((2 * roll - 1) * config.roll_seconds * sample_rate_hz))
    if config.gain_db:
        waveform = waveform * np.float32(10 ** ((2 * gain - 1) * config.gain_db / 20))
    return waveform


def draw_mix_weight(seed: int, epoch: int, position: int, alpha: float) -> float:
    """Mixup weight of the clip at ``position``: max(b, 1 − b) with b ~ Beta(alpha, alpha), in [0.5, 1]; 1 if alpha is 0."""
    if alpha == 0:
        return 1.0
    weight = generator(seed, "mixup", epoch, position).beta(alpha, alpha)
    return float(max(weight, 1.0 - weight))


def mix_with_partner(values: Tensor, weight: Tensor) -> Tensor:
    """weight · values + (1 − weight) · partner's values, for clips 2k and 2k + 1 of a batch as each other's partners.

    The epoch's order is a random permutation, so neighbours are a random pair. Pairing inside a batch by neighbours
    rather than by a permutation of the batch makes the pairs independent of how the epoch is divided among processes.

    Args:
        values: (B, ...), float; B even.
        weight: (B,), the share of the clip itself.
    """
    assert len(values) % 2 == 0, f"mixup pairs clips; found a batch of {len(values)}"
    partner = values.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
    weight = weight.to(values.dtype).view(-1, *[1] * (values.dim() - 1))
    return weight * values + (1 - weight) * partner


def both_of_pair(flags: Tensor) -> Tensor:
    """(B,) bool: true where the clip and its mixup partner both have the flag."""
    return flags & flags.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
