"""The network that is exported: front end, student and scores as one module, in a form that runtimes run fast.

Shapes: B batch, N samples, C channels, F frequency positions, T time positions, E embedding size, K classes, M mel bands.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from audio_datasets.tasks.label_space import LabelSpace
from kd.deploy.graph.frontend import ConvolutionalLogMel
from students.families.dymn import DynamicConv
from students.frontend import LogMelConfig
from students.interface import Student

Input = Literal["waveform", "mel"]


class Outputs(NamedTuple):
    """What an exported model returns, under these names."""

    scores: Tensor
    """(B, K): sigmoid, or softmax within a group of exclusive classes."""
    logits: Tensor
    """(B, K)"""
    embedding: Tensor
    """(B, E)"""


class ExportedNetwork(nn.Module):
    """Waveform (B, N), or log-mel (B, 1, M, T), -> Outputs. Batch norms are folded; it cannot be trained."""

    def __init__(
        self,
        student: Student,
        frontend: LogMelConfig,
        label_space: LabelSpace,
        *,
        takes: Input = "waveform",
        one_clip: bool = False,
    ) -> None:
        """
        Args:
            one_clip: the batch is always 1, which lets a DyMN mix its depthwise kernels before it convolves.
        """
        super().__init__()
        self.frontend = ConvolutionalLogMel(frontend) if takes == "waveform" else nn.Identity()
        self.student = for_runtimes(student, one_clip)
        self.label_space = label_space
        self.eval()

    def forward(self, inputs: Tensor) -> Outputs:
        """(B, N) or (B, 1, M, T) -> Outputs"""
        logits, embedding = self.student(self.frontend(inputs))
        scores = [
            logits[:, columns].softmax(1) if group.exclusive else logits[:, columns].sigmoid()
            for group, columns in self.label_space.parts()
        ]
        return Outputs(scores[0] if len(scores) == 1 else torch.cat(scores, dim=1), logits, embedding)


def for_runtimes(student: Student, one_clip: bool = False) -> Student:
    """``student.fuse()`` with its dynamic depthwise convolutions in the form that runtimes have fast code for."""
    fused = student.fuse()
    if one_clip:
        return fused
    for module in list(fused.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, DynamicConv) and child.is_depthwise:
                setattr(module, name, UnmixedDepthwise(child))
    return fused


class UnmixedDepthwise(DynamicConv):
    """A dynamic depthwise convolution as the weighted sum of K convolutions with constant kernels.

    Convolution is linear in its kernel, so this gives the same. It takes K times the multiplications, which are few, and
    saves runtimes a convolution with B · C groups and kernels that change: these have fast code for constant kernels only.
    """

    def __init__(self, conv: DynamicConv) -> None:
        """``conv`` has its batch norm folded in."""
        nn.Module.__init__(self)
        self.__dict__.update(copy.copy(conv).__dict__)
        kernels = conv.weight.detach().view(conv.kernels, *conv.kernel_shape)
        del self._parameters["weight"]
        self.unmixed = nn.ParameterList(nn.Parameter(kernel.clone(), requires_grad=False) for kernel in kernels)

    def forward(self, x: Tensor, context: Tensor | None, norm: nn.Module, activation: nn.Module | None) -> Tensor:
        """x (B, C, F, T), context (B, H) -> (B, C, F', T'), activated"""
        assert isinstance(norm, nn.Identity), "fold the batch norm first"
        if self.own_context is not None:
            context = self.own_context(x)
        channels, _, size, _ = self.kernel_shape
        shares = self.attention(context)  # (B, K)
        out = None
        for number, kernel in enumerate(self.unmixed):
            convolved = functional.conv2d(x, kernel, None, self.stride, size // 2, groups=channels)
            part = shares[:, number, None, None, None] * convolved
            out = part if out is None else out + part
        if self.bias is not None:
            out = out + self.bias[:, None, None]
        return out if activation is None else activation(out)


def channels_of_weights(network: nn.Module) -> Mapping[str, Sequence[int]]:
    """The weights of linear layers and 1×1 convolutions by name, each with the shape in which its last axes share a scale.

    A shape is (rows, inputs), or (kernels, rows, inputs) for a dynamic convolution: each row makes one output channel.
    """
    shapes: dict[str, Sequence[int]] = {}
    for name, module in network.named_modules():
        if isinstance(module, DynamicConv):
            if not module.is_depthwise:
                rows, inputs, *_ = module.kernel_shape
                shapes[f"{name}.weight"] = (module.kernels, rows, inputs)
        elif isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and math.prod(module.kernel_size) == 1):
            shapes[f"{name}.weight"] = (len(module.weight), module.weight[0].numel())
    return shapes
