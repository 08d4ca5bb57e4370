"""The training loop: one ``fit()`` that calls an objective. It knows nothing about audio, labels or distillation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from audio_datasets.system.command import progress
from audio_datasets.system.messages import brief
from audio_datasets.system.stop_signals import Stopped, StopSignals
from kd.data.sampling import EpochBatches
from kd.non_finite import write_dump
from kd.objectives.distillation import Objective
from kd.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from kd.training.runlog import RunLog
from kd.training.schedule import ScheduleConfig, learning_rate_factor
from teacher_logits.processes import any_process, fail_together, take_over_main_state


@dataclass(frozen=True)
class LoopConfig:
    """Length and mechanics of a training run."""

    epochs: int = 200
    """Epochs to train."""
    batch_size: int = 120
    """Clips in a batch of one process. Processes x gradient_accumulation_steps of them make an optimizer step."""
    gradient_accumulation_steps: int = 1
    """Batches whose gradients are added up (averaged) before an optimizer step."""
    max_gradient_norm: float | None = None
    """Clip the gradient's norm to this."""
    ema_decay: float | None = None
    """Keep an exponential moving average of the weights, with this decay per step; it is what is evaluated and saved."""
    checkpoint_every_steps: int | None = None
    """Save a checkpoint every so many optimizer steps, besides the one at the end of each epoch."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep."""
    validate_every_epochs: int = 1
    """Validate after every so many epochs, and after the last one."""
    log_every_steps: int = 50
    """Log the mean losses of every so many steps (and at the end of an epoch)."""
    skip_non_finite: int = 0
    """Steps whose loss is not finite that the run may leave out; at one more it stops, with a dump of the batch."""

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
class OptimizerConfig:
    """Optimizer of the student."""

    optimizer: Literal["adam", "adamw"] = "adam"
    """Adam, or Adam with decoupled weight decay."""
    learning_rate: float = 8e-4
    """Peak learning rate."""
    weight_decay: float = 0.0
    """Weight decay."""
    adam_epsilon: float = 1e-8
    """Added to the root of Adam's mean squared gradient. A larger one damps steps along gradients that are all rounding."""

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; found {self.learning_rate}")
        if not self.adam_epsilon > 0:
            raise ValueError(f"adam_epsilon must be positive; found {self.adam_epsilon}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative; found {self.weight_decay}")


def create_optimizer(
    student: nn.Module, config: OptimizerConfig, groups: Sequence[dict[str, Any]] | None = None
) -> Optimizer:
    """``groups``: parameters that learn with a share ("lr_scale") of the learning rate; all with the whole if left out."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    parameters = groups or student.parameters()
    return kind(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, eps=config.adam_epsilon)


@dataclass
class MeanLosses:
    """Mean of each loss over the batches since the last record; kept on the device, so that adding does not wait."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    batches: int = 0

    def add(self, losses: dict[str, Tensor]) -> None:
        for name, value in losses.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.batches += 1

    def take(self, accelerator: Accelerator) -> dict[str, float]:
        """Means over the batches of all processes, nothing if there was none; starts afresh."""
        means = {
            name: float(accelerator.reduce(total, reduction="mean")) / self.batches for name, total in self.sums.items()
        }
        self.sums, self.batches = {}, 0
        return means

    def per_process(self, accelerator: Accelerator) -> list[dict[str, float]]:
        """Sums of each process, to go into a checkpoint."""
        gathered = {name: accelerator.gather(total.reshape(1)).tolist() for name, total in self.sums.items()}
        return [{name: values[rank] for name, values in gathered.items()} for rank in range(accelerator.num_processes)]

    def restore(self, per_process: list[dict[str, float]], batches: int, accelerator: Accelerator) -> None:
        """Takes over this process's sums, or the mean of all if the number of processes has changed."""
        if len(per_process) == accelerator.num_processes:
            mine = per_process[accelerator.process_index]
        else:
            mine = {name: sum(part[name] for part in per_process) / len(per_process) for name in per_process[0]}
        self.sums = {name: torch.tensor(value, device=accelerator.device) for name, value in mine.items()}
        self.batches = batches


@dataclass
class TrainState:
    """Everything that changes during a run. ``student``, ``optimizer`` are as prepared by Accelerate."""

    student: nn.Module
    optimizer: Optimizer
    ema: ModelEmaV3 | None
    epoch: int = 0
    """Epochs finished."""
    step_in_epoch: int = 0
    """Optimizer steps finished in the running epoch."""
    step: int = 0
    """Optimizer steps finished altogether."""
    skipped_steps: int = 0
    """How many of them changed nothing, since their loss was not finite."""
    losses: MeanLosses = field(default_factory=MeanLosses)


@dataclass(frozen=True)
class Run:
    """Where a run writes, and what it is called with; ``folder`` holds ``checkpoints/`` and ``metrics.jsonl``."""

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


def evaluated_student(state: TrainState, accelerator: Accelerator) -> nn.Module:
    """The weights that count: their moving average if one is kept, else the student's own."""
    return state.ema.module if state.ema is not None else accelerator.unwrap_model(state.student)


def fit(
    accelerator: Accelerator,
    state: TrainState,
    objective: Objective,
    batches: EpochBatches,
    loader: DataLoader,
    run: Run,
    log: RunLog,
    validate: Callable[[nn.Module], dict[str, Any]] | None = None,
    describe: Callable[[dict[str, Tensor]], str] = lambda batch: "",
    before_epoch: Callable[[int], None] = lambda epoch: None,
    stop: Callable[[int], bool] = lambda epochs: False,
    signals: StopSignals | None = None,
) -> None:
    """Trains from ``state`` to the end of the run.

    An epoch's last checkpoint is written before its validation, which a run that is killed in it does again.

    Args:
        batches: the batch sampler behind ``loader``; it is set to where the run stands.
        validate: called by all processes with the student to evaluate, which is the main process's on all of them;
            returns values to log (floats also go to the trackers).
        describe: names the clips of a batch, for the message about a loss that is not finite.
        before_epoch: called with the epoch's number (from 0) before its first step, also where a run goes on inside it.
        stop: told the number of finished epochs, whether to stop before the next one.
        signals: asked in every step whether to stop. One process's answer counts for all.

    Raises:
        Stopped: on request, after the step was finished and saved.
        ValueError: a loss that is not finite (once more than ``skip_non_finite`` allows).
    """
    signals = signals or StopSignals()
    guard = BatchGuard(accelerator, state, run, log, describe, signals)
    config = run.loop
    steps = batches.steps_per_epoch
    bar = progress(
        total=config.epochs * steps, initial=state.step, shown=accelerator.is_main_process, desc="train", unit="step"
    )
    # A run that goes on with larger steps may stand where an epoch has none any more.
    state.step_in_epoch = min(state.step_in_epoch, steps)
    while state.epoch < config.epochs and not stop(state.epoch):
        batches.start_at(state.epoch, state.step_in_epoch)
        before_epoch(state.epoch)
        state.student.train()
        saved = state.step_in_epoch == steps  # the run goes on between an epoch's last step and its validation
        for batch in loader if state.step_in_epoch < steps else ():
            factor = learning_rate_factor(run.schedule, state.epoch, state.step_in_epoch / steps, config.epochs)
            for group in state.optimizer.param_groups:
                group["lr"] = run.optimizer.learning_rate * factor * group.get("lr_scale", 1.0)
            losses = train_on_batch(accelerator, state, objective, batch, config.max_gradient_norm, guard)
            if not guard.refused_batch:
                state.losses.add(losses)
            if not accelerator.sync_gradients:
                continue

            state.step += 1
            state.step_in_epoch += 1
            if state.ema is not None and not guard.refused_step:
                state.ema.update(accelerator.unwrap_model(state.student), step=state.step)
            guard.refused_step = False
            bar.update()
            last_of_epoch = state.step_in_epoch == steps
            if state.step % config.log_every_steps == 0 or last_of_epoch:
                means = state.losses.take(accelerator)
                log.write(
                    "train", state.step, state.epoch, {**means, "learning_rate": state.optimizer.param_groups[-1]["lr"]}
                )
                bar.set_postfix_str(f"epoch {state.epoch + 1}/{config.epochs} loss {means.get('loss', math.nan):.4f}")
            every = config.checkpoint_every_steps
            saved = guard.stop or last_of_epoch or (every is not None and state.step % every == 0)
            if saved:
                save_state(accelerator, state, run, log)
            if guard.stop:
                bar.close()
                raise Stopped(stop_message(signals, state, run))

        assert saved, "the loader gave fewer batches than the epoch has"
        if validate is not None and (
            (state.epoch + 1) % config.validate_every_epochs == 0 or state.epoch + 1 == config.epochs
        ):
            evaluated = evaluated_student(state, accelerator)
            take_over_main_state(accelerator, evaluated)
            results = validate(evaluated)
            numbers = {name: value for name, value in results.items() if isinstance(value, float)}
            others = {name: value for name, value in results.items() if name not in numbers}
            log.write("validation", state.step, state.epoch, numbers, others)
        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        rate = bar.format_dict["rate"]
        if rate:
            log.track("speed", state.step, {"steps_per_second": rate})
    log.flush()
    bar.close()


def stop_message(signals: StopSignals, state: TrainState, run: Run) -> str:
    """What a user reads of a run that was stopped on request."""
    return (
        f"{signals.reason or 'a signal to another process'} came; {run.folder} is saved at step {state.step}, and the same "
        "command goes on from there"
    )


class BatchGuard:
    """Decides whether a batch is learnt from, and whether the run is to stop: by all processes alike, in one exchange."""

    def __init__(
        self,
        accelerator: Accelerator,
        state: TrainState,
        run: Run,
        log: RunLog,
        describe: Callable[[dict[str, Tensor]], str],
        signals: StopSignals,
    ) -> None:
        self.accelerator = accelerator
        self.state = state
        self.run = run
        self.log = log
        self.describe = describe
        self.signals = signals
        self.stop = False
        """Whether a process has been asked to stop."""
        self.refused_batch = False
        """Whether the last batch was left out."""
        self.refused_step = False
        """Whether the running step is left out, for one of its batches."""
        self._buffers: dict[str, Tensor] = {}

    def before_batch(self) -> None:
        """Keeps the running statistics as they are before a batch that may spoil them."""
        if self.run.loop.skip_non_finite:
            self._buffers = {name: buffer.clone() for name, buffer in self.state.student.named_buffers()}

    def allows(self, batch: dict[str, Tensor], losses: dict[str, Tensor]) -> bool:
        """Whether the losses are finite on all processes; if not, the step is left out.

        Raises:
            ValueError: no more steps may be left out.
        """
        not_finite = ~torch.isfinite(losses["loss"])
        self.refused_batch, self.stop = any_process(self.accelerator, not_finite, self.signals.requested)
        if self.refused_batch:
            self._account_for(batch, losses)
            self.refused_step = True
            buffers = dict(self.state.student.named_buffers())
            for name, value in self._buffers.items():
                buffers[name].copy_(value)
        return not self.refused_batch

    def _account_for(self, batch: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
        """Counts and logs a step that is left out, or ends the run if it has left out as many as it may."""
        state, loop = self.state, self.run.loop
        skipped = state.skipped_steps + (not self.refused_step)
        ends = skipped > loop.skip_non_finite
        reports = []
        if not torch.isfinite(losses["loss"]):
            reports.append(self.describe(batch))
            if ends:
                student = self.accelerator.unwrap_model(state.student)
                position = {"epoch": state.epoch, "step": state.step, "process": self.accelerator.process_index}
                folder = write_dump(self.run.folder, student, batch, losses, position, self.describe(batch))
                reports.append(f"python kd/non_finite.py {folder} shows where it comes from.")
        reports = gather_object(reports)
        if ends:
            before = f" ({state.skipped_steps} such steps were left out before)" if state.skipped_steps else ""
            found = f"the loss is not finite in epoch {state.epoch}, step {state.step_in_epoch}{before}."
            fail_together(self.accelerator, " ".join([found, *reports]))
        state.skipped_steps = skipped
        self.log.write("skipped", state.step, state.epoch, {"skipped_steps": float(skipped)}, {"clips": reports})


def train_on_batch(
    accelerator: Accelerator,
    state: TrainState,
    objective: Objective,
    batch: dict[str, Tensor],
    max_gradient_norm: float | None = None,
    guard: BatchGuard | None = None,
) -> dict[str, Tensor]:
    """Adds a batch to the gradients, and steps the optimizer if it completes a step; returns its losses.

    Args:
        guard: decides whether the batch, and so its step, is learnt from; all are if left out.

    Raises:
        ValueError: as ``guard.allows``.
    """
    with accelerator.accumulate(state.student):
        if guard is not None:
            guard.before_batch()
        losses = objective(state.student, batch)
        if guard is None or guard.allows(batch, losses):
            accelerator.backward(losses["loss"])
        if accelerator.sync_gradients and (guard is None or not guard.refused_step):
            if max_gradient_norm is not None:
                accelerator.clip_grad_norm_(state.student.parameters(), max_gradient_norm)
            state.optimizer.step()
        state.optimizer.zero_grad()
    return losses


def save_state(accelerator: Accelerator, state: TrainState, run: Run, log: RunLog) -> None:
    """Writes a checkpoint from the main process; the others wait until it is whole."""
    sums = state.losses.per_process(accelerator)
    log.flush()
    if accelerator.is_main_process:
        scaler = accelerator.scaler
        save_checkpoint(
            run.checkpoint_folder,
            state.step,
            student=accelerator.unwrap_model(state.student).state_dict(),
            ema=state.ema.module.state_dict() if state.ema is not None else None,
            optimizer={
                "optimizer": state.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
            },
            state={
                "epoch": state.epoch,
                "step_in_epoch": state.step_in_epoch,
                "step": state.step,
                "skipped_steps": state.skipped_steps,
                "loss_sums": sums,
                "loss_batches": state.losses.batches,
                "metrics_bytes": log.size(),
                "metrics_digest": log.digest(),
            },
            keep=run.loop.keep_checkpoints,
        )
    accelerator.wait_for_everyone()


def load_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """The averages and counts of a saved optimizer; its settings, which a run may go on with others of, stay as they are.

    Raises ValueError for one of other parameters.
    """
    settings = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, own in zip(optimizer.param_groups, settings, strict=True):
        for name in group.keys() - own.keys() - {"params"}:
            del group[name]
        group.update(own)
    parameters = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    for parameter, values in optimizer.state.items():
        if parameter not in parameters or values.keys() != {"step", "exp_avg", "exp_avg_sq"}:
            raise ValueError(f"the optimizer keeps other values of a parameter: {brief(list(values))}")
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if not isinstance(value, Tensor) or value.shape != shape or not value.is_floating_point():
                raise ValueError(f"the optimizer's {name} is not that of a parameter of shape {tuple(parameter.shape)}")
        if not 1 <= float(values["step"]) < 2**53:
            raise ValueError(f"the optimizer counts {float(values['step'])} steps of a parameter")


def resume_state(accelerator: Accelerator, state: TrainState, run: Run, log: RunLog) -> bool:
    """Fills ``state`` from the run's newest checkpoint and cuts the log back to it; False if there is none.

    Raises:
        ValueError: a checkpoint that is damaged, or not of this student and optimizer.
    """
    found = checkpoints(run.checkpoint_folder)
    if not found:
        log.cut_back(0)
        return False
    parts = load_checkpoint(found[-1])
    try:
        accelerator.unwrap_model(state.student).load_state_dict(parts["student"])
        if state.ema is not None:
            if parts["ema"] is None:
                raise ValueError("it holds no moving average of the weights")
            state.ema.module.load_state_dict(parts["ema"])
        load_optimizer(state.optimizer, parts["optimizer"]["optimizer"])
        if accelerator.scaler is not None:
            accelerator.scaler.load_state_dict(parts["optimizer"]["scaler"])
        saved = parts["state"]
        # Absent in checkpoints of version 0.1: the steps that were left out, and the log's digest.
        for name in ("epoch", "step_in_epoch", "step", "skipped_steps", "loss_batches", "metrics_bytes"):
            if type(saved.get(name, 0)) is not int or saved.get(name, 0) < 0:
                raise ValueError(f"{name} is a whole number, at least 0; found {brief(saved[name])}")
        state.epoch, state.step_in_epoch, state.step = saved["epoch"], saved["step_in_epoch"], saved["step"]
        state.skipped_steps = saved.get("skipped_steps", 0)
        state.losses.restore(saved["loss_sums"], saved["loss_batches"], accelerator)
        metrics = saved["metrics_bytes"], saved.get("metrics_digest")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RuntimeError) as error:
        raise ValueError(
            f"checkpoint {found[-1]} does not fit this run ({type(error).__name__}: {error}); remove it to go on from the one "
            "before"
        ) from error
    log.cut_back(*metrics)
    accelerator.wait_for_everyone()
    return True
