"""The clips that the students judged most confidently, and wrongly."""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax

from kd.reports.analysis.parts import PartPredictions
from kd.reports.analysis.single_label import true_classes
from kd.reports.run_reader import Predictions


@dataclass(frozen=True)
class Mistake:
    """A clip and class that a student judged wrongly."""

    clip_id: str
    part: str
    truth: str
    """The classes that the clip has, joined by commas."""
    said: str
    """Single-label: the class that was chosen. Multi-label: the class of a false alarm or of a miss."""
    probability: float
    """The probability that the student gave to ``said``."""
    truth_probability: float | None = None
    """Single-label: the probability that the student gave to the true class."""
    device: str | None = None


def single_label_mistakes(
    parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12
) -> list[Mistake]:
    """Wrong choices, the most confident first. A clip that several students got wrong is listed once, by the most confident."""

    def wrong() -> Iterator[Mistake]:
        for part, predictions in parts:
            true = true_classes(part, predictions)
            probabilities = np.exp(log_softmax(predictions.logits.astype(np.float64), axis=1))
            chosen = probabilities.argmax(axis=1)
            for row in np.flatnonzero(chosen != true):
                yield Mistake(
                    clip_id=str(predictions.clip_ids[row]),
                    part=part.label,
                    truth=class_names[true[row]],
                    said=class_names[chosen[row]],
                    probability=float(probabilities[row, chosen[row]]),
                    truth_probability=float(probabilities[row, true[row]]),
                    device=_device_of(predictions, row),
                )

    return _worst(wrong(), lambda mistake: mistake.probability, at_most)


def false_alarms(parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12) -> list[Mistake]:
    """Classes that clips do not have, the most probable first. Each clip is listed once, by its worst class."""
    return _multi_label_mistakes(parts, class_names, false_alarm=True, at_most=at_most)


def misses(parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12) -> list[Mistake]:
    """Classes that clips have, the least probable first. Each clip is listed once, by its worst class."""
    return _multi_label_mistakes(parts, class_names, false_alarm=False, at_most=at_most)


def _multi_label_mistakes(
    parts: Sequence[PartPredictions], class_names: Sequence[str], false_alarm: bool, at_most: int
) -> list[Mistake]:
    sign = 1.0 if false_alarm else -1.0

    def wrong() -> Iterator[Mistake]:
        for part, predictions in parts:
            labelled = predictions.known & predictions.targets
            mistaken = predictions.known & (predictions.targets != false_alarm)
            severity = np.where(mistaken, sign * predictions.logits, -np.inf)
            # One class per clip, the worst, and no more clips than can be shown.
            worst_class = severity.argmax(axis=1)
            worst = severity.max(axis=1)
            for row in np.argsort(-worst, kind="stable")[:at_most]:
                probability = float(expit(predictions.logits[row, worst_class[row]].astype(np.float64)))
                if not np.isfinite(worst[row]) or (probability >= 0.5) != false_alarm:
                    continue
                yield Mistake(
                    clip_id=str(predictions.clip_ids[row]),
                    part=part.label,
                    truth=", ".join(class_names[index] for index in np.flatnonzero(labelled[row])),
                    said=class_names[worst_class[row]],
                    probability=probability,
                    device=_device_of(predictions, row),
                )

    return _worst(wrong(), lambda mistake: sign * mistake.probability, at_most)


def _worst(mistakes: Iterable[Mistake], severity: Callable[[Mistake], float], at_most: int) -> list[Mistake]:
    """The most severe mistakes, one for each clip."""
    worst: dict[str, Mistake] = {}
    for mistake in mistakes:
        if mistake.clip_id not in worst or severity(mistake) > severity(worst[mistake.clip_id]):
            worst[mistake.clip_id] = mistake
    return heapq.nlargest(at_most, worst.values(), key=severity)


def _device_of(predictions: Predictions, row: int) -> str | None:
    return None if predictions.devices is None else str(predictions.devices[row])
