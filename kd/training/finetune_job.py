"""One fine-tuning call: its task's clips, what its students start from, and a student for each fold and seed."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from audio_datasets.audio.bad_clips import ClipList, summary
from audio_datasets.audio.impulse_responses import load_impulse_responses
from audio_datasets.system.files import digest_of, make_folder, read_json, write_json
from audio_datasets.system.messages import listed
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.tasks.cache import CachedClips, fill_cache
from audio_datasets.tasks.task import Task, TaskClips
from kd.data.finetune_data import Hearing, TaskExamples, equal_batches
from kd.data.sampling import EpochBatches
from kd.data.splits import Partition
from kd.data.training_data import Replacements
from kd.evaluation.finetune_results import (
    PREDICTIONS_FILE,
    RESULT_FILE,
    VALIDATION_FILE,
    headline,
    metrics_of,
    write_predictions,
    write_results,
)
from kd.evaluation.probe import probe_logits
from kd.evaluation.task_evaluation import ClipEvaluator
from kd.objectives.finetune_objective import FinetuneObjective, balanced_weights
from kd.training.building import (
    annealed_options,
    moving_average,
    package_versions,
    require_checkpoint_space,
    training_loader,
)
from kd.training.config import as_json, parse_options
from kd.training.early_stopping import EarlyStopping
from kd.training.finetune_config import FinetuneConfig, is_exclusive
from kd.training.loop import Run, TrainState, create_optimizer, evaluated_student, fit, resume_state, stop_message
from kd.training.run_start import SKIPPED_CLIPS_FILE, RunFolder
from kd.training.runlog import RunLog
from kd.training.transfer import Start, freeze, layer_groups, start_from_run, starting_student
from students.frontend import LogMel
from students.layers.blocks import Student
from students.weights import save_student
from teacher_logits.processes import any_process, on_main_process
from teacher_logits.store import LogitEnsemble
from teacher_logits.teachers.passt import catalog_of


def folder_name(part: Partition, seeds: Sequence[int], seed: int) -> str:
    """Where one run lies in the whole: ``fold1``, ``seed0/fold1`` with several seeds, ``seed0``, or the folder itself."""
    names = [f"seed{seed}"] if len(seeds) > 1 else []
    return "/".join(names if part.fold is None else [*names, f"fold{part.fold}"]) or "."


class Job:
    """What the runs of one call share: the task's clips, what the student starts from, the teachers, the devices."""

    def __init__(
        self, config: FinetuneConfig, task: Task, clips: TaskClips, accelerator: Accelerator, signals: StopSignals
    ) -> None:
        self.config = config
        self.task = task
        self.clips = clips
        self.accelerator = accelerator
        self.signals = signals
        self.skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
        self.accepted_changes: list[dict[str, Any]] = []
        self.exclusive = is_exclusive(task, clips)
        self.hearing = Hearing(config.frontend.sample_rate_hz, config.clip_seconds, config.short_clips)
        self.frontend = LogMel(config.frontend).to(accelerator.device)
        self.start = read_start(config)
        self._students: dict[int, Student] = {}
        self.teachers = LogitEnsemble.open(config.logits) if config.logits else None
        self.impulse_responses = ()
        if config.task_augment.impulse_responses is not None:
            self.impulse_responses = load_impulse_responses(
                config.task_augment.impulse_responses, config.frontend.sample_rate_hz
            )

    def starting_student(self, seed: int) -> Student:
        """A student as it starts, the same for every fold."""
        if seed not in self._students:
            self._students[seed] = starting_student(
                self.start, self.clips.class_names, self.config.frontend, seed=seed, loss=self.config.loss.loss
            )
        return copy.deepcopy(self._students[seed])

    def evaluator(self, rows: np.ndarray, description: str) -> ClipEvaluator:
        return ClipEvaluator(
            self.accelerator,
            self.clips,
            rows,
            self.hearing,
            self.frontend,
            batch_size=self.config.eval_batch_size,
            workers=self.config.workers,
            description=description,
            skipped=self.skipped if self.config.on_bad_clip == "skip" else None,
        )

    def read_from_cache(self, folder: Path) -> None:
        """From now on waveforms come from a cache, which the main process fills if need be."""
        rate = self.config.frontend.sample_rate_hz

        def stop() -> None:
            if self.signals.requested:
                raise Stopped(f"{self.signals.reason} came; the same command decodes the clips into {folder} again")

        on_main_process(
            self.accelerator, lambda: fill_cache(self.clips, folder, rate, self.config.on_bad_clip, before_clip=stop)
        )
        self.clips = CachedClips(self.clips, folder, rate)

    def fingerprints(self, every_part: Sequence[Partition]) -> dict[str, Any]:
        """What the data are, wherever their files lie; a run goes on with the same only.

        ``every_part`` are the partitions of all folds, also of those that this call does not run.
        """
        rows = [rows.tobytes() for part in every_part for rows in (part.train, part.valid, part.test)]
        teachers = self.teachers.describe() if self.teachers is not None else []
        batches = [self.batches(part, self.config.seeds[0]) for part in every_part]
        return {
            "clips": self.clips.fingerprint,
            "partitions": digest_of(*rows),
            "clips_per_step": [one.batch_size * one.batches_per_step for one in batches],
            "teachers": [{"logits": teacher["fingerprint"], "weight": teacher["weight"]} for teacher in teachers],
            "rounded_to_16_bits": self.config.cache is not None,
        }

    def results(self, parts: Sequence[Partition]) -> list[str]:
        """The files that show that all is done, relative to the run folder."""
        names = ["probe/results.json"] if self.config.probe or self.config.probe_only else []
        if not self.config.probe_only:
            names += [f"{folder_name(part, self.config.seeds, seed)}/{RESULT_FILE}" for seed, part in self.runs(parts)]
            names += ["results.json", *(["report.html", "report.md"] if self.config.report else [])]
        return names

    def runs(self, parts: Sequence[Partition]) -> list[tuple[int, Partition]]:
        """Seed and partition of each run, in their order."""
        return [(seed, part) for seed in self.config.seeds for part in parts]

    def run(self, parts: Sequence[Partition], entered: RunFolder, command: str) -> None:
        """Everything that the call asks for and that is not there yet; raises as ``train`` does."""
        self.accepted_changes = entered.description.get("accepted_changes", [])
        if self.config.probe or self.config.probe_only:
            self.probe(parts, command)
        if not self.config.probe_only:
            self.train_all(parts, command)
        if self.accelerator.is_main_process and (bad_clips := self.skipped.read()):
            self.skipped.replace(dict(sorted(bad_clips.items())))
            print(f"{summary(bad_clips, len(self.clips), 'skipped')}; all are listed in {self.skipped.path}")

    def train_all(self, parts: Sequence[Partition], command: str) -> None:
        """The runs of all seeds and ``parts``, without those that are finished, and the results of all."""
        asked_for = self.runs(parts)
        folders = [self.config.out / folder_name(part, self.config.seeds, seed) for seed, part in asked_for]
        runs = [self.finished(folder) for folder in folders]
        for index, (seed, part) in enumerate(asked_for):
            if runs[index] is None:
                runs[index] = self.train(folders[index], part, seed, further_runs=runs.count(None) - 1)
        self.summarize(self.config.out, runs, command, "fine-tuned")

    def finished(self, folder: Path) -> dict[str, Any] | None:
        """A run's result; None if it has none, or one from before changes that were accepted since, and so goes on."""
        if not (folder / RESULT_FILE).exists():
            return None
        result = read_json(folder / RESULT_FILE)
        return result if result.get("accepted_changes", 0) == len(self.accepted_changes) else None

    def stop_if_asked(self, message: Callable[[], str]) -> None:
        """Stopped, on all processes alike, if a signal came to one of them."""
        if any_process(self.accelerator, self.signals.requested)[0]:
            raise Stopped(message())

    def probe(self, parts: Sequence[Partition], command: str) -> None:
        """Fits the linear probe for each of ``parts`` and leaves its results in ``probe/``."""
        seed, folder = self.config.seeds[0], self.config.out / "probe"

        def stop_if_asked() -> None:
            self.stop_if_asked(
                lambda: (
                    f"{self.signals.reason or 'a signal to another process'} came in the linear probe, which the same command "
                    "does again"
                )
            )

        folders = [folder / folder_name(part, [seed], seed) for part in parts]
        runs = [self.finished(place) for place in folders]
        if not all(runs):
            embeddings = self.evaluator(np.arange(len(self.clips)), "embed").predict(
                self.starting_student(seed),
                lambda output: output.embedding,
                before_batch=stop_if_asked,
            )
            runs = []
            for place, whole in zip(folders, parts, strict=True):
                train, _ = heard(whole.train, embeddings[whole.train], "training")
                test, _ = heard(whole.test, embeddings[whole.test], "test")
                part = replace(whole, train=train, test=test)
                logits = np.full((len(whole.test), len(self.clips.class_names)), np.nan, dtype=np.float32)
                logits[np.isin(whole.test, test)] = probe_logits(
                    self.clips, part, embeddings, self.exclusive, self.config.probe_regularization, stop_if_asked
                )
                runs.append(self.keep(place, whole, seed, logits))
        self.summarize(folder, runs, command, "linear probe")

    def train(self, folder: Path, part: Partition, seed: int, further_runs: int = 0) -> dict[str, Any]:
        """One student from its newest checkpoint, or its start, to its result on the test clips of ``part``.

        There must be room for its checkpoints, and for those of so many runs after it.

        Raises:
            Stopped: on request, with the run saved.
            ValueError: a loss that is not finite, or too little room on the disk.
        """
        config, accelerator = self.config, self.accelerator
        where = "" if folder == config.out else f"{folder.relative_to(config.out).as_posix()}: "
        batches = self.batches(part, seed)
        student = self.starting_student(seed)
        frozen = freeze(student, config.freeze)
        groups = layer_groups(student, config.layer_decay)
        ema = moving_average(student, config.loop, accelerator)
        examples = TaskExamples(
            self.clips,
            part.train,
            self.hearing,
            frontend=config.frontend,
            augment=config.augment,
            task_augment=config.task_augment,
            impulse_responses=self.impulse_responses,
            teachers=self.teachers,
            teacher_temperature=config.distillation.teacher_temperature,
            exclusive=config.loss.loss == "cross-entropy",
            seed=seed,
            replacements=Replacements(part.train, self.skipped) if config.on_bad_clip == "skip" else None,
        )
        loader = training_loader(examples, batches, config.workers, accelerator)
        student, optimizer, loader = accelerator.prepare(
            student, create_optimizer(student, config.optimizer, groups), loader
        )
        make_folder(folder)
        run = Run(folder, config.loop, config.optimizer, config.schedule)
        log = RunLog(run.metrics_path, accelerator)
        state = TrainState(student, optimizer, ema)
        require_checkpoint_space(accelerator, state, run, further_runs)
        if resume_state(accelerator, state, run, log):
            place = f"epoch {state.epoch}, step {state.step_in_epoch} of {batches.steps_per_epoch}"
            accelerator.print(f"{where}going on at {place}")

        def stop_if_asked() -> None:
            self.stop_if_asked(lambda: stop_message(self.signals, state, run))

        def set_epoch(student: Student, epoch: int) -> None:
            if not config.is_pretrained:  # what anneals is at its end in a trained one
                student.start_epoch(epoch)

        stopping = EarlyStopping(config.early_stopping, config.patience, folder, accelerator)
        validate = None
        if len(part.valid):
            valid = self.evaluator(part.valid, "validate")

            def validate(evaluated: nn.Module) -> dict[str, Any]:
                set_epoch(evaluated, config.loop.epochs)  # as it will be used, if it is the best
                rows, logits = heard(part.valid, valid.predict(evaluated, before_batch=stop_if_asked), "validation")
                metrics = metrics_of(self.clips, part, rows, logits, self.exclusive)
                stopping.keep_if_best(metrics, evaluated, run.metrics_path)
                return {name: value for name, value in metrics.items() if isinstance(value, float)}

        def describe(batch: dict[str, Tensor]) -> str:
            return f"Clips of the batch: {', '.join(self.clips.clip_id(row) for row in batch['row'].tolist())}"

        def before_epoch(epoch: int) -> None:
            set_epoch(accelerator.unwrap_model(state.student), epoch)
            if state.ema is not None:
                set_epoch(state.ema.module, epoch)

        objective = FinetuneObjective(
            self.frontend,
            config.loss.loss,
            label_weight=config.distillation.label_weight,
            label_smoothing=config.loss.label_smoothing,
            class_weights=self.class_weights(part.train),
            frozen=frozen,
        )
        fit(
            accelerator, state, objective, batches, loader, run, log, validate, describe, before_epoch,
            stop=lambda epochs: stopping.should_stop(run.metrics_path), signals=self.signals,
        )  # fmt: skip
        best = evaluated_student(state, accelerator)
        set_epoch(best, config.loop.epochs)
        stopping.load_best(best)
        if len(part.valid):  # for what is chosen on them, such as thresholds
            rows, chosen_on = heard(part.valid, valid.predict(best, before_batch=stop_if_asked), "validation")
            if accelerator.is_main_process:
                write_predictions(folder / VALIDATION_FILE, self.clips, rows, chosen_on, part)
        logits = self.evaluator(part.test, "test").predict(best, before_batch=stop_if_asked)
        if accelerator.is_main_process:
            save_student(folder, best, self.clips.class_names, config.frontend, self.provenance(part, seed, state))
        result = self.keep(folder, part, seed, logits)
        accelerator.free_memory()
        return result

    def check(self, parts: Sequence[Partition]) -> None:
        """Says which classes lack clips; ValueError for what would stop a run later."""
        if self.config.early_stopping is not None and not all(len(part.valid) for part in parts):
            raise ValueError(
                f"--early-stopping needs validation clips, and {self.task.name} has none; add --valid-share 0.1"
            )
        for seed in self.config.seeds:
            self.starting_student(seed)
        for part in parts:
            where = "" if part.fold is None else f"fold {part.fold}: "
            self.name_absent_classes(part, where)
            self.check_teachers(part.train, where)
            self.batches(part, self.config.seeds[0])

    def batches(self, part: Partition, seed: int) -> EpochBatches:
        """The training batches of an epoch, all of the same size."""
        config = self.config
        per_step = self.accelerator.num_processes * config.loop.gradient_accumulation_steps
        in_pairs = config.augment.mixup_alpha > 0 or config.task_augment.freq_mixstyle > 0
        clips_per_epoch = config.sampling.clips_per_epoch or len(part.train)
        return EpochBatches(
            self.clips,
            part.train,
            config.sampling,
            batch_size=equal_batches(clips_per_epoch, config.loop.batch_size, per_step, in_pairs),
            batches_per_step=per_step,
            seed=seed,
        )

    def class_weights(self, rows: np.ndarray) -> Tensor | None:
        if self.config.loss.class_weights == "none":
            return None
        targets, known = self.clips.targets(rows) > 0, self.clips.mask(rows)
        weights = balanced_weights(
            self.config.loss.loss,
            torch.from_numpy((targets & known).sum(axis=0)),
            torch.from_numpy((~targets & known).sum(axis=0)),
        )
        return weights.to(self.accelerator.device)

    def name_absent_classes(self, part: Partition, where: str) -> None:
        for rows, what in ((part.train, "training"), (part.test, "test")):
            counts = (self.clips.targets(rows) * self.clips.mask(rows)).sum(axis=0)
            absent = [name for name, count in zip(self.clips.class_names, counts, strict=True) if not count]
            if absent:
                self.accelerator.print(f"{where}{len(absent)} classes have no {what} clips: {listed(absent)}")

    def check_teachers(self, rows: np.ndarray, where: str) -> None:
        """ValueError if teachers have other classes, or lack clips that are not allowed to go without."""
        if self.teachers is None:
            return
        missing = self.teachers.check_against(self.clips, rows)
        if missing.any():
            first = self.clips.clip_id(int(rows[missing][0]))
            found = f"{where}{int(missing.sum())} of {len(rows)} training clips have no teacher logits (as {first!r})"
            if self.config.missing_logits == "refuse":
                raise ValueError(
                    f"{found}; run the teacher over them (kd pack, kd teach), or train them on their labels with "
                    "--missing-logits label-only"
                )
            self.accelerator.print(f"{found}; they are trained on their labels alone")

    def provenance(self, part: Partition, seed: int, state: TrainState) -> dict[str, Any]:
        """What ``student.json`` tells of how the weights came about."""
        return {
            "config": as_json(self.config),
            "accepted_changes": self.accepted_changes,
            "clip_seconds": self.config.clip_seconds,
            "task": self.task.name,
            "licence_of_the_data": self.task.licence,
            "clips": self.clips.fingerprint,
            "seed": seed,
            "test_fold": part.fold,
            "teachers": self.teachers.describe() if self.teachers is not None else [],
            "steps": state.step,
            "skipped_steps": state.skipped_steps,
            "epochs": state.epoch,
            "versions": package_versions(),
        }

    def audio(self, clip_id: str) -> bytes | None:
        """A clip's file, for the players of the report; None if it is gone."""
        path = self.clips.clips[self.clips.rows([clip_id])[0]].path
        return path.read_bytes() if path.is_file() else None

    def keep(self, folder: Path, part: Partition, seed: int, logits: np.ndarray) -> dict[str, Any]:
        """Writes the predictions of a run and, last, its result, which marks it as finished."""
        rows, logits = heard(part.test, logits, "test")
        metrics = metrics_of(self.clips, part, rows, logits, self.exclusive)
        place = folder.relative_to(self.config.out).as_posix()
        result = {"seed": seed, "fold": part.fold, "folder": place, "metrics": metrics}
        result |= {"skipped_clips": len(part.test) - len(rows), "accepted_changes": len(self.accepted_changes)}
        if self.accelerator.is_main_process:
            write_predictions(folder / PREDICTIONS_FILE, self.clips, rows, logits, part)
            write_json(folder / RESULT_FILE, result)
            shown = " ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            print(shown if place == "." else f"{place}: {shown}")
        self.accelerator.wait_for_everyone()
        return result

    def summarize(self, folder: Path, runs: Sequence[dict[str, Any]], command: str, what: str) -> None:
        """Writes ``results.json`` of several runs and prints the headline."""
        metric = self.task.metric or ("accuracy" if self.exclusive else "mAP")
        found = headline(metric, runs)
        if self.accelerator.is_main_process:
            write_results(folder, self.config, self.clips, runs, found, command, what, self.exclusive)
            spread = f" ± {found['std']:.4f} over {found['spread_over']}" if found["std"] is not None else ""
            print(f"{what}: {metric} {found['mean']:.4f}{spread} ({folder / 'results.json'})")
            if self.config.report:
                from kd.report import write_report  # here, since it brings matplotlib

                print(f"report: {write_report(folder, self.audio)}")
        self.accelerator.wait_for_everyone()


def heard(rows: np.ndarray, values: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows and their values (rows, any) without the clips that were skipped, which have NaN.

    Raises:
        ValueError: nothing is left.
    """
    usable = ~np.isnan(values).any(axis=1)
    if not usable.any():
        raise ValueError(f"none of the {len(rows)} {what} clips can be used")
    return rows[usable], values[usable]


def read_start(config: FinetuneConfig) -> Start:
    """What the students of a run start from.

    Raises:
        ValueError: a run folder without a student, or settings that are not that student's.
    """
    options = parse_options(config.student_options)
    if not config.is_pretrained:
        defaults = catalog_of(config.student).default_options(config.student)
        return Start(config.student, annealed_options(options, defaults, config.loop.epochs))
    if unused := sorted(options.keys() & {"temperature_start", "temperature_epochs"}):
        raise ValueError(
            f"--student-options {unused[0]} would not be used: a trained DyMN stays at the temperature that its annealing "
            "ended with"
        )
    if config.init is None:
        return Start(config.student, options, config.weights)
    start, card = start_from_run(config.init)
    wrong = {name: value for name, value in options.items() if start.options.get(name) != value}
    if config.student != start.name or wrong:
        found = f"--student {config.student}" if config.student != start.name else f"--student-options {wrong}"
        raise ValueError(f"{config.init} holds a {start.name} with the options {card.config.options}; found {found}")
    return start
