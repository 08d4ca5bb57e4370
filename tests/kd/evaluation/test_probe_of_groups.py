"""The linear probe on several groups of classes, each against scikit-learn on its own columns."""

from typing import Any

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.data.windows import Clips
from kd.evaluation.probe import RARE, fit_probe

VERBS = LabelGroup("verb", ("cut", "wash", "open"), exclusive=True)
SOUNDS = LabelGroup("sound", ("click", "hiss"), exclusive=False)
SPACE = LabelSpace((VERBS, SOUNDS))
TRAIN, TEST = np.arange(60), np.arange(60, 80)


def probe_logits(clips: Clips, embeddings: np.ndarray, **settings: Any) -> np.ndarray:
    return fit_probe(clips, SPACE, TRAIN, embeddings, **settings).logits(embeddings[TEST])


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
    found = probe_logits(numbered_clips(SPACE.class_names, targets), embeddings, regularization=0.3)
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
    found = probe_logits(numbered_clips(SPACE.class_names, targets, mask=mask), embeddings)
    scaler = StandardScaler().fit(embeddings[TRAIN])  # from all training clips
    scaled = scaler.transform(embeddings)
    rows = np.arange(20, 60)
    expected = LogisticRegression(max_iter=1000).fit(scaled[rows], verb[rows]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, :3], expected, atol=1e-4)
    rows = np.setdiff1d(TRAIN, np.arange(30, 50))
    expected = LogisticRegression(max_iter=1000).fit(scaled[rows], sounds[rows, 0]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, 3], expected, atol=1e-4)
    wrong = np.where(mask, targets, 1 - targets)
    again = probe_logits(numbered_clips(SPACE.class_names, wrong, mask=mask), embeddings)
    np.testing.assert_array_equal(found, again)


def test_classes_without_training_clips_are_never_chosen(numbered_clips: type, embeddings: np.ndarray) -> None:
    """Two classes left: scikit-learn gives one score for both. One left: it is chosen everywhere."""
    verb = np.where(embeddings[:, 0] > 5, 0, 2)
    targets = np.concatenate([np.eye(3)[verb], np.ones((80, 1)), np.zeros((80, 1))], axis=1)
    calls: list[int] = []
    found = probe_logits(numbered_clips(SPACE.class_names, targets), embeddings, before_fit=lambda: calls.append(1))
    scaled = StandardScaler().fit(embeddings[TRAIN]).transform(embeddings)
    score = LogisticRegression(max_iter=1000).fit(scaled[TRAIN], verb[TRAIN]).decision_function(scaled[TEST])
    np.testing.assert_allclose(found[:, 2] - found[:, 0], score, atol=1e-4)
    assert (found[:, 1] < -500).all()
    # Everywhere or nowhere: nothing to learn.
    np.testing.assert_allclose(1 / (1 + np.exp(-found[:, 3:])), np.tile([1 - RARE, RARE], (20, 1)), rtol=1e-4)
    assert len(calls) == 1

    targets[:, :3] = np.eye(3)[np.ones(80, dtype=int)]
    calls.clear()
    found = probe_logits(numbered_clips(SPACE.class_names, targets), embeddings, before_fit=lambda: calls.append(1))
    assert (found[:, :3].argmax(axis=1) == 1).all()
    assert not calls
