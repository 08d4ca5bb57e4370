"""PCM as it comes through a pipe: its format, given or from a WAV header, and its bytes as mono samples."""

import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from audio_datasets.audio.codec import LOUDEST
from audio_datasets.audio.readers import FASTEST_HZ, SLOWEST_HZ
from audio_datasets.audio.resampling import mix_to_mono
from audio_datasets.system.messages import brief

SampleType = Literal["s16", "s24", "s32", "f32", "f64", "u8"]
"""Signed or unsigned whole numbers, or floating point, and their bits; little-endian."""
MOST_CHANNELS = 256
READ_BYTES = 2**16
LARGEST_CHUNK = 2**20
"""The largest part of a WAV header that is read over."""
UNKNOWN_SIZE = 0x7FFFF000
"""Sizes from here on, and 0, are what programs write that do not know how long they will go on."""
WAV_INTEGER, WAV_FLOAT, WAV_EXTENSIBLE = 1, 3, 0xFFFE
WAV_TYPES: dict[tuple[int, int], SampleType] = {
    (WAV_INTEGER, 8): "u8",
    (WAV_INTEGER, 16): "s16",
    (WAV_INTEGER, 24): "s24",
    (WAV_INTEGER, 32): "s32",
    (WAV_FLOAT, 32): "f32",
    (WAV_FLOAT, 64): "f64",
}

Read = Callable[[int], bytes]
"""Gives at most so many bytes, and none at the end."""


@dataclass(frozen=True)
class PcmFormat:
    """What bytes of PCM mean. Raises ValueError for what cannot be."""

    sample_rate_hz: int
    channels: int = 1
    sample_type: SampleType = "s16"

    def __post_init__(self) -> None:
        if not SLOWEST_HZ <= self.sample_rate_hz <= FASTEST_HZ:
            raise ValueError(
                f"a sample rate lies between {SLOWEST_HZ} and {FASTEST_HZ} Hz; found {self.sample_rate_hz}"
            )
        if not 1 <= self.channels <= MOST_CHANNELS:
            raise ValueError(f"PCM has 1 to {MOST_CHANNELS} channels; found {self.channels}")
        if self.sample_type not in get_args(SampleType):
            raise ValueError(f"a sample type is one of {', '.join(get_args(SampleType))}; found {self.sample_type!r}")

    @property
    def frame_bytes(self) -> int:
        """Of one sample of every channel."""
        return self.channels * int(self.sample_type[1:]) // 8

    def mono(self, frames: bytes) -> np.ndarray:
        """Whole frames -> float32 (samples,), full scale 1.0: the mean of the channels."""
        kind, bits = self.sample_type[0], int(self.sample_type[1:])
        if self.sample_type == "s24":  # as the upper three bytes of four
            padded = np.zeros((len(frames) // 3, 4), np.uint8)
            padded[:, 1:] = np.frombuffer(frames, np.uint8).reshape(-1, 3)
            values, bits = padded.view("<i4")[:, 0], 32
        else:
            values = np.frombuffer(frames, f"<{ {'s': 'i', 'f': 'f', 'u': 'u'}[kind] }{bits // 8}")
        if kind == "f":
            samples = values.astype(np.float32)
        elif kind == "u":
            samples = (values.astype(np.float32) - 128) / 128
        else:
            samples = values.astype(np.float32) * np.float32(2.0 ** (1 - bits))
        return mix_to_mono(samples.reshape(-1, self.channels))


class PcmStream:
    """Bytes of PCM, with or without a WAV header, as mono samples.

    Memory does not grow with time. What is odd at the end is told by ``remarks``.
    """

    def __init__(self, read: Read, given: PcmFormat | None = None) -> None:
        """
        Args:
            given: the format of raw PCM; None for a stream that begins with a WAV header.

        Raises:
            ValueError: no WAV header where there should be one, one that cannot be used, or one where raw PCM was announced.
        """
        self._read, self._ahead = read, b""
        self._left: int | None = None
        """Bytes of samples that are still to come; None if that is not known."""
        self._unusable = self._cut = self._missing = self._after = 0
        start = self._exactly(12)
        is_wav = start[:4] in (b"RIFF", b"RF64", b"BW64") and start[8:] == b"WAVE"
        if given is not None:
            if is_wav:
                raise ValueError(
                    "the stream begins with a WAV header, which tells its format; leave rate, channels and type out"
                )
            self.format, self._ahead = given, start
        elif is_wav:
            self.format = self._wav_format(start[:4] != b"RIFF")
        else:
            found = f"begins with {brief(start)}" if start else "is empty"
            raise ValueError(f"the stream {found}, which is no WAV header; give --sample-rate-hz of raw PCM")

    @property
    def sample_rate_hz(self) -> int:
        return self.format.sample_rate_hz

    def chunks(self) -> Iterator[np.ndarray]:
        """Mono samples, float32 (any,), as they arrive. Samples that are not finite are replaced with silence and counted."""
        rest, size = b"", self.format.frame_bytes
        while self._left is None or self._left > 0:
            data = self._next(READ_BYTES if self._left is None else min(READ_BYTES, self._left))
            if not data:
                break
            if self._left is not None:
                self._left -= len(data)
            rest += data
            whole = len(rest) // size * size
            if whole:
                with np.errstate(over="ignore", invalid="ignore"):
                    samples = self.format.mono(rest[:whole])
                rest = rest[whole:]
                usable = np.abs(samples) <= LOUDEST  # also False for NaN
                self._unusable += int((~usable).sum())
                yield np.where(usable, samples, np.float32(0))
        self._cut, self._missing = len(rest), self._left or 0
        while self._left == 0 and (data := self._next(READ_BYTES)):
            self._after += len(data)

    def remarks(self) -> list[str]:
        """What is to be said of the stream after its end."""
        size, found = self.format.frame_bytes, []
        if self._cut:
            found.append(f"the stream ends in the middle of a sample: {self._cut} of {size} bytes are left out")
        if self._missing:
            seconds = self._missing / size / self.sample_rate_hz
            found.append(f"the stream ends {seconds:.2f} s before the end that its header tells")
        if self._after:
            found.append(f"{self._after:,} bytes after the samples are left out (further parts of the WAV file)")
        if self._unusable:
            found.append(f"{self._unusable:,} samples were NaN, infinite or absurdly large; silence took their place")
        return found

    def _wav_format(self, has_long_sizes: bool) -> PcmFormat:
        """Reads the header up to the first sample."""
        form = long_size = None
        while True:
            name, size = self._chunk_head()
            if name == b"data":
                break
            if size > LARGEST_CHUNK:
                raise ValueError(f"the WAV header has a part {brief(name)} of {size:,} bytes, which cannot be")
            content = self._exactly(size + size % 2)
            if len(content) < size:
                raise ValueError("the stream ends within its WAV header")
            if name == b"fmt ":
                form = _format_of(content)
            elif name == b"ds64" and has_long_sizes and len(content) >= 16:
                long_size = struct.unpack_from("<Q", content, 8)[0]
        if form is None:
            raise ValueError("the WAV header does not tell its format before the samples")
        if long_size is not None and size == 0xFFFFFFFF:
            size = long_size
        elif size == 0 or size >= UNKNOWN_SIZE:
            return form
        self._left = size
        return form

    def _chunk_head(self) -> tuple[bytes, int]:
        head = self._exactly(8)
        if len(head) < 8:
            raise ValueError("the stream ends within its WAV header")
        return head[:4], struct.unpack("<I", head[4:])[0]

    def _exactly(self, count: int) -> bytes:
        """So many bytes, or fewer at the end."""
        found = b""
        while len(found) < count and (data := self._next(count - len(found))):
            found += data
        return found

    def _next(self, count: int) -> bytes:
        if self._ahead:
            found, self._ahead = self._ahead[:count], self._ahead[count:]
            return found
        return self._read(count)


def _format_of(content: bytes) -> PcmFormat:
    """The format in a WAV file's ``fmt`` part."""
    if len(content) < 16:
        raise ValueError("the WAV header is damaged: its format is too short")
    codec, channels, rate, _, block, bits = struct.unpack_from("<HHIIHH", content)
    if codec == WAV_EXTENSIBLE and len(content) >= 26:
        codec = struct.unpack_from("<H", content, 24)[0]
    if (codec, bits) not in WAV_TYPES:
        raise ValueError(
            f"the WAV stream has codec {codec:#x} with {bits} bits; a stream is PCM of 8, 16, 24 or 32 bits, or "
            "floating point of 32 or 64"
        )
    found = PcmFormat(rate, channels, WAV_TYPES[codec, bits])
    if block != found.frame_bytes:
        raise ValueError(f"the WAV header is damaged: {block} bytes a frame for {channels} channels of {bits} bits")
    return found
