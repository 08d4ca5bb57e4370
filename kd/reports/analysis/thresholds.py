"""A decision threshold for each class, chosen by F1.

Shapes: N clips of a part, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit

from audio_datasets.system.files import digest_of
from kd.reports.analysis.parts import PartPredictions
from kd.reports.run_reader import Predictions

CROSS_FIT_GROUPS = 5
UNTUNED_LOGIT = 0.0
"""The logit of the probability 0.5."""


@dataclass(frozen=True)
class Thresholds:
    """A threshold for each class, and its F1. NaN for a class that had no positive clip to choose a threshold on."""

    probability: np.ndarray
    """(C,) the threshold on σ(logit)."""
    f1: np.ndarray
    """(C,) F1 on clips that were not used to choose the threshold."""
    untuned_f1: np.ndarray
    """(C,) F1 on the same clips at a threshold of 0.5."""
    chosen_on_validation: bool
    """If False, thresholds were chosen on the test clips, and ``f1`` is cross-fitted."""


def choose_thresholds(parts: Sequence[PartPredictions]) -> Thresholds:
    """The threshold with the highest F1 for each class.

    If every part has saved its predictions of validation clips, thresholds are chosen on those, and ``f1`` is computed on the
    test clips. Otherwise thresholds are chosen on all test clips. Their F1 on the same clips would be too high, so ``f1`` is
    cross-fitted: the test clips are divided into five groups by their ids, and each group is judged with the threshold that
    has the highest F1 on the other four.
    """
    classes = parts[0][1].logits.shape[1]
    test = _Pooled([predictions for _, predictions in parts])
    validations = [part.validation for part, _ in parts if part.validation is not None]
    on_validation = len(validations) == len(parts)
    chosen_on = _Pooled(validations) if on_validation else test
    groups = None if on_validation else _cross_fit_groups(test.clip_ids)

    thresholds, f1, untuned = (np.full(classes, np.nan) for _ in range(3))
    for index in range(classes):
        targets, scores, _ = chosen_on.of_class(index)
        if not targets.any():
            continue
        thresholds[index], _ = best_threshold(targets, scores)
        targets, scores, known = test.of_class(index)
        decided = scores >= thresholds[index] if on_validation else _cross_fitted(targets, scores, groups[known])
        f1[index] = _f1(targets, decided)
        untuned[index] = _f1(targets, scores >= UNTUNED_LOGIT)
    return Thresholds(expit(thresholds), f1, untuned, on_validation)


def best_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The threshold with the highest F1, and that F1. A score at or above the threshold counts as "has the class".

    The threshold lies half-way between the lowest accepted score and the highest rejected one. If several thresholds have the
    highest F1, the highest of them is taken.

    Args:
        targets: (N,) bool, at least one true.
        scores: (N,).
    """
    found, predicted, lowest_in = counts_at_each_threshold(targets, scores)
    f1 = 2 * found / (predicted + found[-1])
    best = int(f1.argmax())
    if best + 1 == len(lowest_in):
        return float(lowest_in[best]), float(f1[best])
    return float((lowest_in[best] + lowest_in[best + 1]) / 2), float(f1[best])


def counts_at_each_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct scores in descending order, and how many clips a threshold at each of them accepts.

    Returns:
        The number of true clips at or above each score, the number of all clips at or above it, and the score.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    last_of_ties = np.flatnonzero(np.append(np.diff(ordered) != 0, True))
    return np.cumsum(targets[order])[last_of_ties], last_of_ties + 1, ordered[last_of_ties]


class _Pooled:
    """The predictions of all parts, concatenated."""

    def __init__(self, predictions: Sequence[Predictions]) -> None:
        self.clip_ids = np.concatenate([part.clip_ids for part in predictions])
        self.logits = np.concatenate([part.logits for part in predictions])
        self.targets = np.concatenate([part.targets for part in predictions])
        self.known = np.concatenate([part.known for part in predictions])

    def of_class(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets and scores of the clips whose label is known, and the mask (N,) of these clips."""
        known = self.known[:, index]
        return self.targets[known, index], self.logits[known, index], known


def _cross_fit_groups(clip_ids: np.ndarray) -> np.ndarray:
    """The group (0 to 4) of each clip, (N,). It follows from the clip id, so all predictions of a clip are in one group."""
    return np.array([int(digest_of("cross-fit", str(clip_id)), 16) % CROSS_FIT_GROUPS for clip_id in clip_ids])


def _cross_fitted(targets: np.ndarray, scores: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Decisions (N,), each made with the threshold chosen on the other groups (0.5 if those have no positive clip)."""
    decided = np.zeros(len(targets), dtype=bool)
    for group in range(CROSS_FIT_GROUPS):
        inside = groups == group
        others = targets[~inside]
        threshold = best_threshold(others, scores[~inside])[0] if others.any() else UNTUNED_LOGIT
        decided[inside] = scores[inside] >= threshold
    return decided


def _f1(targets: np.ndarray, decided: np.ndarray) -> float:
    total = targets.sum() + decided.sum()
    return float(2 * (targets & decided).sum() / total) if total else np.nan
