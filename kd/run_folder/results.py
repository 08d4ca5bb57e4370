"""``results.json`` of a run with several folds or seeds, and ``result.json`` of each of them. Writer and reader.

``results.json`` contains ``task``, ``what`` was done, ``label_groups`` and ``class_names``, the ``headline``, the ``runs`` (seed,
fold, folder relative to that of the file, metrics, baselines), ``warnings``, ``command`` and ``versions``. Version 0.1 wrote
``labels``, "one" or "several", instead of ``label_groups``.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from audio_datasets.stores.class_lists import check_class_names
from audio_datasets.stores.names import is_writable
from audio_datasets.system.files import read_json, write_json
from audio_datasets.system.messages import brief
from audio_datasets.tasks.label_space import LabelSpace

RESULTS_FILE = "results.json"
RESULT_FILE = "result.json"
PROBE_FOLDER = "probe"
"""Folder of the linear probe in a run folder: a run folder itself."""
LARGEST_NUMBER = 1e300

CHANCE = "chance"
"""What uniform guessing comes to; for mAP, a random order."""
MAJORITY = "majority"
"""What the best constant answer comes to: the share of the most frequent class."""
BASELINE_NAMES = (CHANCE, MAJORITY)


@dataclass(frozen=True)
class Headline:
    """The number that a run is judged by."""

    metric: str
    values: tuple[float, ...]
    """The values that the mean is over: one for each fold or seed; for a pretraining run, that of the last validation."""
    mean: float
    std: float | None
    """Sample standard deviation of the values; None for one."""
    over: str | None = None
    """Whether the values are over "folds" or "seeds", if known."""
    baseline: Mapping[str, float] = field(default_factory=dict)
    """``chance`` and ``majority``: the metric without listening (``kd.evaluation.baselines``). Empty if not known."""

    @classmethod
    def of(cls, metric: str, runs: Sequence["RunResult"]) -> "Headline":
        """Mean and standard deviation of a metric: over seeds if there are several, otherwise over folds.

        With several seeds, each value is the mean over the folds of one seed.

        Raises:
            ValueError: the metric is not defined on the test clips of a run.
        """
        by_seed: dict[int, list[float]] = {}
        for run in runs:
            if run.metrics[metric] is None:
                known = [name for name, value in run.metrics.items() if isinstance(value, float)]
                raise ValueError(
                    f"{metric} is not defined on the test clips of {run.folder}; choose another metric for the task. "
                    f"Defined: {', '.join(known) or 'none'}"
                )
            by_seed.setdefault(run.seed, []).append(run.metrics[metric])
        if len(by_seed) > 1:
            values, over = [float(np.mean(found)) for found in by_seed.values()], "seeds"
        else:
            values, over = next(iter(by_seed.values())), "folds"
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        baseline = mean_baseline(metric, [run.baselines for run in runs])
        return cls(metric, tuple(values), float(np.mean(values)), std, over if std is not None else None, baseline)


@dataclass(frozen=True)
class RunResult:
    """The results of one training of a run on its test clips."""

    seed: int | None
    fold: int | None
    folder: str
    """Relative to the folder of the file that contains this result."""
    metrics: Mapping[str, Any]
    """Metrics by name, and other values that were saved with them."""
    skipped_clips: int = 0
    accepted_changes: int = 0
    """How many changes of settings the run had accepted before."""
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """Chance and majority of each metric. Empty in older files."""
    test_clips: int | None = None
    """Number of test clips that were evaluated. None in older files."""

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "metrics": dict(self.metrics), "baselines": dict(self.baselines)}

    @classmethod
    def from_json(cls, content: Any) -> "RunResult":
        """The reverse of ``to_json``. ValueError for other content."""
        counts = {name: value_of(content, name, int | None) or 0 for name in ("skipped_clips", "accepted_changes")}
        seed, fold = (value_of(content, name, int | None) for name in ("seed", "fold"))
        baselines = {
            name: _baseline(value) for name, value in (value_of(content, "baselines", dict | None) or {}).items()
        }
        return cls(
            seed,
            fold,
            value_of(content, "folder", str),
            value_of(content, "metrics", dict),
            **counts,
            baselines=baselines,
            test_clips=value_of(content, "test_clips", int | None),
        )


def mean_baseline(metric: str, of_runs: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, float]:
    """The baselines of one metric, averaged over runs; empty if a run does not have them."""
    found = [run.get(metric) for run in of_runs]
    if not found or not all(found):
        return {}
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


@dataclass(frozen=True)
class Results:
    """The results of all trainings of a run."""

    task: str
    class_names: tuple[str, ...]
    headline: Headline
    runs: tuple[RunResult, ...]
    label_space: LabelSpace | None = None
    """None for older runs, which did not record it."""
    what: str | None = None
    """What was done, such as "fine-tuned"."""
    command: str | None = None
    """The user's command line."""
    versions: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    """What the run warned of: a result near chance, or below the linear probe's."""

    def write(self, folder: Path) -> None:
        """Writes ``results.json`` into ``folder``."""
        headline = self.headline
        write_json(
            folder / RESULTS_FILE,
            {
                "task": self.task,
                "what": self.what,
                "label_groups": None if self.label_space is None else self.label_space.to_json(),
                "class_names": list(self.class_names),
                "headline": {
                    "metric": headline.metric,
                    "mean": headline.mean,
                    "std": headline.std,
                    "values": list(headline.values),
                    "spread_over": headline.over,
                    **headline.baseline,
                },
                "warnings": list(self.warnings),
                "runs": [run.to_json() for run in self.runs],
                "command": self.command,
                "versions": dict(self.versions),
            },
        )

    @classmethod
    def read(cls, folder: Path) -> "Results":
        """Reads ``results.json``; ValueError, with the path, if it is incomplete or damaged."""
        path = folder / RESULTS_FILE
        content = read_json(path)
        try:
            class_names = check_class_names(value_of(content, "class_names", list))
            runs = tuple(RunResult.from_json(run) for run in value_of(content, "runs", list))
            if not runs:
                raise ValueError("there are no runs")
            return cls(
                task=value_of(content, "task", str),
                class_names=class_names,
                headline=_headline(value_of(content, "headline", dict)),
                runs=runs,
                label_space=_label_space(content, class_names),
                what=value_of(content, "what", str | None),
                command=command_line(content.get("command")),
                versions=versions_of(content),
                warnings=_texts(value_of(content, "warnings", list | None) or []),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is incomplete or damaged: {type(error).__name__}: {error}") from error


def read_result(folder: Path) -> RunResult | None:
    """One training's ``result.json``; None if it has none. ValueError, with the path, if it is damaged."""
    path = folder / RESULT_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        return RunResult.from_json({"folder": ".", **content} if isinstance(content, dict) else content)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _headline(content: dict[str, Any]) -> Headline:
    values = tuple(_finite(value, "a value of the headline") for value in value_of(content, "values", list))
    if not values:
        raise ValueError("the headline has no values")
    over = value_of(content, "spread_over", str | None)
    if over not in (None, "seeds", "folds"):
        raise ValueError(f"spread_over must be seeds or folds; found {brief(over)}")
    metric = value_of(content, "metric", str)
    if not metric.strip():
        raise ValueError("the headline's metric has no name")
    std = content.get("std")
    return Headline(
        metric,
        values,
        _finite(content["mean"], "the headline's mean"),
        _finite(std, "the headline's std") if len(values) > 1 and std is not None else None,
        over,
        _baseline({name: content[name] for name in BASELINE_NAMES if content.get(name) is not None}),
    )


def _baseline(content: Any) -> dict[str, float]:
    if not isinstance(content, dict) or not content.keys() <= set(BASELINE_NAMES):
        raise ValueError(f"a baseline has {' and '.join(BASELINE_NAMES)}; found {brief(content)}")
    return {name: _finite(value, f"the baseline {name}") for name, value in content.items()}


def _texts(content: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(text, str) and is_writable(text) for text in content):
        raise ValueError(f"warnings are texts; found {brief(content)}")
    return tuple(content)


def _label_space(content: dict[str, Any], class_names: tuple[str, ...]) -> LabelSpace | None:
    groups = value_of(content, "label_groups", list | None)
    if groups is not None:
        label_space = LabelSpace.from_json(groups)
        if label_space.class_names != class_names:
            raise ValueError("label_groups and class_names have different classes")
        return label_space
    labels = value_of(content, "labels", str | None)  # of version 0.1
    if labels not in (None, "one", "several"):
        raise ValueError(f"labels must be one or several; found {brief(labels)}")
    return None if labels is None else LabelSpace.single(class_names, exclusive=labels == "one")


# -- Checked values from JSON that someone else may have written ---------------------------------------------------------


def value_of(content: Any, name: str, kind: type | UnionType) -> Any:
    """An entry of a JSON object; ValueError if it has another type. An entry that may be None may also be missing."""
    if not isinstance(content, dict):
        raise ValueError(f"expected an object with {name}; found {brief(content)}")
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name} has the wrong type; found {brief(value)}")
    if isinstance(value, str) and not is_writable(value):
        raise ValueError(f"{name} is not printable text; found {brief(value)}")
    return value


def is_number(value: Any) -> bool:
    """Whether a value is a usable number: finite, and not one of JSON's integers of arbitrary length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def _finite(value: Any, what: str) -> float:
    if not is_number(value):
        raise ValueError(f"{what} must be a number; found {brief(value)}")
    return float(value)


def versions_of(content: dict[str, Any]) -> dict[str, str]:
    """The versions of packages, converted to text."""
    return {name: str(version) for name, version in (value_of(content, "versions", dict | None) or {}).items()}


def command_line(found: Any) -> str | None:
    """The user's command line, saved as text or as a list of arguments; ValueError for anything else."""
    if isinstance(found, list):
        found = shlex.join(map(str, found))
    if isinstance(found, str):  # a path in it may not be UTF-8
        found = found.encode("utf-8", "backslashreplace").decode()
    if found is not None and (not isinstance(found, str) or not is_writable(found)):
        raise ValueError(f"command has the wrong type; found {brief(found)}")
    return found
