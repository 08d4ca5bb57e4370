"""What a fine-tuning run leaves behind for people and for ``kd report``: predictions of each run, results of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.files import write_json, written_aside
from audio_datasets.task import TaskClips
from kd.building import package_versions
from kd.finetune_config import FinetuneConfig
from kd.splits import Partition
from kd.task_metrics import device_metrics, task_metrics

RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.npz"


@dataclass(frozen=True)
class Predictions:
    """A student's logits on its test clips, with all that metrics need; plain arrays, n clips and C classes."""

    clip_ids: np.ndarray
    """(n,) text."""
    logits: np.ndarray
    """(n, C) float32; of a clip of several windows their mean."""
    targets: np.ndarray
    """(n, C) float32."""
    mask: np.ndarray
    """(n, C) bool: where the target is known."""
    devices: np.ndarray
    """(n,) text, empty where not known."""
    groups: np.ndarray
    """(n,) text, empty where not known."""
    sources: np.ndarray
    """(n,) text: the audio file."""
    class_names: np.ndarray
    """(C,) text."""

    @classmethod
    def of(cls, clips: TaskClips, rows: np.ndarray, logits: np.ndarray) -> "Predictions":
        chosen = [clips.clips[row] for row in rows]
        return cls(
            clip_ids=np.array([clip.clip_id for clip in chosen]),
            logits=logits.astype(np.float32),
            targets=clips.targets(rows),
            mask=clips.mask(rows),
            devices=np.array([clip.device or "" for clip in chosen]),
            groups=np.array([clip.group or "" for clip in chosen]),
            sources=np.array([str(clip.path) for clip in chosen]),
            class_names=np.array(clips.class_names),
        )

    def write(self, folder: Path) -> None:
        """Writes ``predictions.npz`` into ``folder``, aside and renamed."""
        with written_aside(folder / PREDICTIONS_FILE) as aside, open(aside, "wb") as file:
            np.savez_compressed(file, **vars(self))

    @classmethod
    def read(cls, folder: Path) -> "Predictions":
        """The predictions in ``folder``; ValueError if there are none or the file is damaged."""
        path = folder / PREDICTIONS_FILE
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in arrays.files})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} holds no predictions: {error}") from error


def metrics_of(
    clips: TaskClips, part: Partition, rows: np.ndarray, logits: np.ndarray, exclusive: bool
) -> dict[str, Any]:
    """Metrics of logits (n, C) for ``rows``, by device too where devices are known."""
    metrics = task_metrics(clips, rows, logits, "one" if exclusive else "several")
    devices = [clips.clips[row].device for row in rows]
    if exclusive and all(device is not None for device in devices):
        seen = {clips.clips[row].device for row in part.train}
        classes = clips.targets(rows).argmax(axis=1)
        metrics |= device_metrics(devices, seen, classes, logits, clips.class_names)
    return metrics


def headline(metric: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean and spread (sample standard deviation) of a metric: over seeds if there are several, else over folds.

    With several seeds a value is the mean over one seed's folds.
    """
    by_seed: dict[int, list[float]] = {}
    for run in runs:
        by_seed.setdefault(run["seed"], []).append(run["metrics"][metric])
    if len(by_seed) > 1:
        values, over = [float(np.mean(found)) for found in by_seed.values()], "seeds"
    else:
        values, over = next(iter(by_seed.values())), "folds"
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {
        "metric": metric,
        "mean": float(np.mean(values)),
        "std": std,
        "values": values,
        "spread_over": over if std is not None else None,
    }


def write_results(
    folder: Path,
    config: FinetuneConfig,
    clips: TaskClips,
    runs: Sequence[dict[str, Any]],
    found: dict[str, Any],
    command: str,
    what: str,
) -> None:
    """Writes ``results.json``, which ``kd report`` and ``kd compare`` read; folders are relative to the run's."""
    write_json(
        folder / "results.json",
        {
            "task": config.task,
            "what": what,
            "class_names": list(clips.class_names),
            "headline": found,
            "runs": [{**run, "folder": (config.out / run["folder"]).relative_to(folder).as_posix()} for run in runs],
            "command": command,
            "versions": package_versions(),
        },
    )
