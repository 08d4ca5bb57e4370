"""Statistics of classes where a clip may have any number, against scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

from audio_datasets.system.randomness import generator
from kd.reports.analysis.mistakes import false_alarms, misses
from kd.reports.analysis.multi_label import RECALL_GRID, multi_label_classes, precision_at_recall
from kd.reports.analysis.thresholds import choose_thresholds
from kd.reports.run_reader import Part, Predictions

MakePart = Callable[..., tuple[Part, Predictions]]

scored = arrays(np.int64, st.integers(1, 25), elements=st.integers(-3, 3)).flatmap(
    lambda scores: st.tuples(st.just(scores), arrays(bool, len(scores)).filter(lambda targets: bool(targets.any())))
)


@settings(max_examples=60, deadline=None)
@given(scored)
def test_the_area_under_a_curve_is_the_average_precision(found: tuple[np.ndarray, np.ndarray]) -> None:
    scores, targets = found
    positives = int(targets.sum())
    recall = (np.arange(positives * 4) + 0.5) / (positives * 4)  # as fine as the steps of this curve
    area = precision_at_recall(targets, scores, recall).mean()
    assert area == pytest.approx(average_precision_score(targets, scores))


def test_average_precision_is_that_of_each_part_averaged(random_part: MakePart) -> None:
    parts = [random_part("seed 0"), random_part("seed 1", number=1)]
    found = multi_label_classes(parts)
    for number, (_, predictions) in enumerate(parts):
        for index in range(3):
            expected = average_precision_score(predictions.targets[:, index], predictions.logits[:, index])
            assert found.average_precision[number, index] == pytest.approx(expected)
    mean = found.average_precision.mean(axis=0)
    np.testing.assert_allclose(found.precision_at_recall.mean(axis=1), mean, atol=0.02)
    assert found.precision_at_recall.shape == (3, len(RECALL_GRID))


def test_a_class_without_a_positive_clip_has_no_numbers(part: MakePart) -> None:
    logits, targets = np.zeros((4, 3)), np.array([[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 1, 0]])
    found, thresholds = (
        multi_label_classes([part("", logits, targets)]),
        choose_thresholds([part("", logits, targets)]),
    )
    for values in (found.average_precision[0], found.precision_at_recall[:, 0], thresholds.probability, thresholds.f1):
        assert np.isnan(values[2])
        assert np.isfinite(values[:2]).all()
    np.testing.assert_array_equal(found.positives, [2, 2, 0])


def test_what_is_not_known_changes_nothing(part: MakePart, random_part: MakePart, names: tuple[str, ...]) -> None:
    _, predictions = random_part("")
    known = generator(2, "known").random(predictions.targets.shape) < 0.6
    changed = predictions.targets ^ ~known
    answers = []
    for targets in (predictions.targets, changed):
        parts = [part("", predictions.logits, targets, known)]
        classes, thresholds = multi_label_classes(parts), choose_thresholds(parts)
        answers.append(
            [
                *(classes.average_precision, classes.precision_at_recall, classes.positives, classes.labelled),
                *(thresholds.probability, thresholds.f1, thresholds.untuned_f1),
                *(str(false_alarms(parts, names)), str(misses(parts, names))),
            ]
        )
    for before, after in zip(*answers, strict=True):
        np.testing.assert_array_equal(before, after)
    assert (classes.labelled == known.sum(axis=0)).all()
