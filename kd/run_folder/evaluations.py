"""What ``kd evaluate --out RUN/test.json`` left in a run folder. Written by ``kd/evaluate.py``, read here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from audio_datasets.stores.class_lists import is_writable
from audio_datasets.system.files import read_json
from kd.run_folder.results import is_number

PREFERRED_FILE = "test.json"
METRICS = ("mAP", "roc_auc", "d_prime", "category_accuracy")
HEADLINE_METRIC = "mAP"


@dataclass(frozen=True)
class Evaluation:
    """Metrics of one student on one selection of clips."""

    path: Path
    clips: str
    """The clip store's path."""
    clips_fingerprint: str | None
    """Fingerprint of the clip store; None in files of older versions."""
    selection: str
    """The split, the folds and the part of each clip, in words; empty for all clips, heard whole."""
    num_clips: int
    metrics: Mapping[str, float]
    """The numbers of ``METRICS`` that are defined."""
    average_precisions: Mapping[str, float]
    """By class name."""

    @property
    def key(self) -> tuple[str, str, int]:
        """The same for evaluations on the same clips."""
        return (self.clips_fingerprint or Path(self.clips).name, self.selection, self.num_clips)

    def __str__(self) -> str:
        selection = f", {self.selection}" if self.selection else ""
        return f"{Path(self.clips).name}{selection}, {self.num_clips:,} clips ({self.path.name})"


def read_evaluations(folder: Path) -> tuple[Evaluation, ...]:
    """The evaluations in a run folder: ``test.json`` first, then the others by name.

    Raises:
        ValueError: a JSON file in the folder is damaged.
    """
    files = sorted(folder.glob("*.json"), key=lambda path: (path.name != PREFERRED_FILE, path.name))
    found = (_evaluation(path, read_json(path)) for path in files)
    return tuple(evaluation for evaluation in found if evaluation is not None)


def _evaluation(path: Path, content: Any) -> Evaluation | None:
    """None for a JSON file that is something else."""
    if not isinstance(content, dict) or not {"tagger", "clips", "num_clips", HEADLINE_METRIC} <= content.keys():
        return None
    clips, count, fingerprint = content["clips"], content["num_clips"], content.get("clips_fingerprint")
    if not _is_text(clips) or type(count) is not int or not (fingerprint is None or _is_text(fingerprint)):
        raise ValueError(f"{path} is damaged: it does not say which clips were evaluated")
    metrics = {name: float(content[name]) for name in METRICS if is_number(content.get(name))}
    if HEADLINE_METRIC not in metrics:
        raise ValueError(f"{path} is damaged: {HEADLINE_METRIC} is not a number")
    return Evaluation(path, clips, fingerprint, _selection(content), count, metrics, _by_class(content.get("classes")))


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and is_writable(value)


def _selection(content: Mapping[str, Any]) -> str:
    split, folds = content.get("split"), content.get("folds") or []
    words = [f"split {split}"] if _is_text(split) else []
    if isinstance(folds, list) and folds:
        words.append(f"folds {' '.join(map(str, folds))}")
    if "clip_seconds" not in content:
        words.append("the beginning of each clip")  # all that version 0.1 heard
    elif is_number(content["clip_seconds"]):
        words.append(f"the first {content['clip_seconds']:g} s of each clip")
    return ", ".join(words)


def _by_class(classes: Any) -> dict[str, float]:
    if not isinstance(classes, dict):
        return {}
    values = {name: entry.get("average_precision") for name, entry in classes.items() if isinstance(entry, dict)}
    return {name: float(value) for name, value in values.items() if is_number(value)}


def common_evaluations(runs: Sequence[Sequence[Evaluation]]) -> list[Evaluation] | None:
    """One evaluation of each run, all on the same clips; None if there are no such."""
    for first in runs[0]:
        chosen = [next((other for other in found if other.key == first.key), None) for found in runs]
        if all(evaluation is not None for evaluation in chosen):
            return chosen
    return None
