"""Parts of a run with made-up predictions."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.system.randomness import generator
from kd.reports.run_reader import Part, Predictions

NAMES = ("hiss", "hum", "click")

MakePart = Callable[..., tuple[Part, Predictions]]


def make_part(
    label: str, logits: np.ndarray, targets: np.ndarray, known: np.ndarray | None = None, **more: object
) -> tuple[Part, Predictions]:
    """A part of a run with the clips c0, c1, …"""
    ids = np.array([f"c{index}" for index in range(len(logits))])
    known = np.ones_like(targets, dtype=bool) if known is None else known
    predictions = Predictions(ids, np.asarray(logits, dtype=np.float32), targets > 0.5, known, **more)
    return Part(Path("run"), NAMES, label=label), predictions


def make_random_part(label: str, clips: int = 90, one_label: bool = False, number: int = 0) -> tuple[Part, Predictions]:
    """A part whose logits follow the targets, with noise."""
    noise = generator(1, "analysis", 0, number)
    targets = np.eye(3)[np.arange(clips) % 3] if one_label else noise.random((clips, 3)) < 0.3
    return make_part(label, 1.5 * targets + noise.standard_normal((clips, 3)), np.asarray(targets))


@pytest.fixture
def part() -> MakePart:
    """Makes a part of a run: ``part("fold 1", logits, targets)``."""
    return make_part


@pytest.fixture
def random_part() -> MakePart:
    """Makes a part of a run with random predictions: ``random_part("fold 1", one_label=True)``."""
    return make_random_part


@pytest.fixture
def names() -> tuple[str, ...]:
    """The class names of the parts made here."""
    return NAMES
