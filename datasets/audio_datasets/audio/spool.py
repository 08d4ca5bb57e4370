"""Audio that waits to be written into a store: in memory as long as there is little of it, and beyond that on the disk."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

IN_MEMORY_BYTES = 64 * 2**20
BYTES_AT_ONCE = 16 * 2**20


@dataclass(frozen=True)
class FilePart:
    """A clip's stored audio as a part of an open file."""

    file: BinaryIO
    offset: int
    size: int
    """In bytes."""

    def pieces(self, dtype: np.dtype) -> Iterator[np.ndarray]:
        """The content, (any,) at a time. OSError where the file ends too early."""
        position, end = self.offset, self.offset + self.size
        while position < end:
            self.file.seek(position)
            piece = self.file.read(min(BYTES_AT_ONCE, end - position))
            if not piece:
                raise OSError("a temporary file was cut off")
            position += len(piece)
            yield np.frombuffer(piece, dtype)


class Spool:
    """Keeps the audio of several clips until they are written. The file has no name, so a killed process leaves nothing."""

    def __init__(self, folder: Path) -> None:
        """``folder`` is where the file lies: on the disk that the store goes to."""
        self._folder = folder
        self._file: BinaryIO | None = None
        self._in_memory = 0

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets what it kept. It can be used again."""
        if self._file is not None:
            self._file.close()
        self._file, self._in_memory = None, 0

    def keep(self, audio: bytes | np.ndarray) -> bytes | np.ndarray | FilePart:
        """The audio itself while there is room in memory, else its part of the file."""
        size = len(audio) if isinstance(audio, bytes) else audio.nbytes
        if self._in_memory + size <= IN_MEMORY_BYTES:
            self._in_memory += size
            return audio
        return self.keep_pieces([audio])

    def keep_pieces(self, pieces: Iterable[bytes | np.ndarray]) -> FilePart:
        """One clip's audio that comes in pieces, in the file."""
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closed by __exit__)
        start = self._file.seek(0, 2)
        for piece in pieces:
            self._file.write(piece if isinstance(piece, bytes) else np.ascontiguousarray(piece).view(np.uint8))
        return FilePart(self._file, start, self._file.tell() - start)
