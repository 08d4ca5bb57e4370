import math

import numpy as np
import pytest
from scipy.stats import norm

from kd.evaluation.metrics import category_accuracy, category_columns, tagging_metrics

NAMES = ("a", "b", "c")


def plain_average_precision(target: np.ndarray, score: np.ndarray) -> float:
    """Mean of the precision at each positive clip, for scores without ties."""
    hits = target[np.argsort(-score)]
    return float(np.mean([hits[: rank + 1].mean() for rank in np.flatnonzero(hits)]))


def test_averages_are_over_the_classes_that_occur_and_the_others_are_named() -> None:
    rng = np.random.default_rng(0)
    targets = np.stack([rng.random(50) < 0.3, rng.random(50) < 0.5, np.zeros(50)], axis=1).astype(np.float32)
    scores = rng.standard_normal((50, 3))
    found = tagging_metrics(targets, scores, NAMES)
    expected = [plain_average_precision(targets[:, index], scores[:, index]) for index in (0, 1)]
    assert found.mean_average_precision == pytest.approx(np.mean(expected))
    assert found.absent_classes == ("c",)
    assert math.isnan(found.average_precision[2])
    assert found.d_prime == pytest.approx(math.sqrt(2) * norm.ppf(found.roc_auc))


def test_a_class_that_is_everywhere_has_no_roc_auc_but_an_average_precision() -> None:
    targets = np.array([[1, 1, 0], [1, 0, 0]], dtype=np.float32)
    found = tagging_metrics(targets, np.array([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]), NAMES)
    assert found.average_precision[0] == 1.0
    assert math.isnan(found.class_roc_auc[0])
    assert found.roc_auc == 1.0


@pytest.mark.parametrize(
    ("targets", "scores", "message"),
    [
        (np.zeros((2, 3)), np.zeros((2, 3)), "no clip has any label"),
        (np.ones((2, 3)), np.full((2, 3), np.nan), "not finite"),
        (np.ones((2, 2)), np.ones((2, 3)), "do not fit"),
    ],
)
def test_wrong_input_is_refused(targets: np.ndarray, scores: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tagging_metrics(targets, scores, NAMES)


def test_category_accuracy_takes_the_best_class_of_each_category() -> None:
    scores = np.array([[0.1, 0.9, 0.5], [0.2, 0.1, 0.6], [0.9, 0.0, 0.1]])
    label_map = {"ab": ("a", "b"), "c": ("c",), "unused": ("nothing",)}
    categories = ["ab", "c", "c"]
    columns = category_columns(NAMES, categories, label_map)
    assert columns == {"ab": [0, 1], "c": [2]}
    assert category_accuracy(scores, categories, columns) == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="'c' maps to"):
        category_columns(NAMES, categories, {"ab": ("a",)})
    with pytest.raises(ValueError, match="'z'"):
        category_columns(NAMES, ["ab"], {"ab": ("z",)})
