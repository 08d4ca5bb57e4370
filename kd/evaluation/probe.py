"""A linear probe: the performance of a linear classifier on a student's frozen embeddings. Takes seconds instead of hours.

Shapes: n clips, E embedding size, C classes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from audio_datasets.system.command import progress
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.windows import Clips

MOST_ITERATIONS = 1000
MOST_CLIPS = 20_000
"""The probe is fitted on at most this many training clips, drawn at random: more would take hours and change little."""
NEVER = -1e3
"""Logit of a class of an exclusive group that has no training clip."""
RARE = 1e-3
"""Probability given to a class that no training clip has; 1 minus this to one that all have."""

Fit = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
"""(features (n, E), labels (n,)) -> weights (classes, E) and biases (classes,); a single row for two classes."""


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of embeddings, as they are: their standardisation is part of the weights."""

    weight: np.ndarray
    """(C, E) float32."""
    bias: np.ndarray
    """(C,) float32."""

    def logits(self, embeddings: np.ndarray) -> np.ndarray:
        """(n, E) -> (n, C) float32."""
        return (embeddings.astype(np.float64) @ self.weight.T + self.bias).astype(np.float32)


def fit_probe(
    clips: Clips,
    label_space: LabelSpace,
    train: np.ndarray,
    embeddings: np.ndarray,
    regularization: float = 1.0,
    before_fit: Callable[[], None] = lambda: None,
    shown: bool = False,
) -> LinearProbe:
    """Logistic regression on the standardised embeddings (clips, E) of the training clips.

    A group of exclusive classes gets one multinomial regression; any other group gets one regression for each class. Both use
    the clips whose label is known. If no training clip has a class, or all have it, its logits are constant.

    Args:
        train: rows of the training clips, also of ``embeddings``.
        regularization: inverse strength of regularisation, scikit-learn's C.
        before_fit: called before each regression; it may raise.
        shown: whether to show progress.
    """
    from sklearn.linear_model import LogisticRegression  # here, because scikit-learn is slow to import
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(embeddings[train].astype(np.float64))
    features = scaler.transform(embeddings[train].astype(np.float64))
    targets, known = clips.targets(train) > 0, clips.mask(train)
    regressions = sum(1 if group.exclusive else len(group.class_names) for group in label_space.groups)
    with progress(total=regressions, shown=shown and regressions > 1, desc="probe", unit="class", leave=False) as bar:

        def fit(features: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            before_fit()
            fitted = LogisticRegression(C=regularization, max_iter=MOST_ITERATIONS).fit(features, labels)
            bar.update()
            return fitted.coef_, fitted.intercept_

        parts = [
            (_exclusive if group.exclusive else _independent)(fit, features, targets[:, columns], known[:, columns])
            for group, columns in label_space.parts()
        ]
    weight, bias = (np.concatenate(values) for values in zip(*parts, strict=True))
    weight = weight / scaler.scale_
    return LinearProbe(weight.astype(np.float32), (bias - weight @ scaler.mean_).astype(np.float32))


def clips_to_fit(train: np.ndarray, seed: int) -> np.ndarray:
    """At most ``MOST_CLIPS`` of the rows, drawn from ``seed``; ascending."""
    if len(train) <= MOST_CLIPS:
        return train
    return np.sort(generator(seed, "clips of the probe").permutation(train)[:MOST_CLIPS])


def _exclusive(fit: Fit, features: np.ndarray, targets: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes of the group, E) and biases of one multinomial regression."""
    classes = targets.shape[1]
    weight, bias = np.zeros((classes, features.shape[1])), np.full(classes, NEVER)
    rows = known.all(axis=1)
    labels = targets[rows].argmax(axis=1)
    present = np.unique(labels)
    bias[present] = 0.0
    if len(present) < 2:
        return weight, bias
    fitted = fit(features[rows], labels)
    if len(present) == 2:  # scikit-learn then gives the second class's score alone
        present = present[1:]
    weight[present], bias[present] = fitted
    return weight, bias


def _independent(
    fit: Fit, features: np.ndarray, targets: np.ndarray, known: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (classes of the group, E) and biases of a regression for each class."""
    classes = targets.shape[1]
    weight, bias = np.zeros((classes, features.shape[1])), np.zeros(classes)
    for index in range(classes):
        rows = known[:, index]
        labels = targets[rows, index]
        if labels.any() and not labels.all():
            coefficients, intercept = fit(features[rows], labels)
            weight[index], bias[index] = coefficients[0], intercept[0]
        elif len(labels):
            bias[index] = np.log((1 - RARE) / RARE) * (1 if labels.all() else -1)
    return weight, bias
