"""Statistics of each class where every clip has exactly one class.

Shapes: N clips of a part, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import log_softmax

from kd.reports.analysis.parts import PartPredictions, ratio
from kd.reports.run_reader import Part, Predictions


@dataclass(frozen=True)
class SingleLabelClasses:
    """Confusions and losses of the classes, where every clip has exactly one."""

    confusion: np.ndarray
    """(C, C) int64: the number of predictions by true class (rows) and chosen class (columns), over all parts."""
    log_loss: np.ndarray
    """(C,) the mean of −ln softmax at the true class, over the clips of the class; NaN for a class without clips."""
    clips: np.ndarray
    """(C,) int64: the number of distinct clips."""

    @property
    def accuracy(self) -> np.ndarray:
        """(C,) share of the clips of the class that were given this class (its recall)."""
        return ratio(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def precision(self) -> np.ndarray:
        """(C,) share of correct predictions among those that chose the class."""
        return ratio(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def f1(self) -> np.ndarray:
        """(C,) 2 · correct / (clips of the class + predictions that chose it)."""
        return ratio(2 * self.confusion.diagonal(), self.confusion.sum(axis=0) + self.confusion.sum(axis=1))

    def confusions(self) -> list[tuple[int, int, int]]:
        """Wrong predictions as (true class, chosen class, count), the most frequent first."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        true, chosen = np.nonzero(wrong)
        found = [(int(t), int(c), int(wrong[t, c])) for t, c in zip(true, chosen, strict=True)]
        return sorted(found, key=lambda item: (-item[2], item[0], item[1]))


def single_label_classes(parts: Sequence[PartPredictions]) -> SingleLabelClasses:
    """Confusions and losses of each class.

    Raises:
        ValueError: a clip does not have exactly one class.
    """
    classes = parts[0][1].logits.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    losses = np.zeros(classes)
    clips = [set() for _ in range(classes)]
    for part, predictions in parts:
        true = true_classes(part, predictions)
        np.add.at(confusion, (true, predictions.logits.argmax(axis=1)), 1)
        np.add.at(losses, true, clip_losses(predictions, true))
        for index, clip_id in zip(true, predictions.clip_ids, strict=True):
            clips[index].add(clip_id)
    return SingleLabelClasses(confusion, ratio(losses, confusion.sum(axis=1)), np.array([len(ids) for ids in clips]))


def true_classes(part: Part, predictions: Predictions) -> np.ndarray:
    """The index of each clip's class, (N,).

    Raises:
        ValueError: a clip does not have exactly one class.
    """
    if not predictions.one_label:
        wrong = np.flatnonzero(~predictions.known.all(axis=1) | (predictions.targets.sum(axis=1) != 1))
        raise ValueError(
            f"{part.folder}: every clip must have exactly one class; {len(wrong)} do not, such as {str(predictions.clip_ids[wrong[0]])!r}"
        )
    return predictions.targets.argmax(axis=1)


def clip_losses(predictions: Predictions, true: np.ndarray) -> np.ndarray:
    """−ln softmax(logits) at the true class, (N,)."""
    return -log_softmax(predictions.logits.astype(np.float64), axis=1)[np.arange(len(true)), true]
