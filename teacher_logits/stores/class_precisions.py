"""Average precision, class by class, of teachers, of their ensemble, and of the ensemble without each of them.

Shapes: n clips, T stores, C classes.
"""

from dataclasses import dataclass

import numpy as np

from audio_datasets.stores.joined import AnyClips
from audio_datasets.system.command import progress
from teacher_logits.store import ROWS_PER_BLOCK
from teacher_logits.stores.ensemble import LogitEnsemble, weighted_mean

# Columns of logits, float32, that are in memory at a time; the stores are gone through once for each block of columns.
COLUMN_BYTES_AT_ONCE = 500_000_000


@dataclass(frozen=True)
class ClassPrecisions:
    """Average precisions (0 to 1) over the clips that all stores have; NaN for classes without a clip."""

    num_clips: int
    positives: np.ndarray
    """int64 (C,): clips of each class."""
    stores: np.ndarray
    """(T, C): each store by itself."""
    ensemble: np.ndarray
    """(C,)"""
    without: np.ndarray
    """(T, C): the ensemble without this store; NaN for a store that takes no part, or is the only one to do so."""

    @property
    def harm(self) -> np.ndarray:
        """(T, C): how much better the ensemble would be without a store; positive where the store hurts it."""
        return self.without - self.ensemble


def class_precisions(ensemble: LogitEnsemble, clips: AnyClips) -> ClassPrecisions:
    """The average precisions of an ensemble's stores over labelled clips; each class's over the clips whose label is known.

    Memory does not grow with the number of classes: row numbers take 8 bytes for each clip and store, and columns of logits
    COLUMN_BYTES_AT_ONCE, unless a single class needs more.

    Raises ValueError if no labelled clip is in every store.
    """
    rows, clip_rows = _rows_in_stores(ensemble, clips)
    positives = _clips_of_classes(clips, clip_rows)
    num_classes, num_stores, num_clips = len(ensemble.class_names), len(ensemble.stores), len(clip_rows)
    if not any(map(len, positives)):
        raise ValueError(f"no labelled clip of {clips.path} has logits, so there is no mAP")
    result = ClassPrecisions(
        num_clips,
        positives=np.array([len(found) for found in positives]),
        stores=np.full((num_stores, num_classes), np.nan),
        ensemble=np.full(num_classes, np.nan),
        without=np.full((num_stores, num_classes), np.nan),
    )
    at_once = max(1, COLUMN_BYTES_AT_ONCE // (4 * num_clips * num_stores))
    with progress(total=num_classes, desc="average precision", unit="class", leave=False) as bar:
        for first in range(0, num_classes, at_once):
            classes = range(first, min(first + at_once, num_classes))
            known_of = _known_clips(clips, clip_rows, classes)
            for index, scores in zip(classes, _columns(ensemble, rows, classes), strict=True):
                positive = positives[index]
                if known_of is not None:
                    known = known_of[index - first]
                    scores, positive = scores[:, known], np.searchsorted(known, positive)
                if len(positive):
                    _fill_in(result, index, scores, positive, ensemble)
                bar.update()
            scores = None  # a view of these columns, which must go before the next come
    return result


def _fill_in(
    result: ClassPrecisions, index: int, scores: np.ndarray, positive: np.ndarray, ensemble: LogitEnsemble
) -> None:
    """The average precisions of one class; ``scores`` (T, n)."""
    weights = np.asarray(ensemble.weights)

    def precision_of(stores: np.ndarray) -> float:
        if len(stores) == 1:
            return result.stores[stores[0], index]
        return average_precision(weighted_mean(scores[stores], weights[stores], ensemble.mean), positive)

    result.stores[:, index] = [average_precision(of_store, positive) for of_store in scores]
    taking_part = np.flatnonzero(weights)
    result.ensemble[index] = precision_of(taking_part)
    if len(taking_part) > 1:
        for store in taking_part:
            result.without[store, index] = precision_of(taking_part[taking_part != store])


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision, equal to scikit-learn's ``average_precision_score``.

    That is the mean over the positive clips of the precision at their score, clips of equal scores being ranked together.
    Two sorts and two searches take a fraction of its time.

    Args:
        scores: (n,).
        positive: which clips have the class, as their positions in ``scores``; at least one.
    """
    found = np.sort(scores[positive])
    hits = len(found) - np.searchsorted(found, found, side="left")
    ranked = len(scores) - np.searchsorted(np.sort(scores), found, side="left")
    return float(np.mean(hits / ranked))


def _rows_in_stores(ensemble: LogitEnsemble, clips: AnyClips) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the clips that all stores have: int64 (T, n) in the stores, and (n,) in the clip store."""
    rows = np.empty((len(ensemble.stores), len(clips)), dtype=np.int64)
    for start in range(0, len(clips), ROWS_PER_BLOCK):
        end = min(start + ROWS_PER_BLOCK, len(clips))
        ids = [clips.clip_id(row) for row in range(start, end)]
        for store, found in zip(ensemble.stores, rows, strict=True):
            found[start:end] = store.rows(ids)
    present = (rows >= 0).all(axis=0)
    return rows[:, present], np.flatnonzero(present)


def _clips_of_classes(clips: AnyClips, clip_rows: np.ndarray) -> list[np.ndarray]:
    """For each class the positions, among ``clip_rows``, of the clips that have it."""
    positions, classes = [np.empty(0, np.int32)], [np.empty(0, np.int32)]
    for start in range(0, len(clip_rows), ROWS_PER_BLOCK):
        place, index = np.nonzero(clips.targets(clip_rows[start : start + ROWS_PER_BLOCK]))
        positions.append((start + place).astype(np.int32))
        classes.append(index.astype(np.int32))
    of_class = np.concatenate(classes)
    order = np.argsort(of_class, kind="stable")
    counts = np.bincount(of_class, minlength=len(clips.class_names))
    return np.split(np.concatenate(positions)[order], np.cumsum(counts)[:-1])


def _known_clips(clips: AnyClips, clip_rows: np.ndarray, classes: range) -> list[np.ndarray] | None:
    """For each of a run of classes the positions, ascending, of the clips whose label is known; None if all labels are."""
    if not clips.is_masked:
        return None
    known = np.empty((len(classes), len(clip_rows)), dtype=bool)
    for start in range(0, len(clip_rows), ROWS_PER_BLOCK):
        block = clips.mask(clip_rows[start : start + ROWS_PER_BLOCK])
        known[:, start : start + len(block)] = block[:, classes.start : classes.stop].T
    return [np.flatnonzero(of_class) for of_class in known]


def _columns(ensemble: LogitEnsemble, rows: np.ndarray, classes: range) -> np.ndarray:
    """The logits of a run of classes, float32 (classes, T, n)."""
    columns = np.empty((len(classes), *rows.shape), dtype=np.float32)
    for number, (store, of_store) in enumerate(zip(ensemble.stores, rows, strict=True)):
        for start in range(0, len(of_store), ROWS_PER_BLOCK):
            block = store.read_rows(of_store[start : start + ROWS_PER_BLOCK])
            columns[:, number, start : start + len(block)] = block[:, classes.start : classes.stop].T
    return columns
