"""What a student costs: parameters, multiply-accumulates and memory for an input size, without running it."""

import copy
import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from students.families.dymn import DynamicConv, SequenceConv
from students.interface import Student


@dataclass(frozen=True)
class StudentProfile:
    """The cost of one input through one student."""

    parameters: int
    """Trained numbers; the running statistics of batch norms are not among them."""
    macs: int
    """Multiply-accumulates of convolutions, linear layers and a transformer's attention, as the field counts them: biases,
    norms, activations and pooling are left out."""
    activation_bytes: int
    """Most memory that inputs, outputs and intermediate maps occupy at the same time in inference, in float32."""


# A layer that computes in its own way (such as a dynamic convolution) adds its type and its count here.
MAC_COUNTERS: dict[type[nn.Module], Callable[[Any, Tensor], int]] = {
    nn.Conv2d: lambda layer, output: output.numel() * layer.weight[0].numel(),
    SequenceConv: lambda layer, output: output.numel() * layer.in_channels,
    nn.Linear: lambda layer, output: output.numel() * layer.in_features,
    # One convolution with the mixed kernel, and for each clip the mixing, which is a product of all kernels' numbers.
    DynamicConv: lambda layer, output: (
        output.numel() * math.prod(layer.kernel_shape[1:]) + len(output) * layer.weight.numel()
    ),
}


def profile_student(student: Student, n_mels: int = 128, frames: int = 1000, channels: int = 1) -> StudentProfile:
    """The cost of one clip of the given size (1, channels, n_mels, frames).

    Nothing is computed: a copy of the student runs on tensors without memory, so mn40 takes as long as mn01.
    """
    copied = copy.deepcopy(student).to("meta").eval()
    mel = torch.empty(1, channels, n_mels, frames, device="meta")
    with (
        torch.inference_mode(),
        _counted_macs(copied) as macs,
        _PeakMemory(ignored=copied.state_dict().values()) as memory,
    ):
        copied(mel.clone())  # a clone, so that the input is seen as it comes into being
    return StudentProfile(sum(p.numel() for p in student.parameters()), sum(macs), memory.peak_bytes)


@contextmanager
def _counted_macs(module: nn.Module) -> Iterator[list[int]]:
    """Yields a list that receives the multiply-accumulates of every counted layer that runs."""
    macs: list[int] = []

    def count(layer: nn.Module, _: Any, output: Tensor) -> None:
        macs.append(MAC_COUNTERS[type(layer)](layer, output))

    hooks = [layer.register_forward_hook(count) for layer in module.modules() if type(layer) in MAC_COUNTERS]
    try:
        yield macs
    finally:
        for hook in hooks:
            hook.remove()


class _PeakMemory(TorchDispatchMode):
    """Adds up the storages that operations create, until they are freed, and keeps the largest sum."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        # Weak references: the sum must fall as soon as the student lets go of a map.
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:  # a view, or an operation in place
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._live_bytes -= size
