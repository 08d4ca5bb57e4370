"""HDF5 files whose arrays can be memory-mapped, and a look-up of rows by clip id that needs no Python dict.

What the clip store and the logit store share. Arrays are contiguous (not chunked, not compressed) and aligned, so that a
reader maps them and closes the HDF5 file: pages are shared between processes, nothing has to survive a fork, and a
handle is never pickled.
"""

import io
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from audio_datasets.messages import listed

ALIGNMENT_BYTES = 64


@contextmanager
def create_hdf5(path: Path) -> Iterator[h5py.File]:
    """A new HDF5 file for contiguous, aligned arrays; equal content gives equal bytes (no timestamps)."""
    with h5py.File(path, "w", alignment_threshold=1, alignment_interval=ALIGNMENT_BYTES) as file:
        yield file


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading. ValueError that names ``path`` if it is missing, truncated or not HDF5."""
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is a folder, not an HDF5 file")
    try:
        # Stores are renamed into place and never changed: no lock, which some network file systems refuse.
        file = h5py.File(path, "r", locking=False)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        found = "is truncated" if "truncated" in str(error) else "is not an HDF5 file, or a damaged one"
        raise ValueError(f"{path} {found} ({error})") from error
    with file:
        yield file


def dataset_of(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset ``name``; ValueError, with the path, if there is none."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{file.filename} has no dataset {name!r}; found {sorted(file)}")
    return dataset


def map_array(file: h5py.File, name: str) -> np.ndarray:
    """The contiguous dataset ``name``, memory-mapped read-only; it stays valid after ``file`` is closed.

    Raises ValueError if the dataset is missing, or laid out so that it cannot be mapped.
    """
    dataset = dataset_of(file, name)
    if dataset.size == 0:
        return np.empty(dataset.shape, dataset.dtype)
    if not is_mappable(dataset):
        raise ValueError(f"dataset {name!r} of {file.filename} is chunked or compressed and cannot be memory-mapped")
    # np.asarray: the same mapping without memmap's Python-level bookkeeping on every slice.
    return np.asarray(np.memmap(file.filename, dataset.dtype, "r", offset=dataset.id.get_offset(), shape=dataset.shape))


class FileRows:
    """The rows of a contiguous dataset, read from the file at their offsets when they are asked for; never mapped.

    For arrays that are large beside the memory of a process. The kernel maps up to 2 MB around each row that is touched, so
    that random reading would make a whole mapped array part of every worker's memory. Reading is also the faster of the
    two (measured: rows of a 2 GB array, cached). Forked processes may share the object: the position in the file, which
    they have in common, takes no part. It cannot be pickled.

    Attributes:
        path: the HDF5 file.
        dtype, shape: of the dataset, (n, …).
    """

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        """Raises ValueError if the dataset does not lie in the file as one plain block."""
        if dataset.size and not is_mappable(dataset):
            raise ValueError(
                f"dataset {dataset.name!r} of {path} is chunked or compressed and cannot be read by offset"
            )
        self.path = path
        self.dtype = dataset.dtype
        self.shape = dataset.shape
        self._offset = dataset.id.get_offset() or 0
        self._row_bytes = int(np.prod(self.shape[1:])) * self.dtype.itemsize
        self._file = io.FileIO(path)

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: np.ndarray) -> np.ndarray:
        """The rows with these numbers, (k, …)."""
        if len(rows) and (np.diff(rows) == 1).all():
            return self.read_run(int(rows[0]), len(rows))
        result = np.empty((len(rows), *self.shape[1:]), self.dtype)
        for place, row in enumerate(rows.tolist()):
            self._read_into(result[place : place + 1], row)
        return result

    def read_run(self, first: int, count: int) -> np.ndarray:
        """``count`` rows from ``first`` on, (count, …)."""
        result = np.empty((count, *self.shape[1:]), self.dtype)
        self._read_into(result, first)
        return result

    def _read_into(self, result: np.ndarray, first: int) -> None:
        offset = self._offset + first * self._row_bytes
        found = os.preadv(self._file.fileno(), [result], offset)
        while found < result.nbytes:  # more than 2 GB, or a file system that reads less than it was asked for
            rest = result.reshape(-1).view(np.uint8)[found:]
            more = os.preadv(self._file.fileno(), [rest], offset + found)
            if not more:
                raise ValueError(f"{self.path} ends too early: it was cut after it was opened")
            found += more


def is_mappable(dataset: h5py.Dataset) -> bool:
    """Whether the dataset lies in the file as one plain block."""
    return dataset.chunks is None and not dataset.dtype.hasobject and dataset.id.get_offset() is not None


def string_attribute(file: h5py.File, name: str) -> str | None:
    """The text attribute ``name`` of the file, or None if it is missing or no text."""
    value: Any = file.attrs.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    return value if isinstance(value, str) else None


def encode_ids(clip_ids: Iterable[str] | np.ndarray) -> np.ndarray:
    """Clip ids as a NumPy array of fixed-width UTF-8 bytes, shape (n,), dtype S<longest>.

    Ids of other stores may be given as they are encoded there: millions of Python strings take seconds and much memory.

    Raises ValueError for an id that is empty, holds NUL (the padding of the type) or appears twice.
    """
    if isinstance(clip_ids, np.ndarray):
        assert clip_ids.dtype.kind == "S", clip_ids.dtype
        array = clip_ids.astype(f"S{max(1, np.strings.str_len(clip_ids).max(initial=1))}", copy=False)
    else:
        encoded = [clip_id.encode("utf-8") for clip_id in clip_ids]
        for clip_id in encoded:
            if not clip_id or b"\0" in clip_id:
                raise ValueError(f"a clip id must be text without NUL characters and not empty; found {clip_id!r}")
        array = np.array(encoded, dtype=f"S{max(map(len, encoded), default=1)}")
    values, counts = np.unique(array, return_counts=True)
    if len(values) < len(array):
        repeated = [value.decode("utf-8") for value in values[counts > 1]]
        raise ValueError(f"clip ids must be unique; found more than once: {listed(repeated)}")
    return array


def decode_ids(encoded: np.ndarray) -> list[str]:
    """The text of ids stored as fixed-width UTF-8 bytes."""
    return [clip_id.decode("utf-8", errors="replace") for clip_id in encoded.tolist()]


def id_order(encoded: np.ndarray) -> np.ndarray:
    """``clip_id_order``: int64 (n,), the rows in ascending byte order of their ids."""
    return np.argsort(encoded, kind="stable").astype(np.int64)


def find_ids(encoded: np.ndarray, order: np.ndarray, clip_ids: Sequence[str]) -> np.ndarray:
    """Rows of ``clip_ids`` by binary search: int64 (k,), -1 where an id is not there.

    ``encoded`` (n,) S<width> and ``order`` (n,) may be memory-mapped: only the pages that the search visits are read.
    """
    wanted = [clip_id.encode("utf-8") for clip_id in clip_ids]
    if not len(encoded) or not wanted:
        return np.full(len(wanted), -1, dtype=np.int64)
    # The stored width: any other would make NumPy convert (and so copy) the whole stored array.
    width = encoded.dtype.itemsize
    fits = np.array([0 < len(clip_id) <= width for clip_id in wanted])
    keys = np.array(wanted, dtype=encoded.dtype)
    position = np.minimum(np.searchsorted(encoded, keys, sorter=order), len(encoded) - 1)
    rows = np.asarray(order[position], dtype=np.int64)
    return np.where(fits & (encoded[rows] == keys), rows, -1)
