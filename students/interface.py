"""What every student is to the rest of the code: a module from mel spectrograms to logits and an embedding.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes.
"""

import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from students.layers.folding import fold_pairs


class StudentOutput(NamedTuple):
    """What a student returns: ``logits`` (B, K) before the sigmoid or softmax, and ``embedding`` (B, E)."""

    logits: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class StudentConfig:
    """Everything that ``create_student`` needs to build a student again; plain enough for JSON."""

    name: str
    """Catalog name, such as "mn04"."""
    num_classes: int
    """Size of the output."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every option of the family with its value, defaults included, so that a later default changes nothing."""


class Student(nn.Module):
    """Base of all students: mel (B, 1, n_mels, frames) -> StudentOutput.

    ``create_student`` sets ``config``; a student built by hand has none and can be neither saved nor matched to weights.
    """

    config: StudentConfig | None = None

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim

    def forward(self, mel: Tensor) -> StudentOutput:
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Takes over what changes with the epoch of pretraining, counted from 0; nothing does, for most students."""

    def output_biases(self) -> Tensor:
        """What is added to the logits, as a view that writes through: (K,), or (parts, K) where parts of it are averaged."""
        raise NotImplementedError

    @torch.no_grad()
    def set_class_prior(self, frequencies: Tensor) -> None:
        """Sets the output biases so that an untrained student predicts each class's frequency (K,), within 0.1 to 99.9 %.

        As in RetinaNet (Lin et al. 2017, Section 3.3): without it the first steps on rare classes all go into lowering
        every logit.
        """
        self.output_biases().copy_(torch.logit(frequencies.clamp(1e-3, 1.0 - 1e-3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The map (B, C, F, T) after every stage, in order; the last one is what ``classifier`` takes."""
        raise NotImplementedError

    def frame_logits(self, mel: Tensor) -> Tensor:
        """Logits of every time position on its own, (B, K, T): the last map, column by column, through the classifier.

        For evaluation: a column has no key of its own for dropout.
        """
        last = self.feature_maps(mel)[-1]
        columns = last.permute(0, 3, 1, 2).flatten(0, 1)[..., None]  # (B * T, C, F, 1)
        return self.classifier(columns).unflatten(0, (last.shape[0], last.shape[3])).transpose(1, 2)

    def fuse(self) -> "Student":
        """A copy for inference with batch norms folded into the convolutions before them; gives the same within rounding.

        It is in evaluation mode, its weights need no gradient, and it has no ``config``: save and train the original.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        fused.config = None
        for module in list(fused.modules()):
            if isinstance(module, nn.Sequential):
                fold_pairs(module)
            elif isinstance(module, FoldsBatchNorms):
                module.fold_batch_norms()
        return fused


@runtime_checkable
class FoldsBatchNorms(Protocol):
    """A module that folds batch norms in its own way; those that follow a convolution in a Sequential need none."""

    def fold_batch_norms(self) -> None: ...


def checked_mel(mel: Tensor) -> Tensor:
    """``mel`` as it is. Raises ValueError unless its shape is (B, 1, n_mels, frames)."""
    if mel.ndim != 4 or mel.shape[1] != 1:
        raise ValueError(f"this student takes (batch, 1, n_mels, frames); found {tuple(mel.shape)}")
    return mel
