"""The linear probe on several groups of classes, each against scikit-learn on its own columns."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.data.splits import Partition
from kd.evaluation.probe import probe_logits

VERBS = LabelGroup("verb", ("cut", "wash", "open"), exclusive=True)
SOUNDS = LabelGroup("sound", ("click", "hiss"), exclusive=False)
SPACE = LabelSpace((VERBS, SOUNDS))
TRAIN, TEST = np.arange(60), np.arange(60, 80)
PART = Partition(None, TRAIN, np.arange(0), TEST)


@pytest.fixture
def embeddings() -> np.ndarray:
    return 5.0 + 2.0 * np.random.default_rng(0).standard_normal((80, 4))


@pytest.fixture
def labels(embeddings: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Verb (80,) and sounds (80, 2), which the embeddings tell apart somewhat."""
    noise = np.random.default_rng(1).standard_normal((80, 4))
    verb = (embeddings + 2.0 * noise)[:, :3].argmax(axis=1)
    return verb, (embeddings + noise)[:, 2:] > 5.0


def test_each_group_is_scikit_learns_regression_of_its_own(
    numbered_clips: type, embeddings: np.ndarray, labels: tuple[np.ndarray, np.ndarray]
) -> None:
    verb, sounds = labels
    targets = np.concatenate([np.eye(3)[verb], sounds], axis=1)
    found = probe_logits(numbered_clips(SPACE.class_names, targets), SPACE, PART, embeddings, regularization=0.3)
    regression = make_pipeline(StandardScaler(), LogisticRegression(C=0.3, max_iter=1000))
    expected = regression.fit(embeddings[TRAIN], verb[TRAIN]).predict_proba(embeddings[TEST])
    softmax = np.exp(found[:, :3]) / np.exp(found[:, :3]).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(softmax, expected, atol=1e-4)
    for index in (0, 1):
        expected = regression.fit(embeddings[TRAIN], sounds[TRAIN, index]).predict_proba(embeddings[TEST])[:, 1]
        np.testing.assert_allclose(1 / (1 + np.exp(-found[:, 3 + index])), expected, atol=1e-4)


def test_only_known_labels_are_fitted(
    numbered_clips: type, embeddings: np.ndarray, labels: tuple[np.ndarray, np.ndarray]
) -> None:
    verb, sounds = labels
    targets = np.concatenate([np.eye(3)[verb], sounds], axis=1)
    mask = np.ones(targets.shape, dtype=bool)
    mask[:20, 1] = False
    mask[30:50, 3] = False
    found = probe_logits(numbered_clips(SPACE.class_names, targets, mask=mask), SPACE, PART, embeddings)
    scaler = StandardScaler().fit(embeddings[TRAIN])  # from all training clips
    scaled = scaler.transform(embeddings)
    rows = np.arange(20, 60)
    expected = LogisticRegression(max_iter=1000).fit(scaled[rows], verb[rows]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-4)
    rows = np.setdiff1d(TRAIN, np.arange(30, 50))
    expected = LogisticRegression(max_iter=1000).fit(scaled[rows], sounds[rows, 0]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, 3], expected, atol=1e-4)
    wrong = np.where(mask, targets, 1 - targets)
    again = probe_logits(numbered_clips(SPACE.class_names, wrong, mask=mask), SPACE, PART, embeddings)
    np.testing.assert_array_equal(found, again)


def test_classes_without_training_clips_are_never_chosen(numbered_clips: type, embeddings: np.ndarray) -> None:
    """Two classes left: scikit-learn gives one score for both. One left: it is chosen everywhere."""
    verb = np.where(embeddings[:, 0] > 5, 0, 2)
    targets = np.concatenate([np.eye(3)[verb], np.ones((80, 1)), np.zeros((80, 1))], axis=1)
    calls: list[int] = []
    found = probe_logits(
        numbered_clips(SPACE.class_names, targets), SPACE, PART, embeddings, before_fit=lambda: calls.append(1)
    )
    scaled = StandardScaler().fit(embeddings[TRAIN]).transform(embeddings)
    score = LogisticRegression(max_iter=1000).fit(scaled[TRAIN], verb[TRAIN]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, 2] - found[:, 0], score, atol=1e-4)
    assert (found[:, 1] < -500).all()
    assert not found[:, 3:].any()  # everywhere or nowhere: nothing to learn
    assert len(calls) == 1

    targets[:, :3] = np.eye(3)[np.ones(80, dtype=int)]
    calls.clear()
    found = probe_logits(
        numbered_clips(SPACE.class_names, targets), SPACE, PART, embeddings, before_fit=lambda: calls.append(1)
    )
    assert (found[:, :3].argmax(axis=1) == 1).all()
    assert not calls
