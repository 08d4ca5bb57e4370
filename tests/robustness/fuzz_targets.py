"""What the targets of tests/robustness/fuzz.py are made of."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from audio_datasets.system.randomness import generator

TREE = "tree"
"""Name of the folder of good files that belong together."""


class Wrong(Exception):
    """Accepted, and wrong."""


@dataclass(frozen=True)
class Target:
    """A reader, and the good files that it is given damaged."""

    prepare: Callable[[Path], list[Path]]
    """Writes good files into a folder; each is damaged in turn, with parts of the others."""
    read: Callable[[Path, Path], None]
    """(damaged file, good file): reads it, and raises ``Wrong`` for what should not have been accepted."""
    weight: int
    """Share of the inputs."""
    change: Callable[[Path, np.random.Generator], None] | None = None
    """Changes what a good file holds, in place of its bytes."""
    changed: float = 0.4
    """Share of the inputs that are made so."""
    names_file: bool = True
    """Whether a refusal names the file; decoding alone does not know it."""


def noise(number: int, samples: int = 4000) -> np.ndarray:
    return (0.1 * generator(5, "fuzz noise", 0, number).standard_normal(samples)).astype(np.float32)


def need(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


def in_its_place(path: Path, good: Path) -> Path:
    """The damaged file among the good ones that belong together: a copy, beside it, of their folder."""
    original = next(parent for parent in good.parents if parent.name == TREE)
    tree = path.parent / TREE
    shutil.copytree(original, tree)
    path.replace(tree / good.relative_to(original))
    return tree
