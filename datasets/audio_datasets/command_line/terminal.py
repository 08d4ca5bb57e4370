"""Standard output and standard error that never end a command: what cannot be shown is replaced, and what cannot be written is dropped.

Names of files and classes may hold control sequences, or bytes that are no text in the terminal's encoding. The reader of a pipe
may go away, as `head` does, a disk that holds a log may fill up, and a terminal may be closed, while a run has hours behind it.
"""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

CONTROL_CHARACTERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""All but tab and line feed."""
CURSOR_MOVES = re.compile(r"(?:\n|\x1b\[A)+")
"""What a progress bar writes to get to its line."""


def printable(text: str) -> str:
    """``text`` with control characters as escapes, such as ``\\x1b``. Tabs and line feeds stay, and so does what a progress bar writes."""
    if CURSOR_MOVES.fullmatch(text):
        return text
    inside = text.strip("\r")
    start = len(text) - len(text.lstrip("\r"))
    escaped = CONTROL_CHARACTERS.sub(lambda found: f"\\x{ord(found[0]):02x}", inside)
    return text[:start] + escaped + text[start + len(inside) :]


class SafeStream:
    """A text stream that replaces what cannot be shown and, once it cannot be written, drops everything. Otherwise like ``stream``."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self._stream = stream
        self._name = name
        self.is_gone = False
        """Whether the stream can no longer be written."""

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        shown = printable(text).encode(encoding, "backslashreplace").decode(encoding)
        if not self.is_gone:
            try:
                self._stream.write(shown)
            except (OSError, ValueError) as error:  # ValueError: closed
                self._lose(error)
        return len(text)

    def writelines(self, lines: list[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        if not self.is_gone:
            try:
                self._stream.flush()
            except (OSError, ValueError) as error:
                self._lose(error)

    def _lose(self, error: Exception) -> None:
        self.is_gone = True
        with suppress(OSError, ValueError, AttributeError):  # Python writes what is buffered once more when it ends
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())
        if not isinstance(error, BrokenPipeError) and sys.stderr is not self:
            reason = getattr(error, "strerror", None) or str(error)
            print(f"note: {self._name} cannot be written ({reason}); the command goes on without it", file=sys.stderr)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_gone(stream: object) -> bool:
    """Whether a stream of ``safe_output`` can no longer be written, for commands that have nothing left to do then."""
    return isinstance(stream, SafeStream) and stream.is_gone


@contextmanager
def safe_output() -> Iterator[None]:
    """Inside the context, standard output and standard error are such streams. A missing one leads nowhere."""
    _fill_closed_descriptors()
    before = sys.stdout, sys.stderr
    safe = [
        stream if isinstance(stream, SafeStream) else SafeStream(stream or _nowhere(), name)
        for stream, name in zip(before, ("standard output", "standard error"), strict=True)
    ]
    sys.stdout, sys.stderr = safe
    try:
        yield
    finally:
        for stream in safe:
            stream.flush()
        sys.stdout, sys.stderr = before


def _nowhere() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _fill_closed_descriptors() -> None:
    """Opens closed standard descriptors, so that no store gets their numbers: what libraries print would be written into it."""
    while True:
        descriptor = os.open(os.devnull, os.O_RDWR)
        if descriptor > 2:
            os.close(descriptor)
            return
