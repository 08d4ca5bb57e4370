"""What reports say of single classes and clips, against scikit-learn and against plain search."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import expit, softmax
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score, log_loss

from audio_datasets.system.randomness import generator
from kd.reports.class_analysis import (
    RECALL_GRID,
    best_threshold,
    choose_thresholds,
    device_rows,
    false_alarms,
    mean_over_parts,
    misses,
    one_label_classes,
    one_label_mistakes,
    precision_at_recall,
    several_label_classes,
    std_over_parts,
)
from kd.reports.run_reader import Part, Predictions

NAMES = ("hiss", "hum", "click")


def part(label: str, logits: np.ndarray, targets: np.ndarray, known: np.ndarray | None = None, **more: object) -> tuple:
    """A part of a run with clips c0, c1, …"""
    ids = np.array([f"c{index}" for index in range(len(logits))])
    known = np.ones_like(targets, dtype=bool) if known is None else known
    predictions = Predictions(ids, np.asarray(logits, dtype=np.float32), targets > 0.5, known, **more)
    return Part(Path("run"), NAMES, label=label), predictions


def random_part(label: str, clips: int = 90, one_label: bool = False, number: int = 0) -> tuple:
    noise = generator(1, "analysis", 0, number)
    targets = np.eye(3)[np.arange(clips) % 3] if one_label else noise.random((clips, 3)) < 0.3
    return part(label, 1.5 * targets + noise.standard_normal((clips, 3)), np.asarray(targets))


scored = arrays(np.int64, st.integers(1, 25), elements=st.integers(-3, 3)).flatmap(
    lambda scores: st.tuples(st.just(scores), arrays(bool, len(scores)).filter(lambda targets: bool(targets.any())))
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_the_best_threshold_is_the_best_of_all(found: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = found
    threshold, f1 = best_threshold(targets, scores)
    candidates = np.append(np.unique(scores) - 0.5, scores.max() + 0.5)
    best = max(f1_score(targets, scores >= candidate, zero_division=0) for candidate in candidates)
    assert f1 == pytest.approx(best)
    assert f1_score(targets, scores >= threshold) == pytest.approx(best)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_the_area_under_a_curve_is_the_average_precision(found: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = found
    positives = int(targets.sum())
    recall = (np.arange(positives * 4) + 0.5) / (positives * 4)  # as fine as the steps of this curve
    area = precision_at_recall(targets, scores, recall).mean()
    assert area == pytest.approx(average_precision_score(targets, scores))


def test_one_label_classes_agree_with_scikit_learn() -> None:
    parts = [random_part("fold 1", one_label=True), random_part("fold 2", one_label=True, number=1)]
    true = np.concatenate([predictions.targets.argmax(axis=1) for _, predictions in parts])
    logits = np.concatenate([predictions.logits for _, predictions in parts])
    found = one_label_classes(parts)
    np.testing.assert_array_equal(found.confusion, confusion_matrix(true, logits.argmax(axis=1)))
    np.testing.assert_allclose(found.f1, f1_score(true, logits.argmax(axis=1), average=None))
    probabilities = softmax(logits.astype(np.float64), axis=1)
    for index in range(3):
        expected = log_loss(true[true == index], probabilities[true == index], labels=[0, 1, 2])
        assert found.log_loss[index] == pytest.approx(expected)
    np.testing.assert_array_equal(found.clips, 30)  # both parts have the same clips
    pairs = found.confusions()
    assert [count for _, _, count in pairs] == sorted((count for _, _, count in pairs), reverse=True)
    assert sum(count for _, _, count in pairs) == (true != logits.argmax(axis=1)).sum()


def test_a_clip_without_a_class_is_refused_where_each_has_one() -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match="exactly one class; 1 have not, as 'c1'"):
        one_label_classes([part("", logits, np.array([[1, 0, 0], [0, 0, 0]]))])


def test_average_precision_is_that_of_each_part_averaged() -> None:
    parts = [random_part("seed 0"), random_part("seed 1", number=1)]
    found = several_label_classes(parts)
    for number, (_, predictions) in enumerate(parts):
        for index in range(3):
            expected = average_precision_score(predictions.targets[:, index], predictions.logits[:, index])
            assert found.average_precision[number, index] == pytest.approx(expected)
    mean = found.average_precision.mean(axis=0)
    np.testing.assert_allclose(found.precision_at_recall.mean(axis=1), mean, atol=0.02)
    assert found.precision_at_recall.shape == (3, len(RECALL_GRID))


def test_parts_without_a_value_take_no_part() -> None:
    nan = np.nan
    values = np.array([[1.0, nan, nan], [3.0, 2.0, nan]])
    np.testing.assert_array_equal(mean_over_parts(values), [2.0, 2.0, nan])
    np.testing.assert_allclose(std_over_parts(values), [np.sqrt(2.0), nan, nan])


def test_a_class_without_a_positive_clip_has_no_numbers() -> None:
    logits, targets = np.zeros((4, 3)), np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    found, thresholds = (
        several_label_classes([part("", logits, targets)]),
        choose_thresholds([part("", logits, targets)]),
    )
    for values in (found.average_precision[0], found.precision_at_recall[:, 0], thresholds.probability, thresholds.f1):
        assert np.isnan(values[2])
        assert np.isfinite(values[:2]).all()
    np.testing.assert_array_equal(found.positives, [2, 2, 0])


def test_what_is_not_known_changes_nothing() -> None:
    _, predictions = random_part("")
    known = generator(2, "known").random(predictions.targets.shape) < 0.6
    changed = predictions.targets ^ ~known
    answers = []
    for targets in (predictions.targets, changed):
        parts = [part("", predictions.logits, targets, known)]
        classes, thresholds = several_label_classes(parts), choose_thresholds(parts)
        answers.append(
            [
                *(classes.average_precision, classes.precision_at_recall, classes.positives, classes.labelled),
                *(thresholds.probability, thresholds.f1, thresholds.untuned_f1),
                *(str(false_alarms(parts, NAMES)), str(misses(parts, NAMES))),
            ]
        )
    for before, after in zip(*answers, strict=True):
        np.testing.assert_array_equal(before, after)
    assert (classes.labelled == known.sum(axis=0)).all()


def test_thresholds_chosen_on_the_test_clips_are_not_judged_by_them() -> None:
    """Scores that tell nothing: on the clips that a threshold was chosen on it looks better than it is."""
    noise = generator(4, "nothing")
    targets = noise.random((400, 3)) < 0.05
    parts = [part("", noise.standard_normal((400, 3)), targets)]
    thresholds = choose_thresholds(parts)
    assert not thresholds.chosen_on_validation
    logits = parts[0][1].logits
    seemingly = [best_threshold(targets[:, index], logits[:, index])[1] for index in range(3)]
    assert (thresholds.f1 < seemingly).all()
    for index in range(3):
        chosen, _ = best_threshold(targets[:, index], logits[:, index])
        assert thresholds.probability[index] == pytest.approx(expit(chosen))
    # They depend on which clip it is, not on the order of the clips.
    order = noise.permutation(400)
    shuffled = parts[0][1]
    shuffled = Predictions(*(values[order] for values in (shuffled.clip_ids, logits, targets, shuffled.known)))
    np.testing.assert_allclose(choose_thresholds([(parts[0][0], shuffled)]).f1, thresholds.f1)


def test_thresholds_come_from_validation_clips_where_there_are_any(tmp_path: Path) -> None:
    _, test = random_part("")
    ids = [f"v{index}" for index in range(60)]
    targets = np.arange(180).reshape(60, 3) % 4 == 0
    logits = np.where(targets, 2.0, -1.0).astype(np.float32)
    np.savez(tmp_path / "validation_predictions.npz", clip_ids=np.array(ids), logits=logits, targets=targets)
    thresholds = choose_thresholds([(Part(tmp_path, NAMES), test)])
    assert thresholds.chosen_on_validation
    np.testing.assert_allclose(thresholds.probability, expit(0.5))
    expected = f1_score(test.targets, test.logits >= 0.5, average=None)
    np.testing.assert_allclose(thresholds.f1, expected)


def test_mistakes_are_the_surest_and_each_clip_is_there_once() -> None:
    targets = np.eye(3)[[0, 1, 2, 0]]
    first = np.array([[0.0, 3, 0], [0, 9, 0], [1, 0, 0], [0, 0, 0.5]])
    second = np.array([[0.0, 5, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    found = one_label_mistakes([part("fold 1", first, targets), part("fold 2", second, targets)], NAMES)
    assert [(mistake.clip_id, mistake.part) for mistake in found] == [
        ("c0", "fold 2"),
        ("c2", "fold 1"),
        ("c3", "fold 1"),
    ]
    assert (found[0].truth, found[0].said) == ("hiss", "hum")
    assert found[0].probability == pytest.approx(np.exp(5) / (np.exp(5) + 2), rel=1e-5)
    assert found[0].truth_probability == pytest.approx(1 / (np.exp(5) + 2), rel=1e-5)
    assert len(one_label_mistakes([part("", first, targets)], NAMES, at_most=1)) == 1


def test_false_alarms_and_misses() -> None:
    targets = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    logits = np.array([[2.0, 4, -3], [1, -5, -6], [-0.5, 3, -1]])
    parts = [part("", logits, targets)]
    assert [(found.clip_id, found.said) for found in false_alarms(parts, NAMES)] == [("c0", "hum"), ("c1", "hiss")]
    missed = misses(parts, NAMES)
    assert [(found.clip_id, found.said, found.truth) for found in missed] == [
        ("c1", "click", "hum, click"),
        ("c2", "hiss", "hiss, hum"),
    ]
    assert missed[0].probability == pytest.approx(expit(-6.0), rel=1e-5)
    known = np.ones((3, 3), dtype=bool)
    known[1, 2] = False
    assert misses([part("", logits, targets, known)], NAMES)[0].said == "hum"


def test_devices_seen_and_unseen_apart() -> None:
    targets = np.eye(3)[[0, 1, 2, 0, 1, 2]]
    logits = 5 * np.eye(3)[[0, 1, 2, 0, 0, 0]]
    devices = {
        "devices": np.array(["b", "a", "a", "b", "s5", "s5"]),
        "device_seen": np.array([1, 1, 1, 1, 0, 0], dtype=bool),
    }
    rows = device_rows([part("", logits, targets, **devices)], one_label=True)
    assert [(row.name, row.seen, row.clips) for row in rows] == [
        *(("a", True, 2), ("b", True, 2), ("s5", False, 2)),
        *(("seen devices", True, 4), ("unseen devices", False, 2), ("all devices", None, 6)),
    ]
    assert [row.scores["accuracy"] for row in rows] == [(1.0,), (1.0,), (0.0,), (1.0,), (0.0,), (pytest.approx(4 / 6),)]
    assert rows[-1].scores["macro_accuracy"] == (pytest.approx((1 + 0.5 + 0.5) / 3),)
    assert rows[-1].scores["log_loss"] == (pytest.approx(log_loss(targets, softmax(logits, axis=1))),)
    assert device_rows([part("", logits, targets)], one_label=True) == []
    several = device_rows([part("", logits, targets, **devices)], one_label=False)
    assert [set(row.scores) for row in several] == [{"mAP"}] * 6
