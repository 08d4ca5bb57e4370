"""Squeeze-excitation over channels, frequency or time.

Shapes: B batch, C channels, F frequency positions, T time positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from students.layers.convolutions import make_divisible

SE_AXES = "cft"
_AXIS_OF = {"c": 1, "f": 2, "t": 3}

_COMBINE: dict[str, Callable[[Tensor], Tensor]] = {
    "max": lambda outputs: outputs.amax(0),
    "avg": lambda outputs: outputs.mean(0),
    "add": lambda outputs: outputs.sum(0),
    "min": lambda outputs: outputs.amin(0),
}
SE_AGGREGATIONS = tuple(_COMBINE)


def is_selection_of_axes(axes: str) -> bool:
    """Whether ``axes`` names one or more of "c", "f" and "t", each once and in this order."""
    return axes != "" and axes == "".join(axis for axis in SE_AXES if axis in axes)


class SqueezeExcitation(nn.Module):
    """Rescales a feature map along one axis by weights computed from its means (Hu et al. 2018, here for any axis).

    Mean over the two other axes, linear, ReLU, linear, sigmoid, product. On the time axis the layer has the size of a
    nominal clip. For a clip of another length the squeezed vector is resampled linearly to the nominal length, and the
    weights are resampled back. This changes nothing at the nominal length.
    """

    def __init__(self, axis: str, size: int, squeezed_size: int) -> None:
        super().__init__()
        self.axis = axis
        self.size = size
        self.fc1 = nn.Linear(size, squeezed_size)
        self.fc2 = nn.Linear(squeezed_size, size)

    def weights(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, length of the axis), each in [0, 1]"""
        axis = _AXIS_OF[self.axis]
        squeezed = x.mean(dim=[other for other in (1, 2, 3) if other != axis])
        if self.axis == "t":
            squeezed = _resample(squeezed, self.size)
        excited = self.fc2(functional.relu(self.fc1(squeezed))).sigmoid()
        return _resample(excited, x.shape[3]) if self.axis == "t" else excited

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        shape = [1, 1, 1]
        shape[_AXIS_OF[self.axis] - 1] = -1
        return x * self.weights(x).unflatten(1, shape)


def _resample(x: Tensor, length: int) -> Tensor:
    """Linear interpolation along the last axis, (B, T) -> (B, length); exactly the identity if T == length."""
    return functional.interpolate(x[:, None], size=length, mode="linear", align_corners=False)[:, 0]


class ConcurrentSqueezeExcitation(nn.Module):
    """Squeeze-excitation over several axes in parallel, with outputs combined by maximum, mean, sum or minimum.

    ``axes`` is a selection of "cft"; ``sizes`` gives (C, F, T) of the map for a nominal clip. Each layer squeezes its
    axis to ``size // reduction``, rounded to a multiple of 8.
    """

    def __init__(self, axes: str, aggregation: str, reduction: int, sizes: tuple[int, int, int]) -> None:
        super().__init__()
        self.aggregation = aggregation
        self.conc_se_layers = nn.ModuleList(
            SqueezeExcitation(axis, size, make_divisible(size // reduction))
            for axis, size in zip(SE_AXES, sizes, strict=True)
            if axis in axes
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        outputs = [layer(x) for layer in self.conc_se_layers]
        return outputs[0] if len(outputs) == 1 else _COMBINE[self.aggregation](torch.stack(outputs))
