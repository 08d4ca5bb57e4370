"""Room on disk: checked before long writes, reserved for large files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNITS = ("bytes", "KB", "MB", "GB", "TB")


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """ValueError that says how much is needed and free, if ``folder`` (or what there is of its path) has too little room."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise ValueError(
            f"{what} needs about {readable_bytes(needed_bytes)} in {folder}, where {readable_bytes(free)} are free: free some, "
            "or write to another disk"
        )


def reserve(path: Path, offset: int, size: int) -> None:
    """Makes sure of room for ``size`` bytes of a file from ``offset`` on; OSError if the disk has not so much."""
    if not hasattr(os, "posix_fallocate"):
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, offset, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # which alone does not name the file
    finally:
        os.close(descriptor)


@contextmanager
def told_as_os_error(folder: Path) -> Iterator[None]:
    """Around code that does nothing but write into ``folder``: what torch.save and safetensors raise there becomes an OSError.

    They have errors of their own for a disk that is full or takes no files.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        free = readable_bytes(shutil.disk_usage(folder).free)
        raise OSError(f"{folder} cannot be written, with {free} free: {error}") from error


def readable_bytes(count: float) -> str:
    """Such as "1.5 GB" (powers of 1000)."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == UNITS[0] else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
