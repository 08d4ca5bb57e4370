"""What every student is to the rest of the code: a module from mel spectrograms to logits and an embedding.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes.
"""

import copy
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from students.frontend import LogMelConfig
from students.layers.folding import fold_pairs

StateDict = dict[str, Tensor]


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


class FineTuning(NamedTuple):
    """What a family's authors fine-tuned a trained student with."""

    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class NoOptions:
    """The options of a family that has none."""


class Student(nn.Module):
    """Base of all students: mel (B, 1, n_mels, frames) -> StudentOutput.

    A subclass is a family: it takes the number of classes and its options (``Options``), and says here what is known of it.
    A family needs ``forward``, a ``classifier`` and ``output_biases``; everything else has a default.

    ``create_student`` sets ``config``; a student built by hand has none and can be neither saved nor matched to weights.
    """

    Options: ClassVar[type] = NoOptions
    """The family's options: a frozen dataclass with defaults, which raises ValueError for a value that is not allowed."""
    fine_tuning: ClassVar[Mapping[str, FineTuning]] = {}
    """Published learning rate and batch size for trained students, by the name of the task."""
    only_from_scratch: ClassVar[tuple[str, ...]] = ()
    """Options that change how a fresh student trains, and nothing about a trained one."""
    imagenet_architecture: str | None = None
    """timm's name of the network whose ImageNet weights ``imagenet_weights`` takes; None if there is none."""
    config: StudentConfig | None = None

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim

    # --- What a family knows of itself ---

    @classmethod
    def published_frontend(cls) -> LogMelConfig:
        """The front end that the family was published with."""
        return LogMelConfig()

    @classmethod
    def options_for_frontend(cls, given: Mapping[str, Any], frontend: LogMelConfig) -> dict[str, Any]:
        """The given options and those that follow from the front end: ``n_mels``, if the family has such an option."""
        has_n_mels = any(option.name == "n_mels" for option in dataclasses.fields(cls.Options))
        return {"n_mels": frontend.n_mels, **given} if has_n_mels else dict(given)

    @classmethod
    def options_for_training(cls, given: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """The given options and those that follow from the length of a run from scratch.

        Raises ValueError for an option that does not fit the length.
        """
        return dict(given)

    @classmethod
    def pretraining_learning_rate(cls, options: Any) -> float | None:
        """Published peak learning rate of pretraining with these ``Options``, in batches of 120 clips; None if unknown."""
        return None

    @classmethod
    def tensors_of_checkpoint(cls, state: StateDict) -> StateDict:
        """The tensors of a public checkpoint under this student's names."""
        return state

    @classmethod
    def config_of_weights(cls, state: StateDict) -> StudentConfig | None:
        """The student that tensors belong to; None if the shapes of this family's tensors do not tell its options.

        Raises ValueError for tensors of another family.
        """
        return None

    def unused_tensors(self, state: StateDict) -> set[str]:
        """Names of a public checkpoint's tensors that this student's options leave unused, and that it therefore lacks."""
        return set()

    def imagenet_weights(self, timm_state_dict: Mapping[str, Tensor]) -> StateDict:
        """The part of this student's state dict that the weights of ``imagenet_architecture`` give.

        Raises ValueError if they are another network's weights, or do not fit this student's options.
        """
        raise NotImplementedError

    @property
    def clip_seconds(self) -> float | None:
        """The length of the clips that this student was made for; None if it takes any length."""
        return None

    # --- What it computes ---

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Sets what changes with the epoch of pretraining, counted from 0. For most students nothing does."""

    def output_biases(self) -> Tensor:
        """The biases added to the logits, as a view that can be written to: (K,), or (parts, K) if the parts are averaged."""
        raise NotImplementedError

    @torch.no_grad()
    def set_class_prior(self, frequencies: Tensor) -> None:
        """Sets the output biases so that an untrained student predicts each class's frequency (K,), within 0.1 to 99.9 %.

        As in RetinaNet (Lin et al. 2017, Section 3.3): without it the first steps on rare classes all go into lowering
        every logit.
        """
        self.output_biases().copy_(torch.logit(frequencies.clamp(1e-3, 1.0 - 1e-3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The map (B, C, F, T) after every stage, in order; the last one is what ``classifier`` takes.

        Raises ValueError for a student that gives no maps.
        """
        raise ValueError(f"{type(self).__name__} gives no feature maps, and so no logits of single frames")

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
