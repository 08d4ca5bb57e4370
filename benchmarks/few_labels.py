"""What distillation gains where labels are few: ESC-10 with 1 to 16 labels per class, by `kd distill`.

    python benchmarks/few_labels.py --reference ../shared --out runs/few_labels

Folds 1 and 2 of ESC-10 (160 recordings) train, folds 3 to 5 (240) test. Of the training recordings, k per class keep their labels;
which ones is drawn anew five times. The teacher is a linear probe on the embedding of the public mn04, fitted to these k labels.
Two students are trained from scratch for the same number of steps: on the labels alone, and on all training recordings with what
the teacher says of them. ``--arms`` adds students that learn from the same clips in another way, by the command that `kd distill`
printed for its student with another objective. Without any label the public mn04 itself teaches, its 527 classes mapped to the ten.

Runs that are done are kept, so a stopped benchmark continues. It prints Markdown tables for docs/results.md.
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
from importlib.resources import files
from pathlib import Path
from typing import Literal

import tyro
from machine import machine

from kd.reports.analysis.paired import mean_interval

TRAIN_FOLDS = ("1", "2")
WEIGHTS = Path("data", "checkpoints", "mn04_as_mAP_432.pt")
AUDIOSET_CLASSES = Path("data", "labels", "audioset_class_labels_indices.csv")
ARMS = {
    "pseudo-labels": ("--objective", "pseudo-labels", "--objective-options", "threshold=0.5"),
    "soft-targets": ("--objective", "soft-targets", "--teacher-temperature", "1"),
    "embedding": ("--objective", "embedding", "--objective-options", "teacher=mn04@{weights}"),
}
"""What follows the command of `kd distill`'s student; the last of an option counts."""
ZERO = "zero labels"
CLASS_MAP = "audioset_to_esc10.csv"


@dataclass(frozen=True)
class FewLabelsConfig:
    """Compare distillation with labels alone for several numbers of labels per class."""

    reference: Path
    """Folder with data/ESC-10, data/checkpoints/mn04_as_mAP_432.pt and data/labels/audioset_class_labels_indices.csv."""
    out: Path
    """Folder for the runs."""
    labels_per_class: tuple[int, ...] = (1, 2, 4, 16)
    """Numbers of labels per class."""
    draws: int = 5
    """Draws of labels for each number."""
    students: tuple[str, ...] = ("mn01",)
    """Students to train."""
    arms: tuple[Literal["pseudo-labels", "soft-targets", "embedding", "zero labels"], ...] = ()
    """Other ways to teach. "zero labels" is trained beside the first number of labels only."""
    steps: int = 600
    """Training steps of 16 clips."""
    jobs: int = 2
    """Distillations at the same time, of one thread each."""


def write_manifest(esc10: Path, path: Path) -> set[str]:
    """Lists the recordings with split train (folds 1 and 2) or test (3 to 5); returns the classes."""
    classes = set()
    lines = ["clip_id,path,labels,split"]
    with open(esc10 / "meta" / "esc50.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            (audio,) = (esc10 / "audio").glob(f"{Path(row['filename']).stem}.*")
            split = "train" if row["fold"] in TRAIN_FOLDS else "test"
            classes.add(row["category"])
            lines.append(f"{row['filename']},{os.path.relpath(audio, path.parent)},{row['category']},{split}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return classes


def kd(*words: object) -> str:
    """What `kd` with these arguments prints, computed with one thread."""
    command = [sys.executable, "-m", "kd.cli", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return done.stdout


def distil(config: FewLabelsConfig, manifest: Path, student: str, labels: int, draw: int) -> dict[str, float]:
    """The test accuracy of each arm of one distillation, made unless it is there."""
    out = config.out / student / f"k{labels}" / f"draw{draw}"
    command = (
        *("distill", "--data", manifest, "--teacher-weights", config.reference / WEIGHTS, "--student", student),
        *("--labels-per-class", labels, "--label-seed", draw, "--seed", draw, "--steps", config.steps),
        *("--n-mels", 64, "--hop-samples", 640, "--clip-seconds", 5, "--workers", 0, "--allow-outside"),
    )
    printed = kd(*command, "--out", out)
    results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    found = {arm: results[arm]["mean"] for arm in ("teacher", "labels_alone", "distilled")}
    shown = [line for line in printed.splitlines() if line.startswith("$ kd finetune") and "--logits" in line]
    for arm in (arm for arm in config.arms if arm != ZERO):
        found[arm] = other_arm(config, arm, shlex.split(shown[-1])[2:], out)
    if ZERO in config.arms and labels == config.labels_per_class[0]:
        names = config.reference / AUDIOSET_CLASSES
        given = ("--teacher", "given", "--teacher-class-names", names, "--class-map", config.out / CLASS_MAP)
        kd(*command, *given, "--label-weight", 0, "--no-labels-alone", "--out", out / "zero_labels")
        results = json.loads((out / "zero_labels" / "results.json").read_text(encoding="utf-8"))
        found |= {ZERO: results["distilled"]["mean"], "mapped teacher": results["teacher"]["mean"]}
    told = ", ".join(f"{arm} {100 * value:.1f}" for arm, value in found.items())
    print(f"{student}, k = {labels}, draw {draw}: {told}", flush=True)
    return found


def other_arm(config: FewLabelsConfig, arm: str, distilled: list[str], out: Path) -> float:
    """The test accuracy of a student that is trained by the command of the distilled one, with other options at its end."""
    weights = config.reference / WEIGHTS
    more = [word.format(weights=weights) for word in ARMS[arm]]
    run = out / arm.replace(" ", "_")
    kd(*distilled, *more, "--out", run)
    return float(json.loads((run / "results.json").read_text(encoding="utf-8"))["headline"]["mean"])


def write_class_map(path: Path, classes: set[str]) -> None:
    """AudioSet's classes for those of ESC-10, from the label map of ESC-50."""
    table = files("audio_datasets").joinpath("label_maps", "esc50_to_audioset.csv").read_text(encoding="utf-8")
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("teacher_class", "class"))
        for row in csv.DictReader(table.splitlines()):
            if row["category"] in classes:
                writer.writerow((row["audioset_name"], row["category"]))


def percent(values: list[float]) -> str:
    if not values:
        return "–"
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{spread}"


def table(config: FewLabelsConfig, found: dict[tuple[str, int, int], dict[str, float]]) -> str:
    """A Markdown table: a row for each student and number of labels."""
    arms = ("teacher", "labels_alone", "distilled")
    head = ("student", "labels per class", "teacher", "labels alone", "distilled", *config.arms)
    lines = ["| " + " | ".join((*head, "gain, points", "95 % interval", "least", "most")) + " |"]
    lines.append("|---" * (len(head) + 4) + "|")
    for student, labels in itertools.product(config.students, config.labels_per_class):
        results = [found[student, labels, draw] for draw in range(config.draws)]
        cells = [percent([one[arm] for one in results if arm in one]) for arm in (*arms, *config.arms)]
        gains = [100 * (one["distilled"] - one["labels_alone"]) for one in results]
        interval = mean_interval(gains)
        reach = "–" if interval is None else f"{interval.low:+.1f} to {interval.high:+.1f}"
        ends = (f"{statistics.mean(gains):+.1f}", reach, f"{min(gains):+.1f}", f"{max(gains):+.1f}")
        lines.append("| " + " | ".join((student, str(labels), *cells, *ends)) + " |")
    return "\n".join(lines)


def main() -> None:
    config = tyro.cli(FewLabelsConfig)
    manifest = config.out / "esc10.csv"
    classes = write_manifest(config.reference / "data" / "ESC-10", manifest)
    write_class_map(config.out / CLASS_MAP, classes)
    jobs = list(itertools.product(config.students, config.labels_per_class, range(config.draws)))
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(jobs, pool.map(lambda job: distil(config, manifest, *job), jobs), strict=True))
    print(f"\n{machine()}; {config.steps} steps of 16 clips, {config.draws} draws of labels\n")
    print(table(config, found))


if __name__ == "__main__":
    main()
