"""Batch norm over the batches of all processes, on any device.

PyTorch's own ``SyncBatchNorm`` works on GPUs only, and is used there. On a CPU the statistics are exchanged with autograd's
own all-reduce, so that gradients flow through them; two processes of batch 4 then train as one of batch 8 does.

Shapes: B clips, C channels; what follows them (frequency, time) is averaged over.
"""

import torch
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, distributed, nn
from torch.distributed.nn.functional import all_reduce


def synchronize_batch_norms(student: nn.Module, device: torch.device) -> nn.Module:
    """The student with every batch norm replaced by one that takes its training statistics over all processes.

    Parameters, buffers and their names stay the same, so weights and checkpoints fit either form. To be called before the
    optimizer is created; on one process it changes nothing that is computed.

    Raises:
        ValueError: on a CPU, a kind of batch norm that is not known here.
    """
    if device.type != "cpu":
        return convert_sync_batchnorm(student)
    for name, layer in student.named_modules():
        if type(layer) in SYNCHRONIZED:
            layer.__class__ = SYNCHRONIZED[type(layer)]
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm):
            kinds = ", ".join(kind.__name__ for kind in SYNCHRONIZED)
            raise ValueError(f"on a CPU only {kinds} can be synchronised; found {type(layer).__name__} at {name!r}")
    return student


def normalize(layer: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """``x`` (B, C, ...) normalised with the statistics of all processes' batches, which are of one size.

    Updates the running statistics as PyTorch's batch norm does: with the unbiased variance.
    """
    processes = distributed.get_world_size()
    axes = [axis for axis in range(x.ndim) if axis != 1]
    per_channel = [1, -1, *[1] * (x.ndim - 2)]
    # Under autocast in full precision, as PyTorch's batch norm does it.
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = all_reduce(values.mean(axes)) / processes
    centered = values - mean.view(per_channel)
    variance = all_reduce(centered.square().mean(axes)) / processes
    with torch.no_grad():
        count = processes * x.numel() / x.shape[1]
        layer.num_batches_tracked.add_(1)
        layer.running_mean.lerp_(mean, layer.momentum)
        layer.running_var.lerp_(variance * (count / (count - 1)), layer.momentum)
    scale = layer.weight * torch.rsqrt(variance + layer.eps)
    return (centered * scale.view(per_channel) + layer.bias.view(per_channel)).to(x.dtype)


def needs_exchange(layer: nn.BatchNorm2d) -> bool:
    """Whether statistics are to be taken from the batch, and there is more than one process."""
    return layer.training and distributed.is_initialized() and distributed.get_world_size() > 1


class SynchronizedBatchNorm1d(nn.BatchNorm1d):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> (B, C, ...)"""
        return normalize(self, x) if needs_exchange(self) else super().forward(x)


class SynchronizedBatchNorm2d(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        return normalize(self, x) if needs_exchange(self) else super().forward(x)


class SynchronizedBatchNormAct2d(BatchNormAct2d):
    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F, T) -> (B, C, F, T)"""
        return self.act(self.drop(normalize(self, x))) if needs_exchange(self) else super().forward(x)


SYNCHRONIZED = {
    nn.BatchNorm1d: SynchronizedBatchNorm1d,
    nn.BatchNorm2d: SynchronizedBatchNorm2d,
    BatchNormAct2d: SynchronizedBatchNormAct2d,
}
