"""Hard pseudo-labels: what the teacher is sure of counts as a label, and the rest of what it says is left out.

Lee, "Pseudo-Label", 2013; with a confidence threshold as in FixMatch (Sohn et al., 2020, Eq. 3).

Shapes: B clips, C classes.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kd.objectives.base import Batch, CallStudent, ObjectiveSettings
from kd.objectives.distillation import DistillationObjective


@dataclass(frozen=True)
class PseudoLabelOptions:
    threshold: float = 0.9
    """Exclusive classes: the most probable one is the label if its probability is at least this. Otherwise: a class is present from
    this probability on, absent up to 1 minus it, and left out in between; values below 0.5 count as 0.5 there."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.threshold < 1.0:
            raise ValueError(f"threshold must be at least 0 and below 1; found {self.threshold}")


class PseudoLabelObjective(DistillationObjective):
    """``DistillationObjective`` with the teacher's decisions in place of its probabilities.

    A mixed clip has a decision only where both of its parts have one. A clip without any decision is trained on its labels alone.
    """

    Options = PseudoLabelOptions

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.options = PseudoLabelOptions(**settings.options)

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        losses = super().forward(student, batch)
        if "distillation_loss" in losses:
            _, decided = self.teacher_targets(batch)
            losses["decided_clips"] = decided.float().mean()
        return losses

    def teacher_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels (B, C), mixed like the clips and NaN where there is no decision, and which clips have any, (B,) bool."""
        values, has_teacher = super().teacher_targets(batch)
        return values, has_teacher & ~values.isnan().all(dim=1)

    def _softened(self, logits: Tensor) -> Tensor:
        """The decisions (B, C): 1, 0, or NaN where there is none. NaN stays NaN in every mixture."""
        probabilities, parts = super()._softened(logits), []
        for group, columns in self.label_loss.label_space.parts():
            of_group = probabilities[:, columns]
            if group.exclusive:
                confidence, best = of_group.max(dim=1, keepdim=True)
                hard = torch.zeros_like(of_group).scatter_(1, best, 1.0)
                sure = (confidence >= self.options.threshold).expand_as(of_group)
            else:
                threshold = max(self.options.threshold, 0.5)
                hard = (of_group >= threshold).float()
                sure = (of_group >= threshold) | (of_group <= 1.0 - threshold)
            parts.append(torch.where(sure, hard, torch.nan))
        return torch.cat(parts, dim=1)

    def distillation_loss(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """Loss of each clip against the decisions, (B, C) and (B, C) -> (B,): the mean over the groups with any; 0 without."""
        decided, total = ~teacher.isnan(), torch.zeros(len(logits), device=logits.device)
        groups = torch.zeros_like(total)
        for group, columns in self.label_loss.label_space.parts():
            z, known = logits[:, columns].float(), decided[:, columns]
            target = torch.where(known, teacher[:, columns], 0.0)
            if group.exclusive:
                loss = -(target * F.log_softmax(z, dim=1)).sum(1)
            else:
                each = F.binary_cross_entropy_with_logits(z, target, reduction="none")
                loss = (each * known).sum(1) / known.sum(1).clamp(min=1)
            total, groups = total + loss, groups + known.any(dim=1)
        return total / groups.clamp(min=1)
