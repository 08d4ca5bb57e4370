"""What a run folder holds, read and checked: of a fine-tuning run with its folds and seeds, or of a pretraining run.

Shapes: N clips, C classes.
"""

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Any

import numpy as np

from audio_datasets.stores.class_lists import check_class_names, is_writable
from audio_datasets.system.files import read_arrays, read_json
from audio_datasets.system.messages import brief, listed
from kd.training.runlog import read_metrics
from students.weights import CARD_FILE, StudentCard, read_card

CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"
PART_RESULT_FILE = "result.json"
PROBE_FOLDER = "probe"
METRICS_FILE = "metrics.jsonl"
PREDICTIONS_FILE = "predictions.npz"
VALIDATION_FILE = "validation_predictions.npz"

PART_PATTERNS = ("fold*", "seed*", "seed*/fold*")
NOT_MEASURED = ("kind", "step", "epoch")
LARGEST_NUMBER = 1e300
KINDS = {
    **dict.fromkeys(("clip_ids", "class_names", "source", "device", "group"), "U"),
    **dict.fromkeys(("logits",), "f"),
    **dict.fromkeys(("targets", "mask", "device_seen"), "biuf"),
}
"""What the arrays of predictions may hold, as NumPy's kinds."""
SINGLE_LABEL_METRICS = ("accuracy", "macro_accuracy", "log_loss", "macro_log_loss")


@dataclass(frozen=True)
class Predictions:
    """What a student said about clips that it was not trained on. Checked when made."""

    clip_ids: np.ndarray
    """(N,) strings, each once."""
    logits: np.ndarray
    """(N, C) float32."""
    targets: np.ndarray
    """(N, C) bool."""
    known: np.ndarray
    """(N, C) bool: of which classes it is known whether the clip has them."""
    devices: np.ndarray | None = None
    """(N,) strings: what each clip was recorded with."""
    device_seen: np.ndarray | None = None
    """(N,) bool: whether the student was trained on clips from that device."""
    sources: np.ndarray | None = None
    """(N,) strings: the clips' audio files."""

    def __post_init__(self) -> None:
        shape = self.logits.shape
        if len(shape) != 2 or self.targets.shape != shape or self.known.shape != shape:
            raise ValueError(
                f"logits {shape}, targets {self.targets.shape} and mask {self.known.shape} must be (clips, classes)"
            )
        for name in ("clip_ids", "devices", "device_seen", "sources"):
            values = getattr(self, name)
            if values is not None and values.shape != shape[:1]:
                raise ValueError(f"{name} {values.shape} must have one value for each of the {shape[0]} clips")
        if not np.isfinite(self.logits).all():
            raise ValueError(
                f"{int((~np.isfinite(self.logits)).any(axis=1).sum())} clips have logits that are not finite"
            )
        if len(np.unique(self.clip_ids)) < len(self.clip_ids):
            raise ValueError("a clip occurs more than once")

    @property
    def one_label(self) -> bool:
        """Whether every clip has exactly one class, and everything is known."""
        return bool(self.known.all() and (self.targets.sum(axis=1) == 1).all())

    @classmethod
    def read(cls, path: Path, class_names: Sequence[str] | None) -> "Predictions":
        """Reads ``predictions.npz``; the class list in it, if there is one, must be ``class_names``.

        Raises:
            ValueError: a file that is damaged, incomplete, of another class list, or that holds Python objects.
        """
        arrays = read_arrays(path)
        missing = {"clip_ids", "logits", "targets"} - arrays.keys()
        if missing:
            raise ValueError(f"{path} has no {listed(sorted(missing))}; found {listed(sorted(arrays))}")
        for name, array in arrays.items():
            if array.dtype.kind not in KINDS.get(name, array.dtype.kind) or array.ndim < 1:
                raise ValueError(f"{path}: {name} holds values of another kind; found {array.dtype} {array.shape}")
        found = tuple(map(str, arrays["class_names"])) if "class_names" in arrays else None
        if class_names is not None and found is not None and found != tuple(class_names):
            raise ValueError(
                f"{path} has another class list than the run: {len(found)} against {len(class_names)} names"
            )
        names = class_names if class_names is not None else found
        if names is None or arrays["logits"].shape[1:] != (len(names),):
            raise ValueError(f"{path}: logits {arrays['logits'].shape} do not fit {len(names or ())} class names")
        targets = arrays["targets"] > 0.5
        if not np.isin(arrays["targets"], (0, 1)).all():
            raise ValueError(f"{path}: targets are 0 or 1; found others")
        try:
            return cls(
                clip_ids=arrays["clip_ids"].astype(str),
                logits=arrays["logits"].astype(np.float32),
                targets=targets,
                known=arrays["mask"] > 0.5 if "mask" in arrays else np.ones_like(targets),
                devices=arrays["device"].astype(str) if "device" in arrays else None,
                device_seen=arrays["device_seen"].astype(bool) if "device_seen" in arrays else None,
                sources=arrays["source"].astype(str) if "source" in arrays else None,
            )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error


@dataclass(frozen=True)
class Part:
    """One training within a run: a fold, a seed, or all of it."""

    folder: Path
    class_names: tuple[str, ...] | None
    seed: int | None = None
    fold: int | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    """On its test clips; numbers by name, and what else was noted with them."""
    label: str = ""
    """What tells it from the other parts, such as ``"seed 1, fold 2"``; empty if it is the only one."""

    @cached_property
    def predictions(self) -> Predictions | None:
        return self._predictions(PREDICTIONS_FILE)

    @cached_property
    def validation(self) -> Predictions | None:
        """What the student said about the clips that it was chosen on, if that was kept."""
        return self._predictions(VALIDATION_FILE)

    def _predictions(self, name: str) -> Predictions | None:
        path = self.folder / name
        return Predictions.read(path, self.class_names) if path.is_file() else None

    @cached_property
    def card(self) -> StudentCard | None:
        """The trained student's card; None before there is one."""
        return read_card(self.folder) if (self.folder / CARD_FILE).is_file() else None

    @cached_property
    def records(self) -> list[dict[str, Any]]:
        """What was logged while training."""
        path = self.folder / METRICS_FILE
        return read_metrics(path) if path.is_file() else []

    def curve(self, kind: str, name: str) -> tuple[np.ndarray, np.ndarray]:
        """A logged value over the number of epochs finished: (epochs,), (values,).

        Of several records in an epoch the mean counts (of the learning rate, the last).
        """
        values: dict[int, list[float]] = {}
        for record in self.records:
            if record["kind"] == kind and is_number(record.get(name)):
                values.setdefault(record["epoch"] + 1, []).append(record[name])
        means = [found[-1] if name == "learning_rate" else float(np.mean(found)) for found in values.values()]
        return np.array(list(values), dtype=np.int64), np.array(means)

    def measured(self, kind: str) -> list[str]:
        """The names of what was logged under ``kind``, in the order of their first record."""
        names = {
            name: None
            for record in self.records
            if record["kind"] == kind
            for name, value in record.items()
            if name not in NOT_MEASURED and is_number(value)
        }
        return list(names)


@dataclass(frozen=True)
class Headline:
    """The number that a run is judged by."""

    metric: str
    values: tuple[float, ...]
    """What it is the mean of: the value of each fold or of each seed; of a pretraining run, that of the last validation."""
    mean: float
    std: float | None
    """Standard deviation of the values; None for one."""
    over: str | None = None
    """What the values are of: "folds" or "seeds", where the run says so."""


@dataclass(frozen=True)
class RunFolder:
    """A run folder's content. Fold and seed folders are read when they are asked for."""

    path: Path
    config: Mapping[str, Any]
    parts: tuple[Part, ...]
    task: str | None = None
    class_names: tuple[str, ...] | None = None
    headline: Headline | None = None
    finished: bool = False
    """Whether the results, or the trained student, are there."""
    command: str | None = None
    """What the user called."""
    versions: Mapping[str, str] = field(default_factory=dict)
    what: str | None = None
    """What was done, such as "fine-tuned"."""
    labels: str | None = None
    """Whether a clip has "one" class or "several", where the run says so."""

    @classmethod
    def read(cls, path: str | Path) -> "RunFolder":
        """Reads a run folder, finished or not.

        Raises:
            ValueError: no run folder, or one that is damaged.
        """
        path = Path(path)
        config_path, results_path = path / CONFIG_FILE, path / RESULTS_FILE
        if not config_path.is_file():
            if not results_path.is_file():
                found = (
                    f"there is neither {CONFIG_FILE} nor {RESULTS_FILE} in it" if path.is_dir() else "it is not there"
                )
                raise ValueError(
                    f"{path} is no run folder: {found}. A run folder is what kd pretrain or kd finetune wrote to --out"
                )
            config_path = path.parent / CONFIG_FILE  # results of a linear probe lie within the run
        config = read_json(config_path) if config_path.is_file() else {}
        if not isinstance(config, dict):
            raise ValueError(f"{config_path} must hold a JSON object; found {type(config).__name__}")
        if config.get("probe_only") and not results_path.is_file():
            return cls.read(path / PROBE_FOLDER)
        if results_path.is_file():
            return _with_results(path, config, read_json(results_path))
        return _without_results(path, config)

    @property
    def probe(self) -> "RunFolder | None":
        """The linear probe on the frozen student that the run began with, if there was one."""
        path = self.path / PROBE_FOLDER
        return RunFolder.read(path) if (path / RESULTS_FILE).is_file() else None

    @property
    def predictions(self) -> list[tuple[Part, Predictions]]:
        """The parts that have them, with them."""
        return [(part, part.predictions) for part in self.parts if part.predictions is not None]

    @property
    def one_label(self) -> bool:
        """Whether each clip has exactly one class: as the run says, else by its metric, else by its predictions."""
        if self.labels is not None:
            return self.labels == "one"
        if self.headline is not None:
            return self.headline.metric in SINGLE_LABEL_METRICS
        return all(predictions.one_label for _, predictions in self.predictions)

    @property
    def card(self) -> StudentCard | None:
        """The card of the first trained student."""
        return next((part.card for part in self.parts if part.card is not None), None)


def is_number(value: Any) -> bool:
    """Whether a value is a number that means something: finite, and not one of JSON's whole numbers of any length."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -LARGEST_NUMBER < value < LARGEST_NUMBER


def _with_results(path: Path, config: dict[str, Any], results: Any) -> RunFolder:
    """A finished fine-tuning run."""
    try:
        class_names = check_class_names(_of_kind(results, "class_names", list))
        headline, runs = _of_kind(results, "headline", dict), _of_kind(results, "runs", list)
        values = tuple(_finite(value, "a value of the headline") for value in _of_kind(headline, "values", list))
        if not values or not runs:
            raise ValueError("there are no values, or no runs")
        parts = tuple(_part(path, class_names, run) for run in runs)
        over = _of_kind(headline, "spread_over", str | None)
        if over not in (None, "seeds", "folds"):
            raise ValueError(f"spread_over is seeds or folds; found {brief(over)}")
        labels = _of_kind(results, "labels", str | None)
        if labels not in (None, "one", "several"):
            raise ValueError(f"labels is one or several; found {brief(labels)}")
        metric = _of_kind(headline, "metric", str)
        if not metric.strip():
            raise ValueError("the headline's metric has no name")
        std = headline.get("std")
        return RunFolder(
            path=path,
            config=config,
            parts=_labelled(parts),
            task=_of_kind(results, "task", str),
            class_names=class_names,
            headline=Headline(
                metric,
                values,
                _finite(headline["mean"], "the headline's mean"),
                _finite(std, "the headline's std") if len(values) > 1 and std is not None else None,
                over,
            ),
            finished=True,
            command=_command(results.get("command")),
            versions=_versions(results),
            what=_of_kind(results, "what", str | None),
            labels=labels,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path / RESULTS_FILE} is incomplete or damaged: {type(error).__name__}: {error}") from error


def _of_kind(content: Any, name: str, kind: type | UnionType) -> Any:
    """An entry of a JSON object; ValueError if it is of another kind. One that may be None may also be absent."""
    if not isinstance(content, dict):
        raise ValueError(f"an object with {name} is needed; found {brief(content)}")
    value = content.get(name)
    if not isinstance(value, kind):
        raise ValueError(f"{name} is of the wrong kind; found {brief(value)}")
    if isinstance(value, str) and not is_writable(value):
        raise ValueError(f"{name} is no text; found {brief(value)}")
    return value


def _finite(value: Any, what: str) -> float:
    if not is_number(value):
        raise ValueError(f"{what} is a number; found {brief(value)}")
    return float(value)


def _part(path: Path, class_names: tuple[str, ...], run: Any) -> Part:
    """A part as the results tell of it. What they name lies in the run folder, of which it is not known who wrote it."""
    folder = Path(os.path.normpath(path / _of_kind(run, "folder", str)))
    # The results of a linear probe lie in a folder of the run, whose parts are beside it.
    roots = (path, path.parent) if path.name == PROBE_FOLDER else (path,)
    if not any(folder.is_relative_to(os.path.normpath(root)) for root in roots) or "\0" in str(folder):
        raise ValueError(f"a part's folder lies in the run folder; found {brief(run['folder'])}")
    seed, fold = (_of_kind(run, name, int | None) for name in ("seed", "fold"))
    return Part(folder, class_names, seed, fold, _of_kind(run, "metrics", dict))


def _versions(content: dict[str, Any]) -> dict[str, str]:
    """The versions of packages, as text whatever they are."""
    return {name: str(version) for name, version in (_of_kind(content, "versions", dict | None) or {}).items()}


def _command(found: Any) -> str | None:
    """What the user called, which is kept as text or as a list of arguments."""
    if isinstance(found, list):
        found = shlex.join(map(str, found))
    if found is not None and (not isinstance(found, str) or not is_writable(found)):
        raise ValueError(f"command is of the wrong kind; found {brief(found)}")
    return found


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
            _part_metrics(folder / PART_RESULT_FILE),
        )
        for folder in folders
    )
    # A fine-tuning run is not finished without its results.
    card = parts[0].card if parts and parts[0].folder == path and "task" not in config else None
    provenance = card.provenance if card is not None else {}
    return RunFolder(
        path=path,
        config=config,
        parts=_labelled(parts),
        task=config.get("task"),
        class_names=class_names,
        headline=_last_validation(parts[0]) if card is not None else None,
        finished=card is not None,
        command=_command(provenance.get("command")),
        versions=_versions(provenance),
    )


def _part_metrics(path: Path) -> Mapping[str, Any]:
    """The metrics of a part that is finished while the run is not; empty if it is not."""
    if not path.is_file():
        return {}
    result = read_json(path)
    if not isinstance(result, dict) or not isinstance(result.get("metrics"), dict):
        raise ValueError(f"{path} is damaged: it has no metrics")
    return result["metrics"]


def _labelled(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts, named by the seed and the fold as far as those differ."""
    several = [name for name in ("seed", "fold") if len({getattr(part, name) for part in parts}) > 1]
    return tuple(replace(part, label=", ".join(f"{name} {getattr(part, name)}" for name in several)) for part in parts)


def _number(folder: Path, run: Path, name: str) -> int | None:
    """The 3 of ``seed1/fold3`` for "fold"."""
    for step in folder.relative_to(run).parts:
        if step.startswith(name) and step.removeprefix(name).isdigit():
            return int(step.removeprefix(name))
    return None


def _last_validation(part: Part) -> Headline | None:
    """The first metric of the last validation."""
    names = part.measured("validation")
    if not names:
        return None
    value = float(part.curve("validation", names[0])[1][-1])
    return Headline(names[0], (value,), value, None)


def flat_settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested configuration as names with dots and values as text."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, dict):
            flat |= flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            flat[f"{prefix}{name}"] = " ".join(map(str, value)) or "–"
        else:
            flat[f"{prefix}{name}"] = "–" if value is None else str(value)
    return flat
