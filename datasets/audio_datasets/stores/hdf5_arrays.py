"""HDF5 files whose arrays can be memory-mapped, and a way to look up rows by clip id that needs no Python dict.

Clip stores and logit stores share this code. Arrays are contiguous (not chunked, not compressed) and aligned, so that a
reader can map them and close the HDF5 file. Pages are then shared between processes, nothing has to survive a fork, and
handles are never pickled.

Why we need our own seal and digests: we flipped one bit in each byte outside audio and logits (HDF5 2.0, 20 clips, 10 classes)
and counted flips that went unnoticed, that is, gave other values or made reading hang. Clip store: 0 of 20,447. Logit store: 320
of 16,114 (in its audio digests, which ``kd verify`` checks). The same arrays written only with ``libver="latest"``: 668 of 8,241
and 552 of 6,464. With Fletcher-32 on every array, which prevents mapping: 140 and 232 (in text attributes).
"""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from audio_datasets.stores.hdf5_origin import require_own_content
from audio_datasets.system.disk_space import reserve
from audio_datasets.system.messages import listed
from audio_datasets.system.paths.inputs import special_kind
from audio_datasets.system.paths.sizes import require_room

ALIGNMENT_BYTES = 64
HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
SEAL = b"kd-sealed-arrays"
_DIGEST = b'], "digest": "'  # within a seal
MOST_SEAL_BYTES = 2**16
MOST_SEALED_BYTES = 2**26  # between two arrays: far more than HDF5 uses
PAGE_BYTES = 4096


@contextmanager
def create_hdf5(path: Path) -> Iterator["ArrayFile"]:
    """A new HDF5 file for contiguous, aligned arrays; equal content gives equal bytes (no timestamps).

    Raises OSError for a full disk, before any array that does not fit is written.
    """
    file = ArrayFile(path)
    yield file
    with file.changing() as content:
        for name, value in file.attrs.items():
            content.attrs[name] = value
    file.seal()


class ArrayFile:
    """An HDF5 file of which HDF5 itself makes only the description of the arrays, in memory.

    The HDF5 library does not survive errors of a disk: it prints its internal state, fails again when it closes the file, and may
    end the process. Therefore both the description and the arrays are written through the operating system, which reports
    errors properly. Space for each array is reserved before anything is written into it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.attrs: dict[str, Any] = {}
        """Attributes of the file, written when it is closed."""
        self._places: list[tuple[int, int]] = []
        self._description = _Description()
        path.write_bytes(b"")
        with self._changing("w"):
            pass

    def changing(self) -> AbstractContextManager[h5py.File]:
        """Opens the file with HDF5 to change its description."""
        return self._changing("r+")

    @contextmanager
    def _changing(self, mode: str) -> Iterator[h5py.File]:
        with h5py.File(
            self._description, mode, alignment_threshold=1, alignment_interval=ALIGNMENT_BYTES, locking=False
        ) as file:
            yield file
        self._description.store(self.path)

    def create_dataset(
        self, name: str, data: np.ndarray | None = None, shape: tuple[int, ...] | None = None, dtype: Any = None
    ) -> "ArrayWriter":
        """A new array with the given ``data``, or with a shape and type, to be filled by assigning to slices."""
        if data is not None:
            data = np.ascontiguousarray(data)
            shape, dtype = data.shape, data.dtype
        dtype = np.dtype(dtype)
        with self.changing() as file:
            properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)  # its place in the file is fixed now
            properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
            properties.set_obj_track_times(False)
            space = h5py.h5s.create_simple(shape)
            kind = h5py.h5t.py_create(dtype, logical=True)
            offset = h5py.h5d.create(file.id, name.encode(), kind, space, properties).get_offset()
        writer = ArrayWriter(self.path, offset, shape, dtype)
        if offset is not None:
            self._places.append((offset, math.prod(shape) * dtype.itemsize))
        if data is not None:
            writer[0 : len(data)] = data
        return writer

    def __setitem__(self, name: str, data: np.ndarray) -> None:
        self.create_dataset(name, data)

    def seal(self) -> None:
        """Appends a seal: places of the arrays, and a digest of all bytes besides them. HDF5 does not look behind its end."""
        content = json.dumps({"arrays": self._places, "digest": _digest_besides(self.path, self._places)}).encode()
        with open(self.path, "ab") as file:
            file.write(SEAL + len(content).to_bytes(4, "little") + content)


class _Description:
    """What HDF5 takes for a file: keeps the description in memory, and leaves out the arrays, which HDF5 does not write."""

    def __init__(self) -> None:
        self._size = 0
        self._position = 0
        self._pages: dict[int, bytearray] = {}
        """What HDF5 has written, for itself to read again; pages that it has not written hold zeros."""
        self._writes: list[tuple[int, bytes]] = []

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            page, start = divmod(self._position + len(found), PAGE_BYTES)
            found += self._pages.get(page, bytes(PAGE_BYTES))[start : start + size - len(found)]
        self._position += size
        return bytes(found)

    def write(self, content: bytes | memoryview) -> int:
        data = bytes(content)
        self._writes.append((self._position, data))
        done = 0
        while done < len(data):
            page, start = divmod(self._position + done, PAGE_BYTES)
            part = data[done : done + PAGE_BYTES - start]
            self._pages.setdefault(page, bytearray(PAGE_BYTES))[start : start + len(part)] = part
            done += len(part)
        self._position += len(data)
        self._size = max(self._size, self._position)
        return len(data)

    def truncate(self, size: int) -> int:
        self._size = size
        return size

    def flush(self) -> None:
        """Nothing to do: ``store`` writes the file."""

    def store(self, path: Path) -> None:
        """Writes what HDF5 has written since the last time, and reserves space for new arrays. OSError for a full disk."""
        before = path.stat().st_size
        if self._size > before:
            reserve(path, before, self._size - before)
        with open(path, "r+b") as file:
            for offset, data in self._writes:
                file.seek(offset)
                file.write(data)
            file.truncate(self._size)
        self._writes.clear()


@dataclass(frozen=True)
class ArrayWriter:
    """An array of an ``ArrayFile``, written by assigning to slices of its first axis."""

    path: Path
    offset: int | None
    """Place in the file, in bytes; None for an array without elements."""
    shape: tuple[int, ...]
    dtype: np.dtype

    def __setitem__(self, rows: slice, values: np.ndarray) -> None:
        first, end, step = rows.indices(self.shape[0])
        assert step == 1, rows
        assert values.shape == (end - first, *self.shape[1:]), (rows, values.shape, self.shape)
        content = np.ascontiguousarray(values, dtype=self.dtype)
        if not content.nbytes:
            return
        with open(self.path, "r+b") as file:
            file.seek(self.offset + first * math.prod(self.shape[1:]) * self.dtype.itemsize)
            file.write(content.reshape(-1).view(np.uint8))


def check_seal(path: Path) -> None:
    """Raises ValueError if anything in a sealed file except its arrays has changed.

    HDF5 has no checksums for this part, and may crash or hang on a damaged file. A file without a seal (older, written by
    another program, or changed through HDF5, which removes the seal) is not checked.
    """
    with open(path, "rb") as file:
        # "Superblock" of version 0, as h5py writes it: the end of what HDF5 uses is at byte 40.
        head = file.read(48)
        end = int.from_bytes(head[40:], "little") if head[:9] == HDF5_SIGNATURE + b"\0" else None
        size = file.seek(0, os.SEEK_END)
        if end is not None and end >= size:
            return
        file.seek(max(0, size - MOST_SEAL_BYTES))
        tail = file.read()
        seal = b""
        if end is not None:
            file.seek(end)
            seal = file.read(MOST_SEAL_BYTES)
    # Damage may also move the seal, or destroy its beginning or the pointer to it.
    if not (seal and seal.startswith(SEAL[: len(seal)])) and SEAL not in tail and _DIGEST not in tail:
        return
    try:
        if not seal.startswith(SEAL):
            raise ValueError("its seal is not where it should be")
        content = seal[len(SEAL) + 4 :]
        if len(content) != int.from_bytes(seal[len(SEAL) : len(SEAL) + 4], "little"):
            raise ValueError("the file is truncated")
        described = json.loads(content)
        if _digest_besides(path, described["arrays"], end) != described["digest"]:
            raise ValueError("the description of its arrays has changed")
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is a damaged HDF5 file: {error}") from error


def _digest_besides(path: Path, places: Sequence[Sequence[int]], end: int | None = None) -> str:
    """Digest of all bytes of a file up to ``end`` except those in the given places (offset, bytes); 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16)
    end = path.stat().st_size if end is None else end
    position = 0
    with open(path, "rb") as file:
        for start, size in [*sorted(map(tuple, places)), (end, 0)]:
            if not position <= start <= end or size < 0 or start - position > MOST_SEALED_BYTES:
                raise ValueError("the places of its arrays are invalid")
            file.seek(position)
            state.update(file.read(start - position))
            position = start + size
    return state.hexdigest()


@contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file for reading. ValueError that names ``path`` if it is missing, truncated or not HDF5."""
    if not path.exists():
        raise ValueError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is {special_kind(path) or 'a folder'}, not an HDF5 file")
    check_seal(path)
    try:
        # Stores are renamed into place and never changed, so we need no lock, which some network file systems refuse.
        file = h5py.File(path, "r", locking=False)
    except PermissionError:
        raise
    except (OSError, RuntimeError) as error:
        found = "is truncated" if "truncated" in str(error) else "is damaged or not an HDF5 file"
        raise ValueError(f"{path} {found} ({error})") from error
    with file:
        with plain_hdf5_errors(path, "HDF5 file"):
            require_own_content(path, file)
            _require_small_chunks(path, file)
        yield file


def _require_small_chunks(path: Path, file: h5py.File) -> None:
    """Raises ValueError for chunks that are far larger than the file: HDF5 unpacks a whole chunk for the first row that is read."""
    for name in file:
        dataset = file[name]
        if isinstance(dataset, h5py.Dataset) and dataset.chunks:
            require_room(path, math.prod(dataset.chunks) * dataset.dtype.itemsize, f"each chunk of {name!r}")


@contextmanager
def plain_hdf5_errors(path: Path, what: str) -> Iterator[None]:
    """Wraps code that reads an open file: turns the errors that a damaged file causes into a ValueError that names ``path``.

    HDF5 finds damage only where it reads, and h5py raises many kinds of errors for it.
    """
    try:
        yield
    except (PermissionError, FileNotFoundError):
        raise
    except (
        ValueError,
        OSError,
        RuntimeError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        MemoryError,
    ) as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # one of our own errors
        raise ValueError(f"{path} is a damaged {what}: {error}") from error


def dataset_of(file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset ``name``; ValueError, with the path, if there is none."""
    dataset = file.get(name)
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{file.filename} has no dataset {name!r}; found {sorted(file)}")
    return dataset


def map_arrays(file: h5py.File, names: Iterable[str]) -> dict[str, np.ndarray]:
    """``map_array`` of each of these datasets, by name, for a reader that goes through all of them.

    Raises ValueError as ``map_array`` does, and for arrays that are far larger than the file is on the disk.
    """
    names = list(names)
    size = sum(math.prod(dataset.shape) * dataset.dtype.itemsize for dataset in (dataset_of(file, n) for n in names))
    require_room(file.filename, size, f"what describes its clips ({', '.join(names)})")
    return {name: map_array(file, name) for name in names}


def map_array(file: h5py.File, name: str) -> np.ndarray:
    """The contiguous dataset ``name``, memory-mapped read-only. It stays valid after ``file`` is closed.

    Raises ValueError if the dataset is missing, or has a layout that cannot be mapped.
    """
    dataset = dataset_of(file, name)
    if dataset.size == 0:
        return np.empty(dataset.shape, dataset.dtype)
    if not is_mappable(dataset):
        raise ValueError(f"dataset {name!r} of {file.filename} is chunked or compressed and cannot be memory-mapped")
    # np.asarray gives the same mapping without memmap's bookkeeping in Python for every slice.
    return np.asarray(np.memmap(file.filename, dataset.dtype, "r", offset=dataset.id.get_offset(), shape=dataset.shape))


class BytesOfVaryingLength:
    """Reads the elements of a dataset of variable-length bytes without HDF5, which may hang on a damaged one.

    HDF5 stores such elements in "global heaps" (HDF5 File Format Specification 1.1, III.E). For each element the dataset contains
    its length, and the address and index of an object in a heap.
    """

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        """Raises ValueError for a dataset that is not stored as one plain block (see ``lies_plain``)."""
        if not self.lies_plain(dataset):
            raise ValueError(f"dataset {dataset.name!r} of {path} is chunked or compressed")
        self._path, self._base = path, dataset.file.userblock_size
        references = np.dtype([("length", "<u4"), ("address", "<u8"), ("index", "<u4")])
        self._references = np.memmap(path, references, "r", dataset.id.get_offset(), shape=dataset.shape)
        self._file = io.FileIO(path)
        self._size = os.fstat(self._file.fileno()).st_size

    @staticmethod
    def lies_plain(dataset: h5py.Dataset) -> bool:
        """Whether the references to the elements are stored as one block, with the usual size of references."""
        space = dataset.id.get_storage_size()
        return dataset.chunks is None and dataset.id.get_offset() is not None and space == 16 * dataset.size > 0

    def __len__(self) -> int:
        return len(self._references)

    def __getitem__(self, row: int) -> np.ndarray:
        """uint8 (bytes,). ValueError for an invalid reference."""
        length, address, index = (int(value) for value in self._references[row])
        if length == 0:
            return np.empty(0, np.uint8)
        position = self._base + address
        header = self._read(position, 16)
        if header[:5] != b"GCOL\1" or len(header) < 16:
            raise ValueError(f"{self._path} is damaged: there is no heap where the bytes of row {row} should be")
        end = min(position + int.from_bytes(header[8:], "little"), self._size)
        position += 16
        while position + 16 <= end:
            found = self._read(position, 16)
            size = int.from_bytes(found[8:], "little")
            if int.from_bytes(found[:2], "little") == index:
                if length > min(size, end - position - 16):
                    break
                return np.frombuffer(self._read(position + 16, length), np.uint8)
            position += 16 + -(-size // 8) * 8
        raise ValueError(f"{self._path} is damaged: the bytes of row {row} are not where they should be")

    def _read(self, position: int, count: int) -> bytes:
        """Bytes of the file, fewer at its end. Not mapped, for the same reason as in ``FileRows``."""
        return os.pread(self._file.fileno(), count, position) if position < self._size else b""


class FileRows:
    """The rows of a contiguous dataset, read from the file at their offsets on demand and never mapped.

    For arrays that are large compared with a process's memory. The kernel maps up to 2 MB around each row that is read, so
    random access would gradually make a whole mapped array part of every worker's memory. Reading is also faster
    (measured with rows of a cached 2 GB array). Forked processes may share the object, because it does not use the file
    position that they have in common. It cannot be pickled.

    Attributes:
        path: the HDF5 file.
        dtype, shape: of the dataset, (n, …).
    """

    def __init__(self, path: Path, dataset: h5py.Dataset) -> None:
        """Raises ValueError if the dataset is not stored as one plain block."""
        if dataset.size and not is_mappable(dataset):
            raise ValueError(
                f"dataset {dataset.name!r} of {path} is chunked or compressed and cannot be read by offset"
            )
        self.path = path
        self.dtype = dataset.dtype
        self.shape = dataset.shape
        self._offset = dataset.id.get_offset() or 0
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._file = io.FileIO(path)
        if self._offset + len(self) * self._row_bytes > os.fstat(self._file.fileno()).st_size:
            raise ValueError(f"{path} is truncated: it ends within {dataset.name!r}")

    @property
    def descriptor(self) -> int:
        """Of the open file."""
        return self._file.fileno()

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

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
        while found < result.nbytes:  # more than 2 GB, or a file system that returns less than requested
            rest = result.reshape(-1).view(np.uint8)[found:]
            more = os.preadv(self._file.fileno(), [rest], offset + found)
            if not more:
                raise ValueError(f"{self.path} ends too early: it was truncated after it was opened")
            found += more


def is_mappable(dataset: h5py.Dataset) -> bool:
    """Whether the dataset is stored as one plain block."""
    return dataset.chunks is None and not dataset.dtype.hasobject and dataset.id.get_offset() is not None


def string_attribute(file: h5py.File, name: str) -> str | None:
    """The text attribute ``name`` of the file, or None if it is missing or not text."""
    value: Any = file.attrs.get(name)
    if isinstance(value, bytes):
        return value.decode("utf-8", errors="replace")
    if not isinstance(value, str) or any("\ud800" <= character <= "\udfff" for character in value):
        return None  # h5py returns bytes that are not UTF-8 as surrogates
    return value


def encode_ids(clip_ids: Iterable[str] | np.ndarray) -> np.ndarray:
    """Clip ids as a NumPy array of fixed-width UTF-8 bytes, shape (n,), dtype S<longest>.

    Encoded ids of other stores are accepted, because millions of Python strings take seconds and much memory.

    Raises ValueError for an id that is empty, contains NUL (the padding of the type) or appears twice.
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
    """Rows of ``clip_ids``, found by binary search: int64 (k,), -1 for ids that are not there.

    ``encoded`` (n,) S<width> and ``order`` (n,) may be memory-mapped; only the pages that the search visits are read.
    """
    wanted = [clip_id.encode("utf-8") for clip_id in clip_ids]
    if not len(encoded) or not wanted:
        return np.full(len(wanted), -1, dtype=np.int64)
    # Use the stored width: with any other, NumPy would convert and therefore copy the whole stored array.
    width = encoded.dtype.itemsize
    fits = np.array([0 < len(clip_id) <= width for clip_id in wanted])
    keys = np.array(wanted, dtype=encoded.dtype)
    position = np.minimum(np.searchsorted(encoded, keys, sorter=order), len(encoded) - 1)
    rows = np.asarray(order[position], dtype=np.int64)
    return np.where(fits & (encoded[rows] == keys), rows, -1)
