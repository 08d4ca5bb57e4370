"""What turns a teacher's logits into probabilities: the link that it was trained with.

A logit of 0 means a probability of 1/2 to a teacher trained with a sigmoid (binary cross entropy), and hardly anything to one trained
with a softmax (cross entropy), whose logits mean something only beside one another. Read through the wrong link, a softmax
teacher calls every class half present.

Shapes: k clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch
from scipy.special import expit, log_softmax
from torch import Tensor

from audio_datasets.system.messages import brief

LinkKind = Literal["sigmoid", "softmax"]
SMALLEST = 1e-300
"""Probabilities below it count as it; float64 ends there."""


AUDIOSET_CLASSES = 527


def link_of_classes(class_names: Sequence[str]) -> LinkKind | None:
    """The link that class names settle: AudioSet's 527 classes overlap, so nothing is trained on them with a softmax."""
    is_audioset = len(class_names) == AUDIOSET_CLASSES and {"Speech", "Male speech, man speaking"} <= set(class_names)
    return "sigmoid" if is_audioset else None


@dataclass(frozen=True)
class TeacherLink:
    """Runs of neighbouring classes, each with its link: a softmax over the run, or a sigmoid of each class."""

    kinds: tuple[LinkKind, ...]
    sizes: tuple[int, ...]
    """Classes of each run."""

    @classmethod
    def whole(cls, kind: LinkKind, num_classes: int) -> "TeacherLink":
        """The same link for all classes; a softmax goes over all of them."""
        return cls((kind,), (num_classes,))

    @classmethod
    def of_runs(cls, runs: Sequence[tuple[LinkKind, int]]) -> "TeacherLink":
        """Neighbouring runs of sigmoids are one."""
        merged: list[tuple[LinkKind, int]] = []
        for kind, size in runs:
            if merged and kind == merged[-1][0] == "sigmoid":
                merged[-1] = (kind, merged[-1][1] + size)
            else:
                merged.append((kind, size))
        kinds, sizes = zip(*merged, strict=True)
        return cls(kinds, sizes)

    @classmethod
    def from_json(cls, content: Any, num_classes: int) -> "TeacherLink":
        """What ``to_json`` gave. Raises ValueError for anything else, and for a link of another number of classes."""
        if content in get_args(LinkKind):
            return cls.whole(content, num_classes)
        try:
            link = cls.of_runs([(kind, size) for kind, size in content])
        except (TypeError, ValueError):
            link = None
        if (
            link is None
            or not set(link.kinds) <= set(get_args(LinkKind))
            or any(type(size) is not int or size < 1 for size in link.sizes)
            or sum(link.sizes) != num_classes
        ):
            raise ValueError(
                f'a teacher\'s link is "sigmoid", "softmax", or a list of such words, each with a number of classes, for '
                f"{num_classes} classes; found {brief(content)}"
            )
        return link

    def to_json(self) -> Any:
        """ "sigmoid", "softmax", or a list of [word, number of classes]."""
        return (
            self.kinds[0] if len(self.kinds) == 1 else [list(run) for run in zip(self.kinds, self.sizes, strict=True)]
        )

    def __str__(self) -> str:
        parts = [f"{kind} over {size} classes" for kind, size in zip(self.kinds, self.sizes, strict=True)]
        return self.kinds[0] if len(parts) == 1 else ", ".join(parts)

    def runs(self) -> list[tuple[LinkKind, slice]]:
        """Each run's link and columns."""
        ends = np.cumsum(self.sizes).tolist()
        return [(kind, slice(end - size, end)) for kind, size, end in zip(self.kinds, self.sizes, ends, strict=True)]

    def probabilities(self, logits: Tensor, temperature: float = 1.0) -> Tensor:
        """Each class's probability, from logits (k, C) divided by ``temperature``; (k, C) float32."""
        softened = logits.float() / temperature
        parts = [
            torch.sigmoid(softened[:, columns]) if kind == "sigmoid" else torch.softmax(softened[:, columns], dim=1)
            for kind, columns in self.runs()
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def odds(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """p and 1 − p of each class, float64 (k, C); neither rounds to 0, so that their logarithms are finite.

        Logits beyond ±700 count as ±700 there, where float64 ends.
        """
        yes, no = np.empty((2, *logits.shape))
        for kind, columns in self.runs():
            values = logits[:, columns].astype(np.float64)
            if kind == "sigmoid":
                values = np.clip(values, -700, 700)
                yes[:, columns], no[:, columns] = expit(values), expit(-values)
            else:
                log_p = log_softmax(values, axis=1)
                yes[:, columns] = np.maximum(np.exp(log_p), SMALLEST)
                no[:, columns] = np.maximum(-np.expm1(log_p), SMALLEST)
        return yes, no

    def logits_of(self, yes: np.ndarray, no: np.ndarray) -> np.ndarray:
        """Logits (k, C) float32 that give the probabilities p = ``yes`` through this link: log p / (1 − p), or log p."""
        result = np.log(yes)
        for kind, columns in self.runs():
            if kind == "sigmoid":
                result[:, columns] -= np.log(no[:, columns])
        return result.astype(np.float32)
