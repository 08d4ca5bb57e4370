"""Clips without audio files."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import TaskClips


def listed(labels: list[tuple[str, ...]], groups: list[str | None] | None = None, **more: list) -> TaskClips:
    """Clips without audio."""
    names = tuple(sorted({name for clip in labels for name in clip}))
    clips = [
        Clip(
            f"clip{index}",
            Path("nowhere"),
            clip,
            group=groups[index] if groups else None,
            **{key: values[index] for key, values in more.items()},
        )
        for index, clip in enumerate(labels)
    ]
    return TaskClips(Path("own"), names, clips)


class Ramp(TaskClips):
    """Clips whose samples are their own number, counted at 1000 Hz: what is heard tells where it was read."""

    def __init__(self, seconds: list[float]) -> None:
        clips = [Clip(f"clip{index}", Path("nowhere"), ("a",)) for index in range(len(seconds))]
        super().__init__(Path("ramp"), ("a", "b"), clips)
        self.seconds = seconds

    def duration_seconds(self, row: int) -> float:
        return self.seconds[row]

    def waveform(self, row, sample_rate_hz, start_seconds=0.0, seconds=None):
        ramp = 1 + np.arange(round(self.seconds[row] * 1000), dtype=np.float32)
        start = round(start_seconds * 1000)
        return ramp[start : None if seconds is None else start + round(seconds * 1000)]


@pytest.fixture
def clips_with_labels() -> Callable[..., TaskClips]:
    """``clips_with_labels([("a",), ("a", "b")], groups=…, fold=…)``: clips without audio."""
    return listed


@pytest.fixture
def ramp() -> type[Ramp]:
    """``ramp([0.5, 2.0])``: clips of these lengths in seconds, whose samples count up at 1000 Hz."""
    return Ramp
