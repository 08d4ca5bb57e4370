"""The module that a run trains: a student together with its objective.

They are one module so that an objective's parameters and buffers are treated exactly like the student's: distributed by
Accelerate, updated by the optimizer, averaged, and saved in checkpoints.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd.objectives.base import Batch, Objective
from students.interface import Student, StudentOutput
from students.layers.keyed import set_sample_keys


class Learner(nn.Module):
    """batch -> dict of scalar losses."""

    def __init__(self, student: Student, objective: Objective, frozen: Sequence[nn.Module] = ()) -> None:
        """``frozen``: modules of the student that stay in evaluation mode during training."""
        super().__init__()
        self.student = student
        self.objective = objective
        objective.start_from(student)
        self._frozen = list(frozen)  # a list, so that they are not registered a second time

    def train(self, mode: bool = True) -> "Learner":
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The batch contains the inputs of the objective, and ``sample_key`` (B,) int64, the keys for the student's dropout.

        Accelerate's mixed precision applies only to the student; the front end and the losses are computed in float32.
        """
        device = batch["waveform"].device.type
        lower_precision = torch.is_autocast_enabled(device)
        if self.training:
            self.objective.follow(self.student)
        set_sample_keys(self.student, batch["sample_key"])

        def call_student(mel: Tensor) -> StudentOutput:
            with torch.autocast(device, dtype=torch.get_autocast_dtype(device), enabled=lower_precision):
                output = self.student(mel)
            return StudentOutput(output.logits.float(), output.embedding.float())

        with torch.autocast(device, enabled=False):
            return self.objective(call_student, batch)
