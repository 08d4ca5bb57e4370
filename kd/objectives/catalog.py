"""Objectives by name: those of this package, and ``some_module:Class`` for the user's own."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from audio_datasets.system.imports import named_attribute
from kd.objectives.base import Objective, ObjectiveSettings
from kd.objectives.beside import EmbeddingObjective, OnlineObjective
from kd.objectives.distillation import DistillationObjective
from kd.objectives.mean_teacher import MeanTeacherObjective
from kd.objectives.pseudo_labels import PseudoLabelObjective
from kd.objectives.soft_targets import SoftTargetObjective

OBJECTIVES: dict[str, type[Objective]] = {
    "distillation": DistillationObjective,
    "soft-targets": SoftTargetObjective,
    "pseudo-labels": PseudoLabelObjective,
    "embedding": EmbeddingObjective,
    "online": OnlineObjective,
    "mean-teacher": MeanTeacherObjective,
}


def objective_class(name: str) -> type[Objective]:
    """The class behind a name; ValueError that lists the choices for an unknown one."""
    if name in OBJECTIVES:
        return OBJECTIVES[name]
    if ":" not in name:
        raise ValueError(f"unknown objective {name!r}; choices: {', '.join(OBJECTIVES)}, or MODULE:CLASS for your own")
    found = named_attribute(name, "objective")
    if not isinstance(found, type) or not issubclass(found, Objective):
        raise ValueError(f"objective {name} must be a subclass of kd.objectives.base.Objective; found {found!r}")
    return found


def name_of(objective: Objective) -> str:
    """The name of this objective's class, as ``objective_class`` takes it."""
    kind = type(objective)
    return next((name for name, known in OBJECTIVES.items() if known is kind), f"{kind.__module__}:{kind.__qualname__}")


def check_options(name: str, options: Mapping[str, Any]) -> None:
    """Raises ValueError for options that an objective does not have, and for values that are not allowed."""
    kind = objective_class(name)
    known = [] if kind.Options is None else [item.name for item in dataclasses.fields(kind.Options)]
    if unknown := sorted(options.keys() - set(known)):
        raise ValueError(f"unknown option {unknown[0]!r} of objective {name}; choices: {', '.join(known) or 'none'}")
    if kind.Options is not None:
        try:
            kind.Options(**options)
        except TypeError as error:
            raise ValueError(f"an option of objective {name} has a value of the wrong type: {error}") from error


def create_objective(name: str, settings: ObjectiveSettings) -> Objective:
    """An objective. If it has weights, they are drawn from torch's default generator.

    Raises:
        ValueError: an unknown objective or option, or settings that do not fit together.
    """
    check_options(name, settings.options)
    return objective_class(name)(settings)
