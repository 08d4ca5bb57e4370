"""What metrics come to without listening, against counting by hand, and the warnings of runs near that."""

import numpy as np
import pytest

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.evaluation.baselines import baselines, beside, category_baseline, is_near_chance, warnings_of
from kd.evaluation.label_metrics import label_metrics
from kd.run_folder.results import mean_baseline

ONE = LabelSpace.single(("a", "b", "c", "d"), exclusive=True)
SEVERAL = LabelSpace.single(("a", "b", "c"), exclusive=False)


def test_guessing_and_always_the_same_answer() -> None:
    """Three of five known clips are "b"; no clip is "d"; the sixth is not known."""
    targets = np.eye(4)[[1, 1, 1, 0, 2, 0]]
    mask = np.ones(targets.shape, dtype=bool)
    mask[5] = False
    found = baselines(ONE, targets, mask)
    assert found["accuracy"] == {"chance": 0.25, "majority": 0.6}
    assert found["macro_accuracy"] == {"chance": 0.25, "majority": pytest.approx(1 / 3)}
    always_b = label_metrics(ONE, targets, mask, np.tile([0.0, 1.0, 0.0, 0.0], (6, 1)))
    assert found["accuracy"]["majority"] == pytest.approx(always_b["accuracy"])
    assert found["macro_accuracy"]["majority"] == pytest.approx(always_b["macro_accuracy"])
    assert beside(found["accuracy"]) == "chance 0.2500, most frequent class 0.6000"


def test_chance_of_a_mean_average_precision_is_how_often_its_classes_occur() -> None:
    rng = np.random.default_rng(0)
    targets = rng.random((4000, 3)) < [0.1, 0.4, 0.0]
    found = baselines(SEVERAL, targets, np.ones(targets.shape, dtype=bool))
    random_order = label_metrics(SEVERAL, targets, np.ones(targets.shape, dtype=bool), rng.random(targets.shape))
    assert found["mAP"]["chance"] == pytest.approx(0.25, abs=0.02)
    assert found["mAP"]["chance"] == pytest.approx(random_order["mAP"], abs=0.02)


def test_several_groups_are_right_together() -> None:
    space = LabelSpace((LabelGroup("verb", ("a", "b"), True), LabelGroup("noun", ("c", "d"), True)))
    verbs, nouns = np.eye(2)[[0, 0, 0, 1]], np.eye(2)[[0, 0, 1, 1]]
    found = baselines(space, np.concatenate([verbs, nouns], axis=1), np.ones((4, 4), dtype=bool))
    assert found["verb/accuracy"] == {"chance": 0.5, "majority": 0.75}
    assert found["accuracy"] == {"chance": 0.25, "majority": 0.5}


def test_a_category_among_several() -> None:
    assert category_baseline(["rain", "dog", "rain", "sea"], 4) == {"chance": 0.25, "majority": 0.5}


def test_the_mean_over_runs_needs_all_of_them() -> None:
    one, other = {"accuracy": {"chance": 0.5, "majority": 0.6}}, {"accuracy": {"chance": 0.5, "majority": 0.8}}
    assert mean_baseline("accuracy", [one, other]) == {"chance": 0.5, "majority": pytest.approx(0.7)}
    assert mean_baseline("accuracy", [one, {}]) == {}
    assert mean_baseline("mAP", [one]) == {}


@pytest.mark.parametrize(
    ("value", "clips", "near"),
    [(0.108, 64, True), (0.25, 64, True), (0.35, 64, False), (0.35, 8, True), (1.0, 8, False), (0.0, 0, False)],
)
def test_an_accuracy_is_near_chance_where_a_constant_answer_might_have_done_it(
    value: float, clips: int, near: bool
) -> None:
    assert is_near_chance("accuracy", value, clips, {"chance": 0.1, "majority": 0.2}) == near


def test_warnings_name_the_numbers() -> None:
    level = {"chance": 0.1, "majority": 0.2}
    both = warnings_of("accuracy", 0.108, 64, level, 1.0, "runs/mine/probe")
    assert [text[:40] for text in both] == [
        "accuracy 0.1080 on 64 test clips is not ",
        "accuracy 0.1080 is worse than the linear",
    ]
    assert "chance 0.1000, most frequent class 0.2000" in both[0]
    assert "1.0000" in both[1]
    assert "runs/mine/probe" in both[1]
    assert warnings_of("accuracy", 0.9, 64, level, 0.9, "p") == []
    assert warnings_of("mAP", 0.11, 64, {"chance": 0.1}, None, "p")[0].startswith("mAP 0.1100 on 64 test clips")
    assert warnings_of("mAP", 0.2, 64, {"chance": 0.1}, None, "p") == []
    assert warnings_of("log_loss", 0.5, 64, {}, 0.6, "p") == []
    assert len(warnings_of("log_loss", 0.7, 64, {}, 0.6, "p")) == 1
