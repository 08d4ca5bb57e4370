"""Statistics of each class where a clip may have any number of classes.

Shapes: N clips of a part, C classes, R points of recall.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from kd.reports.analysis.parts import PartPredictions, distinct_counts, ratio
from kd.reports.analysis.thresholds import counts_at_each_threshold

RECALL_GRID = (np.arange(100) + 0.5) / 100
"""The midpoints of 100 equal steps. The mean of the precision at these points is close to the average precision."""


@dataclass(frozen=True)
class MultiLabelClasses:
    """Average precision and curves of the classes, where a clip may have any number. NaN for a class without positive clips."""

    average_precision: np.ndarray
    """(parts, C)"""
    precision_at_recall: np.ndarray
    """(C, R): the precision at each recall of ``RECALL_GRID``, as the mean over parts."""
    positives: np.ndarray
    """(C,) int64: the number of distinct clips with the class."""
    labelled: np.ndarray
    """(C,) int64: the number of distinct clips whose label for the class is known."""


def multi_label_classes(parts: Sequence[PartPredictions]) -> MultiLabelClasses:
    """Average precision and precision-recall curves of each class. Clips with an unknown label are left out."""
    classes = parts[0][1].logits.shape[1]
    average_precision = np.full((len(parts), classes), np.nan)
    curves = np.zeros((classes, len(RECALL_GRID)))
    parts_with_class = np.zeros(classes, dtype=np.int64)
    for number, (_, predictions) in enumerate(parts):
        for index in range(classes):
            known = predictions.known[:, index]
            targets, scores = predictions.targets[known, index], predictions.logits[known, index]
            if not targets.any():
                continue
            average_precision[number, index] = average_precision_score(targets, scores)
            curves[index] += precision_at_recall(targets, scores, RECALL_GRID)
            parts_with_class[index] += 1
    positives, labelled = distinct_counts(parts)
    return MultiLabelClasses(average_precision, ratio(curves, parts_with_class[:, None]), positives, labelled)


def precision_at_recall(targets: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """The precision at the highest threshold that reaches each recall, (R,).

    As a function of recall this is a step function; the area under it is the average precision.

    Args:
        targets: (N,) bool, at least one true.
        scores: (N,).
        recall: (R,) in (0, 1].
    """
    found, predicted, _ = counts_at_each_threshold(targets, scores)
    return (found / predicted)[np.searchsorted(found, recall * found[-1] - 1e-9)]
