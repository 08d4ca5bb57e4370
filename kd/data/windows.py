"""Clips as waveforms of a fixed length: cutting and filling up clips, and the windows that evaluation uses.

Shapes: S samples of a window.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from audio_datasets.audio.bad_clips import BadClipError, OnBadClip
from audio_datasets.audio.codec import fit_length
from audio_datasets.audio.heard import Heard
from audio_datasets.system.command import progress
from audio_datasets.tasks.label_space import LabelSpace

WINDOW_TOLERANCE = 0.05
"""A remainder shorter than this fraction of a window gets no window, because clips are rarely cut to the exact sample."""

ShortClips = Literal["pad", "repeat"]


class Clips(Protocol):
    """The interface that training and evaluation need: a clip store, joined stores, and a task's listing all have it."""

    class_names: tuple[str, ...]
    label_space: LabelSpace
    is_masked: bool
    fingerprint: str
    content_fingerprint: str

    @property
    def path(self) -> object: ...
    def __len__(self) -> int: ...
    def clip_id(self, row: int) -> str: ...
    def targets(self, rows: np.ndarray) -> np.ndarray: ...  # float32 (k, C)
    def mask(self, rows: np.ndarray) -> np.ndarray: ...  # bool (k, C): where targets are known
    def duration_seconds(self, row: int) -> float: ...
    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray: ...


@dataclass(frozen=True)
class Window:
    """The fixed length of clips."""

    sample_rate_hz: int
    seconds: float
    short_clips: ShortClips = "pad"
    """Whether shorter clips are filled up with silence or by repeating them."""

    @property
    def samples(self) -> int:
        return round(self.seconds * self.sample_rate_hz)

    def repeated(self, waveform: np.ndarray) -> np.ndarray:
        """(any,) -> the waveform, repeated up to ``samples`` if short clips are to be repeated. Padding is done by ``fit_length``."""
        if self.short_clips == "repeat" and 0 < len(waveform) < self.samples:
            return np.resize(waveform, self.samples)
        return waveform


def window_starts(duration_seconds: float, window_seconds: float) -> list[float]:
    """Start times, in seconds, of windows that cover a clip, evenly spread from its start to its end."""
    count = max(1, int(np.ceil(duration_seconds / window_seconds - WINDOW_TOLERANCE)))
    return [0.0] if count == 1 else np.linspace(0.0, duration_seconds - window_seconds, count).tolist()


def whole_samples(duration_seconds: float, sample_rate_hz: int) -> float:
    """A clip's length in seconds, rounded up to whole samples at a rate.

    So a clip has the same windows whether it comes from a file or, resampled, from a cache.
    """
    return int(np.ceil(duration_seconds * sample_rate_hz - 1e-6)) / sample_rate_hz


class EvaluationWindows(Dataset[tuple[int, Tensor]]):
    """The windows of chosen clips as (number, waveform (S,)); nothing is random.

    A bad clip raises ``BadClipError``. With ``on_bad_clip="skip"`` it is returned as silence with the negative number ``~number``.
    """

    def __init__(
        self,
        clips: Clips,
        rows: np.ndarray,
        window: Window,
        on_bad_clip: OnBadClip = "refuse",
        whole_clips: bool = True,
        shown: bool = True,
    ) -> None:
        """
        Args:
            whole_clips: cover clips longer than a window by several windows, from start to end; otherwise only the beginning of
                each clip is used.
            shown: show a progress bar if measuring the clips' lengths takes long.
        """
        self.clips = clips
        self.rows = rows
        self.window = window
        self.on_bad_clip = on_bad_clip
        self.clip_of: list[int] = []
        """For each window, the index in ``rows`` of its clip."""
        self.starts: list[float] = []
        """For each window, its start time in the clip, in seconds."""
        self.heard = Heard()
        """How much of the clips the windows cover."""
        bar = progress(rows, desc="lengths of clips", unit="clip", leave=False, delay=2, shown=shown)
        for place, row in enumerate(bar):
            duration = self._duration(int(row))
            starts = window_starts(duration, window.seconds) if whole_clips else [0.0]
            self.clip_of += [place] * len(starts)
            self.starts += starts
            self.heard.add(duration, duration if whole_clips else min(duration, window.seconds))

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, number: int) -> tuple[int, Tensor]:
        window = self.window
        try:
            waveform = self._waveform(number)
        except BadClipError:
            if self.on_bad_clip == "refuse":
                raise
            return ~number, torch.zeros(window.samples)
        return number, torch.from_numpy(fit_length(window.repeated(waveform), window.samples))

    def _waveform(self, number: int) -> np.ndarray:
        row, window = int(self.rows[self.clip_of[number]]), self.window
        return self.clips.waveform(row, window.sample_rate_hz, self.starts[number], window.seconds)

    def _duration(self, row: int) -> float:
        """One clip's length at the window's sample rate, in seconds; 0 for a clip that cannot be used: reading it tells why."""
        try:
            return whole_samples(self.clips.duration_seconds(row), self.window.sample_rate_hz)
        except BadClipError:
            if self.on_bad_clip == "refuse":
                raise
            return 0.0

    def clip_id(self, number: int) -> str:
        """The id of a window's clip."""
        return self.clips.clip_id(int(self.rows[self.clip_of[number]]))

    def reason(self, number: int) -> str:
        """The reason why a window cannot be used; "" if it can."""
        try:
            self._waveform(number)
            return ""
        except BadClipError as error:
            return error.reason

    def mean_of_clips(self, values: np.ndarray) -> np.ndarray:
        """(windows, any) -> (rows, any): the mean over each clip's windows; NaN if any of them is NaN."""
        sums = np.zeros((len(self.rows), values.shape[1]), dtype=np.float64)
        np.add.at(sums, self.clip_of, values)
        return (sums / np.bincount(self.clip_of, minlength=len(self.rows))[:, None]).astype(np.float32)
