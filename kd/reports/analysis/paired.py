"""Compares two students on the same clips: confidence intervals, McNemar's test and a paired bootstrap over clips.

Two kinds of chance make a difference uncertain. Another draw of labels, fold or seed gives another student: the interval over
pairs of trainings covers that. Other test clips give another score: the bootstrap over clips covers that.

Shapes: N clips of one pair, U distinct clips of all pairs, C classes, B resamples.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import binomtest, t

from audio_datasets.system.randomness import generator
from kd.run_folder.predictions import Predictions

CONFIDENCE = 0.95
RESAMPLES = 1000


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class McNemar:
    """How often just one of two students is right about a clip, and how likely such an imbalance is by chance."""

    only_first: int
    only_other: int
    p_value: float
    """Two-sided, exact (binomial)."""


@dataclass(frozen=True)
class PredictionPair:
    """Predictions of two students for the same clips in the same order."""

    clip_ids: np.ndarray
    """(N,) strings."""
    targets: np.ndarray
    """(N, C) bool."""
    known: np.ndarray
    """(N, C) bool: whether the label is known."""
    first: np.ndarray
    """(N, C) logits."""
    other: np.ndarray
    """(N, C) logits."""

    @classmethod
    def of(cls, first: Predictions, other: Predictions) -> "PredictionPair | None":
        """The clips that both have, sorted by id; None if there are none.

        Raises:
            ValueError: the two have different targets for a clip.
        """
        clip_ids, ours, theirs = np.intersect1d(first.clip_ids, other.clip_ids, return_indices=True)
        if not len(clip_ids):
            return None
        known = first.known[ours]
        targets = first.targets[ours] & known
        if (known != other.known[theirs]).any() or (targets != (other.targets[theirs] & known)).any():
            wrong = (known != other.known[theirs]) | (targets != (other.targets[theirs] & known))
            clip_id = clip_ids[wrong.any(axis=1)][0]
            raise ValueError(f"the runs have different labels for the clip {str(clip_id)!r}; they cannot be compared")
        return cls(clip_ids, targets, known, first.logits[ours], other.logits[theirs])

    def right(self) -> tuple[np.ndarray, np.ndarray]:
        """Whether the highest logit is that of a clip's class, (N,) bool each. For clips with exactly one class."""
        true = self.targets.argmax(axis=1)
        return self.first.argmax(axis=1) == true, self.other.argmax(axis=1) == true


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Student's t interval of the mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, error = float(np.mean(values)), float(np.std(values, ddof=1) / np.sqrt(len(values)))
    reach = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return Interval(mean, mean - reach, mean + reach)


def mcnemar(pairs: Sequence[PredictionPair]) -> McNemar:
    """McNemar's exact test over the clips of all pairs, which count as independent. For clips with exactly one class."""
    only_first = only_other = 0
    for pair in pairs:
        first, other = pair.right()
        only_first += int((first & ~other).sum())
        only_other += int((other & ~first).sum())
    discordant = only_first + only_other
    p_value = float(binomtest(only_first, discordant).pvalue) if discordant else 1.0
    return McNemar(only_first, only_other, p_value)


def bootstrap_over_clips(
    pairs: Sequence[PredictionPair], one_label: bool, *, seed: int = 0, resamples: int = RESAMPLES
) -> Interval | None:
    """Percentile interval of (other − first) in accuracy, or in mAP, under resampling of the test clips.

    All pairs are scored on the same resampled clips, so a clip that several students heard is drawn for all of them at once.
    The statistic is the mean over pairs. None if no pair has a defined score.

    Args:
        one_label: accuracy if each clip has exactly one class, else mAP over the classes that the resampled clips have.
    """
    distinct = np.unique(np.concatenate([pair.clip_ids for pair in pairs]))
    positions = [np.searchsorted(distinct, pair.clip_ids) for pair in pairs]
    differences = [(_accuracy_difference if one_label else _map_difference)(pair) for pair in pairs]

    def statistic(counts: np.ndarray) -> float:
        with np.errstate(invalid="ignore"):
            found = [difference(counts[places]) for difference, places in zip(differences, positions, strict=True)]
        found = [value for value in found if np.isfinite(value)]
        return float(np.mean(found)) if found else np.nan

    observed = statistic(np.ones(len(distinct)))
    if not np.isfinite(observed):
        return None
    draws = np.array([statistic(_resample(len(distinct), seed, number)) for number in range(resamples)])
    low, high = np.nanquantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(observed, float(low), float(high))


def _resample(size: int, seed: int, number: int) -> np.ndarray:
    """(size,) how often each clip is drawn in one resample."""
    chosen = generator(seed, "bootstrap over clips", position=number).integers(0, size, size)
    return np.bincount(chosen, minlength=size).astype(np.float64)


def _accuracy_difference(pair: PredictionPair) -> Callable[[np.ndarray], float]:
    first, other = pair.right()
    gained = other.astype(np.float64) - first
    return lambda counts: float(counts @ gained / counts.sum()) if counts.any() else np.nan


def _map_difference(pair: PredictionPair) -> Callable[[np.ndarray], float]:
    first, other = (WeightedMap(pair.targets, pair.known, logits) for logits in (pair.first, pair.other))
    return lambda counts: other(counts) - first(counts)


class WeightedMap:
    """mAP of clips with weights: sorts the scores once, then takes any weights. NaN if no class has a positive clip.

    For each class this is scikit-learn's ``average_precision_score`` with ``sample_weight``.
    """

    def __init__(self, targets: np.ndarray, known: np.ndarray, logits: np.ndarray) -> None:
        self.order = np.argsort(-logits, axis=0, kind="stable")
        scores = np.take_along_axis(logits, self.order, axis=0)
        self.targets = np.take_along_axis(targets & known, self.order, axis=0)
        self.known = np.take_along_axis(known, self.order, axis=0)
        # Equal scores share one threshold: every clip takes the counts of the last clip with its score.
        last = np.ones(scores.shape, dtype=bool)
        last[:-1] = scores[1:] != scores[:-1]
        rows = np.where(last, np.arange(len(scores))[:, None], len(scores))
        self.last = np.minimum.accumulate(rows[::-1], axis=0)[::-1]

    def __call__(self, counts: np.ndarray) -> float:
        """counts: (N,) how often each clip counts."""
        weights = counts[self.order]
        positive = weights * self.targets
        found = np.take_along_axis(np.cumsum(positive, axis=0), self.last, axis=0)
        listed = np.take_along_axis(np.cumsum(weights * self.known, axis=0), self.last, axis=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(listed > 0, found / listed, 0.0)
            average = (positive * precision).sum(axis=0) / positive.sum(axis=0)
        return float(np.nanmean(average)) if np.isfinite(average).any() else np.nan
