"""The runs of one fine-tuning command: a student for each fold and seed, and their combined results."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.audio.bad_clips import summary
from audio_datasets.system.files import digest_of, write_json
from audio_datasets.system.stop_signals import Stopped
from kd.data.splits import Partition
from kd.evaluation.baselines import baselines, beside, warnings_of
from kd.evaluation.label_metrics import metric_names
from kd.evaluation.predict import drop_skipped
from kd.evaluation.probe import clips_to_fit, fit_probe
from kd.objectives.label_losses import loss_space
from kd.run_folder.config import as_json
from kd.run_folder.predictions import PREDICTIONS_FILE
from kd.run_folder.results import PROBE_FOLDER, RESULT_FILE, RESULTS_FILE, Headline, Results, RunResult, read_result
from kd.run_folder.start import EnteredRun
from kd.stages.build_run import TrainingData, build_objective, package_versions, start_fingerprint
from kd.stages.finetuning_setup import FinetuneSetup
from kd.stages.fold import train_fold
from kd.stages.fold_results import fold_metrics, save_probe, write_fold_predictions
from kd.stages.teachers import link_for
from students.card import CARD_FILE, load_student
from students.frontend import LogMel
from students.interface import Student
from teacher_logits.processes import any_process


@dataclass
class CrossValidation:
    """Trains and evaluates a student for each seed and partition of the clips. Finished runs are kept."""

    setup: FinetuneSetup
    parts: Sequence[Partition]
    """One for each requested fold; a single one if there are no folds."""
    accepted_changes: list[dict[str, Any]] = field(default_factory=list)
    """The accepted changes of the run folder, known once it is entered."""

    def fingerprints(self, every_part: Sequence[Partition]) -> dict[str, Any]:
        """Fingerprints of the data, independent of file locations. A run can only be continued with the same data.

        ``every_part`` are the partitions of all folds, including those that this command does not run.
        """
        setup, seeds = self.setup, self.setup.config.seeds
        parts = (setup.training_clips, every_part[0].train, setup.label_space, setup.teachers, setup.impulse_responses)
        training = TrainingData(*parts)
        data, student = training.fingerprints(), setup.starting_student(seeds[0])
        if setup.config.has_teacher_beside:
            objective = build_objective(setup.config, training, student.embedding_dim, seeds[0])
            setup.own_teacher = objective.teacher_fingerprint
        starts = [start_fingerprint(setup.start, setup.starting_student(seed)) for seed in seeds]
        rows = [
            rows.tobytes()
            for part in every_part
            for rows in (part.train, part.valid, part.test, *([part.unlabelled] if len(part.unlabelled) else []))
        ]
        batches = [self.setup.batches(self.setup.listed_rows(part), self.setup.config.seeds[0]) for part in every_part]
        return {
            **{name: data[name] for name in ("clips", "audio", "impulse_responses", "teachers")},
            "start": starts[0] if None in starts else digest_of(*starts),
            "own_teacher": setup.own_teacher,
            "partitions": digest_of(*rows),
            "clips_per_step": [one.batch_size * one.batches_per_step for one in batches],
            "rounded_to_16_bits": self.setup.config.cache is not None,
        }

    def check(self) -> None:
        """Prints which classes lack clips. Raises ValueError for anything that would stop a run later."""
        if self.setup.config.early_stopping is not None and not all(len(part.valid) for part in self.parts):
            raise ValueError(
                f"--early-stopping needs validation clips, but {self.setup.task.name} has none; add --valid-share 0.1"
            )
        link_for(self.setup.teachers, loss_space(self.setup.label_space, self.setup.config.loss))
        for seed in self.setup.config.seeds:
            self.setup.starting_student(seed)
        for part in self.parts:
            self.setup.name_absent_classes(part)
            say = self.setup.accelerator.print
            for note in self.setup.batches(self.setup.training_rows(part, say), self.setup.config.seeds[0]).notes:
                say(note if part.fold is None else f"fold {part.fold}: {note}")

    # -- The runs

    def runs(self) -> list[tuple[int, Partition]]:
        """The seed and partition of each run, in order."""
        return [(seed, part) for seed in self.setup.config.seeds for part in self.parts]

    @property
    def has_probe(self) -> bool:
        """Whether the call asks for a linear probe, and there are labels to fit one to."""
        config = self.setup.config
        wanted = config.probe or config.starts_from_probe
        return config.probe_only or (wanted and all(len(self.labelled(part.train)) for part in self.parts))

    def results(self) -> list[str]:
        """The files of a finished run, relative to the run folder."""
        names = []
        if self.has_probe:
            seed = self.setup.config.seeds[0]
            fits = [f"{folder_name(part, [seed], seed)}/{RESULT_FILE}" for part in self.parts]
            names = [f"{PROBE_FOLDER}/{name}" for name in ([RESULTS_FILE] if self.is_tested else fits)]
        if not self.setup.config.probe_only:
            names += [f"{folder_name(part, self.setup.config.seeds, seed)}/{RESULT_FILE}" for seed, part in self.runs()]
            if self.is_tested:
                names += [RESULTS_FILE, *(["report.html", "report.md"] if self.setup.config.report else [])]
        return names

    @property
    def is_tested(self) -> bool:
        """Whether there are test clips (--test-share 0 leaves none)."""
        return all(len(part.test) for part in self.parts)

    def run(self, entered: EnteredRun, command: str) -> None:
        """Runs everything that was requested and is not finished yet. Raises the same errors as ``train_fold``."""
        self.accepted_changes = entered.description.get("accepted_changes", [])
        if self.has_probe:
            self.probe(command)
        if not self.setup.config.probe_only:
            self.train_all(command)
        if self.setup.accelerator.is_main_process and (bad_clips := self.setup.skipped.read()):
            self.setup.skipped.replace(dict(sorted(bad_clips.items())))
            print(
                f"{summary(bad_clips, len(self.setup.clips), 'skipped')}; all are listed in {self.setup.skipped.path}"
            )

    def train_all(self, command: str) -> None:
        """Trains all unfinished seeds and parts, and summarises the results of all."""
        folders = [
            self.setup.config.out / folder_name(part, self.setup.config.seeds, seed) for seed, part in self.runs()
        ]
        results = [self.finished(folder) for folder in folders]
        for index, (seed, part) in enumerate(self.runs()):
            if results[index] is None:
                further = results.count(None) - 1
                start = self.start_of(part, seed)
                logits = train_fold(self.setup, folders[index], part, seed, start, self.accepted_changes, further)
                results[index] = self.keep(folders[index], part, seed, logits)
                self.setup.accelerator.free_memory()
        self.summarize(self.setup.config.out, results, command, "fine-tuned")

    def start_of(self, part: Partition, seed: int) -> Student:
        """The student that a run starts from: the part's linear probe if the run is to go on from it, else one with a fresh head."""
        config = self.setup.config
        probe = config.out / PROBE_FOLDER / folder_name(part, [seed], seed)
        if config.starts_from_probe and (probe / CARD_FILE).is_file():
            return load_student(probe, allow=(config.student,))
        return self.setup.starting_student(seed)

    def finished(self, folder: Path) -> RunResult | None:
        """A run's result; None if it is unfinished, or if changes of settings were accepted since then."""
        result = read_result(folder)
        return result if result is not None and result.accepted_changes == len(self.accepted_changes) else None

    def probe(self, command: str) -> None:
        """Fits the linear probe for each part and writes it, as a student, with its results into ``probe/``."""
        seed, folder = self.setup.config.seeds[0], self.setup.config.out / PROBE_FOLDER
        folders = [folder / folder_name(part, [seed], seed) for part in self.parts]
        results = [self.finished(place) for place in folders]
        if not all(results):
            to_fit = [clips_to_fit(self.labelled(part.train), seed) for part in self.parts]
            embeddings = self._embeddings(seed, [*to_fit, *(part.test for part in self.parts)])
            results = [
                self._probe_part(place, part, rows, embeddings, seed)
                for place, part, rows in zip(folders, self.parts, to_fit, strict=True)
            ]
        self.summarize(folder, results, command, "linear probe")

    def labelled(self, rows: np.ndarray) -> np.ndarray:
        """The rows of clips with at least one known label."""
        return rows[self.setup.clips.mask(rows).any(axis=1)]

    def _probe_part(
        self, folder: Path, part: Partition, to_fit: np.ndarray, embeddings: np.ndarray, seed: int
    ) -> RunResult:
        """Fits the probe on some training clips of a part, saves it and keeps its result."""
        config, accelerator = self.setup.config, self.setup.accelerator
        train, _ = drop_skipped(to_fit, embeddings[to_fit], "training")
        if len(to_fit) < len(part.train):
            accelerator.print(f"the probe is fitted on {len(to_fit):,} of {len(part.train):,} training clips")
        shown = accelerator.is_main_process
        probe = fit_probe(
            self.setup.clips,
            self.setup.label_space,
            train,
            embeddings,
            config.probe_regularization,
            self._stop_the_probe,
            shown,
        )
        if accelerator.is_main_process:
            save_probe(folder, self.setup, probe, part, seed, train)
        return self.keep(folder, part, seed, probe.logits(embeddings[part.test]))

    def _stop_the_probe(self) -> None:
        if any_process(self.setup.accelerator, self.setup.signals.requested)[0]:
            reason = self.setup.signals.reason or "another process was asked to stop"
            raise Stopped(f"{reason} during the linear probe; the same command fits it again")

    def _embeddings(self, seed: int, of_rows: Sequence[np.ndarray]) -> np.ndarray:
        """Embeddings of some clips by the student before training, (clips, embedding size) float32; NaN for all other clips."""
        student = self.setup.starting_student(seed).to(self.setup.accelerator.device).eval()
        frontend = LogMel(self.setup.config.frontend).to(self.setup.accelerator.device)
        rows = np.unique(np.concatenate(of_rows))
        found = self.setup.predict(
            self.setup.evaluator(rows, "embed"),
            lambda waveform: student(frontend(waveform)).embedding,
            self._stop_the_probe,
        )
        embeddings = np.full((len(self.setup.clips), found.shape[1]), np.nan, dtype=np.float32)
        embeddings[rows] = found
        return embeddings

    # -- Results

    def keep(self, folder: Path, part: Partition, seed: int, logits: np.ndarray) -> RunResult:
        """Writes the predictions of a run and then its result, which marks it as finished. Without test clips it has no metrics."""
        tested = len(part.test) > 0
        rows, logits = drop_skipped(part.test, logits, "test") if tested else (part.test, logits)
        place = folder.relative_to(self.setup.config.out).as_posix()
        result = RunResult(
            seed=seed,
            fold=part.fold,
            folder=place,
            metrics=fold_metrics(self.setup.clips, part, rows, logits) if tested else {},
            skipped_clips=len(part.test) - len(rows),
            accepted_changes=len(self.accepted_changes),
            baselines=baselines(self.setup.label_space, self.setup.clips.targets(rows), self.setup.clips.mask(rows))
            if tested
            else {},
            test_clips=len(rows),
        )
        if self.setup.accelerator.is_main_process:
            if tested:
                write_fold_predictions(folder / PREDICTIONS_FILE, self.setup.clips, part, rows, logits)
            write_json(folder / RESULT_FILE, result.to_json())
            shown = metrics_in_words(result) if tested else "trained; there are no test clips"
            print(shown if place == "." else f"{place}: {shown}")
        self.setup.accelerator.wait_for_everyone()
        return result

    def summarize(self, folder: Path, runs: Sequence[RunResult], command: str, what: str) -> None:
        """Writes ``results.json`` of several runs, prints the headline and writes the report, if there were test clips.

        The probe's folder also gets the configuration, which makes it a run folder itself.
        """
        config = self.setup.config
        if not self.is_tested:
            return
        headline = Headline.of(self.setup.task.metric or metric_names(self.setup.label_space)[0], runs)
        warnings = self._warnings(folder, headline, runs)
        if self.setup.accelerator.is_main_process:
            if folder != config.out:
                write_json(folder / "config.json", as_json(config))
            moved = [replace(run, folder=(config.out / run.folder).relative_to(folder).as_posix()) for run in runs]
            results = Results(
                task=config.task,
                class_names=tuple(self.setup.clips.class_names),
                headline=headline,
                runs=tuple(moved),
                label_space=self.setup.label_space,
                what=what,
                command=command,
                versions=package_versions(),
                warnings=tuple(warnings),
            )
            results.write(folder)
            spread = f" ± {headline.std:.4f} over {headline.over}" if headline.std is not None else ""
            level = f", {beside(headline.baseline)}" if headline.baseline else ""
            print(f"{what}: {headline.metric} {headline.mean:.4f}{spread}{level} ({folder / RESULTS_FILE})")
            for text in warnings:
                print(f"warning: {text}")
            if config.report:
                from kd.report import write_report  # here, because it imports matplotlib

                print(f"report: {write_report(folder, self._audio)}")
        self.setup.accelerator.wait_for_everyone()

    def _warnings(self, folder: Path, headline: Headline, runs: Sequence[RunResult]) -> list[str]:
        """Warnings about the results of a folder: near chance, or worse than the probe on the same folds."""
        place = self.setup.config.out / PROBE_FOLDER
        probe = Results.read(place) if folder != place and (place / RESULTS_FILE).is_file() else None
        if probe is not None and {run.fold for run in probe.runs} != {run.fold for run in runs}:
            probe = None
        clips = sum(run.test_clips or 0 for run in runs if run.seed == runs[0].seed)
        value = None if probe is None else probe.headline.mean
        return warnings_of(headline.metric, headline.mean, clips, headline.baseline, value, str(place))

    def _audio(self, clip_id: str) -> bytes | None:
        """The content of a clip's file, for the players in the report; None if the file no longer exists."""
        from kd.reports.sounds import read_limited  # here, as kd.report is

        clip = self.setup.clips.clips[self.setup.clips.rows([clip_id])[0]]
        return (read_limited(clip.path) if clip.row is None else clip.audio) if clip.path.exists() else None


def metrics_in_words(result: RunResult) -> str:
    """The metrics of a result as text, accuracies and mAP with their baselines."""
    words = []
    for name, value in result.metrics.items():
        if isinstance(value, float):
            level = beside(result.baselines.get(name, {}))
            words.append(f"{name} {value:.4f} ({level})" if level else f"{name} {value:.4f}")
    return " ".join(words)


def folder_name(part: Partition, seeds: Sequence[int], seed: int) -> str:
    """A run's folder, relative to the whole: ``fold1``, ``seed0/fold1`` with several seeds, ``seed0``, or ``.``."""
    names = [f"seed{seed}"] if len(seeds) > 1 else []
    return "/".join(names if part.fold is None else [*names, f"fold{part.fold}"]) or "."
