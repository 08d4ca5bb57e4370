"""Decides whether a batch is used for training, and whether the run must stop."""

from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from audio_datasets.system.stop_signals import StopSignals
from kd.run_folder.metrics_log import MetricsLog
from kd.training.batch_dump import write_dump
from kd.training.state import TrainState
from teacher_logits.processes import any_process, fail_together


class BatchGuard:
    """Makes the same decisions on all processes, with one exchange per batch."""

    def __init__(
        self,
        accelerator: Accelerator,
        state: TrainState,
        run_folder: Path,
        skip_non_finite: int,
        log: MetricsLog,
        describe: Callable[[dict[str, Tensor]], str],
        signals: StopSignals,
    ) -> None:
        """
        Args:
            skip_non_finite: how many steps with a loss that is not finite may be skipped.
            describe: names the clips of a batch.
        """
        self.accelerator = accelerator
        self.state = state
        self.run_folder = run_folder
        self.skip_non_finite = skip_non_finite
        self.log = log
        self.describe = describe
        self.signals = signals
        self.stop = False
        """Whether a process has been asked to stop."""
        self.refused_batch = False
        """Whether the last batch was skipped."""
        self.refused_step = False
        """Whether the current step is skipped because of one of its batches."""
        self._buffers: dict[str, Tensor] = {}

    def before_batch(self) -> None:
        """Saves the running statistics before a batch that may spoil them."""
        if self.skip_non_finite:
            self._buffers = {name: buffer.clone() for name, buffer in self.state.learner.named_buffers()}

    def allows(self, batch: dict[str, Tensor], losses: dict[str, Tensor]) -> bool:
        """Whether the losses are finite on all processes. If not, the step is skipped.

        Raises:
            ValueError: no more steps may be skipped.
        """
        not_finite = ~torch.isfinite(losses["loss"])
        self.refused_batch, self.stop = any_process(self.accelerator, not_finite, self.signals.requested)
        if self.refused_batch:
            self._account_for(batch, losses)
            self.refused_step = True
            buffers = dict(self.state.learner.named_buffers())
            for name, value in self._buffers.items():
                buffers[name].copy_(value)
        return not self.refused_batch

    def _account_for(self, batch: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Counts and logs a skipped step, or ends the run if no more steps may be skipped."""
        state = self.state
        skipped = state.skipped_steps + (not self.refused_step)
        ends = skipped > self.skip_non_finite
        reports = []
        if not torch.isfinite(losses["loss"]):
            reports.append(self.describe(batch))
            if ends:
                learner = self.accelerator.unwrap_model(state.learner)
                position = {"epoch": state.epoch, "step": state.step, "process": self.accelerator.process_index}
                folder = write_dump(self.run_folder, learner, batch, losses, position, self.describe(batch))
                reports.append(f"To find the cause, run: python -m kd.training.non_finite {folder}")
        reports = gather_object(reports)
        if ends:
            before = f" ({state.skipped_steps} such steps were skipped before)" if state.skipped_steps else ""
            found = f"the loss is not finite in epoch {state.epoch}, step {state.step_in_epoch}{before}."
            fail_together(self.accelerator, " ".join([found, *reports]))
        state.skipped_steps = skipped
        self.log.write("skipped", state.step, state.epoch, {"skipped_steps": float(skipped)}, {"clips": reports})
