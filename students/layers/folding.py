"""Folding a batch norm into the convolution before it, for inference. C is the number of channels."""

import copy

import torch
from torch import Tensor, nn


def norm_scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift, (C,) each, for which a batch norm in evaluation mode computes x * scale + shift."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def folded_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """A single convolution equal to the two layers in evaluation mode."""
    scale, shift = norm_scale_and_shift(norm)
    folded = copy.deepcopy(conv)
    folded.weight.mul_(scale[:, None, None, None])
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    folded.bias = nn.Parameter(shift, requires_grad=False)
    return folded


def fold_pairs(layers: nn.Sequential) -> None:
    """Folds each batch norm into the convolution before it and puts an Identity in its place, so that indices do not change."""
    for index in range(len(layers) - 1):
        conv, norm = layers[index], layers[index + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[index] = folded_convolution(conv, norm)
            layers[index + 1] = nn.Identity()
