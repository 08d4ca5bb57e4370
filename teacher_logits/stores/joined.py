"""One teacher's logits of different clips in several stores, read as one store: ``balanced.h5+unbalanced.h5``.

Shapes: n clips in all stores together, C classes, k requested rows or ids.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np

from audio_datasets.audio.views import ViewConfig
from audio_datasets.stores.class_lists import check_same_classes
from audio_datasets.stores.hdf5_arrays import decode_ids
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from teacher_logits.store import LogitStore
from teacher_logits.stores.links import TeacherLink

IDS_AT_ONCE = 65_536


class JoinedLogits:
    """Concatenated stores of one teacher; rows are numbered through all of them. Has the same interface as ``LogitStore``.

    Raises ValueError if the stores do not have the same teacher and classes, or share a clip id.
    """

    def __init__(self, stores: Sequence[LogitStore]) -> None:
        first, *others = stores
        for store in others:
            check_same_classes(first.class_names, store.class_names, str(first.path), str(store.path))
            if first.teacher.get("fingerprint") != store.teacher.get("fingerprint") or first.views != store.views:
                raise ValueError(
                    f"{first.path} and {store.path} are from different teachers and cannot be joined by '+': found "
                    f"{_named(first)} and {_named(store)}. Separate the teachers of an ensemble by spaces"
                )
        if len(links := {store.link for store in stores if store.link is not None}) > 1:
            raise ValueError(
                f"{first.path} and the stores joined to it record different links: {listed(map(str, links))}"
            )
        for one, other in combinations(stores, 2):
            shared = _shared_ids(one, other)
            if shared:
                raise ValueError(f"{one.path} and {other.path} both have logits for {listed(shared)}")
        self.stores = tuple(stores)
        self._first_rows = np.cumsum([0, *map(len, self.stores)])  # (stores + 1,)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __repr__(self) -> str:
        return f"JoinedLogits({self.path}: {len(self)} clips, {len(self.class_names)} classes)"

    @property
    def path(self) -> str:
        """The stores' paths as they are given on the command line."""
        return "+".join(str(store.path) for store in self.stores)

    @property
    def class_names(self) -> tuple[str, ...]:
        """What the C columns mean."""
        return self.stores[0].class_names

    @property
    def teacher(self) -> dict[str, Any]:
        """The teacher's description, as in the first store."""
        return self.stores[0].teacher

    @property
    def link(self) -> TeacherLink | None:
        """What turns logits into probabilities, as the first store that records it says; None if none does."""
        return next((store.link for store in self.stores if store.link is not None), None)

    @property
    def views(self) -> ViewConfig | None:
        """Settings of the views that the teacher heard; None if it heard the clips themselves."""
        return self.stores[0].views

    @property
    def num_views(self) -> int:
        """Rows of logits for each clip."""
        return self.stores[0].num_views

    @property
    def clip_store_fingerprint(self) -> str:
        """The fingerprint of the clip stores that the teacher heard (``JoinedClips.fingerprint`` if there are several)."""
        different = sorted({store.clip_store_fingerprint for store in self.stores})
        return different[0] if len(different) == 1 else digest_of(*different)

    @property
    def fingerprint(self) -> str:
        """Digest of the stores' fingerprints."""
        return digest_of(*(store.fingerprint for store in self.stores))

    def clip_id(self, row: int) -> str:
        """The id of one row."""
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.stores[number].clip_id(row - int(self._first_rows[number]))

    def rows(self, ids: Sequence[str]) -> np.ndarray:
        """Row numbers int64 (k,) of the ids; -1 for ids that no store has."""
        rows = np.full(len(ids), -1, dtype=np.int64)
        for store, first in zip(self.stores, self._first_rows, strict=False):
            found = store.rows(ids)
            rows = np.where(found >= 0, found + first, rows)
        return rows

    def read_rows(self, rows: np.ndarray, views: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 (k, C) of the given row numbers: of one view each, or the mean over all views."""
        result = np.empty((len(rows), len(self.class_names)), np.float32)
        for store, places, its_rows in self._shares(rows):
            result[places] = store.read_rows(its_rows, None if views is None else np.asarray(views)[places])
        return result

    def read(self, ids: Sequence[str], views: np.ndarray | None = None) -> np.ndarray:
        """Logits float32 (k, C) of the clips with these ids; ValueError that names the first ids that are not there."""
        rows = self.rows(ids)
        missing = [identifier for identifier, row in zip(ids, rows, strict=True) if row < 0]
        if missing:
            raise ValueError(f"{self.path} has no logits for {len(missing)} of {len(ids)} clips: {listed(missing)}")
        return self.read_rows(rows, views)

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        """uint8 (k, 16): hash of the stored audio that the teacher heard; zeros if unknown."""
        digests = self.stores[0].audio_digests(np.zeros(len(rows), dtype=np.int64))
        for store, places, its_rows in self._shares(rows):
            digests[places] = store.audio_digests(its_rows)
        return digests

    def _shares(self, rows: np.ndarray) -> list[tuple[LogitStore, np.ndarray, np.ndarray]]:
        """For each store that has some of the rows: the store, their indices in ``rows``, and their row numbers in it."""
        rows = np.asarray(rows, dtype=np.int64)
        if len(rows) and (rows.min() < 0 or rows.max() >= len(self)):
            raise ValueError(f"rows must be from 0 to {len(self) - 1}; found {rows.min()} to {rows.max()}")
        number = np.searchsorted(self._first_rows, rows, side="right") - 1
        places = [np.flatnonzero(number == index) for index in range(len(self.stores))]
        return [
            (store, mine, rows[mine] - first)
            for store, mine, first in zip(self.stores, places, self._first_rows, strict=False)
            if len(mine)
        ]


def _named(store: LogitStore) -> str:
    return f"{store.teacher.get('name')!r} ({str(store.teacher.get('fingerprint'))[:12]}, views {store.num_views})"


def _shared_ids(one: LogitStore, other: LogitStore) -> list[str]:
    """Ids that are in both stores: those of the first block of rows that has any."""
    small, large = sorted((one, other), key=len)
    for start in range(0, len(small), IDS_AT_ONCE):
        ids = decode_ids(small.encoded_clip_ids[start : start + IDS_AT_ONCE])
        shared = np.flatnonzero(large.rows(ids) >= 0)
        if len(shared):
            return [ids[index] for index in shared]
    return []
