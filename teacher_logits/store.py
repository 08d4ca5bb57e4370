"""The logit store: one teacher's logits of every clip, on disk, looked up by clip id.

An HDF5 file of plain arrays. No HDF5 handle stays open, so a store can be forked and pickled safely. Ids are looked up by
binary search in a memory-mapped array, so data-loading workers need no table of all ids. docs/logit_store.md describes
the format.

Shapes: n clips, C classes.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from audio_datasets.audio.heard import LONGEST_CLIP_SECONDS
from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.stores.clip_ids import ClipIds
from audio_datasets.stores.hdf5_arrays import (
    create_hdf5,
    decode_ids,
    encode_ids,
    id_order,
    map_arrays,
    open_hdf5,
    plain_hdf5_errors,
    string_attribute,
)
from audio_datasets.system.files import parse_json, written_aside
from audio_datasets.system.messages import brief, listed
from teacher_logits.stores.links import TeacherLink
from teacher_logits.stores.rows import RowReader, create_rows, open_rows

FORMAT = "kd-logit-store"
FORMAT_VERSION = 2
READABLE_VERSIONS = (1, 2)
DIGEST_BYTES = 16  # BLAKE2b-128 of a clip's stored audio; all zeros if unknown
LARGEST_LOGIT = float(np.finfo(np.float16).max)

ROWS_PER_BLOCK = 4096


def to_float16(logits: np.ndarray, clip_ids: Sequence[str]) -> np.ndarray:
    """Logits (k, C) in the stored precision.

    Raises ValueError, with the clip's id, for a value that is not finite or too large for float16. Clamping it
    would silently give a wrong target.
    """
    bad = ~(np.abs(logits) <= LARGEST_LOGIT)  # also true for NaN
    if bad.any():
        row = int(np.flatnonzero(bad.any(axis=1))[0])
        value = logits[row][bad[row]][0]
        raise ValueError(
            f"the teacher's logits for clip {clip_ids[row]!r} cannot be stored: found {value}; "
            f"finite values up to ±{LARGEST_LOGIT:.0f} are allowed"
        )
    return logits.astype(np.float16)


def write_logit_store(
    path: Path,
    *,
    clip_ids: Sequence[str] | np.ndarray,
    audio_digests: np.ndarray,
    logit_blocks: Iterable[np.ndarray],
    class_names: Sequence[str],
    teacher: dict[str, Any],
    clip_store_fingerprint: str,
    keep: int | None = None,
) -> None:
    """Writes a logit store under a temporary name and renames it to ``path``. The same content always gives the same bytes.

    ``logit_blocks`` are float16 arrays (any number of rows, C) in the order of ``clip_ids``, with one row per clip, or one per
    view if ``teacher["views"]`` is set. Only two blocks are in memory at a time. ``clip_ids`` may be the encoded ids of another
    store. ``audio_digests`` is uint8 (n, 16). ``teacher`` is anything that JSON can represent. With ``keep``, only this many of
    the largest logits of each row are stored, and the others become a floor, one per class (see ``stores/rows.py``).

    Raises ValueError for an id that occurs twice or contains a NUL character, for no clips at all, and for a ``keep`` that is
    not less than the number of classes.
    """
    path = Path(path)
    count, num_classes = len(clip_ids), len(class_names)
    views = views_of(teacher)
    num_rows = count * (views.views if views else 1)
    if count == 0:
        raise ValueError(f"a logit store needs at least one clip; {path} would have none")
    identifiers = encode_ids(clip_ids)
    digests = np.ascontiguousarray(audio_digests, dtype=np.uint8)
    assert digests.shape == (count, DIGEST_BYTES), digests.shape

    description = _as_text(class_names, teacher, clip_store_fingerprint)
    state = _hash_without_logits(description, identifiers, digests)
    with written_aside(path) as aside, create_hdf5(aside) as file:
        file.create_dataset("clip_id", data=identifiers)
        file.create_dataset("clip_id_order", data=id_order(identifiers))
        file.create_dataset("audio_digest", data=digests)
        rows = create_rows(file, num_rows, num_classes, keep)
        # A block is hashed while the next one is written.
        with ThreadPoolExecutor(1) as hasher:
            hashed = hasher.submit(lambda: None)
            for block in logit_blocks:
                assert block.dtype == np.float16, block.dtype
                assert block.shape[1] == num_classes, (block.shape, num_classes)
                stored = rows.write(block)
                hashed.result()
                hashed = hasher.submit(state.update, _as_bytes(stored))
        state.update(_as_bytes(rows.finish()))
        file.attrs["format"] = FORMAT
        file.attrs["format_version"] = FORMAT_VERSION
        for name, text in description.items():
            file.attrs[name] = text
        file.attrs["fingerprint"] = state.hexdigest()


class LogitStore:
    """One teacher's logits, read by clip id. Create it with ``LogitStore.open``.

    Forked and spawned workers can use the same object: maps are read-only, rows are read at explicit offsets (forked
    processes would share the file's position), and a pickled store reopens its file on first use.

    Attributes:
        path: the file.
        class_names: what the C columns mean.
        teacher: the teacher's name, fingerprint, front end and so on, as written by ``precompute.py``.
        views: settings of the views that the teacher heard; None if it heard the clips themselves.
        num_views: rows of logits for each clip: its number of views, or 1.
        keep: number of logits that are kept in each row, the others being read as a floor; None if all are kept.
        link: what turns logits into probabilities (``teacher["link"]``); None in stores that do not record it.
        clip_store_fingerprint: fingerprint of the clip store that the teacher heard.
        fingerprint: hash of everything stored here, including logits (``read_fingerprint`` recomputes it).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays: dict[str, np.ndarray] = {}
        self._logits: RowReader | None = None
        self._ids: ClipIds | None = None
        with plain_hdf5_errors(path, "logit store"), open_hdf5(path) as file:
            self._check_format(file)
            self.class_names = check_class_names(self._json(file, "class_names", list))
            self.teacher: dict[str, Any] = self._json(file, "teacher", dict)
            self._check_clip_seconds()
            self.views = self._views()
            self.num_views = self.views.views if self.views else 1
            self.link = self._link()
            self.clip_store_fingerprint = self._text(file, "clip_store_fingerprint")
            self.fingerprint = self._text(file, "fingerprint")
            self._map(file)

    @classmethod
    def open(cls, path: str | Path) -> "LogitStore":
        """The store in ``path``. Reads only the description; logits are read on demand.

        Raises ValueError that names the path for a missing or truncated file and for a file of another kind.
        """
        return cls(Path(path))

    def __len__(self) -> int:
        return len(self.encoded_clip_ids)

    def __repr__(self) -> str:
        return f"LogitStore({str(self.path)!r}: {len(self)} clips, {len(self.class_names)} classes)"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_arrays": {}, "_logits": None, "_ids": None}

    def _check_format(self, file: h5py.File) -> None:
        found = string_attribute(file, "format")
        if found != FORMAT:
            raise ValueError(
                f"{self.path} is not a logit store: its format must be {FORMAT!r}; found {brief(found)} "
                "(kd teach writes logit stores)"
            )
        version = file.attrs.get("format_version")
        if version not in READABLE_VERSIONS:
            raise ValueError(
                f"{self.path} has version {brief(version)} of the logit store format; this program reads versions "
                f"{' and '.join(map(str, READABLE_VERSIONS))}"
            )

    def _text(self, file: h5py.File, name: str) -> str:
        text = string_attribute(file, name)
        if text is None:
            raise ValueError(f"{self.path} is a damaged logit store: it has no attribute {name!r}")
        return text

    def _json(self, file: h5py.File, name: str, kind: type) -> Any:
        try:
            content = parse_json(self._text(file, name))
        except ValueError as error:
            raise ValueError(f"{self.path} is a damaged logit store: its {name} is not JSON: {error}") from error
        if not isinstance(content, kind):
            raise ValueError(f"{self.path} is a damaged logit store: its {name} is not a {kind.__name__}")
        return content

    def _views(self) -> ViewConfig | None:
        try:
            return views_of(self.teacher)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path} is a damaged logit store: the settings of its teacher's views are invalid: {error}"
            ) from error

    def _check_clip_seconds(self) -> None:
        seconds = self.teacher.get("clip_seconds", 1)
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not 0 < seconds <= LONGEST_CLIP_SECONDS:
            raise ValueError(
                f"{self.path} is a damaged logit store: its teacher's clip_seconds must be a number above 0 and at most "
                f"{LONGEST_CLIP_SECONDS:,}; found {brief(seconds)}"
            )

    def _link(self) -> TeacherLink | None:
        if "link" not in self.teacher:
            return None
        try:
            return TeacherLink.from_json(self.teacher["link"], len(self.class_names))
        except ValueError as error:
            raise ValueError(f"{self.path} is a damaged logit store: {error}") from error

    def _map(self, file: h5py.File) -> None:
        """Maps the arrays for looking up ids, opens the logits, and checks types and shapes."""
        arrays = map_arrays(file, ("clip_id", "clip_id_order", "audio_digest"))
        # Version 1 was always dense and did not say so.
        storage = "dense" if file.attrs["format_version"] == 1 else self._text(file, "storage")
        logits = open_rows(self.path, file, storage)
        count = len(arrays["clip_id"])
        needed = {
            "clip_id": (arrays["clip_id"], "S", (count,)),
            "clip_id_order": (arrays["clip_id_order"], "i", (count,)),
            "audio_digest": (arrays["audio_digest"], "u", (count, DIGEST_BYTES)),
        }
        for name, (found, kind, shape) in needed.items():
            if found.dtype.kind != kind or found.shape != shape:
                raise ValueError(
                    f"{self.path} is a damaged logit store: {name} must have type {kind!r} and shape {shape}; "
                    f"found {found.dtype} and {found.shape}"
                )
        expected = (count * self.num_views, len(self.class_names))
        if logits.shape != expected:
            raise ValueError(
                f"{self.path} is a damaged logit store: logits for {count} clips, {self.num_views} views and "
                f"{len(self.class_names)} class names must have shape {expected}; found {logits.shape}"
            )
        self.keep = logits.keep
        self._arrays, self._logits = arrays, logits
        self._ids = ClipIds(arrays["clip_id"], arrays["clip_id_order"])

    def _opened(self) -> "LogitStore":
        """Returns the store itself, with its file open. After unpickling, the first call reopens it."""
        if self._logits is None:
            with open_hdf5(self.path) as file:
                if string_attribute(file, "fingerprint") != self.fingerprint:
                    raise ValueError(f"{self.path} was replaced after it was opened; open it again")
                self._map(file)
        return self

    @property
    def clip_ids(self) -> list[str]:
        """All ids in the order of the rows. Rebuilt on every call (about 70 bytes per clip), so not for workers."""
        return decode_ids(self.encoded_clip_ids)

    @property
    def encoded_clip_ids(self) -> np.ndarray:
        """All ids as they are stored, S<longest> (n,), memory-mapped."""
        return self._opened()._arrays["clip_id"]

    @property
    def clip_id_order(self) -> np.ndarray:
        """int64 (n,): the rows in ascending order of their ids, memory-mapped."""
        return self._opened()._arrays["clip_id_order"]

    def clip_id(self, row: int) -> str:
        """The id of one row."""
        return bytes(self.encoded_clip_ids[row]).decode()

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers int64 (k,) of the ids; -1 for ids that the store does not have in any spelling (``stores.clip_ids``)."""
        try:
            return self._opened()._ids.find(ids)
        except ValueError as error:
            raise ValueError(
                f"{self.path} is a damaged logit store: its order of clip ids is invalid: {error}"
            ) from error

    def read_rows(self, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 (k, C) of the given row numbers: of one view for each row, or the mean over all views."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"rows must be from 0 to {len(self) - 1}; found {rows.min()} to {rows.max()}")
        logits = self._opened()._logits
        if views is not None:
            views = np.asarray(views, dtype=np.int64)
            if len(views) and (views.min() < 0 or views.max() >= self.num_views):
                raise ValueError(f"views must be from 0 to {self.num_views - 1}; found {views.min()} to {views.max()}")
            return logits.read(rows * self.num_views + views).astype(np.float32)
        every_view = (rows[:, None] * self.num_views + np.arange(self.num_views)).ravel()
        read = logits.read(every_view).astype(np.float32)
        return read if self.num_views == 1 else read.reshape(len(rows), self.num_views, -1).mean(axis=1)

    def read(self, ids: Sequence[str], views: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 (k, C) of the clips with these ids, in this order: of one view for each, or the mean over all views.

        Raises ValueError for ids that the store does not have; the message names the first ones.
        """
        rows = self.rows(ids)
        missing = [identifier for identifier, row in zip(ids, rows, strict=True) if row < 0]
        if missing:
            raise ValueError(f"{self.path} has no logits for {len(missing)} of {len(ids)} clips: {listed(missing)}")
        return self.read_rows(rows, views)

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (k, 16): hash of the stored audio that the teacher heard; zeros if unknown."""
        return self._opened()._arrays["audio_digest"][rows]

    def blocks(self, rows_per_block: int = ROWS_PER_BLOCK) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Iterates over the store: (row numbers int64 (k,), logits float16 (k, C)), with one row for each view of a clip."""
        views = self.num_views
        for start in range(0, len(self), rows_per_block):
            rows = np.arange(start, min(start + rows_per_block, len(self)))
            yield np.repeat(rows, views), self._opened()._logits.read_run(start * views, len(rows) * views)

    def read_fingerprint(self) -> str:
        """``fingerprint`` recomputed from the file's current content; differs if any byte has changed."""
        description = _as_text(self.class_names, self.teacher, self.clip_store_fingerprint)
        state = _hash_without_logits(description, self.encoded_clip_ids, self._opened()._arrays["audio_digest"])
        for stored in self._opened()._logits.stored_bytes(ROWS_PER_BLOCK):
            state.update(_as_bytes(stored))
        return state.hexdigest()


def views_of(teacher: dict[str, Any]) -> ViewConfig | None:
    """The views in a stored description of a teacher; None if there are none.

    Raises ValueError or TypeError for a damaged description.
    """
    if "views" not in teacher:
        return None
    views = ViewConfig(**teacher["views"])
    if views.views < 1:
        raise ValueError(f"the number of views must be at least 1; found {views.views}")
    return views


def _as_text(class_names: Sequence[str], teacher: dict[str, Any], clip_store_fingerprint: str) -> dict[str, str]:
    """The attributes that describe a store."""
    return {
        "class_names": json.dumps(list(class_names), ensure_ascii=False),
        "teacher": json.dumps(teacher, ensure_ascii=False, sort_keys=True),
        "clip_store_fingerprint": clip_store_fingerprint,
    }


def _hash_without_logits(description: dict[str, str], identifiers: np.ndarray, digests: np.ndarray) -> "blake2b":
    """Hash of everything except the logits, to be updated with their bytes."""
    state = blake2b(digest_size=16)
    for text in description.values():
        data = text.encode()
        state.update(len(data).to_bytes(8, "little") + data)
    state.update(_as_bytes(identifiers))
    state.update(_as_bytes(digests))
    return state


def _as_bytes(array: np.ndarray) -> np.ndarray:
    """The same memory as plain bytes, because hashlib does not accept arrays of fixed-width text or structures."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)
