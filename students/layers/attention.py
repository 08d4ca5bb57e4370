"""Attention mechanisms from vision that Table V of the DyMN paper compares in MobileNetV3, each before a block's projection.

The paper names the methods but gives no sizes. We use the methods' own, with C / reduction channels in squeezed
layers, so that one number (``se_reduction``) makes squeeze-excitation and the others comparable.

Shapes: B batch, C channels, F frequency positions, T time positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from students.layers.convolutions import BATCH_NORM_EPSILON, BATCH_NORM_MOMENTUM, conv_norm_activation, make_divisible


class CoordinateAttention(nn.Module):
    """Channel-frequency and channel-time weights, each computed from the mean over the other axis (Hou et al. 2021)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // reduction)
        self.joint = conv_norm_activation(channels, squeezed, activation=nn.Hardswish)
        self.to_frequency = nn.Conv2d(squeezed, channels, 1)
        self.to_time = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        pooled = torch.cat((x.mean(3, keepdim=True), x.mean(2, keepdim=True).transpose(2, 3)), dim=2)
        frequency, time = self.joint(pooled).split((x.shape[2], x.shape[3]), dim=2)
        return x * self.to_frequency(frequency).sigmoid() * self.to_time(time).transpose(2, 3).sigmoid()


class _PlaneAttention(nn.Module):
    """Weights for a plane's positions from the maximum and mean along the third axis: 7×7 convolution, norm, sigmoid."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = conv_norm_activation(2, 1, kernel=7)

    def forward(self, x: Tensor, across: int) -> Tensor:
        """(B, C, F, T) -> the same shape with length 1 along the axis ``across``"""
        pooled = torch.stack((x.amax(across), x.mean(across)), dim=1)
        return self.layers(pooled).sigmoid().squeeze(1).unsqueeze(across)


class TripletAttention(nn.Module):
    """Mean of three maps, reweighted by frequency × time, channel × time and channel × frequency (Misra et al. 2021)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.planes = nn.ModuleList(_PlaneAttention() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        return x * sum(plane(x, across) for plane, across in zip(self.planes, (1, 2, 3), strict=True)) / 3.0


class StyleRecalibration(nn.Module):
    """Channel weights from each channel's mean and standard deviation: channel-wise linear map, norm (Lee et al. 2019, SRM)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 2))
        self.norm = nn.BatchNorm1d(channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)
        nn.init.normal_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
        # The gradient of the square root is infinite at 0, which is the variance of a channel that a ReLU silenced.
        style = mean * self.weight[:, 0] + (variance + 1e-5).sqrt() * self.weight[:, 1]  # (B, C)
        return x * self._normalized(style).sigmoid()[:, :, None, None]

    def _normalized(self, style: Tensor) -> Tensor:
        if not self.training or len(style) > 1:
            return self.norm(style)
        # There are no batch statistics of a single clip; use the running ones.
        norm = self.norm
        return functional.batch_norm(
            style, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps
        )


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its norm over the map, relative to the mean norm of all channels (Woo et al. 2023, GRN)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(channels))
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        # float32: the sum of squares of a long clip overflows half precision. 1e-12: the root's gradient is infinite at 0.
        norm = (x.float().square().sum((2, 3)) + 1e-12).sqrt()  # (B, C)
        response = norm / (norm.mean(1, keepdim=True) + 1e-6)
        weights = (1.0 + self.scale * response).to(x.dtype)
        return x * weights[:, :, None, None] + self.shift.to(x.dtype)[:, None, None]


class ConvolutionalBlockAttention(nn.Module):
    """Channel weights from mean and maximum through a shared network, then position weights (Woo et al. 2018, CBAM)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // reduction)
        self.shared = nn.Sequential(nn.Linear(channels, squeezed), nn.ReLU(), nn.Linear(squeezed, channels))
        self.positions = _PlaneAttention()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        weights = (self.shared(x.mean((2, 3))) + self.shared(x.amax((2, 3)))).sigmoid()
        x = x * weights[:, :, None, None]
        return x * self.positions(x, across=1)


class GlobalContext(nn.Module):
    """Adds one vector to every position, computed from an attention-weighted mean over positions (Cao et al. 2019, GC)."""

    def __init__(self, channels: int, reduction: int) -> None:
        super().__init__()
        squeezed = make_divisible(channels // reduction)
        self.attention = nn.Conv2d(channels, 1, 1)
        self.transform = nn.Sequential(
            nn.Linear(channels, squeezed), nn.LayerNorm(squeezed), nn.ReLU(), nn.Linear(squeezed, channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        attention = self.attention(x).flatten(1).softmax(1).to(x.dtype)  # (B, F * T)
        context = (x.flatten(2) @ attention[:, :, None])[:, :, 0]
        return x + self.transform(context)[:, :, None, None]


_ATTENTION: dict[str, Callable[[int, int], nn.Module]] = {
    "ca": CoordinateAttention,
    "ta": TripletAttention,
    "srm": StyleRecalibration,
    "grn": GlobalResponseNorm,
    "cbam": ConvolutionalBlockAttention,
    "gc": GlobalContext,
}
ATTENTIONS = tuple(_ATTENTION)


def create_attention(name: str, channels: int, reduction: int) -> nn.Module:
    """One of ATTENTIONS for maps of ``channels``: (B, C, F, T) -> (B, C, F, T)."""
    return _ATTENTION[name](channels, reduction)
