"""Average precision of each class, for each teacher, for their ensemble, and for the ensemble without each teacher.

Shapes: n clips, T stores, C classes.
"""

from dataclasses import dataclass

import numpy as np

from audio_datasets.stores.joined import AnyClips
from audio_datasets.system.command import progress
from teacher_logits.store import ROWS_PER_BLOCK
from teacher_logits.stores.ensemble import LogitEnsemble, weighted_mean

# Size of the block of columns (float32 logits) in memory at a time. The stores are read once for each block.
COLUMN_BYTES_AT_ONCE = 500_000_000


@dataclass(frozen=True)
class ClassPrecisions:
    """Average precisions (0 to 1) over the clips that all stores have; NaN for classes without a clip."""

    num_clips: int
    positives: np.ndarray
    """int64 (C,): clips of each class."""
    stores: np.ndarray
    """(T, C): each store alone."""
    ensemble: np.ndarray
    """(C,)"""
    without: np.ndarray
    """(T, C): the ensemble without this store; NaN for a store with weight 0, or if no other store has a weight."""

    @property
    def harm(self) -> np.ndarray:
        """(T, C): the gain of the ensemble from leaving out a store; positive if the store hurts it."""
        return self.without - self.ensemble


def class_precisions(ensemble: LogitEnsemble, clips: AnyClips) -> ClassPrecisions:
    """The average precisions of an ensemble and its stores. Each class is evaluated on the clips with a known label for it.

    Memory does not grow with the number of classes: row numbers take 8 bytes per clip and store, and columns of logits
    take COLUMN_BYTES_AT_ONCE, unless a single class needs more.

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
            scores = None  # it is a view of these columns; release them before the next ones are read
    return result


def _fill_in(
    result: ClassPrecisions, index: int, scores: np.ndarray, positive: np.ndarray, ensemble: LogitEnsemble
) -> None:
    """The average precisions of one class; ``scores`` (T, n)."""
    weights = np.asarray(ensemble.weights)
    if ensemble.mean == "probabilities" and any(
        link is not None and "softmax" in link.kinds for link in ensemble.links
    ):
        raise ValueError(
            "probabilities of a softmax depend on all classes, and precisions are taken class by class; leave out --ensemble "
            "probabilities, or the teachers that were trained with a softmax"
        )

    def precision_of(stores: np.ndarray) -> float:
        if len(stores) == 1:
            return result.stores[stores[0], index]
        return average_precision(weighted_mean(scores[stores, :, None], weights[stores], ensemble.mean)[:, 0], positive)

    result.stores[:, index] = [average_precision(of_store, positive) for of_store in scores]
    taking_part = np.flatnonzero(weights)
    result.ensemble[index] = precision_of(taking_part)
    if len(taking_part) > 1:
        for store in taking_part:
            result.without[store, index] = precision_of(taking_part[taking_part != store])


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Average precision, equal to scikit-learn's ``average_precision_score`` but several times faster.

    It is the mean, over the positive clips, of the precision at their score. Clips with equal scores are ranked together.

    Args:
        scores: (n,).
        positive: indices, in ``scores``, of the clips that have the class; at least one.
    """
    found = np.sort(scores[positive])
    hits = len(found) - np.searchsorted(found, found, side="left")
    ranked = len(scores) - np.searchsorted(np.sort(scores), found, side="left")
    return float(np.mean(hits / ranked))


def _rows_in_stores(ensemble: LogitEnsemble, clips: AnyClips) -> tuple[np.ndarray, np.ndarray]:
    """The rows of clips that all stores have: int64 (T, n) in the stores, and (n,) in the clip store."""
    rows = np.empty((len(ensemble.stores), len(clips)), dtype=np.int64)
    for start in range(0, len(clips), ROWS_PER_BLOCK):
        end = min(start + ROWS_PER_BLOCK, len(clips))
        ids = [clips.clip_id(row) for row in range(start, end)]
        for store, found in zip(ensemble.stores, rows, strict=True):
            found[start:end] = store.rows(ids)
    present = (rows >= 0).all(axis=0)
    return rows[:, present], np.flatnonzero(present)


def _clips_of_classes(clips: AnyClips, clip_rows: np.ndarray) -> list[np.ndarray]:
    """For each class, the indices in ``clip_rows`` of the clips that have it."""
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
    """For each class in a range, the ascending indices of the clips whose label is known; None if all labels are known."""
    if not clips.is_masked:
        return None
    known = np.empty((len(classes), len(clip_rows)), dtype=bool)
    for start in range(0, len(clip_rows), ROWS_PER_BLOCK):
        block = clips.mask(clip_rows[start : start + ROWS_PER_BLOCK])
        known[:, start : start + len(block)] = block[:, classes.start : classes.stop].T
    return [np.flatnonzero(of_class) for of_class in known]


def _columns(ensemble: LogitEnsemble, rows: np.ndarray, classes: range) -> np.ndarray:
    """The logits of a range of classes, float32 (classes, T, n)."""
    columns = np.empty((len(classes), *rows.shape), dtype=np.float32)
    for number, (store, of_store) in enumerate(zip(ensemble.stores, rows, strict=True)):
        for start in range(0, len(of_store), ROWS_PER_BLOCK):
            block = store.read_rows(of_store[start : start + ROWS_PER_BLOCK])
            columns[:, number, start : start + len(block)] = block[:, classes.start : classes.stop].T
    return columns
