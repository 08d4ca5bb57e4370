"""How a fine-tuned student is judged: accuracy and log loss where classes exclude each other, mAP where they do not.

Shapes: n clips, C classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, log_loss

from audio_datasets.tasks.task import TaskClips
from kd.evaluation.metrics import tagging_metrics

Labels = Literal["one", "several"]

METRICS: dict[Labels, tuple[str, ...]] = {
    "one": ("accuracy", "macro_accuracy", "log_loss", "macro_log_loss"),
    "several": ("mAP", "roc_auc", "d_prime"),
}
SMALLER_IS_BETTER = ("log_loss", "macro_log_loss")


def task_metrics(clips: TaskClips, rows: np.ndarray, logits: np.ndarray, labels: Labels) -> dict[str, Any]:
    """The numbers of METRICS by name, and ``classes`` with each class's own; classes without clips are ``absent``.

    ``logits`` (n, C) belong to ``rows``.
    """
    if labels == "one":
        return single_label_metrics(clips.targets(rows).argmax(axis=1), logits, clips.class_names)
    return multi_label_metrics(clips.targets(rows), logits, clips.mask(rows), clips.class_names)


def single_label_metrics(classes: np.ndarray, logits: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Accuracy and log loss of softmax(logits), over clips and as the mean of each class's own (macro average).

    Args:
        classes: (n,), the number of each clip's class.
        logits: (n, C).
    """
    if not np.isfinite(logits).all():
        raise ValueError(f"{int((~np.isfinite(logits)).any(axis=1).sum())} clips have logits that are not finite")
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
    """mAP, ROC AUC and d′, each class over the clips whose label is known; all (n, C). None where not defined or not finite."""
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
    """Metrics of the clips of each device, and of those in the training clips (``seen``) and the others taken together.

    Args:
        devices: (n,), each clip's device.
        seen: devices that occur in training.
        classes: (n,), the number of each clip's class.
    """
    devices = np.array(devices)

    def values(chosen: np.ndarray) -> dict[str, float]:
        found = single_label_metrics(classes[chosen], logits[chosen], class_names)
        return {"clips": int(chosen.sum()), **{name: found[name] for name in METRICS["one"]}}

    tables = {device: {"seen": device in seen, **values(devices == device)} for device in sorted(set(devices.tolist()))}
    is_seen = np.isin(devices, list(seen))
    return {
        "devices": tables,
        **({"seen_devices": values(is_seen)} if is_seen.any() else {}),
        **({"unseen_devices": values(~is_seen)} if (~is_seen).any() else {}),
    }
