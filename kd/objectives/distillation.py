"""Objectives: what turns a student and a batch into losses. The training loop knows nothing else about a task.

An objective is called as ``objective(student, batch)`` and returns a dict of scalar tensors; ``"loss"`` is minimised, the
others are logged. A batch is what ``training_data.TrainingClips`` gives. Shapes: B clips, S samples, C classes.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor, nn

from audio_datasets.audio.augment import both_of_pair, mix_with_partner
from kd.objectives.losses import distillation_targets, tagging_loss, weighted_loss
from students.frontend import LogMel, mask_stripes
from students.layers.keyed import set_sample_keys

Batch = dict[str, Tensor]


class Objective(Protocol):
    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class DistillationConfig:
    """Weights of labels and teachers in the loss."""

    label_weight: float = 0.1
    """Weight of the label loss; 1 - label_weight is the weight of the distillation loss (DyMN paper, Eq. 8)."""
    teacher_temperature: float = 1.0
    """The teacher's logits are divided by this before the sigmoid."""
    mixup_of_teacher: Literal["probabilities", "logits"] = "probabilities"
    """What mixup mixes of the teacher: its probabilities, which equals mixing the losses, or its logits."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_weight <= 1.0:
            raise ValueError(f"label_weight must lie in [0, 1]; found {self.label_weight}")
        if not self.teacher_temperature > 0.0:
            raise ValueError(f"teacher_temperature must be positive; found {self.teacher_temperature}")


class DistillationObjective:
    """label_weight · BCE(σ(z_S), y) + (1 − label_weight) · BCE(σ(z_S), σ(z_T / T)) on mixed-up spectrograms.

    Mixup mixes log-mels, labels and, unless configured otherwise, teacher probabilities alike (for the last, BCE being
    linear in its target, this equals mixing the two losses). A mixed clip has a teacher only where both of its parts have one.
    """

    def __init__(self, frontend: LogMel, config: DistillationConfig) -> None:
        self.frontend = frontend
        self.config = config

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch, each a scalar.

        Batch: ``waveform`` (B, S), ``targets`` (B, C), ``sample_key`` (B,) int64; optionally ``band_edges`` (B, 2) in Hz,
        ``stripes`` (B, 4), ``mix_weight`` (B,), and together ``teacher_logits`` (B, C) with ``has_teacher`` (B,) bool.
        """
        mel = self.frontend(batch["waveform"], batch.get("band_edges"))
        targets = batch["targets"]
        distils = "teacher_logits" in batch and self.config.label_weight < 1.0
        if "stripes" in batch:
            mel = mask_stripes(mel, batch["stripes"])
        if "mix_weight" in batch:
            weight = batch["mix_weight"]
            mel, targets = mix_with_partner(mel, weight), mix_with_partner(targets, weight)
        if distils:
            teacher, has_teacher = self._teacher_targets(batch)

        set_sample_keys(student, batch["sample_key"])
        logits = student(mel).logits
        label_loss = tagging_loss(logits, targets)
        if not distils:
            return {"loss": label_loss.mean()}
        distillation_loss = tagging_loss(logits, teacher)
        return {
            "loss": weighted_loss(label_loss, distillation_loss, has_teacher, self.config.label_weight).mean(),
            "label_loss": label_loss.mean(),
            # Clips without a teacher have no such loss; the mean is over those that have one.
            "distillation_loss": (distillation_loss * has_teacher).sum() / has_teacher.sum().clamp(min=1),
        }

    def _teacher_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities (B, C), mixed as the clips are, and which clips have them, (B,) bool."""
        logits, has_teacher = batch["teacher_logits"], batch["has_teacher"]
        if "mix_weight" not in batch:
            return distillation_targets(logits, self.config.teacher_temperature), has_teacher
        weight, has_teacher = batch["mix_weight"], both_of_pair(has_teacher)
        if self.config.mixup_of_teacher == "logits":
            mixed = mix_with_partner(logits, weight)
            return distillation_targets(mixed, self.config.teacher_temperature), has_teacher
        probabilities = distillation_targets(logits, self.config.teacher_temperature)
        return mix_with_partner(probabilities, weight), has_teacher
