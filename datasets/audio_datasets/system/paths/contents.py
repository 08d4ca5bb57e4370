"""What files hold when they are first read, so that a later change is noticed: while a command runs, and when it continues.

A file's content is known by a digest of its bytes. As long as its state is the same (device, inode, size, times of the last change),
the file is not read again to know its digest. The time of the last change of the inode (ctime) cannot be set by a program, unlike
the time in listings (mtime), which archives and ``cp -p`` bring along.

Shapes: n files.
"""

import hashlib
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np

from audio_datasets.system.files import digest_of, read_arrays, written_aside
from audio_datasets.system.paths.inputs import NotAFileError, open_regular

DIGEST_BYTES = 16
NO_STATE = (-1, -1, -1, -1, -1)
"""Of a file that could not be read."""
SETTLED_NS = 2_000_000_000
"""A file that was changed more recently than this may change again within the same tick of its file system's clock (up to 2 s), so
its state is not relied on later."""

LARGE_HOLES_BYTES = 2**30
"""Of a sparse file with larger holes, only what is on disk is read."""

State = tuple[int, int, int, int, int]


class ChangingFileError(ValueError):
    """A file to which somebody is writing."""


def state_of(status: os.stat_result) -> State:
    """Device, inode, bytes, and the times of the last change of content and of the inode, in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def is_settled(state: State, path: Path) -> bool:
    """Whether the same state will mean the same content later.

    That is not so for a file that has just been changed, or on a file system that is mounted read-only, whose times may all be the
    same: another image with the same times could be mounted in its place.
    """
    return state[4] < time.time_ns() - SETTLED_NS and not os.statvfs(path).f_flag & os.ST_RDONLY


def content_of(path: Path) -> tuple[State, bytes, bool]:
    """State and digest (BLAKE2b-128) of a regular file, and whether the state can be relied on later (``is_settled``).

    Raises:
        NotAFileError: not a regular file.
        ChangingFileError: it changes while it is read.
        OSError: there is no such file, or it may not be read.
    """
    with _unchanging(path) as (file, state):
        status = os.fstat(file.fileno())
        if status.st_size - 512 * status.st_blocks > LARGE_HOLES_BYTES:
            digest = _digest_of_segments(file, status.st_size)
        else:
            digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=DIGEST_BYTES)).digest()
    return state, digest, is_settled(state, path)


def _digest_of_segments(file: BinaryIO, size: int) -> bytes:
    """Digest of a file that is mostly holes, of its size and of the bytes that are on disk: to read terabytes of zeros takes hours."""
    state, position = hashlib.blake2b(b"%d" % size, digest_size=DIGEST_BYTES), 0
    while True:
        try:
            position = os.lseek(file.fileno(), position, os.SEEK_DATA)
        except OSError:  # no more data
            return state.digest()
        end = os.lseek(file.fileno(), position, os.SEEK_HOLE)
        state.update(b"%d %d " % (position, end))
        while position < end and (content := os.pread(file.fileno(), min(end - position, 2**20), position)):
            state.update(content)
            position += len(content)


@contextmanager
def _unchanging(path: Path) -> Iterator[tuple[BinaryIO, State]]:
    """An open file and its state. Raises ChangingFileError at the end if it has been written to meanwhile."""
    with open_regular(path) as file:
        state = state_of(os.fstat(file.fileno()))
        yield file, state
        if state_of(os.fstat(file.fileno())) != state:
            raise ChangingFileError(f"{path} is being changed while it is read; start again when it is complete")


@dataclass
class FileContents:
    """The contents of some files, in the order of a list."""

    NAMES: ClassVar[tuple[str, ...]] = ("states", "digests", "settled")

    states: np.ndarray
    """int64 (n, 5), see ``state_of``."""
    digests: np.ndarray
    """uint8 (n, 16); zeros for a file that cannot be read."""
    settled: np.ndarray
    """bool (n,): whether an equal state will mean an equal content."""

    @classmethod
    def empty(cls, count: int) -> "FileContents":
        return cls(
            np.full((count, 5), NO_STATE, np.int64), np.zeros((count, DIGEST_BYTES), np.uint8), np.zeros(count, bool)
        )

    @classmethod
    def load(cls, path: Path) -> "FileContents | None":
        """What ``save`` wrote; None if there is no such file, or nothing that can be used: then all files are read again."""
        try:
            arrays = read_arrays(path)
            found = cls(*(arrays[name] for name in cls.NAMES))
        except (ValueError, OSError, KeyError):
            return None
        count = len(found.settled)
        shapes = (found.states.shape, found.digests.shape, found.settled.shape)
        kinds = (found.states.dtype, found.digests.dtype, found.settled.dtype)
        return found if shapes == ((count, 5), (count, 16), (count,)) and kinds == (np.int64, np.uint8, bool) else None

    def save(self, path: Path) -> None:
        """Writes an .npz file for ``load``, under a temporary name that is then renamed."""
        with written_aside(path) as aside, open(aside, "wb") as file:
            np.savez(file, **{name: getattr(self, name) for name in self.NAMES})

    def part(self, first: int) -> "FileContents":
        """What follows the first files."""
        return FileContents(self.states[first:], self.digests[first:], self.settled[first:])

    def __len__(self) -> int:
        return len(self.settled)

    @property
    def digest(self) -> str:
        """Digest of all contents in their order, 32 hexadecimal digits."""
        return digest_of(np.ascontiguousarray(self.digests).tobytes())

    def take(
        self,
        index: int,
        path: Path,
        before: "FileContents | None" = None,
        read: Callable[[Path], tuple[State, bytes, bool]] | None = None,
    ) -> None:
        """Takes down the content of one file. It is not read if its state is the settled one of ``before``.

        ``read`` takes the place of ``content_of``. A file that cannot be read has no content: whoever reads it for its audio says why. Raises ChangingFileError for a file that
        is being written.
        """
        try:
            if (
                before is not None
                and before.settled[index]
                and state_of(os.stat(path)) == tuple(before.states[index].tolist())
            ):
                self.states[index], self.digests[index], self.settled[index] = (
                    before.states[index],
                    before.digests[index],
                    True,
                )
                return
            self.put(index, *(read or content_of)(path))
        except ChangingFileError:
            raise
        except (OSError, ValueError):
            return

    def put(self, index: int, state: State, digest: bytes, settled: bool) -> None:
        """Enters what one file holds."""
        self.states[index], self.digests[index], self.settled[index] = state, np.frombuffer(digest, np.uint8), settled

    def check(self, index: int, path: Path, what: str) -> None:
        """Checks one file after something was read from it: what was read is what was taken down.

        Any other file that took its place in between, and any writing to it, has left another state.

        Raises:
            ValueError: its content has changed since; ``what`` names it.
        """
        known = tuple(self.states[index].tolist())
        try:
            if state_of(os.stat(path)) == known:
                return
            state, digest, _ = content_of(path)
        except (OSError, NotAFileError) as error:
            if known == NO_STATE:  # it could not be read before either
                return
            raise ValueError(changed(what, path)) from error
        if digest != self.digests[index].tobytes():
            raise ValueError(changed(what, path))
        self.states[index] = state


def changed(what: str, path: object) -> str:
    """The message about an input that has changed while a command was using it."""
    return (
        f"{what} ({path}) has changed since the command began to use it: the result would mix two versions. Restore it, and the "
        "same command continues, or start anew"
    )
