"""Heads, which map the last feature map to logits.

Shapes: B batch, C channels, F frequency positions, T time positions, K classes, H attention heads.
"""

import torch
from torch import Tensor, nn

from students.layers.convolutions import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM
from students.layers.keyed import KeyedDropout


def mlp_head(in_channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Sequential:
    """Mean over the map, linear, hard-swish, dropout, linear; (B, C, F, T) -> (B, K)."""
    return nn.Sequential(
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
        nn.Linear(in_channels, hidden),
        nn.Hardswish(inplace=True),
        KeyedDropout(dropout),
        nn.Linear(hidden, num_classes),
    )


def fully_convolutional_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """1×1 convolution to the classes, batch norm, mean over the map; (B, C, F, T) -> (B, K)."""
    return nn.Sequential(
        nn.Conv2d(in_channels, num_classes, 1, bias=False),
        nn.BatchNorm2d(num_classes, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(1),
    )


class AttentionPoolingHead(nn.Module):
    """Each head computes a value and an attention weight per class and frame; heads are summed with learned weights.

    The multi-head attention pooling of PSLA (Gong et al. 2021): mean over frequency, one linear map to attention and value
    of each head and class, sigmoid attention normalised over time, values without activation.
    """

    def __init__(self, in_channels: int, num_classes: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.subspace_proj = nn.Linear(in_channels, 2 * heads * num_classes)
        self.head_weight = nn.Parameter(torch.full((1, heads, 1), 1.0 / heads))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, K)"""
        projected = self.subspace_proj(x.mean(2).transpose(1, 2))  # (B, T, 2 * H * K)
        attention, value = projected.unflatten(2, (2, self.heads, -1)).unbind(2)  # (B, T, H, K) each
        # float32: in half precision 1 - 1e-7 is 1, and the sum of clamped attentions would lose its smallest terms.
        attention = attention.float().sigmoid().clamp(1e-7, 1.0 - 1e-7)
        pooled = (attention / attention.sum(1, keepdim=True) * value).sum(1)  # (B, H, K)
        return (pooled * self.head_weight).sum(1)

    def output_biases(self) -> Tensor:
        """(H, K): biases of the values. The head weights, which initially add up to 1, average them."""
        return self.subspace_proj.bias.unflatten(0, (2, self.heads, -1))[1]


def linear_head(in_channels: int, num_classes: int) -> nn.Sequential:
    """Mean over the map, linear; (B, C, F, T) -> (B, K). What a linear probe is saved as."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(in_channels, num_classes))


HEADS = ("mlp", "fully_convolutional", "attention_pooling", "linear")


def create_head(head: str, in_channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Module:
    """One of HEADS, (B, C, F, T) -> (B, K). ``hidden`` and ``dropout`` apply to the mlp head only."""
    if head == "mlp":
        return mlp_head(in_channels, hidden, num_classes, dropout)
    if head == "fully_convolutional":
        return fully_convolutional_head(in_channels, num_classes)
    if head == "linear":
        return linear_head(in_channels, num_classes)
    assert head == "attention_pooling", head
    return AttentionPoolingHead(in_channels, num_classes)


def head_output_biases(head: nn.Module) -> Tensor:
    """The biases that a head adds to the logits. For the fully convolutional one, these are the biases of its batch norm."""
    if isinstance(head, AttentionPoolingHead):
        return head.output_biases()
    return [layer for layer in head if isinstance(layer, nn.Linear | nn.BatchNorm2d)][-1].bias
