"""The results of one fold of a fine-tuning run: its metrics, its predictions, and its linear probe as a student.

Shapes: n clips, C classes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from audio_datasets.tasks.task import TaskClips
from kd.data.splits import Partition
from kd.evaluation.label_metrics import device_metrics, label_metrics
from kd.evaluation.probe import LinearProbe
from kd.run_folder.config import as_json
from kd.run_folder.predictions import write_predictions
from kd.stages.build_run import package_versions
from kd.stages.finetuning_setup import FinetuneSetup
from kd.stages.teachers import link_of_space
from students.card import save_student
from students.linear_head import with_linear_head
from teacher_logits.teachers.run_ensemble import write_trained_on


def fold_metrics(clips: TaskClips, part: Partition, rows: np.ndarray, logits: np.ndarray) -> dict[str, Any]:
    """Metrics of logits (n, C) for ``rows``, also by device if devices are known."""
    targets, space = clips.targets(rows), clips.label_space
    metrics = label_metrics(space, targets, clips.mask(rows), logits)
    devices = [clips.clips[row].device for row in rows]
    if len(space.groups) == 1 and space.exclusive and all(device is not None for device in devices):
        seen = devices_of(clips, part.train)
        metrics |= device_metrics(devices, seen, targets.argmax(axis=1), logits, space.class_names)
    return metrics


def write_fold_predictions(path: Path, clips: TaskClips, part: Partition, rows: np.ndarray, logits: np.ndarray) -> None:
    """Writes logits (n, C) of ``rows`` with all that reports need to know of the clips."""
    chosen = [clips.clips[row] for row in rows]
    columns: dict[str, Any] = {"source": [clip.place for clip in chosen]}
    columns["content"] = [(clips.content_digest(int(row)) or b"").hex() for row in rows]
    if all(clip.device is not None for clip in chosen):
        columns["device"] = [clip.device for clip in chosen]
        columns["device_seen"] = np.isin(columns["device"], sorted(devices_of(clips, part.train)))
    if all(clip.group is not None for clip in chosen):
        columns["group"] = [clip.group for clip in chosen]
    write_predictions(
        path,
        clip_ids=[clip.clip_id for clip in chosen],
        logits=logits,
        targets=clips.targets(rows),
        mask=clips.mask(rows),
        class_names=clips.class_names,
        columns=columns,
    )


def devices_of(clips: TaskClips, rows: np.ndarray) -> set[str]:
    """The devices that occur among ``rows``."""
    return {device for row in rows if (device := clips.clips[row].device) is not None}


def save_probe(
    folder: Path, setup: FinetuneSetup, probe: LinearProbe, part: Partition, seed: int, fitted: np.ndarray
) -> None:
    """Saves a linear probe as a student: the one that the run starts from, with the probe in place of its head.

    ``fitted`` are the rows of the clips that it was fitted on. Says so if the student's head cannot be replaced by a linear layer;
    then nothing is saved.
    """
    config = setup.config
    weight, bias = torch.from_numpy(probe.weight), torch.from_numpy(probe.bias)
    try:
        student = with_linear_head(setup.starting_student(seed), weight, bias, config.frontend.n_mels)
    except ValueError as error:
        print(f"the linear probe is not saved as a student: {error}")
        return
    about = {
        "made_by": "linear probe",
        "config": as_json(config),
        "clip_seconds": config.clip_seconds,
        "short_clips": config.short_clips,
        "clips": setup.clips.fingerprint,
        "link": link_of_space(setup.label_space).to_json(),
        "task": setup.task.name,
        "licence_of_the_data": setup.task.licence,
        "seed": seed,
        "test_fold": part.fold,
        "label_groups": setup.label_space.to_json(),
        "versions": package_versions(),
    }
    write_trained_on(folder, [setup.clips.clip_id(int(row)) for row in fitted])
    save_student(folder, student, setup.clips.class_names, config.frontend, about)
