"""Clips that are numbers in memory."""

import numpy as np
import pytest

from audio_datasets.audio.bad_clips import BadClipError

RATE_HZ = 100


class NumberedClips:
    """Clips at 100 Hz whose every sample is the clip's number, from 1 on; with targets and masks, without files."""

    def __init__(
        self,
        class_names: tuple[str, ...],
        targets: np.ndarray,
        *,
        mask: np.ndarray | None = None,
        seconds: list[float] | None = None,
        bad: tuple[int, ...] = (),
    ) -> None:
        self.class_names = class_names
        self._targets = np.asarray(targets, dtype=np.float32)
        self._mask = np.ones(self._targets.shape, dtype=bool) if mask is None else mask
        self.seconds = seconds or [1.0] * len(self._targets)
        self.bad = bad

    def __len__(self) -> int:
        return len(self._targets)

    def clip_id(self, row: int) -> str:
        return f"clip{row}"

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows]

    def mask(self, rows: np.ndarray) -> np.ndarray:
        return self._mask[rows]

    def duration_seconds(self, row: int) -> float:
        return self.seconds[row]

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        assert sample_rate_hz == RATE_HZ
        if row in self.bad:
            raise BadClipError(f"clip {self.clip_id(row)!r}: no sound", "no sound")
        whole = np.full(round(self.seconds[row] * RATE_HZ), row + 1, dtype=np.float32)
        whole[: RATE_HZ // 2] += 0.5  # the first half second tells itself from the rest
        start = round(start_seconds * RATE_HZ)
        return whole[start : None if seconds is None else start + round(seconds * RATE_HZ)]


@pytest.fixture
def numbered_clips() -> type[NumberedClips]:
    return NumberedClips
