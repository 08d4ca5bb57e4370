"""Rows of clips by their ids, where an id may be written in more than one way.

An id is looked for as it is written. One that is not there is looked for in Unicode's other forms, and in the spellings that are
in use for AudioSet's clips: ``id``, ``Yid``, ``Yid.mp3`` and ``00/Yid.mp3``, where ``id`` are the 11 characters of YouTube.

Shapes: n ids in a store, k ids asked for.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property

import numpy as np

from audio_datasets.stores.hdf5_arrays import decode_ids, find_ids, id_order
from audio_datasets.stores.names import other_forms

# The folders are those of AudioSet's copies: numbers, or lists as unbalanced_train_segments/unbalanced_train_segments_part00.
_AUDIOSET = re.compile(
    r"(?P<folders>(?:(?:\d{1,4}|[a-z_]*(?:train|eval)[a-z0-9_]*)/)*)(?P<y>Y?)(?P<id>[A-Za-z0-9_-]{11})(?P<suffix>\.[A-Za-z0-9]{2,5})?"
)
SAMPLED_IDS = 256
AUDIOSETS_SHARE = 0.9
"""Share of a store's ids that must be like AudioSet's: an id of 11 letters by chance makes no AudioSet."""


def audioset_id(name: str) -> str | None:
    """The 11 characters that name a clip of AudioSet, whichever way it is written; None for another name."""
    match = _AUDIOSET.fullmatch(name)
    return match and match["id"]


def are_audiosets(names: Sequence[str]) -> bool:
    """Whether names are those of AudioSet's clips, as far as some of them tell."""
    sample = names[:: max(1, len(names) // SAMPLED_IDS)]
    return sum(audioset_id(name) is not None for name in sample) >= AUDIOSETS_SHARE * len(sample) > 0


class ClipIds:
    """The ids of a store and their order, in which ids are found whichever way they are written."""

    def __init__(self, encoded: np.ndarray, order: np.ndarray) -> None:
        """``encoded`` S<width> (n,) and ``order`` int64 (n,), which may be memory-mapped."""
        self._encoded = encoded
        self._order = order

    def find(self, clip_ids: Sequence[str]) -> np.ndarray:
        """Rows int64 (k,) of the ids; -1 for one that is not there in any spelling.

        Raises ValueError for an order that is none.
        """
        rows = find_ids(self._encoded, self._order, clip_ids)
        if (rows < 0).any() and len(self._encoded):
            self._fill(rows, clip_ids, [other_forms(clip_id) for clip_id in clip_ids])
            wanted = [audioset_id(clip_id) if row < 0 else None for clip_id, row in zip(clip_ids, rows, strict=True)]
            if any(wanted) and self._ways:
                ways = [[way(key) for way in self._ways] if key else () for key in wanted]
                self._fill(rows, clip_ids, ways)
                if self._has_folders:
                    self._fill_from_keys(rows, wanted)
        return rows

    def _fill(self, rows: np.ndarray, clip_ids: Sequence[str], spellings: Sequence[Sequence[str]]) -> None:
        """Sets the rows of ids that are still missing from other spellings of theirs, the first that is there."""
        asked = [(place, name) for place, names in enumerate(spellings) if rows[place] < 0 for name in names]
        if not asked:
            return
        found = find_ids(self._encoded, self._order, [name for _, name in asked])
        for (place, _), row in zip(asked, found, strict=True):
            if row >= 0 > rows[place]:
                rows[place] = row

    def _fill_from_keys(self, rows: np.ndarray, wanted: Sequence[str | None]) -> None:
        keys, order = self._keys
        missing = [place for place, key in enumerate(wanted) if key and rows[place] < 0]
        found = find_ids(keys, order, [wanted[place] for place in missing])
        for place, row in zip(missing, found, strict=True):
            # Of two ids that are one clip's neither is taken.
            after = np.searchsorted(keys, keys[row], side="right", sorter=order) if row >= 0 else 0
            if row >= 0 and after - np.searchsorted(keys, keys[row], sorter=order) == 1:
                rows[place] = row

    @cached_property
    def _sample(self) -> list[str]:
        return decode_ids(self._encoded[:: max(1, len(self._encoded) // SAMPLED_IDS)])

    @cached_property
    def _ways(self) -> list[Callable[[str], str]]:
        """How this store writes AudioSet's ids, folders apart; empty for a store of other clips."""
        if not are_audiosets(self._sample):
            return []
        matches = filter(None, map(_AUDIOSET.fullmatch, self._sample))
        ways = dict.fromkeys((match["y"], match["suffix"] or "") for match in matches)
        return [lambda key, y=y, suffix=suffix: f"{y}{key}{suffix}" for y, suffix in ways]

    @cached_property
    def _has_folders(self) -> bool:
        return any(match["folders"] for match in filter(None, map(_AUDIOSET.fullmatch, self._sample)))

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """YouTube ids S11 (n,), empty for other clips, and their order. Only for ids in folders, which no search by name finds."""
        keys = np.array([audioset_id(name) or "" for name in decode_ids(self._encoded)], dtype="S11")
        return keys, id_order(keys)
