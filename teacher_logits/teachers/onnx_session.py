"""ONNX Runtime with a bound on its memory: a model of 300 bytes can ask for any amount.

A constant's size is in no list of weights: ``ConstantOfShape``, ``Expand``, ``Tile``, ``Range`` and others make one out of a shape,
when the model is opened or when it runs. While it runs, everything that ONNX Runtime holds comes from one arena with a largest
size. While it is opened, constants are computed outside of that arena, so the process itself may not grow by more (on Linux).
"""

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

LARGEST_VARIABLE = "KD_MODEL_MEMORY_GB"
"""Environment variable: memory that an ONNX model may take beyond the size of its files (10^9 bytes)."""
LARGEST_GB = 0.5
FOLDED_BYTES = 2**26
"""Constants up to this size are computed when a model is opened; larger ones in the arena, each time that it runs."""
OUT_OF_MEMORY = (
    "Available memory of",
    "Failed to allocate memory",
    "bad allocation",
    "bad_alloc",
    "would be too large",
)
STATM = Path("/proc/self/statm")
EXTERNAL_ENDINGS = (".data", "_data")


_log = logging.getLogger(__name__)


class TooLarge(ValueError):
    """A model that needs more memory than it may take."""


class BatchRunner:
    """Runs a model over batches, in parts where a whole batch takes more memory than the model may take."""

    def __init__(self, session: Any, path: Path) -> None:
        """``session`` is one of ``open_session``; ``path`` is for messages."""
        self._session, self._path = session, path
        self._at_once: int | None = None  # rows of a batch, once a whole one was too much

    def __call__(self, outputs: list[str], name: str, batch: np.ndarray) -> list[np.ndarray]:
        """The outputs of these names, each with a row for each of the input ``name``'s.

        Raises:
            ValueError: an input that the model does not take.
            TooLarge: a single row needs more memory than the model may take.
        """
        found: list[list[np.ndarray]] = []
        start = 0
        while start < len(batch):
            part = batch[start : start + (self._at_once or len(batch))]
            try:
                found.append(self._run(outputs, name, part))
            except TooLarge:
                if len(part) == 1:
                    raise
                self._at_once = len(part) // 2
                _log.warning(
                    "%s takes too much memory for %d clips at once; it gets %d", self._path, len(part), self._at_once
                )
                continue
            start += len(part)
        return found[0] if len(found) == 1 else [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _run(self, outputs: list[str], name: str, part: np.ndarray) -> list[np.ndarray]:
        try:
            return self._session.run(outputs, {name: part})
        except (*failures(), MemoryError) as error:
            refuse_too_large(self._path, error)
            raise ValueError(f"{self._path} cannot take an input of shape {part.shape}: {error}") from error


def open_session(path: Path, threads: int, providers: list[str] | None = None) -> Any:
    """An ``onnxruntime.InferenceSession`` that computes on the CPU, or with the given providers.

    Args:
        threads: threads that compute; 0: as many as ONNX Runtime likes.

    Raises:
        ValueError: ONNX Runtime is not installed, or the file is no model that it can run.
        TooLarge: the model needs more memory than it may take.
    """
    onnxruntime = _onnxruntime()
    if not path.is_file():
        raise ValueError(f"no such ONNX model: {path}")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # what it would print comes back as an error
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.add_session_config_entry("optimization.constant_folding_max_output_size_in_bytes", str(FOLDED_BYTES))
    place = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    # The arena that was registered last is the one that a session gets. It is registered for each, since models differ in size.
    arena = onnxruntime.OrtArenaCfg({"max_mem": largest_bytes(path), "arena_extend_strategy": 1})
    onnxruntime.create_and_register_allocator(place, arena)
    try:
        with _bounded_growth(largest_bytes(path)):
            return onnxruntime.InferenceSession(str(path), options, providers=providers or ["CPUExecutionProvider"])
    except (*failures(), MemoryError) as error:
        refuse_too_large(path, error)
        raise ValueError(f"{path} is not an ONNX model that onnxruntime can run: {error}") from error


@contextmanager
def _bounded_growth(largest: int) -> Iterator[None]:
    """Lets this process's memory grow by ``largest`` bytes; more is an error of whoever asks for it. Does nothing but on Linux."""
    if not STATM.exists():
        yield
        return
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)
    pages = int(STATM.read_text(encoding="ascii").split()[5])
    most = pages * resource.getpagesize() + largest
    if before[0] != resource.RLIM_INFINITY:
        most = min(most, before[0])
    resource.setrlimit(resource.RLIMIT_DATA, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


def refuse_too_large(path: Path, error: Exception) -> None:
    """Raises TooLarge if ONNX Runtime failed because the arena was used up."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in OUT_OF_MEMORY):
        raise TooLarge(
            f"{path} needs more memory than it may take: {largest_bytes(path) / 1e9:.2f} GB for one clip. If you trust it, allow "
            f"more with {LARGEST_VARIABLE}={2 * _allowed_gb():g}"
        ) from error


def largest_bytes(path: Path) -> int:
    """What a model may take: the size of its files on the disk, and ``LARGEST_VARIABLE``."""
    beside = (path.with_name(path.name + ending) for ending in EXTERNAL_ENDINGS)
    files = [os.stat(file) for file in (path, *beside) if file.is_file()]
    on_disk = sum(min(file.st_size, getattr(file, "st_blocks", math.inf) * 512) for file in files)
    return round(_allowed_gb() * 1e9 + on_disk)


def _allowed_gb() -> float:
    text = os.environ.get(LARGEST_VARIABLE, "")
    try:
        allowed = float(text) if text.strip() else LARGEST_GB
    except ValueError:
        allowed = math.nan
    if not 0 < allowed < 1e9:
        raise ValueError(f"{LARGEST_VARIABLE} must be a positive number of gigabytes; found {text!r}")
    return allowed


def failures() -> tuple[type[Exception], ...]:
    """The exceptions that onnxruntime raises for a model or an input that it does not support."""
    _onnxruntime()
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    return (
        state.Fail,
        state.InvalidArgument,
        state.InvalidGraph,
        state.InvalidProtobuf,
        state.NotImplemented,
        state.RuntimeException,
    )


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ValueError(f"ONNX models need onnxruntime: pip install 'audio-kd[export]' ({error})") from error
    return onnxruntime
