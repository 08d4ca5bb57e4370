"""Rows of clips by their ids, where an id may be written in more than one way.

An id is looked for as it is written. One that is not there is looked for in Unicode's other forms, and in the spellings that are
in use for AudioSet's clips: ``id``, ``Yid``, ``Yid.mp3`` and ``00/Yid.mp3``, where ``id`` are the 11 characters of YouTube.

Shapes: n ids in a store, k ids asked for.
"""

import re
from collections.abc import Mapping, Sequence
from functools import cached_property

import numpy as np

from audio_datasets.stores.hdf5_arrays import decode_ids, find_ids, id_order
from audio_datasets.stores.names import other_forms

# The folders are those of AudioSet's copies: numbers, or lists as unbalanced_train_segments/unbalanced_train_segments_part00.
_AUDIOSET = re.compile(
    r"(?P<folders>(?:(?:\d{1,4}|[a-z_]*(?:train|eval)[a-z0-9_]*)/)*)(?P<y>Y?)(?P<id>[A-Za-z0-9_-]{11})(?P<suffix>\.[A-Za-z0-9]{2,5})?"
)
SAMPLED_IDS = 256
IDS_AT_ONCE = 65_536
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


def _way(match: re.Match[str]) -> tuple[bool, str, str]:
    return bool(match["folders"]), match["y"], match["suffix"] or ""


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
        places = np.flatnonzero(rows < 0).tolist() if len(self._encoded) else []
        if not places:
            return rows
        forms = [(place, form) for place in places for form in other_forms(clip_ids[place])]
        self._fill(rows, forms)
        if self._ways:
            keys = {place: key for place in places if (key := self._key_in_other_spelling(clip_ids[place]))}
            self._fill(
                rows, [(place, f"{y}{key}{suffix}") for place, key in keys.items() for _, y, suffix in self._ways]
            )
            if any(has_folder for has_folder, _, _ in self._ways):
                self._fill_from_keys(rows, keys)
        return rows

    def _key_in_other_spelling(self, clip_id: str) -> str | None:
        """The YouTube id of an id that this store would write otherwise; None for other names, and where all are written alike."""
        match = _AUDIOSET.fullmatch(clip_id)
        return None if match is None or self._ways == [_way(match)] else match["id"]

    def _fill(self, rows: np.ndarray, spellings: Sequence[tuple[int, str]]) -> None:
        """Sets the rows of ids that are missing from (place, other spelling of the id), the first that is there."""
        if not spellings:
            return
        found = find_ids(self._encoded, self._order, [name for _, name in spellings])
        for (place, _), row in zip(spellings, found.tolist(), strict=True):
            if row >= 0 > rows[place]:
                rows[place] = row

    def _fill_from_keys(self, rows: np.ndarray, wanted: Mapping[int, str]) -> None:
        """Sets the rows of ids that are missing from their YouTube ids, by place."""
        missing = [place for place in wanted if rows[place] < 0]
        if not missing:
            return
        keys, order = self._keys
        found = find_ids(keys, order, [wanted[place] for place in missing])
        for place, row in zip(missing, found.tolist(), strict=True):
            # Of two ids that are one clip's neither is taken.
            after = np.searchsorted(keys, keys[row], side="right", sorter=order) if row >= 0 else 0
            if row >= 0 and after - np.searchsorted(keys, keys[row], sorter=order) == 1:
                rows[place] = row

    @cached_property
    def _ways(self) -> list[tuple[bool, str, str]]:
        """How this store writes AudioSet's ids: (in a folder, "Y" or "", suffix). Empty for a store of other clips."""
        sample = decode_ids(self._encoded[:: max(1, len(self._encoded) // SAMPLED_IDS)])
        if not are_audiosets(sample):
            return []
        return sorted(set(map(_way, filter(None, map(_AUDIOSET.fullmatch, sample)))))

    @cached_property
    def _keys(self) -> tuple[np.ndarray, np.ndarray]:
        """YouTube ids S11 (n,), empty for other clips, and their order. Only for ids in folders, which no search by name finds."""
        keys = np.empty(len(self._encoded), dtype="S11")
        for start in range(0, len(keys), IDS_AT_ONCE):
            names = decode_ids(self._encoded[start : start + IDS_AT_ONCE])
            keys[start : start + IDS_AT_ONCE] = [(audioset_id(name) or "").encode() for name in names]
        return keys, id_order(keys)
