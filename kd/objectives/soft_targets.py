"""Distillation with both sides softened: Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", 2015, Section 2.

Shapes: B clips, C classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.objectives.distillation import DistillationObjective
from kd.objectives.label_losses import bce_per_clip


class SoftTargetObjective(DistillationObjective):
    """T² · KL(teacher at T ‖ student at T), T = ``teacher_temperature``, in place of the cross entropy with the student at 1.

    The divergence of two softmaxes in groups of exclusive classes, otherwise the mean over classes of that of two sigmoids. T² keeps
    the gradient's size as T grows. At T = 1 the gradient is that of ``DistillationObjective``; the loss is less by the
    teacher's entropy.
    """

    def distillation_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """(B, C) and (B, C) -> (B,): the mean over groups."""
        temperature, losses = self.distillation.teacher_temperature, []
        for group, columns in self.label_loss.label_space.parts():
            z, p = logits[:, columns].float() / temperature, teacher[:, columns]
            if group.exclusive:
                losses.append(torch.xlogy(p, p).sum(1) - (p * F.log_softmax(z, dim=1)).sum(1))
            else:
                entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean(1)
                losses.append(bce_per_clip(z, p) - entropy)
        return temperature**2 * torch.stack(losses).mean(dim=0)
