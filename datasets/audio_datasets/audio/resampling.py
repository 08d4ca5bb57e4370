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


class StreamResampler:
    """``resample`` for audio that arrives piece by piece: in blocks of about ``BLOCK_SECONDS``, with what the filter reaches.

    The samples do not depend on how the audio is cut into pieces.
    """

    BLOCK_SECONDS = 0.1

    def __init__(self, from_hz: int, to_hz: int, block_seconds: float = BLOCK_SECONDS) -> None:
        self.from_hz, self.to_hz = from_hz, to_hz
        self._old, self._new = _reduced(from_hz, to_hz)
        margin_periods = -(-_filter_width(self._old, self._new) // self._old) + 1
        block_periods = max(1, round(block_seconds * from_hz / self._old))
        self._margin, self._margin_out = margin_periods * self._old, margin_periods * self._new
        self._block, self._block_out = block_periods * self._old, block_periods * self._new
        self._pieces = [np.zeros(self._margin, np.float32)]  # silence before the start, as the filter has it
        self._waiting = self._margin
        self._received = self._given = 0

    def feed(self, waveform: np.ndarray) -> np.ndarray:
        """float32 (any,) -> float32 (any,): the samples that are complete by now."""
        if self.from_hz == self.to_hz:
            return waveform
        self._received += len(waveform)
        self._pieces.append(waveform)
        self._waiting += len(waveform)
        needed = self._block + 2 * self._margin
        if self._waiting < needed:
            return np.empty(0, np.float32)
        waiting, found, start = np.concatenate(self._pieces), [], 0
        while len(waiting) - start >= needed:
            resampled = resample(waiting[start : start + needed], self.from_hz, self.to_hz)
            found.append(resampled[self._margin_out :][: self._block_out])
            start += self._block
        self._pieces, self._waiting = [waiting[start:].copy()], len(waiting) - start
        self._given += len(found) * self._block_out
        return np.concatenate(found)

    def finish(self) -> np.ndarray:
        """What is left when the audio has ended."""
        left = -(-self._received * self._new // self._old) - self._given
        if self.from_hz == self.to_hz or left == 0:
            return np.empty(0, np.float32)
        waiting = np.concatenate([*self._pieces, np.zeros(self._margin, np.float32)])
        self._given += left
        return resample(waiting, self.from_hz, self.to_hz)[self._margin_out :][:left]
