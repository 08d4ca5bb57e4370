"""The students by name. Each file in ``students.families`` registers the names of its own family.

A student from outside this package is named ``module:Class`` (see ``students.outside``) and can be used like the others.
"""

import dataclasses
import functools
import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import students.families as families
from students.frontend import LogMelConfig
from students.interface import LEFT_OUT_AT_DEFAULT, Student, StudentConfig
from students.outside import is_outside, outside_family


@dataclass(frozen=True)
class Variant:
    """A catalog name and the student that it stands for."""

    name: str
    family: type[Student]
    options: Any
    """The family's ``Options``, with this variant's values."""
    build: Callable[[int, Any], Student]
    """Takes the number of classes and the options."""
    place: int
    """Families with a lower number are listed first."""


_variants: dict[str, Variant] = {}


def register(
    family: type[Student],
    variants: Mapping[str, Any],
    *,
    build: Callable[[int, Any], Student] | None = None,
    place: int = 100,
) -> None:
    """Adds names to the catalog. Called by a family's own file when it is imported.

    Args:
        variants: the family's ``Options`` by name.
        build: makes a student from the number of classes and the options; default: ``family`` itself.
        place: families with a lower number are listed first.
    """
    for name, options in variants.items():
        known = _variants.get(name)
        assert known is None or known.family.__module__ == family.__module__, f"two families register {name!r}"
        assert isinstance(options, family.Options), f"{name}: options are {family.Options.__name__}"
        _variants[name] = Variant(name, family, options, build or family, place)


@functools.cache
def _import_families() -> None:
    for module in pkgutil.iter_modules(families.__path__):
        importlib.import_module(f"{families.__name__}.{module.name}")


def _registered() -> dict[str, Variant]:
    """All variants, grouped by family, in an order that does not depend on the order of imports."""
    _import_families()
    ordered = sorted(_variants.values(), key=lambda variant: (variant.place, variant.family.__name__))
    return {variant.name: variant for variant in ordered}


def _variant(name: str) -> Variant:
    """The variant with this catalog name, or the one for ``module:Class``."""
    if is_outside(name):
        family = outside_family(name)
        return Variant(name, family, family.Options(), family, place=0)
    known = _registered()
    if name not in known:
        raise ValueError(f"unknown student {name!r}; choices: {', '.join(known)}, or module:Class")
    return known[name]


def list_students() -> list[str]:
    """The names in the catalog."""
    return list(_registered())


def list_families() -> dict[str, type[Student]]:
    """The families by class name in lower case, such as "mn"."""
    return {variant.family.__name__.lower(): variant.family for variant in _registered().values()}


def family_of(name: str) -> type[Student]:
    """The family of a student. Raises ValueError for an unknown name."""
    return _variant(name).family


def default_options(name: str) -> dict[str, Any]:
    """The options that a student takes, each with its default. Raises ValueError for an unknown name."""
    return _plain(_variant(name).options, whole=True)


def options_for(
    name: str, given: Mapping[str, Any], frontend: LogMelConfig, epochs: int | None = None
) -> dict[str, Any]:
    """The given options and those that follow from the front end and, for a run from scratch, from its epochs.

    Raises ValueError for an unknown name, and for options that do not fit the epochs.
    """
    family = family_of(name)
    options = family.options_for_frontend(given, frontend)
    return options if epochs is None else family.options_for_training(options, epochs)


def pretraining_learning_rate(name: str, **options: Any) -> float | None:
    """The published peak learning rate for pretraining a student; None if there is none."""
    variant = _variant(name)
    return variant.family.pretraining_learning_rate(_chosen(variant, options))


def create_student(name: str, num_classes: int, **options: Any) -> Student:
    """A freshly initialised student: mel (batch, 1, n_mels, frames) -> StudentOutput(logits, embedding).

    ``name`` is one of ``list_students()``, or ``module:Class`` for a student from outside; its module is imported.
    ``options`` are the family's options by keyword (see ``default_options`` and, for MN, ``students.families.mn.MNOptions``).
    ``student.config`` contains everything needed to rebuild it. Weights are drawn from torch's default generator.

    Raises ValueError for an unknown name, an unknown option or a value that an option does not allow.
    """
    variant = _variant(name)
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"a student needs at least one class; found num_classes={num_classes!r}")
    chosen = _chosen(variant, options)
    student = variant.build(num_classes, chosen)
    student.config = StudentConfig(name, num_classes, _plain(chosen))
    return student


def _chosen(variant: Variant, options: Mapping[str, Any]) -> Any:
    """The variant's options, overridden by the given ones."""
    known = [option.name for option in dataclasses.fields(variant.options)]
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ValueError(
            f"unknown option {', '.join(map(repr, unknown))} for {variant.name}; choices: {', '.join(known)}"
        )
    try:
        return dataclasses.replace(variant.options, **options)
    except TypeError as error:  # a value of the wrong type, such as a word in place of a number
        raise ValueError(
            f"an option of {variant.name} has a value of the wrong type: {error}; found {dict(options)}"
        ) from error


def _plain(options: Any, whole: bool = False) -> dict[str, Any]:
    """An options dataclass as it would come back from JSON: with lists in place of tuples.

    ``whole``: also options that are otherwise left out at their default (``LEFT_OUT_AT_DEFAULT``).
    """
    left_out = {
        option.name
        for option in dataclasses.fields(options)
        if not whole
        and LEFT_OUT_AT_DEFAULT.items() <= option.metadata.items()
        and getattr(options, option.name) == option.default
    }
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(options).items()
        if key not in left_out
    }
