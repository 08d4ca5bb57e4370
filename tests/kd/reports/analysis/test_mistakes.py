"""The most confident mistakes, on predictions small enough to check by hand."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import expit

from kd.reports.analysis.mistakes import false_alarms, misses, single_label_mistakes
from kd.reports.run_reader import Part, Predictions

MakePart = Callable[..., tuple[Part, Predictions]]


def test_mistakes_are_the_surest_and_each_clip_is_there_once(part: MakePart, names: tuple[str, ...]) -> None:
    targets = np.eye(3)[[0, 1, 2, 0]]
    first = np.array([[0.0, 3, 0], [0, 9, 0], [1, 0, 0], [0, 0, 0.5]])
    second = np.array([[0.0, 5, 0], [0, 9, 0], [0, 0, 9], [9, 0, 0]])
    found = single_label_mistakes([part("fold 1", first, targets), part("fold 2", second, targets)], names)
    assert [(mistake.clip_id, mistake.part) for mistake in found] == [
        ("c0", "fold 2"),
        ("c2", "fold 1"),
        ("c3", "fold 1"),
    ]
    assert (found[0].truth, found[0].said) == ("hiss", "hum")
    assert found[0].probability == pytest.approx(np.exp(5) / (np.exp(5) + 2), rel=1e-5)
    assert found[0].truth_probability == pytest.approx(1 / (np.exp(5) + 2), rel=1e-5)
    assert len(single_label_mistakes([part("", first, targets)], names, at_most=1)) == 1


def test_false_alarms_and_misses(part: MakePart, names: tuple[str, ...]) -> None:
    targets = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 0]])
    logits = np.array([[2.0, 4, -3], [1, -5, -6], [-0.5, 3, -1]])
    parts = [part("", logits, targets)]
    assert [(found.clip_id, found.said) for found in false_alarms(parts, names)] == [("c0", "hum"), ("c1", "hiss")]
    missed = misses(parts, names)
    assert [(found.clip_id, found.said, found.truth) for found in missed] == [
        ("c1", "click", "hum, click"),
        ("c2", "hiss", "hiss, hum"),
    ]
    assert missed[0].probability == pytest.approx(expit(-6.0), rel=1e-5)
    known = np.ones((3, 3), dtype=bool)
    known[1, 2] = False
    assert misses([part("", logits, targets, known)], names)[0].said == "hum"
