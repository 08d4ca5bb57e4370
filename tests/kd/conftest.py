"""Run folders as `kd finetune` and `kd pretrain` leave them, made by hand."""

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.system.files import write_json
from audio_datasets.system.randomness import generator
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

DEVICES = ("a", "b", "s1", "s6")
UNSEEN_DEVICES = ("s6",)


def write_curves(folder: Path, metrics: Sequence[str], epochs: int, number: int) -> None:
    """``metrics.jsonl`` of a training that gets better."""
    folder.mkdir(parents=True, exist_ok=True)
    noise = generator(3, "curves", 0, number)
    with open(folder / "metrics.jsonl", "w", encoding="utf-8") as file:
        for epoch in range(epochs):
            done = (epoch + 1) / epochs
            for half in range(2):
                record = {"kind": "train", "step": 2 * epoch + half + 1, "epoch": epoch}
                record |= {"loss": 0.7 * 0.05**done + 0.01 * noise.random(), "learning_rate": 1e-3 * (1 - 0.9 * done)}
                file.write(json.dumps(record) + "\n")
            record = {"kind": "validation", "step": 2 * epoch + 2, "epoch": epoch}
            record |= {name: 0.9 * done + 0.05 * noise.random() for name in metrics} | {"classes_left_out": []}
            file.write(json.dumps(record) + "\n")


def write_part(
    folder: Path,
    class_names: Sequence[str],
    *,
    clip_ids: Sequence[str],
    one_label: bool,
    number: int = 0,
    masked: bool = False,
    devices: bool = False,
    sounds: Path | None = None,
    recorded: bool = True,
    sharpness: float = 2.0,
    epochs: int = 6,
) -> None:
    """A fold's folder: student, curves, and predictions of ``clip_ids`` that follow the targets with much noise."""
    noise = generator(5, "predictions", 0, number)
    shape = (len(clip_ids), len(class_names))
    if one_label:
        targets = np.eye(shape[1], dtype=np.float32)[np.arange(shape[0]) % shape[1]]
    else:
        targets = (noise.random(shape) < np.linspace(0.02, 0.4, shape[1])).astype(np.float32)
    difficulty = np.linspace(0.3, 1.5, shape[1])
    logits = sharpness * difficulty * (2 * targets - 1) + 1.5 * noise.standard_normal(shape)
    arrays = {
        "clip_ids": np.array(clip_ids),
        "logits": logits.astype(np.float32),
        "targets": targets,
        "class_names": np.array(class_names),
    }
    if masked:
        arrays["mask"] = noise.random(shape) < 0.7
    if devices:
        arrays["device"] = np.array([DEVICES[index % len(DEVICES)] for index in range(shape[0])])
        arrays["device_seen"] = ~np.isin(arrays["device"], UNSEEN_DEVICES)
    if sounds is not None:
        files = [sounds / f"{clip_id}.wav" for clip_id in clip_ids]
        arrays["source"] = np.array([str(file) for file in files])
        if recorded:
            arrays["content"] = np.array([blake2b(file.read_bytes(), digest_size=16).hexdigest() for file in files])
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "predictions.npz", **arrays)
    write_curves(folder, ["accuracy", "log_loss"] if one_label else ["mAP"], epochs, number)
    save_student(folder, create_student("mn01", len(class_names)), class_names, LogMelConfig(), {"clip_seconds": 5.0})


def write_run(
    path: Path,
    class_names: Sequence[str] = ("hiss", "hum, low", "click"),
    *,
    one_label: bool = True,
    seeds: Sequence[int] = (0,),
    folds: Sequence[int] = (1, 2),
    clips: int = 60,
    metric: str | None = None,
    config: dict | None = None,
    **options: object,
) -> Path:
    """A finished fine-tuning run: folds divide the clips, every seed hears all of them."""
    metric = metric or ("accuracy" if one_label else "mAP")
    runs = []
    for seed in seeds:
        for place, fold in enumerate(folds or [None]):
            names = ([f"seed{seed}"] if len(seeds) > 1 else []) + ([f"fold{fold}"] if fold is not None else [])
            folder = "/".join(names) or "."
            ids = [f"clip-{index:05d}" for index in range(place, clips, max(len(folds), 1))]
            write_part(path / folder, class_names, clip_ids=ids, one_label=one_label, number=len(runs), **options)  # type: ignore[arg-type]
            values = {metric: 0.8 + 0.01 * len(runs)} | ({"log_loss": 0.5} if one_label else {}) | {"absent": []}
            runs.append({"seed": seed, "fold": fold, "metrics": values, "folder": folder})
            write_json(path / folder / "result.json", runs[-1])
    by_seed = {seed: [run["metrics"][metric] for run in runs if run["seed"] == seed] for seed in seeds}
    values = [float(np.mean(found)) for found in by_seed.values()] if len(seeds) > 1 else by_seed[seeds[0]]
    write_json(
        path / "results.json",
        {
            "task": "noises",
            "what": "fine-tuned",
            "class_names": list(class_names),
            "headline": {
                "metric": metric,
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "values": values,
                "spread_over": ("seeds" if len(seeds) > 1 else "folds") if len(values) > 1 else None,
            },
            "runs": runs,
            "command": ["kd", "finetune", "--task", "noises", "--data", "my sounds"],
            "versions": {"torch": "2.14.1"},
        },
    )
    write_json(
        path / "config.json",
        {"task": "noises", "student": "mn01", "loop": {"epochs": 6, "batch_size": 8}, "init": None, **(config or {})},
    )
    return path


def write_pretraining_run(
    path: Path,
    class_names: Sequence[str] = ("hiss", "hum, low", "click"),
    *,
    validated: bool = False,
    finished: bool = True,
) -> Path:
    """A run of ``kd pretrain``, with or without validations; one that is not finished has no student yet."""
    write_curves(path, ["mAP"] if validated else [], 4, 0)
    write_json(path / "config.json", {"student": "mn01", "weights": None, "loop": {"epochs": 4, "batch_size": 8}})
    if finished:
        save_student(path, create_student("mn01", len(class_names)), class_names, LogMelConfig(), {"clip_seconds": 5.0})
    if not validated:
        lines = (path / "metrics.jsonl").read_text().splitlines(keepends=True)
        (path / "metrics.jsonl").write_text("".join(line for line in lines if "validation" not in line))
    return path


@pytest.fixture
def make_pretraining_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes the folder of a pretraining run: ``make_pretraining_run("a", validated=True)``."""
    return lambda name, **options: write_pretraining_run(tmp_path / name, **options)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder for a test: ``make_run("a", one_label=False, folds=())``."""
    return lambda name, *arguments, **options: write_run(tmp_path / name, *arguments, **options)
