"""Metrics of each recording device, and of the devices seen and not seen in training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.metrics import average_precision_score

from kd.reports.analysis.parts import PartPredictions, ratio
from kd.reports.analysis.single_label import clip_losses, true_classes
from kd.reports.run_reader import Part, Predictions


@dataclass(frozen=True)
class DeviceRow:
    """The metrics of one device, or of several together."""

    name: str
    seen: bool | None
    """Whether the students were trained on clips from it. None if not known, if the parts differ, or for all devices together."""
    clips: int
    """The number of distinct clips."""
    scores: dict[str, tuple[float, ...]]
    """For each metric, its value in each part that has clips of the device."""


def device_rows(parts: Sequence[PartPredictions], one_label: bool) -> list[DeviceRow]:
    """One row for each device, then one for all seen in training, all not seen, and all. Empty if no part recorded devices."""
    parts = [(part, predictions) for part, predictions in parts if predictions.devices is not None]
    if not parts:
        return []
    seen: dict[str, bool | None] = {}
    for _, predictions in parts:
        for row, device in enumerate(predictions.devices):
            known = bool(predictions.device_seen[row]) if predictions.device_seen is not None else None
            # Folds may train on different devices. The row of a device says "seen" or "unseen" only if all folds agree.
            seen[str(device)] = known if seen.get(str(device), known) == known else None
    score = _single_label_scores if one_label else _multi_label_scores
    rows = [
        _device_row(parts, name, seen[name], lambda p, name=name: p.devices == name, score)
        for name in sorted(seen, key=lambda name: (seen[name] is False, name))
    ]
    if all(predictions.device_seen is not None for _, predictions in parts) and set(seen.values()) != {True}:
        rows.append(_device_row(parts, "seen devices", True, lambda p: p.device_seen, score))
        rows.append(_device_row(parts, "unseen devices", False, lambda p: ~p.device_seen, score))
    rows.append(_device_row(parts, "all devices", None, lambda p: np.ones(len(p.clip_ids), dtype=bool), score))
    return [row for row in rows if row.clips]


def _device_row(
    parts: Sequence[PartPredictions],
    name: str,
    seen: bool | None,
    chosen: Callable[[Predictions], np.ndarray],
    score: Callable[[Part, Predictions], dict[str, float]],
) -> DeviceRow:
    scores: dict[str, list[float]] = {}
    clip_ids: set[str] = set()
    for part, predictions in parts:
        rows = np.flatnonzero(chosen(predictions))
        clip_ids |= set(predictions.clip_ids[rows])
        if len(rows):
            for metric, value in score(part, _subset(predictions, rows)).items():
                scores.setdefault(metric, []).append(value)
    return DeviceRow(name, seen, len(clip_ids), {metric: tuple(values) for metric, values in scores.items()})


def _subset(predictions: Predictions, rows: np.ndarray) -> Predictions:
    return Predictions(
        predictions.clip_ids[rows], predictions.logits[rows], predictions.targets[rows], predictions.known[rows]
    )


def _single_label_scores(part: Part, predictions: Predictions) -> dict[str, float]:
    true = true_classes(part, predictions)
    right = predictions.logits.argmax(axis=1) == true
    classes = np.bincount(true, minlength=predictions.logits.shape[1])
    class_accuracy = ratio(np.bincount(true, weights=right, minlength=len(classes)), classes)
    return {
        "accuracy": float(right.mean()),
        "macro_accuracy": float(np.nanmean(class_accuracy)),
        "log_loss": float(clip_losses(predictions, true).mean()),
    }


def _multi_label_scores(part: Part, predictions: Predictions) -> dict[str, float]:
    precision = [
        average_precision_score(targets[known], scores[known])
        for targets, scores, known in zip(predictions.targets.T, predictions.logits.T, predictions.known.T, strict=True)
        if targets[known].any()
    ]
    return {"mAP": float(np.mean(precision))} if precision else {}
