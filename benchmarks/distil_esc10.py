"""The real run: a public AudioSet student teaches smaller ones on ESC-10's recordings, against labels alone.

    python benchmarks/distil_esc10.py --reference ../shared --out runs/esc10

Packs ESC-10 with AudioSet's class names as targets, stores the teacher's logits, trains every student on folds 1 to 4 with
labels alone and with distillation (same steps, same seeds), evaluates on fold 5 and prints a Markdown table with mean and
sample standard deviation over the seeds. Each stage is one of our commands; a run that was stopped goes on. The table goes to
docs/results.md.
"""

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

    def train(job: tuple[str, str, int]) -> dict:
        student, how, seed = job
        run = config.out / f"{student}-{how}-{seed}"
        kd(
            *("pretrain", "--clips", clips, "--folds", 1, 2, 3, 4, "--out", run, "--student", student, "--seed", seed),
            *("--epochs", config.epochs, "--batch-size", config.batch_size, "--learning-rate", config.learning_rate),
            *("--clip-seconds", 5, "--workers", 0, "--log-every-steps", 20, "--resume"),
            *(("--label-weight", 1) if how == "labels" else ("--logits", logits)),
        )
        return evaluate(run, run / "fold5.json")

    jobs = [(s, how, seed) for seed in config.seeds for s in config.students for how in ("labels", "distilled")]
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(jobs, pool.map(train, jobs), strict=True))

    print(f"\n{machine()}; seeds {list(config.seeds)}\n")
    print(f"| model | trained on | {' | '.join(METRICS.values())} |\n|---|---|{'---|' * len(METRICS)}")
    for seconds in (10, 5):
        result = evaluate(checkpoint, config.out / f"teacher-{seconds}s.json", "--clip-seconds", seconds)
        print(row(f"mn04 (teacher, hears {seconds} s)", "AudioSet", [result]))
    for student in config.students:
        for how, name in (("labels", "labels"), ("distilled", "labels + teacher")):
            print(row(student, name, [found[student, how, seed] for seed in config.seeds]))


def row(model: str, trained_on: str, results: Sequence[dict]) -> str:
    cells = []
    for name in METRICS:
        values = [result[name] for result in results]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.3f}{spread}")
    return f"| {model} | {trained_on} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
