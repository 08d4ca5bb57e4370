"""The cost of a student: parameters, multiply-accumulates and memory for an input size, without running it."""

import copy
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from students.interface import Student


@dataclass(frozen=True)
class StudentProfile:
    """The cost of one input through one student."""

    parameters: int
    """Number of trained values, without the running statistics of batch norms."""
    macs: int
    """Multiply-accumulates of convolutions and matrix products, as is usual in the field: biases, norms, activations and
    pooling are left out. A dynamic convolution counts as one convolution with the mixed kernel, plus the mixing of kernels."""
    activation_bytes: int
    """Peak memory of inputs, outputs and intermediate maps during inference in float32."""


def profile_student(student: Student, n_mels: int = 128, frames: int = 1000, channels: int = 1) -> StudentProfile:
    """The cost of one clip of the given size (1, channels, n_mels, frames).

    Nothing is computed: a copy of the student runs on tensors without data, so mn40 takes as long as mn01.
    """
    copied = copy.deepcopy(student).to("meta").eval()
    mel = torch.empty(1, channels, n_mels, frames, device="meta")
    with (
        torch.inference_mode(),
        FlopCounterMode(display=False) as counter,
        _PeakMemory(
            ignored=copied.state_dict().values()
        ) as memory,  # innermost: it must see operations before they are decomposed
    ):
        copied(mel.clone())  # cloning creates the input inside the context, so that its memory is counted
    macs = counter.get_total_flops() // 2  # the counter counts a multiply-accumulate as two operations
    return StudentProfile(sum(p.numel() for p in student.parameters()), macs, memory.peak_bytes)


class _PeakMemory(TorchDispatchMode):
    """Tracks the total size of storages that operations create and free, and keeps the maximum."""

    def __init__(self, ignored: Iterable[Tensor]) -> None:
        super().__init__()
        self.peak_bytes = 0
        self._live_bytes = 0
        # Weak references: the total must fall as soon as the student releases a map.
        self._seen = weakref.WeakSet(tensor.untyped_storage() for tensor in ignored)

    def __torch_dispatch__(self, operation, types, arguments=(), keywords=None):
        result = operation(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage in self._seen:  # a view or an in-place operation
            return
        self._seen.add(storage)
        size = storage.nbytes()
        self._live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self._live_bytes)
        weakref.finalize(storage, self._forget, size)

    def _forget(self, size: int) -> None:
        self._live_bytes -= size
