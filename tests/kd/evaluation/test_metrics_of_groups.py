"""Metrics of label spaces with several groups, counted clip by clip."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.evaluation.label_metrics import label_metrics, metric_names, smaller_is_better

VERBS = LabelGroup("verb", ("cut", "wash"), exclusive=True)
NOUNS = LabelGroup("noun", ("knife", "onion", "pan"), exclusive=True)
SOUNDS = LabelGroup("sound", ("click", "hiss"), exclusive=False)
KITCHEN = LabelSpace((VERBS, NOUNS))

VERB = np.array([0, 1, 0, 1, 0, 1])
NOUN = np.array([0, 1, 1, 0, 0, 1])
SAID_VERB = np.array([0, 1, 1, 1, 0, 0])
SAID_NOUN = np.array([0, 1, 1, 2, 1, 1])


def one_hot(numbers: np.ndarray, classes: int) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[numbers]


TARGETS = np.concatenate([one_hot(VERB, 2), one_hot(NOUN, 3)], axis=1)
LOGITS = 3 * np.concatenate([one_hot(SAID_VERB, 2), one_hot(SAID_NOUN, 3)], axis=1)


def test_two_exclusive_groups_have_their_own_metrics_and_the_share_that_is_right_in_both() -> None:
    found = label_metrics(KITCHEN, TARGETS, np.ones(TARGETS.shape, dtype=bool), LOGITS)
    assert found["verb/accuracy"] == pytest.approx(4 / 6)
    assert found["noun/accuracy"] == pytest.approx(4 / 6)
    both = [
        verb == said_verb and noun == said_noun
        for verb, noun, said_verb, said_noun in zip(VERB, NOUN, SAID_VERB, SAID_NOUN, strict=True)
    ]
    assert found["accuracy"] == pytest.approx(sum(both) / 6)
    assert sum(both) == 2
    assert next(iter(found)) == "accuracy"
    assert found["noun/absent"] == ["pan"]
    assert found["noun/macro_accuracy"] == pytest.approx((1 / 3 + 1.0) / 2)
    right, wrong = np.log(np.exp(3) / (np.exp(3) + 1)), np.log(1 / (np.exp(3) + 1))
    expected = np.mean([right if verb == said else wrong for verb, said in zip(VERB, SAID_VERB, strict=True)])
    assert found["verb/log_loss"] == pytest.approx(-expected)
    assert set(metric_names(KITCHEN)) == {name for name, value in found.items() if isinstance(value, float)}
    assert metric_names(KITCHEN)[:2] == ("accuracy", "verb/accuracy")


def test_a_clip_counts_in_a_group_if_its_labels_are_known_and_overall_if_all_are() -> None:
    mask = np.ones(TARGETS.shape, dtype=bool)
    mask[2, 0] = False  # the verb of a clip that is wrong in it
    mask[0, 2:] = False  # the noun of a clip that is right in both
    found = label_metrics(KITCHEN, TARGETS, mask, LOGITS)
    assert found["verb/accuracy"] == pytest.approx(4 / 5)
    assert found["noun/accuracy"] == pytest.approx(3 / 5)
    assert found["accuracy"] == pytest.approx(1 / 4)
    # What the targets say where they are not known changes nothing.
    wrong = np.where(mask, TARGETS, 1 - TARGETS)
    assert label_metrics(KITCHEN, wrong, mask, LOGITS) == found
    # No clip whose labels are all known: each group still has its metrics.
    mask[:3, 0], mask[3:, 2] = False, False
    nothing = label_metrics(KITCHEN, TARGETS, mask, LOGITS)
    assert nothing["accuracy"] is None
    assert nothing["verb/accuracy"] == pytest.approx(2 / 3)


def test_a_group_of_which_no_label_is_known_is_refused_by_name() -> None:
    mask = np.ones(TARGETS.shape, dtype=bool)
    mask[:, 3] = False
    with pytest.raises(ValueError, match="no clip's label of noun is known"):
        label_metrics(KITCHEN, TARGETS, mask, LOGITS)


def test_an_exclusive_group_beside_one_that_is_not() -> None:
    space = LabelSpace((VERBS, SOUNDS))
    rng = np.random.default_rng(0)
    sounds = (rng.random((6, 2)) < 0.5).astype(np.float32)
    sounds[:2] = [[1, 0], [0, 1]]
    said = rng.standard_normal((6, 2))
    mask = np.ones((6, 4), dtype=bool)
    mask[4, 2] = mask[5, 3] = False
    found = label_metrics(
        space, np.concatenate([TARGETS[:, :2], sounds], 1), mask, np.concatenate([LOGITS[:, :2], said], 1)
    )
    assert found["verb/accuracy"] == pytest.approx(4 / 6)
    expected = [
        average_precision_score(sounds[mask[:, 2 + index], index], said[mask[:, 2 + index], index]) for index in (0, 1)
    ]
    assert found["sound/mAP"] == pytest.approx(np.mean(expected))
    assert found["sound/classes"]["click"]["clips"] == int(sounds[mask[:, 2], 0].sum())
    assert "accuracy" not in found  # right in all groups means nothing where one may have any number of classes
    assert metric_names(space) == (
        *("verb/accuracy", "verb/macro_accuracy", "verb/log_loss", "verb/macro_log_loss"),
        *("sound/mAP", "sound/roc_auc", "sound/d_prime"),
    )


def test_single_groups_have_plain_names_and_losses_get_smaller() -> None:
    assert metric_names(LabelSpace.single("ab", exclusive=True))[0] == "accuracy"
    assert metric_names(LabelSpace.single("ab", exclusive=False))[0] == "mAP"
    smaller = [name for name in metric_names(KITCHEN) if smaller_is_better(name)]
    assert smaller == ["verb/log_loss", "verb/macro_log_loss", "noun/log_loss", "noun/macro_log_loss"]
