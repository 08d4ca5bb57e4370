"""The interface of every student: a module that maps mel spectrograms to logits and an embedding.

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

LEFT_OUT_AT_DEFAULT = {"left_out_at_default": True}
"""Metadata of an option that a family got after its first release. ``StudentConfig.options`` leaves it out at its default, so
that the fingerprints of older teachers stay what they were."""


class StudentOutput(NamedTuple):
    """What a student returns: ``logits`` (B, K) before the sigmoid or softmax, and ``embedding`` (B, E)."""

    logits: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class StudentConfig:
    """Everything that ``create_student`` needs to rebuild a student. Can be written as JSON."""

    name: str
    """Catalog name, such as "mn04"."""
    num_classes: int
    """Size of the output."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every option of the family with its value, including defaults, so that changing a default later has no effect."""


@dataclass(frozen=True)
class StudentCard:
    """The contents of ``student.json``."""

    config: StudentConfig
    """Name, number of classes and options: everything needed to build it."""
    class_names: tuple[str, ...]
    """One name per output, in order."""
    frontend: LogMelConfig
    """The front end that the student was trained with."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Where the weights come from: any dict that can be written as JSON."""


class FineTuning(NamedTuple):
    """The settings with which a family's authors fine-tuned a trained student."""

    learning_rate: float
    batch_size: int


@dataclass(frozen=True)
class NoOptions:
    """The options of a family that has none."""


class Student(nn.Module):
    """Base class of all students: mel (B, 1, n_mels, frames) -> StudentOutput.

    Each subclass is a family. It takes the number of classes and its options (``Options``), and overrides what differs from the
    defaults here. A family must define ``forward``, ``classifier`` and ``output_biases``; everything else has a default.

    ``create_student`` sets ``config``. A student built directly has none, so it cannot be saved or matched to weights.
    """

    Options: ClassVar[type] = NoOptions
    """The family's options: a frozen dataclass with defaults, which raises ValueError for a value that is not allowed."""
    fine_tuning: ClassVar[Mapping[str, FineTuning]] = {}
    """Published learning rate and batch size for trained students, by task name."""
    only_from_scratch: ClassVar[tuple[str, ...]] = ()
    """Options that affect training from scratch but not a trained student."""
    imagenet_architecture: str | None = None
    """timm's name of the network whose ImageNet weights ``imagenet_weights`` converts; None if there is none."""
    config: StudentConfig | None = None
    card: StudentCard | None = None
    """Class names, front end and provenance of a student that ``load_student`` read from a folder; None for any other."""

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim

    # --- Facts about the family ---

    @classmethod
    def published_frontend(cls) -> LogMelConfig:
        """The front end that the family was published with."""
        return LogMelConfig()

    @classmethod
    def options_for_frontend(cls, given: Mapping[str, Any], frontend: LogMelConfig) -> dict[str, Any]:
        """The given options plus those that follow from the front end: ``n_mels``, if the family has that option."""
        has_n_mels = any(option.name == "n_mels" for option in dataclasses.fields(cls.Options))
        return {"n_mels": frontend.n_mels, **given} if has_n_mels else dict(given)

    @classmethod
    def options_for_training(cls, given: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """The given options plus those that follow from the length of a run from scratch.

        Raises ValueError for an option that does not fit the length.
        """
        return dict(given)

    @classmethod
    def pretraining_learning_rate(cls, options: Any) -> float | None:
        """Published peak learning rate of pretraining with these ``Options``, in batches of 120 clips; None if unknown."""
        return None

    @classmethod
    def tensors_of_checkpoint(cls, state: StateDict) -> StateDict:
        """The tensors of a public checkpoint, renamed to this student's names."""
        return state

    @classmethod
    def config_of_weights(cls, state: StateDict) -> StudentConfig | None:
        """The configuration that these tensors belong to; None if options of this family cannot be inferred from shapes.

        Raises ValueError for tensors of another family.
        """
        return None

    def unused_tensors(self, state: StateDict) -> set[str]:
        """Names of a public checkpoint's tensors that this student's options leave unused, and that it therefore lacks."""
        return set()

    def imagenet_weights(self, timm_state_dict: Mapping[str, Tensor]) -> StateDict:
        """The part of this student's state dict that the weights of ``imagenet_architecture`` provide.

        Raises ValueError if the weights belong to another network or do not fit this student's options.
        """
        raise NotImplementedError

    @property
    def clip_seconds(self) -> float | None:
        """The clip length that this student was designed for; None if it takes any length."""
        return None

    # --- Computation ---

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Sets values that depend on the epoch of pretraining, counted from 0. Most students have none."""

    def output_biases(self) -> Tensor:
        """The biases added to the logits, as a writable view: (K,), or (parts, K) if the parts are averaged."""
        raise NotImplementedError

    @torch.no_grad()
    def set_class_prior(self, frequencies: Tensor) -> None:
        """Sets the output biases so that an untrained student predicts each class's frequency (K,), clipped to 0.1 to 99.9 %.

        As in RetinaNet (Lin et al. 2017, Section 3.3): without this, training spends its first steps on lowering all
        logits of rare classes.
        """
        self.output_biases().copy_(torch.logit(frequencies.clamp(1e-3, 1.0 - 1e-3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The map (B, C, F, T) after every stage, in order; the last one is the input of ``classifier``.

        Raises ValueError for a student without feature maps.
        """
        raise ValueError(f"{type(self).__name__} has no feature maps, so logits of single frames are not available")

    def frame_logits(self, mel: Tensor) -> Tensor:
        """Logits of each time position, (B, K, T): the classifier applied to each column of the last map separately.

        For evaluation only: columns have no keys for dropout.
        """
        last = self.feature_maps(mel)[-1]
        columns = last.permute(0, 3, 1, 2).flatten(0, 1)[..., None]  # (B * T, C, F, 1)
        return self.classifier(columns).unflatten(0, (last.shape[0], last.shape[3])).transpose(1, 2)

    def fuse(self) -> "Student":
        """A copy for inference with each batch norm folded into the convolution before it; same output within rounding.

        The copy is in evaluation mode, its weights require no gradient, and it has no ``config``: save and train the original.
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
    """A module with its own way to fold batch norms. Not needed where they follow a convolution in a Sequential."""

    def fold_batch_norms(self) -> None: ...


def checked_mel(mel: Tensor) -> Tensor:
    """Returns ``mel`` unchanged. Raises ValueError unless its shape is (B, 1, n_mels, frames)."""
    if mel.ndim != 4 or mel.shape[1] != 1:
        raise ValueError(f"this student takes (batch, 1, n_mels, frames); found {tuple(mel.shape)}")
    return mel
