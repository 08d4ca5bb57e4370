"""The training loop: ``fit()`` trains a learner step by step. It knows nothing about audio, labels or distillation."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audio_datasets.system.command import progress
from audio_datasets.system.stop_signals import Stopped, StopSignals
from kd.data.sampling import EpochBatches
from kd.run_folder.metrics_log import MetricsLog
from kd.training.batch_guard import BatchGuard
from kd.training.checkpoint import save_state
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig, learning_rate_factor
from kd.training.state import TrainState
from teacher_logits.processes import take_over_main_state


@dataclass(frozen=True)
class LoopConfig:
    """Length and mechanics of a training run."""

    help_title: ClassVar[str] = "Training"

    epochs: int = 200
    """Number of epochs."""
    batch_size: int = 120
    """Clips in a batch of one process. An optimizer step uses one batch per process, times gradient_accumulation_steps."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are averaged for each optimizer step."""
    max_gradient_norm: float | None = None
    """Clip the gradient to this norm."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights with this decay per step, and evaluate and save that average."""
    checkpoint_every_steps: int | None = None
    """Save a checkpoint every N optimizer steps, in addition to the one at the end of each epoch."""
    keep_checkpoints: int = 2
    """Number of checkpoints to keep."""
    validate_every_epochs: int = 1
    """Validate every N epochs, and after the last one."""
    log_every_steps: int = 50
    """Log the mean losses every N steps, and at the end of each epoch."""
    skip_non_finite: int = 0
    """Skip up to N steps whose loss is not finite. At the next one the run stops and saves the batch for inspection."""

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "validate_every_epochs",
            "log_every_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
        if self.skip_non_finite < 0:
            raise ValueError(f"skip_non_finite must not be negative; found {self.skip_non_finite}")
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise ValueError(f"checkpoint_every_steps must be at least 1; found {self.checkpoint_every_steps}")
        if self.max_gradient_norm is not None and not self.max_gradient_norm > 0:
            raise ValueError(f"max_gradient_norm must be positive; found {self.max_gradient_norm}")
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie between 0 and 1; found {self.ema_decay}")


@dataclass(frozen=True)
class Run:
    """A run's folder and settings. ``folder`` contains ``checkpoints/`` and ``metrics.jsonl``."""

    folder: Path
    loop: LoopConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig

    @property
    def checkpoint_folder(self) -> Path:
        return self.folder / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        return self.folder / "metrics.jsonl"


@dataclass(frozen=True)
class Hooks:
    """Functions that a stage adds to the loop. All processes call them."""

    validate: Callable[[nn.Module], dict[str, Any]] | None = None
    """Called with the student to evaluate; all processes have the weights and statistics of the main process. Returns values to
    log (floats also go to the trackers)."""
    describe: Callable[[dict[str, Tensor]], str] = lambda batch: ""
    """Names the clips of a batch, for the message about a loss that is not finite."""
    before_epoch: Callable[[int], None] = lambda epoch: None
    """Called with the epoch's number (from 0) before its first step, and when a run is resumed inside the epoch."""
    stop: Callable[[int], bool] = lambda epochs: False
    """Called with the number of finished epochs; returns whether to stop before the next one."""


def fit(
    accelerator: Accelerator,
    state: TrainState,
    batches: EpochBatches,
    loader: DataLoader,
    run: Run,
    log: MetricsLog,
    hooks: Hooks = Hooks(),
    signals: StopSignals | None = None,
) -> None:
    """Trains from ``state`` to the end of the run.

    The last checkpoint of an epoch is written before its validation, so a run that is killed during validation repeats it.

    Args:
        batches: the batch sampler of ``loader``; it is set to the current position of the run.
        signals: checked in every step. If one process is asked to stop, all of them stop.

    Raises:
        Stopped: on request, after the current step was finished and saved.
        ValueError: a loss that is not finite, after as many as ``skip_non_finite`` allows.
    """
    signals = signals or StopSignals()
    config, steps = run.loop, batches.steps_per_epoch
    guard = BatchGuard(accelerator, state, run.folder, config.skip_non_finite, log, hooks.describe, signals)
    total, shown = config.epochs * steps, accelerator.is_main_process
    with progress(total=total, initial=state.step, shown=shown, desc="train", unit="step") as bar:
        # A run that was continued with larger steps may be beyond the new number of steps in an epoch.
        state.step_in_epoch = min(state.step_in_epoch, steps)
        while state.epoch < config.epochs and not hooks.stop(state.epoch):
            batches.start_at(state.epoch, state.step_in_epoch)
            hooks.before_epoch(state.epoch)
            state.learner.train()
            if state.step_in_epoch < steps:  # otherwise the run resumes between an epoch's last step and its validation
                for _ in train_epoch(accelerator, state, loader, steps, run, log, guard):
                    bar.update()
                    loss = "" if math.isnan(log.last_loss) else f" loss {log.last_loss:.4f}"  # none is logged at first
                    bar.set_postfix_str(f"epoch {state.epoch + 1}/{config.epochs}{loss}")
                    if guard.stop:
                        raise Stopped(stop_message(signals, state, run))
                assert state.step_in_epoch == steps, "the loader gave fewer batches than the epoch has"
            last = state.epoch + 1 == config.epochs
            if hooks.validate is not None and ((state.epoch + 1) % config.validate_every_epochs == 0 or last):
                validate(accelerator, state, hooks.validate, log)
            state.epoch, state.step_in_epoch = state.epoch + 1, 0
            if rate := bar.format_dict["rate"]:
                log.track("speed", state.step, {"steps_per_second": rate})
    log.flush()


def train_epoch(
    accelerator: Accelerator,
    state: TrainState,
    loader: DataLoader,
    steps: int,
    run: Run,
    log: MetricsLog,
    guard: BatchGuard,
) -> Iterator[None]:
    """Trains the rest of an epoch, logs and saves. Yields after each optimizer step. ``steps``: steps in the whole epoch."""
    config = run.loop
    for batch in loader:
        factor = learning_rate_factor(run.schedule, state.epoch, state.step_in_epoch / steps, config.epochs)
        for group in state.optimizer.param_groups:
            group["lr"] = run.optimizer.learning_rate * factor * group.get("lr_scale", 1.0)
        losses = train_on_batch(accelerator, state, batch, config.max_gradient_norm, guard)
        if not guard.refused_batch:
            state.losses.add(losses)
        if not accelerator.sync_gradients:
            continue

        state.step += 1
        state.step_in_epoch += 1
        if state.ema is not None and not guard.refused_step:
            state.ema.update(state.trained(accelerator), step=state.step)
        guard.refused_step = False
        last_of_epoch = state.step_in_epoch == steps
        if state.step % config.log_every_steps == 0 or last_of_epoch:
            values = {**state.losses.take(accelerator), "learning_rate": state.optimizer.param_groups[-1]["lr"]}
            log.write("train", state.step, state.epoch, values)
        every = config.checkpoint_every_steps
        if guard.stop or last_of_epoch or (every is not None and state.step % every == 0):
            save_state(accelerator, state, run.checkpoint_folder, config.keep_checkpoints, log)
        yield


def validate(
    accelerator: Accelerator, state: TrainState, evaluate: Callable[[nn.Module], dict[str, Any]], log: MetricsLog
) -> None:
    """Evaluates the student (or its moving average) and logs the results."""
    student = state.evaluated_student(accelerator)
    take_over_main_state(accelerator, student)
    results = evaluate(student)
    numbers = {name: value for name, value in results.items() if isinstance(value, float)}
    others = {name: value for name, value in results.items() if name not in numbers}
    log.write("validation", state.step, state.epoch, numbers, others)


def stop_message(signals: StopSignals, state: TrainState, run: Run) -> str:
    """The message for a run that was stopped on request."""
    return (
        f"{signals.reason or 'another process was asked to stop'}; {run.folder} is saved at step {state.step}, and the same "
        "command continues from there"
    )


def train_on_batch(
    accelerator: Accelerator,
    state: TrainState,
    batch: dict[str, Tensor],
    max_gradient_norm: float | None = None,
    guard: BatchGuard | None = None,
) -> dict[str, Tensor]:
    """Adds the gradients of a batch, and runs the optimizer if the batch completes a step. Returns the losses.

    Args:
        guard: decides whether a batch, and therefore its step, is used; without it, all are.

    Raises:
        ValueError: as ``guard.allows``.
    """
    with accelerator.accumulate(state.learner):
        if guard is not None:
            guard.before_batch()
        losses = state.learner(batch)
        if guard is None or guard.allows(batch, losses):
            accelerator.backward(losses["loss"])
        if accelerator.sync_gradients and (guard is None or not guard.refused_step):
            if max_gradient_norm is not None:
                accelerator.clip_grad_norm_(state.learner.parameters(), max_gradient_norm)
            state.optimizer.step()
        state.optimizer.zero_grad()
    return losses
