"""Random numbers and dropout that depend on a sample's key instead of a global generator. B is the batch."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

_WORD = 1 << 64


def _signed(word: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit number. torch computes with int64, which wraps around."""
    word %= _WORD
    return word - _WORD if word >= _WORD // 2 else word


_GOLDEN_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(word: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's operator copies the sign bit."""
    return (word >> bits) & ((1 << (64 - bits)) - 1)


def _mix(word: Tensor) -> Tensor:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): each input bit flips about half of the output bits."""
    word = (word ^ _shift_right(word, 30)) * _MIX_1
    word = (word ^ _shift_right(word, 27)) * _MIX_2
    return word ^ _shift_right(word, 31)


def keyed_uniform(keys: Tensor, stream: int, count: int) -> Tensor:
    """Uniform numbers in [0, 1), (B, count) float32, each a pure function of (its key, ``stream``, its column).

    ``keys`` (B,) int64. Only integer arithmetic is used, so CPU and GPU agree bit for bit.
    """
    state = _mix(keys + _signed(_GOLDEN_GAMMA * (stream + 1)))
    columns = torch.arange(1, count + 1, device=keys.device, dtype=torch.int64) * _GOLDEN_GAMMA
    bits = _shift_right(_mix(state[:, None] + columns), 40)
    return bits.to(torch.float32) * 2.0**-24


class KeyedModule(nn.Module):
    """A module whose random numbers in training depend on the sample's key (see ``set_sample_keys``).

    They are a pure function of the key and of this module's index among the network's keyed modules. A sample therefore gets
    the same numbers in any batch, process or resumed run.
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
            raise ValueError(f"a dropout probability must be at least 0 and below 1; found {probability}")
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
    """Sets the keys of the next batch's samples in every KeyedModule of ``module``; ``None`` removes them.

    ``keys`` (B,) int64: one number per sample that identifies the sample and the time of use, such as a hash of (run seed, epoch,
    position in the epoch).
    """
    if keys is not None and (keys.ndim != 1 or keys.dtype != torch.int64):
        raise ValueError(
            f"sample keys must be int64 of shape (batch,); found {keys.dtype} of shape {tuple(keys.shape)}"
        )
    keyed = (layer for layer in module.modules() if isinstance(layer, KeyedModule))
    for layer_index, layer in enumerate(keyed):
        layer.layer_index = layer_index
        layer.sample_keys = keys
