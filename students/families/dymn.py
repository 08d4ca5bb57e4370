"""DyMN: MN whose blocks adapt their convolutions, their non-linearity and their attention to the clip.

Schmid, Koutini and Widmer, "Dynamic Convolutional Neural Networks as Efficient Pre-trained Audio Models", 2023, Sections III
and VI. Parameter names are those of the public EfficientAT checkpoints.

``students.layers.batch_inner`` chooses the memory layout of maps, and has all operations with coefficients per clip.

Shapes: B batch, C channels, F frequency positions, T time positions, H context channels, K kernels, M maps of Dy-ReLU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from students.catalog import register
from students.families.mn import (
    HIDDEN_CHANNELS,
    LAST_EXPANSION,
    STAGES,
    STEM_CHANNELS,
    InvertedResidual,
    MNOptions,
    MobileNet,
    Stage,
)
from students.interface import FineTuning, Student
from students.layers.batch_inner import (
    batch_inner,
    depthwise,
    max_of_linear_maps,
    normalize,
    pointwise,
    prefers_batch_inner,
    recalibrate,
)
from students.layers.convolutions import (
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    channels_last_on_cpu,
    conv_norm_activation,
    initialize_weights,
    make_divisible,
)
from students.layers.folding import folded_convolution, norm_scale_and_shift
from students.layers.heads import create_head

_DYNAMIC_BLOCKS = {
    "all": range(15),
    "replace_se": tuple(index for index, stage in enumerate(STAGES) if stage.has_se),
    "first5": range(5),
    "mid5": range(5, 10),
    "last5": range(10, 15),
}
DYNAMIC_BLOCKS = tuple(_DYNAMIC_BLOCKS)
CONTEXTS = ("shared", "own")
COORD_AXES = ("ft", "f", "t")

TEMPERATURE_START = 30.0
TEMPERATURE_EPOCHS = 30


@dataclass(frozen=True)
class DyMNOptions:
    """Hyperparameters of DyMN; the defaults are the paper's. Raises ValueError for values that are not allowed.

    Positions in a block are 1 (expansion), 2 (depthwise) and 3 (projection), as in Table IV.
    """

    width: float = 1.0
    """Multiplies the number of channels of every layer and the bounds of the context's size; dymn04 has 0.4."""
    dynamic_blocks: str = "all"
    """Which of the 15 blocks are dynamic: "all", "replace_se" (where MN has squeeze-excitation), "first5", "mid5" or "last5"
    (Table III). The others are MN's."""
    dyconv: bool = True
    """Use dynamic convolutions instead of ordinary ones (Table II)."""
    dyrelu: bool = True
    """Use Dy-ReLU instead of MN's activation (Table II)."""
    coord_attention: bool = True
    """Use coordinate attention instead of no attention (Table II)."""
    dyconv_positions: tuple[int, ...] = (1, 2, 3)
    """Which convolutions of a block are dynamic (Table IV)."""
    dyrelu_positions: tuple[int, ...] = (2,)
    """Where Dy-ReLU replaces MN's activation; at 3, where MN has none, it is added (Table IV)."""
    coord_axes: str = "ft"
    """Coordinate attention over frequency and time ("ft"), or only channel-frequency ("f") or channel-time ("t") (Table VI)."""
    dyconv_kernels: int = 4
    """K: number of kernels that a dynamic convolution mixes (Table VII)."""
    dyrelu_maps: int = 2
    """M: number of linear maps of which Dy-ReLU takes the maximum (Table IX)."""
    context: str = "shared"
    """"shared": one context per block; "own": each dynamic convolution and Dy-ReLU pools its own input (Table X)."""
    shared_sequences: bool = True
    """Use the same linear layer and batch norm for the frequency and the time sequence, not one each (Table X)."""
    concat_pooled: bool = False
    """Average the two sequences separately and concatenate the results, which doubles the context's size (Table X)."""
    context_ratio: int = 4
    """r: the context has 1 / r of the expanded channels, within the two bounds below (Table XI)."""
    context_min: int = 32
    """Minimum number of context channels at width 1 (Table XI)."""
    context_max: int = 128
    """Maximum number of context channels at width 1 (Table XI)."""
    temperature: float = 1.0
    """τ of the softmax over kernels at the end of annealing, in inference and in fine-tuning (Table VIII)."""
    temperature_start: float = TEMPERATURE_START
    """τ at the start of annealing."""
    temperature_epochs: int = TEMPERATURE_EPOCHS
    """Epochs of training from scratch over which τ falls linearly; 0 keeps it constant at ``temperature``."""
    head: str = "mlp"
    """"mlp", "fully_convolutional", "attention_pooling" or "linear"."""
    strides: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Strides of the four stages that shrink the map, after the stem's 2."""
    n_mels: int = 128
    """Mel bands of the input."""
    dropout: float = 0.2
    """Probability of dropping a feature before the mlp head's last layer."""

    def __post_init__(self) -> None:
        for name in ("dyconv_positions", "dyrelu_positions"):
            positions = tuple(getattr(self, name))
            object.__setattr__(self, name, positions)  # JSON gives a list
            if positions != tuple(sorted(set(positions) & {1, 2, 3})) or not positions:
                raise ValueError(f"{name} must be one or more of 1, 2, 3 in this order; found {list(positions)}")
        for name, choices in (("dynamic_blocks", DYNAMIC_BLOCKS), ("context", CONTEXTS), ("coord_axes", COORD_AXES)):
            if getattr(self, name) not in choices:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}; choices: {', '.join(choices)}")
        for name in ("dyconv", "dyrelu", "coord_attention", "shared_sequences", "concat_pooled"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; found {getattr(self, name)!r}")
        for name in ("dyconv_kernels", "dyrelu_maps", "context_ratio", "context_min", "context_max"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0; found {value!r}")
        if self.context_min > self.context_max:
            raise ValueError(
                f"context_min must be at most context_max; found {self.context_min} and {self.context_max}"
            )
        for name in ("temperature", "temperature_start"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; found {getattr(self, name)}")
        if not isinstance(self.temperature_epochs, int) or self.temperature_epochs < 0:
            raise ValueError(f"temperature_epochs must be a whole number, 0 or more; found {self.temperature_epochs!r}")
        object.__setattr__(self, "strides", self.conventional().strides)

    def conventional(self) -> MNOptions:
        """The options of blocks that are MN's. Also checks the options that both families share."""
        return MNOptions(
            width=self.width, head=self.head, strides=self.strides, n_mels=self.n_mels, dropout=self.dropout
        )


# --- Temperature -------------------------------------------------------------------------------------------------------


def annealed_temperature(
    epoch: float,
    end: float = 1.0,
    start: float = TEMPERATURE_START,
    epochs: int = TEMPERATURE_EPOCHS,
) -> float:
    """τ in an epoch, counted from 0: linear from ``start`` to ``end`` over the first ``epochs`` epochs, then ``end``."""
    if epochs == 0:
        return end
    return end + (start - end) * max(0.0, 1.0 - epoch / epochs)


def set_temperature(student: Student, temperature: float) -> None:
    """Sets τ of all dynamic convolutions; does nothing to a student without any. ValueError unless τ is above 0."""
    if not temperature > 0:
        raise ValueError(f"a temperature must be above 0; found {temperature}")
    for module in student.modules():
        if isinstance(module, DynamicConv):
            module.temperature.fill_(temperature)


# --- The dynamic parts -------------------------------------------------------------------------------------------------


class OwnContext(nn.Module):
    """A context vector computed from a part's own input: mean over the map, linear, ReLU (Table X, "no shared context")."""

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, H)"""
        return functional.relu(self.linear(x.mean((2, 3))))


class DynamicConv(nn.Module):
    """Convolution, 1×1 or depthwise, whose kernel is mixed for each clip from K kernels (Section III-E).

    The batch norm that follows is passed in. In evaluation mode it is folded into the kernels, which is exact because the
    softmax's weights add up to 1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        context_size: int,
        kernels: int,
        temperature: float,
        own_context_size: int | None,
    ) -> None:
        super().__init__()
        assert (groups, kernel, stride) == (1, 1, 1) or groups == in_channels == out_channels
        self.kernel_shape = (out_channels, in_channels // groups, kernel, kernel)
        self.is_depthwise = groups > 1
        self.stride = stride
        self.kernels = kernels
        self.weight = nn.Parameter(torch.empty(1, 1, kernels, out_channels * in_channels // groups * kernel**2))
        self.residuals = nn.ModuleList([nn.Linear(context_size, kernels)])  # the public checkpoints' name
        self.own_context = None if own_context_size is None else OwnContext(in_channels, own_context_size)
        self.bias: nn.Parameter | None = None
        # A tensor, so that a compiled student does not recompile when it changes.
        self.register_buffer("temperature", torch.tensor(float(temperature)), persistent=False)
        for one in self.weight.data[0, 0]:
            nn.init.kaiming_normal_(one.view(self.kernel_shape), mode="fan_out")

    def attention(self, context: Tensor) -> Tensor:
        """Weights of the kernels, (B, H) -> (B, K); they add up to 1."""
        return (self.residuals[0](context) / self.temperature).softmax(1)

    def forward(self, x: Tensor, context: Tensor | None, norm: nn.Module, activation: nn.Module | None) -> Tensor:
        """x (B, C, F, T), context (B, H) -> (B, C', F', T'), normalised and activated"""
        if self.own_context is not None:
            context = self.own_context(x)
        kernel = torch.mm(self.attention(context), self.weight[0, 0]).unflatten(1, self.kernel_shape)
        bias = self.bias
        folds = isinstance(norm, nn.BatchNorm2d) and not norm.training
        if folds:
            scale, bias = norm_scale_and_shift(norm)
            kernel = kernel * scale[:, None, None, None]
        if self.is_depthwise:
            x = depthwise(x, kernel.flatten(1, 2), bias, self.stride)
        else:
            x = pointwise(x, kernel.flatten(2), bias)
        if not folds and not isinstance(norm, nn.Identity):
            return normalize(x, norm, activation)
        return x if activation is None else _activate(x, activation)

    @torch.no_grad()
    def fold(self, norm: nn.BatchNorm2d) -> None:
        """Folds a batch norm into the kernels and the bias."""
        scale, shift = norm_scale_and_shift(norm)
        kernels = self.weight.view(self.kernels, *self.kernel_shape) * scale[:, None, None, None]
        self.weight = nn.Parameter(kernels.view_as(self.weight), requires_grad=False)
        self.bias = nn.Parameter(shift, requires_grad=False)

    def extra_repr(self) -> str:
        return f"kernel_shape={self.kernel_shape}, stride={self.stride}, kernels={self.kernels}"


def _activate(x: Tensor, activation: nn.Module) -> Tensor:
    """In place only if gradients are disabled, because a gradient may need the input."""
    if torch.is_grad_enabled():
        return functional.relu(x) if isinstance(activation, nn.ReLU) else functional.hardswish(x)
    return activation(x)


class DynamicReLU(nn.Module):
    """The maximum of M linear maps with slopes and intercepts for each clip and channel (Section III-D; Dy-ReLU-B)."""

    def __init__(self, channels: int, *, context_size: int, maps: int, own_context_size: int | None) -> None:
        super().__init__()
        self.channels = channels
        self.maps = maps
        self.coef_net = nn.Sequential(nn.Linear(context_size, 2 * maps * channels))
        self.own_context = None if own_context_size is None else OwnContext(channels, own_context_size)
        # Slopes, then intercepts: the range in which a clip may change them, and their initial values, which give a ReLU.
        self.register_buffer("lambdas", torch.tensor([1.0] * maps + [0.5] * maps))
        self.register_buffer("init_v", torch.tensor([1.0] + [0.0] * (2 * maps - 1)))

    def coefficients(self, context: Tensor) -> Tensor:
        """(B, H) -> (2, M, B, C): slopes and intercepts"""
        theta = 2.0 * self.coef_net(context).float().sigmoid() - 1.0
        theta = theta.unflatten(1, (self.channels, 2 * self.maps)) * self.lambdas + self.init_v
        return theta.permute(2, 0, 1).contiguous().unflatten(0, (2, self.maps))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x (B, C, F, T), context (B, H) -> (B, C, F, T)"""
        if self.own_context is not None:
            context = self.own_context(x)
        coefficients = self.coefficients(context).to(x.dtype)
        return max_of_linear_maps(x, coefficients[0], coefficients[1])


class Recalibration(nn.Module):
    """Coordinate attention's product with a map (Section III-F). A module, so that hooks can see its inputs."""

    def forward(self, x: Tensor, frequency: Tensor | None, time: Tensor | None) -> Tensor:
        """x (B, C, F, T), frequency (B, C, F, 1), time (B, C, 1, T) -> (B, C, F, T)"""
        if frequency is not None and time is not None:
            return recalibrate(x, frequency, time)
        return x * (frequency if time is None else time)


class SequenceConv(nn.Conv2d):
    """1×1 convolution of a sequence stored as a map (1, C, L, B), computed as a matrix product."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool = True) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias)

    def forward(self, sequence: Tensor) -> Tensor:
        """(1, C, L, B) -> (1, C', L, B)"""
        return functional.linear(sequence.permute(0, 2, 3, 1), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def treat_clips_alike(module: nn.Module) -> None:
    """Initialises the layers that compute coefficients from contexts with N(0, 0.01), so that clips start with nearly the same ones.

    A dynamic convolution then starts close to the mean of its kernels, Dy-ReLU close to a ReLU, and coordinate attention close
    to a constant. With He initialisation each clip would start with its own random kernels and slopes, and almost nothing is
    learnt (docs/results.md).
    """
    for part in module.modules():
        layers: list[nn.Module | None] = []
        if isinstance(part, DynamicConv):
            layers = list(part.residuals)
        elif isinstance(part, DynamicReLU):
            layers = list(part.coef_net)
        elif isinstance(part, ContextGeneration):
            layers = [part.conv_f, part.conv_t]
        for layer in layers:
            if layer is not None:
                nn.init.normal_(layer.weight, std=0.01)


class Context(NamedTuple):
    """The inputs of a block's dynamic parts."""

    vector: Tensor
    """(B, H), or (B, 2 * H) if pooled sequences are concatenated: for dynamic convolutions and Dy-ReLU."""
    frequency: Tensor | None
    """(B, C, F, 1): coordinate attention's channel-frequency weights."""
    time: Tensor | None
    """(B, C, 1, T): coordinate attention's channel-time weights."""


class ContextGeneration(nn.Module):
    """Computes a block's context from its input (Section III-C), and coordinate attention's weights (Section III-F)."""

    def __init__(self, in_channels: int, expanded: int, size: int, stride: int, options: DyMNOptions) -> None:
        super().__init__()
        self.stride = stride
        self.concat_pooled = options.concat_pooled
        self.joint_conv = SequenceConv(in_channels, size, bias=False)
        self.joint_norm = nn.BatchNorm2d(size, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)
        self.time_conv = self.time_norm = None
        if not options.shared_sequences:
            self.time_conv = SequenceConv(in_channels, size, bias=False)
            self.time_norm = nn.BatchNorm2d(size, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)
        axes = options.coord_axes if options.coord_attention else ""
        self.conv_f = SequenceConv(size, expanded) if "f" in axes else None
        self.conv_t = SequenceConv(size, expanded) if "t" in axes else None

    def forward(self, x: Tensor) -> Context:
        """(B, C, F, T) -> Context"""
        # A sequence is stored as a channels-last map (1, C, L, B), with one clip per column, so layers for maps accept it.
        positions = x.permute(2, 3, 0, 1)  # (F, T, B, C)
        frequency, time = (positions.mean(axis).permute(2, 0, 1)[None] for axis in (1, 0))
        if self.time_conv is None:
            frequencies = frequency.shape[2]
            joint = functional.hardswish(self.joint_norm(self.joint_conv(torch.cat((frequency, time), dim=2))))
            frequency, time = joint[:, :, :frequencies], joint[:, :, frequencies:]
        else:
            frequency = functional.hardswish(self.joint_norm(self.joint_conv(frequency)))
            time = functional.hardswish(self.time_norm(self.time_conv(time)))
            joint = torch.cat((frequency, time), dim=2)
        pooled = torch.cat((frequency.mean(2), time.mean(2)), dim=1) if self.concat_pooled else joint.mean(2)
        return Context(
            pooled[0].t(),
            None if self.conv_f is None else self._weights(frequency, self.conv_f)[..., None],
            None if self.conv_t is None else self._weights(time, self.conv_t)[:, :, None],
        )

    def _weights(self, sequence: Tensor, conv: nn.Conv2d) -> Tensor:
        """(1, H, L, B) -> (B, C, ceil(L / stride))"""
        if self.stride > 1:
            sequence = functional.avg_pool2d(sequence, (3, 1), (self.stride, 1), (1, 0))
        return conv(sequence).sigmoid()[0].permute(2, 0, 1)

    def fold_batch_norms(self) -> None:
        self.joint_conv, self.joint_norm = folded_convolution(self.joint_conv, self.joint_norm), nn.Identity()
        if self.time_conv is not None:
            self.time_conv, self.time_norm = folded_convolution(self.time_conv, self.time_norm), nn.Identity()


# --- The block and the student -----------------------------------------------------------------------------------------


class DynamicBlock(nn.Module):
    """The dynamic inverted residual block (Section III-B, Fig. 1). Parts that options turn off are MN's, without SE."""

    def __init__(self, stage: Stage, in_channels: int, stride: int, options: DyMNOptions) -> None:
        super().__init__()
        expanded = make_divisible(stage.expanded * options.width)
        out = make_divisible(stage.out * options.width)
        bounds = (options.context_min * options.width, options.context_max * options.width)
        size = make_divisible(min(max(expanded / options.context_ratio, bounds[0]), bounds[1]))
        has_own_contexts = options.context == "own"
        shared = {
            "context_size": 2 * size if options.concat_pooled and not has_own_contexts else size,
            "own_context_size": size if has_own_contexts else None,
        }

        def convolution(position: int, inputs: int, outputs: int, kernel: int = 1, groups: int = 1) -> nn.Module:
            step = stride if position == 2 else 1
            if options.dyconv and position in options.dyconv_positions:
                mixing = {"kernels": options.dyconv_kernels, "temperature": options.temperature}
                return DynamicConv(inputs, outputs, kernel=kernel, stride=step, groups=groups, **mixing, **shared)
            return nn.Conv2d(inputs, outputs, kernel, step, kernel // 2, groups=groups, bias=False)

        def norm(channels: int) -> nn.BatchNorm2d:
            return nn.BatchNorm2d(channels, eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)

        def activation(position: int, channels: int) -> nn.Module | None:
            if options.dyrelu and position in options.dyrelu_positions:
                return DynamicReLU(channels, maps=options.dyrelu_maps, **shared)
            return None if position == 3 else stage.activation(inplace=True)

        self.exp_conv = None
        if expanded != in_channels:
            self.exp_conv = convolution(1, in_channels, expanded)
            self.exp_norm = norm(expanded)
            self.exp_act = activation(1, expanded)
        self.depth_conv = convolution(2, expanded, expanded, kernel=stage.kernel, groups=expanded)
        self.depth_norm = norm(expanded)
        self.depth_act = activation(2, expanded)
        self.recalibration = Recalibration() if options.coord_attention else None
        self.proj_conv = convolution(3, expanded, out)
        self.proj_norm = norm(out)
        self.proj_act = activation(3, out)
        has_shared_parts = not has_own_contexts and any(
            isinstance(module, DynamicConv | DynamicReLU) for module in self.modules()
        )
        self.context_gen = None
        if has_shared_parts or options.coord_attention:
            self.context_gen = ContextGeneration(in_channels, expanded, size, stride, options)
        self.has_residual = stride == 1 and in_channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C', ceil(F / stride), ceil(T / stride))"""
        inputs = x = batch_inner(x) if prefers_batch_inner(x) else x
        context = Context(None, None, None) if self.context_gen is None else self.context_gen(x)
        if self.exp_conv is not None:
            x = self._layer(x, context, self.exp_conv, self.exp_norm, self.exp_act)
        x = self._layer(x, context, self.depth_conv, self.depth_norm, self.depth_act)
        if self.recalibration is not None:
            x = self.recalibration(x, context.frequency, context.time)
        x = self._layer(x, context, self.proj_conv, self.proj_norm, self.proj_act)
        return inputs + x if self.has_residual else x

    @staticmethod
    def _layer(x: Tensor, context: Context, conv: nn.Module, norm: nn.Module, activation: nn.Module | None) -> Tensor:
        is_dynamic = isinstance(activation, DynamicReLU)
        static = None if is_dynamic else activation
        if isinstance(conv, DynamicConv):
            x = conv(x, context.vector, norm, static)
        else:
            x = norm(conv(channels_last_on_cpu(x)))
            x = x if static is None else static(x)
        return activation(x, context.vector) if is_dynamic else x

    def fold_batch_norms(self) -> None:
        for place in ("exp", "depth", "proj"):
            conv, norm = getattr(self, f"{place}_conv"), getattr(self, f"{place}_norm", None)
            if isinstance(conv, DynamicConv):
                conv.fold(norm)
            elif conv is not None:
                setattr(self, f"{place}_conv", folded_convolution(conv, norm))
            if conv is not None:
                setattr(self, f"{place}_norm", nn.Identity())


class DyMN(MobileNet):
    """MN with dynamic blocks."""

    Options = DyMNOptions
    fine_tuning: ClassVar[Mapping[str, FineTuning]] = {
        "esc50": FineTuning(4e-5, 64),
        "fsd50k": FineTuning(4e-5, 32),
        "openmic": FineTuning(2e-5, 32),
        "dcase20": FineTuning(3e-4, 32),
        "folder": FineTuning(1e-4, 16),
        "manifest": FineTuning(1e-4, 16),
    }
    only_from_scratch = ("temperature_start", "temperature_epochs")

    def __init__(self, num_classes: int, options: DyMNOptions) -> None:
        stem_channels = make_divisible(STEM_CHANNELS * options.width)
        last_channels = LAST_EXPANSION * make_divisible(STAGES[-1].out * options.width)
        super().__init__(num_classes, last_channels, options.n_mels)
        self.options = options
        self.in_c = conv_norm_activation(1, stem_channels, kernel=3, stride=2, activation=nn.Hardswish)
        blocks: list[nn.Module] = []
        channels = stem_channels
        for index, stage in enumerate(STAGES):
            stride = 1 if stage.stride_index is None else options.strides[stage.stride_index]
            if index in _DYNAMIC_BLOCKS[options.dynamic_blocks]:
                blocks.append(DynamicBlock(stage, channels, stride, options))
            else:
                # The size of the map is not needed: these blocks have squeeze-excitation over channels only.
                blocks.append(InvertedResidual(stage, channels, stride, (1, 1), options.conventional()))
            channels = make_divisible(stage.out * options.width)
        self.layers = nn.ModuleList(blocks)
        self.out_c = conv_norm_activation(channels, last_channels, activation=nn.Hardswish)
        hidden = make_divisible(HIDDEN_CHANNELS * options.width)
        self.classifier = create_head(options.head, last_channels, hidden, num_classes, options.dropout)
        initialize_weights(self)
        treat_clips_alike(self)

    @classmethod
    def pretraining_learning_rate(cls, options: DyMNOptions) -> float | None:
        """The paper's values for its three widths (Section IV-A)."""
        return {0.4: 2e-3, 1.0: 1e-3, 2.0: 5e-4}.get(options.width)

    @classmethod
    def options_for_training(cls, given: Mapping[str, Any], epochs: int) -> dict[str, Any]:
        """Anneals τ over 15 % of the epochs, as in the paper (30 of 200, Table VIII), unless ``temperature_epochs`` is given.

        Raises ValueError if annealing would not end before training does.
        """
        options = {"temperature_epochs": round(0.15 * epochs), **given}
        annealed = options["temperature_epochs"]
        if isinstance(annealed, int) and annealed >= epochs:
            raise ValueError(
                f"temperature_epochs ({annealed}) must be less than epochs ({epochs}): the student has to be trained at the"
                " temperature that annealing ends with"
            )
        return options

    def unused_tensors(self, state: Mapping[str, Tensor]) -> set[str]:
        """Parts of a context that nothing uses: public checkpoints hold the two convolutions of coordinate attention also where
        they were trained without it, and the context where no part of a block is dynamic."""
        unused: set[str] = set()
        for index, block in enumerate(self.layers):
            if isinstance(block, DynamicBlock) and not self.options.coord_attention:
                context = f"layers.{index}.context_gen."
                parts = (context,) if block.context_gen is None else (f"{context}conv_f.", f"{context}conv_t.")
                unused |= {name for name in state if name.startswith(parts)}
        return unused

    def chain(self) -> list[nn.Module]:
        """(see MobileNet)"""
        return [self.in_c, *self.layers, self.out_c]

    @property
    def temperature(self) -> float:
        """τ of the dynamic convolutions; the value in the options if there are none."""
        for module in self.modules():
            if isinstance(module, DynamicConv):
                return module.temperature.item()
        return self.options.temperature

    @temperature.setter
    def temperature(self, value: float) -> None:
        set_temperature(self, value)

    def start_epoch(self, epoch: int) -> None:
        """Sets τ to its value for this epoch."""
        self.temperature = self.temperature_at(epoch)

    def temperature_at(self, epoch: float) -> float:
        """τ for an epoch of training from scratch, counted from 0. A trained student keeps the final value."""
        options = self.options
        return annealed_temperature(epoch, options.temperature, options.temperature_start, options.temperature_epochs)


WIDTHS = {"dymn04": 0.4, "dymn10": 1.0, "dymn20": 2.0}
PAPER_NAMES = {"dymn_s": 0.4, "dymn_m": 1.0, "dymn_l": 2.0}
register(DyMN, {name: DyMNOptions(width=width) for name, width in (WIDTHS | PAPER_NAMES).items()}, place=20)
