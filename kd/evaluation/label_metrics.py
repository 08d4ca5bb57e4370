"""Metrics for each group of a label space: accuracy if its classes exclude each other, mAP if they do not.

Shapes: n clips, C classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.special import log_softmax

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.evaluation.metrics import tagging_metrics

EXCLUSIVE_METRICS = ("accuracy", "macro_accuracy", "log_loss", "macro_log_loss")
INDEPENDENT_METRICS = ("mAP", "roc_auc", "d_prime")
SMALLER_IS_BETTER = ("log_loss", "macro_log_loss")
ALL_RIGHT = "accuracy"
"""With several exclusive groups: the share of clips that are right in all of them."""


def metric_names(label_space: LabelSpace) -> tuple[str, ...]:
    """The metrics of a label space, the headline metric first. Metrics of named groups look like "verb/accuracy"."""
    names = [
        f"{group.name}/{name}" if group.name else name
        for group in label_space.groups
        for name in (EXCLUSIVE_METRICS if group.exclusive else INDEPENDENT_METRICS)
    ]
    return (*([ALL_RIGHT] if len(label_space.groups) > 1 and label_space.exclusive else []), *names)


def smaller_is_better(metric: str) -> bool:
    return metric.rpartition("/")[2] in SMALLER_IS_BETTER


def label_metrics(label_space: LabelSpace, targets: np.ndarray, mask: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """The values of ``metric_names`` by name, and for each group ``classes`` with the values of each class.

    Classes without clips are listed as ``absent``. An exclusive group uses the clips whose labels are known.

    Args:
        targets: (n, C), 0 or 1; ignored where ``mask`` (n, C) is false.
        logits: (n, C).
    """
    found: dict[str, Any] = {}
    right = np.ones(len(logits), dtype=bool)
    for group, columns in label_space.parts():
        values = _group_metrics(group, targets[:, columns], mask[:, columns], logits[:, columns])
        found |= {f"{group.name}/{name}" if group.name else name: value for name, value in values.items()}
        right &= targets[:, columns].argmax(axis=1) == logits[:, columns].argmax(axis=1)
    if len(label_space.groups) > 1 and label_space.exclusive:
        known = mask.all(axis=1)
        found = {ALL_RIGHT: float(right[known].mean()) if known.any() else None, **found}
    return found


def _group_metrics(group: LabelGroup, targets: np.ndarray, mask: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    if not group.exclusive:
        return multi_label_metrics(targets, logits, mask, group.class_names)
    known = mask.all(axis=1)
    if not known.any():
        raise ValueError(
            f"no clip's label{f' of {group.name}' if group.name else ''} is known, so no metric is defined"
        )
    return single_label_metrics(targets[known].argmax(axis=1), logits[known], group.class_names)


def single_label_metrics(classes: np.ndarray, logits: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy and log loss of softmax(logits), averaged over clips and over classes (macro average).

    Args:
        classes: (n,), the index of each clip's class.
        logits: (n, C).
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=1).sum())} clips have logits that are not finite")
    from sklearn.metrics import accuracy_score, log_loss  # here, because scikit-learn is slow to import

    log_probabilities = log_softmax(logits.astype(np.float64), axis=1)
    chosen = logits.argmax(axis=1)
    each = {}
    for number, name in enumerate(class_names):
        of_class = classes == number
        if of_class.any():
            each[name] = {
                "clips": int(of_class.sum()),
                "accuracy": float(accuracy_score(classes[of_class], chosen[of_class])),
                "log_loss": float(-log_probabilities[of_class, number].mean()),
            }
    return {
        "accuracy": float(accuracy_score(classes, chosen)),
        "macro_accuracy": float(np.mean([values["accuracy"] for values in each.values()])),
        "log_loss": float(log_loss(classes, np.exp(log_probabilities), labels=np.arange(len(class_names)))),
        "macro_log_loss": float(np.mean([values["log_loss"] for values in each.values()])),
        "classes": each,
        "absent": [name for name in class_names if name not in each],
    }


def multi_label_metrics(
    targets: np.ndarray, logits: np.ndarray, mask: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """mAP, ROC AUC and d′; all arguments (n, C). Each class uses the clips with a known label. None if undefined or infinite."""
    found = tagging_metrics(targets, logits, class_names, mask)
    return {
        **{name: _finite(value) for name, value in found.summary().items()},
        "classes": {
            name: {
                "clips": int(found.positives[number]),
                "average_precision": float(found.average_precision[number]),
                "roc_auc": _finite(found.class_roc_auc[number]),
            }
            for number, name in enumerate(class_names)
            if found.positives[number]
        },
        "absent": list(found.absent_classes),
    }


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return float(value) if np.isfinite(value) else None


def device_metrics(
    devices: Sequence[str], seen: Sequence[str], classes: np.ndarray, logits: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Metrics for each device, for all devices seen in training together, and for all others together.

    Args:
        devices: (n,), each clip's device.
        seen: devices that occur in the training clips.
        classes: (n,), the index of each clip's class.
    """
    devices = np.array(devices)

    def values(chosen: np.ndarray) -> dict[str, float]:
        found = single_label_metrics(classes[chosen], logits[chosen], class_names)
        return {"clips": int(chosen.sum()), **{name: found[name] for name in EXCLUSIVE_METRICS}}

    tables = {device: {"seen": device in seen, **values(devices == device)} for device in sorted(set(devices.tolist()))}
    is_seen = np.isin(devices, list(seen))
    return {
        "devices": tables,
        **({"seen_devices": values(is_seen)} if is_seen.any() else {}),
        **({"unseen_devices": values(~is_seen)} if (~is_seen).any() else {}),
    }
