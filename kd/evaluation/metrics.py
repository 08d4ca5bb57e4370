"""Metrics of audio tagging, all from scikit-learn. Shapes: N clips, C classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri


@dataclass(frozen=True)
class TaggingMetrics:
    """Macro averages over the classes that occur, and the values of each class (NaN where undefined)."""

    mean_average_precision: float
    roc_auc: float
    """Mean over the classes that have both positive and negative clips."""
    d_prime: float
    """√2 · Φ⁻¹(mean ROC AUC), as in Gemmeke et al., "Audio Set" (2017)."""
    average_precision: np.ndarray
    class_roc_auc: np.ndarray
    positives: np.ndarray
    absent_classes: tuple[str, ...]
    """Classes without a positive clip; they are left out of the averages."""

    def summary(self) -> dict[str, float]:
        return {"mAP": self.mean_average_precision, "roc_auc": self.roc_auc, "d_prime": self.d_prime}


def tagging_metrics(
    targets: np.ndarray, scores: np.ndarray, class_names: Sequence[str], mask: np.ndarray | None = None
) -> TaggingMetrics:
    """mAP, ROC AUC and d′ of multi-label scores.

    Args:
        targets: (N, C), 0 or 1.
        scores: (N, C), logits or probabilities; only their order within a class matters.
        mask: (N, C) bool, where the target is known; a class's metrics use only those clips. None: everywhere.

    Raises:
        ValueError: shapes that disagree, scores that are not finite, or no positive clip at all.
    """
    if targets.shape != scores.shape or targets.shape[1:] != (len(class_names),):
        raise ValueError(
            f"targets {targets.shape}, scores {scores.shape} and {len(class_names)} class names do not fit together"
        )
    if not np.isfinite(scores).all():
        raise ValueError(f"{int((~np.isfinite(scores)).any(axis=1).sum())} clips have scores that are not finite")
    if mask is None:
        mask = np.ones(targets.shape, dtype=bool)
    elif mask.shape != targets.shape:
        raise ValueError(f"targets {targets.shape} and mask {mask.shape} do not fit together")
    positives = np.where(mask, targets, 0).sum(axis=0).astype(np.int64)
    if not positives.any():
        raise ValueError("no clip has any label, so no metric is defined")
    from sklearn.metrics import average_precision_score, roc_auc_score  # here, because scikit-learn is slow to import

    average_precision = np.full(len(class_names), np.nan)
    roc_auc = np.full(len(class_names), np.nan)
    for index in np.flatnonzero(positives):
        known = mask[:, index]
        average_precision[index] = average_precision_score(targets[known, index], scores[known, index])
        if positives[index] < known.sum():
            roc_auc[index] = roc_auc_score(targets[known, index], scores[known, index])
    mean_auc = float(np.nanmean(roc_auc)) if np.isfinite(roc_auc).any() else math.nan
    return TaggingMetrics(
        mean_average_precision=float(np.nanmean(average_precision)),
        roc_auc=mean_auc,
        d_prime=float(math.sqrt(2.0) * ndtri(mean_auc)),
        average_precision=average_precision,
        class_roc_auc=roc_auc,
        positives=positives,
        absent_classes=tuple(name for name, count in zip(class_names, positives, strict=True) if count == 0),
    )


def category_columns(
    class_names: Sequence[str], categories: Sequence[str], label_map: Mapping[str, Sequence[str]]
) -> dict[str, list[int]]:
    """For each category that occurs, the columns of the classes that it is mapped to.

    Raises:
        ValueError: a category without an entry in the map, or a class name that the tagger does not have.
    """
    index_of = {name: index for index, name in enumerate(class_names)}
    columns = {}
    for category in sorted(set(categories)):
        names = label_map.get(category, ())
        missing = [name for name in names if name not in index_of]
        if not names or missing:
            raise ValueError(
                f"category {category!r} maps to {list(names)}; {missing or 'no name'} is not a class of the tagger"
            )
        columns[category] = [index_of[name] for name in names]
    return columns


def category_accuracy(scores: np.ndarray, categories: Sequence[str], columns: Mapping[str, Sequence[int]]) -> float:
    """Accuracy of choosing, for each clip, the category whose classes score highest (zero-shot use of a tagger).

    Args:
        scores: (N, C).
        categories: the true category of each of the N clips.
        columns: from ``category_columns``; its categories are the choices.
    """
    choices = list(columns)
    chosen = np.stack([scores[:, columns[category]].max(axis=1) for category in choices], axis=1).argmax(axis=1)
    return float(np.mean([choices[index] == category for index, category in zip(chosen, categories, strict=True)]))
