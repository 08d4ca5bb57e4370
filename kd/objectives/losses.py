"""Losses of the student stage.

Shapes: B clips of a batch, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def tagging_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Binary cross entropy of each clip, averaged over its classes.

    Args:
        logits: (B, C), any float type; the loss is taken in float32.
        targets: (B, C), probabilities in [0, 1].

    Returns:
        (B,) float32.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none").mean(dim=1)


def distillation_targets(teacher_logits: Tensor, temperature: float) -> Tensor:
    """σ(z_T / T), the teacher's softened probabilities; (B, C) float32."""
    return torch.sigmoid(teacher_logits.float() / temperature)


def weighted_loss(label_loss: Tensor, distillation_loss: Tensor, has_teacher: Tensor, label_weight: float) -> Tensor:
    """λ · L_label + (1 − λ) · L_kd for each clip (DyMN paper, Eq. 8, λ = ``label_weight``).

    A clip without a teacher is trained on its labels alone, at full weight: with λ = 0.1 it would otherwise count a tenth
    of the others.

    Args:
        label_loss: (B,).
        distillation_loss: (B,); its values where ``has_teacher`` is false are not used.
        has_teacher: (B,) bool.

    Returns:
        (B,) float32.
    """
    mixed = label_weight * label_loss + (1.0 - label_weight) * distillation_loss
    return torch.where(has_teacher, mixed, label_loss)
