"""MN: MobileNetV3-Large for mel spectrograms, at any width.

Howard et al., "Searching for MobileNetV3", 2019, Table 1, as used for audio tagging by Schmid, Koutini and Widmer,
"Efficient large-scale audio tagging via transformer-to-CNN knowledge distillation", 2023: one input channel, and a sigmoid
in place of the hard sigmoid in squeeze-excitation. Parameter names are those of the public EfficientAT checkpoints.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor, nn

from students.catalog import register
from students.interface import FineTuning, StateDict, Student, StudentOutput
from students.layers.attention import ATTENTIONS, create_attention
from students.layers.convolutions import conv_norm_activation, initialize_weights, make_divisible
from students.layers.heads import HEADS, create_head, head_output_biases
from students.layers.squeeze_excitation import SE_AGGREGATIONS, ConcurrentSqueezeExcitation, is_selection_of_axes

NOMINAL_FRAMES = 1000
"""Frames of a ten-second clip with 10 ms hops. They fix the size of squeeze-excitation over time."""


class Stage(NamedTuple):
    """One row of Table 1 at width 1."""

    kernel: int
    expanded: int
    out: int
    has_se: bool
    activation: type[nn.Module]
    stride_index: int | None
    """Index of the stage's stride among the four configurable ones; None if the stage never shrinks the map."""


STEM_CHANNELS = 16
STAGES = (
    Stage(3, 16, 16, False, nn.ReLU, None),
    Stage(3, 64, 24, False, nn.ReLU, 0),
    Stage(3, 72, 24, False, nn.ReLU, None),
    Stage(5, 72, 40, True, nn.ReLU, 1),
    Stage(5, 120, 40, True, nn.ReLU, None),
    Stage(5, 120, 40, True, nn.ReLU, None),
    Stage(3, 240, 80, False, nn.Hardswish, 2),
    Stage(3, 200, 80, False, nn.Hardswish, None),
    Stage(3, 184, 80, False, nn.Hardswish, None),
    Stage(3, 184, 80, False, nn.Hardswish, None),
    Stage(3, 480, 112, True, nn.Hardswish, None),
    Stage(3, 672, 112, True, nn.Hardswish, None),
    Stage(5, 672, 160, True, nn.Hardswish, 3),
    Stage(5, 960, 160, True, nn.Hardswish, None),
    Stage(5, 960, 160, True, nn.Hardswish, None),
)
LAST_EXPANSION = 6
HIDDEN_CHANNELS = 1280


@dataclass(frozen=True)
class MNOptions:
    """Hyperparameters of MN. Raises ValueError for values that are not allowed."""

    width: float = 1.0
    """Multiplies the number of channels of every layer; mn04 has 0.4."""
    head: str = "mlp"
    """"mlp", "fully_convolutional", "attention_pooling" or "linear"."""
    se_dims: str = "c"
    """Axes with squeeze-excitation: any of "c" (channel), "f" (frequency), "t" (time) in this order, or "none". This option and
    ``se_agg`` apply to ``attention`` "baseline" and "se"."""
    se_agg: str = "max"
    """How the outputs of squeeze-excitation over several axes are combined: "max", "avg", "add" or "min"."""
    se_reduction: int = 4
    """Squeeze-excitation reduces an axis to its size divided by this number."""
    strides: tuple[int, int, int, int] = (2, 2, 2, 2)
    """Strides of the four stages that shrink the map, after the stem's 2."""
    n_mels: int = 128
    """Mel bands of the input. They fix the size of squeeze-excitation over frequency."""
    dropout: float = 0.2
    """Probability of dropping a feature before the mlp head's last layer."""
    attention: str = "baseline"
    """"baseline" for squeeze-excitation in the blocks where MobileNetV3 has it, or one mechanism for all 15 blocks (DyMN paper,
    Table V): "se", "ca", "ta", "srm", "grn", "cbam", "gc" or "none"."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "strides", tuple(self.strides))  # JSON gives a list
        if not self.width > 0:
            raise ValueError(f"width must be above 0; found {self.width}")
        if self.head not in HEADS:
            raise ValueError(f"unknown head {self.head!r}; choices: {', '.join(HEADS)}")
        if self.se_dims != "none" and not is_selection_of_axes(self.se_dims):
            raise ValueError(
                f"unknown se_dims {self.se_dims!r}; choices: 'none' or any of 'c', 'f', 't' in this order, as in 'cf'"
            )
        if self.se_agg not in SE_AGGREGATIONS:
            raise ValueError(f"unknown se_agg {self.se_agg!r}; choices: {', '.join(SE_AGGREGATIONS)}")
        for name in ("se_reduction", "n_mels"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0; found {value!r}")
        if len(self.strides) != 4 or not all(stride in (1, 2) for stride in self.strides):
            raise ValueError(f"strides must be four numbers, each 1 or 2; found {self.strides}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must be at least 0 and below 1; found {self.dropout}")
        if self.attention not in ("baseline", "se", *ATTENTIONS, "none"):
            raise ValueError(
                f"unknown attention {self.attention!r}; choices: baseline, se, {', '.join(ATTENTIONS)}, none"
            )


class InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, squeeze-excitation, projection; the input is added if shapes agree."""

    def __init__(
        self, stage: Stage, in_channels: int, stride: int, map_size: tuple[int, int], options: MNOptions
    ) -> None:
        """``map_size`` is (F, T) of the block's output for a nominal clip."""
        super().__init__()
        expanded = make_divisible(stage.expanded * options.width)
        out = make_divisible(stage.out * options.width)
        layers: list[nn.Module] = []
        if expanded != in_channels:
            layers.append(conv_norm_activation(in_channels, expanded, activation=stage.activation))
        layers.append(
            conv_norm_activation(
                expanded, expanded, kernel=stage.kernel, stride=stride, groups=expanded, activation=stage.activation
            )
        )
        if options.attention in ATTENTIONS:
            layers.append(create_attention(options.attention, expanded, options.se_reduction))
        elif options.se_dims != "none" and (
            options.attention == "se" or (options.attention == "baseline" and stage.has_se)
        ):
            sizes = (expanded, *map_size)
            layers.append(ConcurrentSqueezeExcitation(options.se_dims, options.se_agg, options.se_reduction, sizes))
        layers.append(conv_norm_activation(expanded, out))
        self.block = nn.Sequential(*layers)
        self.has_residual = stride == 1 and in_channels == out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C', ceil(F / stride), ceil(T / stride))"""
        return x + self.block(x) if self.has_residual else self.block(x)


class MobileNet(Student):
    """A chain of layers from the mel spectrogram to a map, followed by a head. The embedding is the mean over the map."""

    def __init__(self, num_classes: int, embedding_dim: int, n_mels: int) -> None:
        super().__init__(num_classes, embedding_dim)
        self.n_mels = n_mels

    def chain(self) -> list[nn.Module]:
        """The layers in order: stem, blocks, last convolution."""
        raise NotImplementedError

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        x = self._checked(mel)
        for layer in self.chain():
            x = layer(x)
        return StudentOutput(self.classifier(x), x.mean((2, 3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The maps (B, C, F, T) after the stem, after each block and after the last convolution."""
        maps = [self._checked(mel)]
        for layer in self.chain():
            maps.append(layer(maps[-1]))
        return maps[1:]

    def output_biases(self) -> Tensor:
        """The biases of the head."""
        return head_output_biases(self.classifier)

    def _checked(self, mel: Tensor) -> Tensor:
        if mel.ndim != 4 or mel.shape[1] != 1 or mel.shape[2] != self.n_mels:
            raise ValueError(
                f"this student takes (batch, 1, {self.n_mels}, frames); found {tuple(mel.shape)}"
                " (for another number of mel bands, create the student with n_mels)"
            )
        return mel


class MN(MobileNet):
    """MobileNetV3-Large with one input channel."""

    Options = MNOptions
    fine_tuning: ClassVar[Mapping[str, FineTuning]] = {
        "esc50": FineTuning(6e-5, 128),
        "fsd50k": FineTuning(7e-5, 64),
        "openmic": FineTuning(1e-5, 64),
        "dcase20": FineTuning(8e-4, 64),
        "folder": FineTuning(1e-4, 16),
        "manifest": FineTuning(1e-4, 16),
    }
    imagenet_architecture = "mobilenetv3_large_100"

    def __init__(self, num_classes: int, options: MNOptions) -> None:
        stem_channels = make_divisible(STEM_CHANNELS * options.width)
        last_channels = LAST_EXPANSION * make_divisible(STAGES[-1].out * options.width)
        super().__init__(num_classes, last_channels, options.n_mels)

        map_size = (math.ceil(options.n_mels / 2), math.ceil(NOMINAL_FRAMES / 2))
        layers: list[nn.Module] = [conv_norm_activation(1, stem_channels, kernel=3, stride=2, activation=nn.Hardswish)]
        channels = stem_channels
        for stage in STAGES:
            stride = 1 if stage.stride_index is None else options.strides[stage.stride_index]
            map_size = (math.ceil(map_size[0] / stride), math.ceil(map_size[1] / stride))
            layers.append(InvertedResidual(stage, channels, stride, map_size, options))
            channels = make_divisible(stage.out * options.width)
        layers.append(conv_norm_activation(channels, last_channels, activation=nn.Hardswish))
        self.features = nn.Sequential(*layers)
        hidden = make_divisible(HIDDEN_CHANNELS * options.width)
        self.classifier = create_head(options.head, last_channels, hidden, num_classes, options.dropout)
        initialize_weights(self)

    def chain(self) -> list[nn.Module]:
        """(see MobileNet)"""
        return list(self.features)

    @classmethod
    def pretraining_learning_rate(cls, options: MNOptions) -> float:
        """8e-4 at every width (Schmid, Koutini and Widmer, 2023)."""
        return 8e-4

    def imagenet_weights(self, timm_state_dict: Mapping[str, Tensor]) -> StateDict:
        """The weights of MobileNetV3-Large for an MN of width 1, with the stem's kernels summed over colour channels.

        A spectrogram is thus treated as a grey image. The two networks differ slightly: timm's batch norms use epsilon 1e-5
        (ours 1e-3), and its squeeze-excitation uses a hard sigmoid (ours a sigmoid).
        """
        wanted = self.state_dict()
        filled: StateDict = {}
        for name, timm_name in _timm_names(has_mlp_head="classifier.2.weight" in wanted).items():
            if name not in wanted:
                raise ValueError(
                    f"ImageNet weights need squeeze-excitation over channels (se_dims 'c'); this student has no {name}"
                )
            if timm_name not in timm_state_dict:
                raise ValueError(
                    f"these are not the weights of timm's {self.imagenet_architecture}: {timm_name} is missing"
                )
            value = timm_state_dict[timm_name]
            if timm_name == "conv_stem.weight":
                value = value.sum(dim=1, keepdim=True)
            if value.numel() != wanted[name].numel():
                raise ValueError(
                    f"ImageNet weights fit an MN of width 1 with se_reduction 4: {timm_name} has shape"
                    f" {tuple(value.shape)}, but {name} in this student has {tuple(wanted[name].shape)}"
                )
            filled[name] = value.reshape(wanted[name].shape)  # timm's linear layers are 1×1 convolutions
        if extra := [name for name in wanted if name.startswith("features.") and name not in filled]:
            raise ValueError(
                f"ImageNet weights need squeeze-excitation over channels only; {extra[0]} has no counterpart"
            )
        return filled


NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def _timm_names(has_mlp_head: bool) -> dict[str, str]:
    """Maps the names of an MN's tensors to their names in timm's mobilenetv3_large_100."""
    names: dict[str, str] = {}

    def pair_norm_layer(ours: str, timm_conv: str, timm_norm: str) -> None:
        names[f"{ours}.0.weight"] = f"{timm_conv}.weight"
        names.update({f"{ours}.1.{tensor}": f"{timm_norm}.{tensor}" for tensor in NORM_TENSORS})

    def pair_linear(ours: str, timm_layer: str) -> None:
        names.update({f"{ours}.{tensor}": f"{timm_layer}.{tensor}" for tensor in ("weight", "bias")})

    pair_norm_layer("features.0", "conv_stem", "bn1")
    timm_blocks = [
        f"blocks.{stage}.{block}" for stage, depth in enumerate((1, 2, 3, 4, 2, 3)) for block in range(depth)
    ]
    for number, (stage, timm_block) in enumerate(zip(STAGES, timm_blocks, strict=True), start=1):
        block = f"features.{number}.block"
        convolutions = ["conv_dw", "conv_pw"] if number == 1 else ["conv_pw", "conv_dw", "conv_pwl"]
        for position, convolution in enumerate(convolutions):
            # Squeeze-excitation, if there is one, comes before the projection.
            place = position + 1 if stage.has_se and convolution == "conv_pwl" else position
            pair_norm_layer(f"{block}.{place}", f"{timm_block}.{convolution}", f"{timm_block}.bn{position + 1}")
        if stage.has_se:
            pair_linear(f"{block}.2.conc_se_layers.0.fc1", f"{timm_block}.se.conv_reduce")
            pair_linear(f"{block}.2.conc_se_layers.0.fc2", f"{timm_block}.se.conv_expand")
    pair_norm_layer(f"features.{len(STAGES) + 1}", "blocks.6.0.conv", "blocks.6.0.bn1")
    if has_mlp_head:
        pair_linear("classifier.2", "conv_head")
    return names


WIDTHS = {"01": 0.1, "02": 0.2, "04": 0.4, "05": 0.5, "10": 1.0, "20": 2.0, "30": 3.0, "40": 4.0}
register(MN, {f"mn{digits}": MNOptions(width=width) for digits, width in WIDTHS.items()}, place=10)
