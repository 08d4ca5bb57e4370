"""The student's own moving average as its teacher: Tarvainen and Valpola, "Mean teachers are better role models", 2017.

Shapes: B clips, C classes.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd.objectives.base import Batch, CallStudent, ObjectiveSettings
from kd.objectives.beside import refuse_stored_logits
from kd.objectives.distillation import DistillationObjective


@dataclass(frozen=True)
class MeanTeacherOptions:
    decay: float = 0.99
    """Of the moving average, for each batch; in the first batches less, t / (t + 9) after t of them."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.decay < 1.0:
            raise ValueError(f"decay must be at least 0 and below 1; found {self.decay}")


class MeanTeacherObjective(DistillationObjective):
    """``DistillationObjective`` whose teacher is the average of the student's weights so far.

    The average hears each clip without masks and mixup, in evaluation mode, and its probabilities are mixed as the clips are. Its batch
    norms keep averages of the student's running statistics. It is part of the objective's state and so of checkpoints.
    """

    Options = MeanTeacherOptions
    learns_from_bare_audio = True

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.options = MeanTeacherOptions(**settings.options)
        self.average: nn.Module | None = None
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def start_from(self, student: nn.Module) -> None:
        self.average = copy.deepcopy(student).requires_grad_(False)

    @torch.no_grad()
    def follow(self, student: nn.Module) -> None:
        self.batches += 1
        seen = int(self.batches)
        share = 1.0 - min(self.options.decay, seen / (seen + 9.0))
        for mine, now in zip(self.average.parameters(), student.parameters(), strict=True):
            mine.lerp_(now, share)
        for (name, mine), now in zip(self.average.named_buffers(), student.buffers(), strict=True):
            if name.endswith(("running_mean", "running_var")):
                mine.lerp_(now, share)
            else:  # counts, and what anneals, such as DyMN's temperature
                mine.copy_(now)

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        assert self.average is not None, "the learner hands the student over"
        refuse_stored_logits(batch, "mean-teacher")
        with torch.no_grad():
            said = self.average.eval()(self.frontend(batch["waveform"])).logits.float()
        everywhere = torch.ones(len(said), dtype=torch.bool, device=said.device)
        return super().forward(student, {**batch, "teacher_logits": said, "has_teacher": everywhere})
