"""Training loss of a small student from scratch, by how its linear layers and output biases begin.

    python benchmarks/initial_weights.py --clips esc10.h5

Same clips, same order, same optimizer; no augmentation. `small` is MobileNetV3's own N(0, 0.01) with zero biases, `he` is He's
rule, `he + prior` begins at the classes' frequencies besides (what `kd pretrain` does), and a DyMN is also trained `as it comes`,
with its dynamic parts treating clips alike, and the classes' frequencies (what `kd pretrain` does with it). Prints the mean
loss of the steps up to each mark, averaged over the seeds.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from machine import machine
from torch import nn

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.command import progress
from audio_datasets.system.randomness import generator
from kd.objectives.label_losses import bce_per_clip
from students import create_student
from students.frontend import LogMel, LogMelConfig
from students.layers.convolutions import initialize_weights

MARKS = (40, 80, 120, 160, 200, 300, 400)


@dataclass(frozen=True)
class InitialWeightsConfig:
    """Compare initial weights by the training loss that follows."""

    clips: Path
    """Clip store."""
    student: str = "mn01"
    """Student to train."""
    seeds: int = 3
    """Runs for each way to begin."""
    batch_size: int = 16
    """Clips in a step."""
    learning_rate: float = 3e-3
    """Adam's learning rate."""
    clip_seconds: float = 2.0
    """Seconds of each clip."""


def main() -> None:
    config = tyro.cli(InitialWeightsConfig)
    torch.set_flush_denormal(True)
    torch.set_num_threads(1)
    store, frontend = ClipStore.open(config.clips), LogMelConfig()
    rows = np.arange(0, len(store), 2)
    samples = round(config.clip_seconds * frontend.sample_rate_hz)
    waveforms = np.stack([store.waveform(int(row), frontend.sample_rate_hz)[:samples] for row in rows])
    mels, targets = LogMel(frontend)(torch.from_numpy(waveforms)), torch.from_numpy(store.targets(rows))

    ways = ["small", "he", "he + prior"]
    if config.student.startswith("dymn"):
        ways.append("as it comes")
    losses = np.zeros((len(ways), config.seeds, MARKS[-1]))
    for place, way in enumerate(ways):
        for seed in range(config.seeds):
            torch.manual_seed(seed)
            student = create_student(config.student, targets.shape[1]).train()
            if way in ("he", "he + prior"):
                initialize_weights(student)
            if way == "small":
                for layer in student.modules():
                    if isinstance(layer, nn.Linear):
                        nn.init.normal_(layer.weight, 0.0, 0.01)
            if way in ("he + prior", "as it comes"):
                student.set_class_prior(targets.mean(0))
            optimizer = torch.optim.Adam(student.parameters(), lr=config.learning_rate)
            for step in progress(range(MARKS[-1]), desc=f"{way}, seed {seed}", unit="step", leave=False):
                chosen = generator(seed, "batch", 0, step).choice(len(rows), config.batch_size, replace=False)
                loss = bce_per_clip(student(mels[chosen]).logits, targets[chosen]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses[place, seed, step] = loss.item()

    print(f"{machine()}; {config.student}, {len(rows)} clips, {config.seeds} seeds")
    print(f"| mean loss of steps | {' | '.join(ways)} |\n|---|{'---|' * len(ways)}")
    for start, stop in zip((0, *MARKS), MARKS, strict=False):
        means = losses[:, :, start:stop].mean(axis=(1, 2))
        print(f"| {start + 1} to {stop} | {' | '.join(f'{mean:.5f}' for mean in means)} |")


if __name__ == "__main__":
    main()
