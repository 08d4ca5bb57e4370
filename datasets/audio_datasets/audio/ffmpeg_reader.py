"""Audio files read by FFmpeg, through PyAV: AAC and ALAC in M4A and MP4, WebM, WMA, and whatever libsndfile would cut short."""

import io
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from audio_datasets.audio.resampling import mix_to_mono

if TYPE_CHECKING:
    import av

TIMED_DEMUXERS = {"mov", "matroska", "asf", "wv", "tta", "ape", "caf", "flv", "avi"}
"""Formats whose header gives a duration. Of the others FFmpeg estimates it from the bit rate."""


class FFmpegReader:
    """A file that FFmpeg reads, from front to back and always to its end (see ``readers.AudioReader``).

    A packet that cannot be decoded is passed over and counted, as players do: the end of an interrupted download, say.
    """

    can_seek = False
    samples = None

    def __init__(
        self,
        data: bytes | Path,
        demuxer: str,
        declared_samples: int | None = None,
        data_size_at: int | None = None,
    ) -> None:
        """
        Args:
            demuxer: FFmpeg's name of the format. It is not left to guess: some of its formats open other files.
            declared_samples: how many samples the header says; None: as FFmpeg finds.
            data_size_at: where to show FFmpeg a data size of "not known" in place of the one that is there.

        Raises:
            ValueError: a file without audio, or that FFmpeg cannot decode.
        """
        import av  # takes longer to load than most commands need to start, and most files do without

        self._errors = av.FFmpegError
        file = _open_file(data)
        self._file: BinaryIO = file if data_size_at is None else _WithUnknownSize(file, data_size_at)
        self._damaged_packets = 0
        self._left = np.empty(0, np.float32)
        try:
            self._container = av.open(self._file, format=demuxer, metadata_errors="replace")
            self._tracks = len(self._container.streams.audio)
            if not self._tracks:
                raise ValueError(f"audio cannot be decoded: the file ({demuxer}) holds no sound track")
            stream = self._container.streams.audio[0]
            if stream.codec_context is None:
                raise ValueError(f"audio cannot be decoded: the file ({demuxer}) is damaged, or its codec is unknown")
            stream.codec_context.thread_count = 1  # clips are decoded side by side already
            if demuxer == "flac":  # whose checksums tell damage from sound
                stream.codec_context.options = {"err_detect": "crccheck+explode"}
            self.file_format, self.channels = demuxer.upper(), stream.channels or 1
            self._blocks = self._decoded(stream)
            first = next(self._blocks, None)
            if first is None:
                raise ValueError(f"audio cannot be decoded: none of it ({stream.codec_context.name} in {demuxer})")
            self._left = first
            self.declared_samples = declared_samples
            if declared_samples is None and demuxer in TIMED_DEMUXERS:
                self.declared_samples = _declared_samples(self._container, stream, self.sample_rate_hz)
        except av.FFmpegError as error:
            self._file.close()
            raise ValueError(f"audio cannot be decoded: {_plain(error)} ({demuxer})") from error
        except BaseException:
            self._file.close()
            raise

    def seek(self, sample: int) -> None:
        raise AssertionError("cannot seek")

    def read(self, count: int) -> np.ndarray:
        """float32 (at most count,)."""
        parts, missing = [], count
        while missing > 0:
            if len(self._left) == 0:
                block = next(self._blocks, None)
                if block is None:
                    break
                self._left = block
            parts.append(self._left[:missing])
            self._left = self._left[missing:]
            missing -= len(parts[-1])
        return np.concatenate(parts) if parts else np.empty(0, np.float32)

    def oddities(self) -> list[str]:
        found = []
        if self._damaged_packets:
            found.append(f"{self._damaged_packets} of its packets cannot be decoded")
        if self._tracks > 1:
            found.append(f"{self._tracks} sound tracks, of which the first is heard")
        return found

    def close(self) -> None:
        self._blocks.close()
        self._container.close()
        self._file.close()

    def _decoded(self, stream: "av.AudioStream") -> Iterator[np.ndarray]:
        """The samples, mixed to mono, in blocks as they come."""
        self.sample_rate_hz = 0
        with closing(self._container.demux(stream)) as packets:
            while True:
                try:
                    packet = next(packets)
                except StopIteration:
                    return
                except self._errors:  # in the middle of what the file promises
                    self._damaged_packets += 1
                    return
                try:
                    frames = packet.decode()
                except self._errors:
                    self._damaged_packets += 1
                    continue
                for frame in frames:
                    if not self.sample_rate_hz:
                        self.sample_rate_hz = frame.sample_rate
                    if frame.sample_rate != self.sample_rate_hz:
                        raise ValueError(
                            f"audio changes its sample rate from {self.sample_rate_hz} to {frame.sample_rate} Hz in the middle"
                        )
                    if frame.samples:
                        yield mix_to_mono(_samples_of(frame))


def _open_file(data: bytes | Path) -> BinaryIO:
    return io.BytesIO(data) if isinstance(data, bytes) else open(data, "rb")


def _samples_of(frame: "av.AudioFrame") -> np.ndarray:
    """float32 (samples, channels), full scale 1.0."""
    values = frame.to_ndarray()
    values = values.T if frame.format.is_planar else values.reshape(frame.samples, -1)
    if values.dtype == np.uint8:
        return (values.astype(np.float32) - 128) / 128
    if values.dtype.kind == "i":
        return (values * (1.0 / -float(np.iinfo(values.dtype).min))).astype(np.float32)
    return values.astype(np.float32)


def _declared_samples(container: "av.container.InputContainer", stream: "av.AudioStream", rate: int) -> int | None:
    """By the header: of the sound track, or of the whole file."""
    if stream.duration is not None:
        return round(stream.duration * stream.time_base * rate)
    return None if container.duration is None else round(container.duration * rate / 1_000_000)


def _plain(error: Exception) -> str:
    """FFmpeg's own words, without the number and the function."""
    return getattr(error, "strerror", None) or str(error)


class _WithUnknownSize(io.RawIOBase):
    """A WAV file in which the size of the samples says "not known", so that FFmpeg reads to the end."""

    def __init__(self, file: BinaryIO, size_at: int) -> None:
        self._wrapped, self._span = file, range(size_at, size_at + 4)

    def read(self, size: int = -1) -> bytes:
        begin = self._wrapped.tell()
        content = self._wrapped.read(size)
        if begin < self._span.stop and begin + len(content) > self._span.start:
            shown = bytearray(content)
            for place in self._span:
                if 0 <= place - begin < len(shown):
                    shown[place - begin] = 0xFF
            return bytes(shown)
        return content

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._wrapped.seek(offset, whence)

    def tell(self) -> int:
        return self._wrapped.tell()

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._wrapped.close()
        super().close()
