"""How much of the audio a command hears: what it leaves out is counted and said."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TOLERANCE_SECONDS = 0.05
"""Clips are seldom cut to the sample: so little is not missed."""


LONGEST_CLIP_SECONDS = 3_600
"""The longest part of a clip that a network can be made to hear at once."""


@dataclass
class Heard:
    """How much of some clips is heard."""

    clips: int = 0
    seconds: float = 0.0
    """Length of all clips together."""
    longer_clips: int = 0
    """Clips of which only a part is heard."""
    unheard_seconds: float = 0.0

    @classmethod
    def of_beginnings(cls, durations: np.ndarray | Sequence[float], seconds: float) -> "Heard":
        """If the first ``seconds`` of each clip are heard; ``durations`` (clips,) in seconds."""
        heard, durations = cls(), np.asarray(durations, dtype=float)
        heard.add(durations, np.minimum(durations, seconds))
        return heard

    def add(self, duration_seconds: float | np.ndarray, heard_seconds: float | np.ndarray) -> None:
        """Counts one more clip, or several: (clips,)."""
        left_out = np.atleast_1d(np.subtract(duration_seconds, heard_seconds))
        is_longer = left_out > TOLERANCE_SECONDS
        self.clips += len(left_out)
        self.seconds += float(np.sum(duration_seconds))
        self.longer_clips += int(is_longer.sum())
        self.unheard_seconds += float(left_out[is_longer].sum())

    def __str__(self) -> str:
        """What is left out; "" for nothing."""
        if not self.longer_clips:
            return ""
        share = 100 * self.unheard_seconds / self.seconds
        return (
            f"{self.longer_clips} of {self.clips} clips are longer: {self.unheard_seconds:,.1f} s of {self.seconds:,.1f} s "
            f"({share:.1f} %) are not heard"
        )
