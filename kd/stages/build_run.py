"""Builds a run from its configuration and data, and trains it. Both stages use this."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.system.files import digest_of, make_folder
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.system.workers.loading import create_loader
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.task import TaskClips
from kd.data.examples import TrainingExamples
from kd.data.replacements import Replacements
from kd.data.sampling import EpochBatches, are_labelled
from kd.data.windows import Clips, Window
from kd.objectives.base import ObjectiveSettings
from kd.objectives.catalog import create_objective
from kd.objectives.label_losses import balanced_class_weights, loss_space
from kd.run_folder.config import as_json
from kd.run_folder.metrics_log import MetricsLog
from kd.run_folder.seen_files import remember_contents
from kd.run_folder.start import EnteredRun, enter_run_folder
from kd.stages.stage_config import StageConfig
from kd.stages.teachers import link_for, link_of_space, told_link
from kd.training.batch_norm.reestimation import BatchNormStatistics, too_few_steps, trained_batch_norms
from kd.training.checkpoint import require_checkpoint_space, resume_state
from kd.training.learner import Learner
from kd.training.loop import Hooks, Run, fit, stop_message
from kd.training.optimization import create_optimizer
from kd.training.state import TrainState
from kd.training.transfer import Freeze, Start, freeze, layer_groups
from students.frontend import LogMel
from students.interface import Student
from students.weights import weights_fingerprint
from teacher_logits.computed_with import COMPUTED_WITH, what_bits_depend_on
from teacher_logits.processes import any_process, on_main_process
from teacher_logits.stores.ensemble import LogitEnsemble

NEW_INPUTS = ("labels", "validation_labels", "validation_audio", "audio", "impulse_responses", "start", "own_teacher")
"""Entries of "inputs" that the first versions did not record."""


@dataclass(frozen=True)
class TrainingData:
    """The training data of a run."""

    clips: Clips
    rows: np.ndarray
    """int64: the training clips."""
    label_space: LabelSpace
    teachers: LogitEnsemble | None = None
    impulse_responses: Sequence[np.ndarray] = ()

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of the data, independent of file locations. A run can only be continued with the same data."""
        teachers = self.teachers.describe() if self.teachers is not None else []
        return {
            "clips": self.clips.fingerprint,
            "audio": self.clips.content_fingerprint,
            "impulse_responses": digest_of(*(response.tobytes() for response in self.impulse_responses)),
            "rows": digest_of(self.rows.tobytes()),
            "teachers": [
                {"logits": teacher["fingerprint"], "weight": teacher["weight"], **told_link(self.teachers)}
                for teacher in teachers
            ],
        }


def start_fingerprint(start: Start, student: Student) -> str | None:
    """Digest of the trained weights that a student starts from, with its options; None for a student from scratch.

    ``student`` is the one that was made of ``start``: what was read counts, whatever the file holds by now.
    """
    if start.weights is None:
        return None
    return digest_of(json.dumps([start.name, as_json(start.options)], sort_keys=True), weights_fingerprint(student))


def known_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """The fingerprints that runs of older versions did not record, for which what is found now is taken."""
    return {"inputs": {name: inputs[name] for name in NEW_INPUTS if name in inputs}}


@dataclass(frozen=True)
class BuiltRun:
    """All parts of a run, built and checked for consistency. Nothing is written yet."""

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
    """Recomputes the statistics of the student's batch norms from training clips."""

    @property
    def own_teacher(self) -> str | None:
        """Fingerprint of a teacher that the objective has loaded itself; None without one."""
        return self.state.trained(self.accelerator).objective.teacher_fingerprint

    def tagger(self, student: nn.Module) -> Callable[[Tensor], Tensor]:
        """waveform (B, S) -> logits (B, C), of the student in evaluation mode."""
        student = student.to(self.accelerator.device).eval()
        return lambda waveform: student(self.frontend(waveform)).logits

    def renew_batch_norms(self, student: nn.Module, before_batch: Callable[[], None] = lambda: None) -> int:
        """Recomputes the student's batch-norm statistics if configured. Returns the number of clips used."""
        return self.statistics.renew(student, self.frontend, before_batch)

    def batch_norm_warning(self) -> str | None:
        """A warning for a run from scratch with too few steps for running statistics; None if there is no problem."""
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
        student: the initial student; it is trained in place.
        skipped: the list of bad clips that were replaced.
        layer_decay: ratio of each layer's learning rate to that of the next layer; None: one group with the same learning rate.

    Raises:
        ValueError: settings that do not fit together.
    """
    if config.sync_batch_norm and accelerator.num_processes > 1:
        from kd.training.batch_norm.synchronized import synchronize_batch_norms  # here, because timm is slow to import

        student = synchronize_batch_norms(student, accelerator.device)  # first, because on GPUs it replaces layers
    frozen_modules = freeze(student, frozen)
    groups = None if layer_decay is None else layer_groups(student, layer_decay)
    objective = build_objective(config, data, student.embedding_dim, seed)
    frontend = LogMel(config.frontend).to(accelerator.device)
    learner = Learner(student, objective, frozen_modules)
    ema = None
    if config.loop.ema_decay is not None:
        from timm.utils import ModelEmaV3  # here, because timm is slow to import

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
    """The training clips with the configured augmentation. Bad clips that are replaced are listed in ``skipped``."""
    replacements = None
    if config.on_bad_clip == "skip":
        has_labels = are_labelled(data.clips, data.rows)
        replacements = Replacements(data.rows, skipped, has_labels=None if has_labels.all() else has_labels)
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
        replacements=replacements,
    )


def build_objective(config: StageConfig, data: TrainingData, embedding_dim: int, seed: int) -> nn.Module:
    """The configured objective. If it has weights, they are drawn from ``seed``."""
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
        teacher_link=link_for(data.teachers, loss_space(data.label_space, config.loss)),
        options=config.options_of_objective,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return create_objective(config.objective, settings)


def class_weights_of(data: TrainingData, config: StageConfig) -> Tensor:
    """(C,): weights that balance the classes as if they were equally frequent in the training clips."""
    rows = data.rows[are_labelled(data.clips, data.rows)]
    targets, known = data.clips.targets(rows) > 0, data.clips.mask(rows)
    positives = torch.from_numpy((targets & known).sum(axis=0))
    negatives = torch.from_numpy((~targets & known).sum(axis=0))
    return torch.cat(
        [
            balanced_class_weights(group.exclusive, positives[columns], negatives[columns])
            for group, columns in loss_space(data.label_space, config.loss).parts()
        ]
    )


def training_loader(dataset: Dataset, batches: EpochBatches, workers: int, accelerator: Accelerator) -> DataLoader:
    """A loader of whole batches, not yet prepared by Accelerate. Its workers live as long as the loader."""
    on_gpu = accelerator.device.type == "cuda"
    return create_loader(dataset, batch_sampler=batches, workers=workers, on_gpu=on_gpu, persistent_workers=True)


# -- The run folder ----------------------------------------------------------------------------------------------------


def enter(
    accelerator: Accelerator,
    config: StageConfig,
    inputs: dict[str, Any],
    defaults: StageConfig,
    changes_nothing: Sequence[str],
    files: Sequence[TaskClips] = (),
    **more: Any,
) -> EnteredRun:
    """Enters the run folder on the main process, which must hold its lock, and prints its notes for the user.

    Args:
        inputs: fingerprints of the data.
        defaults: the stage's default configuration, for runs that an older version started.
        changes_nothing: settings that do not affect the result.
        files: the sources whose contents were taken down, to be remembered in the folder.
        more: additional arguments of ``enter_run_folder``.

    Raises:
        ValueError: the folder contains a run with other settings.
    """
    description = {
        **as_json(config),
        "processes": accelerator.num_processes,
        "inputs": inputs,
        COMPUTED_WITH: what_bits_depend_on(accelerator.device),
    }
    folder = on_main_process(
        accelerator,
        lambda: enter_run_folder(
            config.out,
            description,
            changes_nothing=(*changes_nothing, COMPUTED_WITH),
            accept_changes=config.accept_changes,
            restart=config.restart,
            defaults={**as_json(defaults), **known_inputs(inputs)},
            **more,
        ),
    )
    if accelerator.is_main_process and folder.state != "finished":
        remember_contents(files, config.out)
    for note in folder.notes:
        accelerator.print(note)
    if folder.state == "finished":
        accelerator.print(f"the run in {config.out} is already finished: nothing to do")
    return folder


# -- Training ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Progress:
    """Access to a running training, for its hooks."""

    run: Run
    log: MetricsLog
    stop_if_asked: Callable[[], None]
    """Raises Stopped on all processes if one of them was asked to stop."""


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
    """Trains a run to its end, starting from the newest checkpoint in its folder if there is one.

    Args:
        hooks: creates the stage's hooks for the training loop.
        where: prefix for messages about this run, such as "fold1: ".
        further_runs: number of runs that follow; there must be disk space for their checkpoints, too.
        before_training: called with whether the run resumes from a checkpoint.

    Raises:
        Stopped: on request, after the run was saved.
        ValueError: a loss that is not finite, or not enough disk space.
    """
    config, accelerator, state, batches = built.config, built.accelerator, built.state, built.batches
    make_folder(folder)
    run = Run(folder, config.loop, config.optimizer, config.schedule)
    log = MetricsLog(run.metrics_path, accelerator)
    require_checkpoint_space(accelerator, state, run.checkpoint_folder, config.loop.keep_checkpoints, further_runs)
    resumed = resume_state(accelerator, state, run.checkpoint_folder, log)
    if resumed:
        place = f"epoch {state.epoch}, step {state.step_in_epoch} of {batches.steps_per_epoch}"
        accelerator.print(f"{where}continuing at {place}" if where else f"continuing the run in {folder} at {place}")
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


# -- Provenance --------------------------------------------------------------------------------------------------------


def package_versions() -> dict[str, str]:
    """Versions of the packages that affect results."""
    return {name: version(name) for name in ("audio-kd", "torch", "torchaudio", "timm", "accelerate", "scikit-learn")}


def provenance(
    built: BuiltRun, as_configured: dict[str, Any], accepted_changes: list[Any], **more: Any
) -> dict[str, Any]:
    """The origin of a student's weights, for ``student.json``. ``more``: additional entries of the stage."""
    teachers, state = built.data.teachers, built.state
    return {
        "config": as_configured,
        "accepted_changes": accepted_changes,
        "clip_seconds": built.config.clip_seconds,
        "short_clips": built.config.short_clips,
        "clips": built.data.clips.fingerprint,
        "training_clips": {"labelled": len(built.batches.labelled), "unlabelled": len(built.batches.unlabelled)},
        "teachers": teachers.describe() if teachers is not None else [],
        "objective": built.config.objective,
        "link": link_of_space(loss_space(built.data.label_space, built.config.loss)).to_json(),
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "batch_norm_clips": built.statistics.num_clips,
        "epochs": state.epoch,
        "versions": package_versions(),
        **more,
    }
