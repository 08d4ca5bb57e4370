"""The clip store: many audio clips with their ids and targets in one HDF5 file. The format is described in docs/clip_store.md.

Shapes: n clips, C classes, k requested rows.
"""

import os
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow

from audio_datasets.audio import codec as audio_codec
from audio_datasets.audio.bad_clips import BadClipError
from audio_datasets.audio.resampling import resample, span_to_read
from audio_datasets.stores import passt_layout
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.stores.clip_contents import FORMAT, Contents, NativeContents, audio_digest
from audio_datasets.stores.clip_ids import ClipIds
from audio_datasets.stores.hdf5_arrays import decode_ids, open_hdf5, plain_hdf5_errors, string_attribute
from audio_datasets.stores.manifest import read_manifest
from audio_datasets.system.messages import brief, listed
from audio_datasets.system.paths.contents import State, changed, state_of
from audio_datasets.tasks.label_space import LabelSpace

ROWS_AT_ONCE = 8_192
MOST_LENGTHS = 65_536
"""Clips whose length had to be counted and is remembered."""


@dataclass(frozen=True)
class Version:
    """What tells that a store is the one that was opened first."""

    state: State
    """Of the file, see ``system.paths.contents``."""
    index_digest: str


class ClipStore:
    """Reads clips, targets and ids of one clip store, by row number; ``rows`` finds a row by clip id.

    The file is opened on first use in each process. A store can be pickled and survives a fork. All data except audio are
    memory-mapped, so that processes share them; audio is read at its offset. Also reads the HDF5 layout of PaSST and EfficientAT
    (``audio_name``, ``mp3``, ``target``).
    """

    def __init__(self, path: Path, class_names: tuple[str, ...] | None):
        self._path = path
        self._class_names_given = class_names
        self._opened: Contents | None = None
        self._ids: ClipIds | None = None
        self._process_id: int | None = None
        self._known: Version | None = None
        self._verifies_each = False
        self._open_clip = audio_codec.OpenClip()
        self._counted_seconds: OrderedDict[int, float] = OrderedDict()

    @classmethod
    def open(cls, path: str | Path, class_names: Sequence[str] | None = None) -> "ClipStore":
        """The store at ``path``. Everything that is cheap to check is checked.

        ``class_names`` are the classes that the targets must have. Files in the layout of PaSST and EfficientAT contain no class
        names, so for them ``class_names`` are required unless there is a ``class_labels_indices.csv`` beside the file.

        Raises ValueError, with the path, if the file is missing, truncated, not a clip store or has another class list, or if
        ids, targets or offsets have changed since they were written (``verify_audio`` checks a clip's audio).
        """
        store = cls(Path(path), None if class_names is None else check_class_names(class_names))
        store.contents.check()
        return store

    def __getstate__(self) -> dict:
        return {"path": self._path, "class_names": self._class_names_given, "known": self._known}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["path"], state["class_names"])
        self._known = state["known"]

    def __repr__(self) -> str:
        return f"ClipStore({str(self.path)!r}, {len(self)} clips, {len(self.class_names)} classes)"

    @property
    def contents(self) -> Contents:
        """The open file. Opens it if this process has not done so yet; ValueError if another file is there by now."""
        # An HDF5 handle inherited by a forked process shares its file position with the parent's: never use it.
        if self._opened is None or self._process_id != os.getpid():
            opened, state = _open_contents(self._path, self._class_names_given)
            known = self._known
            # A worker opens the file by its path. An equal copy may lie there, but nothing else.
            if known is not None and state != known.state and opened.index_digest != known.index_digest:
                raise ValueError(changed("the clip store", self._path))
            self._opened, self._known = opened, Version(state, opened.index_digest)
            self._ids = None
            self._process_id = os.getpid()
        return self._opened

    def _check_unchanged(self, row: int | None = None) -> None:
        """Called after something was read: raises ValueError if somebody has written into the file since it was opened.

        A file that was renamed, linked or removed is still the same. From then on each clip that is read is compared with its digest.
        """
        state = self.contents.state_now()
        if state != self._known.state:
            # Inode and digests are those of the open file, whatever lies at its path now.
            if not self.contents.is_still(self._known.index_digest, state[2:4] == self._known.state[2:4]):
                raise ValueError(changed("the clip store", self._path))
            self._known, self._verifies_each = replace(self._known, state=state), True
        if self._verifies_each and row is not None:
            stored = self.contents.audio_digests(np.array([row]))
            if stored.any() and not np.array_equal(audio_digest(self.contents.audio(row)), stored[0]):
                raise ValueError(changed(f"the audio of clip {self.clip_id(row)!r}", self._path))

    def __len__(self) -> int:
        return len(self.contents.ids)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.contents.class_names

    @property
    def label_space(self) -> LabelSpace:
        """The groups of classes; one non-exclusive group unless the file says otherwise."""
        return self.contents.label_space

    @property
    def is_masked(self) -> bool:
        """Whether any label is unknown."""
        return self.contents.is_masked

    @property
    def audio_kind(self) -> str:
        """``encoded`` or ``pcm16``."""
        return self.contents.audio_kind

    @property
    def sample_rate_hz(self) -> int:
        """The rate of every clip; 0 if each clip keeps its own."""
        return self.contents.sample_rate_hz

    @property
    def attributes(self) -> dict[str, str]:
        """Additional text attributes, as given when the store was written."""
        return dict(self.contents.attributes)

    # -- Ids and targets

    def clip_id(self, row: int) -> str:
        """The id of one clip."""
        return bytes(self.contents.ids[row]).decode("utf-8", errors="replace")

    @property
    def clip_ids(self) -> list[str]:
        """All ids in row order. Made anew on each call: O(n) time and memory."""
        return decode_ids(self.contents.ids)

    def find(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); -1 for an id that is not there, in any of its spellings (``stores.clip_ids``)."""
        contents = self.contents
        if self._ids is None:
            self._ids = ClipIds(contents.ids, contents.order)
        return self._ids.find(clip_ids)

    @property
    def encoded_clip_ids(self) -> np.ndarray:
        """All ids in row order as they are stored, S<longest> (n,), memory-mapped."""
        return self.contents.ids

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); ValueError that names the ids that are not there."""
        return all_found(self.find(clip_ids), clip_ids, self.path)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): 1.0 where the clip has the class; meaningless where ``mask`` is false."""
        bits = np.unpackbits(self.contents.packed_targets(np.asarray(rows, dtype=np.int64)), axis=1)
        self._check_unchanged()
        classes = len(self.class_names)
        if bits[:, classes:].any():
            raise ValueError(
                f"{self.path} has targets beyond its {classes} class names: the class list does not belong to the file"
            )
        return bits[:, :classes].astype(np.float32)

    def mask(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool (k, C): true where it is known whether the clip has the class."""
        rows, classes = np.asarray(rows, dtype=np.int64), len(self.class_names)
        if not self.is_masked:
            return np.ones((len(rows), classes), dtype=bool)
        return np.unpackbits(self.contents.packed_mask(rows), axis=1, count=classes).astype(bool)

    def class_counts(self) -> np.ndarray:
        """int64 (C,): how many clips have each class."""
        counts = np.zeros(len(self.class_names), dtype=np.int64)
        for start in range(0, len(self), ROWS_AT_ONCE):
            counts += self.targets(np.arange(start, min(start + ROWS_AT_ONCE, len(self)))).sum(axis=0).astype(np.int64)
        return counts

    def audio_digests(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 16): BLAKE2b-128 of each clip's stored audio; zeros if the file has none (PaSST layout)."""
        return self.contents.audio_digests(np.asarray(rows, dtype=np.int64))

    def verify_audio(self, row: int) -> None:
        """Raises BadClipError if a clip's audio has changed since it was written. Files in the PaSST layout cannot be checked."""
        stored = self.audio_digests([row])
        if stored.any() and not np.array_equal(audio_digest(self.contents.audio(row)), stored[0]):
            raise self._bad_clip(row, "its audio has changed since it was packed: the file is damaged")

    @property
    def fingerprint(self) -> str:
        """Digest of class names, ids, audio and its kind, but not of targets and attributes, 32 hexadecimal digits."""
        return self.contents.fingerprint

    @property
    def content_fingerprint(self) -> str:
        """``fingerprint``; for a file without digests of its audio (PaSST layout) also over the audio of some clips."""
        return self.contents.content_fingerprint

    def manifest(self, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
        """The manifest beside the store, one row per clip in the same order; None if there is none.

        ``columns`` are the columns to read in addition to the clip id (default: all). Labels of millions of clips take gigabytes.

        Raises ValueError if the manifest belongs to other clips.
        """
        table = read_manifest(self.path, None if columns is None else ["clip_id", *columns])
        if table is None:
            return None
        same, row = len(table) == len(self), 0
        for batch in table.select(["clip_id"]).to_batches(ROWS_AT_ONCE) if same else ():
            same &= batch.column(0).to_pylist() == decode_ids(self.contents.ids[row : row + len(batch)])
            row += len(batch)
        if not same:
            raise ValueError(f"the manifest beside {self.path} lists other clips than the store; pack again")
        return table

    # -- Audio

    def encoded(self, row: int) -> bytes:
        """One clip's encoded file. ValueError for a store of PCM."""
        if self.audio_kind != "encoded":
            raise ValueError(f"{self.path} contains {self.audio_kind} samples, not encoded files; use waveform()")
        return self.contents.audio(row).tobytes()

    def duration_seconds(self, row: int) -> float:
        """How many seconds of a clip decode. Where its header cannot be relied on, it is decoded to find out."""
        if self.audio_kind == "pcm16":
            return self.contents.audio_length(row) / self.sample_rate_hz
        if row in self._counted_seconds:
            return self._counted_seconds[row]
        try:
            info = audio_codec.audio_info(self.encoded(row))
        except ValueError as error:
            raise self._bad_clip(row, error) from error
        if info.is_counted:  # not to decode it each time
            self._counted_seconds[row] = info.duration_seconds
            if len(self._counted_seconds) > MOST_LENGTHS:
                self._counted_seconds.popitem(last=False)
        return info.duration_seconds

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform at ``sample_rate_hz``, float32 (samples,).

        ``start_seconds`` and ``seconds`` choose a part, which is shorter where the clip ends earlier (pad with
        ``audio.fit_length``). From PCM only that part is read; parts of one encoded clip are best asked for one after the
        other, which takes one pass. Raises BadClipError, a ValueError with the clip's id, for
        audio that cannot be used.
        """
        try:
            waveform = self._decoded(row, sample_rate_hz, start_seconds, seconds)
        except ValueError as error:
            self._check_unchanged(row)  # not a bad clip, if it was a good one before
            raise self._bad_clip(row, error) from error
        self._check_unchanged(row)
        return waveform

    def _decoded(self, row: int, sample_rate_hz: int, start_seconds: float, seconds: float | None) -> np.ndarray:
        """``waveform``; ValueError for audio that cannot be used."""
        if self.audio_kind == "encoded":
            if seconds is None:
                return audio_codec.decode(self.encoded(row), sample_rate_hz, start_seconds)
            data = partial(self.encoded, row)
            return self._open_clip.part(row, data, sample_rate_hz, start_seconds, seconds)
        span = span_to_read(start_seconds, seconds, self.sample_rate_hz, sample_rate_hz)
        end = None if span.count is None else span.first + span.count
        start, stop, _ = slice(span.first, end).indices(self.contents.audio_length(row))
        if self.contents.audio_length(row) == 0:
            raise ValueError(audio_codec.EMPTY)
        samples = audio_codec.from_pcm16(self.contents.audio(row, start, stop))
        return span.cut(resample(samples, self.sample_rate_hz, sample_rate_hz))

    def _bad_clip(self, row: int, reason: object) -> BadClipError:
        return BadClipError(f"clip {self.clip_id(row)!r} of {self.path}: {reason}", str(reason))


def all_found(rows: np.ndarray, clip_ids: Sequence[str], path: Path | str) -> np.ndarray:
    """Returns ``rows``, the result of ``find`` for ``clip_ids``. ValueError that names ids that were not found."""
    if (rows < 0).any():
        missing = [clip_ids[index] for index in np.flatnonzero(rows < 0)]
        raise ValueError(f"{len(missing)} of {len(rows)} clip ids are not in {path}: {listed(missing)}")
    return rows


def _open_contents(path: Path, class_names: tuple[str, ...] | None) -> tuple[Contents, State]:
    """The file at ``path``, open, and its state. ValueError if it is replaced or changed meanwhile."""
    before = state_of(os.stat(path)) if path.exists() else None
    contents = _contents_of(path, class_names)
    if before is None or state_of(os.stat(path)) != before or contents.state_now() != before:
        raise ValueError(f"{path} is being changed while it is opened; start again when it is complete")
    return contents, before


def _contents_of(path: Path, class_names: tuple[str, ...] | None) -> Contents:
    with plain_hdf5_errors(path, "clip store"):
        with open_hdf5(path) as file:
            kind = string_attribute(file, "format")
            if kind == FORMAT:
                return NativeContents(file, class_names)
            foreign = kind is None and all(name in file for name in passt_layout.DATASETS)
            found = f"its format is {brief(kind)}" if kind else f"it contains {brief(sorted(file), 200)}"
        if foreign:
            return passt_layout.PasstContents(path, class_names)
    raise ValueError(
        f"{path} is HDF5 but not a clip store: {found}; expected a file written by `kd pack`, or one with the datasets "
        f"{list(passt_layout.DATASETS)} as PaSST and EfficientAT use them"
    )
