"""One fold of a fine-tuning run: trains a student, or continues from its newest checkpoint, and predicts the test clips."""

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from audio_datasets.system.paths.contents import changed
from kd.data.splits import Partition
from kd.evaluation.predict import ClipEvaluator, drop_skipped
from kd.run_folder.config import as_json
from kd.run_folder.predictions import VALIDATION_FILE
from kd.stages.build_run import BuiltRun, Progress, TrainingData, build_run, describe_batch, provenance, train
from kd.stages.finetuning_setup import FinetuneSetup
from kd.stages.fold_results import fold_metrics, write_fold_predictions
from kd.training.early_stopping import EarlyStopping
from kd.training.loop import Hooks
from students.card import save_student
from students.interface import Student
from teacher_logits.teachers.run_ensemble import write_trained_on


def train_fold(
    setup: FinetuneSetup,
    folder: Path,
    part: Partition,
    seed: int,
    start: Student,
    accepted_changes: list[dict[str, Any]],
    further_runs: int = 0,
) -> np.ndarray:
    """Trains the student ``start`` on a fold and saves it; its logits (n, C) for the test clips of ``part``, NaN for skipped ones.

    There must be disk space for its checkpoints, and for those of ``further_runs`` after it.

    Raises:
        Stopped: on request, after the run was saved.
        ValueError: a loss that is not finite, or not enough disk space.
    """
    config, accelerator = setup.config, setup.accelerator
    rows = setup.training_rows(part)
    built = build_run(
        config,
        accelerator,
        TrainingData(setup.training_clips, rows, setup.label_space, setup.teachers, setup.impulse_responses),
        start,
        setup.batches(rows, seed),
        seed=seed,
        skipped=setup.skipped,
        frozen=config.freeze,
        layer_decay=config.layer_decay,
    )
    stopping = EarlyStopping(config.early_stopping, config.patience, folder, accelerator)
    valid = setup.evaluator(part.valid, "validate") if len(part.valid) else None
    progress = train(
        built,
        folder,
        setup.signals,
        lambda progress: hooks_of_fold(setup, built, part, valid, stopping, progress),
        where="" if folder == config.out else f"{folder.relative_to(config.out).as_posix()}: ",
        further_runs=further_runs,
    )
    best = built.state.evaluated_student(accelerator)
    setup.set_epoch(best, config.loop.epochs)
    stopping.load_best(best)
    if heard := built.renew_batch_norms(best, progress.stop_if_asked):
        accelerator.print(f"batch-norm statistics recomputed from {heard} training clips")
    if valid is not None:  # saved so that thresholds, for example, can be chosen on them
        logits = setup.predict(valid, built.tagger(best), progress.stop_if_asked)
        chosen_on, logits = drop_skipped(part.valid, logits, "validation")
        if accelerator.is_main_process:
            write_fold_predictions(folder / VALIDATION_FILE, setup.clips, part, chosen_on, logits)
    logits = np.empty((0, len(setup.clips.class_names)), dtype=np.float32)
    if len(part.test):
        logits = setup.predict(setup.evaluator(part.test, "test"), built.tagger(best), progress.stop_if_asked)
    if accelerator.is_main_process:
        about = {"task": setup.task.name, "licence_of_the_data": setup.task.licence}
        about |= {"seed": seed, "test_fold": part.fold, "label_groups": setup.label_space.to_json()}
        written = provenance(built, as_json(config), accepted_changes, **about)
        write_trained_on(folder, [built.data.clips.clip_id(int(row)) for row in built.batches.labelled])
        save_student(folder, best, setup.clips.class_names, config.frontend, written)
    return logits


def hooks_of_fold(
    setup: FinetuneSetup,
    built: BuiltRun,
    part: Partition,
    valid: ClipEvaluator | None,
    stopping: EarlyStopping,
    progress: Progress,
) -> Hooks:
    """What a fold adds to the training loop: validation, annealing and early stopping.

    Raises ValueError if the objective has loaded another teacher than for the folds before.
    """
    if built.own_teacher != setup.own_teacher:
        raise ValueError(changed("the objective's teacher", setup.config.options_of_objective.get("teacher")))
    log = progress.run.metrics_path

    def validate(evaluated: nn.Module) -> dict[str, Any]:
        setup.set_epoch(evaluated, setup.config.loop.epochs)  # evaluate it in the state in which it would be saved
        built.renew_batch_norms(evaluated, progress.stop_if_asked)
        logits = setup.predict(valid, built.tagger(evaluated), progress.stop_if_asked)
        rows, logits = drop_skipped(part.valid, logits, "validation")
        metrics = fold_metrics(setup.clips, part, rows, logits)
        stopping.keep_if_best(metrics, evaluated, log)
        return {name: value for name, value in metrics.items() if isinstance(value, float)}

    def before_epoch(epoch: int) -> None:
        if not setup.config.is_pretrained:
            built.state.start_epoch(setup.accelerator, epoch)

    return Hooks(
        validate=None if valid is None else validate,
        describe=describe_batch(built.data.clips),
        before_epoch=before_epoch,
        stop=lambda epochs: stopping.should_stop(log),
    )
