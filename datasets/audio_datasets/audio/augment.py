"""Augmentation of clips: what is drawn for a clip, and how two clips are mixed.

Draws come from ``randomness.generator``, so a clip's augmentation depends on (seed, epoch, position) and on nothing else.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from audio_datasets.audio.codec import fit_length
from audio_datasets.system.randomness import generator


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation of the training clips."""

    mixup_alpha: float = 0.3
    """Mixup of spectrograms: weights are drawn from Beta(alpha, alpha), the larger one for the clip itself; 0 turns it off."""
    mel_jitter: bool = True
    """Draw the lowest and highest mel frequency of each clip within the front end's ranges."""
    gain_db: float = 0.0
    """Multiply the waveform by a gain drawn uniformly from +/- this many decibels."""
    roll_seconds: float = 0.0
    """Roll the waveform in time by an offset drawn uniformly from +/- this many seconds."""
    crop: Literal["start", "random"] = "start"
    """Which part of a clip longer than the clip length is used. Offline teacher logits belong to the start."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "gain_db", "roll_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative; found {getattr(self, name)}")


def augment_waveform(
    waveform: np.ndarray, samples: int, sample_rate_hz: int, config: AugmentConfig, rng: np.random.Generator
) -> np.ndarray:
    """Crops or pads to ``samples``, then rolls and changes the gain; float32 (samples,).

    Each effect draws from ``rng`` in this order, whether or not it is turned on, so that turning one off leaves the
    others' numbers alone.
    """
    crop, roll, gain = rng.random(3)
    spare = len(waveform) - samples
    offset = int(crop * (spare + 1)) if config.crop == "random" and spare > 0 else 0
    waveform = fit_length(waveform, samples, offset)
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
