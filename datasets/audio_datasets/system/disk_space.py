"""Disk space: checks it before long writes, and reserves it for large files."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from audio_datasets.system.workers.faults import fault_message

UNITS = ("bytes", "KB", "MB", "GB", "TB")


def require_space(folder: Path, needed_bytes: int, what: str) -> None:
    """Raises ValueError, with the needed and the free space, if there is not enough for ``folder`` (which need not exist yet)."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise ValueError(
            f"{what} needs about {readable_bytes(needed_bytes)} in {folder}, but only {readable_bytes(free)} are free: free some "
            "space, or write to another disk"
        )


def reserve(path: Path, offset: int, size: int) -> None:
    """Reserves space for ``size`` bytes of a file, starting at ``offset``; OSError if the disk does not have enough."""
    if not hasattr(os, "posix_fallocate"):
        return
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.posix_fallocate(descriptor, offset, size)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error  # the original error does not name the file
    finally:
        os.close(descriptor)


@contextmanager
def told_as_os_error(folder: Path) -> Iterator[None]:
    """Wraps code that writes into ``folder``: turns errors of torch.save and safetensors into an OSError.

    They raise their own errors for a full or read-only disk.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        if fault_message(error) is not None:  # a worker ended meanwhile
            raise
        free = readable_bytes(shutil.disk_usage(folder).free)
        raise OSError(f"{folder} cannot be written, with {free} free: {error}") from error


def readable_bytes(count: float) -> str:
    """Such as "1.5 GB" (powers of 1000)."""
    for unit in UNITS:
        if count < 1000 or unit == UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == UNITS[0] else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
