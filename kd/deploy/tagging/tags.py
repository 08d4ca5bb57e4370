"""What a tagger says of one clip.

Shapes: C classes, E embedding size, W windows.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import expit, softmax

from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.tagging.audio import CutClip


@dataclass(frozen=True)
class TaggedWindow:
    """One window of a clip."""

    start_seconds: float
    end_seconds: float
    """Where the window ends, or the clip if that is earlier."""
    scores: np.ndarray
    """(C,)"""
    embedding: np.ndarray
    """(E,)"""


@dataclass(frozen=True)
class Tags:
    """Scores and embedding of one clip. Logits and embeddings are means over its windows, as in evaluation."""

    label_space: LabelSpace
    thresholds: np.ndarray
    """(C,) on the scores."""
    duration_seconds: float
    logits: np.ndarray
    """(C,), before sigmoid or softmax."""
    embedding: np.ndarray
    """(E,)"""
    windows: tuple[TaggedWindow, ...]
    oddities: tuple[str, ...] = ()
    """What is odd about the file, such as a header that tells another length."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.label_space.class_names

    @cached_property
    def scores(self) -> np.ndarray:
        """(C,): sigmoid of the logits, or softmax within a group of exclusive classes."""
        return scores_of(self.logits, self.label_space)

    def top(self, count: int = 5) -> list[tuple[str, float]]:
        """The classes with the highest scores, the highest first."""
        return [(self.class_names[index], float(self.scores[index])) for index in ranked(self.scores)[:count]]

    @property
    def present(self) -> list[str]:
        """The classes whose scores reach their thresholds, the highest score first."""
        return [
            self.class_names[index] for index in ranked(self.scores) if self.scores[index] >= self.thresholds[index]
        ]


def ranked(scores: np.ndarray) -> np.ndarray:
    """(C,) -> the classes' numbers, the highest score first; among equals, the first class first."""
    return np.argsort(-scores, kind="stable")


def scores_of(logits: np.ndarray, label_space: LabelSpace) -> np.ndarray:
    """Logits (..., C) -> scores (..., C) float32: sigmoid, or softmax within a group of exclusive classes."""
    logits = logits.astype(np.float64)
    parts = [
        softmax(logits[..., columns], axis=-1) if group.exclusive else expit(logits[..., columns])
        for group, columns in label_space.parts()
    ]
    return np.concatenate(parts, axis=-1).astype(np.float32)


def tags_of_windows(
    label_space: LabelSpace,
    thresholds: np.ndarray,
    clip: CutClip,
    window_seconds: float,
    logits: np.ndarray,
    embeddings: np.ndarray,
) -> Tags:
    """A clip's tags from its windows' logits (W, C) and embeddings (W, E)."""
    scores = scores_of(logits, label_space)
    windows = tuple(
        TaggedWindow(start, min(start + window_seconds, clip.duration_seconds), scores[place], embeddings[place])
        for place, start in enumerate(clip.starts)
    )
    mean_logits, mean_embedding = (
        values.mean(0, dtype=np.float64).astype(np.float32) for values in (logits, embeddings)
    )
    return Tags(label_space, thresholds, clip.duration_seconds, mean_logits, mean_embedding, windows, clip.oddities)
