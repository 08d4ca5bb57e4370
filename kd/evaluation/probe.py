"""A linear probe: how far a linear classifier gets on a student's frozen embeddings. Seconds in place of hours.

Shapes: n clips, E embedding size, C classes.
"""

from collections.abc import Callable

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from audio_datasets.tasks.task import TaskClips
from kd.data.splits import Partition

MOST_ITERATIONS = 1000


def probe_logits(
    clips: TaskClips,
    part: Partition,
    embeddings: np.ndarray,
    exclusive: bool,
    regularization: float = 1.0,
    before_fit: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Logits (test clips, C) of logistic regression on the standardised embeddings (n, E) of the training clips.

    Exclusive classes: one multinomial regression. Else one regression for each class, on the clips whose label is known. A
    class that has no (or nothing but) training clips gets a constant.

    Args:
        regularization: the inverse of its strength, scikit-learn's C.
        before_fit: called before each regression; it may raise.
    """
    scaler = StandardScaler().fit(embeddings[part.train])
    train, test = scaler.transform(embeddings[part.train]), scaler.transform(embeddings[part.test])
    targets, known = clips.targets(part.train), clips.mask(part.train)
    logits = np.full((len(part.test), len(clips.class_names)), -1e3 if exclusive else 0.0, dtype=np.float32)
    if exclusive:
        before_fit()
        classes = targets.argmax(axis=1)
        present = np.unique(classes)
        if len(present) == 1:
            logits[:, present] = 0.0
            return logits
        model = LogisticRegression(C=regularization, max_iter=MOST_ITERATIONS).fit(train, classes)
        scores = model.decision_function(test)
        if len(present) == 2:  # scikit-learn then gives the second class's score alone
            scores = np.stack([np.zeros(len(scores)), scores], axis=1)
        logits[:, present] = scores
        return logits
    for index in range(len(clips.class_names)):
        before_fit()
        rows = known[:, index]
        labels = targets[rows, index] > 0
        if labels.any() and not labels.all():
            model = LogisticRegression(C=regularization, max_iter=MOST_ITERATIONS).fit(train[rows], labels)
            logits[:, index] = model.decision_function(test)
    return logits
