"""Audio files opened for reading from front to back, by libsndfile or by FFmpeg, as mono samples.

libsndfile reads what it knows and can be believed on; FFmpeg (through PyAV) reads what phones record and files whose header is
wrong, and always to the end.

Shapes: n samples asked for.
"""

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile

from audio_datasets.audio.containers import Content, Findings, demuxer_of, examine
from audio_datasets.audio.ffmpeg_reader import FFmpegReader
from audio_datasets.audio.resampling import mix_to_mono
from audio_datasets.system.paths.inputs import open_regular, require_regular
from audio_datasets.system.paths.sizes import require_room

# What an audio file may be. Beyond it a header is damaged: a wrong rate of 1 Hz, say, makes 32,000 samples of each.
SLOWEST_HZ, FASTEST_HZ = 1_000, 1_000_000
SYSTEM_ERROR, MALFORMED = 2, 3
"""libsndfile's error codes for a file that the system does not let it read, and for a damaged file of a format that it knows."""

SEEKABLE_FORMATS = {"WAV", "WAVEX", "RF64", "W64", "FLAC", "AIFF", "AU", "CAF"}
SEEKABLE_ENCODINGS = {"PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"}
"""In which a seek lands on the exact sample and decodes the same values as a read from the start. After a seek the frames of MP3
and Vorbis overlap others that were never decoded; GSM and the telephone ADPCMs cannot seek at all."""


READ_IN_PLACES = {"wav", "flac", "aiff", "au", "caf", None}
"""FFmpeg's names of formats of which only the header and the part asked for are looked at. Others are gone through, holes and all."""


class AudioReader(Protocol):
    """An open audio file."""

    sample_rate_hz: int
    channels: int
    file_format: str
    samples: int | None
    """How many samples decode; None where only decoding tells."""
    declared_samples: int | None
    """How many the header says, where that may be wrong."""
    can_seek: bool

    def seek(self, sample: int) -> None: ...  # only if can_seek
    def read(self, count: int) -> np.ndarray: ...  # float32 (n,), shorter only at the end; ValueError
    def oddities(self) -> list[str]: ...  # what is odd besides its length, as far as it was read
    def close(self) -> None: ...


def open_audio(data: bytes | Path) -> AudioReader:
    """Opens an encoded clip, given by its bytes or as a file.

    Raises:
        ValueError: audio that is empty, in no known format, or of an absurd sample rate; a sparse file that would have to be gone through.
        OSError: a file that cannot be opened.
    """
    if isinstance(data, Path):
        require_regular(data)
    if not (len(data) if isinstance(data, bytes) else data.stat().st_size):
        raise ValueError("audio is empty: 0 bytes")
    with _content_of(data) as content:
        demuxer = demuxer_of(content)
        if isinstance(data, Path) and demuxer not in READ_IN_PLACES:
            require_room(data, len(content), "its audio")
        findings = examine(content)
    if findings.believed:
        reader = _open_believed(data, demuxer, findings)
    else:
        reader = _open_with_ffmpeg(data, demuxer, findings)
    if not SLOWEST_HZ <= reader.sample_rate_hz <= FASTEST_HZ:
        reader.close()
        raise ValueError(
            f"audio has a sample rate of {reader.sample_rate_hz} Hz; {SLOWEST_HZ} to {FASTEST_HZ} Hz are allowed"
        )
    return reader


def _open_believed(data: bytes | Path, demuxer: str | None, findings: Findings) -> AudioReader:
    """By libsndfile or, if it does not know the format or what is in it, by FFmpeg."""
    try:
        return SoundfileReader(data, findings)
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        if error.code == SYSTEM_ERROR and isinstance(data, Path):
            raise OSError(errno.EIO, "the system could not open or read it", str(data)) from error
        if demuxer not in (None, "flac") and error.code != MALFORMED:
            try:
                return _open_with_ffmpeg(data, demuxer, findings)
            except ValueError as of_ffmpeg:
                reason = f"{reason} FFmpeg: {of_ffmpeg}"
        kind = f" ({data.suffix or 'without a suffix'})" if isinstance(data, Path) else ""
        raise ValueError(f"audio is in no format that can be read, or damaged{kind}: {reason}") from error


def _open_with_ffmpeg(data: bytes | Path, demuxer: str, findings: Findings) -> AudioReader:
    declared, size_at = findings.declared_samples, findings.data_size_at
    return FFmpegReader(data, demuxer, declared_samples=declared, data_size_at=size_at)


@contextmanager
def _content_of(data: bytes | Path) -> Iterator[Content]:
    """The bytes of a clip; those of a file are mapped, and only those looked at are read."""
    if isinstance(data, bytes):
        yield data
        return
    with open_regular(data) as file, mmap(file.fileno(), 0, access=ACCESS_READ) as content:
        yield content


class SoundfileReader:
    """A file that libsndfile reads."""

    def __init__(self, data: bytes | Path, findings: Findings) -> None:
        """Raises soundfile.LibsndfileError for what it does not read."""
        self._data = data
        self._file = _SequentialFile(_in_memory(data) if isinstance(data, bytes) else str(data))
        self._position = 0
        self._successor: FFmpegReader | None = None
        self.sample_rate_hz, self.channels = self._file.samplerate, self._file.channels
        self.file_format = self._file.format
        # Of MPEG audio the number of samples is an estimate, unless the header counts its frames and is right.
        is_estimate = "MPEG" in self._file.subtype and not (self.file_format == "MP3" and findings.declared_samples)
        is_exact = findings.exact and not is_estimate
        self.samples = self._file.frames if is_exact else None
        self.declared_samples = findings.declared_samples
        is_plain = self.file_format == "FLAC" or self._file.subtype in SEEKABLE_ENCODINGS
        self.can_seek = is_plain and self.file_format in SEEKABLE_FORMATS

    def seek(self, sample: int) -> None:
        try:
            self._file.seek(min(sample, self._file.frames))
        except soundfile.SoundFileError as error:
            raise ValueError(f"audio cannot be decoded: {error}") from error

    def read(self, count: int) -> np.ndarray:
        if self._successor is not None:
            return self._successor.read(count)
        try:
            block = mix_to_mono(self._file.read(count, "float32", always_2d=True))
        except soundfile.SoundFileError as error:
            raise ValueError(f"audio cannot be decoded: {error}") from error
        self._position += len(block)
        if len(block) < count and self.file_format == "MP3" and self.samples and self._position < self.samples:
            # The decoder gives up at a damaged frame. FFmpeg passes over it.
            self._successor = FFmpegReader(self._data, "mp3", self.declared_samples)
            self._successor.read(self._position)
            block = np.concatenate([block, self._successor.read(count - len(block))])
        return block

    def oddities(self) -> list[str]:
        return [] if self._successor is None else self._successor.oddities()

    def close(self) -> None:
        self._file.close()
        if self._successor is not None:
            self._successor.close()


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


def memory_file() -> BinaryIO:
    """A file that lies in memory (where the system has none, on disk) and has a descriptor, for libsndfile to work on.

    Not io.BytesIO: libsndfile would call back into Python for it, where exceptions cannot get out. A signal's or Ctrl-C's
    would be lost, and what is read or written silently cut short.
    """
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("audio"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)


def _in_memory(data: bytes) -> BinaryIO:
    source = memory_file()
    left = memoryview(data)
    while left:
        left = left[source.write(left) :]
    source.seek(0)
    return source
