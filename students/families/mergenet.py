"""MergeNet: inverted bottlenecks split into branches that are reweighted and merged.

Careddu, "Searching for EfficientNeXt", 2024: Fig. 2 (the baseline's layers), Section V and Figs. 3 and 4 (the blocks),
Section VII (the ablations). The paper does not specify batch norm and initialisation; we use MN's.

Shapes: B batch, C channels, F frequency positions, T time positions, E embedding size, K classes.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn
from torch.nn import functional

from students.catalog import register
from students.frontend import LogMelConfig
from students.interface import Student, StudentOutput, checked_mel
from students.layers.convolutions import conv_norm_activation, initialize_weights


class Stage(NamedTuple):
    """One block of Fig. 2."""

    in_channels: int
    out_channels: int
    expansion: int
    stride: int
    fused: bool
    """Whether one regular convolution replaces expansion and depthwise convolution."""


STAGES = (
    Stage(1, 32, 32, 2, True),
    Stage(32, 128, 4, 2, True),
    Stage(128, 128, 2, 1, False),
    Stage(128, 256, 2, 2, False),
    Stage(256, 256, 2, 1, False),
    Stage(256, 512, 2, 2, False),
    Stage(512, 512, 2, 1, False),
    Stage(512, 1024, 2, 2, False),
    Stage(1024, 1024, 2, 1, False),
)
SE_RATIO = 4

SPLITS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
"""Values that divide the channels of every split block and leave at least one channel for a branch's squeeze-excitation."""


@dataclass(frozen=True)
class MergeNetOptions:
    """Hyperparameters of MergeNet. Raises ValueError for values that are not allowed."""

    split: int | None = 32
    """Input channels of each branch (the paper uses 16, 32 and 64); None for one branch in every block, the baseline."""
    local_se: bool = True
    """Squeeze-excitation inside each branch, before its projection (Table 5)."""
    global_se: bool = True
    """Squeeze-excitation over all channels, before the last projection (Table 5); a block with one branch has only this."""
    channel_shuffle: bool = False
    """Shuffle the channels of all branches before every convolution of a block (Table 6)."""
    separate_init: bool = False
    """Draw the initial kernels of each branch separately, as if each branch had its own layers (Table 7)."""

    def __post_init__(self) -> None:
        if self.split is not None and (isinstance(self.split, bool) or self.split not in SPLITS):
            raise ValueError(f"split must be None or one of {', '.join(map(str, SPLITS))}; found {self.split!r}")
        for name in ("local_se", "global_se", "channel_shuffle", "separate_init"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be true or false; found {getattr(self, name)!r}")
        if self.split is None and (not self.local_se or self.channel_shuffle or self.separate_init):
            raise ValueError(
                "local_se=False, channel_shuffle and separate_init have no effect without branches;"
                f" set split to one of {', '.join(map(str, SPLITS))}"
            )


def mergenet_frontend() -> LogMelConfig:
    """MergeNet's front end: 16 kHz, 25 ms Hann windows every 10 ms, 128 bands, dB, standardised, tiled to 10 s.

    Careddu, "Searching for EfficientNeXt", Section III-B. The paper does not give the FFT length (here 1024, so that no band
    falls between two bins), the range of the bands (here all frequencies) or the floor of the logarithm (here 1e-10, as in
    torchaudio). We take "center" to mean subtracting the waveform's mean.
    """
    return LogMelConfig(
        sample_rate_hz=16000,
        n_fft=1024,
        window_samples=400,
        hop_samples=160,
        fmax_hz=8000.0,
        preemphasis=0.0,
        log_offset=1e-10,
        shift=0.0,
        scale=1.0,
        logarithm="db",
        remove_mean=True,
        standardize=True,
        tile_seconds=10.0,
        fmin_jitter_hz=0.0,
        fmax_jitter_hz=0.0,
    )


class ChannelShuffle(nn.Module):
    """Distributes the channels of each branch over all branches in turn (Zhang et al., "ShuffleNet", 2018, Fig. 1)."""

    def __init__(self, branches: int) -> None:
        super().__init__()
        self.branches = branches

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        return x.unflatten(1, (self.branches, -1)).transpose(1, 2).flatten(1, 2)

    def extra_repr(self) -> str:
        return f"branches={self.branches}"


class BranchSqueezeExcitation(nn.Module):
    """Rescales the channels of each branch by weights computed from that branch's means (Hu et al. 2018, in groups)."""

    def __init__(self, channels: int, branches: int, shuffled_branches: int = 1) -> None:
        """``shuffled_branches``: shuffle channels among this many branches before each convolution; 1 keeps the order."""
        super().__init__()
        self.shuffle = ChannelShuffle(shuffled_branches) if shuffled_branches > 1 else nn.Identity()
        self.squeeze = nn.Conv2d(channels, channels // SE_RATIO, 1, groups=branches)
        self.excite = nn.Conv2d(channels // SE_RATIO, channels, 1, groups=branches)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        squeezed = functional.silu(self.squeeze(self.shuffle(x.mean((2, 3), keepdim=True))))
        return x * self.excite(self.shuffle(squeezed)).sigmoid()


class MergeBlock(nn.Module):
    """A bottleneck whose branches process their own channels and are then reweighted and projected together.

    ``branches``: expansion and depthwise convolution, or one regular convolution if fused. With more than one branch
    there is also squeeze-excitation and a linear projection inside each, which keep the width. ``merge``: squeeze-excitation over
    all channels and the output projection. All branches run at once, as the groups of one convolution.
    """

    def __init__(self, stage: Stage, options: MergeNetOptions) -> None:
        super().__init__()
        self.num_branches = max(1, stage.in_channels // options.split) if options.split else 1
        shuffled_branches = self.num_branches if options.channel_shuffle else 1
        expanded = stage.in_channels * stage.expansion

        # Layers have names, so that layers without weights do not change the names of the others in a state dict.
        def add(layers: nn.Sequential, name: str, in_channels: int, out_channels: int, **settings) -> None:
            if shuffled_branches > 1:
                layers.add_module(f"{name}_shuffle", ChannelShuffle(shuffled_branches))
            layers.add_module(name, conv_norm_activation(in_channels, out_channels, **settings))

        self.branches = nn.Sequential()
        groups, spatial = self.num_branches, {"kernel": 3, "stride": stage.stride, "activation": nn.SiLU}
        if stage.fused:
            add(self.branches, "expansion", stage.in_channels, expanded, groups=groups, **spatial)
        else:
            add(self.branches, "expansion", stage.in_channels, expanded, groups=groups, activation=nn.SiLU)
            add(self.branches, "depthwise", expanded, expanded, groups=expanded, **spatial)
        if self.num_branches > 1:
            if options.local_se:
                self.branches.add_module("se", BranchSqueezeExcitation(expanded, groups, shuffled_branches))
            add(self.branches, "projection", expanded, expanded, groups=groups)
        self.merge = nn.Sequential()
        if options.global_se:
            self.merge.add_module("se", BranchSqueezeExcitation(expanded, 1, shuffled_branches))
        add(self.merge, "projection", expanded, stage.out_channels)
        self.has_residual = stage.stride == 1 and stage.in_channels == stage.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C', ceil(F / stride), ceil(T / stride))"""
        merged = self.merge(self.branches(x))
        return x + merged if self.has_residual else merged

    def draw_branches_separately(self) -> None:
        """Redraws the kernels of ``branches`` with He initialisation for the number of outputs of each branch.

        By default He initialisation counts the outputs of the whole grouped convolution, which makes the kernels of n branches
        smaller by the square root of n.
        """
        for layer in self.branches.modules():
            if isinstance(layer, nn.Conv2d):
                for kernels in layer.weight.chunk(self.num_branches):
                    nn.init.kaiming_normal_(kernels, mode="fan_out")


class MergeNet(Student):
    """Nine blocks, mean over the map, linear. The embedding is that mean."""

    Options = MergeNetOptions

    @classmethod
    def published_frontend(cls) -> LogMelConfig:
        """(see mergenet_frontend)"""
        return mergenet_frontend()

    def __init__(self, num_classes: int, options: MergeNetOptions) -> None:
        super().__init__(num_classes, embedding_dim=STAGES[-1].out_channels)
        self.features = nn.Sequential(*[MergeBlock(stage, options) for stage in STAGES])
        self.classifier = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(1), nn.Linear(self.embedding_dim, num_classes)
        )
        initialize_weights(self)
        if options.separate_init:
            for block in self.features:
                block.draw_branches_separately()

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        x = self.features(checked_mel(mel))
        return StudentOutput(self.classifier(x), x.mean((2, 3)))

    def feature_maps(self, mel: Tensor) -> list[Tensor]:
        """The map (B, C, F, T) after each block."""
        maps = [checked_mel(mel)]
        for block in self.features:
            maps.append(block(maps[-1]))
        return maps[1:]

    def output_biases(self) -> Tensor:
        """(K,)"""
        return self.classifier[-1].bias


VARIANTS = {"mergenet_baseline": None, "mergenet16": 16, "mergenet32": 32, "mergenet64": 64}
register(MergeNet, {name: MergeNetOptions(split=split) for name, split in VARIANTS.items()}, place=30)
