"""Consistent teaching on real recordings: labels only, plain offline logits, and logits of the very views that are shown.

    python benchmarks/consistent_teaching.py --reference ../shared --out runs/consistent

Packs ESC-10 with AudioSet's class names as targets and trains a student from scratch on folds 1 and 2 with the same number of
steps, the same seeds and the same kind of augmentation in every row: parts of 2.5 s of the recordings of 5 s, rolled, with
other gains and jittered mel bands, and mixup. Rows differ in what the student is told about a part:

- labels: what the recording is labelled with;
- plain offline logits: also the teacher's logits of the whole recording, stored once (views are drawn anew in each epoch);
- consistent views: also the teacher's logits of the part, stored once for V parts of each recording, which are all that is shown (other parts for each seed).

It evaluates on the whole recordings of folds 3 to 5 and prints a Markdown table with mean and sample standard deviation over the
seeds. A run that was stopped goes on. The table goes to docs/results.md.
"""

import itertools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro
from distil_esc10 import METRICS, kd, row
from machine import machine

VIEW_SECONDS = 2.5
ROLL_SECONDS, GAIN_DB = 0.125, 7.0


@dataclass(frozen=True)
class ConsistentTeachingConfig:
    """Compare consistent teaching with plain offline logits and with labels alone."""

    reference: Path
    """Folder with data/ESC-10, data/checkpoints/mn04_as_mAP_432.pt and data/labels."""
    out: Path
    """Folder for stores and runs."""
    student: str = "mn01"
    """Student to train."""
    views: tuple[int, ...] = (4, 8)
    """Numbers of stored views."""
    label_weight: float = 0.1
    """Weight of the labels where there is a teacher."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of the runs."""
    epochs: int = 160
    """Epochs of 160 clips."""
    batch_size: int = 16
    """Clips in a step."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    jobs: int = 2
    """Runs at the same time, of one thread each."""


def main() -> None:
    config = tyro.cli(ConsistentTeachingConfig)
    clips = config.out / "esc10.h5"
    checkpoint = f"mn04@{config.reference / 'data' / 'checkpoints' / 'mn04_as_mAP_432.pt'}"
    class_names = config.reference / "data" / "labels" / "audioset_class_labels_indices.csv"
    kd(
        *("pack", config.reference / "data" / "ESC-10", "--out", clips, "--audio", "pcm16"),
        *("--class-names", class_names, "--label-map", "esc50_to_audioset"),
    )
    teach = ("teach", "--clips", clips, "--teacher", checkpoint, "--name", "mn04", "--out")
    kd(*teach, config.out / "whole")
    for count, seed in itertools.product(config.views, config.seeds):
        kd(
            *(*teach, config.out / f"views-{count}-{seed}", "--views", count, "--view-seconds", VIEW_SECONDS),
            *("--view-roll-seconds", ROLL_SECONDS, "--view-gain-db", GAIN_DB, "--view-seed", seed),
        )

    own = ("--crop", "random", "--roll-seconds", ROLL_SECONDS, "--gain-db", GAIN_DB)
    taught = ("--label-weight", config.label_weight, "--logits")
    arms = {
        "labels": (*own, "--label-weight", 1),
        "labels and plain offline logits": (*own, *taught, config.out / "whole" / "mn04.h5"),
        **{f"labels and consistent views, V = {count}": ("--views", "stored", *taught) for count in config.views},
    }
    views_of = {f"labels and consistent views, V = {count}": f"views-{count}" for count in config.views}

    def train(job: tuple[int, str]) -> dict:
        seed, arm = job
        run = config.out / f"{config.student}-{arm.replace(' ', '-').replace(',', '').replace('-=-', '')}-{seed}"
        kd(
            *("pretrain", "--clips", clips, "--folds", 1, 2, "--out", run, "--student", config.student, "--seed", seed),
            *("--epochs", config.epochs, "--batch-size", config.batch_size, "--learning-rate", config.learning_rate),
            *("--clip-seconds", VIEW_SECONDS, "--workers", 0, "--log-every-steps", 50, *arms[arm]),
            *((config.out / f"{views_of[arm]}-{seed}" / "mn04.h5",) if arm in views_of else ()),
        )
        results = run / "folds345.json"
        kd(
            *("evaluate", "--tagger", run, "--clips", clips, "--folds", 3, 4, 5, "--clip-seconds", 5, "--out", results),
            *("--workers", 0, "--label-map", "esc50_to_audioset"),
        )
        return json.loads(results.read_text())

    jobs = list(itertools.product(config.seeds, arms))
    with ThreadPoolExecutor(config.jobs) as pool:
        found = dict(zip(jobs, pool.map(train, jobs), strict=True))

    print(f"\n{machine()}; {config.student}, {config.epochs} epochs, seeds {list(config.seeds)}\n")
    print(f"| model | trained on | {' | '.join(METRICS.values())} |\n|---|---|{'---|' * len(METRICS)}")
    for arm in arms:
        print(row(config.student, arm, [found[seed, arm] for seed in config.seeds]))


if __name__ == "__main__":
    main()
