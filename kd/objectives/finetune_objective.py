"""The losses of fine-tuning: labels that may be unknown, exclusive classes or not, and perhaps teachers.

Shapes: B clips, S samples, C classes, M mel bands, T frames.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_datasets.audio.augment import both_of_pair, mix_with_partner
from kd.objectives.distillation import Batch
from students.frontend import LogMel
from students.layers.keyed import set_sample_keys

LARGEST_POSITIVE_WEIGHT = 100.0

Loss = Literal["bce", "cross-entropy"]


@dataclass(frozen=True)
class LossConfig:
    """Loss on the labels."""

    loss: Loss | None = None
    """bce: each class on its own; cross-entropy: classes exclude each other. By the labels if left out."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes (cross-entropy only)."""
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: rare classes count more, as if all were equally frequent in the training clips."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing must be at least 0 and below 1; found {self.label_smoothing}")


class FinetuneObjective:
    """label_weight · L(z, y) + (1 − label_weight) · L(z, teacher), L being masked BCE or cross entropy; see LossConfig.

    Mixup on spectrograms mixes log-mels, targets and teacher probabilities alike. A label of a mixed clip counts only
    where both parts have one, and so does a teacher.
    """

    def __init__(
        self,
        frontend: LogMel,
        loss: Loss,
        *,
        label_weight: float = 1.0,
        label_smoothing: float = 0.0,
        class_weights: Tensor | None = None,
        frozen: Sequence[nn.Module] = (),
    ) -> None:
        """``class_weights`` (C,), from ``balanced_weights``; ``frozen`` modules are kept in evaluation mode."""
        self.frontend = frontend
        self.loss = loss
        self.label_weight = label_weight
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.frozen = frozen

    def __call__(self, student: nn.Module, batch: Batch) -> dict[str, Tensor]:
        """Losses of a batch (``finetune_data.TaskExamples``), each a scalar."""
        for module in self.frozen:  # a training loop's student.train() has reached them
            module.eval()
        mel = self.frontend(batch["waveform"], batch.get("band_edges"))
        if "style_weight" in batch:
            mel = freq_mixstyle(mel, batch["style_weight"])
        targets, known = batch["targets"], batch.get("known")
        teacher, has_teacher = batch.get("teacher"), batch.get("has_teacher")
        if "mix_weight" in batch:
            weight = batch["mix_weight"]
            mel, targets = mix_with_partner(mel, weight), mix_with_partner(targets, weight)
            known = None if known is None else both_of_pair(known)
            if teacher is not None:
                teacher, has_teacher = mix_with_partner(teacher, weight), both_of_pair(has_teacher)
        mel = mask_mel(mel, batch.get("time_masks"), batch.get("frequency_masks"))

        set_sample_keys(student, batch["sample_key"])
        logits = student(mel).logits.float()
        label_loss = self.label_loss(logits, targets, known)
        if teacher is None:
            return {"loss": label_loss}
        # A clip without a teacher learns from its labels alone, at full weight.
        share = torch.where(has_teacher, self.label_weight, 1.0)
        weighted = self.label_loss(logits, targets, known, share)
        distillation = (self._against_teacher(logits, teacher) * has_teacher).sum()
        return {
            "loss": weighted + (1.0 - self.label_weight) * distillation / len(logits),
            "label_loss": label_loss,
            "distillation_loss": distillation / has_teacher.sum().clamp(min=1),
        }

    def label_loss(
        self, logits: Tensor, targets: Tensor, known: Tensor | None, clip_weights: Tensor | None = None
    ) -> Tensor:
        """Scalar: the mean over the known labels (bce) or over the clips (cross-entropy), weighted by class and clip.

        What ``targets`` says where ``known`` is false has no influence, not even if it is not a number.
        """
        if self.loss == "cross-entropy":
            return cross_entropy(logits, targets, self.label_smoothing, self.class_weights, clip_weights)
        return masked_bce(logits, targets, known, self.class_weights, clip_weights)

    def _against_teacher(self, logits: Tensor, teacher: Tensor) -> Tensor:
        """(B,)"""
        if self.loss == "cross-entropy":
            return -(teacher * F.log_softmax(logits, dim=1)).sum(1)
        return F.binary_cross_entropy_with_logits(logits, teacher, reduction="none").mean(1)


def masked_bce(
    logits: Tensor,
    targets: Tensor,
    known: Tensor | None,
    positive_weights: Tensor | None = None,
    clip_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross entropy, averaged over the labels (B, C) that are known; 0 where none is."""
    known = torch.ones_like(logits, dtype=torch.bool) if known is None else known
    targets = torch.where(known, targets, 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=positive_weights, reduction="none")
    if clip_weights is not None:
        losses = losses * clip_weights[:, None]
    return torch.where(known, losses, 0.0).sum() / known.sum().clamp(min=1)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
    clip_weights: Tensor | None = None,
) -> Tensor:
    """Cross entropy with targets (B, C) that add up to 1; with class weights, the weighted mean over the clips."""
    weighted = targets if class_weights is None else targets * class_weights
    smooth = (1.0 - label_smoothing) * weighted + label_smoothing / targets.shape[1] * weighted.sum(1, keepdim=True)
    losses = -(smooth * F.log_softmax(logits, dim=1)).sum(1)
    if clip_weights is not None:
        losses = losses * clip_weights
    return losses.sum() / weighted.sum().clamp(min=1e-6)


def balanced_weights(loss: Loss, positives: Tensor, negatives: Tensor) -> Tensor:
    """Weights (C,) that make all classes count as if they were equally frequent; a class without clips has weight 1.

    Cross entropy: clips / (classes · clips of the class). BCE, for the positive labels: clips without the class / clips
    with it, between 1/100 and 100.

    Args:
        positives: (C,), clips that have the class.
        negatives: (C,), clips that do not have it.
    """
    occurs = positives > 0
    if loss == "cross-entropy":
        weights = positives.sum() / (occurs.sum() * positives.clamp(min=1))
    else:
        weights = (negatives / positives.clamp(min=1)).clamp(1 / LARGEST_POSITIVE_WEIGHT, LARGEST_POSITIVE_WEIGHT)
    return torch.where(occurs, weights, 1.0).float()


def freq_mixstyle(mel: Tensor, weight: Tensor) -> Tensor:
    """Each mel band's mean and deviation over time, mixed with those of the clip's partner, (B, 1, M, T) -> the same.

    MixStyle (Zhou et al., 2021) on frequency in place of channels, as for recording devices (Kim et al., 2022; Schmid et
    al., 2022): a device shows in the spectrum's average.

    Args:
        weight: (B,), the share of the clip's own statistics. Partners are those of ``mix_with_partner``.
    """
    deviation, mean = torch.std_mean(mel, dim=(1, 3), correction=0, keepdim=True)  # (B, 1, M, 1)
    deviation = deviation.clamp(min=1e-3)
    return (mel - mean) / deviation * mix_with_partner(deviation, weight) + mix_with_partner(mean, weight)


def mask_mel(mel: Tensor, time_masks: Tensor | None, frequency_masks: Tensor | None) -> Tensor:
    """SpecAugment (Park et al., 2019): ranges of frames and of bands set to the clip's mean, (B, 1, M, T) -> the same.

    Masks are (B, masks, 2), from start to end as shares of the axis.
    """
    for masks, axis in ((frequency_masks, 2), (time_masks, 3)):
        if masks is None:
            continue
        size = mel.shape[axis]
        place = (torch.arange(size, device=mel.device) + 0.5) / size
        hidden = ((place >= masks[..., :1]) & (place < masks[..., 1:])).any(1)  # (B, size)
        shape = [len(mel), 1, 1, 1]
        shape[axis] = size
        mel = torch.where(hidden.view(shape), mel.mean(dim=(1, 2, 3), keepdim=True), mel)
    return mel
