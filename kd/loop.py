"""The training loop: one ``fit()`` that calls an objective. It knows nothing about audio, labels or distillation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from audio_datasets.command import progress
from kd.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from kd.objectives import Objective
from kd.runlog import RunLog
from kd.sampling import EpochBatches
from kd.schedule import ScheduleConfig, learning_rate_factor


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

    def __post_init__(self) -> None:
        for name in (
            "epochs", "batch_size", "gradient_accumulation_steps", "keep_checkpoints", "validate_every_epochs",
            "log_every_steps",
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; found {getattr(self, name)}")
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

    def __post_init__(self) -> None:
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be positive; found {self.learning_rate}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must not be negative; found {self.weight_decay}")


def create_optimizer(
    student: nn.Module, config: OptimizerConfig, groups: Sequence[dict[str, Any]] | None = None
) -> Optimizer:
    """``groups``: parameters that learn with a share ("lr_scale") of the learning rate; all with the whole if left out."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(groups or student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)


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
        """Means over the batches of all processes; starts afresh."""
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
) -> None:
    """Trains from ``state`` to the end of the run.

    Args:
        batches: the batch sampler behind ``loader``; it is set to where the run stands.
        validate: called by all processes with the student to evaluate; returns values to log (floats also go to the
            trackers).
        describe: names the clips of a batch, for the message about a loss that is not finite.
        before_epoch: called with the epoch's number (from 0) before its first step, also where a run goes on inside it.
        stop: told the number of finished epochs, whether to stop before the next one.

    Raises:
        ValueError: a loss that is not finite.
    """
    config = run.loop
    steps = batches.steps_per_epoch
    bar = progress(
        total=config.epochs * steps, initial=state.step, shown=accelerator.is_main_process, desc="train", unit="step"
    )
    while state.epoch < config.epochs and not stop(state.epoch):
        batches.start_at(state.epoch, state.step_in_epoch)
        before_epoch(state.epoch)
        state.student.train()
        for batch in loader:
            factor = learning_rate_factor(run.schedule, state.epoch, state.step_in_epoch / steps, config.epochs)
            for group in state.optimizer.param_groups:
                group["lr"] = run.optimizer.learning_rate * factor * group.get("lr_scale", 1.0)
            losses = train_on_batch(accelerator, state, objective, batch, config.max_gradient_norm, describe)
            state.losses.add(losses)
            if not accelerator.sync_gradients:
                continue

            state.step += 1
            state.step_in_epoch += 1
            if state.ema is not None:
                state.ema.update(accelerator.unwrap_model(state.student), step=state.step)
            bar.update()
            last_of_epoch = state.step_in_epoch == steps
            if state.step % config.log_every_steps == 0 or last_of_epoch:
                means = state.losses.take(accelerator)
                log.write(
                    "train", state.step, state.epoch, {**means, "learning_rate": state.optimizer.param_groups[-1]["lr"]}
                )
                bar.set_postfix_str(f"epoch {state.epoch + 1}/{config.epochs} loss {means['loss']:.4f}")
            every = config.checkpoint_every_steps
            if every is not None and state.step % every == 0 and not last_of_epoch:
                save_state(accelerator, state, run, log)

        state.epoch, state.step_in_epoch = state.epoch + 1, 0
        if validate is not None and (state.epoch % config.validate_every_epochs == 0 or state.epoch == config.epochs):
            results = validate(evaluated_student(state, accelerator))
            numbers = {name: value for name, value in results.items() if isinstance(value, float)}
            others = {name: value for name, value in results.items() if name not in numbers}
            log.write("validation", state.step, state.epoch - 1, numbers, others)
        save_state(accelerator, state, run, log)
        rate = bar.format_dict["rate"]
        if rate:
            log.track("speed", state.step, {"steps_per_second": rate})
    bar.close()


def train_on_batch(
    accelerator: Accelerator,
    state: TrainState,
    objective: Objective,
    batch: dict[str, Tensor],
    max_gradient_norm: float | None = None,
    describe: Callable[[dict[str, Tensor]], str] = lambda batch: "",
) -> dict[str, Tensor]:
    """Adds a batch to the gradients, and steps the optimizer if it completes a step; returns its losses.

    Raises:
        ValueError: a loss that is not finite.
    """
    with accelerator.accumulate(state.student):
        losses = objective(state.student, batch)
        if not torch.isfinite(losses["loss"]):
            raise ValueError(
                f"the loss is not finite in epoch {state.epoch}, step {state.step_in_epoch}. {describe(batch)}"
            )
        accelerator.backward(losses["loss"])
        if accelerator.sync_gradients and max_gradient_norm is not None:
            accelerator.clip_grad_norm_(state.student.parameters(), max_gradient_norm)
        state.optimizer.step()
        state.optimizer.zero_grad()
    return losses


def save_state(accelerator: Accelerator, state: TrainState, run: Run, log: RunLog) -> None:
    """Writes a checkpoint from the main process; the others wait until it is whole."""
    sums = state.losses.per_process(accelerator)
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
                "loss_sums": sums,
                "loss_batches": state.losses.batches,
                "metrics_bytes": log.size(),
            },
            keep=run.loop.keep_checkpoints,
        )
    accelerator.wait_for_everyone()


def resume_state(accelerator: Accelerator, state: TrainState, run: Run, log: RunLog) -> bool:
    """Fills ``state`` from the run's newest checkpoint and cuts the log back to it; False if there is none."""
    found = checkpoints(run.checkpoint_folder)
    if not found:
        log.cut_back(0)
        return False
    parts = load_checkpoint(found[-1])
    accelerator.unwrap_model(state.student).load_state_dict(parts["student"])
    if state.ema is not None:
        state.ema.module.load_state_dict(parts["ema"])
    state.optimizer.load_state_dict(parts["optimizer"]["optimizer"])
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(parts["optimizer"]["scaler"])
    saved = parts["state"]
    state.epoch, state.step_in_epoch, state.step = saved["epoch"], saved["step_in_epoch"], saved["step"]
    state.losses.restore(saved["loss_sums"], saved["loss_batches"], accelerator)
    log.cut_back(saved["metrics_bytes"])
    accelerator.wait_for_everyone()
    return True
