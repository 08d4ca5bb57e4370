"""The runs of one fine-tuning call: a student for each fold and seed, and what they come to together."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from torch import nn

from audio_datasets.audio.bad_clips import ClipList, summary
from audio_datasets.system.files import digest_of, write_json
from audio_datasets.system.messages import listed
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.task import Task, TaskClips
from kd.data.sampling import EpochBatches, equal_batches
from kd.data.splits import Partition
from kd.data.windows import Window
from kd.evaluation.label_metrics import metric_names
from kd.evaluation.predict import ClipEvaluator, Tagger, drop_skipped
from kd.evaluation.predictions import PREDICTIONS_FILE, VALIDATION_FILE
from kd.evaluation.probe import probe_logits
from kd.evaluation.results import RESULT_FILE, RESULTS_FILE, Headline, Results, RunResult, read_result
from kd.objectives.label_losses import loss_space
from kd.stages.build_run import (
    BuiltRun,
    Progress,
    TrainingData,
    build_run,
    describe_batch,
    package_versions,
    provenance,
    rows_with_teachers,
    train,
)
from kd.stages.finetuning_config import FinetuneConfig
from kd.stages.fold_results import fold_metrics, write_fold_predictions
from kd.training.config import as_json
from kd.training.early_stopping import EarlyStopping
from kd.training.loop import Hooks
from kd.training.run_folder import SKIPPED_CLIPS_FILE, EnteredRun
from kd.training.transfer import Start, starting_student
from students.frontend import LogMel
from students.interface import Student
from students.weights import save_student
from teacher_logits.processes import any_process
from teacher_logits.stores.ensemble import LogitEnsemble


@dataclass
class CrossValidation:
    """What the runs of one call share, and the runs: one for each seed and partition of the clips."""

    config: FinetuneConfig
    task: Task
    clips: TaskClips
    parts: Sequence[Partition]
    """One for each fold that is asked for; a single one where there are no folds."""
    start: Start
    """What the students start from."""
    teachers: LogitEnsemble | None
    accelerator: Accelerator
    signals: StopSignals
    accepted_changes: list[dict[str, Any]] = field(default_factory=list)
    """Of the run folder, once it is entered."""

    def __post_init__(self) -> None:
        config = self.config
        self.skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
        self.label_space: LabelSpace = self.clips.label_space
        self.window = Window(config.frontend.sample_rate_hz, config.clip_seconds, config.short_clips)
        self.impulse_responses = config.impulse_responses()
        self._students: dict[int, Student] = {}

    # -- What the runs are made of

    def starting_student(self, seed: int) -> Student:
        """A student as it starts, the same for every fold."""
        if seed not in self._students:
            prior = None
            if not loss_space(self.label_space, self.config.loss).exclusive:
                # 1 / classes: with the frequencies of a fold's clips every fold would start otherwise.
                classes = len(self.clips.class_names)
                prior = np.full(classes, 1.0 / max(2, classes), dtype=np.float32)
            self._students[seed] = starting_student(
                self.start, self.clips.class_names, self.config.frontend, seed=seed, prior=prior
            )
        return copy.deepcopy(self._students[seed])

    def batches(self, rows: np.ndarray, seed: int) -> EpochBatches:
        """The training batches of an epoch, all of the same size."""
        config = self.config
        per_step = self.accelerator.num_processes * config.loop.gradient_accumulation_steps
        clips_per_epoch = config.sampling.clips_per_epoch or len(rows)
        return EpochBatches(
            self.clips,
            rows,
            config.sampling,
            batch_size=equal_batches(clips_per_epoch, config.loop.batch_size, per_step, config.augment.in_pairs),
            batches_per_step=per_step,
            seed=seed,
        )

    def training_rows(self, part: Partition, say: Callable[[str], None] = lambda text: None) -> np.ndarray:
        """The clips to train on, of which those without teacher logits may be left out."""
        where = "" if part.fold is None else f"fold {part.fold}: "
        return rows_with_teachers(self.config, self.teachers, self.clips, part.train, say, where)

    def evaluator(self, rows: np.ndarray, description: str) -> ClipEvaluator:
        return ClipEvaluator(
            self.accelerator,
            self.clips,
            rows,
            self.window,
            batch_size=self.config.eval_batch_size,
            workers=self.config.workers,
            description=description,
            on_bad_clip=self.config.on_bad_clip,
        )

    def predict(self, evaluator: ClipEvaluator, tagger: Tagger, before_batch: Callable[[], None]) -> np.ndarray:
        """What a tagger says of each clip; those that it skips are listed."""
        values = evaluator.predict(tagger, before_batch)
        if self.accelerator.is_main_process:
            for clip_id, reason in evaluator.skipped.items():
                self.skipped.add(clip_id, reason)
        return values

    def fingerprints(self, every_part: Sequence[Partition]) -> dict[str, Any]:
        """What the data are, wherever their files lie; a run goes on with the same only.

        ``every_part`` are the partitions of all folds, also of those that this call does not run.
        """
        data = TrainingData(self.clips, every_part[0].train, self.label_space, self.teachers).fingerprints()
        rows = [rows.tobytes() for part in every_part for rows in (part.train, part.valid, part.test)]
        batches = [self.batches(part.train, self.config.seeds[0]) for part in every_part]
        return {
            "clips": data["clips"],
            "partitions": digest_of(*rows),
            "clips_per_step": [one.batch_size * one.batches_per_step for one in batches],
            "teachers": data["teachers"],
            "rounded_to_16_bits": self.config.cache is not None,
        }

    def check(self) -> None:
        """Says which classes lack clips; ValueError for what would stop a run later."""
        if self.config.early_stopping is not None and not all(len(part.valid) for part in self.parts):
            raise ValueError(
                f"--early-stopping needs validation clips, and {self.task.name} has none; add --valid-share 0.1"
            )
        for seed in self.config.seeds:
            self.starting_student(seed)
        for part in self.parts:
            self._name_absent_classes(part)
            self.batches(self.training_rows(part, self.accelerator.print), self.config.seeds[0])

    def _name_absent_classes(self, part: Partition) -> None:
        where = "" if part.fold is None else f"fold {part.fold}: "
        for rows, what in ((part.train, "training"), (part.test, "test")):
            counts = (self.clips.targets(rows) * self.clips.mask(rows)).sum(axis=0)
            absent = [name for name, count in zip(self.clips.class_names, counts, strict=True) if not count]
            if absent:
                self.accelerator.print(f"{where}{len(absent)} classes have no {what} clips: {listed(absent)}")

    # -- The runs

    def runs(self) -> list[tuple[int, Partition]]:
        """Seed and partition of each run, in their order."""
        return [(seed, part) for seed in self.config.seeds for part in self.parts]

    def results(self) -> list[str]:
        """The files that show that all is done, relative to the run folder."""
        names = [f"probe/{RESULTS_FILE}"] if self.config.probe or self.config.probe_only else []
        if not self.config.probe_only:
            names += [f"{folder_name(part, self.config.seeds, seed)}/{RESULT_FILE}" for seed, part in self.runs()]
            names += [RESULTS_FILE, *(["report.html", "report.md"] if self.config.report else [])]
        return names

    def run(self, entered: EnteredRun, command: str) -> None:
        """Everything that the call asks for and that is not there yet; raises as ``train_fold`` does."""
        self.accepted_changes = entered.description.get("accepted_changes", [])
        if self.config.probe or self.config.probe_only:
            self.probe(command)
        if not self.config.probe_only:
            self.train_all(command)
        if self.accelerator.is_main_process and (bad_clips := self.skipped.read()):
            self.skipped.replace(dict(sorted(bad_clips.items())))
            print(f"{summary(bad_clips, len(self.clips), 'skipped')}; all are listed in {self.skipped.path}")

    def train_all(self, command: str) -> None:
        """The runs of all seeds and parts, without those that are finished, and the results of all."""
        folders = [self.config.out / folder_name(part, self.config.seeds, seed) for seed, part in self.runs()]
        results = [self.finished(folder) for folder in folders]
        for index, (seed, part) in enumerate(self.runs()):
            if results[index] is None:
                results[index] = self.train_fold(folders[index], part, seed, further_runs=results.count(None) - 1)
        self.summarize(self.config.out, results, command, "fine-tuned")

    def finished(self, folder: Path) -> RunResult | None:
        """A run's result; None if it has none, or one from before changes that were accepted since, and so goes on."""
        result = read_result(folder)
        return result if result is not None and result.accepted_changes == len(self.accepted_changes) else None

    def train_fold(self, folder: Path, part: Partition, seed: int, further_runs: int = 0) -> RunResult:
        """One student from its newest checkpoint, or its start, to its result on the test clips of ``part``.

        There must be room for its checkpoints, and for those of so many runs after it.

        Raises:
            Stopped: on request, with the run saved.
            ValueError: a loss that is not finite, or too little room on the disk.
        """
        config = self.config
        where = "" if folder == config.out else f"{folder.relative_to(config.out).as_posix()}: "
        rows = self.training_rows(part)
        data = TrainingData(self.clips, rows, self.label_space, self.teachers, self.impulse_responses)
        built = build_run(
            config,
            self.accelerator,
            data,
            self.starting_student(seed),
            self.batches(rows, seed),
            seed=seed,
            skipped=self.skipped,
            frozen=config.freeze,
            layer_decay=config.layer_decay,
        )
        stopping = EarlyStopping(config.early_stopping, config.patience, folder, self.accelerator)
        valid = self.evaluator(part.valid, "validate") if len(part.valid) else None
        progress = train(
            built,
            folder,
            self.signals,
            lambda progress: self._hooks(built, part, valid, stopping, progress),
            where=where,
            further_runs=further_runs,
        )
        best = built.state.evaluated_student(self.accelerator)
        self._set_epoch(best, config.loop.epochs)
        stopping.load_best(best)
        if valid is not None:  # for what is chosen on them, such as thresholds
            logits = self.predict(valid, built.tagger(best), progress.stop_if_asked)
            chosen_on, logits = drop_skipped(part.valid, logits, "validation")
            if self.accelerator.is_main_process:
                write_fold_predictions(folder / VALIDATION_FILE, self.clips, part, chosen_on, logits)
        logits = self.predict(self.evaluator(part.test, "test"), built.tagger(best), progress.stop_if_asked)
        if self.accelerator.is_main_process:
            about = {
                "task": self.task.name,
                "licence_of_the_data": self.task.licence,
                "seed": seed,
                "test_fold": part.fold,
            }
            written = provenance(built, as_json(config), self.accepted_changes, **about)
            save_student(folder, best, self.clips.class_names, config.frontend, written)
        result = self.keep(folder, part, seed, logits)
        self.accelerator.free_memory()
        return result

    def _set_epoch(self, student: Student, epoch: int) -> None:
        if not self.config.is_pretrained:  # what anneals is at its end in a trained one
            student.start_epoch(epoch)

    def _hooks(
        self,
        built: BuiltRun,
        part: Partition,
        valid: ClipEvaluator | None,
        stopping: EarlyStopping,
        progress: Progress,
    ) -> Hooks:
        """What a fold adds to the training loop: validation, annealing and early stopping."""
        log = progress.run.metrics_path

        def validate(evaluated: nn.Module) -> dict[str, Any]:
            self._set_epoch(evaluated, self.config.loop.epochs)  # as it will be used, if it is the best
            logits = self.predict(valid, built.tagger(evaluated), progress.stop_if_asked)
            rows, logits = drop_skipped(part.valid, logits, "validation")
            metrics = fold_metrics(self.clips, part, rows, logits)
            stopping.keep_if_best(metrics, evaluated, log)
            return {name: value for name, value in metrics.items() if isinstance(value, float)}

        def before_epoch(epoch: int) -> None:
            if not self.config.is_pretrained:
                built.state.start_epoch(self.accelerator, epoch)

        return Hooks(
            validate=None if valid is None else validate,
            describe=describe_batch(self.clips),
            before_epoch=before_epoch,
            stop=lambda epochs: stopping.should_stop(log),
        )

    def probe(self, command: str) -> None:
        """Fits the linear probe for each part and leaves its results in ``probe/``."""
        seed, folder = self.config.seeds[0], self.config.out / "probe"

        def stop_if_asked() -> None:
            if any_process(self.accelerator, self.signals.requested)[0]:
                reason = self.signals.reason or "a signal to another process"
                raise Stopped(f"{reason} came during the linear probe; the same command fits it again")

        folders = [folder / folder_name(part, [seed], seed) for part in self.parts]
        results = [self.finished(place) for place in folders]
        if not all(results):
            embeddings = self._embeddings(seed, stop_if_asked)
            results = []
            for place, whole in zip(folders, self.parts, strict=True):
                train_rows, _ = drop_skipped(whole.train, embeddings[whole.train], "training")
                test_rows, _ = drop_skipped(whole.test, embeddings[whole.test], "test")
                logits = np.full((len(whole.test), len(self.clips.class_names)), np.nan, dtype=np.float32)
                logits[np.isin(whole.test, test_rows)] = probe_logits(
                    self.clips,
                    self.label_space,
                    replace(whole, train=train_rows, test=test_rows),
                    embeddings,
                    self.config.probe_regularization,
                    stop_if_asked,
                )
                results.append(self.keep(place, whole, seed, logits))
        self.summarize(folder, results, command, "linear probe")

    def _embeddings(self, seed: int, before_batch: Callable[[], None]) -> np.ndarray:
        """(clips, embedding size): what the student as it starts makes of each clip."""
        student = self.starting_student(seed).to(self.accelerator.device).eval()
        frontend = LogMel(self.config.frontend).to(self.accelerator.device)
        every_clip = self.evaluator(np.arange(len(self.clips)), "embed")
        return self.predict(every_clip, lambda waveform: student(frontend(waveform)).embedding, before_batch)

    # -- Results

    def keep(self, folder: Path, part: Partition, seed: int, logits: np.ndarray) -> RunResult:
        """Writes the predictions of a run and, last, its result, which marks it as finished."""
        rows, logits = drop_skipped(part.test, logits, "test")
        place = folder.relative_to(self.config.out).as_posix()
        result = RunResult(
            seed=seed,
            fold=part.fold,
            folder=place,
            metrics=fold_metrics(self.clips, part, rows, logits),
            skipped_clips=len(part.test) - len(rows),
            accepted_changes=len(self.accepted_changes),
        )
        if self.accelerator.is_main_process:
            write_fold_predictions(folder / PREDICTIONS_FILE, self.clips, part, rows, logits)
            write_json(folder / RESULT_FILE, result.to_json())
            shown = " ".join(
                f"{name} {value:.4f}" for name, value in result.metrics.items() if isinstance(value, float)
            )
            print(shown if place == "." else f"{place}: {shown}")
        self.accelerator.wait_for_everyone()
        return result

    def summarize(self, folder: Path, runs: Sequence[RunResult], command: str, what: str) -> None:
        """Writes ``results.json`` of several runs, prints the headline and writes the report.

        The probe's folder gets the configuration as well, and is thereby a run folder too.
        """
        config = self.config
        headline = Headline.of(self.task.metric or metric_names(self.label_space)[0], runs)
        if self.accelerator.is_main_process:
            if folder != config.out:
                write_json(folder / "config.json", as_json(config))
            moved = [replace(run, folder=(config.out / run.folder).relative_to(folder).as_posix()) for run in runs]
            results = Results(
                task=config.task,
                class_names=tuple(self.clips.class_names),
                headline=headline,
                runs=tuple(moved),
                label_space=self.label_space,
                what=what,
                command=command,
                versions=package_versions(),
            )
            results.write(folder)
            spread = f" ± {headline.std:.4f} over {headline.over}" if headline.std is not None else ""
            print(f"{what}: {headline.metric} {headline.mean:.4f}{spread} ({folder / RESULTS_FILE})")
            if config.report:
                from kd.report import write_report  # here, since it brings matplotlib

                print(f"report: {write_report(folder, self._audio)}")
        self.accelerator.wait_for_everyone()

    def _audio(self, clip_id: str) -> bytes | None:
        """A clip's file, for the players of the report; None if it is gone."""
        path = self.clips.clips[self.clips.rows([clip_id])[0]].path
        return path.read_bytes() if path.is_file() else None


def folder_name(part: Partition, seeds: Sequence[int], seed: int) -> str:
    """Where one run lies in the whole: ``fold1``, ``seed0/fold1`` with several seeds, ``seed0``, or the folder itself."""
    names = [f"seed{seed}"] if len(seeds) > 1 else []
    return "/".join(names if part.fold is None else [*names, f"fold{part.fold}"]) or "."
