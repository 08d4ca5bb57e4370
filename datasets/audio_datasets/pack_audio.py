"""What `kd pack` stores of one clip: its file as it is, or converted. Memory does not grow with the length of a clip."""

import errno
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
import soundfile

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.resampling import StreamResampler, resample
from audio_datasets.audio.spool import BYTES_AT_ONCE, FilePart, Spool
from audio_datasets.system.disk_space import readable_bytes
from audio_datasets.system.paths.inputs import open_regular, read_regular

LARGEST_FILE_BYTES = 2**30  # hours of compressed audio, or 93 minutes of 16-bit stereo at 48 kHz
WHOLE_FILE_BYTES = 32 * 2**20
"""Larger files are copied to the disk of the store first, and read from there; smaller ones are read into memory."""
WHOLE_SAMPLES = 2**24
"""Longer clips (6 minutes at 48 kHz) are converted block by block."""
BLOCK_SECONDS = 10.0
# Encoders pad a clip to whole frames, and tools cut at key frames: this much is no sign of another clip.
LONGER_SECONDS = 2.0


def stored_audio(
    source: Path | bytes, kind: str, sample_rate_hz: int, listed_seconds: float | None, spool: Spool, folder: Path
) -> tuple[bytes | np.ndarray | FilePart, audio_codec.AudioCheck]:
    """One clip's audio as it will be stored, and what the file was. The whole file is decoded, also if it is kept.

    Args:
        kind: ``keep``, ``pcm16`` or a format of ``codec.ENCODED_FORMATS``.
        folder: for temporary files, on the disk of the store.

    Raises:
        ValueError, OSError: a file that is broken, empty, too large, not there, or much longer than its source says.
    """
    with _read(source, folder) as (data, copy):
        converter = None if kind == "keep" else Converter(sample_rate_hz, kind, folder)
        check = audio_codec.check_audio(data, None if converter is None else converter.hear)
        seconds = check.info.duration_seconds
        if listed_seconds is not None and seconds > listed_seconds + LONGER_SECONDS:
            raise ValueError(f"{seconds:.1f} s long, listed as {listed_seconds:.1f} s: it was not cut to its segment")
        if converter is not None:
            return converter.finish(spool), check
        return spool.keep(data) if copy is None else spool.keep_pieces(_pieces(copy)), check


@contextmanager
def _read(source: Path | bytes, folder: Path) -> Iterator[tuple[bytes | Path, BinaryIO | None]]:
    """The content to decode, and the open copy of a large file. A copy cannot change between decoding and storing it."""
    size = source.stat().st_size if isinstance(source, Path) else len(source)
    if size > LARGEST_FILE_BYTES:
        raise ValueError(f"{readable_bytes(size)}: a clip may have {readable_bytes(LARGEST_FILE_BYTES)}; cut it first")
    if isinstance(source, bytes) or size <= WHOLE_FILE_BYTES:
        yield source if isinstance(source, bytes) else read_regular(source), None
        return
    with open_regular(source) as original, tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".0.tmp") as copy:
        shutil.copyfileobj(original, copy, BYTES_AT_ONCE)
        copy.flush()
        yield Path(copy.name), copy


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    file.seek(0)
    while piece := file.read(BYTES_AT_ONCE):
        yield piece


class Converter:
    """Converts a clip, of any length, that is decoded block by block."""

    def __init__(self, sample_rate_hz: int, kind: str, folder: Path) -> None:
        """``kind`` is ``pcm16``, or a format of ``codec.ENCODED_FORMATS``; ``folder`` is for temporary files."""
        self._to_hz, self._kind, self._folder = sample_rate_hz, kind, folder
        self._blocks: list[np.ndarray] = []
        self._samples = self._from_hz = 0
        self._resampler: StreamResampler | None = None
        self._file: BinaryIO | None = None
        self._encoder: soundfile.SoundFile | None = None

    def hear(self, block: np.ndarray, from_hz: int) -> None:
        """The next samples, float32 (any,)."""
        self._from_hz = from_hz
        if self._resampler is not None:
            self._write(self._resampler.feed(block))
            return
        self._blocks.append(block)
        self._samples += len(block)
        if self._samples > WHOLE_SAMPLES:
            self._resampler = StreamResampler(from_hz, self._to_hz, BLOCK_SECONDS)
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by finish)
            if self._kind != "pcm16":
                self._encoder = audio_codec.encoder(self._file, self._to_hz, self._kind)
            for earlier in self._blocks:
                self._write(self._resampler.feed(earlier))
            self._blocks = []

    def finish(self, spool: Spool) -> bytes | np.ndarray | FilePart:
        """What is stored of the clip."""
        if self._resampler is None:
            waveform = resample(np.concatenate(self._blocks), self._from_hz, self._to_hz)
            if self._kind == "pcm16":
                return spool.keep(audio_codec.to_pcm16(waveform))
            return spool.keep(audio_codec.encode(waveform, self._to_hz, self._kind))
        with self._file:
            self._write(self._resampler.finish())
            if self._encoder is not None:
                self._encoder.close()
            return spool.keep_pieces(_pieces(self._file))

    def _write(self, waveform: np.ndarray) -> None:
        if self._encoder is None:
            self._file.write(audio_codec.to_pcm16(waveform).view(np.uint8))
        else:
            try:
                self._encoder.write(waveform if self._kind == "mp3" else audio_codec.to_pcm16(waveform))
            except soundfile.SoundFileError as error:  # it was told what to write: only the disk can be the reason
                raise OSError(
                    errno.ENOSPC, f"a temporary file cannot be written: {error}", str(self._folder)
                ) from error
