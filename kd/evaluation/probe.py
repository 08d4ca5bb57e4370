"""A linear probe: the performance of a linear classifier on a student's frozen embeddings. Takes seconds instead of hours.

Shapes: n clips, E embedding size, C classes.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from audio_datasets.tasks.label_space import LabelSpace
from kd.data.splits import Partition
from kd.data.windows import Clips

MOST_ITERATIONS = 1000

Fit = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""(features (n, E), labels (n,)) of the training clips -> scores of the test clips."""


def probe_logits(
    clips: Clips,
    label_space: LabelSpace,
    part: Partition,
    embeddings: np.ndarray,
    regularization: float = 1.0,
    before_fit: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Logits (test clips, C) of logistic regression on the standardised embeddings (n, E) of the training clips.

    A group of exclusive classes gets one multinomial regression; any other group gets one regression for each class. Both use
    the clips whose label is known. If no training clip has a class, or all have it, its logits are constant.

    Args:
        regularization: inverse strength of regularisation, scikit-learn's C.
        before_fit: called before each regression; it may raise.
    """
    scaler = StandardScaler().fit(embeddings[part.train])
    train, test = scaler.transform(embeddings[part.train]), scaler.transform(embeddings[part.test])
    targets, known = clips.targets(part.train) > 0, clips.mask(part.train)

    def fit(features: np.ndarray, labels: np.ndarray) -> np.ndarray:
        before_fit()
        return (
            LogisticRegression(C=regularization, max_iter=MOST_ITERATIONS).fit(features, labels).decision_function(test)
        )

    parts = [
        (_exclusive if group.exclusive else _independent)(fit, train, targets[:, columns], known[:, columns], len(test))
        for group, columns in label_space.parts()
    ]
    return np.concatenate(parts, axis=1)


def _exclusive(fit: Fit, train: np.ndarray, targets: np.ndarray, known: np.ndarray, tests: int) -> np.ndarray:
    """Logits (tests, classes of the group) of one multinomial regression."""
    logits = np.full((tests, targets.shape[1]), -1e3, dtype=np.float32)
    rows = known.all(axis=1)
    classes = targets[rows].argmax(axis=1)
    present = np.unique(classes)
    if len(present) < 2:
        logits[:, present] = 0.0
        return logits
    scores = fit(train[rows], classes)
    if len(present) == 2:  # scikit-learn then returns only the score of the second class
        scores = np.stack([np.zeros(len(scores)), scores], axis=1)
    logits[:, present] = scores
    return logits


def _independent(fit: Fit, train: np.ndarray, targets: np.ndarray, known: np.ndarray, tests: int) -> np.ndarray:
    """Logits (tests, classes of the group) of a regression for each class."""
    logits = np.zeros((tests, targets.shape[1]), dtype=np.float32)
    for index in range(targets.shape[1]):
        rows = known[:, index]
        labels = targets[rows, index]
        if labels.any() and not labels.all():
            logits[:, index] = fit(train[rows], labels)
    return logits
