"""Trains a student on labels and teacher logits: ``accelerate launch kd/pretrain.py --clips … --logits … --out …``."""

import argparse
import json
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import Tensor, nn
from torch.utils.data import DataLoader

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import ClipList, OnBadClip, summary
from audio_datasets.stores.class_lists import check_same_classes, read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.joined import AnyClips, open_clips
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import digest_of
from audio_datasets.system.stop_signals import Stopped, StopSignals
from kd.data.sampling import EpochBatches, SamplingConfig
from kd.data.training_data import Replacements, TrainingClips
from kd.evaluation.metrics import tagging_metrics
from kd.evaluation.predict import evaluation_loader, predict_logits, skipped_clips
from kd.objectives.distillation import DistillationConfig, DistillationObjective
from kd.recipes.pretraining import GLOBAL_BATCH, RECIPES, RecipeName, recipe_for
from kd.training.building import (
    annealed_options,
    moving_average,
    package_versions,
    require_checkpoint_space,
    training_loader,
)
from kd.training.config import as_json, parse_options
from kd.training.dry_run import estimate
from kd.training.loop import (
    LoopConfig,
    OptimizerConfig,
    Run,
    TrainState,
    create_optimizer,
    evaluated_student,
    fit,
    resume_state,
    stop_message,
)
from kd.training.run_start import LOCK_FILE, SKIPPED_CLIPS_FILE, RunFolder, enter_run_folder
from kd.training.runlog import RunLog, check_trackers
from kd.training.schedule import ScheduleConfig, phases
from kd.training.sync_batch_norm import synchronize_batch_norms
from kd.training.threads import leave_a_core_to_the_workers
from students import create_student, load_weights
from students.catalog import default_options
from students.frontend import LogMel, LogMelConfig
from students.layers.blocks import Student
from students.weights import imagenet_architecture, load_imagenet_weights, save_student
from teacher_logits.processes import any_process, locked_by_main_process, on_main_process, start_accelerator
from teacher_logits.stores.ensemble import LogitEnsemble, MeanOf

Flat = tyro.conf.arg(name="")

GUIDE = """\
pretrain.py trains a student on a clip store and the logits of teachers. It needs:
  --clips clips.h5     audio and labels, made by: kd pack FOLDER_OR_MANIFEST --out clips.h5 (several count as one)
  --logits teacher.h5  teacher logits, made by:   kd teach --clips clips.h5 --teacher SPEC --out logits/
                       (or --label-weight 1 to train on labels alone)
  --out runs/NAME      a folder for checkpoints, metrics and the trained student
Settings of the papers: --recipe mn10, dymn_m …; what a run will take: --dry-run. All options: --help. No data at hand? `kd demo` (or `make demo`) runs every stage on synthetic sound scenes."""


@dataclass(frozen=True)
class PretrainConfig:
    """Train a student on labels and teacher logits."""

    clips: tuple[Path, ...]
    """Clip stores with the training clips; several count as one."""
    out: Path
    """Run folder to write."""
    logits: tuple[str, ...] = ()
    """Logit stores of the teachers, each PATH or PATH:WEIGHT (weight 0: takes no part); A.h5+B.h5 is one teacher's logits for
    clips in two stores."""
    ensemble: MeanOf = "logits"
    """What several teachers' weighted mean is taken of."""
    student: str = "mn10"
    """Name of the student in the catalog."""
    student_options: tuple[str, ...] = ()
    """Options of the student, each NAME=VALUE."""
    weights: str | None = None
    """Start from these weights: a file, or "imagenet" (MN of width 1 and the EfficientNets, from timm)."""
    split: str | None = None
    """Train on the clips of this split of the manifest only."""
    folds: tuple[int, ...] = ()
    """Train on the clips of these folds only."""
    valid_clips: Path | None = None
    """Clip store to validate on (the training store if left out and a validation split or folds are given)."""
    valid_split: str | None = None
    """Validate on the clips of this split."""
    valid_folds: tuple[int, ...] = ()
    """Validate on the clips of these folds."""
    class_names: Path | None = None
    """Class list for clip stores that carry none (the PaSST layout)."""
    missing_logits: Literal["refuse", "label-only", "leave-out"] = "refuse"
    """A training clip without teacher logits: stop, train it on its labels alone, or train without it."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops with its name; skip draws another in its place, and lists it."""
    views: Literal["own", "stored"] = "own"
    """Augmentation: this run's own, or the stored views that the teachers heard (kd teach --views)."""
    clip_seconds: float = 10.0
    """Length that training clips are cropped or padded to; with stored views, theirs."""
    seed: int = 0
    """Seed of everything random."""
    workers: int = 2
    """Data-loading processes for each training process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the student's forward pass."""
    sync_batch_norm: bool = False
    """Take batch-norm statistics over all processes."""
    accept_changes: bool = False
    """Go on with an unfinished or finished run although settings have changed that change its result."""
    restart: bool = False
    """Give up the run in the folder if it was begun with other settings, and begin again."""
    log_with: tuple[str, ...] = ()
    """Trackers of Accelerate to log to besides metrics.jsonl, as tensorboard."""
    loop: Annotated[LoopConfig, Flat] = field(default_factory=LoopConfig)
    optimizer: Annotated[OptimizerConfig, Flat] = field(default_factory=OptimizerConfig)
    schedule: Annotated[ScheduleConfig, Flat] = field(default_factory=ScheduleConfig)
    distillation: Annotated[DistillationConfig, Flat] = field(default_factory=DistillationConfig)
    sampling: Annotated[SamplingConfig, Flat] = field(default_factory=SamplingConfig)
    augment: Annotated[AugmentConfig, Flat] = field(default_factory=AugmentConfig)
    frontend: Annotated[LogMelConfig, Flat] = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        if not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be positive; found {self.clip_seconds}")
        if self.seed < 0 or self.workers < 0:
            raise ValueError(f"seed and workers must not be negative; found {self.seed} and {self.workers}")
        # A recipe on its own (and the command line's defaults) have no clips yet, and so no logits.
        has_clips = isinstance(self.clips, tuple) and len(self.clips) > 0
        if has_clips and not self.logits and self.distillation.label_weight < 1.0:
            raise ValueError(
                f"label_weight is {self.distillation.label_weight}, but no --logits are given; give teacher logits, or "
                "--label-weight 1 to train on labels alone"
            )
        if self.accept_changes and self.restart:
            raise ValueError(
                "--accept-changes goes on with the run in the folder and --restart gives it up; choose one"
            )
        if self.logits and self.distillation.label_weight == 1.0:
            raise ValueError("--logits would not be used with --label-weight 1; leave one of the two out")
        if self.views == "stored":
            if not self.logits:
                raise ValueError("--views stored shows the views that teachers heard, and needs their --logits")
            own = [name for name in ("gain_db", "roll_seconds") if getattr(self.augment, name)]
            own += ["crop"] if self.augment.crop != "start" else []
            if own:
                raise ValueError(
                    f"--views stored shows clips exactly as the teachers heard them; leave out {', '.join(own)}"
                )
        if self.loop.batch_size < 2 or (self.augment.mixup_alpha > 0 and self.loop.batch_size % 2):
            raise ValueError(
                f"batch_size must be at least 2 (batch normalisation), and even with mixup (clips are mixed in pairs); "
                f"found {self.loop.batch_size}"
            )


CHANGES_NOTHING = (
    *(
        "accept_changes",
        "restart",
        "on_bad_clip",
        "workers",
        "log_with",
        "out",
        "loop.keep_checkpoints",
        "loop.checkpoint_every_steps",
    ),
    *("clips", "valid_clips", "class_names", "logits"),  # what is in them counts, by their fingerprints
)
"""Settings that a run may go on with otherwise, since they do not change what is trained."""


def create_accelerator(config: PretrainConfig) -> Accelerator:
    """Accelerate as the run wants it; nothing is written yet."""
    torch.set_flush_denormal(True)
    check_trackers(config.log_with)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.loop.gradient_accumulation_steps),
        log_with=list(config.log_with) or None,
        project_config=ProjectConfiguration(project_dir=str(config.out), logging_dir=str(config.out / "trackers")),
    )
    leave_a_core_to_the_workers(accelerator)
    return accelerator


@dataclass(frozen=True)
class Training:
    """All that a run needs, built and checked against one another; nothing is written yet."""

    clips: AnyClips
    rows: np.ndarray
    """Of the training clips."""
    teachers: LogitEnsemble | None
    valid_clips: AnyClips | None
    valid_rows: np.ndarray | None
    batches: EpochBatches
    dataset: TrainingClips
    loader: DataLoader
    frontend: LogMel
    state: TrainState
    objective: DistillationObjective

    def fingerprints(self) -> dict[str, Any]:
        """What the data are, wherever their files lie; a run goes on with the same only."""
        validation = None
        if self.valid_clips is not None:
            validation = {"clips": self.valid_clips.fingerprint, "rows": digest_of(self.valid_rows.tobytes())}
        teachers = self.teachers.describe() if self.teachers is not None else []
        return {
            "clips": self.clips.fingerprint,
            "rows": digest_of(self.rows.tobytes()),
            "teachers": [{"logits": teacher["fingerprint"], "weight": teacher["weight"]} for teacher in teachers],
            "validation": validation,
        }


def prepare(config: PretrainConfig, accelerator: Accelerator) -> Training:
    """Opens the data and builds student, optimizer, loader and objective.

    Raises:
        ValueError: data, weights or settings that do not fit together.
    """
    clips, rows, teachers = open_training_data(config, accelerator)
    valid_clips, valid_rows = open_validation_data(config, clips)
    batches = EpochBatches(
        clips,
        rows,
        config.sampling,
        batch_size=config.loop.batch_size,
        batches_per_step=accelerator.num_processes * config.loop.gradient_accumulation_steps,
        seed=config.seed,
    )
    student = build_student(config, batches.class_counts / len(rows))
    if config.sync_batch_norm and accelerator.num_processes > 1:
        student = synchronize_batch_norms(student, accelerator.device)

    frontend = LogMel(config.frontend).to(accelerator.device)
    ema = moving_average(student, config.loop, accelerator)
    skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
    dataset = TrainingClips(
        clips,
        teachers,
        frontend=config.frontend,
        clip_seconds=config.clip_seconds,
        augment=config.augment,
        seed=config.seed,
        views=teachers.views if teachers and config.views == "stored" else None,
        replacements=Replacements(rows, skipped) if config.on_bad_clip == "skip" else None,
    )
    loader = training_loader(dataset, batches, config.workers, accelerator)
    student, optimizer, loader = accelerator.prepare(student, create_optimizer(student, config.optimizer), loader)
    return Training(
        clips,
        rows,
        teachers,
        valid_clips,
        valid_rows,
        batches,
        dataset,
        loader,
        frontend,
        TrainState(student, optimizer, ema),
        DistillationObjective(frontend, config.distillation),
    )


def pretrain(config: PretrainConfig, command: str = "") -> Path:
    """Runs the training described by ``config``, or goes on with it, and returns the run folder.

    The folder then holds ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and ``student.safetensors`` with
    ``student.json``, which tells the ``command`` that was given.

    Raises:
        ValueError: data, weights or settings that do not fit together, a run folder with another run in it or in use by
            another process, or a loss that is not finite.
        Stopped: SIGTERM or SIGUSR1 came; the run is saved.
    """
    accelerator = create_accelerator(config)
    training = prepare(config, accelerator)
    description = {**as_json(config), "processes": accelerator.num_processes, "inputs": training.fingerprints()}
    with StopSignals() as signals, locked_by_main_process(accelerator, config.out / LOCK_FILE, str(config.out)):
        folder = on_main_process(
            accelerator,
            lambda: enter_run_folder(
                config.out,
                description,
                changes_nothing=CHANGES_NOTHING,
                accept_changes=config.accept_changes,
                restart=config.restart,
            ),
        )
        for note in folder.notes:
            accelerator.print(note)
        if folder.state == "finished":
            accelerator.print(f"the run in {config.out} is finished already: nothing to do")
            return config.out
        train(config, accelerator, training, signals)
        if accelerator.is_main_process:
            save_student(
                config.out,
                evaluated_student(training.state, accelerator),
                training.clips.class_names,
                config.frontend,
                provenance(config, folder, training, command),
            )
            folder.finish()
        accelerator.end_training()
    accelerator.print(f"student written to {config.out}")
    return config.out


def train(config: PretrainConfig, accelerator: Accelerator, training: Training, signals: StopSignals) -> None:
    """Trains from the newest checkpoint in the run folder, or from the start, to the end; raises as ``fit`` does."""
    clips, state, batches = training.clips, training.state, training.batches
    run = Run(config.out, config.loop, config.optimizer, config.schedule)
    log = RunLog(run.metrics_path, accelerator)
    skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
    require_checkpoint_space(accelerator, state, run)
    if resume_state(accelerator, state, run, log):
        place = f"epoch {state.epoch}, step {state.step_in_epoch} of {batches.steps_per_epoch}"
        accelerator.print(f"going on with the run in {config.out} at {place}")
    elif accelerator.is_main_process:
        skipped.replace({})  # of a run that was given up
    if config.log_with:
        accelerator.init_trackers("audio-kd", config=flat_values(as_json(config)))

    def stop_if_asked() -> None:
        if any_process(accelerator, signals.requested)[0]:
            raise Stopped(stop_message(signals, state, run))

    validate = None
    if training.valid_clips is not None:
        valid_rows = training.valid_rows
        valid_loader = evaluation_loader(
            accelerator,
            training.valid_clips,
            valid_rows,
            sample_rate_hz=config.frontend.sample_rate_hz,
            clip_seconds=config.clip_seconds,
            batch_size=config.loop.batch_size,
            workers=config.workers,
            on_bad_clip=config.on_bad_clip,
        )
        valid_targets = training.valid_clips.targets(valid_rows)

        def validate(evaluated: nn.Module) -> dict[str, Any]:
            evaluated.eval()
            logits = predict_logits(
                accelerator,
                lambda waveform: evaluated(training.frontend(waveform)).logits,
                valid_loader,
                len(valid_rows),
                "validate",
                stop_if_asked,
            )
            heard = ~np.isnan(logits).any(axis=1)
            if accelerator.is_main_process:
                for clip_id, reason in skipped_clips(valid_loader, logits).items():
                    skipped.add(clip_id, reason)
            metrics = tagging_metrics(valid_targets[heard], logits[heard], clips.class_names)
            return {**metrics.summary(), "classes_left_out": list(metrics.absent_classes)}

    def describe(batch: dict[str, Tensor]) -> str:
        return f"Clips of the batch: {', '.join(clips.clip_id(row) for row in batch['row'].tolist())}"

    def before_epoch(epoch: int) -> None:
        accelerator.unwrap_model(state.student).start_epoch(epoch)
        if state.ema is not None:
            state.ema.module.start_epoch(epoch)

    try:
        fit(
            accelerator, state, training.objective, batches, training.loader, run, log, validate, describe, before_epoch,
            signals=signals,
        )  # fmt: skip
    except Stopped:
        accelerator.end_training()
        raise
    if accelerator.is_main_process and (bad_clips := skipped.read()):
        skipped.replace(dict(sorted(bad_clips.items())))
        print(f"{summary(bad_clips, len(training.rows), 'skipped')}; all are listed in {skipped.path}")


def open_training_data(
    config: PretrainConfig, accelerator: Accelerator
) -> tuple[AnyClips, np.ndarray, LogitEnsemble | None]:
    """The training clips, the rows to train on, and the teachers, checked against one another."""
    class_names = read_class_names(config.class_names) if config.class_names else None
    clips = open_clips(config.clips, class_names)
    rows = select_rows(clips, split=config.split, folds=config.folds or None)
    if not config.logits:
        return clips, rows, None
    teachers = LogitEnsemble.open(config.logits, config.ensemble)
    check_views(config, teachers)
    missing = teachers.check_against(clips, rows)
    if missing.any():
        examples = ", ".join(clips.clip_id(int(row)) for row in rows[missing][:3])
        found = f"{int(missing.sum())} of {len(rows)} training clips have no teacher logits (as {examples})"
        if config.missing_logits == "refuse":
            raise ValueError(
                f"{found}; run the teacher over them, train them on their labels with --missing-logits label-only, or train "
                "without them with --missing-logits leave-out"
            )
        if config.missing_logits == "leave-out":
            accelerator.print(f"{found}; they are left out")
            return clips, rows[~missing], teachers
        accelerator.print(f"{found}; they are trained on their labels alone")
    return clips, rows, teachers


def check_views(config: PretrainConfig, teachers: LogitEnsemble) -> None:
    """Raises ValueError unless the teachers heard what the run will show its student."""
    views = teachers.views
    if config.views == "own":
        if views is not None:
            raise ValueError(
                f"{teachers.taking_part[0].path} holds the logits of {views.views} views of each clip; show these to the student "
                "with --views stored, or run the teacher over the clips as they are"
            )
        return
    if views is None:
        raise ValueError(
            f"{teachers.taking_part[0].path} holds the logits of whole clips and of no views; make some with kd teach --views"
        )
    if config.clip_seconds != views.view_seconds:
        raise ValueError(
            f"the stored views are {views.view_seconds:g} s long; give --clip-seconds {views.view_seconds:g} "
            f"(found {config.clip_seconds:g})"
        )
    frontends = [
        LogMelConfig.from_dict(store.teacher["frontend"]) for store in teachers.taking_part if views.view_mel_jitter
    ]
    if any(frontend != config.frontend for frontend in frontends):
        raise ValueError(
            "the teachers heard views with jittered mel bands in a front end with other settings than the student's; "
            "use the same settings, or make views without --view-mel-jitter"
        )


def open_validation_data(config: PretrainConfig, clips: AnyClips) -> tuple[AnyClips | None, np.ndarray | None]:
    """The clip store and rows to validate on; (None, None) if the configuration names none."""
    if config.valid_clips is None and config.valid_split is None and not config.valid_folds:
        return None, None
    store = clips
    if config.valid_clips is not None:
        store = ClipStore.open(config.valid_clips, class_names=clips.class_names)
        check_same_classes(clips.class_names, store.class_names, str(clips.path), str(config.valid_clips))
    return store, select_rows(store, split=config.valid_split, folds=config.valid_folds or None)


def build_student(config: PretrainConfig, class_frequencies: np.ndarray) -> Student:
    """A student initialised from the run's seed, or from ``config.weights``.

    Where the layer that gives the classes is a fresh one, it begins at their frequencies in the training clips.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        student = create_student(config.student, len(class_frequencies), **student_options(config))
        if config.weights == "imagenet":
            import timm

            network = timm.create_model(imagenet_architecture(student), pretrained=True)
            load_imagenet_weights(student, network.state_dict())
        elif config.weights is not None:
            load_weights(student, config.weights)
    if config.weights in (None, "imagenet"):
        student.set_class_prior(torch.from_numpy(class_frequencies))
    return student


def student_options(config: PretrainConfig) -> dict[str, Any]:
    """The options that the student is built with: those given, and those that follow from the rest of the configuration.

    Raises:
        ValueError: an unknown student, an option given twice or without a value, or annealing that does not end in time.
    """
    options = parse_options(config.student_options)
    defaults = default_options(config.student)
    if "n_mels" in defaults:
        options.setdefault("n_mels", config.frontend.n_mels)
    return annealed_options(options, defaults, config.loop.epochs)


def provenance(config: PretrainConfig, folder: RunFolder, training: Training, command: str) -> dict[str, Any]:
    """What ``student.json`` tells of how the weights came about."""
    teachers, state = training.teachers, training.state
    return {
        "command": command,
        "config": as_json(config),
        "accepted_changes": folder.description.get("accepted_changes", []),
        "clip_seconds": config.clip_seconds,
        "clips": training.clips.fingerprint,
        "teachers": teachers.describe() if teachers is not None else [],
        "steps": state.step,
        "skipped_steps": state.skipped_steps,
        "epochs": state.epoch,
        "versions": package_versions(),
    }


def flat_values(values: dict[str, Any], prefix: str = "") -> dict[str, int | float | str | bool]:
    """A nested configuration as one level of names and numbers, which is what trackers take."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flat_values(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat


# -- Command -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PretrainCommand:
    """Train a student on labels and teacher logits."""

    config: Annotated[PretrainConfig, Flat]
    recipe: RecipeName | None = None
    """Take a paper's settings in place of the defaults below; what is given on the command line overrides them."""
    dry_run: bool = False
    """Print the whole configuration as JSON, with what the run will take (steps, hours, memory, disk) by a few measured
    steps, and write nothing. Without --clips: the configuration alone."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(GUIDE, file=sys.stderr)
        return 2
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    command = parse(PretrainCommand, arguments, "kd pretrain", default=_defaults(arguments))
    config = command.config
    if command.recipe is not None and int(os.environ.get("RANK", "0")) == 0:
        clips = config.loop.batch_size * config.loop.gradient_accumulation_steps * processes_of_this_run()
        if clips != GLOBAL_BATCH:
            print(
                f"recipe {command.recipe}: a step has {clips} clips here, {GLOBAL_BATCH} in the paper", file=sys.stderr
            )
    if command.dry_run:
        dry_run(config)
    else:
        pretrain(config, shlex.join(["kd", "pretrain", *arguments]))


def _defaults(arguments: Sequence[str]) -> PretrainCommand:
    """What holds where the command line is silent: the recipe's settings, if it names one."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    early.add_argument("--dry-run", "--dry_run", action="store_true")
    early.add_argument("--clips")
    given, _ = early.parse_known_args(arguments)
    settings: dict[str, Any] = {}
    if given.recipe in RECIPES:  # another name is refused with all of the command line
        settings = recipe_for(given.recipe, processes_of_this_run()).settings()
    if given.dry_run and given.clips is None:
        return PretrainCommand(PretrainConfig(clips=(), out=Path("runs"), **settings))
    return PretrainCommand(PretrainConfig(clips=tyro.MISSING, out=tyro.MISSING, **settings))


def processes_of_this_run() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def dry_run(config: PretrainConfig) -> None:
    """Prints the configuration and what a run with it will take, as JSON on standard output; all else goes to standard error.

    Raises:
        ValueError: what ``pretrain`` would raise before its first step.
    """
    result: dict[str, Any] = {
        "config": as_json(config),
        "student_options": default_options(config.student) | student_options(config),
        "schedule": phases(config.schedule, config.loop.epochs)._asdict(),
    }
    accelerator = None
    with redirect_stdout(sys.stderr):
        if config.clips:
            accelerator = create_accelerator(config)
            result["estimate"] = estimate(config, prepare(config, accelerator), accelerator)
    if accelerator is None or accelerator.is_main_process:
        print(json.dumps(result, indent=2, ensure_ascii=False))
    if accelerator is not None:
        accelerator.end_training()


if __name__ == "__main__":
    raise SystemExit(main())
