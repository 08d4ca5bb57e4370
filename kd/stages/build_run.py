"""A run built from its configuration and its data, and trained: the same for both stages."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.system.files import digest_of, make_folder
from audio_datasets.system.stop_signals import Stopped, StopSignals, outlive_stop_signals
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.examples import TrainingExamples
from kd.data.replacements import Replacements
from kd.data.sampling import EpochBatches
from kd.data.windows import Clips, Window
from kd.objectives.base import ObjectiveSettings
from kd.objectives.catalog import create_objective
from kd.objectives.label_losses import balanced_class_weights, loss_space
from kd.run_folder.config import as_json
from kd.run_folder.metrics_log import MetricsLog
from kd.run_folder.start import EnteredRun, enter_run_folder
from kd.stages.stage_config import StageConfig
from kd.training.batch_norm.reestimation import BatchNormStatistics, too_few_steps, trained_batch_norms
from kd.training.batch_norm.synchronized import synchronize_batch_norms
from kd.training.checkpoint import require_checkpoint_space, resume_state
from kd.training.learner import Learner
from kd.training.loop import Hooks, Run, fit, stop_message
from kd.training.optimization import create_optimizer
from kd.training.state import TrainState
from kd.training.transfer import Freeze, freeze, layer_groups
from students.frontend import LogMel
from students.interface import Student
from teacher_logits.processes import any_process, on_main_process
from teacher_logits.stores.ensemble import LogitEnsemble


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on."""

    clips: Clips
    rows: np.ndarray
    """int64: the training clips."""
    label_space: LabelSpace
    teachers: LogitEnsemble | None = None
    impulse_responses: Sequence[np.ndarray] = ()

    def fingerprints(self) -> dict[str, Any]:
        """What the data are, wherever their files lie; a run goes on with the same only."""
        teachers = self.teachers.describe() if self.teachers is not None else []
        return {
            "clips": self.clips.fingerprint,
            "rows": digest_of(self.rows.tobytes()),
            "teachers": [{"logits": teacher["fingerprint"], "weight": teacher["weight"]} for teacher in teachers],
        }


@dataclass(frozen=True)
class BuiltRun:
    """All that a run needs, built and checked against one another; nothing is written yet."""

    config: StageConfig
    accelerator: Accelerator
    data: TrainingData
    batches: EpochBatches
    examples: TrainingExamples
    loader: DataLoader
    frontend: LogMel
    """On the accelerator's device, for evaluation."""
    state: TrainState
    statistics: BatchNormStatistics
    """Of the student's batch norms, from training clips."""

    def tagger(self, student: nn.Module) -> Callable[[Tensor], Tensor]:
        """waveform (B, S) -> logits (B, C), of the student in evaluation mode."""
        student = student.to(self.accelerator.device).eval()
        return lambda waveform: student(self.frontend(waveform)).logits

    def renew_batch_norms(self, student: nn.Module, before_batch: Callable[[], None] = lambda: None) -> int:
        """Takes the student's batch-norm statistics anew, if the configuration asks for it; from how many clips."""
        return self.statistics.renew(student, self.frontend, before_batch)

    def batch_norm_warning(self) -> str | None:
        """What to say of a run from scratch that keeps running statistics over few steps; None if there is nothing to."""
        if self.config.renews_batch_norms_from or self.config.weights not in (None, "imagenet"):
            return None
        steps = self.config.loop.epochs * self.batches.steps_per_epoch
        return too_few_steps(self.state.trained(self.accelerator).student, self.statistics.names, steps)


def build_run(
    config: StageConfig,
    accelerator: Accelerator,
    data: TrainingData,
    student: Student,
    batches: EpochBatches,
    *,
    seed: int,
    skipped: ClipList,
    frozen: Freeze = "none",
    layer_decay: float | None = None,
) -> BuiltRun:
    """Builds a run's examples, loader, learner and optimizer.

    Args:
        student: as it starts; it is trained in place.
        skipped: where bad clips are listed that another one replaces.
        layer_decay: each layer learns so many times as fast as the one after it; None: all alike, as one group.

    Raises:
        ValueError: settings that do not fit together.
    """
    if config.sync_batch_norm and accelerator.num_processes > 1:
        student = synchronize_batch_norms(student, accelerator.device)  # first, since on GPUs it replaces layers
    frozen_modules = freeze(student, frozen)
    groups = None if layer_decay is None else layer_groups(student, layer_decay)
    objective = build_objective(config, data, student.embedding_dim, seed)
    frontend = LogMel(config.frontend).to(accelerator.device)
    learner = Learner(student, objective, frozen_modules)
    ema = None
    if config.loop.ema_decay is not None:
        ema = ModelEmaV3(learner, decay=config.loop.ema_decay, device=accelerator.device)
    examples = training_examples(config, data, seed, skipped)
    loader = training_loader(examples, batches, config.workers, accelerator)
    optimizer = create_optimizer(config.optimizer, student, objective, groups)
    learner, optimizer, loader = accelerator.prepare(learner, optimizer, loader)
    statistics = BatchNormStatistics(
        accelerator,
        data.clips,
        data.rows,
        examples.window,
        trained_batch_norms(student, frozen_modules),
        max_clips=config.renews_batch_norms_from,
        seed=seed,
        whole_clips=config.augment.crop == "random",
        workers=config.workers,
        on_bad_clip=config.on_bad_clip,
    )
    state = TrainState(learner, optimizer, ema)
    return BuiltRun(config, accelerator, data, batches, examples, loader, frontend, state, statistics)


def training_examples(config: StageConfig, data: TrainingData, seed: int, skipped: ClipList) -> TrainingExamples:
    """The training clips, augmented as the configuration asks for; bad ones that another replaces are listed."""
    return TrainingExamples(
        data.clips,
        data.rows,
        Window(config.frontend.sample_rate_hz, config.clip_seconds, config.short_clips),
        frontend=config.frontend,
        augment=config.augment,
        seed=seed,
        teachers=data.teachers,
        views=data.teachers.views if data.teachers is not None and config.views == "stored" else None,
        impulse_responses=data.impulse_responses,
        replacements=Replacements(data.rows, skipped) if config.on_bad_clip == "skip" else None,
    )


def build_objective(config: StageConfig, data: TrainingData, embedding_dim: int, seed: int) -> nn.Module:
    """The objective that the configuration asks for, its own weights drawn from ``seed``."""
    class_weights = None
    if config.loss.class_weights == "balanced":
        class_weights = tuple(class_weights_of(data, config).tolist())
    settings = ObjectiveSettings(
        frontend=config.frontend,
        label_space=data.label_space,
        embedding_dim=embedding_dim,
        loss=config.loss,
        distillation=config.distillation,
        class_weights=class_weights,
        options=config.options_of_objective,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_objective(config.objective, settings)


def class_weights_of(data: TrainingData, config: StageConfig) -> Tensor:
    """(C,): weights that make all classes count as if they were equally frequent in the training clips."""
    targets, known = data.clips.targets(data.rows) > 0, data.clips.mask(data.rows)
    positives = torch.from_numpy((targets & known).sum(axis=0))
    negatives = torch.from_numpy((~targets & known).sum(axis=0))
    return torch.cat(
        [
            balanced_class_weights(group.exclusive, positives[columns], negatives[columns])
            for group, columns in loss_space(data.label_space, config.loss).parts()
        ]
    )


def training_loader(dataset: Dataset, batches: EpochBatches, workers: int, accelerator: Accelerator) -> DataLoader:
    """Loader of whole batches, not yet prepared; its workers live as long as it does."""
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        worker_init_fn=outlive_stop_signals,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
    )


# -- The run folder ----------------------------------------------------------------------------------------------------


def enter(
    accelerator: Accelerator,
    config: StageConfig,
    inputs: dict[str, Any],
    defaults: StageConfig,
    changes_nothing: Sequence[str],
    **more: Any,
) -> EnteredRun:
    """Enters the run folder on the main process, which holds its lock, and says what the user should know.

    Args:
        inputs: fingerprints of the data.
        defaults: a configuration of the stage with nothing set, for runs that an older version began.
        changes_nothing: settings that do not change the result.
        more: further arguments of ``enter_run_folder``.

    Raises:
        ValueError: the folder holds a run with other settings.
    """
    description = {**as_json(config), "processes": accelerator.num_processes, "inputs": inputs}
    folder = on_main_process(
        accelerator,
        lambda: enter_run_folder(
            config.out,
            description,
            changes_nothing=changes_nothing,
            accept_changes=config.accept_changes,
            restart=config.restart,
            defaults=as_json(defaults),
            **more,
        ),
    )
    for note in folder.notes:
        accelerator.print(note)
    if folder.state == "finished":
        accelerator.print(f"the run in {config.out} is finished already: nothing to do")
    return folder


# -- Training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Where a run stands, for its hooks."""

    run: Run
    log: MetricsLog
    stop_if_asked: Callable[[], None]
    """Raises Stopped, on all processes alike, if a signal came to one of them."""


def train(
    built: BuiltRun,
    folder: Path,
    signals: StopSignals,
    hooks: Callable[[Progress], Hooks],
    *,
    where: str = "",
    further_runs: int = 0,
    before_training: Callable[[bool], None] = lambda resumed: None,
) -> Progress:
    """Trains a run from the newest checkpoint in its folder, or from the start, to its end.

    Args:
        hooks: makes what the stage adds to the loop.
        where: what the run is called in messages, as "fold1: ".
        further_runs: how many runs come after it, for whose checkpoints there must be room as well.
        before_training: told whether the run goes on from a checkpoint.

    Raises:
        Stopped: on request, with the run saved.
        ValueError: a loss that is not finite, or too little room on the disk.
    """
    config, accelerator, state, batches = built.config, built.accelerator, built.state, built.batches
    make_folder(folder)
    run = Run(folder, config.loop, config.optimizer, config.schedule)
    log = MetricsLog(run.metrics_path, accelerator)
    require_checkpoint_space(accelerator, state, run.checkpoint_folder, config.loop.keep_checkpoints, further_runs)
    resumed = resume_state(accelerator, state, run.checkpoint_folder, log)
    if resumed:
        place = f"epoch {state.epoch}, step {state.step_in_epoch} of {batches.steps_per_epoch}"
        accelerator.print(f"{where}going on at {place}" if where else f"going on with the run in {folder} at {place}")
    before_training(resumed)
    if warning := built.batch_norm_warning():
        accelerator.print(f"{where}{warning}")

    def stop_if_asked() -> None:
        if any_process(accelerator, signals.requested)[0]:
            raise Stopped(stop_message(signals, state, run))

    progress = Progress(run, log, stop_if_asked)
    fit(accelerator, state, batches, built.loader, run, log, hooks(progress), signals)
    return progress


def describe_batch(clips: Clips) -> Callable[[dict[str, Tensor]], str]:
    """Names the clips of a batch, for the message about a loss that is not finite."""
    return lambda batch: f"Clips of the batch: {', '.join(clips.clip_id(row) for row in batch['row'].tolist())}"


# -- What a run is made of ---------------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {name: version(name) for name in ("audio-kd", "torch", "torchaudio", "timm", "accelerate", "scikit-learn")}


def provenance(
    built: BuiltRun, as_configured: dict[str, Any], accepted_changes: list[Any], **more: Any
) -> dict[str, Any]:
    """What ``student.json`` tells of how the weights came about; ``more`` is what the stage adds."""
    teachers, state = built.data.teachers, built.state
    return {
        "config": as_configured,
        "accepted_changes": accepted_changes,
        "clip_seconds": built.config.clip_seconds,
        "clips": built.data.clips.fingerprint,
        "training_clips": {"labelled": len(built.batches.labelled), "unlabelled": len(built.batches.unlabelled)},
        "teachers": teachers.describe() if teachers is not None else [],
        "objective": built.config.objective,
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "batch_norm_clips": built.statistics.num_clips,
        "epochs": state.epoch,
        "versions": package_versions(),
        **more,
    }
