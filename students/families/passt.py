"""PaSST, the patchout fast spectrogram transformer: mostly used as a teacher, but it can also be fine-tuned.

Koutini, Schlüter, Eghbal-zadeh and Widmer, "Efficient Training of Audio Transformers with Patchout", 2022. A vision
transformer (timm's blocks, with fused attention) on overlapping 16×16 patches of a log-mel spectrogram. Position embeddings
are separate for frequency and time, so a shorter clip simply uses fewer time embeddings. In training, some patches are left
out. Parameter names are those of the public checkpoints, and outputs agree with theirs.

Shapes: B batch, E width, F frequency positions, T time positions of the patch grid, N tokens, K classes.
"""

from collections import OrderedDict
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from students.catalog import register
from students.frontend import LogMelConfig
from students.interface import (
    LEFT_OUT_AT_DEFAULT,
    StateDict,
    Student,
    StudentConfig,
    StudentOutput,
    checked_mel,
)
from students.layers.keyed import KeyedModule

PATCH = 16
"""Size of a patch, in bands and in frames."""
STRIDES = (10, 12, 14, 16)
"""Distances between patches in the public checkpoints, the same in bands and in frames."""
HEAD_WIDTH = 64
"""Width of an attention head in all vision transformers from which the public checkpoints were initialised."""
NORM_EPSILON = 1e-6
"""timm's value for vision transformers; the norm in the head uses torch's 1e-5."""
_IDENTIFYING_TENSORS = {"cls_token": 3, "freq_new_pos_embed": 4, "time_new_pos_embed": 4, "head.1.bias": 1}
"""Tensors whose shapes give the options of a PaSST, with their number of axes."""


# --- The network -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PasstOptions:
    """Hyperparameters of PaSST; the defaults are PaSST-S for ten seconds. Raises ValueError for values that are not allowed."""

    width: int = 768
    """Size of a token."""
    depth: int = 12
    """Number of transformer blocks."""
    heads: int = 12
    """Attention heads per block; must divide the width."""
    stride: int = 10
    """Bands and frames from one patch to the next; patches overlap if this is below 16."""
    n_mels: int = 128
    """Mel bands of the input."""
    time_positions: int = 99
    """Patches along time with position embeddings. With stride 10: 99 for 10 s, 199 for 20 s, 299 for 30 s."""
    patchout_rows: int = 0
    """Structured patchout: rows of patches (frequency positions) left out in training; the paper's f, 4 for AudioSet."""
    patchout_columns: int = 0
    """Structured patchout: columns of patches (time positions) left out in training; the paper's t, 40 for AudioSet."""
    patchout_patches: int = 0
    """Unstructured patchout: number of single patches left out in training, after structured patchout."""
    head: str = field(default="norm", metadata=LEFT_OUT_AT_DEFAULT)
    """"norm": layer norm and a linear layer on the embedding, as published. "linear": the linear layer alone."""

    def __post_init__(self) -> None:
        for name in ("width", "depth", "heads", "n_mels", "time_positions"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number above 0; found {value!r}")
        for name in ("patchout_rows", "patchout_columns", "patchout_patches"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"{name} must be a whole number, at least 0; found {value!r}")
        if self.head not in ("norm", "linear"):
            raise ValueError(f"unknown head {self.head!r}; choices: norm, linear")
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads; found {self.width} and {self.heads}")
        if self.stride not in STRIDES:
            raise ValueError(f"unknown stride {self.stride}; choices: {', '.join(map(str, STRIDES))}")
        if self.n_mels < PATCH:
            raise ValueError(f"n_mels must be at least the {PATCH} bands of a patch; found {self.n_mels}")

    @property
    def frequency_positions(self) -> int:
        return _positions(self.n_mels, self.stride)

    @property
    def window_frames(self) -> int:
        """Frames in the longest single window: those covered by all time positions."""
        return PATCH + self.stride * (self.time_positions - 1)

    @property
    def clip_seconds(self) -> float:
        """The clip length that the network was made for, at the default front end's 100 frames per second.

        Rounded to whole seconds, because the time positions determine the length only to within one stride.
        """
        return float(max(1, round(self.window_frames / 100)))


def _positions(size: int, stride: int) -> int:
    """Number of patches that fit into ``size`` bands or frames."""
    return (size - PATCH) // stride + 1


class Patchout(KeyedModule):
    """Leaves out patches in training, different ones for each clip (Section 3 of the paper); identity in evaluation mode.

    The cost of attention grows with the square of the number of patches, so half the patches cost less than half. Leaving out
    patches also regularises. The choice depends on each clip's key, not on the batch or the number of processes.
    """

    def __init__(self, rows: int, columns: int, patches: int) -> None:
        super().__init__()
        self.rows = rows
        self.columns = columns
        self.patches = patches

    def forward(self, grid: Tensor) -> Tensor:
        """(B, E, F, T) -> the kept patches in the order of the grid, (B, N, E)"""
        tokens = grid.flatten(2).transpose(1, 2)
        if not self.training or not (self.rows or self.columns or self.patches):
            return tokens
        kept = self.kept_positions(len(grid), grid.shape[2], grid.shape[3], grid.device)
        return tokens.gather(1, kept[:, :, None].expand(-1, -1, tokens.shape[2]))

    def kept_positions(self, batch: int, rows: int, columns: int, device: torch.device) -> Tensor:
        """Indices of the kept patches in the flattened grid of ``rows`` × ``columns``, ascending, (batch, N) int64.

        Raises ValueError if nothing would be kept.
        """
        kept_rows, kept_columns = rows - self.rows, columns - self.columns
        left = kept_rows * kept_columns
        if kept_rows < 1 or kept_columns < 1 or left <= self.patches:
            raise ValueError(
                f"patchout of {self.rows} rows, {self.columns} columns and {self.patches} patches leaves nothing of a clip with"
                f" {rows} rows and {columns} columns of patches"
            )
        uniform = self.draw_uniform(batch, rows + columns + left, device)
        row_scores, column_scores, patch_scores = uniform.split([rows, columns, left], dim=1)
        chosen_rows = _places_of_lowest(row_scores, kept_rows)
        chosen_columns = _places_of_lowest(column_scores, kept_columns)
        kept = (chosen_rows[:, :, None] * columns + chosen_columns[:, None, :]).flatten(1)
        return kept.gather(1, _places_of_lowest(patch_scores, left - self.patches)) if self.patches else kept

    def extra_repr(self) -> str:
        return f"rows={self.rows}, columns={self.columns}, patches={self.patches}"


def _places_of_lowest(scores: Tensor, count: int) -> Tensor:
    """(B, N) -> indices of the ``count`` lowest scores, ascending. With random scores this is a random choice."""
    return scores.argsort(dim=1, stable=True)[:, :count].sort(dim=1).values


class UnusedHead(nn.Module):
    """The checkpoints' head for the distillation token, which is unused because the two tokens are averaged.

    Its weights are buffers: loaded and saved unchanged, not trained, and not counted as parameters.
    """

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(num_classes, width))
        self.register_buffer("bias", torch.zeros(num_classes))


class Passt(Student):
    """PaSST: patches, two extra tokens (class and distillation), transformer blocks, and a head on the mean of the two.

    The embedding is that mean. A clip shorter than the time positions cover uses only the first ones. A longer clip is
    split into windows (``patch_window_starts``), whose logits and embeddings are averaged.
    """

    Options = PasstOptions

    def __init__(self, num_classes: int, options: PasstOptions) -> None:
        from timm.models.vision_transformer import Block

        super().__init__(num_classes, embedding_dim=options.width)
        width = options.width
        self.options = options
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(1, width, PATCH, options.stride)))
        self.freq_new_pos_embed = nn.Parameter(torch.zeros(1, width, options.frequency_positions, 1))
        self.time_new_pos_embed = nn.Parameter(torch.zeros(1, width, 1, options.time_positions))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        self.new_pos_embed = nn.Parameter(torch.zeros(1, 2, width))
        self.patchout = Patchout(options.patchout_rows, options.patchout_columns, options.patchout_patches)
        norm = partial(nn.LayerNorm, eps=NORM_EPSILON)
        self.blocks = nn.Sequential(
            *(Block(width, options.heads, qkv_bias=True, norm_layer=norm) for _ in range(options.depth))
        )
        self.norm = norm(width)
        head_norm = [nn.LayerNorm(width)] if options.head == "norm" else []
        self.head = nn.Sequential(*head_norm, nn.Linear(width, num_classes))
        self.head_dist = UnusedHead(width, num_classes)
        _initialize(self)

    @classmethod
    def tensors_of_checkpoint(cls, state: StateDict) -> StateDict:
        """Strips the prefix "net." that a network inside a training module has, and drops that module's other tensors."""
        if "net.cls_token" not in state:
            return state
        return {name.removeprefix("net."): value for name, value in state.items() if name.startswith("net.")}

    @classmethod
    def config_of_weights(cls, state: StateDict) -> StudentConfig:
        """The architecture, inferred from shapes.

        Two values cannot be inferred: we assume one attention head for every 64 numbers of a token, and 128 mel bands.
        Raises ValueError for tensors of another network, and for shapes that no such PaSST has.
        """
        for name, axes in _IDENTIFYING_TENSORS.items():
            if name not in state or state[name].ndim != axes:
                raise ValueError(
                    f"contains no PaSST: there is no {name} with {axes} axes; found {', '.join(list(state)[:3])} …"
                )
        width = state["cls_token"].shape[-1]
        if width % HEAD_WIDTH:
            raise ValueError(
                "the number of attention heads cannot be inferred from weights unless the width is a multiple of"
                f" {HEAD_WIDTH}; found {width}. Build the network with create_student, load the weights with load_weights and"
                " save it with save_student"
            )
        rows = state["freq_new_pos_embed"].shape[2]
        stride_of = {_positions(LogMelConfig().n_mels, stride): stride for stride in STRIDES}
        if rows not in stride_of:
            raise ValueError(
                f"has {rows} frequency positions; expected with {LogMelConfig().n_mels} mel bands:"
                f" {', '.join(f'{count} at stride {stride}' for count, stride in stride_of.items())}"
            )
        options = {
            "width": width,
            "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
            "heads": width // HEAD_WIDTH,
            "stride": stride_of[rows],
            "time_positions": state["time_new_pos_embed"].shape[3],
        }
        return StudentConfig("passt_s", len(state["head.1.bias"]), options)

    @property
    def clip_seconds(self) -> float:
        """(see PasstOptions)"""
        return self.options.clip_seconds

    @property
    def classifier(self) -> nn.Sequential:
        """The head, under the name used in other students; (B, E) -> (B, K)."""
        return self.head

    def forward(self, mel: Tensor) -> StudentOutput:
        """(B, 1, n_mels, frames) -> logits (B, K), embedding (B, E)"""
        if checked_mel(mel).shape[2] != self.options.n_mels:
            raise ValueError(f"this PaSST takes (batch, 1, {self.options.n_mels}, frames); found {tuple(mel.shape)}")
        frames = self.options.window_frames
        windows = [
            self._window(mel[..., start : start + frames]) for start in patch_window_starts(mel.shape[3], self.options)
        ]
        if len(windows) == 1:
            return windows[0]
        logits, embeddings = zip(*windows, strict=True)
        return StudentOutput(torch.stack(logits).mean(0), torch.stack(embeddings).mean(0))

    def _window(self, mel: Tensor) -> StudentOutput:
        """The output for one window, (B, 1, n_mels, at most window_frames)."""
        if mel.shape[3] < PATCH:  # shorter than a patch: repeat the last frame
            mel = nn.functional.pad(mel, (0, PATCH - mel.shape[3], 0, 0), mode="replicate")
        grid = self.patch_embed(mel)
        grid = grid + self.freq_new_pos_embed + self.time_new_pos_embed[..., : grid.shape[3]]
        patches = self.patchout(grid)
        extra = torch.cat([self.cls_token, self.dist_token], dim=1) + self.new_pos_embed
        tokens = torch.cat([extra.expand(patches.shape[0], -1, -1), patches], dim=1)
        embedding = self.norm(self.blocks(tokens)[:, :2]).mean(1)
        return StudentOutput(self.head(embedding), embedding)

    def output_biases(self) -> Tensor:
        """(K,)"""
        return self.head[-1].bias


def patch_window_starts(frames: int, options: PasstOptions) -> list[int]:
    """First frames of the windows into which a clip is split.

    There is one window if the time positions cover all patches. Otherwise windows are evenly spread from the start to the end of the
    clip, as few as possible with gaps of at most one stride between them. For a network of 10 s, a clip of 20 s
    is two windows, the same as if it were cut in two.
    """
    window, stride = options.window_frames, options.stride
    if frames < window + stride:
        return [0]
    count = -(-(frames + stride) // (window + stride))
    return [round(number * (frames - window) / (count - 1)) for number in range(count)]


def _initialize(network: nn.Module) -> None:
    """Initialises matrices, tokens and positions as in vision transformers: normal, deviation 0.02, truncated at ±2."""
    for layer in network.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
    for name, parameter in network.named_parameters():
        if name.endswith(("_token", "pos_embed")):
            nn.init.trunc_normal_(parameter, std=0.02)


# PaSST-S, which has the size of DeiT-B, and a small one with the size of DeiT-Ti.
register(Passt, {"passt_s": PasstOptions(), "passt_tiny": PasstOptions(width=192, heads=3)}, place=50)
