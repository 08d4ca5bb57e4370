"""Reads run folders: of fine-tuning runs, with their folds and seeds, and of pretraining runs.

Shapes: N clips, C classes.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.files import read_json
from audio_datasets.system.messages import brief
from audio_datasets.tasks.label_space import LabelSpace
from kd.evaluation.label_metrics import EXCLUSIVE_METRICS
from kd.run_folder.evaluations import HEADLINE_METRIC, Evaluation, read_evaluations
from kd.run_folder.metrics_log import read_metrics
from kd.run_folder.predictions import PREDICTIONS_FILE, VALIDATION_FILE, Predictions
from kd.run_folder.results import (
    PROBE_FOLDER,
    RESULTS_FILE,
    Headline,
    Results,
    RunResult,
    command_line,
    is_number,
    read_result,
    versions_of,
)
from students.card import CARD_FILE, StudentCard, read_card

CONFIG_FILE = "config.json"
METRICS_FILE = "metrics.jsonl"

PART_PATTERNS = ("fold*", "seed*", "seed*/fold*")
NOT_MEASURED = ("kind", "step", "epoch")


@dataclass(frozen=True)
class Part:
    """One training within a run: a fold, a seed, or the whole run."""

    folder: Path
    class_names: tuple[str, ...] | None
    seed: int | None = None
    fold: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """Metrics on its test clips by name, and other values that were saved with them."""
    run: str = ""
    """The name of the run among several that are read as one. Empty for a run read alone."""
    label: str = ""
    """What distinguishes it from the other parts, such as ``"seed 1, fold 2"``. Empty if it is the only part."""

    @cached_property
    def predictions(self) -> Predictions | None:
        return self._predictions(PREDICTIONS_FILE)

    @cached_property
    def validation(self) -> Predictions | None:
        """Predictions of the validation clips. None if they were not saved."""
        return self._predictions(VALIDATION_FILE)

    def _predictions(self, name: str) -> Predictions | None:
        path = self.folder / name
        return Predictions.read(path, self.class_names) if path.is_file() else None

    @cached_property
    def card(self) -> StudentCard | None:
        """The trained student's card. None if no student is saved yet."""
        return read_card(self.folder) if (self.folder / CARD_FILE).is_file() else None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """The records that were logged during training."""
        path = self.folder / METRICS_FILE
        return read_metrics(path) if path.is_file() else []

    def curve(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A logged value over epochs, counted from 1: (epochs,), (values,).

        If an epoch has several records, the value is their mean; for the learning rate, the last one.
        """
        values: dict[int, list[float]] = {}
        for record in self.records:
            if record["kind"] == kind and is_number(record.get(name)):
                values.setdefault(record["epoch"] + 1, []).append(record[name])
        means = [found[-1] if name == "learning_rate" else float(np.mean(found)) for found in values.values()]
        return np.array(list(values), dtype=np.int64), np.array(means)

    def measured(self, kind: str) -> list[str]:
        """The names of the values in records of this kind (train or validation), in order of first appearance."""
        names = {
            name: None
            for record in self.records
            if record["kind"] == kind
            for name, value in record.items()
            if name not in NOT_MEASURED and is_number(value)
        }
        return list(names)


@dataclass(frozen=True)
class RunFolder:
    """The content of a run folder. The folders of folds and seeds are read only when needed."""

    path: Path
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    task: str | None = None
    class_names: tuple[str, ...] | None = None
    headline: Headline | None = None
    finished: bool = False
    """Whether the run has its results or, for pretraining, its trained student."""
    command: str | None = None
    """The command line that started the run."""
    versions: Mapping[str, str] = field(default_factory=dict)
    what: str | None = None
    """What the run did, such as "fine-tuned"."""
    label_space: LabelSpace | None = None
    """How the classes form groups. None if the run did not record it."""
    evaluations: tuple[Evaluation, ...] = ()
    """For pretraining: what kd evaluate wrote into the folder."""
    evaluation: Evaluation | None = None
    """The evaluation that the headline is from."""
    warnings: tuple[str, ...] = ()
    """What the run warned of."""

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Reads a run folder, finished or not.

        Raises:
            ValueError: ``path`` is not a run folder, or its files are damaged.
        """
        path = Path(path)
        config_path, results_path = path / CONFIG_FILE, path / RESULTS_FILE
        if not config_path.is_file():
            if not results_path.is_file():
                found = f"it has neither {CONFIG_FILE} nor {RESULTS_FILE}" if path.is_dir() else "it does not exist"
                raise ValueError(
                    f"{path} is not a run folder: {found}. Give a folder that kd pretrain or kd finetune wrote with --out"
                )
            config_path = path.parent / CONFIG_FILE  # the results of a linear probe are in a folder of the run
        config = read_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"{config_path} must contain a JSON object; found {type(config).__name__}")
        if config.get("probe_only") and not results_path.is_file():
            return cls.read(path / PROBE_FOLDER)
        if results_path.is_file():
            return _with_results(path, config, Results.read(path))
        return _without_results(path, config)

    @property
    def probe(self) -> "RunFolder | None":
        """The linear probe on the run's initial, frozen student. None if the run made none."""
        path = self.path / PROBE_FOLDER
        return RunFolder.read(path) if (path / RESULTS_FILE).is_file() else None

    @property
    def predictions(self) -> list[tuple[Part, Predictions]]:
        """Each part that has predictions of its test clips, with these predictions."""
        return [(part, part.predictions) for part in self.parts if part.predictions is not None]

    @property
    def one_label(self) -> bool:
        """Whether each clip has exactly one class.

        Read from the run's label groups; if these are missing, from its metric; otherwise from its predictions. With several
        groups of exclusive classes a clip has one class from each group, so this is False.
        """
        if self.label_space is not None:
            return self.label_space.exclusive and len(self.label_space.groups) == 1
        if self.headline is not None:
            return self.headline.metric in EXCLUSIVE_METRICS
        return all(predictions.one_label for _, predictions in self.predictions)

    @property
    def card(self) -> StudentCard | None:
        """The card of the first trained student."""
        return next((part.card for part in self.parts if part.card is not None), None)


def _with_results(path: Path, config: dict[str, Any], results: Results) -> RunFolder:
    """A finished fine-tuning run."""
    return RunFolder(
        path=path,
        config=config,
        parts=_labelled([_part(path, results, run) for run in results.runs]),
        task=results.task,
        class_names=results.class_names,
        headline=results.headline,
        finished=True,
        command=results.command,
        versions=results.versions,
        what=results.what,
        label_space=results.label_space,
        warnings=results.warnings,
    )


def _part(path: Path, results: Results, run: RunResult) -> Part:
    """A part as described in the results. Someone else may have written these, so a folder outside the run is refused."""
    folder = Path(os.path.normpath(path / run.folder))
    # A linear probe has its own folder in the run, and its parts are in folders beside it.
    roots = (path, path.parent) if path.name == PROBE_FOLDER else (path,)
    if not any(folder.is_relative_to(os.path.normpath(root)) for root in roots) or "\0" in str(folder):
        raise ValueError(
            f"{path / RESULTS_FILE} is incomplete or damaged: the folder of a part must be inside the run folder; found {brief(run.folder)}"
        )
    return Part(folder, results.class_names, run.seed, run.fold, run.metrics)


def _without_results(path: Path, config: dict[str, Any]) -> RunFolder:
    """A pretraining run, or a fine-tuning run that has not finished."""
    folders = [path] if (path / METRICS_FILE).is_file() else []
    for pattern in PART_PATTERNS:
        folders += sorted(folder for folder in path.glob(pattern) if (folder / METRICS_FILE).is_file())
    class_names = next((card.class_names for folder in folders if (card := Part(folder, None).card)), None)
    parts = tuple(
        Part(
            folder,
            class_names,
            _number(folder, path, "seed"),
            _number(folder, path, "fold"),
            found.metrics if (found := read_result(folder)) else {},
        )
        for folder in folders
    )
    # A fine-tuning run without results has not finished, even if it has saved a student.
    card = parts[0].card if parts and parts[0].folder == path and "task" not in config else None
    provenance = card.provenance if card is not None else {}
    run = RunFolder(
        path=path,
        config=config,
        parts=_labelled(parts),
        task=config.get("task"),
        class_names=class_names,
        headline=_last_validation(parts[0]) if card is not None else None,
        finished=card is not None,
        command=command_line(provenance.get("command")),
        versions=versions_of(provenance),
        evaluations=read_evaluations(path) if card is not None else (),
    )
    return judged_by(run, run.evaluations[0]) if run.evaluations else run


def judged_by(run: RunFolder, evaluation: Evaluation) -> RunFolder:
    """A pretraining run whose headline is that of an evaluation, rather than of its last validation."""
    value = evaluation.metrics[HEADLINE_METRIC]
    return replace(
        run,
        parts=tuple(replace(part, metrics=evaluation.metrics) for part in run.parts),
        headline=Headline(HEADLINE_METRIC, (value,), value, None),
        evaluation=evaluation,
    )


def _labelled(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with their labels set. A label names the seed and the fold if they differ between parts."""
    several = [name for name in ("seed", "fold") if len({getattr(part, name) for part in parts}) > 1]
    return tuple(replace(part, label=", ".join(f"{name} {getattr(part, name)}" for name in several)) for part in parts)


def _number(folder: Path, run: Path, name: str) -> int | None:
    """The number after ``name`` in the path of the folder, such as 3 for "fold" in ``seed1/fold3``. None if there is none."""
    for step in folder.relative_to(run).parts:
        if step.startswith(name) and step.removeprefix(name).isdigit():
            return int(step.removeprefix(name))
    return None


def _last_validation(part: Part) -> Headline | None:
    """The first metric of the last validation. None if the run has not validated."""
    names = part.measured("validation")
    if not names:
        return None
    value = float(part.curve("validation", names[0])[1][-1])
    return Headline(names[0], (value,), value, None)


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as a flat one: names joined by dots, values as text."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) or "–"
        else:
            flat[f"{prefix}{name}"] = "–" if value is None else str(value)
    return flat
