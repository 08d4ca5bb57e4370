"""Pretraining: a student on a clip store and the logits of teachers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration
from torch import nn

from audio_datasets.audio.bad_clips import ClipList, summary
from audio_datasets.stores.class_lists import check_same_classes, read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.joined import AnyClips, open_clips
from audio_datasets.stores.manifest import heard_of, select_rows
from audio_datasets.system.files import digest_of
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.tasks.task import TaskClips
from kd.data.sampling import EpochBatches, class_frequencies, labelled_rows
from kd.data.unlabelled import open_sources, with_unlabelled
from kd.data.windows import Window
from kd.evaluation.label_metrics import label_metrics
from kd.evaluation.predict import ClipEvaluator
from kd.run_folder.config import as_json, flat_values, parse_options
from kd.run_folder.metrics_log import check_trackers
from kd.run_folder.seen_files import take_down_contents
from kd.run_folder.start import LOCK_FILE, SKIPPED_CLIPS_FILE, EnteredRun, check_run_folder
from kd.stages.build_run import (
    BuiltRun,
    Progress,
    TrainingData,
    build_run,
    describe_batch,
    enter,
    provenance,
    start_fingerprint,
    train,
)
from kd.stages.pretraining_config import CHANGES_NOTHING, PretrainConfig
from kd.stages.teachers import open_teachers, training_rows
from kd.training.loop import Hooks
from kd.training.threads import leave_a_core_to_the_workers
from kd.training.transfer import Start, starting_student
from students.card import save_student
from students.catalog import options_for
from teacher_logits.processes import locked_by_main_process, start_accelerator
from teacher_logits.teachers.run_ensemble import write_trained_on

LABELS_AT_ONCE = 16384
"""Clips whose labels are in memory together."""


@dataclass(frozen=True)
class Pretraining:
    """A pretraining run, ready to start, with its validation clips."""

    built: BuiltRun
    valid_clips: AnyClips | None
    valid_rows: np.ndarray | None
    start: str | None = None
    """Fingerprint of the weights that the student starts from; None from scratch."""
    files: Sequence[TaskClips] = ()
    """The sources that are files of their own, and not stores."""

    def fingerprints(self) -> dict[str, Any]:
        """Fingerprints of the data, independent of file locations. A run can only be continued with the same data."""
        validation = None
        if self.valid_clips is not None:
            validation = {"clips": self.valid_clips.fingerprint, "rows": digest_of(self.valid_rows.tobytes())}
        data, valid = self.built.data, self.valid_clips
        found = {**data.fingerprints(), "labels": labels_digest(data.clips, data.rows), "validation": validation}
        if valid is not None:  # a store's own fingerprint leaves labels out
            found["validation_labels"] = labels_digest(valid, self.valid_rows)
            found["validation_audio"] = valid.content_fingerprint
        return {**found, "start": self.start, "own_teacher": self.built.own_teacher}

    def evaluator(self, description: str = "validate") -> ClipEvaluator | None:
        """An evaluator of the validation clips; None if there are none."""
        if self.valid_clips is None:
            return None
        config = self.built.config
        return ClipEvaluator(
            self.built.accelerator,
            self.valid_clips,
            self.valid_rows,
            Window(config.frontend.sample_rate_hz, config.clip_seconds, config.short_clips),
            batch_size=config.loop.batch_size,
            workers=config.workers,
            description=description,
            on_bad_clip=config.on_bad_clip,
        )


def labels_digest(clips: AnyClips, rows: np.ndarray) -> str:
    """Digest of the targets of these clips and of which of them are known, 32 hexadecimal digits."""
    parts = []
    for start in range(0, len(rows), LABELS_AT_ONCE):
        some = rows[start : start + LABELS_AT_ONCE]
        targets, unknown = clips.targets(some), ~clips.mask(some)
        places = np.flatnonzero(targets)
        parts.append(digest_of(places.tobytes(), targets.ravel()[places].tobytes(), np.flatnonzero(unknown).tobytes()))
    return digest_of(*parts)


def create_accelerator(config: PretrainConfig) -> Accelerator:
    """Accelerate, configured for the run. Writes nothing yet."""
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


def prepare(config: PretrainConfig, accelerator: Accelerator) -> Pretraining:
    """Opens the data and builds the run.

    Raises:
        ValueError: data, weights or settings that do not fit together.
    """
    class_names = read_class_names(config.class_names) if config.class_names else None
    labelled = open_clips(config.clips, class_names)
    rows = select_rows(labelled, split=config.split, folds=config.folds or None)
    sources = open_sources(config.unlabelled, labelled.class_names)
    files = take_down_contents(accelerator, sources, config.out)
    clips = with_unlabelled(labelled, sources, accelerator.print)
    if config.unlabelled:
        rows = np.concatenate([rows, clips.further_rows])
    teachers = open_teachers(config)
    rows = training_rows(config, teachers, clips, rows, accelerator.print)
    data = TrainingData(clips, rows, clips.label_space, teachers, config.impulse_responses())
    name_what_is_left_out(config, rows[rows < len(labelled)], accelerator)
    valid_clips, valid_rows = open_validation_data(config, labelled, accelerator.print)
    batches = EpochBatches(
        clips,
        rows,
        config.sampling,
        batch_size=config.loop.batch_size,
        batches_per_step=accelerator.num_processes * config.loop.gradient_accumulation_steps,
        seed=config.seed,
        pairs=config.augment.in_pairs,
    )
    for note in batches.notes:
        accelerator.print(note)
    start = Start(config.student, student_options(config), config.weights)
    student = starting_student(
        start,
        clips.class_names,
        config.frontend,
        seed=config.seed,
        prior=class_frequencies(clips, rows),  # a fresh last layer starts at the class frequencies
        keep_classes=True,
    )
    skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
    started = start_fingerprint(start, student)
    built = build_run(config, accelerator, data, student, batches, seed=config.seed, skipped=skipped)
    return Pretraining(built, valid_clips, valid_rows, started, files)


def name_what_is_left_out(config: PretrainConfig, rows: np.ndarray, accelerator: Accelerator) -> None:
    """Prints how much of the training clips is never heard."""
    if config.augment.crop == "random" or config.views == "stored":  # any part is heard at some time
        return
    if left_out := str(heard_of(config.clips, config.clip_seconds, rows)):
        accelerator.print(f"training hears only the first {config.clip_seconds:g} s of each clip: {left_out}")


def open_validation_data(
    config: PretrainConfig, clips: AnyClips, say: Callable[[str], None]
) -> tuple[AnyClips | None, np.ndarray | None]:
    """The clip store and the labelled rows to validate on; (None, None) if the configuration names none."""
    if config.valid_clips is None and config.valid_split is None and not config.valid_folds:
        return None, None
    store = clips
    if config.valid_clips is not None:
        store = ClipStore.open(config.valid_clips, class_names=clips.class_names)
        check_same_classes(clips.class_names, store.class_names, str(clips.path), str(config.valid_clips))
    rows = select_rows(store, split=config.valid_split, folds=config.valid_folds or None)
    rows, without = labelled_rows(store, rows)
    if without:
        say(f"{without} of {len(rows) + without} validation clips have no labels and are left out")
    return store, rows


def student_options(config: PretrainConfig) -> dict[str, Any]:
    """The options of the student: those given, and those that follow from the rest of the configuration.

    Raises:
        ValueError: an unknown student, an option given twice or without a value, or annealing that does not end in time.
    """
    return options_for(config.student, parse_options(config.student_options), config.frontend, config.loop.epochs)


def pretrain(config: PretrainConfig, command: str = "") -> Path:
    """Runs the training described by ``config``, or continues it, and returns the run folder.

    The folder then contains ``config.json``, ``metrics.jsonl``, ``checkpoints/`` and ``student.safetensors`` with
    ``student.json``, which records the ``command``.

    Raises:
        ValueError: data, weights or settings that do not fit together, a run folder that contains another run or is in use by
            another process, or a loss that is not finite.
        Stopped: on SIGTERM, SIGUSR1 or SIGHUP, after the run was saved.
    """
    check_run_folder(config, config.out)
    accelerator = create_accelerator(config)
    stage = prepare(config, accelerator)
    with StopSignals() as signals, locked_by_main_process(accelerator, config.out / LOCK_FILE, str(config.out)):
        defaults = PretrainConfig(clips=(), out=Path("runs"))
        folder = enter(accelerator, config, stage.fingerprints(), defaults, CHANGES_NOTHING, files=stage.files)
        if folder.state == "finished":
            return config.out
        train_student(stage, config, signals)
        if accelerator.is_main_process:
            save_result(stage.built, config, folder, command)
        accelerator.end_training()
    accelerator.print(f"student written to {config.out}")
    return config.out


def train_student(stage: Pretraining, config: PretrainConfig, signals: StopSignals) -> None:
    """Trains to the end. Raises the same errors as ``build_run.train``."""
    built = stage.built
    accelerator, state = built.accelerator, built.state
    skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)

    def before_training(resumed: bool) -> None:
        if not resumed and accelerator.is_main_process:
            skipped.replace({})  # may still list clips of a discarded run
        if config.log_with:
            accelerator.init_trackers("audio-kd", config=flat_values(as_json(config)))

    def hooks(progress: Progress) -> Hooks:
        evaluator = stage.evaluator()

        def validate(student: nn.Module) -> dict[str, Any]:
            built.renew_batch_norms(student, progress.stop_if_asked)
            logits = evaluator.predict(built.tagger(student), progress.stop_if_asked)
            if accelerator.is_main_process:
                for clip_id, reason in evaluator.skipped.items():
                    skipped.add(clip_id, reason)
            return validation_metrics(stage, logits)

        return Hooks(
            validate=None if evaluator is None else validate,
            describe=describe_batch(built.data.clips),
            before_epoch=lambda epoch: state.start_epoch(accelerator, epoch),
        )

    try:
        progress = train(built, config.out, signals, hooks, before_training=before_training)
        if heard := built.renew_batch_norms(state.evaluated_student(accelerator), progress.stop_if_asked):
            accelerator.print(f"batch-norm statistics recomputed from {heard} training clips")
    except Stopped:
        accelerator.end_training()
        raise
    if accelerator.is_main_process and (bad_clips := skipped.read()):
        skipped.replace(dict(sorted(bad_clips.items())))
        print(f"{summary(bad_clips, len(built.data.rows), 'skipped')}; all are listed in {skipped.path}")


def validation_metrics(stage: Pretraining, logits: np.ndarray) -> dict[str, Any]:
    """The values to log for a validation: the metrics of the label space, and the classes that they leave out."""
    heard = ~np.isnan(logits).any(axis=1)
    rows, label_space = stage.valid_rows[heard], stage.built.data.label_space
    found = label_metrics(label_space, stage.valid_clips.targets(rows), stage.valid_clips.mask(rows), logits[heard])
    absent = [name for key, names in found.items() if key.rpartition("/")[2] == "absent" for name in names]
    numbers = {name: value for name, value in found.items() if value is None or isinstance(value, float)}
    return {**numbers, "classes_left_out": absent}


def save_result(built: BuiltRun, config: PretrainConfig, folder: EnteredRun, command: str) -> None:
    """Writes the trained student and marks the run as finished."""
    write_trained_on(config.out, [built.data.clips.clip_id(int(row)) for row in built.batches.labelled])
    accepted = folder.description.get("accepted_changes", [])
    save_student(
        config.out,
        built.state.evaluated_student(built.accelerator),
        built.data.clips.class_names,
        config.frontend,
        {"command": command, **provenance(built, as_json(config), accepted)},
    )
    folder.finish()
