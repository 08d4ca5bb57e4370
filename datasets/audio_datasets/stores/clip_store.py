"""The clip store: many audio clips with their ids and targets in one HDF5 file. The format is described in docs/clip_store.md.

Shapes: n clips, C classes, k rows asked for.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import h5py
import numpy as np
import pyarrow

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError
from audio_datasets.stores.class_lists import check_class_names, class_list_difference, read_class_names
from audio_datasets.stores.hdf5_arrays import (
    ArrayFile,
    ArrayWriter,
    BytesOfVaryingLength,
    FileRows,
    create_hdf5,
    dataset_of,
    decode_ids,
    encode_ids,
    find_ids,
    id_order,
    is_mappable,
    map_array,
    open_hdf5,
    plain_hdf5_errors,
    string_attribute,
)
from audio_datasets.stores.manifest import read_manifest
from audio_datasets.system.files import digest_of, written_aside
from audio_datasets.system.messages import brief, listed

FORMAT = "kd-clip-store"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)  # version 1 has no digest of its index
AUDIO_KINDS = {"encoded": np.dtype("uint8"), "pcm16": np.dtype("<i2")}
DIGEST_BYTES = 16
# HDF5 keeps attributes of up to 64 KiB in the object's header, next to each other.
LARGEST_CLASS_LIST_BYTES = 60_000
ROWS_AT_ONCE = 8_192
BYTES_AT_ONCE = 16 * 2**20
INDEX_DIGEST = "index_digest"
FOREIGN_DATASETS = ("audio_name", "mp3", "target")


@dataclass(frozen=True)
class ClipRecord:
    """One clip to be written: its id, its audio and the names of its classes."""

    clip_id: str
    audio: bytes | np.ndarray
    """An encoded file's bytes (audio kind ``encoded``), or int16 (samples,) (``pcm16``)."""
    labels: tuple[str, ...] = ()


class ClipStore:
    """Reads clips, targets and ids of one clip store, by row number; ``rows`` finds a row by clip id.

    The file is opened on first use in each process. A store can be pickled and survives a fork. What there is for every
    clip besides its audio is memory-mapped, so that processes share it; audio is read at its offset. Also reads the HDF5
    layout of PaSST and EfficientAT (``audio_name``, ``mp3``, ``target``).
    """

    def __init__(self, path: Path, class_names: tuple[str, ...] | None):
        self._path = path
        self._class_names_given = class_names
        self._opened: _Contents | None = None
        self._process_id: int | None = None

    @classmethod
    def open(cls, path: str | Path, class_names: Sequence[str] | None = None) -> "ClipStore":
        """The store at ``path``, checked as far as that is cheap.

        ``class_names`` are those that the targets must have. They are needed for a file in the layout of PaSST and
        EfficientAT, which does not hold them, unless a ``class_labels_indices.csv`` lies beside it.

        Raises ValueError, with the path, if the file is missing, truncated, no clip store or of another class list, or if
        ids, targets or offsets are not those that were written (``verify_audio`` tells that of a clip's audio).
        """
        store = cls(Path(path), None if class_names is None else check_class_names(class_names))
        store._contents.check()
        return store

    def __getstate__(self) -> dict:
        return {"path": self._path, "class_names": self._class_names_given}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"], state["class_names"])

    def __repr__(self) -> str:
        return f"ClipStore({str(self.path)!r}, {len(self)} clips, {len(self.class_names)} classes)"

    @property
    def _contents(self) -> "_Contents":
        # An HDF5 handle inherited by a forked process shares its file position with the parent's: never use it.
        if self._opened is None or self._process_id != os.getpid():
            self._opened = _open_contents(self._path, self._class_names_given)
            self._process_id = os.getpid()
        return self._opened

    def __len__(self) -> int:
        return len(self._contents.ids)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def class_names(self) -> tuple[str, ...]:
        return self._contents.class_names

    @property
    def audio_kind(self) -> str:
        """``encoded`` or ``pcm16``."""
        return self._contents.audio_kind

    @property
    def sample_rate_hz(self) -> int:
        """The rate of every clip; 0 if each clip keeps its own."""
        return self._contents.sample_rate_hz

    @property
    def attributes(self) -> dict[str, str]:
        """Further text attributes, as given when the store was written."""
        return dict(self._contents.attributes)

    # -- Ids and targets

    def clip_id(self, row: int) -> str:
        """The id of one clip."""
        return bytes(self._contents.ids[row]).decode("utf-8", errors="replace")

    @property
    def clip_ids(self) -> list[str]:
        """All ids in row order. Made anew on each call: O(n) time and memory."""
        return decode_ids(self._contents.ids)

    def find(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); -1 for an id that is not there."""
        return find_ids(self._contents.ids, self._contents.order, clip_ids)

    @property
    def encoded_clip_ids(self) -> np.ndarray:
        """All ids in row order as they are stored, S<longest> (n,), memory-mapped."""
        return self._contents.ids

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); ValueError that names the ids that are not there."""
        return all_found(self.find(clip_ids), clip_ids, self.path)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): 1.0 where the clip has the class."""
        bits = np.unpackbits(self._contents.packed_targets(np.asarray(rows, dtype=np.int64)), axis=1)
        classes = len(self.class_names)
        if bits[:, classes:].any():
            raise ValueError(
                f"{self.path} has targets beyond its {classes} class names: the class list is not the file's"
            )
        return bits[:, :classes].astype(np.float32)

    def class_counts(self) -> np.ndarray:
        """int64 (C,): how many clips have each class."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for start in range(0, len(self), ROWS_AT_ONCE):
            counts += self.targets(np.arange(start, min(start + ROWS_AT_ONCE, len(self)))).sum(axis=0).astype(np.int64)
        return counts

    def audio_digests(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 16): BLAKE2b-128 of each clip's stored audio; zeros where the file has none (foreign layout)."""
        return self._contents.audio_digests(np.asarray(rows, dtype=np.int64))

    def verify_audio(self, row: int) -> None:
        """Raises BadClipError if a clip's audio is not what was written, where the file tells (not in the foreign layout)."""
        stored = self.audio_digests([row])
        if stored.any() and not np.array_equal(_audio_digest(self._contents.audio(row)), stored[0]):
            raise self._bad_clip(row, "its audio has changed since it was packed: the file is damaged")

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits over class names, ids, audio and its kind; not over targets and attributes."""
        return self._contents.fingerprint

    def manifest(self, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
        """The manifest beside the store, one row per clip in the same order; None if there is none.

        ``columns`` besides the clip's id are those needed (default: all); labels of millions of clips take gigabytes.

        Raises ValueError if the manifest is of other clips.
        """
        table = read_manifest(self.path, None if columns is None else ["clip_id", *columns])
        if table is None:
            return None
        same, row = len(table) == len(self), 0
        for batch in table.select(["clip_id"]).to_batches(ROWS_AT_ONCE) if same else ():
            same &= batch.column(0).to_pylist() == decode_ids(self._contents.ids[row : row + len(batch)])
            row += len(batch)
        if not same:
            raise ValueError(f"the manifest beside {self.path} lists other clips than the store holds; pack again")
        return table

    # -- Audio

    def encoded(self, row: int) -> bytes:
        """One clip's encoded file. ValueError for a store of PCM."""
        if self.audio_kind != "encoded":
            raise ValueError(f"{self.path} holds {self.audio_kind} samples, not encoded files; use waveform()")
        return self._contents.audio(row).tobytes()

    def duration_seconds(self, row: int) -> float:
        """One clip's length; for encoded audio, what the file's header says."""
        if self.audio_kind == "pcm16":
            return self._contents.audio_length(row) / self.sample_rate_hz
        try:
            return audio_codec.audio_info(self.encoded(row)).duration_seconds
        except ValueError as error:
            raise self._bad_clip(row, error) from error

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform at ``sample_rate_hz``, float32 (samples,).

        ``start_seconds`` and ``seconds`` choose a part, which is shorter where the clip ends earlier (pad with
        ``audio.fit_length``). From PCM only that part is read. Raises BadClipError, a ValueError with the clip's id, for
        audio that cannot be used.
        """
        try:
            if self.audio_kind == "encoded":
                return audio_codec.decode(self.encoded(row), sample_rate_hz, start_seconds, seconds)
            span = audio_codec.span_to_read(start_seconds, seconds, self.sample_rate_hz, sample_rate_hz)
            end = None if span.count is None else span.first + span.count
            start, stop, _ = slice(span.first, end).indices(self._contents.audio_length(row))
            if self._contents.audio_length(row) == 0:
                raise ValueError(audio_codec.EMPTY)
            samples = audio_codec.from_pcm16(self._contents.audio(row, start, stop))
            return span.cut(audio_codec.resample(samples, self.sample_rate_hz, sample_rate_hz))
        except ValueError as error:
            raise self._bad_clip(row, error) from error

    def _bad_clip(self, row: int, reason: object) -> BadClipError:
        return BadClipError(f"clip {self.clip_id(row)!r} of {self.path}: {reason}", str(reason))


def all_found(rows: np.ndarray, clip_ids: Sequence[str], path: Path | str) -> np.ndarray:
    """``rows`` as ``find`` gives them for ``clip_ids``; ValueError that names the ids that are not there."""
    if (rows < 0).any():
        missing = [clip_ids[index] for index in np.flatnonzero(rows < 0)]
        raise ValueError(f"{len(missing)} of {len(rows)} clip ids are not in {path}: {listed(missing)}")
    return rows


# -- What an open file gives, in each layout ---------------------------------------------------------------------------


class _Contents(Protocol):
    class_names: tuple[str, ...]
    audio_kind: str
    sample_rate_hz: int
    attributes: dict[str, str]
    ids: np.ndarray  # (n,) fixed-width UTF-8
    order: np.ndarray  # int64 (n,)
    fingerprint: str

    def packed_targets(self, rows: np.ndarray) -> np.ndarray: ...  # uint8 (k, ceil(C / 8))
    def audio_digests(self, rows: np.ndarray) -> np.ndarray: ...  # uint8 (k, 16)
    def audio_length(self, row: int) -> int: ...  # bytes or samples
    def audio(
        self, row: int, first: int = 0, end: int | None = None
    ) -> np.ndarray: ...  # uint8 or int16 (end - first,)
    def check(self) -> None: ...  # what takes a pass over all clips, done once and not by every worker: ValueError


def _open_contents(path: Path, class_names: tuple[str, ...] | None) -> _Contents:
    with plain_hdf5_errors(path, "clip store"):
        with open_hdf5(path) as file:
            kind = string_attribute(file, "format")
            if kind == FORMAT:
                return _NativeContents(file, class_names)
            foreign = kind is None and all(name in file for name in FOREIGN_DATASETS)
            found = f"its format is {brief(kind)}" if kind else f"it holds {brief(sorted(file), 200)}"
        if foreign:
            return _ForeignContents(path, class_names)
    raise ValueError(
        f"{path} is HDF5 but not a clip store: {found}; expected a file written by `kd pack`, or one with the datasets "
        f"{list(FOREIGN_DATASETS)} as PaSST and EfficientAT use them"
    )


class _NativeContents:
    """Our own layout. The HDF5 file is closed after opening."""

    def __init__(self, file: h5py.File, class_names: tuple[str, ...] | None):
        path = file.filename
        version = int(file.attrs["format_version"])
        if version not in READABLE_VERSIONS:
            raise ValueError(f"{path} has clip store version {brief(version)}; this program reads {READABLE_VERSIONS}")
        try:
            self.class_names = check_class_names(json.loads(string_attribute(file, "class_names") or "[]"))
        except ValueError as error:
            raise ValueError(f"{path} is a damaged clip store: its class names cannot be read: {error}") from error
        if class_names is not None:
            difference = class_list_difference(self.class_names, class_names)
            if difference:
                raise ValueError(f"{path} has another class list than the one asked for: {difference}")
        self.audio_kind = string_attribute(file, "audio_kind")
        if self.audio_kind not in AUDIO_KINDS:
            raise ValueError(f"{path} has audio kind {brief(self.audio_kind)}; known: {sorted(AUDIO_KINDS)}")
        self.sample_rate_hz = int(file.attrs["sample_rate_hz"])
        self._path = path
        self._index_digest = string_attribute(file, INDEX_DIGEST)
        if self._index_digest is None and (version > 1 or INDEX_DIGEST in file.attrs):
            raise ValueError(f"{path} is a damaged clip store: it has no {INDEX_DIGEST}")
        own = {"format", "format_version", "class_names", "audio_kind", "sample_rate_hz", INDEX_DIGEST}
        self.attributes = {name: string_attribute(file, name) for name in file.attrs if name not in own}

        self.ids = map_array(file, "clip_id")
        self.order = map_array(file, "clip_id_order")
        self._offsets = map_array(file, "offset")
        self._audio = FileRows(Path(path), dataset_of(file, "audio"))
        self._targets = map_array(file, "target")
        self._digests = map_array(file, "audio_digest")
        clips, packed = len(self.ids), _packed_bytes(len(self.class_names))
        expected = {
            "clip_id": (self.ids, (clips,), "S"),
            "clip_id_order": (self.order, (clips,), "i"),
            "offset": (self._offsets, (clips + 1,), "i"),
            "audio": (self._audio, (math.prod(self._audio.shape),), AUDIO_KINDS[self.audio_kind].kind),
            "target": (self._targets, (clips, packed), "u"),
            "audio_digest": (self._digests, (clips, DIGEST_BYTES), "u"),
        }
        for name, (array, shape, kind) in expected.items():
            if array.shape != shape or array.dtype.kind != kind:
                raise ValueError(
                    f"{path} is a damaged clip store: {name} is {array.dtype} {array.shape}, expected kind {kind} {shape}"
                )

    def check(self) -> None:
        whole = self._offsets[0] == 0 and self._offsets[-1] == len(self._audio)
        if not whole or (np.diff(self._offsets) < 0).any():
            raise ValueError(f"{self._path} is a damaged clip store: its offsets do not match its audio")
        settings = (self.class_names, self.audio_kind, self.sample_rate_hz)
        arrays = (self.ids, self.order, self._offsets, self._targets, self._digests)
        if self._index_digest is not None and self._index_digest != _digest_of_index(*settings, *arrays):
            raise ValueError(f"{self._path} is a damaged clip store: its ids, targets or offsets have changed")

    def packed_targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows]

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return self._digests[rows]

    def audio_length(self, row: int) -> int:
        row = range(len(self.ids))[row]  # IndexError beyond the end, and negative rows count from it
        return int(self._offsets[row + 1] - self._offsets[row])

    def audio(self, row: int, first: int = 0, end: int | None = None) -> np.ndarray:
        length = self.audio_length(row)
        first, end, _ = slice(first, end).indices(length)
        return self._audio.read_run(int(self._offsets[row % len(self.ids)]) + first, max(0, end - first))

    @property
    def audio_lengths(self) -> np.ndarray:
        """int64 (n,): bytes or samples of each clip."""
        return np.diff(self._offsets)

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self, self._digests)


class _ForeignContents:
    """The layout of PaSST and EfficientAT: ``audio_name`` S<width>, ``mp3`` bytes of varying length, ``target`` bits."""

    def __init__(self, path: Path, class_names: tuple[str, ...] | None):
        self.class_names = _foreign_class_names(path, class_names)
        self.audio_kind = "encoded"
        self.sample_rate_hz = 0
        self.attributes = {}
        # Kept open as long as this process uses it: arrays in chunks can only be read through HDF5.
        self._file = h5py.File(path, "r", locking=False)
        mp3, target = self._file["mp3"], self._file["target"]
        clips = len(mp3)
        packed = _packed_bytes(len(self.class_names))
        if target.shape != (clips, packed) or target.dtype != np.uint8:
            raise ValueError(
                f"{path}: target is {target.dtype} {target.shape}; expected packed bits for {clips} clips and "
                f"{len(self.class_names)} classes, uint8 {(clips, packed)}"
            )
        if h5py.check_vlen_dtype(mp3.dtype) != np.uint8:
            raise ValueError(f"{path}: mp3 is {mp3.dtype}; expected uint8 of varying length")
        self._mp3 = BytesOfVaryingLength(path, mp3) if BytesOfVaryingLength.lies_plain(mp3) else mp3
        self._targets = map_array(self._file, "target") if is_mappable(target) else target
        self._path = path
        self.ids = _foreign_ids(self._file)
        if self.ids.shape != (clips,) or self.ids.dtype.kind != "S":
            raise ValueError(
                f"{path}: audio_name is {self.ids.dtype} {self.ids.shape}; expected a name for {clips} clips"
            )

    def check(self) -> None:
        in_order = self.ids[self.order]
        repeated = np.unique(in_order[1:][in_order[1:] == in_order[:-1]])
        if len(repeated):
            raise ValueError(
                f"{self._path}: audio_name must hold each name once; found again: {listed(decode_ids(repeated))}"
            )

    @cached_property
    def order(self) -> np.ndarray:
        return id_order(self.ids)

    def packed_targets(self, rows: np.ndarray) -> np.ndarray:
        if isinstance(self._targets, np.ndarray):
            return self._targets[rows]
        # HDF5 wants rows in ascending order, each once.
        unique, inverse = np.unique(np.arange(len(self.ids))[rows], return_inverse=True)
        return self._targets[unique][inverse]

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return np.zeros((len(rows), DIGEST_BYTES), dtype=np.uint8)

    def audio_length(self, row: int) -> int:
        return len(self.audio(row))

    def audio(self, row: int, first: int = 0, end: int | None = None) -> np.ndarray:
        row = range(len(self.ids))[row]
        try:
            return self._mp3[row][first:end]
        except (OSError, RuntimeError) as error:
            raise ValueError(f"its bytes cannot be read from the file: {error}") from error

    @cached_property
    def fingerprint(self) -> str:
        return _fingerprint(self, np.empty((0, DIGEST_BYTES), dtype=np.uint8))


def _foreign_class_names(path: Path, class_names: tuple[str, ...] | None) -> tuple[str, ...]:
    beside = path.with_name("class_labels_indices.csv")
    if class_names is not None:
        return class_names
    if beside.exists():
        return read_class_names(beside)
    raise ValueError(
        f"{path} (layout of PaSST and EfficientAT) does not hold its class names: give a class list, or put AudioSet's "
        f"{beside.name} beside it"
    )


def _foreign_ids(file: h5py.File) -> np.ndarray:
    names = file["audio_name"]
    if names.dtype.kind == "S" and is_mappable(names):
        return map_array(file, "audio_name")
    return np.array([name if isinstance(name, bytes) else str(name).encode("utf-8") for name in names[:]])


def _fingerprint(contents: _Contents, digests: np.ndarray) -> str:
    names = json.dumps(contents.class_names, ensure_ascii=False)
    kind = f"{contents.audio_kind} {contents.sample_rate_hz} {contents.ids.dtype.itemsize}"
    return digest_of(names, kind, np.ascontiguousarray(contents.ids).tobytes(), np.ascontiguousarray(digests).tobytes())


def _audio_digest(audio: np.ndarray) -> np.ndarray:
    """uint8 (16,): hash of a clip's stored audio."""
    return np.frombuffer(hashlib.blake2b(audio, digest_size=DIGEST_BYTES).digest(), np.uint8)


def _digest_of_index(class_names: Sequence[str], audio_kind: str, sample_rate_hz: int, *arrays: np.ndarray) -> str:
    """32 hexadecimal digits over everything that a clip store holds besides its audio and further attributes."""
    state = hashlib.blake2b(json.dumps([class_names, audio_kind, int(sample_rate_hz)]).encode(), digest_size=16)
    for array in arrays:
        state.update(f"{array.dtype} {array.shape}".encode())
        state.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))  # no copy of what is mapped
    return state.hexdigest()


def _packed_bytes(classes: int) -> int:
    return -(-classes // 8)


# -- Writing -----------------------------------------------------------------------------------------------------------


def write_clip_store(
    path: str | Path,
    clips: Iterable[ClipRecord],
    class_names: Sequence[str],
    *,
    audio_kind: str = "encoded",
    sample_rate_hz: int = 0,
    attributes: Mapping[str, str] | None = None,
) -> None:
    """Writes a clip store aside and renames it into place. All clips are held in memory: meant for shards and small sets.

    ``sample_rate_hz`` 0 says that each encoded clip keeps its own rate; PCM needs a rate. ``attributes`` are further
    texts to keep with the store. Equal input gives equal bytes.

    Raises ValueError for ids that repeat, labels that are no class, or audio of another kind than ``audio_kind``.
    """
    names = _check_settings(class_names, audio_kind, sample_rate_hz)
    index_of = {name: index for index, name in enumerate(names)}
    clips = list(clips)
    dtype = AUDIO_KINDS[audio_kind]
    targets = np.zeros((len(clips), len(names)), dtype=bool)
    blocks: list[np.ndarray] = []
    for row, clip in enumerate(clips):
        unknown = [label for label in clip.labels if label not in index_of]
        if unknown:
            raise ValueError(f"clip {clip.clip_id!r} has labels that are not in the class list: {listed(unknown)}")
        targets[row, [index_of[label] for label in clip.labels]] = True
        if isinstance(clip.audio, bytes) != (audio_kind == "encoded"):
            raise ValueError(f"clip {clip.clip_id!r}: {audio_kind} audio expected; found {type(clip.audio).__name__}")
        block = np.frombuffer(clip.audio, dtype) if isinstance(clip.audio, bytes) else np.asarray(clip.audio)
        if block.ndim != 1 or block.dtype != dtype:
            raise ValueError(f"clip {clip.clip_id!r}: {dtype} (samples,) expected; found {block.dtype} {block.shape}")
        blocks.append(block)
    lengths = np.array([len(block) for block in blocks], dtype=np.int64)
    digests = [_audio_digest(block) for block in blocks]
    with written_aside(Path(path)) as aside, create_hdf5(aside) as file:
        _write_attributes(file, names, audio_kind, sample_rate_hz, attributes or {})
        audio = _write_arrays(
            file,
            ids=encode_ids(clip.clip_id for clip in clips),
            lengths=lengths,
            targets=np.packbits(targets, axis=1),
            digests=np.array(digests, dtype=np.uint8).reshape(len(clips), DIGEST_BYTES),
            audio_dtype=dtype,
        )
        start = 0
        for block in _merged(blocks, BYTES_AT_ONCE):
            audio[start : start + len(block)] = block
            start += len(block)


def _merged(blocks: Sequence[np.ndarray], bytes_at_once: int) -> Iterator[np.ndarray]:
    """The same in few long arrays: HDF5 takes longer to begin writing a short clip than to write it."""
    group: list[np.ndarray] = []
    size = 0
    for block in blocks:
        group.append(block)
        size += block.nbytes
        if size >= bytes_at_once:
            yield np.concatenate(group)
            group, size = [], 0
    if group:
        yield np.concatenate(group)


def concatenate(
    stores: Sequence[str | Path],
    path: str | Path,
    *,
    attributes: Mapping[str, str] | None = None,
    report: Callable[[int], None] = lambda clips: None,
) -> None:
    """Writes the clips of several stores into one, in order. Audio is copied in blocks: memory does not grow with it.

    ``report`` is called with the number of clips just copied. Raises ValueError if the stores differ in class list, audio
    kind or rate, or share a clip id.
    """
    if not stores:
        raise ValueError("no stores to concatenate")
    first = ClipStore.open(stores[0])
    ids, lengths, targets, digests = [], [], [], []
    for part in stores:
        store = ClipStore.open(part, first.class_names)
        if (store.audio_kind, store.sample_rate_hz) != (first.audio_kind, first.sample_rate_hz):
            raise ValueError(
                f"{part} holds {store.audio_kind} at {store.sample_rate_hz} Hz, and {stores[0]} {first.audio_kind} at "
                f"{first.sample_rate_hz} Hz"
            )
        contents = store._contents
        if not isinstance(contents, _NativeContents):
            raise ValueError(
                f"{part} is in the layout of PaSST and EfficientAT; only our own stores can be concatenated"
            )
        every = np.arange(len(store))
        ids.append(store.encoded_clip_ids)
        lengths.append(contents.audio_lengths)
        targets.append(contents.packed_targets(every))
        digests.append(contents.audio_digests(every))
    with written_aside(Path(path)) as aside, create_hdf5(aside) as file:
        _write_attributes(file, first.class_names, first.audio_kind, first.sample_rate_hz, attributes or {})
        audio = _write_arrays(
            file,
            ids=encode_ids(np.concatenate(ids)),
            lengths=np.concatenate(lengths),
            targets=np.concatenate(targets),
            digests=np.concatenate(digests),
            audio_dtype=AUDIO_KINDS[first.audio_kind],
        )
        start = 0
        for part in stores:
            with open_hdf5(Path(part)) as shard:
                block = map_array(shard, "audio")
                clips = len(shard["clip_id"])
            step = BYTES_AT_ONCE // block.itemsize
            for position in range(0, len(block), step):
                piece = block[position : position + step]
                audio[start : start + len(piece)] = piece
                start += len(piece)
            report(clips)


def _check_settings(class_names: Sequence[str], audio_kind: str, sample_rate_hz: int) -> tuple[str, ...]:
    names = check_class_names(class_names)
    if len(json.dumps(names, ensure_ascii=False).encode()) > LARGEST_CLASS_LIST_BYTES:
        raise ValueError(f"the class list is too long: its names may take {LARGEST_CLASS_LIST_BYTES} bytes")
    if audio_kind not in AUDIO_KINDS:
        raise ValueError(f"audio_kind must be one of {sorted(AUDIO_KINDS)}; found {audio_kind!r}")
    if sample_rate_hz < 0 or (audio_kind == "pcm16" and sample_rate_hz == 0):
        raise ValueError(f"pcm16 needs a sample rate in Hz, and none is negative; found {sample_rate_hz}")
    return names


def _write_attributes(
    file: ArrayFile, names: tuple[str, ...], audio_kind: str, sample_rate_hz: int, attributes: Mapping[str, str]
) -> None:
    file.attrs["format"] = FORMAT
    file.attrs["format_version"] = FORMAT_VERSION
    file.attrs["class_names"] = json.dumps(names, ensure_ascii=False)
    file.attrs["audio_kind"] = audio_kind
    file.attrs["sample_rate_hz"] = sample_rate_hz
    for name, value in attributes.items():
        file.attrs[name] = value


def _write_arrays(
    file: ArrayFile,
    *,
    ids: np.ndarray,
    lengths: np.ndarray,
    targets: np.ndarray,
    digests: np.ndarray,
    audio_dtype: np.dtype,
) -> ArrayWriter:
    """Writes all arrays but the audio, whose dataset it returns to be filled."""
    offsets = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(lengths, dtype=np.int64)])
    index = {
        "clip_id": ids,
        "clip_id_order": id_order(ids),
        "offset": offsets,
        "target": targets,
        "audio_digest": digests,
    }
    for name, array in index.items():
        file[name] = array
    settings = (json.loads(file.attrs["class_names"]), file.attrs["audio_kind"], file.attrs["sample_rate_hz"])
    file.attrs[INDEX_DIGEST] = _digest_of_index(*settings, *index.values())
    return file.create_dataset("audio", shape=(int(offsets[-1]),), dtype=audio_dtype)
