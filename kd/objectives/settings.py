"""Settings of the losses, as shown on the command line."""

from dataclasses import dataclass
from typing import ClassVar, Literal

Loss = Literal["bce", "cross-entropy"]


@dataclass(frozen=True)
class LossConfig:
    """Loss on the labels."""

    help_title: ClassVar[str] = "Label loss"

    loss: Loss | None = None
    """bce: binary cross entropy for each class; cross-entropy: softmax over classes that exclude each other (default: chosen
    by the labels)."""
    label_smoothing: float = 0.0
    """Share of the target that is spread evenly over all classes (cross-entropy only)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: weight classes inversely to their frequency in the training clips."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1; found {self.label_smoothing}")


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of labels and teachers in the loss."""

    help_title: ClassVar[str] = "Teachers"

    label_weight: float = 0.1
    """Weight of the label loss; 1 - label_weight is the weight of the distillation loss (DyMN paper, Eq. 8)."""
    teacher_temperature: float = 1.0
    """Divide the teacher's logits by this before the sigmoid (or the softmax, for classes that exclude each other)."""
    mixup_of_teacher: Literal["probabilities", "logits"] = "probabilities"
    """Mixup mixes the teacher's probabilities (the same as mixing the losses) or its logits."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_weight <= 1.0:
            raise ValueError(f"label_weight must lie in [0, 1]; found {self.label_weight}")
        if not self.teacher_temperature > 0.0:
            raise ValueError(f"teacher_temperature must be positive; found {self.teacher_temperature}")
