"""What predictions tell class by class: accuracy and confusions, average precision, thresholds, devices, mistakes.

Several parts of a run (folds, seeds) are several students, whose logits need not agree in scale. What depends on the order of
scores is therefore computed for each part and averaged; what depends on decisions is counted over all of them.

Shapes: N clips of a part, C classes, R points of recall.
"""

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import expit, log_softmax
from sklearn.metrics import average_precision_score

from audio_datasets.system.files import digest_of
from kd.reports.run_reader import Part, Predictions

RECALL_GRID = (np.arange(100) + 0.5) / 100
"""Middles of a hundred equal steps: the mean of precision over them is the average precision."""

CROSS_FIT_PARTS = 5
UNTUNED_LOGIT = 0.0

PartPredictions = tuple[Part, Predictions]


@dataclass(frozen=True)
class Mistake:
    """A clip and class that a student judged wrongly."""

    clip_id: str
    part: str
    truth: str
    """Its class; of several, joined by commas."""
    said: str
    """For one label, the class that was chosen; for several, the class that was wrongly heard or missed."""
    probability: float
    """That the student gave to ``said``."""
    truth_probability: float | None = None
    """That it gave to the true class."""
    device: str | None = None


# --- One class per clip ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OneLabelClasses:
    """Each class of a task in which every clip has one."""

    confusion: np.ndarray
    """(C, C) int64: predictions by true class (rows) and chosen class (columns), over all parts."""
    log_loss: np.ndarray
    """(C,) mean of −ln softmax at the true class, over the class's predictions; NaN for a class without clips."""
    clips: np.ndarray
    """(C,) int64: distinct clips."""

    @property
    def accuracy(self) -> np.ndarray:
        """(C,) share of the class's predictions that are right (its recall)."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=1))

    @property
    def precision(self) -> np.ndarray:
        """(C,) share right among the predictions that chose the class."""
        return _ratio(self.confusion.diagonal(), self.confusion.sum(axis=0))

    @property
    def f1(self) -> np.ndarray:
        """(C,) 2 · right / (the class's predictions + those that chose it)."""
        return _ratio(2 * self.confusion.diagonal(), self.confusion.sum(axis=0) + self.confusion.sum(axis=1))

    def confusions(self) -> list[tuple[int, int, int]]:
        """(true class, chosen class, predictions) of everything off the diagonal; the most frequent first."""
        wrong = self.confusion - np.diag(self.confusion.diagonal())
        true, chosen = np.nonzero(wrong)
        found = [(int(t), int(c), int(wrong[t, c])) for t, c in zip(true, chosen, strict=True)]
        return sorted(found, key=lambda item: (-item[2], item[0], item[1]))


def one_label_classes(parts: Sequence[PartPredictions]) -> OneLabelClasses:
    """Confusions and losses of each class.

    Raises:
        ValueError: a clip that has not exactly one class.
    """
    classes = parts[0][1].logits.shape[1]
    confusion = np.zeros((classes, classes), dtype=np.int64)
    losses = np.zeros(classes)
    clips = [set() for _ in range(classes)]
    for part, predictions in parts:
        true = _true_classes(part, predictions)
        np.add.at(confusion, (true, predictions.logits.argmax(axis=1)), 1)
        np.add.at(losses, true, _clip_losses(predictions, true))
        for index, clip_id in zip(true, predictions.clip_ids, strict=True):
            clips[index].add(clip_id)
    return OneLabelClasses(confusion, _ratio(losses, confusion.sum(axis=1)), np.array([len(ids) for ids in clips]))


def one_label_mistakes(
    parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12
) -> list[Mistake]:
    """Wrong choices, the surest first; of a clip that several students got wrong, the surest of them."""

    def wrong() -> Iterator[Mistake]:
        for part, predictions in parts:
            true = _true_classes(part, predictions)
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
                    device=_device(predictions, row),
                )

    return _worst(wrong(), lambda mistake: mistake.probability, at_most)


def _true_classes(part: Part, predictions: Predictions) -> np.ndarray:
    """(N,) index of each clip's class."""
    if not predictions.one_label:
        wrong = np.flatnonzero(~predictions.known.all(axis=1) | (predictions.targets.sum(axis=1) != 1))
        raise ValueError(
            f"{part.folder}: every clip must have exactly one class; {len(wrong)} have not, as {str(predictions.clip_ids[wrong[0]])!r}"
        )
    return predictions.targets.argmax(axis=1)


def _clip_losses(predictions: Predictions, true: np.ndarray) -> np.ndarray:
    """(N,) −ln softmax(logits) at the true class."""
    return -log_softmax(predictions.logits.astype(np.float64), axis=1)[np.arange(len(true)), true]


# --- Several classes per clip ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SeveralLabelClasses:
    """Each class of a task in which a clip may have any number of them. NaN where a class has no positive clip."""

    average_precision: np.ndarray
    """(parts, C)."""
    precision_at_recall: np.ndarray
    """(C, R): precision at ``RECALL_GRID``, the mean over parts. Its mean over the grid is the average precision."""
    positives: np.ndarray
    """(C,) int64: distinct clips that have the class."""
    labelled: np.ndarray
    """(C,) int64: distinct clips of which it is known whether they have the class."""


def several_label_classes(parts: Sequence[PartPredictions]) -> SeveralLabelClasses:
    """Average precision and precision-recall curves of each class, over the clips whose label is known."""
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
    positives, labelled = _distinct_counts(parts)
    return SeveralLabelClasses(average_precision, _ratio(curves, parts_with_class[:, None]), positives, labelled)


def precision_at_recall(targets: np.ndarray, scores: np.ndarray, recall: np.ndarray) -> np.ndarray:
    """Precision at the highest threshold that reaches each recall; the step function whose area is average precision.

    Args:
        targets: (N,) bool, at least one true.
        scores: (N,).
        recall: (R,) in (0, 1].
    """
    found, predicted, _ = _at_each_threshold(targets, scores)
    return (found / predicted)[np.searchsorted(found, recall * found[-1] - 1e-9)]


def best_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """The threshold with the highest F1, and that F1. A score at or above it counts as "has the class".

    It lies half-way between the lowest score that is in and the highest that is out; of several, the highest is taken.

    Args:
        targets: (N,) bool, at least one true.
        scores: (N,).
    """
    found, predicted, lowest_in = _at_each_threshold(targets, scores)
    f1 = 2 * found / (predicted + found[-1])
    best = int(f1.argmax())
    if best + 1 == len(lowest_in):
        return float(lowest_in[best]), float(f1[best])
    return float((lowest_in[best] + lowest_in[best + 1]) / 2), float(f1[best])


def _at_each_threshold(targets: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each distinct score, from the highest: true clips at or above it, all clips at or above it, and the score."""
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order].astype(np.float64)
    last_of_ties = np.flatnonzero(np.append(np.diff(ordered) != 0, True))
    return np.cumsum(targets[order])[last_of_ties], last_of_ties + 1, ordered[last_of_ties]


@dataclass(frozen=True)
class Thresholds:
    """A threshold for each class, and what it is worth. NaN for a class without a positive clip to choose it on."""

    probability: np.ndarray
    """(C,) threshold on σ(logit)."""
    f1: np.ndarray
    """(C,) F1 on clips that took no part in choosing the threshold."""
    untuned_f1: np.ndarray
    """(C,) F1 of the threshold 0.5 on the same clips."""
    chosen_on_validation: bool
    """Else on the test clips: ``f1`` is then cross-fitted."""


def choose_thresholds(parts: Sequence[PartPredictions]) -> Thresholds:
    """The threshold of highest F1 for each class.

    It is chosen on the validation clips where all parts kept what their students said about them, and ``f1`` is that of the
    test clips. Otherwise it is chosen on all test clips. Its F1 there would be too good; ``f1`` is therefore cross-fitted: the
    test clips fall into five parts by their ids, and each is judged with the threshold of highest F1 on the other four.
    """
    classes = parts[0][1].logits.shape[1]
    test = _Pooled([predictions for _, predictions in parts])
    validations = [part.validation for part, _ in parts if part.validation is not None]
    on_validation = len(validations) == len(parts)
    chosen_on = _Pooled(validations) if on_validation else test
    held_out = _cross_fit_part(test.clip_ids) if not on_validation else None

    thresholds, f1, untuned = (np.full(classes, np.nan) for _ in range(3))
    for index in range(classes):
        targets, scores, _ = chosen_on.of_class(index)
        if not targets.any():
            continue
        thresholds[index], _ = best_threshold(targets, scores)
        targets, scores, known = test.of_class(index)
        on_test = held_out is not None
        decided = _cross_fitted(targets, scores, held_out[known]) if on_test else scores >= thresholds[index]
        f1[index] = _f1(targets, decided)
        untuned[index] = _f1(targets, scores >= UNTUNED_LOGIT)
    return Thresholds(expit(thresholds), f1, untuned, on_validation)


class _Pooled:
    """The predictions of all parts, one below the other."""

    def __init__(self, predictions: Sequence[Predictions]) -> None:
        self.clip_ids = np.concatenate([part.clip_ids for part in predictions])
        self.logits = np.concatenate([part.logits for part in predictions])
        self.targets = np.concatenate([part.targets for part in predictions])
        self.known = np.concatenate([part.known for part in predictions])

    def of_class(self, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Targets and scores of the clips whose label is known, and which those are."""
        known = self.known[:, index]
        return self.targets[known, index], self.logits[known, index], known


def _cross_fit_part(clip_ids: np.ndarray) -> np.ndarray:
    """(N,) 0 to 4: a function of the clip's id, so that a clip's predictions by several students stay together."""
    return np.array([int(digest_of("cross-fit", str(clip_id)), 16) % CROSS_FIT_PARTS for clip_id in clip_ids])


def _cross_fitted(targets: np.ndarray, scores: np.ndarray, held_out: np.ndarray) -> np.ndarray:
    """(N,) bool decisions, each with the threshold chosen on the other parts (0.5 where those have no positive clip)."""
    decided = np.zeros(len(targets), dtype=bool)
    for part in range(CROSS_FIT_PARTS):
        inside = held_out == part
        others = targets[~inside]
        threshold = best_threshold(others, scores[~inside])[0] if others.any() else UNTUNED_LOGIT
        decided[inside] = scores[inside] >= threshold
    return decided


def _f1(targets: np.ndarray, decided: np.ndarray) -> float:
    total = targets.sum() + decided.sum()
    return float(2 * (targets & decided).sum() / total) if total else np.nan


def false_alarms(parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12) -> list[Mistake]:
    """Classes that clips do not have, by the probability given to them."""
    return _several_label_mistakes(parts, class_names, wrongly_heard=True, at_most=at_most)


def misses(parts: Sequence[PartPredictions], class_names: Sequence[str], at_most: int = 12) -> list[Mistake]:
    """Classes that clips have, the least probable first."""
    return _several_label_mistakes(parts, class_names, wrongly_heard=False, at_most=at_most)


def _several_label_mistakes(
    parts: Sequence[PartPredictions], class_names: Sequence[str], wrongly_heard: bool, at_most: int
) -> list[Mistake]:
    sign = 1.0 if wrongly_heard else -1.0

    def wrong() -> Iterator[Mistake]:
        for part, predictions in parts:
            labelled = predictions.known & predictions.targets
            mistaken = predictions.known & (predictions.targets != wrongly_heard)
            severity = np.where(mistaken, sign * predictions.logits, -np.inf)
            # Each clip once, by its worst class, and of those no more than can be shown.
            worst_class = severity.argmax(axis=1)
            worst = severity.max(axis=1)
            for row in np.argsort(-worst, kind="stable")[:at_most]:
                probability = float(expit(predictions.logits[row, worst_class[row]].astype(np.float64)))
                if not np.isfinite(worst[row]) or (probability >= 0.5) != wrongly_heard:
                    continue
                yield Mistake(
                    clip_id=str(predictions.clip_ids[row]),
                    part=part.label,
                    truth=", ".join(class_names[index] for index in np.flatnonzero(labelled[row])),
                    said=class_names[worst_class[row]],
                    probability=probability,
                    device=_device(predictions, row),
                )

    return _worst(wrong(), lambda mistake: sign * mistake.probability, at_most)


# --- Devices -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DeviceRow:
    """A device, or several together."""

    name: str
    seen: bool | None
    """Whether the students were trained on clips from it; None if that is not known, or for seen and unseen together."""
    clips: int
    """Distinct clips."""
    scores: dict[str, tuple[float, ...]]
    """For each metric: its value in each part that has clips of the device."""


def device_rows(parts: Sequence[PartPredictions], one_label: bool) -> list[DeviceRow]:
    """A row for each device, then for those seen in training, those not seen, and all; empty if devices are not known."""
    parts = [(part, predictions) for part, predictions in parts if predictions.devices is not None]
    if not parts:
        return []
    seen: dict[str, bool | None] = {}
    for _, predictions in parts:
        for row, device in enumerate(predictions.devices):
            known = bool(predictions.device_seen[row]) if predictions.device_seen is not None else None
            # A device that a fold trained without counts as unseen there; its row says so only if all folds agree.
            seen[str(device)] = known if seen.get(str(device), known) == known else None
    score = _one_label_scores if one_label else _several_label_scores
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
            for metric, value in score(part, _some(predictions, rows)).items():
                scores.setdefault(metric, []).append(value)
    return DeviceRow(name, seen, len(clip_ids), {metric: tuple(values) for metric, values in scores.items()})


def _some(predictions: Predictions, rows: np.ndarray) -> Predictions:
    return Predictions(
        predictions.clip_ids[rows], predictions.logits[rows], predictions.targets[rows], predictions.known[rows]
    )


def _one_label_scores(part: Part, predictions: Predictions) -> dict[str, float]:
    true = _true_classes(part, predictions)
    right = predictions.logits.argmax(axis=1) == true
    classes = np.bincount(true, minlength=predictions.logits.shape[1])
    class_accuracy = _ratio(np.bincount(true, weights=right, minlength=len(classes)), classes)
    return {
        "accuracy": float(right.mean()),
        "macro_accuracy": float(np.nanmean(class_accuracy)),
        "log_loss": float(_clip_losses(predictions, true).mean()),
    }


def _several_label_scores(part: Part, predictions: Predictions) -> dict[str, float]:
    precision = [
        average_precision_score(targets[known], scores[known])
        for targets, scores, known in zip(predictions.targets.T, predictions.logits.T, predictions.known.T, strict=True)
        if targets[known].any()
    ]
    return {"mAP": float(np.mean(precision))} if precision else {}


# --- Small parts -------------------------------------------------------------------------------------------------------


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """``above / below``, NaN where ``below`` is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below > 0, above / below, np.nan)


def mean_over_parts(values: np.ndarray) -> np.ndarray:
    """(parts, C) -> (C,): the mean over the parts that have a value (are not NaN); NaN where none has."""
    known = np.isfinite(values)
    return _ratio(np.where(known, values, 0.0).sum(axis=0), known.sum(axis=0))


def std_over_parts(values: np.ndarray) -> np.ndarray:
    """(parts, C) -> (C,): the sample standard deviation over the parts that have a value; NaN where fewer than two have."""
    known = np.isfinite(values)
    squares = np.where(known, (values - mean_over_parts(values)) ** 2, 0.0).sum(axis=0)
    return np.sqrt(_ratio(squares, known.sum(axis=0) - 1))


def _distinct_counts(parts: Sequence[PartPredictions]) -> tuple[np.ndarray, np.ndarray]:
    """(C,) clips with each class and (C,) clips of which it is known, each clip once however many students heard it."""
    seen: set[str] = set()
    classes = parts[0][1].logits.shape[1]
    positives, labelled = np.zeros(classes, dtype=np.int64), np.zeros(classes, dtype=np.int64)
    for _, predictions in parts:
        new = np.array([clip_id not in seen for clip_id in predictions.clip_ids], dtype=bool)
        seen |= set(predictions.clip_ids)
        positives += (predictions.targets & predictions.known)[new].sum(axis=0)
        labelled += predictions.known[new].sum(axis=0)
    return positives, labelled


def _device(predictions: Predictions, row: int) -> str | None:
    return None if predictions.devices is None else str(predictions.devices[row])


def _worst(mistakes: Iterable[Mistake], severity: Callable[[Mistake], float], at_most: int) -> list[Mistake]:
    """The most severe mistakes, one for each clip."""
    worst: dict[str, Mistake] = {}
    for mistake in mistakes:
        if mistake.clip_id not in worst or severity(mistake) > severity(worst[mistake.clip_id]):
            worst[mistake.clip_id] = mistake
    return heapq.nlargest(at_most, worst.values(), key=severity)
