"""Decoded samples mixed to mono and brought to another rate, whole or in parts.

Waveforms are float32 NumPy arrays of shape (samples,).
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

# torchaudio's defaults (Hann-windowed sinc), written out because `resample_direct` must agree with them.
FILTER_ZEROS = 6
FILTER_ROLLOFF = 0.99
# Coefficients above which a rate pair's polyphase kernel is not built: 64 MiB. Common rates need less than 1 MiB.
LARGEST_KERNEL = 2**24


def mix_to_mono(channels: np.ndarray) -> np.ndarray:
    """float32 (samples, channels) -> float32 (samples,): the mean of the channels."""
    mixed = np.ascontiguousarray(channels[:, 0])
    if channels.shape[1] == 1:
        return mixed
    # Channel by channel: NumPy's mean over so short an axis takes a hundred times as long.
    for channel in range(1, channels.shape[1]):
        mixed += channels[:, channel]
    return np.multiply(mixed, np.float32(1 / channels.shape[1]), out=mixed)


def resample(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """float32 (samples,) at ``from_hz`` -> float32 (ceil(samples · to_hz / from_hz),) at ``to_hz``, low-pass filtered.

    torchaudio's windowed sinc; its kernel is built once per pair of rates and process.
    """
    if from_hz <= 0 or to_hz <= 0:
        raise ValueError(f"sample rates must be positive; found {from_hz} Hz to {to_hz} Hz")
    if from_hz == to_hz or len(waveform) == 0:
        return np.ascontiguousarray(waveform, dtype=np.float32)
    old, new = _reduced(from_hz, to_hz)
    if new * (old + 2 * _filter_width(old, new)) > LARGEST_KERNEL:
        return resample_direct(waveform, from_hz, to_hz)
    with torch.inference_mode():
        return _resampler(old, new)(torch.from_numpy(np.ascontiguousarray(waveform, dtype=np.float32))).numpy()


@lru_cache(maxsize=64)
def _resampler(old: int, new: int) -> torch.nn.Module:
    try:
        # Here, so that importing this package needs neither the time nor the libraries that torchaudio was built for.
        from torchaudio.transforms import Resample
    except OSError as error:  # a shared library is missing
        raise ValueError(
            f"torchaudio does not fit the installed torch {torch.__version__} ({error}); install both from the same index: "
            "for machines without a GPU, from PyTorch's index of CPU wheels"
        ) from error
    return Resample(old, new, lowpass_filter_width=FILTER_ZEROS, rolloff=FILTER_ROLLOFF)


def resample_direct(waveform: np.ndarray, from_hz: int, to_hz: int) -> np.ndarray:
    """The same filter as ``resample``, evaluated for each output sample instead of tabulated.

    For rates with a small common divisor, such as 11,127 Hz to 32,000 Hz, whose table would take gigabytes.
    """
    old, new = _reduced(from_hz, to_hz)
    width = _filter_width(old, new)
    cutoff = min(old, new) * FILTER_ROLLOFF / old
    moment = np.arange(-(-len(waveform) * new // old), dtype=np.int64) * old
    whole, fraction = moment // new, (moment % new) / new
    padded = np.pad(waveform.astype(np.float64), (width, width + 1))
    resampled = np.zeros(len(moment))
    for offset in range(-width, width + 2):
        distance = np.clip((offset - fraction) * cutoff, -FILTER_ZEROS, FILTER_ZEROS)
        window = np.cos(distance * np.pi / FILTER_ZEROS / 2) ** 2
        resampled += padded[whole + width + offset] * np.sinc(distance) * window * cutoff
    return resampled.astype(np.float32)


def _reduced(from_hz: int, to_hz: int) -> tuple[int, int]:
    divisor = math.gcd(from_hz, to_hz)
    return from_hz // divisor, to_hz // divisor


def _filter_width(old: int, new: int) -> int:
    """Input samples on either side of an output sample that the filter reaches."""
    return math.ceil(FILTER_ZEROS * old / (min(old, new) * FILTER_ROLLOFF))


@dataclass(frozen=True)
class Span:
    """Which input samples to read, and which part of them to keep after resampling. None means up to the end."""

    first: int
    count: int | None
    skip: int
    keep: int | None

    def cut(self, resampled: np.ndarray) -> np.ndarray:
        """The part asked for: (samples after resampling,) -> (at most ``keep``,)."""
        return resampled[self.skip : None if self.keep is None else self.skip + self.keep]


def span_to_read(start_seconds: float, seconds: float | None, from_hz: int, to_hz: int) -> Span:
    """The input samples that determine one part of a clip at another rate.

    The part then equals the same samples of the whole resampled clip: it begins at a whole period of the two rates and
    includes what the filter reaches on both sides.
    """
    if start_seconds < 0 or (seconds is not None and seconds < 0):
        raise ValueError(f"start and length must not be negative; found {start_seconds} s and {seconds} s")
    start = round(start_seconds * to_hz)
    keep = None if seconds is None else round(seconds * to_hz)
    if from_hz == to_hz:
        return Span(first=start, count=keep, skip=0, keep=keep)
    old, new = _reduced(from_hz, to_hz)
    margin = -(-_filter_width(old, new) // old) + 1
    first_period = max(0, start // new - margin)
    count = None if keep is None else ((start + keep) // new + 1 + margin - first_period) * old
    return Span(first=first_period * old, count=count, skip=start - first_period * new, keep=keep)
