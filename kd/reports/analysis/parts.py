"""Statistics over the parts of a run (its folds and seeds).

Each part has its own student, and their logits need not have the same scale. So we compute what depends on the order of the
scores, such as average precision, for each part and then take the mean. What depends on decisions, such as a confusion
matrix, we count over all parts together.

Shapes: C classes.
"""

from collections.abc import Sequence

import numpy as np

from kd.reports.run_reader import Part, Predictions

PartPredictions = tuple[Part, Predictions]


def mean_over_parts(values: np.ndarray) -> np.ndarray:
    """(parts, C) -> (C,): the mean over the parts that have a value (are not NaN); NaN where none has."""
    known = np.isfinite(values)
    return ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))


def std_over_parts(values: np.ndarray) -> np.ndarray:
    """(parts, C) -> (C,): the sample standard deviation over the parts that have a value; NaN where fewer than two have."""
    known = np.isfinite(values)
    squares = np.where(known, (values - mean_over_parts(values)) ** 2, 0.0).sum(axis=0)
    return np.sqrt(ratio(squares, known.sum(axis=0) - 1))


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below``, NaN where ``below`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def distinct_counts(parts: Sequence[PartPredictions]) -> tuple[np.ndarray, np.ndarray]:
    """The number of clips with each class (C,) and of clips whose label for it is known (C,).

    A clip that several students heard counts once.
    """
    seen: set[str] = set()
    classes = parts[0][1].logits.shape[1]
    positives, labelled = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    for _, predictions in parts:
        new = np.array([clip_id not in seen for clip_id in predictions.clip_ids], dtype=bool)
        seen |= set(predictions.clip_ids)
        positives += (predictions.targets & predictions.known)[new].sum(axis=0)
        labelled += predictions.known[new].sum(axis=0)
    return positives, labelled
