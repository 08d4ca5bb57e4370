"""Distillation from labels and stored teacher logits: Eq. 8 of the DyMN paper (Schmid et al., 2023), for both stages.

Shapes: B clips, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from audio_datasets.audio.augment import both_of_pair, mix_with_partner
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.examples import MIXED_WITH
from kd.objectives.base import Batch, CallStudent, Objective, ObjectiveSettings
from kd.objectives.label_losses import LabelLoss, bce_per_clip
from teacher_logits.stores.links import TeacherLink


def distillation_targets(
    teacher_logits: Tensor, temperature: float, label_space: LabelSpace | None = None, link: TeacherLink | None = None
) -> Tensor:
    """The teacher's softened probabilities, (B, C) float32: its link's of z_T / T, and softmax(z_T / T) in each exclusive group.

    In an exclusive group the softmax is the teacher's own, or, for a teacher with sigmoids, its distribution given that
    exactly one class is there: p_c ∏ (1 − p_j) over all other j is proportional to exp(z_c).

    Args:
        link: None means a sigmoid.
    """
    link = link or TeacherLink.whole("sigmoid", teacher_logits.shape[1])
    of_link = link.probabilities(teacher_logits, temperature)
    if label_space is None or not any(group.exclusive for group in label_space.groups):
        return of_link
    softened = teacher_logits.float() / temperature
    return torch.cat(
        [
            torch.softmax(softened[:, columns], dim=1) if group.exclusive else of_link[:, columns]
            for group, columns in label_space.parts()
        ],
        dim=1,
    )


def weighted_loss(
    label_loss: Tensor,
    distillation_loss: Tensor,
    has_teacher: Tensor,
    label_weight: float,
    has_labels: Tensor | None = None,
) -> Tensor:
    """λ · L_label + (1 − λ) · L_kd for each clip (DyMN paper, Eq. 8, λ = ``label_weight``).

    A clip without a teacher is trained on its labels alone, at full weight: with λ = 0.1 it would otherwise count a tenth
    of the others. In the same way the teacher of a clip without labels has full weight.

    Args:
        label_loss: (B,).
        distillation_loss: (B,); its values where ``has_teacher`` is false are not used.
        has_teacher: (B,) bool.
        has_labels: (B,) bool, whether any label of a clip is known; None: of all.

    Returns:
        (B,) float32.
    """
    mixed = label_weight * label_loss + (1.0 - label_weight) * distillation_loss
    if has_labels is not None:
        mixed = torch.where(has_labels, mixed, distillation_loss)
    return torch.where(has_teacher, mixed, label_loss)


class DistillationObjective(Objective):
    """label_weight · L(z_S, y) + (1 − label_weight) · L(z_S, teacher's probabilities), averaged over the batch.

    L is binary cross entropy, or cross entropy in groups of exclusive classes. Without teacher logits in the batch, or with
    ``label_weight`` 1, it is the label loss alone. Mixup mixes log-mels, labels and, unless configured otherwise, teacher
    probabilities alike (for the last, both losses being linear in their target, this equals mixing the two losses). A mixed
    clip has a teacher only where both of its parts have one. A clip without labels is left out of the label loss, which is
    then the mean over the others, and learns from its teacher at full weight.
    """

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.label_loss = LabelLoss(settings.label_space, settings.loss, settings.class_weights)
        self.distillation = settings.distillation

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        """The losses of a batch, each a scalar. Contents of the batch: see ``Objective.inputs`` and ``teacher_targets``."""
        mel, targets, known = self.inputs(batch)
        distils = "teacher_logits" in batch and self.distillation.label_weight < 1.0
        if distils:
            teacher, has_teacher = self.teacher_targets(batch)
        logits = student(mel).logits
        label_loss = self.label_loss(logits, targets, known)
        if not distils:
            return {"loss": label_loss.mean()}
        distillation_loss = self.distillation_loss(logits, teacher)
        has_labels = None if known is None else known.any(dim=1)
        weight = self.distillation.label_weight
        return {
            "loss": weighted_loss(label_loss, distillation_loss, has_teacher, weight, has_labels).mean(),
            "label_loss": label_loss.mean(),
            # The mean is over clips with a teacher; the others have no distillation loss.
            "distillation_loss": (distillation_loss * has_teacher).sum() / has_teacher.sum().clamp(min=1),
        }

    def distillation_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Loss of each clip against the teacher's probabilities, (B, C) and (B, C) -> (B,): the mean over groups."""
        losses = [
            -(teacher[:, columns] * F.log_softmax(logits[:, columns].float(), dim=1)).sum(1)
            if group.exclusive
            else bce_per_clip(logits[:, columns], teacher[:, columns])
            for group, columns in self.label_loss.label_space.parts()
        ]
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(dim=0)

    def teacher_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher's probabilities (B, C), mixed like the clips, and which clips have them, (B,) bool.

        Batch: ``teacher_logits`` (B, C) and ``has_teacher`` (B,) bool; with waveform mixup also those of the other clip and
        ``waveform_mix_weight`` (B,); with mixup of spectrograms ``mix_weight`` (B,).
        """
        mixes_logits = self.distillation.mixup_of_teacher == "logits"
        values, has_teacher = batch["teacher_logits"], batch["has_teacher"]
        values = values if mixes_logits else self._softened(values)
        if f"{MIXED_WITH}teacher_logits" in batch:
            other = batch[f"{MIXED_WITH}teacher_logits"]
            other = other if mixes_logits else self._softened(other)
            weight = batch["waveform_mix_weight"][:, None]
            values = weight * values + (1 - weight) * other
            has_teacher = has_teacher & batch[f"{MIXED_WITH}has_teacher"]
        if "mix_weight" in batch:
            values, has_teacher = mix_with_partner(values, batch["mix_weight"]), both_of_pair(has_teacher)
        return self._softened(values) if mixes_logits else values, has_teacher

    def _softened(self, logits: Tensor) -> Tensor:
        space, link = self.label_loss.label_space, self.settings.teacher_link
        return distillation_targets(logits, self.distillation.teacher_temperature, space, link)
