"""How batches get from data-loading workers to the process that they work for, whatever room the machine has for that.

PyTorch passes tensors in shared memory (/dev/shm), with an open file for each of them. Containers have 64 MB of shared memory by
default, and a process may have a limit of few open files. Without room, PyTorch's workers lose batches and the process that
waits for them hangs, or ends with a traceback. Here a batch for which there is no room goes through a pipe, which is slower
and needs neither.
"""

import math
import mmap
import os
import resource
import shutil
import sys
from collections.abc import Callable
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import default_collate, get_worker_info
from torch.utils.data._utils.collate import collate, default_collate_fn_map

from audio_datasets.system.disk_space import readable_bytes

SHARED_MEMORY = Path("/dev/shm")
FILES_OF_A_WORKER = 4
"""Open files in the parent for each worker: a pipe for its orders, and two to notice its end."""
FILES_BESIDE = 24
"""Open files that a command may need for everything else: stores, checkpoints, PyTorch's own checks."""
FILES_OF_SHARED_BATCHES = 64
"""Open files of a worker's batches in shared memory: 2 batches in advance and 2 in use, with up to 16 tensors each."""

SMALLEST_RESERVE = 2**20
"""Bytes of shared memory that batches leave free."""
SEMAPHORES, SEMAPHORES_OF_A_WORKER = 2**15, 2**14
"""Bytes of shared memory without which no worker process can be started."""

_told = mmap.mmap(-1, 1)
"""Shared with forked workers: whether the note about shared memory was printed."""


def free_files() -> int:
    """How many more files this process may open."""
    listing = next((folder for folder in ("/proc/self/fd", "/dev/fd") if os.path.isdir(folder)), None)
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] - (len(os.listdir(listing)) if listing else 16)


def workers_that_fit(most: int) -> int:
    """As many workers as this process may have with the files that it may open, at least 1 and at most ``most``.

    If fewer, a note says so.
    """
    fitting = max(1, min(most, (free_files() - FILES_BESIDE) // FILES_OF_A_WORKER))
    if fitting < most:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        print(
            f"note: {fitting} worker processes in place of {most}, because this process may open only {limit} files "
            "(ulimit -n 1024; docker run --ulimit nofile=1024)",
            file=sys.stderr,
        )
    return fitting


def require_files(workers: int, alternative: str = "--workers 0") -> None:
    """Raises ValueError, with both numbers, if this process may not open as many files as its workers need."""
    needed, free = FILES_BESIDE + workers * FILES_OF_A_WORKER, free_files()
    if free < needed:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise ValueError(
            f"{workers} worker processes need about {needed} open files, but this process may open only {max(0, free)} more "
            f"(limit: {limit}); raise the limit (ulimit -n 1024; docker run --ulimit nofile=1024), or use {alternative}"
        )


def allow_files(workers: int) -> None:
    """Raises the limit on open files as far as batches in shared memory need it and the system lets us."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    missing = FILES_BESIDE + workers * (FILES_OF_A_WORKER + FILES_OF_SHARED_BATCHES) - free_files()
    if missing > 0 and soft != hard:
        most = soft + missing if hard == resource.RLIM_INFINITY else min(hard, soft + missing)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def batches_need_pipes(workers: int) -> bool:
    """Whether the batches of so many workers must go through pipes, because too few files may be opened to share memory.

    Raises ValueError if not even that is possible.
    """
    require_semaphores(workers)
    allow_files(workers)
    require_files(workers)
    return free_files() < FILES_BESIDE + workers * (FILES_OF_A_WORKER + FILES_OF_SHARED_BATCHES)


def pass_batches(through_pipes: bool) -> None:
    """In a worker: from now on, tensors go through shared memory where there is room, and through a pipe otherwise."""

    def reduce(tensor: Tensor) -> tuple[Callable, tuple]:
        if not through_pipes and _in_shared_memory(tensor):
            return reduce_tensor(tensor)
        return _tensor_of, (tensor.detach().contiguous().numpy(),)

    ForkingPickler.register(Tensor, reduce)


def _in_shared_memory(tensor: Tensor) -> bool:
    """Moves a tensor to shared memory; False if there is no room."""
    if not tensor.is_shared() and not has_room(tensor.nbytes):
        return False
    try:
        tensor.untyped_storage().share_memory_()
        return True
    except (RuntimeError, OSError) as error:
        if not lacks_room(error):
            raise
        _tell_once()
        return False


def _tensor_of(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array)


def has_room(size: int) -> bool:
    """Whether shared memory has room for ``size`` bytes and a reserve, which the semaphores of further workers need.

    If not, a note is printed, once for all workers.
    """
    free, total = shared_memory()
    if size <= free - max(SMALLEST_RESERVE, total // 16):
        return True
    _tell_once()
    return False


def shared_memory() -> tuple[float, float]:
    """Free and total bytes of shared memory; infinite on systems where it is no file system."""
    if not SHARED_MEMORY.is_dir():
        return math.inf, math.inf
    room = shutil.disk_usage(SHARED_MEMORY)
    return room.free, room.total


def require_semaphores(workers: int, alternative: str = "--workers 0") -> None:
    """Raises ValueError if shared memory is full, or cannot be written, so that worker processes cannot even be started."""
    free = shared_memory()[0]
    if free < SEMAPHORES + workers * SEMAPHORES_OF_A_WORKER or (
        free < math.inf and not os.access(SHARED_MEMORY, os.W_OK)
    ):
        raise ValueError(
            f"worker processes need some shared memory, but {SHARED_MEMORY} is full or cannot be written "
            f"({readable_bytes(free)} free); give the container more (docker run --shm-size 8g), or use {alternative}"
        )


def _tell_once() -> None:
    if _told[0]:
        return
    _told[0] = 1
    free, total = map(readable_bytes, shared_memory())
    print(
        f"note: shared memory ({SHARED_MEMORY}, {free} of {total} free) has no room for a batch; such batches go through a "
        "pipe, which is slower. To have more: docker run --shm-size 8g",
        file=sys.stderr,
    )


def lacks_room(error: Exception) -> bool:
    """Whether an error of PyTorch says that there is no shared memory left."""
    return "shared memory" in str(error) or "No space left" in str(error)


def bytes_of(item: Any) -> int:
    """The size of the tensors and arrays in an item of a data set."""
    if isinstance(item, dict):
        return sum(map(bytes_of, item.values()))
    if isinstance(item, list | tuple):
        return sum(map(bytes_of, item))
    return item.nbytes if isinstance(item, Tensor | np.ndarray) else 0


def collate_anywhere(items: list[Any]) -> Any:
    """``default_collate``, which stacks tensors in shared memory, or in the worker's own memory if there is no room."""
    try:
        if get_worker_info() is None or has_room(bytes_of(items)):
            return default_collate(items)
    except (RuntimeError, OSError) as error:
        if not lacks_room(error):
            raise
        _tell_once()
    return collate(items, collate_fn_map={**default_collate_fn_map, Tensor: _stack, np.ndarray: _stack_arrays})


def _stack(batch: list[Tensor], *, collate_fn_map: dict | None = None) -> Tensor:
    return torch.stack(batch)


def _stack_arrays(batch: list[np.ndarray], *, collate_fn_map: dict | None = None) -> Tensor:
    return torch.stack([torch.as_tensor(array) for array in batch])
