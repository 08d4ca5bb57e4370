"""Convolution with batch norm and activation, and the rules for widths and initial weights that the families share.

Shapes: B batch, C channels, F frequency positions, T time positions.
"""

import torch
from torch import Tensor, nn

# TensorFlow's defaults, with which MobileNetV3 was trained; the running statistics of public checkpoints depend on epsilon.
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.01


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least ``divisor`` and not more than 10 % below ``value``.

    This is the rounding rule of the MobileNet papers. It determines the width of every layer.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """(B, C, F, T) -> the same in channels-last memory on the CPU, unchanged on other devices.

    On the CPU this makes a depthwise convolution up to nine times faster, because it saves a copy into blocks of channels.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and an optional activation, in the fastest memory format."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C', F', T')"""
        return super().forward(channels_last_on_cpu(x))


def conv_norm_activation(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 1,
    stride: int = 1,
    groups: int = 1,
    activation: type[nn.Module] | None = None,
) -> ConvNormActivation:
    """Convolution without bias, batch norm, activation; (B, C, F, T) -> (B, C', ceil(F / stride), ceil(T / stride))."""
    layers: list[nn.Module] = [
        nn.Conv2d(in_channels, out_channels, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False),
        nn.BatchNorm2d(out_channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM),
    ]
    if activation is not None:
        layers.append(activation(inplace=True))
    return ConvNormActivation(*layers)


def initialize_weights(module: nn.Module) -> None:
    """He normal initialisation for convolutions (fan out, as in MobileNetV3) and linear layers (fan in).

    MobileNetV3 uses N(0, 0.01) for linear layers. That makes the gradient of the first convolution two orders of magnitude smaller,
    and a small student trained from scratch needs more than twice the steps to reach the same loss (docs/results.md).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
