"""Several clip stores read as one, without copying them: AudioSet's balanced and unbalanced training sets, for example.

Shapes: n clips in all stores together, C classes, k requested rows.
"""

from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pyarrow

from audio_datasets.stores.class_lists import check_same_classes
from audio_datasets.stores.clip_contents import DIGEST_BYTES
from audio_datasets.stores.clip_store import ROWS_AT_ONCE, ClipStore, all_found
from audio_datasets.system.files import digest_of
from audio_datasets.system.messages import listed
from audio_datasets.tasks.label_space import LabelSpace


class JoinedClips:
    """Concatenated clip stores; rows are numbered through all of them. Has the same interface as ``ClipStore``.

    Create it with ``JoinedClips.open``. Like its stores, it can be pickled and survives a fork, and each process opens a store's
    file on first use.
    """

    def __init__(self, stores: Sequence[ClipStore]) -> None:
        self.stores = tuple(stores)
        self._first_rows = np.cumsum([0, *map(len, self.stores)])  # (stores + 1,)

    @classmethod
    def open(cls, paths: Sequence[str | Path], class_names: Sequence[str] | None = None) -> "JoinedClips":
        """The stores at ``paths``; ``class_names`` as for ``ClipStore.open``.

        Raises ValueError as ``ClipStore.open`` does, and also for class lists or label spaces that differ and for a clip id
        that is in two stores.
        """
        stores = [ClipStore.open(path, class_names) for path in paths]
        if not stores:
            raise ValueError("give at least one clip store; found none")
        for store in stores[1:]:
            check_same_classes(stores[0].class_names, store.class_names, str(stores[0].path), str(store.path))
            if stores[0].label_space != store.label_space:
                raise ValueError(
                    f"{stores[0].path} and {store.path} have the same classes in different label groups "
                    f"({_groups(stores[0])} and {_groups(store)}); pack both with --task, or both without"
                )
        for one, other in combinations(stores, 2):
            shared = _shared_ids(one, other)
            if shared:
                raise ValueError(f"{one.path} and {other.path} both contain the clips {listed(shared)}")
        return cls(stores)

    def __len__(self) -> int:
        return int(self._first_rows[-1])

    def __repr__(self) -> str:
        return f"JoinedClips({self.path}: {len(self)} clips, {len(self.class_names)} classes)"

    @property
    def path(self) -> str:
        """The stores' paths, for messages."""
        return " + ".join(str(store.path) for store in self.stores)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.stores[0].class_names

    @property
    def label_space(self) -> LabelSpace:
        return self.stores[0].label_space

    @property
    def is_masked(self) -> bool:
        """Whether any label is unknown."""
        return any(store.is_masked for store in self.stores)

    @property
    def fingerprint(self) -> str:
        """Digest of the stores' fingerprints, 32 hexadecimal digits. Does not depend on the order of the stores."""
        return digest_of(*sorted(store.fingerprint for store in self.stores))

    @property
    def content_fingerprint(self) -> str:
        """The same of ``ClipStore.content_fingerprint``."""
        return digest_of(*sorted(store.content_fingerprint for store in self.stores))

    # -- Ids and targets

    def clip_id(self, row: int) -> str:
        """The id of one clip."""
        store, row = self._locate(row)
        return store.clip_id(row)

    @property
    def clip_ids(self) -> list[str]:
        """All ids in row order. Made anew on each call: O(n) time and memory."""
        return [clip_id for store in self.stores for clip_id in store.clip_ids]

    def find(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); -1 for an id that no store has."""
        rows = np.full(len(clip_ids), -1, dtype=np.int64)
        for store, first in zip(self.stores, self._first_rows, strict=False):
            found = store.find(clip_ids)
            rows = np.where(found >= 0, found + first, rows)
        return rows

    def rows(self, clip_ids: Sequence[str]) -> np.ndarray:
        """The rows of these clips, int64 (k,); ValueError that names the ids that are not there."""
        return all_found(self.find(clip_ids), clip_ids, self.path)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (k, C): 1.0 where the clip has the class; meaningless where ``mask`` is false."""
        return self._gather(rows, lambda store, part: store.targets(part), len(self.class_names), np.float32)

    def mask(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """bool (k, C): true where it is known whether the clip has the class."""
        return self._gather(rows, lambda store, part: store.mask(part), len(self.class_names), np.bool_)

    def class_counts(self) -> np.ndarray:
        """int64 (C,): how many clips have each class."""
        return np.sum([store.class_counts() for store in self.stores], axis=0)

    def audio_digests(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (k, 16): digest of each clip's stored audio; zeros if its file has none."""
        return self._gather(rows, lambda store, part: store.audio_digests(part), DIGEST_BYTES, np.uint8)

    def manifest(self, columns: Sequence[str] | None = None) -> pyarrow.Table | None:
        """The concatenated manifests of the stores; None if no store has one. ValueError if only some have one."""
        tables = [store.manifest(columns) for store in self.stores]
        without = [str(store.path) for store, table in zip(self.stores, tables, strict=True) if table is None]
        if len(without) == len(tables):
            return None
        if without:
            raise ValueError(f"there is no manifest beside {listed(without)}, but the other stores have one")
        return pyarrow.concat_tables(tables, promote_options="default")

    # -- Audio

    def duration_seconds(self, row: int) -> float:
        """One clip's length."""
        store, row = self._locate(row)
        return store.duration_seconds(row)

    def waveform(
        self, row: int, sample_rate_hz: int, start_seconds: float = 0.0, seconds: float | None = None
    ) -> np.ndarray:
        """One clip as a mono waveform, float32 (samples,); see ``ClipStore.waveform``."""
        store, row = self._locate(row)
        return store.waveform(row, sample_rate_hz, start_seconds, seconds)

    # -- Row numbers

    def _locate(self, row: int) -> tuple[ClipStore, int]:
        """The store that contains a row, and the row's number in it."""
        row = range(len(self))[row]  # IndexError beyond the end, and negative rows count from it
        number = int(np.searchsorted(self._first_rows, row, side="right")) - 1
        return self.stores[number], row - int(self._first_rows[number])

    def _gather(
        self,
        rows: Sequence[int] | np.ndarray,
        read: Callable[[ClipStore, np.ndarray], np.ndarray],
        columns: int,
        dtype: type[np.generic],
    ) -> np.ndarray:
        """(k, columns): the values that ``read`` returns for each store's rows, in the order of ``rows``."""
        rows = np.arange(len(self))[rows] if np.min(rows, initial=0) < 0 else np.asarray(rows, dtype=np.int64)
        if np.max(rows, initial=-1) >= len(self):
            raise IndexError(f"row {rows.max()} of {self.path}, which has {len(self)}")
        number = np.searchsorted(self._first_rows, rows, side="right") - 1
        result = np.empty((len(rows), columns), dtype)
        for index in np.unique(number):
            mine = number == index
            result[mine] = read(self.stores[index], rows[mine] - self._first_rows[index])
        return result


AnyClips = ClipStore | JoinedClips
"""The sources of clips for training and evaluation."""


def open_clips(paths: Sequence[str | Path], class_names: Sequence[str] | None = None) -> AnyClips:
    """A single store, or several joined; raises the same errors as ``JoinedClips.open``."""
    return ClipStore.open(paths[0], class_names) if len(paths) == 1 else JoinedClips.open(paths, class_names)


def _groups(store: ClipStore) -> str:
    groups = store.label_space.groups
    return ", ".join(f"{group.name} {'exclusive' if group.exclusive else 'not exclusive'}".strip() for group in groups)


def _shared_ids(one: ClipStore, other: ClipStore) -> list[str]:
    """Ids that are in both stores: those of the first block of rows that has any."""
    small, large = sorted((one, other), key=len)
    for start in range(0, len(small), ROWS_AT_ONCE):
        ids = [small.clip_id(row) for row in range(start, min(start + ROWS_AT_ONCE, len(small)))]
        shared = np.flatnonzero(large.find(ids) >= 0)
        if len(shared):
            return [ids[index] for index in shared]
    return []
