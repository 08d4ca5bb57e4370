"""The windows of files and waveforms, filled up and spread as in evaluation. Memory does not grow with a file's length.

Shapes: S samples of a window.
"""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio_datasets.audio.codec import ClipParts, audio_info, fit_length, from_pcm16
from audio_datasets.audio.readers import FASTEST_HZ, SLOWEST_HZ
from audio_datasets.audio.resampling import resample
from kd.data.windows import Window, whole_samples, window_starts


@dataclass(frozen=True)
class CutClip:
    """A clip's length, the starts of its windows, and the windows themselves, one after the other."""

    duration_seconds: float
    starts: tuple[float, ...]
    waveforms: Iterator[np.ndarray]
    """(S,) float32 each. Going through them decodes, and raises ValueError or OSError for what cannot be decoded."""
    oddities: tuple[str, ...] = ()
    """What is odd about the file, such as a header that tells another length."""


def cut_file(path: Path, window: Window) -> CutClip:
    """Raises ValueError or OSError for a file that cannot be opened or read."""
    info = audio_info(path)
    duration = whole_samples(info.duration_seconds, window.sample_rate_hz)
    starts = window_starts(duration, window.seconds)
    return CutClip(duration, tuple(starts), _windows_of_file(path, window, starts), info.oddities)


def cut_waveform(waveform: np.ndarray, sample_rate_hz: int, window: Window) -> CutClip:
    """``waveform`` (any,) float32 at any rate."""
    duration = whole_samples(len(waveform) / sample_rate_hz, window.sample_rate_hz)
    starts = window_starts(duration, window.seconds)
    resampled = resample(waveform, sample_rate_hz, window.sample_rate_hz)
    parts = (_part(resampled, start, window) for start in starts)
    return CutClip(duration, tuple(starts), (_filled(part, window) for part in parts))


def as_waveforms(audio: Any, sample_rate_hz: int | None) -> np.ndarray:
    """NumPy or torch (samples,) or (batch, samples) -> (batch, samples) float32, full scale 1.0. 16-bit samples are scaled.

    Raises ValueError for other shapes and types, for no samples, for NaN or infinity, and for a rate that is missing or absurd.
    """
    if sample_rate_hz is None:
        raise ValueError("a waveform needs its rate: give sample_rate_hz")
    whole = not isinstance(sample_rate_hz, bool) and isinstance(sample_rate_hz, int | np.integer)
    if not whole or not SLOWEST_HZ <= sample_rate_hz <= FASTEST_HZ:
        raise ValueError(
            f"sample_rate_hz must be a whole number from {SLOWEST_HZ} to {FASTEST_HZ}; found {sample_rate_hz!r}"
        )
    waveforms = audio.detach().cpu().numpy() if isinstance(audio, torch.Tensor) else np.asarray(audio)
    if waveforms.ndim not in (1, 2) or waveforms.size == 0:
        raise ValueError(
            f"a waveform must have shape (samples,) or (batch, samples), with samples; found {waveforms.shape}"
        )
    if waveforms.dtype == np.int16:
        waveforms = from_pcm16(waveforms)
    elif not np.issubdtype(waveforms.dtype, np.floating):
        raise ValueError(
            f"a waveform holds floating-point numbers (full scale 1) or int16; found {waveforms.dtype}; scale it first"
        )
    waveforms = np.ascontiguousarray(np.atleast_2d(waveforms), dtype=np.float32)
    if not np.isfinite(waveforms).all():
        raise ValueError("the waveform holds NaN or infinite samples")
    return waveforms


def _windows_of_file(path: Path, window: Window, starts: list[float]) -> Iterator[np.ndarray]:
    with closing(ClipParts(path, window.sample_rate_hz)) as clip:
        for start in starts:
            yield _filled(clip.part(start, window.seconds), window)


def _part(waveform: np.ndarray, start_seconds: float, window: Window) -> np.ndarray:
    return waveform[round(start_seconds * window.sample_rate_hz) :][: window.samples]


def _filled(part: np.ndarray, window: Window) -> np.ndarray:
    return fit_length(window.repeated(part), window.samples)
