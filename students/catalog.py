"""The students by name. A new one is a file with an options dataclass and a model, and one line in ``STUDENTS``."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from students.families.dymn import DyMN, DyMNOptions
from students.families.image_backbones import EfficientNetOptions, efficientnet_b2, efficientnetv2_b2
from students.families.mergenet import MergeNet, MergeNetOptions
from students.families.mn import MN, MNOptions
from students.interface import Student, StudentConfig


@dataclass(frozen=True)
class CatalogEntry:
    """How to build one student."""

    builder: Callable[[int, Any], Student]
    """Takes the number of classes and the options."""
    options: Any
    """A frozen dataclass with the family's options, at the values that this name stands for."""


class Catalog:
    """Networks by name, each with the options that its name stands for."""

    def __init__(self, kind: str, entries: Mapping[str, CatalogEntry]) -> None:
        """``kind``: what messages call one of its networks, such as "student"."""
        self.kind = kind
        self._entries = dict(entries)

    def names(self) -> list[str]:
        """The names that ``create`` knows."""
        return list(self._entries)

    def default_options(self, name: str) -> dict[str, Any]:
        """The options that a network takes, each with the value it has if not given. ValueError for an unknown name."""
        return _plain(self._entry(name).options)

    def create(self, name: str, num_classes: int, **options: Any) -> Student:
        """A freshly initialised network; weights are drawn from torch's default generator.

        ``student.config`` holds all that is needed to build it again.

        Raises ValueError for an unknown name, an unknown option or a value that an option does not allow.
        """
        entry = self._entry(name)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"a {self.kind} has at least one class; found num_classes={num_classes!r}")
        known = [known.name for known in dataclasses.fields(entry.options)]
        unknown = [option for option in options if option not in known]
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(repr, unknown))} for {name}; choices: {', '.join(known)}")
        try:
            chosen = dataclasses.replace(entry.options, **options)
        except TypeError as error:  # a value of another kind, such as a word where a number belongs
            raise ValueError(f"an option of {name} has a value of the wrong kind: {error}; found {options}") from error
        student = entry.builder(num_classes, chosen)
        student.config = StudentConfig(name, num_classes, _plain(chosen))
        return student

    def _entry(self, name: str) -> CatalogEntry:
        if name not in self._entries:
            raise ValueError(f"unknown {self.kind} {name!r}; choices: {', '.join(self._entries)}")
        return self._entries[name]


def _plain(options: Any) -> dict[str, Any]:
    """An options dataclass as JSON would give it back: lists in place of tuples."""
    return {
        key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(options).items()
    }


STUDENTS = Catalog(
    "student",
    {
        "mn01": CatalogEntry(MN, MNOptions(width=0.1)),
        "mn02": CatalogEntry(MN, MNOptions(width=0.2)),
        "mn04": CatalogEntry(MN, MNOptions(width=0.4)),
        "mn05": CatalogEntry(MN, MNOptions(width=0.5)),
        "mn10": CatalogEntry(MN, MNOptions(width=1.0)),
        "mn20": CatalogEntry(MN, MNOptions(width=2.0)),
        "mn30": CatalogEntry(MN, MNOptions(width=3.0)),
        "mn40": CatalogEntry(MN, MNOptions(width=4.0)),
        "dymn04": CatalogEntry(DyMN, DyMNOptions(width=0.4)),
        "dymn10": CatalogEntry(DyMN, DyMNOptions(width=1.0)),
        "dymn20": CatalogEntry(DyMN, DyMNOptions(width=2.0)),
        # The paper's names for the same three.
        "dymn_s": CatalogEntry(DyMN, DyMNOptions(width=0.4)),
        "dymn_m": CatalogEntry(DyMN, DyMNOptions(width=1.0)),
        "dymn_l": CatalogEntry(DyMN, DyMNOptions(width=2.0)),
        "mergenet_baseline": CatalogEntry(MergeNet, MergeNetOptions(split=None)),
        "mergenet16": CatalogEntry(MergeNet, MergeNetOptions(split=16)),
        "mergenet32": CatalogEntry(MergeNet, MergeNetOptions(split=32)),
        "mergenet64": CatalogEntry(MergeNet, MergeNetOptions(split=64)),
        "efficientnet_b2": CatalogEntry(efficientnet_b2, EfficientNetOptions()),
        "efficientnetv2_b2": CatalogEntry(efficientnetv2_b2, EfficientNetOptions()),
    },
)


def list_students() -> list[str]:
    """The names that ``create_student`` knows."""
    return STUDENTS.names()


def default_options(name: str) -> dict[str, Any]:
    """The options that a student takes, each with the value it has if not given. ValueError for an unknown name."""
    return STUDENTS.default_options(name)


def create_student(name: str, num_classes: int, **options: Any) -> Student:
    """A freshly initialised student: mel (batch, 1, n_mels, frames) -> StudentOutput(logits, embedding).

    ``options`` are the family's options by keyword (see ``default_options`` and, for MN, ``students.families.mn.MNOptions``).
    ``student.config`` holds all that is needed to build it again. Weights are drawn from torch's default generator.

    Raises ValueError for an unknown name, an unknown option or a value that an option does not allow.
    """
    return STUDENTS.create(name, num_classes, **options)
