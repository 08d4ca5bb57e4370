"""Statistics of classes where every clip has exactly one, against scikit-learn."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.metrics import confusion_matrix, f1_score, log_loss

from kd.reports.analysis.single_label import single_label_classes
from kd.reports.run_reader import Part, Predictions

MakePart = Callable[..., tuple[Part, Predictions]]


def test_single_label_classes_agree_with_scikit_learn(random_part: MakePart) -> None:
    parts = [random_part("fold 1", one_label=True), random_part("fold 2", one_label=True, number=1)]
    true = np.concatenate([predictions.targets.argmax(axis=1) for _, predictions in parts])
    logits = np.concatenate([predictions.logits for _, predictions in parts])
    found = single_label_classes(parts)
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


def test_a_clip_without_a_class_is_refused_where_each_has_one(part: MakePart) -> None:
    logits = np.zeros((2, 3))
    with pytest.raises(ValueError, match="exactly one class; 1 do not, such as 'c1'"):
        single_label_classes([part("", logits, np.array([[1, 0, 0], [0, 0, 0]]))])
