"""Recomputes batch-norm statistics from training clips with the current weights ("precise batch norm").

Running statistics are moving averages over training steps. With MobileNetV3's momentum of 0.01 they still contain 5 % of
their initial values after 300 steps, in every layer, and describe the weights of a hundred steps ago. After few steps a student
is therefore far worse in evaluation than its weights allow. Here each batch norm gets the mean of its statistics over batches, with
the final weights, on clips as in evaluation: without mixup, other augmentation or dropout (Wu and Johnson, "Rethinking 'Batch'
in BatchNorm", 2021, Section 3).

Shapes: B clips, S samples, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.system.command import progress
from audio_datasets.system.randomness import generator
from audio_datasets.system.workers.loading import create_loader
from kd.data.windows import Clips, EvaluationWindows, Window

DEFAULT_CLIPS = 2000
"""More than enough: the standard error of a channel's mean over 2,000 clips is 2 % of its spread between clips."""
CLIPS_PER_BATCH = 32
"""Independent of the number of processes, so that it does not affect the result."""
FEW_STEPS = 10
"""Warn about runs shorter than this many times the window of running statistics (1 / momentum steps)."""


def trained_batch_norms(student: nn.Module, frozen: Sequence[nn.Module] = ()) -> list[str]:
    """Names of the batch norms with running statistics, except those in ``frozen`` modules."""
    left_alone = {id(layer) for module in frozen for layer in module.modules()}
    return [name for name, layer in student.named_modules() if has_statistics(layer) and id(layer) not in left_alone]


def has_statistics(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def too_few_steps(student: nn.Module, names: Sequence[str], steps: int) -> str | None:
    """A warning if running statistics cannot settle within this many steps; None if they can."""
    layers = [student.get_submodule(name) for name in names]
    momenta = [layer.momentum for layer in layers if layer.momentum is not None]
    momentum = min(momenta, default=1.0)
    if not momenta or steps * momentum >= FEW_STEPS:
        return None
    return (
        f"{steps} steps are too few for batch norms with momentum {momentum:g}: at the end their running statistics still contain "
        f"{(1 - momentum) ** steps:.1%} of their initial values, so the student scores lower than its weights allow. "
        f"--batch-norm-clips {DEFAULT_CLIPS} recomputes them from training clips"
    )


@dataclass
class BatchNormStatistics:
    """Recomputes a student's batch-norm statistics from chosen training clips. Equal weights give equal statistics."""

    accelerator: Accelerator
    clips: Clips
    rows: np.ndarray
    """int64: the training clips."""
    window: Window
    names: Sequence[str]
    """The names of the batch norms in the student."""
    max_clips: int
    """Maximum number of clips, chosen at random; 0 keeps the running statistics."""
    seed: int
    whole_clips: bool = False
    """Use any part of a clip, not only its beginning."""
    workers: int = 0
    on_bad_clip: OnBadClip = "refuse"

    @property
    def num_clips(self) -> int:
        """The number of clips to use."""
        return min(self.max_clips, len(self.rows)) if self.names else 0

    def renew(
        self,
        student: nn.Module,
        frontend: Callable[[Tensor], Tensor],
        before_batch: Callable[[], None] = lambda: None,
    ) -> int:
        """Replaces the student's running statistics in place. All processes call this together and get the same statistics.

        Leaves the student in evaluation mode. Returns the number of clips that were used.

        Args:
            frontend: waveform (B, S) -> mel.
            before_batch: called by every process before each batch. If it raises, it must do so on all processes.

        Raises:
            ValueError: none of the clips can be used.
        """
        if not self.num_clips:
            return 0
        accelerator = self.accelerator
        student.to(accelerator.device).eval()
        layers = {name: layer for name, layer in student.named_modules() if name in set(self.names)}
        sums = {name: torch.zeros(2, layer.num_features, dtype=torch.float64) for name, layer in layers.items()}
        totals = torch.zeros(2, dtype=torch.float64)  # batches, clips
        with measured(layers, sums), torch.no_grad():
            for waveform in self._batches(before_batch):
                if len(waveform):
                    with accelerator.autocast():
                        student(frontend(waveform))
                    totals += torch.tensor([1.0, len(waveform)], dtype=torch.float64)
        device = accelerator.device
        batches, heard = accelerator.reduce(totals.to(device), reduction="sum").tolist()
        if not heard:
            raise ValueError(f"none of {self.num_clips} training clips can be used to recompute batch-norm statistics")
        for name, layer in layers.items():
            mean, variance = accelerator.reduce(sums[name].to(device), reduction="sum") / batches
            layer.running_mean.copy_(mean)
            layer.running_var.copy_(variance)
        return int(heard)

    def _batches(self, before_batch: Callable[[], None]) -> Iterator[Tensor]:
        """This process's batches (B, S) of usable clips; a batch may be empty. All processes get the same number of batches."""
        rows = generator(self.seed, "batch-norm clips").permutation(self.rows)[: self.num_clips]
        windows = EvaluationWindows(self.clips, rows, self.window, self.on_bad_clip, self.whole_clips)
        chosen = self._one_of_each(np.asarray(windows.clip_of))
        # Batches of equal size, because a small remainder would count as much as a full batch. Few clips make one batch.
        batches = np.array_split(chosen, max(1, len(chosen) // CLIPS_PER_BATCH))
        processes, mine = self.accelerator.num_processes, self.accelerator.process_index
        loader = create_loader(
            windows,
            batch_sampler=[batch.tolist() for batch in batches[mine::processes]],
            workers=self.workers,
            on_gpu=self.accelerator.device.type == "cuda",
        )
        rounds = -(-len(batches) // processes)
        loaded, shown = iter(loader), self.accelerator.is_main_process
        for _ in progress(range(rounds), shown=shown, desc="batch norm", unit="batch", leave=False):
            before_batch()
            numbers, waveform = next(loaded, (torch.zeros(0), torch.zeros(0, self.window.samples)))
            yield waveform[numbers >= 0].to(self.accelerator.device)

    def _one_of_each(self, clip_of: np.ndarray) -> np.ndarray:
        """The number of one randomly drawn window of each clip."""
        first, counts = np.unique(clip_of, return_index=True, return_counts=True)[1:]
        return first + (generator(self.seed, "batch-norm windows").random(len(first)) * counts).astype(np.int64)


@contextmanager
def measured(layers: dict[str, nn.Module], sums: dict[str, Tensor]) -> Iterator[None]:
    """Inside the context, each batch norm uses the statistics of its batch, which are added to ``sums``: (2, C) float64.

    The mean and the unbiased variance are added, as batch norms do in training. Each batch norm itself runs in evaluation mode,
    with the batch's statistics as its running statistics: in training mode a synchronised one would wait for other
    processes, whose number of batches may differ. Outside its forward pass it is in training mode, because a student that folds
    batch norms in evaluation mode checks for that.
    """
    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.train, layer.training)
            layer.train()
            stack.callback(layer.register_forward_pre_hook(_measure(sums[name])).remove)
            stack.callback(layer.register_forward_hook(_look_as_in_training).remove)
        yield


def _measure(sums: Tensor) -> Callable[[nn.Module, Any], None]:
    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].float()
        axes = [axis for axis in range(x.ndim) if axis != 1]
        variance, mean = torch.var_mean(x, dim=axes, correction=0)
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(variance)
        positions = x.numel() // x.shape[1]
        unbiased = variance.double() * (positions / max(1, positions - 1))
        sums.add_(torch.stack([mean.double(), unbiased]).cpu())
        layer.eval()

    return hook


def _look_as_in_training(layer: nn.Module, inputs: Any, output: Any) -> None:
    layer.train()
