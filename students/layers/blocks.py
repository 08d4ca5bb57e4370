"""What the student families share: the Student interface, dropout by sample key, squeeze-excitation and heads.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes, H attention heads.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional

# The TensorFlow defaults that MobileNetV3 was trained with; the public checkpoints' running statistics rely on epsilon.
BATCH_NORM_EPSILON = 1e-3
BATCH_NORM_MOMENTUM = 0.01

_WORD = 1 << 64


class StudentOutput(NamedTuple):
    """What a student returns: ``logits`` (B, K) before the sigmoid or softmax, and ``embedding`` (B, E)."""

    logits: Tensor
    embedding: Tensor


@dataclass(frozen=True)
class StudentConfig:
    """Everything that ``create_student`` needs to build a student again; plain enough for JSON."""

    name: str
    """Catalog name, such as "mn04"."""
    num_classes: int
    """Size of the output."""
    options: dict[str, Any] = field(default_factory=dict)
    """Every option of the family with its value, defaults included, so that a later default changes nothing."""


class Student(nn.Module):
    """Base of all students: mel (B, 1, n_mels, frames) -> StudentOutput.

    ``create_student`` sets ``config``; a student built by hand has none and can be neither saved nor matched to weights.
    """

    config: StudentConfig | None = None

    def __init__(self, num_classes: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.embedding_dim = embedding_dim

    def forward(self, mel: Tensor) -> StudentOutput:
        raise NotImplementedError

    def start_epoch(self, epoch: int) -> None:
        """Takes over what changes with the epoch of pretraining, counted from 0; nothing does, for most students."""

    def output_biases(self) -> Tensor:
        """What is added to the logits, as a view that writes through: (K,), or (parts, K) where parts of it are averaged."""
        raise NotImplementedError

    @torch.no_grad()
    def set_class_prior(self, frequencies: Tensor) -> None:
        """Sets the output biases so that an untrained student predicts each class's frequency (K,), within 0.1 to 99.9 %.

        As in RetinaNet (Lin et al. 2017, Section 3.3): without it the first steps on rare classes all go into lowering
        every logit.
        """
        self.output_biases().copy_(torch.logit(frequencies.clamp(1e-3, 1.0 - 1e-3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The map (B, C, F, T) after every stage, in order; the last one is what ``classifier`` takes."""
        raise NotImplementedError

    def frame_logits(self, mel: Tensor) -> Tensor:
        """Logits of every time position on its own, (B, K, T): the last map, column by column, through the classifier.

        For evaluation: a column has no key of its own for dropout.
        """
        last = self.feature_maps(mel)[-1]
        columns = last.permute(0, 3, 1, 2).flatten(0, 1)[..., None]  # (B * T, C, F, 1)
        return self.classifier(columns).unflatten(0, (last.shape[0], last.shape[3])).transpose(1, 2)

    def fuse(self) -> "Student":
        """A copy for inference with batch norms folded into the convolutions before them; gives the same within rounding.

        It is in evaluation mode, its weights need no gradient, and it has no ``config``: save and train the original.
        """
        fused = copy.deepcopy(self).eval().requires_grad_(False)
        fused.config = None
        for module in list(fused.modules()):
            if isinstance(module, nn.Sequential):
                _fold_pairs(module)
            elif isinstance(module, FoldsBatchNorms):
                module.fold_batch_norms()
        return fused


@runtime_checkable
class FoldsBatchNorms(Protocol):
    """A module that folds batch norms in its own way; those that follow a convolution in a Sequential need none."""

    def fold_batch_norms(self) -> None: ...


def norm_scale_and_shift(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """What a batch norm does in evaluation mode, x * scale + shift: (C,) each."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


@torch.no_grad()
def folded_convolution(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    """One convolution that does what the two do in evaluation mode."""
    scale, shift = norm_scale_and_shift(norm)
    folded = copy.deepcopy(conv)
    folded.weight.mul_(scale[:, None, None, None])
    if conv.bias is not None:
        shift = shift + conv.bias * scale
    folded.bias = nn.Parameter(shift, requires_grad=False)
    return folded


def _fold_pairs(layers: nn.Sequential) -> None:
    """Folds each batch norm into the convolution before it; an Identity keeps its place, so that indices stay."""
    for index in range(len(layers) - 1):
        conv, norm = layers[index], layers[index + 1]
        if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
            layers[index] = folded_convolution(conv, norm)
            layers[index + 1] = nn.Identity()


def checked_mel(mel: Tensor) -> Tensor:
    """``mel`` as it is. Raises ValueError unless its shape is (B, 1, n_mels, frames)."""
    if mel.ndim != 4 or mel.shape[1] != 1:
        raise ValueError(f"this student takes (batch, 1, n_mels, frames); found {tuple(mel.shape)}")
    return mel


def make_divisible(value: float, divisor: int = 8) -> int:
    """The multiple of ``divisor`` nearest to ``value``, at least ``divisor`` and not more than 10 % below ``value``.

    The rounding rule of the MobileNet papers, which decides how wide every layer is.
    """
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def channels_last_on_cpu(x: Tensor) -> Tensor:
    """(B, C, F, T) -> the same in channels-last memory, on the CPU; elsewhere the memory format is the caller's choice.

    A depthwise convolution on the CPU is up to nine times faster in it, since it needs no copy into blocks of channels.
    """
    return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" else x


class ConvNormActivation(nn.Sequential):
    """Convolution, batch norm and perhaps an activation, in the memory format that is fastest."""

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
    """He normal convolutions (fan out, as MobileNetV3) and linear layers (fan in).

    MobileNetV3's N(0, 0.01) for linear layers leaves the gradient of the first convolution two orders of magnitude smaller,
    and a small student trained from scratch takes more than twice the steps to the same loss (docs/results.md).
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


# --- Random numbers by sample key, dropout -----------------------------------------------------------------------------


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number: torch computes with int64, which wraps around."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own copies the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): every input bit moves half of the output bits."""
    word = (word ^ _shift_right(word, 30)) * _MIX_1
    word = (word ^ _shift_right(word, 27)) * _MIX_2
    return word ^ _shift_right(word, 31)


def keyed_uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, count) float32, each a pure function of (its key, ``stream``, its column).

    ``keys`` (B,) int64. Integer arithmetic only, so CPU and GPU agree to the bit.
    """
    state = _mix(keys + _signed(_GOLDEN_GAMMA * (stream + 1)))
    columns = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN_GAMMA
    bits = _shift_right(_mix(state[:, None] + columns), 40)
    return bits.to(torch.float32) * 2.0**-24


class KeyedModule(nn.Module):
    """A module that draws random numbers in training from the sample's key (see ``set_sample_keys``).

    What a sample meets is a pure function of its key and of this module's place among the network's keyed modules. It is
    therefore the same in whatever batch, process or resumed run the sample appears.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer_index = 0
        self.sample_keys: Tensor | None = None

    def draw_uniform(self, batch: int, count: int, device: torch.device) -> Tensor:
        """Uniform numbers in [0, 1), (batch, count); from torch's global generator if no keys are set."""
        if self.sample_keys is None:
            return torch.rand(batch, count, device=device)
        if len(self.sample_keys) != batch:
            raise ValueError(f"{len(self.sample_keys)} sample keys were set for a batch of {batch}")
        return keyed_uniform(self.sample_keys.to(device), self.layer_index, count)


class KeyedDropout(KeyedModule):
    """Dropout whose mask depends on the sample's key; without keys it is ``functional.dropout``.

    Identity in evaluation mode.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0.0 <= probability < 1.0:
            raise ValueError(f"a dropout probability is at least 0 and below 1; found {probability}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)"""
        if not self.training or self.probability == 0.0:
            return x
        if self.sample_keys is None:
            return functional.dropout(x, self.probability)
        uniform = self.draw_uniform(len(x), math.prod(x.shape[1:]), x.device)
        kept = (uniform >= self.probability).view(x.shape)
        return x * kept / (1.0 - self.probability)

    def extra_repr(self) -> str:
        return f"probability={self.probability}"


def set_sample_keys(module: nn.Module, keys: Tensor | None) -> None:
    """Gives every KeyedModule in ``module`` the keys of the coming batch's samples; ``None`` takes them away.

    ``keys`` (B,) int64: one number per sample that names the sample and the moment, such as a hash of (run seed, epoch,
    position in the epoch).
    """
    if keys is not None and (keys.ndim != 1 or keys.dtype != torch.int64):
        raise ValueError(f"sample keys are int64 of shape (batch,); found {keys.dtype} of shape {tuple(keys.shape)}")
    keyed = (layer for layer in module.modules() if isinstance(layer, KeyedModule))
    for layer_index, layer in enumerate(keyed):
        layer.layer_index = layer_index
        layer.sample_keys = keys


# --- Squeeze-excitation ------------------------------------------------------------------------------------------------

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
    """Rescales one axis of a feature map by what the map holds on average (Hu et al. 2018, on any one axis).

    Mean over the two other axes, linear, ReLU, linear, sigmoid, product. On the time axis the layer has the size of a
    nominal clip; for a clip of another length the squeezed vector is resampled linearly to the nominal length and the
    weights are resampled back, which changes nothing at the nominal length.
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
    """Linear interpolation along the last axis, (B, T) -> (B, length); exact identity where T == length."""
    return functional.interpolate(x[:, None], size=length, mode="linear", align_corners=False)[:, 0]


class ConcurrentSqueezeExcitation(nn.Module):
    """Squeeze-excitation over several axes side by side, their outputs combined by maximum, mean, sum or minimum.

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


# --- Heads -------------------------------------------------------------------------------------------------------------


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
    """Every head gives each class a value and an attention per frame; heads are summed with learned weights.

    The multi-head attention pooling of PSLA (Gong et al. 2021): mean over frequency, one linear map to attention and value
    of every head and class, sigmoid attention normalised over time, values as they are.
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
        # float32: 1 - 1e-7 is 1 in half precision, and a sum of clamped attentions would lose its smallest terms.
        attention = attention.float().sigmoid().clamp(1e-7, 1.0 - 1e-7)
        pooled = (attention / attention.sum(1, keepdim=True) * value).sum(1)  # (B, H, K)
        return (pooled * self.head_weight).sum(1)

    def output_biases(self) -> Tensor:
        """(H, K): biases of the values; the head weights, which add up to 1, average them."""
        return self.subspace_proj.bias.unflatten(0, (2, self.heads, -1))[1]


HEADS = ("mlp", "fully_convolutional", "attention_pooling")


def create_head(head: str, in_channels: int, hidden: int, num_classes: int, dropout: float) -> nn.Module:
    """One of HEADS, (B, C, F, T) -> (B, K). Hidden layer and dropout are those of the mlp head."""
    if head == "mlp":
        return mlp_head(in_channels, hidden, num_classes, dropout)
    if head == "fully_convolutional":
        return fully_convolutional_head(in_channels, num_classes)
    assert head == "attention_pooling", head
    return AttentionPoolingHead(in_channels, num_classes)


def head_output_biases(head: nn.Module) -> Tensor:
    """What one of HEADS adds to the logits; for the fully convolutional one the batch norm's, whose mean over the map it is."""
    if isinstance(head, AttentionPoolingHead):
        return head.output_biases()
    return [layer for layer in head if isinstance(layer, nn.Linear | nn.BatchNorm2d)][-1].bias
