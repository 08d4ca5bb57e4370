"""Audio bytes to mono waveforms and back: decoding, cutting, encoding.

Waveforms are float32 NumPy arrays of shape (samples,), full scale 1.0. ``readers`` opens the files.
"""

import math
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from audio_datasets.audio.readers import AudioReader, memory_file, open_audio
from audio_datasets.audio.resampling import resample, span_to_read

LIBSNDFILE_VERSION: str = soundfile.__libsndfile_version__
PCM16_FULL_SCALE = 32768
CLIPPED = 1 - 1.5 / PCM16_FULL_SCALE  # the largest 16-bit values, of either sign
EMPTY = "audio is empty: it has a header and no samples"
# Suffixes of files that can be expected to be read. A list of files may name others as well.
_BY_LIBSNDFILE = "wav wave w64 rf64 flac ogg oga opus mp3 mp2 aif aiff aifc au snd caf voc sph nist sf paf"
_BY_FFMPEG = "m4a m4b mp4 m4v mov 3gp 3g2 aac webm weba mkv mka wma asf wmv amr ac3 wv tta ape mpc flv avi"
AUDIO_SUFFIXES = frozenset(f".{name}" for name in f"{_BY_LIBSNDFILE} {_BY_FFMPEG}".split())
ENCODED_FORMATS = {"mp3": ("MP3", "MPEG_LAYER_III"), "flac": ("FLAC", "PCM_16"), "wav": ("WAV", "PCM_16")}

MOST_SAMPLES = 2**27
"""Samples that are decoded in one piece: 512 MiB as float32, or 46 minutes at 48 kHz."""
LOUDEST = 2.0**16
"""Times full scale. Files of floating-point samples may go beyond 1, by a factor of 32,768 if they hold unscaled integers."""
BLOCK_SAMPLES = 2**20  # over all channels; what is decoded at a time
LENGTH_TOLERANCE_SECONDS = 0.25
"""Largest error of a header that is not reported: encoders pad a clip to whole frames, and start with some silence."""


@dataclass(frozen=True)
class AudioInfo:
    """Format of an audio file and the number of samples that decode. Headers of damaged files may promise more or fewer."""

    sample_rate_hz: int
    channels: int
    samples: int
    file_format: str
    oddities: tuple[str, ...] = ()
    """Oddities of the file, such as a header with the wrong length."""
    is_counted: bool = False
    """Whether the whole file had to be decoded to find out its length."""

    @property
    def duration_seconds(self) -> float:
        return self.samples / self.sample_rate_hz


def audio_info(data: bytes | Path) -> AudioInfo:
    """Rate, channels and length of an encoded clip (bytes or a file); decoded only where the header cannot be relied on.

    Raises ValueError for audio that cannot be read; OSError for a file that cannot be opened.
    """
    with closing(open_audio(data)) as reader:
        samples = reader.samples
        if samples is None:
            samples = sum(map(len, mono_blocks(reader, 0, None)))
        return _info(reader, samples)


def _info(reader: AudioReader, samples: int) -> AudioInfo:
    """For a reader at the end of its file, or one that knows how many samples decode."""
    oddities = reader.oddities()
    if reader.declared_samples is not None:
        declared, there = reader.declared_samples / reader.sample_rate_hz, samples / reader.sample_rate_hz
        if abs(declared - there) > LENGTH_TOLERANCE_SECONDS:
            oddities.insert(0, f"its header says {declared:.1f} s, but it holds {there:.1f} s")
    about = (reader.sample_rate_hz, reader.channels, samples, reader.file_format)
    return AudioInfo(*about, tuple(oddities), is_counted=reader.samples is None)


def decode(
    data: bytes | Path, sample_rate_hz: int | None = None, start_seconds: float = 0.0, seconds: float | None = None
) -> np.ndarray:
    """A clip as a mono waveform, float32 (samples,): channels averaged, resampled with a low-pass filter.

    ``data`` is the encoded file's content, or a path, in any format that libsndfile or FFmpeg reads. ``sample_rate_hz`` None
    keeps the clip's own rate. With ``start_seconds`` and ``seconds`` only that part is returned (and, as far as the format
    allows, only that part is decoded); it is shorter than ``seconds`` where the clip ends earlier.

    Raises ValueError for audio that is empty, cannot be decoded, holds NaN or infinite samples, or is longer than
    ``MOST_SAMPLES``; OSError for a file that cannot be opened.
    """
    with closing(ClipParts(data, sample_rate_hz)) as parts:
        return parts.part(start_seconds, seconds)


class ClipParts:
    """Parts of one encoded clip, each as ``decode`` gives it.

    The file stays open. Where the format cannot seek, decoding goes on from the last part: all parts of a clip, asked for in
    the order of their starts, take one pass over it. In any other order, reading starts again from the beginning.
    """

    def __init__(self, data: bytes | Path, sample_rate_hz: int | None = None) -> None:
        """``sample_rate_hz`` None keeps the clip's own rate. Raises as ``decode`` does."""
        self._data = data
        self._reader = open_audio(data)
        self._to_hz = sample_rate_hz or self._reader.sample_rate_hz
        self._position = 0  # where the reader stands
        self._kept = np.empty(0, np.float32)  # the last samples before that

    def part(self, start_seconds: float = 0.0, seconds: float | None = None) -> np.ndarray:
        """float32 (samples,), shorter than ``seconds`` where the clip ends earlier."""
        from_hz, to_hz = self._reader.sample_rate_hz, self._to_hz
        span = span_to_read(start_seconds, seconds, from_hz, to_hz)
        waveform = self._read(span.first, span.count)
        if len(waveform) == 0 and span.first == 0 and span.count != 0:
            raise ValueError(EMPTY)
        return span.cut(resample(waveform, from_hz, to_hz))

    def _read(self, first: int, count: int | None) -> np.ndarray:
        reader = self._reader
        if reader.can_seek:
            return self._joined(mono_blocks(reader, first, count), [])
        if first < self._position - len(self._kept):
            reader.close()
            self._reader = reader = open_audio(self._data)
            self._position, self._kept = 0, np.empty(0, np.float32)
        kept = (
            self._kept[len(self._kept) - max(0, self._position - first) :] if first < self._position else self._kept[:0]
        )
        missing = None if count is None else max(0, count - len(kept))
        skipped = max(0, first - self._position)
        waveform = self._joined(mono_blocks(reader, skipped, missing), [kept] if len(kept) else [])
        self._kept, self._position = waveform, max(self._position, first + len(waveform))
        return waveform if count is None else waveform[:count]

    def _joined(self, blocks: Iterator[np.ndarray], parts: list[np.ndarray]) -> np.ndarray:
        from_hz = self._reader.sample_rate_hz
        samples = sum(map(len, parts))
        for block in blocks:
            samples += len(block)
            if max(samples, samples * self._to_hz // from_hz) > MOST_SAMPLES:
                raise ValueError(_too_long(samples, from_hz))
            parts.append(block)
        return parts[0] if len(parts) == 1 else np.concatenate([np.empty(0, np.float32), *parts])

    def close(self) -> None:
        self._reader.close()


class OpenClip:
    """Keeps the most recently read clip open, so that reading its windows in order takes a single pass.

    Of one process: neither pickled nor taken over by a fork, which would share the file's position.
    """

    def __init__(self) -> None:
        self._parts: ClipParts | None = None
        self._key: tuple[object, ...] = ()

    def part(
        self,
        key: object,
        open_data: Callable[[], bytes | Path],
        sample_rate_hz: int,
        start_seconds: float,
        seconds: float,
    ) -> np.ndarray:
        """A part of the clip that ``open_data`` gives, as ``decode`` returns it. ``key`` tells clips apart."""
        key = (os.getpid(), key, sample_rate_hz)
        if self._parts is None or self._key != key:
            self.close()
            self._parts, self._key = ClipParts(open_data(), sample_rate_hz), key
        try:
            return self._parts.part(start_seconds, seconds)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._parts is not None and self._key[0] == os.getpid():
            self._parts.close()
        self._parts = None

    def __getstate__(self) -> dict:
        return {}

    def __setstate__(self, state: dict) -> None:
        self.__init__()


@dataclass(frozen=True)
class AudioCheck:
    """Findings of decoding a clip from beginning to end."""

    info: AudioInfo
    peak: float
    """Largest magnitude of a sample after mixing to mono."""
    clipped_share: float
    """Share of the samples that lie at full scale or beyond."""


def check_audio(data: bytes | Path, hear: Callable[[np.ndarray, int], None] | None = None) -> AudioCheck:
    """Decodes a clip of any length, in memory that does not grow with it.

    ``hear`` is called with each block of samples, float32 (any,), and the clip's rate in Hz.

    Raises ValueError and OSError as ``decode`` does, but for the clip's length.
    """
    with closing(open_audio(data)) as reader:
        blocks = mono_blocks(reader, 0, None)
        return _check(reader, blocks if hear is None else _heard(blocks, reader.sample_rate_hz, hear))


def _heard(
    blocks: Iterable[np.ndarray], sample_rate_hz: int, hear: Callable[[np.ndarray, int], None]
) -> Iterator[np.ndarray]:
    for block in blocks:
        hear(block, sample_rate_hz)
        yield block


def _check(reader: AudioReader, blocks: Iterable[np.ndarray]) -> AudioCheck:
    """What is found in a clip's samples, in blocks none of which is empty."""
    samples, clipped, peak = 0, 0, 0.0
    for block in blocks:
        magnitude = np.abs(block)
        samples += len(block)
        clipped += int((magnitude >= CLIPPED).sum())
        peak = max(peak, float(magnitude.max()))
    if samples == 0:
        raise ValueError(EMPTY)
    return AudioCheck(_info(reader, samples), peak, clipped / samples)


def mono_blocks(reader: AudioReader, first: int, count: int | None) -> Iterator[np.ndarray]:
    """The samples from ``first`` on, at most ``count``: float32 (at most ``BLOCK_SAMPLES``,), none empty.

    ``first`` counts from where the reader stands if it cannot seek, and from the beginning of the clip if it can.

    Raises ValueError for what cannot be decoded, and for samples that are not finite or absurdly large.
    """
    block_samples = max(1, BLOCK_SAMPLES // reader.channels)
    if reader.can_seek:
        reader.seek(first)
    else:
        while first > 0 and (skipped := len(reader.read(min(first, block_samples)))):
            first -= skipped
    while count is None or count > 0:
        block = reader.read(block_samples if count is None else min(count, block_samples))
        if len(block) == 0:
            return
        count = None if count is None else count - len(block)
        loudest = float(np.abs(block).max())
        if not math.isfinite(loudest):
            raise ValueError("audio holds NaN or infinite samples")
        if loudest > LOUDEST:
            raise ValueError(f"audio holds samples of {loudest:.3g} times full scale; up to {LOUDEST:.0f} are allowed")
        yield block


def _too_long(samples: int, rate_hz: int) -> str:
    return (
        f"audio is too long to be decoded in one piece: more than {samples / rate_hz:.0f} s at {rate_hz} Hz "
        f"(at most {MOST_SAMPLES} samples); cut it into shorter clips"
    )


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
    content = waveform if audio_format == "mp3" else to_pcm16(waveform)
    with memory_file() as target:
        try:
            with encoder(target, sample_rate_hz, audio_format) as file:
                file.write(content)
        except soundfile.SoundFileError as error:
            raise ValueError(f"cannot encode {audio_format} at {sample_rate_hz} Hz: {error}") from error
        target.seek(0)
        return target.readall()


def encoder(target: BinaryIO, sample_rate_hz: int, audio_format: str) -> soundfile.SoundFile:
    """A file open for writing a ``wav``, ``flac`` or ``mp3`` at once or in pieces. ValueError for another format."""
    if audio_format not in ENCODED_FORMATS:
        raise ValueError(f"audio_format must be one of {sorted(ENCODED_FORMATS)}; found {audio_format!r}")
    container, subtype = ENCODED_FORMATS[audio_format]
    settings = {"samplerate": sample_rate_hz, "format": container, "subtype": subtype, "channels": 1, "closefd": False}
    return soundfile.SoundFile(target.fileno(), "w", **settings)
