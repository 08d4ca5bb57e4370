"""The real run: a public AudioSet student teaches smaller ones on ESC-10's recordings, against labels alone.

    python benchmarks/distil_esc10.py --reference ../shared --out runs/esc10

Packs ESC-10 with AudioSet's class names as targets, stores the teacher's logits, trains every student on folds 1 to 4 with
labels alone and with distillation (same steps, same seeds), evaluates on fold 5 and prints a Markdown table with mean and
sample standard deviation over the seeds. Each stage is one of our commands; a run that was stopped goes on. The table goes to
docs/results.md.
"""

import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from machine import machine

METRICS = {"mAP": "mAP", "roc_auc": "ROC AUC", "category_accuracy": "accuracy"}


@dataclass(frozen=True)
class RealRunConfig:
    """Distil small students on ESC-10 and compare them with students that saw labels alone."""

    reference: Path
    """Folder with data/ESC-10, data/checkpoints/mn04_as_mAP_432.pt and data/labels."""
    out: Path
    """Folder for stores and runs."""
    students: tuple[str, ...] = ("mn01", "mn02")
    """Students to train."""
    label_weights: tuple[float, ...] = (0.1, 0.5)
    """Weights of the labels in the distilled runs; 0.1 is the paper's."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    epochs: int = 60
    """Epochs of 320 clips."""
    batch_size: int = 16
    """Clips in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    jobs: int = 2
    """Runs at the same time, of one thread each."""


def kd(*words: object, threads: int = 1) -> None:
    """Runs a command; its output goes to a log in front of the results."""
    command = [sys.executable, "-m", "kd.cli", *map(str, words)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"kd {shlex.join(map(str, words))} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    print(f"$ kd {shlex.join(map(str, words))}", flush=True)


def main() -> None:
    config = tyro.cli(RealRunConfig)
    clips, logits = config.out / "esc10.h5", config.out / "logits" / "mn04_as_mAP_432.h5"
    checkpoint = f"mn04@{config.reference / 'data' / 'checkpoints' / 'mn04_as_mAP_432.pt'}"
    class_names = config.reference / "data" / "labels" / "audioset_class_labels_indices.csv"
    kd(
        *("pack", config.reference / "data" / "ESC-10", "--out", clips, "--audio", "pcm16"),
        *("--class-names", class_names, "--label-map", "esc50_to_audioset"),
    )
    kd("teach", "--clips", clips, "--teacher", checkpoint, "--out", logits.parent)
    kd("verify", "--clips", clips, "--logits", logits)

    def evaluate(tagger: object, results: Path, *more: object) -> dict:
        kd(
            *("evaluate", "--tagger", tagger, "--clips", clips, "--folds", 5, "--out", results, "--workers", 0),
            *("--label-map", "esc50_to_audioset", *more),
        )
        return json.loads(results.read_text())

    def train(job: tuple[float, int, str]) -> dict:
        label_weight, seed, student = job
        run = config.out / f"{student}-label-weight-{label_weight:g}-{seed}"
        kd(
            *("pretrain", "--clips", clips, "--folds", 1, 2, 3, 4, "--out", run, "--student", student, "--seed", seed),
            *("--epochs", config.epochs, "--batch-size", config.batch_size, "--learning-rate", config.learning_rate),
            *("--clip-seconds", 5, "--workers", 0, "--log-every-steps", 20),
            *("--label-weight", label_weight, *(() if label_weight == 1 else ("--logits", logits))),
        )
        return evaluate(run, run / "fold5.json")

    weights = (1.0, *config.label_weights)
    jobs = list(itertools.product(weights, config.seeds, config.students))
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(jobs, pool.map(train, jobs), strict=True))

    print(f"\n{machine()}; seeds {list(config.seeds)}\n")
    print(f"| model | trained on | {' | '.join(METRICS.values())} |\n|---|---|{'---|' * len(METRICS)}")
    for seconds in (10, 5):
        result = evaluate(checkpoint, config.out / f"teacher-{seconds}s.json", "--clip-seconds", seconds)
        print(row(f"mn04 (teacher, hears {seconds} s)", "AudioSet", [result]))
    for student in config.students:
        for weight in weights:
            name = "labels" if weight == 1 else f"labels and teacher, label_weight {weight:g}"
            print(row(student, name, [found[weight, seed, student] for seed in config.seeds]))


def row(model: str, trained_on: str, results: Sequence[dict]) -> str:
    cells = []
    for name in METRICS:
        values = [result[name] for result in results]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    return f"| {model} | {trained_on} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
