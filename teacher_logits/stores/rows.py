"""The two ways in which a logit store keeps its rows: all logits, or the k largest of each row and a floor for the rest.

A writer writes blocks of rows into a new HDF5 file. A reader returns any rows as float16 (r, C), whichever way they are
kept. docs/logit_store.md says how much space the second way saves and how large its error is.

Shapes: n rows (one for each clip, or for each view of a clip), r rows at a time, C classes, K kept.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
from scipy.special import expit, logit

from audio_datasets.stores.hdf5_arrays import ArrayFile, FileRows, dataset_of
from audio_datasets.system.messages import brief

KEPT = np.dtype([("class", "<u2"), ("logit", "<f2")])
MOST_CLASSES = 2**16

# Probabilities of the 65,536 float16 values are rounded to multiples of 2^-36, so that sums do not depend on the order of
# blocks. 2^27 rows can be summed before an int64 overflows.
UNIT = 2.0**-36
SMALLEST_MEAN = UNIT / 2


class RowWriter(Protocol):
    """Writes rows into a new file, block by block. Methods return the written bytes for the fingerprint."""

    def write(self, logits: np.ndarray) -> np.ndarray: ...

    def finish(self) -> np.ndarray: ...


class RowReader(Protocol):
    """Reads rows of an open file as float16 (r, C)."""

    shape: tuple[int, int]
    keep: int | None

    def read(self, rows: np.ndarray) -> np.ndarray: ...

    def read_run(self, first: int, count: int) -> np.ndarray: ...

    def stored_bytes(self, rows_at_once: int) -> Iterator[np.ndarray]:
        """The bytes that the writer returned, in the same order but in blocks of any size."""
        ...


def create_rows(file: ArrayFile, num_rows: int, num_classes: int, keep: int | None) -> RowWriter:
    """The writer for a new file: of all logits, or of the ``keep`` largest."""
    file.attrs["storage"] = "dense" if keep is None else "top-k"
    return _DenseWriter(file, num_rows, num_classes) if keep is None else _TopKWriter(file, num_rows, num_classes, keep)


def open_rows(path: Path, file: h5py.File, storage: str) -> RowReader:
    """The reader for an open file. Raises ValueError for an unknown storage, and for datasets that do not fit it."""
    readers = {"dense": DenseRows, "top-k": TopKRows}
    if storage not in readers:
        raise ValueError(f"{path} is a damaged logit store: its storage is {brief(storage)}; known: {list(readers)}")
    return readers[storage](path, file)


def row_bytes(num_classes: int, keep: int | None = None) -> int:
    """The size of a row of logits on disk."""
    return num_classes * np.dtype(np.float16).itemsize if keep is None else keep * KEPT.itemsize


def check_keep(keep: int | None, num_classes: int) -> None:
    """Raises ValueError if this many logits of each row cannot be kept."""
    if keep is not None and not 1 <= keep < num_classes <= MOST_CLASSES:
        raise ValueError(
            f"the number of logits to keep of each clip must be from 1 to {num_classes - 1} of {num_classes} "
            f"(with at most {MOST_CLASSES} classes); found {keep}"
        )


def largest(logits: np.ndarray, keep: int) -> np.ndarray:
    """The ``keep`` largest logits of each row, the largest first; among equal logits, the lower class first. KEPT (r, keep)."""
    bits = logits.view(np.uint16)
    # As integers in descending order of logits, for which NumPy uses a radix sort, which is stable and fast.
    descending = np.where(bits < 0x8000, 0x7FFF - bits, bits)
    classes = np.argsort(descending, axis=1, kind="stable")[:, :keep]
    result = np.empty(classes.shape, KEPT)
    result["class"] = classes
    result["logit"] = np.take_along_axis(logits, classes, axis=1)
    return result


class _DenseWriter:
    def __init__(self, file: ArrayFile, num_rows: int, num_classes: int) -> None:
        self._logits = file.create_dataset("logits", shape=(num_rows, num_classes), dtype=np.float16)
        self._filled = 0

    def write(self, logits: np.ndarray) -> np.ndarray:
        self._logits[self._filled : self._filled + len(logits)] = logits
        self._filled += len(logits)
        return np.ascontiguousarray(logits)

    def finish(self) -> np.ndarray:
        assert self._filled == self._logits.shape[0], (self._filled, self._logits.shape)
        return np.empty(0, np.uint8)


class _TopKWriter:
    """Also sums, for each class, the probabilities that are not kept."""

    def __init__(self, file: ArrayFile, num_rows: int, num_classes: int, keep: int) -> None:
        check_keep(keep, num_classes)
        self._kept = file.create_dataset("kept", shape=(num_rows, keep), dtype=KEPT)
        self._floor = file.create_dataset("floor", shape=(num_classes,), dtype=np.float16)
        self._keep = keep
        self._filled = 0
        self._left_out = np.zeros(num_classes, dtype=np.int64)
        self._units_left_out = np.zeros(num_classes, dtype=np.int64)
        every_value = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
        self._units_of = np.rint(np.nan_to_num(expit(every_value)) / UNIT).astype(np.int64)

    def write(self, logits: np.ndarray) -> np.ndarray:
        logits = np.ascontiguousarray(logits)
        kept = largest(logits, self._keep)
        self._kept[self._filled : self._filled + len(kept)] = kept
        self._filled += len(kept)
        classes = kept["class"].ravel()
        self._left_out += len(kept) - np.bincount(classes, minlength=len(self._left_out))
        self._units_left_out += self._units_of[logits.view(np.uint16)].sum(axis=0)
        np.subtract.at(self._units_left_out, classes, self._units_of[kept["logit"].ravel().view(np.uint16)])
        return kept

    def finish(self) -> np.ndarray:
        assert self._filled == self._kept.shape[0], (self._filled, self._kept.shape)
        mean = self._units_left_out * UNIT / np.maximum(self._left_out, 1)
        floor = logit(np.clip(mean, SMALLEST_MEAN, 1 - SMALLEST_MEAN)).astype(np.float16)
        self._floor[:] = floor
        return floor


class DenseRows:
    """All logits of each row."""

    keep = None

    def __init__(self, path: Path, file: h5py.File) -> None:
        self._logits = _rows(path, file, "logits", np.dtype(np.float16))
        self.shape = self._logits.shape

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self._logits.read(rows)

    def read_run(self, first: int, count: int) -> np.ndarray:
        return self._logits.read_run(first, count)

    def stored_bytes(self, rows_at_once: int) -> Iterator[np.ndarray]:
        return _runs(self._logits, rows_at_once)


class TopKRows:
    """The largest logits of each row, and a floor for all other classes."""

    def __init__(self, path: Path, file: h5py.File) -> None:
        self.path = path
        self._kept = _rows(path, file, "kept", KEPT)
        self.floor = dataset_of(file, "floor")[:]
        if self.floor.dtype != np.float16 or self.floor.ndim != 1:
            raise ValueError(f"{path} is a damaged logit store: floor is {self.floor.dtype} {self.floor.shape}")
        self.keep = self._kept.shape[1]
        self.shape = (len(self._kept), len(self.floor))

    def read(self, rows: np.ndarray) -> np.ndarray:
        return self._spread(self._kept.read(rows))

    def read_run(self, first: int, count: int) -> np.ndarray:
        return self._spread(self._kept.read_run(first, count))

    def stored_bytes(self, rows_at_once: int) -> Iterator[np.ndarray]:
        yield from _runs(self._kept, rows_at_once)
        yield self.floor

    def _spread(self, kept: np.ndarray) -> np.ndarray:
        if kept.size and kept["class"].max() >= len(self.floor):
            raise ValueError(f"{self.path} is a damaged logit store: it refers to a class beyond its {len(self.floor)}")
        logits = np.tile(self.floor, (len(kept), 1))
        np.put_along_axis(logits, kept["class"].astype(np.intp), kept["logit"], axis=1)
        return logits


def _runs(rows: FileRows, rows_at_once: int) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), rows_at_once):
        yield rows.read_run(start, min(rows_at_once, len(rows) - start))


def _rows(path: Path, file: h5py.File, name: str, dtype: np.dtype) -> FileRows:
    rows = FileRows(path, dataset_of(file, name))
    if rows.dtype != dtype or len(rows.shape) != 2:
        raise ValueError(
            f"{path} is a damaged logit store: {name} must be rows of {dtype}; found {rows.dtype} {rows.shape}"
        )
    return rows
