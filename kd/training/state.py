"""Everything that changes during a run."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from kd.training.learner import Learner

if TYPE_CHECKING:  # timm is slow to import, and few runs average their weights
    from timm.utils import ModelEmaV3


@dataclass
class MeanLosses:
    """Mean of each loss over the batches since the last record. Sums stay on the device, so that adding does not synchronise."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.batches += 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Returns means over the batches of all processes (empty if there were none) and resets the sums."""
        means = {
            name: float(accelerator.reduce(total, reduction="mean")) / self.batches for name, total in self.sums.items()
        }
        self.sums, self.batches = {}, 0
        return means

    def per_process(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """The sums of each process, for a checkpoint."""
        gathered = {name: accelerator.gather(total.reshape(1)).tolist() for name, total in self.sums.items()}
        return [{name: values[rank] for name, values in gathered.items()} for rank in range(accelerator.num_processes)]

    def restore(self, per_process: list[dict[str, float]], batches: int, accelerator: Accelerator) -> None:
        """Restores this process's sums, or the mean of all sums if the number of processes has changed."""
        if len(per_process) == accelerator.num_processes:
            mine = per_process[accelerator.process_index]
        else:
            mine = {name: sum(part[name] for part in per_process) / len(per_process) for name in per_process[0]}
        self.sums = {name: torch.tensor(value, device=accelerator.device) for name, value in mine.items()}
        self.batches = batches


@dataclass
class TrainState:
    """Everything that changes during a run. ``learner`` and ``optimizer`` have been prepared by Accelerate."""

    learner: nn.Module
    optimizer: Optimizer
    ema: "ModelEmaV3 | None"
    """Moving average of the learner, that is of the weights of both student and objective."""
    epoch: int = 0
    """Number of finished epochs."""
    step_in_epoch: int = 0
    """Number of finished optimizer steps in the current epoch."""
    step: int = 0
    """Number of finished optimizer steps in total."""
    skipped_steps: int = 0
    """Number of steps that were skipped because their loss was not finite."""
    losses: MeanLosses = field(default_factory=MeanLosses)

    def trained(self, accelerator: Accelerator) -> Learner:
        """The learner without Accelerate's wrapper."""
        return accelerator.unwrap_model(self.learner)

    def evaluated_student(self, accelerator: Accelerator) -> nn.Module:
        """The student to evaluate and save: its moving average if there is one, otherwise the student itself."""
        return self.ema.module.student if self.ema is not None else self.trained(accelerator).student

    def start_epoch(self, accelerator: Accelerator, epoch: int) -> None:
        """Tells the student and its moving average that an epoch starts."""
        self.trained(accelerator).student.start_epoch(epoch)
        if self.ema is not None:
            self.ema.module.student.start_epoch(epoch)
