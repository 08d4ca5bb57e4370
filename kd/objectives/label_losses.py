"""Label losses of each clip: binary cross entropy over known labels, or cross entropy over exclusive classes.

Shapes: B clips, C classes.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_datasets.tasks.label_space import LabelSpace
from kd.objectives.settings import LossConfig

LARGEST_POSITIVE_WEIGHT = 100.0


def bce_per_clip(
    logits: Tensor, targets: Tensor, known: Tensor | None = None, positive_weights: Tensor | None = None
) -> Tensor:
    """Binary cross entropy of each clip, averaged over its classes; (B,) float32.

    ``targets`` is ignored where ``known`` is false, even if it is NaN. The losses are scaled so that their mean over clips is
    the mean over all known labels of the batch.

    Args:
        logits: (B, C), any float type; the loss is computed in float32.
        targets: (B, C), probabilities in [0, 1].
        known: (B, C) bool; None: all are known.
        positive_weights: (C,), factors on the loss of positive labels.
    """
    logits, targets = logits.float(), targets.float()
    if known is None:
        losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights, reduction="none")
        return losses.mean(dim=1)
    targets = torch.where(known, targets, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights, reduction="none")
    return torch.where(known, losses, 0.0).sum(dim=1) * (len(logits) / known.sum().clamp(min=1))


def cross_entropy_per_clip(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross entropy of each clip with targets (B, C) that add up to 1; (B,) float32.

    With class weights, the mean over the clips is the weighted mean.
    """
    logits, targets = logits.float(), targets.float()
    weighted = targets if class_weights is None else targets * class_weights
    smooth = weighted
    if label_smoothing:
        smooth = (1.0 - label_smoothing) * weighted + label_smoothing / targets.shape[1] * weighted.sum(1, keepdim=True)
    losses = -(smooth * F.log_softmax(logits, dim=1)).sum(1)
    return losses if class_weights is None else losses * (len(logits) / weighted.sum().clamp(min=1e-6))


class LabelLoss(nn.Module):
    """The loss of each clip: the mean over the groups of a label space."""

    def __init__(
        self, label_space: LabelSpace, config: LossConfig, class_weights: Sequence[float] | None = None
    ) -> None:
        """Raises ValueError for a loss that does not fit the labels."""
        super().__init__()
        self.label_space = loss_space(label_space, config)
        self.config = config
        weights = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float32)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, targets: Tensor, known: Tensor | None = None) -> Tensor:
        """logits, targets (B, C), known (B, C) bool or None -> (B,)

        A clip is used in an exclusive group if all of the group's labels are known.
        """
        losses = []
        for group, columns in self.label_space.parts():
            weights = None if self.class_weights is None else self.class_weights[columns]
            of_group = logits[:, columns], targets[:, columns]
            known_here = None if known is None else known[:, columns]
            if not group.exclusive:
                losses.append(bce_per_clip(*of_group, known_here, weights))
            elif known_here is None:
                losses.append(cross_entropy_per_clip(*of_group, self.config.label_smoothing, weights))
            else:
                counts = known_here.all(dim=1)
                shown = torch.where(counts[:, None], of_group[1], 0.0)
                each = cross_entropy_per_clip(of_group[0], shown, self.config.label_smoothing, weights)
                losses.append(each if weights is not None else each * (len(each) / counts.sum().clamp(min=1)))
        return losses[0] if len(losses) == 1 else torch.stack(losses).mean(dim=0)


def loss_space(label_space: LabelSpace, config: LossConfig) -> LabelSpace:
    """The label space that the configured loss uses: with "bce", the classes of no group exclude each other.

    Raises:
        ValueError: cross entropy for classes that do not exclude each other, or label smoothing without cross entropy.
    """
    if config.loss == "cross-entropy" and not label_space.exclusive:
        raise ValueError("--loss cross-entropy needs exactly one label for each clip; use bce")
    exclusive = any(group.exclusive for group in label_space.groups) and config.loss != "bce"
    if config.label_smoothing and not exclusive:
        raise ValueError("--label-smoothing needs --loss cross-entropy")
    if config.loss == "bce":
        return LabelSpace(tuple(replace(group, exclusive=False) for group in label_space.groups))
    return label_space


def balanced_class_weights(exclusive: bool, positives: Tensor, negatives: Tensor) -> Tensor:
    """Weights (C,) that balance the classes as if all were equally frequent; a class without clips has weight 1.

    Exclusive classes: clips / (classes · clips of the class). Other classes, for positive labels only: clips without the class /
    clips with it, clipped to the range from 1/100 to 100.

    Args:
        positives: (C,), clips that have the class.
        negatives: (C,), clips that do not have it.
    """
    occurs = positives > 0
    if exclusive:
        weights = positives.sum() / (occurs.sum() * positives.clamp(min=1))
    else:
        weights = (negatives / positives.clamp(min=1)).clamp(1 / LARGEST_POSITIVE_WEIGHT, LARGEST_POSITIVE_WEIGHT)
    return torch.where(occurs, weights, 1.0).float()
