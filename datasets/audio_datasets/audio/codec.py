"""Audio bytes to mono waveforms and back: decoding, resampling, cutting, encoding.

Waveforms are float32 NumPy arrays of shape (samples,), full scale 1.0.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile
import torch
from torchaudio.transforms import Resample

PCM16_FULL_SCALE = 32768
CLIPPED = 1 - 1.5 / PCM16_FULL_SCALE  # the largest 16-bit values, of either sign
EMPTY = "audio is empty: it has a header and no samples"
# Suffixes of files that libsndfile can be expected to read. A list of files may name others as well.
_READABLE = "wav wave w64 rf64 flac ogg oga opus mp3 aif aiff aifc au snd caf voc sph nist sf paf"
AUDIO_SUFFIXES = frozenset(f".{name}" for name in _READABLE.split())
ENCODED_FORMATS = {"mp3": ("MP3", "MPEG_LAYER_III"), "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16")}

# Formats in which a seek lands on the exact sample and decodes the same values as a read from the start. After a seek
# the frames of MP3 and Vorbis overlap others that were never decoded, so those are read from the start.
SEEKABLE_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"}

# What a clip may be. Beyond it a header is damaged, or the clip would not fit in memory: a wrong rate of 1 Hz, say, makes
# 32,000 samples of each.
SLOWEST_HZ, FASTEST_HZ = 1_000, 1_000_000
MOST_SAMPLES = 2**27
"""Samples that are decoded in one piece: 512 MiB as float32, or 46 minutes at 48 kHz."""
LOUDEST = 2.0**16
"""Times full scale. Files of floating-point samples may go beyond 1, by a factor of 32,768 if they hold unscaled integers."""
BLOCK_SAMPLES = 2**20  # over all channels; what is decoded at a time

# torchaudio's defaults (Hann-windowed sinc), written out because `resample_direct` must agree with them.
FILTER_ZEROS = 6
FILTER_ROLLOFF = 0.99
# Coefficients above which a rate pair's polyphase kernel is not built: 64 MiB. Common rates need less than 1 MiB.
LARGEST_KERNEL = 2**24


@dataclass(frozen=True)
class AudioInfo:
    """What an audio file's header says."""

    sample_rate_hz: int
    channels: int
    samples: int
    file_format: str

    @property
    def duration_seconds(self) -> float:
        return self.samples / self.sample_rate_hz


def audio_info(data: bytes | Path) -> AudioInfo:
    """Rate, channels and length of an encoded clip (bytes or a file), from its header.

    Raises ValueError for audio that cannot be read; OSError for a file that cannot be opened.
    """
    with _open(data) as file:
        return AudioInfo(file.samplerate, file.channels, file.frames, file.format)


def decode(
    data: bytes | Path, sample_rate_hz: int | None = None, start_seconds: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """A clip as a mono waveform, float32 (samples,): channels averaged, resampled with a low-pass filter.

    ``data`` is the encoded file's content, or a path, in any format that libsndfile reads. ``sample_rate_hz`` None keeps
    the clip's own rate. With ``start_seconds`` and ``seconds`` only that part is returned (and, as far as the format
    allows, only that part is decoded); it is shorter than ``seconds`` where the clip ends earlier.

    Raises ValueError for audio that is empty, cannot be decoded, holds NaN or infinite samples, or is longer than
    ``MOST_SAMPLES``; OSError for a file that cannot be opened.
    """
    with _open(data) as file:
        from_hz = file.samplerate
        to_hz = from_hz if sample_rate_hz is None else sample_rate_hz
        span = span_to_read(start_seconds, seconds, from_hz, to_hz)
        blocks, samples = [], 0
        for block in _mono_blocks(file, span.first, span.count):
            samples += len(block)
            if max(samples, samples * to_hz // from_hz) > MOST_SAMPLES:
                raise ValueError(
                    f"audio is too long to be decoded in one piece: more than {samples / from_hz:.0f} s at {from_hz} Hz "
                    f"(at most {MOST_SAMPLES} samples); cut it into shorter clips"
                )
            blocks.append(block)
    if not blocks and span.first == 0 and span.count != 0:
        raise ValueError(EMPTY)
    waveform = blocks[0] if len(blocks) == 1 else np.concatenate([np.empty(0, np.float32), *blocks])
    return span.cut(resample(waveform, from_hz, to_hz))


@dataclass(frozen=True)
class AudioCheck:
    """What decoding a clip from beginning to end has found."""

    info: AudioInfo
    """As the header says, but with the samples that were really there; headers of damaged files may promise more."""
    peak: float
    """Largest magnitude of a sample after mixing to mono."""
    clipped_share: float
    """Share of the samples that lie at full scale or beyond."""


def check_audio(data: bytes | Path) -> AudioCheck:
    """Decodes a clip of any length, in memory that does not grow with it.

    Raises ValueError and OSError as ``decode`` does, but for the clip's length.
    """
    with _open(data) as file:
        info = AudioInfo(file.samplerate, file.channels, file.frames, file.format)
        return check_blocks(info, _mono_blocks(file, 0, None))


def check_blocks(info: AudioInfo, blocks: Iterable[np.ndarray]) -> AudioCheck:
    """``check_audio`` for a clip that is decoded already: its mono samples, in blocks none of which is empty."""
    samples, clipped, peak = 0, 0, 0.0
    for block in blocks:
        magnitude = np.abs(block)
        samples += len(block)
        clipped += int((magnitude >= CLIPPED).sum())
        peak = max(peak, float(magnitude.max()))
    if samples == 0:
        raise ValueError(EMPTY)
    return AudioCheck(replace(info, samples=samples), peak, clipped / samples)


def _mono_blocks(file: soundfile.SoundFile, first: int, count: int | None) -> Iterator[np.ndarray]:
    """The samples from ``first`` on, at most ``count``, mixed to mono: float32 (at most ``BLOCK_SAMPLES``,), none empty.

    Raises ValueError for what cannot be decoded, and for samples that are not finite or absurdly large.
    """
    block_frames = max(1, BLOCK_SAMPLES // file.channels)
    try:
        if file.format in SEEKABLE_FORMATS:
            file.seek(min(first, file.frames))
        else:
            while first > 0 and (skipped := len(file.read(min(first, block_frames), dtype="float32"))):
                first -= skipped
        while count is None or count > 0:
            channels = file.read(block_frames if count is None else min(count, block_frames), "float32", always_2d=True)
            if len(channels) == 0:
                return
            count = None if count is None else count - len(channels)
            block = mix_to_mono(channels)
            loudest = float(np.abs(block).max())
            if not math.isfinite(loudest):
                raise ValueError("audio holds NaN or infinite samples")
            if loudest > LOUDEST:
                raise ValueError(
                    f"audio holds samples of {loudest:.3g} times full scale; up to {LOUDEST:.0f} are allowed"
                )
            yield block
    except soundfile.SoundFileError as error:
        raise ValueError(f"audio cannot be decoded: {error}") from error


def mix_to_mono(channels: np.ndarray) -> np.ndarray:
    """float32 (samples, channels) -> float32 (samples,): the mean of the channels."""
    mixed = np.ascontiguousarray(channels[:, 0])
    if channels.shape[1] == 1:
        return mixed
    # Channel by channel: NumPy's mean over so short an axis takes a hundred times as long.
    for channel in range(1, channels.shape[1]):
        mixed += channels[:, channel]
    return np.multiply(mixed, np.float32(1 / channels.shape[1]), out=mixed)


class _SequentialFile(soundfile.SoundFile):
    """A file to be read in blocks.

    soundfile seeks to where it stands after each read of a file that says it is seekable. In an MP3 that is not harmless: the
    decoder loses its bit reservoir, and the next samples come out wrong (by 0.3 of full scale, measured).
    """

    def __init__(self, source: str | BinaryIO) -> None:
        self._source = source  # which must stay open as long
        super().__init__(source if isinstance(source, str) else source.fileno(), closefd=False)

    def seekable(self) -> bool:
        return False


def _memory_file() -> BinaryIO:
    """A file that lies in memory (where the system has none, on disk) and has a descriptor, for libsndfile to work on.

    Not io.BytesIO: libsndfile would call back into Python for it, where exceptions cannot get out. A signal's or Ctrl-C's
    would be lost, and what is read or written silently cut short.
    """
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("audio"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _open(data: bytes | Path) -> soundfile.SoundFile:
    if isinstance(data, bytes):
        if not data:
            raise ValueError("audio is empty: 0 bytes")
        source = _memory_file()
        left = memoryview(data)
        while left:
            left = left[source.write(left) :]
        source.seek(0)
    else:
        if data.stat().st_size == 0:
            raise ValueError("audio is empty: 0 bytes")
        source = str(data)
    try:
        file = _SequentialFile(source)
    except soundfile.SoundFileError as error:
        reason = getattr(error, "error_string", str(error))
        raise ValueError(f"audio is in no format that libsndfile reads, or damaged: {reason}") from error
    if not SLOWEST_HZ <= file.samplerate <= FASTEST_HZ:
        file.close()
        raise ValueError(
            f"audio has a sample rate of {file.samplerate} Hz; {SLOWEST_HZ} to {FASTEST_HZ} Hz are allowed"
        )
    return file


# -- Resampling --------------------------------------------------------------------------------------------------------


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
def _resampler(old: int, new: int) -> Resample:
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


# -- Parts of clips ----------------------------------------------------------------------------------------------------


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


def fit_length(waveform: np.ndarray, samples: int, offset: int = 0) -> np.ndarray:
    """(any,) -> (samples,): cropped from ``offset`` on, or padded with zeros at the end."""
    part = waveform[offset : offset + samples]
    return part if len(part) == samples else np.pad(part, (0, samples - len(part)))


# -- Encoding ----------------------------------------------------------------------------------------------------------


def to_pcm16(waveform: np.ndarray) -> np.ndarray:
    """float32 (samples,) -> int16 (samples,): rounded, and clipped beyond full scale. Lossless for decoded 16-bit audio."""
    scaled = np.rint(waveform * np.float32(PCM16_FULL_SCALE))
    return np.clip(scaled, -PCM16_FULL_SCALE, PCM16_FULL_SCALE - 1).astype("<i2")


def from_pcm16(samples: np.ndarray) -> np.ndarray:
    """int16 (samples,) -> float32 (samples,), full scale 1.0."""
    return np.multiply(samples, np.float32(1 / PCM16_FULL_SCALE), dtype=np.float32)


def encode(waveform: np.ndarray, sample_rate_hz: int, audio_format: str) -> bytes:
    """A mono waveform (samples,) as the bytes of a ``wav``, ``flac`` (both 16 bit) or ``mp3`` file.

    Equal input gives equal bytes. Raises ValueError for another format, or a rate that the format does not have.
    """
    if audio_format not in ENCODED_FORMATS:
        raise ValueError(f"audio_format must be one of {sorted(ENCODED_FORMATS)}; found {audio_format!r}")
    container, subtype = ENCODED_FORMATS[audio_format]
    content = waveform if audio_format == "mp3" else to_pcm16(waveform)
    settings = {"samplerate": sample_rate_hz, "format": container, "subtype": subtype, "channels": 1, "closefd": False}
    with _memory_file() as target:
        try:
            with soundfile.SoundFile(target.fileno(), "w", **settings) as file:
                file.write(content)
        except soundfile.SoundFileError as error:
            raise ValueError(f"cannot encode {audio_format} at {sample_rate_hz} Hz: {error}") from error
        target.seek(0)
        return target.readall()
