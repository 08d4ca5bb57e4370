"""What a fine-tuning run leaves behind for people and for ``kd report``: predictions of each run, results of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from audio_datasets.system.files import write_json, written_aside
from audio_datasets.tasks.task import TaskClips
from kd.data.splits import Partition
from kd.evaluation.task_metrics import device_metrics, task_metrics
from kd.training.building import package_versions
from kd.training.config import as_json
from kd.training.finetune_config import FinetuneConfig

RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.npz"
VALIDATION_FILE = "validation_predictions.npz"


def write_predictions(path: Path, clips: TaskClips, rows: np.ndarray, logits: np.ndarray, part: Partition) -> None:
    """Writes logits (n, C) of ``rows`` as plain arrays with all that metrics need, aside and renamed.

    ``clip_ids`` (n,), ``logits`` (n, C) float32, ``targets`` (n, C) float32, ``mask`` (n, C) bool where targets are known,
    ``class_names`` (C,), ``source`` (n,) the audio files; ``device``, ``device_seen`` (n,), whether it is among the
    training clips', and ``group`` (n,) where every clip has one.
    """
    chosen = [clips.clips[row] for row in rows]
    arrays = {
        "clip_ids": np.array([clip.clip_id for clip in chosen]),
        "logits": logits.astype(np.float32),
        "targets": clips.targets(rows),
        "mask": clips.mask(rows),
        "class_names": np.array(clips.class_names),
        "source": np.array([str(clip.path) for clip in chosen]),
    }
    if all(clip.device is not None for clip in chosen):
        arrays["device"] = np.array([clip.device for clip in chosen])
        arrays["device_seen"] = np.isin(arrays["device"], sorted(devices_of(clips, part.train)))
    if all(clip.group is not None for clip in chosen):
        arrays["group"] = np.array([clip.group for clip in chosen])
    with written_aside(path) as aside, open(aside, "wb") as file:
        np.savez_compressed(file, **arrays)


def devices_of(clips: TaskClips, rows: np.ndarray) -> set[str]:
    """The devices that occur among ``rows``."""
    return {device for row in rows if (device := clips.clips[row].device) is not None}


def metrics_of(
    clips: TaskClips, part: Partition, rows: np.ndarray, logits: np.ndarray, exclusive: bool
) -> dict[str, Any]:
    """Metrics of logits (n, C) for ``rows``, by device too where devices are known."""
    metrics = task_metrics(clips, rows, logits, "one" if exclusive else "several")
    devices = [clips.clips[row].device for row in rows]
    if exclusive and all(device is not None for device in devices):
        classes = clips.targets(rows).argmax(axis=1)
        metrics |= device_metrics(devices, devices_of(clips, part.train), classes, logits, clips.class_names)
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
    exclusive: bool,
) -> None:
    """Writes ``results.json``, which ``kd report`` and ``kd compare`` read; folders are relative to the run's.

    The probe's folder gets the configuration as well, and is thereby a run folder too.
    """
    if folder != config.out:
        write_json(folder / "config.json", as_json(config))
    write_json(
        folder / "results.json",
        {
            "task": config.task,
            "what": what,
            "labels": "one" if exclusive else "several",
            "class_names": list(clips.class_names),
            "headline": found,
            "runs": [{**run, "folder": (config.out / run["folder"]).relative_to(folder).as_posix()} for run in runs],
            "command": command,
            "versions": package_versions(),
        },
    )
