"""Paired statistics, against scikit-learn, SciPy and counts made by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap
from sklearn.metrics import average_precision_score

from kd.reports.analysis.paired import (
    PredictionPair,
    WeightedMap,
    bootstrap_over_clips,
    mcnemar,
    mean_interval,
)
from kd.run_folder.predictions import Predictions


def predictions(logits: np.ndarray, targets: np.ndarray, ids: list[str] | None = None) -> Predictions:
    names = np.array(ids if ids is not None else [f"clip{number:03}" for number in range(len(logits))])
    return Predictions(names, logits.astype(np.float32), targets.astype(bool), np.ones(targets.shape, dtype=bool))


def one_label(right: list[bool]) -> Predictions:
    """Clips of class 0 of two; the highest logit is that of class 0 where ``right``."""
    logits = np.array([[1.0, 0.0] if hit else [0.0, 1.0] for hit in right])
    return predictions(logits, np.tile([1, 0], (len(right), 1)))


def test_pairs_hold_the_common_clips_in_one_order() -> None:
    targets = np.array([[1, 0], [0, 1], [1, 0]])
    first = predictions(np.arange(6).reshape(3, 2), targets, ["a", "b", "c"])
    other = predictions(np.arange(6, 10).reshape(2, 2), targets[[2, 1]], ["c", "b"])
    pair = PredictionPair.of(first, other)
    assert pair.clip_ids.tolist() == ["b", "c"]
    assert pair.first.tolist() == [[2, 3], [4, 5]]
    assert pair.other.tolist() == [[8, 9], [6, 7]]
    assert PredictionPair.of(first, predictions(other.logits, targets[:2], ["x", "y"])) is None


def test_runs_with_different_labels_for_a_clip_are_not_compared() -> None:
    targets = np.array([[1, 0], [0, 1]])
    with pytest.raises(ValueError, match="different labels for the clip 'clip001'"):
        PredictionPair.of(predictions(np.zeros((2, 2)), targets), predictions(np.zeros((2, 2)), targets[[0, 0]]))


def test_mcnemar_counts_the_clips_about_which_one_student_is_right() -> None:
    first = one_label([True, True, False, False, False, False, False, True])
    other = one_label([True, False, True, True, True, True, True, True])
    found = mcnemar([PredictionPair.of(first, other)])
    assert (found.only_first, found.only_other) == (1, 5)
    assert found.p_value == pytest.approx(2 * (1 + 6) / 2**6)  # at most one of six tosses
    assert mcnemar([PredictionPair.of(first, first)]).p_value == 1.0


def test_the_interval_over_trainings_is_students_t() -> None:
    found = mean_interval([0.1, 0.2, 0.3])
    assert found.mean == pytest.approx(0.2)
    assert found.high - found.mean == pytest.approx(
        4.302653 * 0.1 / np.sqrt(3)
    )  # 97.5 % quantile, 2 degrees of freedom
    assert not found.excludes_zero
    assert mean_interval([0.1]) is None


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**31), st.booleans())
def test_weighted_map_is_scikit_learns(seed: int, ties: bool) -> None:
    random = np.random.default_rng(seed)
    targets, known = random.random((30, 3)) < 0.3, random.random((30, 3)) < 0.8
    logits = random.integers(0, 5, (30, 3)).astype(float) if ties else random.normal(size=(30, 3))
    counts = random.integers(0, 4, 30).astype(float)
    expected = []
    for index in range(3):
        used = known[:, index] & (counts > 0)
        if targets[used, index].any():
            score = average_precision_score(targets[used, index], logits[used, index], sample_weight=counts[used])
            expected.append(score)
    found = WeightedMap(targets, known, logits)(counts)
    assert found == pytest.approx(np.mean(expected)) if expected else np.isnan(found)


def test_the_bootstrap_of_accuracy_agrees_with_scipys() -> None:
    random = np.random.default_rng(5)
    first, other = random.random(200) < 0.5, random.random(200) < 0.65
    found = bootstrap_over_clips([PredictionPair.of(one_label(list(first)), one_label(list(other)))], one_label=True)
    gained = other.astype(float) - first
    reference = bootstrap((gained,), np.mean, method="percentile", n_resamples=2000, rng=1).confidence_interval
    assert found.mean == pytest.approx(gained.mean())
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high), abs=0.015)


def test_the_bootstrap_draws_a_clip_for_all_students_at_once() -> None:
    """Ten students that agree are no more evidence than one."""
    random = np.random.default_rng(6)
    pair = PredictionPair.of(one_label(list(random.random(60) < 0.5)), one_label(list(random.random(60) < 0.7)))
    ten, one = (bootstrap_over_clips(pairs, one_label=True) for pairs in ([pair] * 10, [pair]))
    assert (ten.mean, ten.low, ten.high) == pytest.approx((one.mean, one.low, one.high))


def test_the_bootstrap_of_map() -> None:
    random = np.random.default_rng(7)
    targets = random.random((80, 4)) < 0.3
    noise = random.normal(size=(2, 80, 4))
    pair = PredictionPair.of(predictions(targets + 2 * noise[0], targets), predictions(targets + noise[1], targets))
    found = bootstrap_over_clips([pair], one_label=False, resamples=200)
    scores = [average_precision_score(targets, logits, average="macro") for logits in (pair.first, pair.other)]
    assert found.mean == pytest.approx(scores[1] - scores[0], abs=1e-6)
    assert 0 < found.low < found.mean < found.high
