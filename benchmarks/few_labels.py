"""What distillation gains where labels are few: ESC-10 with 1 to 16 labels per class, by `kd distill`.

    python benchmarks/few_labels.py --reference ../shared --out runs/few_labels

Folds 1 and 2 of ESC-10 (160 recordings) train, folds 3 to 5 (240) test. Of the training recordings, k per class keep their labels;
which ones is drawn anew five times. The teacher is a linear probe on the embedding of the public mn04, fitted to these k labels.
Two students are trained from scratch for the same number of steps: on the labels alone, and on all training recordings with what
the teacher says of them. Runs that are done are kept, so a stopped benchmark continues. It prints Markdown tables for docs/results.md.
"""

import csv
import itertools
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from machine import machine

from kd.reports.analysis.paired import mean_interval

TRAIN_FOLDS = ("1", "2")


@dataclass(frozen=True)
class FewLabelsConfig:
    """Compare distillation with labels alone for several numbers of labels per class."""

    reference: Path
    """Folder with data/ESC-10 and data/checkpoints/mn04_as_mAP_432.pt."""
    out: Path
    """Folder for the runs."""
    labels_per_class: tuple[int, ...] = (1, 2, 4, 16)
    """Numbers of labels per class."""
    draws: int = 5
    """Draws of labels for each number."""
    students: tuple[str, ...] = ("mn01",)
    """Students to train."""
    steps: int = 600
    """Training steps of 16 clips."""
    jobs: int = 2
    """Distillations at the same time, of one thread each."""


def write_manifest(esc10: Path, path: Path) -> None:
    """Lists the recordings with split train (folds 1 and 2) or test (3 to 5)."""
    lines = ["clip_id,path,labels,split"]
    with open(esc10 / "meta" / "esc50.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            (audio,) = (esc10 / "audio").glob(f"{Path(row['filename']).stem}.*")
            split = "train" if row["fold"] in TRAIN_FOLDS else "test"
            lines.append(f"{row['filename']},{os.path.relpath(audio, path.parent)},{row['category']},{split}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def distil(config: FewLabelsConfig, manifest: Path, student: str, labels: int, draw: int) -> dict:
    """The results of one distillation, made unless they are there."""
    out = config.out / student / f"k{labels}" / f"draw{draw}"
    weights = config.reference / "data" / "checkpoints" / "mn04_as_mAP_432.pt"
    words = [
        *("distill", "--data", manifest, "--teacher-weights", weights, "--student", student, "--out", out),
        *("--labels-per-class", labels, "--label-seed", draw, "--seed", draw, "--steps", config.steps),
        *("--n-mels", 64, "--hop-samples", 640, "--clip-seconds", 5, "--workers", 0, "--allow-outside"),
    ]
    command = [sys.executable, "-m", "kd.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    print(f"{student}, k = {labels}, draw {draw}: {100 * results['gain']['mean']:+.1f} points", flush=True)
    return results


def percent(values: list[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def main() -> None:
    config = tyro.cli(FewLabelsConfig)
    manifest = config.out / "esc10.csv"
    write_manifest(config.reference / "data" / "ESC-10", manifest)
    jobs = list(itertools.product(config.students, config.labels_per_class, range(config.draws)))
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: distil(config, manifest, *job), jobs), strict=True))
    print(f"\n{machine()}; {config.steps} steps of 16 clips, {config.draws} draws of labels\n")
    print(
        "| student | labels per class | teacher | labels alone | distilled | gain, points | 95 % interval | least | most |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for student, labels in itertools.product(config.students, config.labels_per_class):
        results = [found[student, labels, draw] for draw in range(config.draws)]
        arms = [percent([one[arm]["mean"] for one in results]) for arm in ("teacher", "labels_alone", "distilled")]
        gains = [100 * one["gain"]["mean"] for one in results]
        interval = mean_interval(gains)
        reach = "–" if interval is None else f"{interval.low:+.1f} to {interval.high:+.1f}"
        print(
            f"| {student} | {labels} | {' | '.join(arms)} | {statistics.mean(gains):+.1f} | {reach} | {min(gains):+.1f} | {max(gains):+.1f} |"
        )


if __name__ == "__main__":
    main()
