"""Views: augmented versions of a clip that can be recreated from (seed, clip, view number) alone.

A teacher hears the views of every clip once. A student later trains on the same views, with the teacher's logits for exactly
what it hears ("consistent teaching": Beyer et al., "Knowledge distillation: A good teacher is patient and
consistent", 2022; for audio CED, Dinkel et al., 2023). Only the logits of a view are stored.
"""

import hashlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from audio_datasets.audio.codec import fit_length
from audio_datasets.system.randomness import generator


@dataclass(frozen=True)
class ViewConfig:
    """Views of each clip, for consistent teaching."""

    help_title: ClassVar[str] = "Augmented views (consistent teaching)"

    views: int = 0
    """Number of augmented views of each clip that the teachers hear; 0: the clip itself, unchanged."""
    view_seconds: float | None = None
    """Length of a view, cut at random from a longer clip (default: the length that the teacher hears)."""
    view_roll_seconds: float = 0.125
    """Shift each view in time, with wrap-around, by up to +/- this many seconds."""
    view_gain_db: float = 7.0
    """Change the volume of each view by up to +/- this many decibels."""
    view_mel_jitter: bool = True
    """Vary the lowest and highest mel frequency from view to view, within the front end's ranges."""
    view_masked_bands: float = 0.0
    """Mask one range of mel bands in each view, at most this share of them."""
    view_masked_time: float = 0.0
    """Mask one stretch of time in each view, at most this share of it."""
    view_seed: int = 0
    """Seed of the views."""

    def __post_init__(self) -> None:
        if self.views < 0 or self.view_seed < 0:
            raise ValueError(f"views and view_seed must not be negative; found {self.views} and {self.view_seed}")
        if self.view_seconds is not None and not 0 < self.view_seconds < float("inf"):
            raise ValueError(f"view_seconds must be above 0; found {self.view_seconds}")
        if not (0 <= self.view_roll_seconds < float("inf") and 0 <= self.view_gain_db < float("inf")):
            raise ValueError(
                "view_roll_seconds and view_gain_db must not be negative; "
                f"found {self.view_roll_seconds} and {self.view_gain_db}"
            )
        if not (0 <= self.view_masked_bands < 1 and 0 <= self.view_masked_time < 1):
            raise ValueError(
                "view_masked_bands and view_masked_time are shares, at least 0 and less than 1; "
                f"found {self.view_masked_bands} and {self.view_masked_time}"
            )

    @property
    def masks(self) -> bool:
        """Whether views have masked stripes."""
        return self.view_masked_bands > 0 or self.view_masked_time > 0


def clip_code(clip_id: str) -> int:
    """63-bit code of a clip's id, which keys the random draws of its views. It does not depend on the clip's location."""
    return int.from_bytes(hashlib.blake2b(clip_id.encode(), digest_size=8).digest(), "little") >> 1


def view_generator(config: ViewConfig, purpose: str, clip_id: str, view: int) -> np.random.Generator:
    """The generator for all random draws for one purpose in one view of a clip."""
    return generator(config.view_seed, f"view {purpose}", view, clip_code(clip_id))


def view_waveform(
    waveform: np.ndarray, samples: int, sample_rate_hz: int, config: ViewConfig, clip_id: str, view: int
) -> np.ndarray:
    """One view of a whole clip: a part of ``samples`` (or all, and zeros after it), rolled, with another gain; float32.

    Numbers are drawn as shares of a range, so that a teacher and a student of different sample rates hear the same part.
    """
    crop, roll, gain = view_generator(config, "waveform", clip_id, view).random(3)
    spare = max(0, len(waveform) - samples)
    part = fit_length(waveform, samples, int(crop * (spare + 1)))
    rolled = np.roll(part, round((2 * roll - 1) * config.view_roll_seconds * sample_rate_hz))
    return rolled * np.float32(10 ** ((2 * gain - 1) * config.view_gain_db / 20))


def view_stripes(config: ViewConfig, clip_id: str, view: int) -> np.ndarray:
    """The masked stripes, as shares of the axes: float32 (4,), first and end of the bands, first and end of the time."""
    width_bands, start_bands, width_time, start_time = view_generator(config, "stripes", clip_id, view).random(4)
    bands, time = width_bands * config.view_masked_bands, width_time * config.view_masked_time
    first_band, first_time = start_bands * (1 - bands), start_time * (1 - time)
    return np.array([first_band, first_band + bands, first_time, first_time + time], dtype=np.float32)
