"""Dumps of batches whose loss is not finite: saves them with student and objective, and repeats the step.

A dump is a folder ``non_finite/step-…-process-…`` in the run folder: ``batch.safetensors``, ``student.safetensors``,
``objective.safetensors`` (if the objective has weights) and ``dump.json`` (position, clips, losses, the configurations of
student and objective, and the run's configuration). ``python -m kd.training.non_finite DUMP`` repeats the step.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from audio_datasets.system.files import make_folder, read_json, write_json
from audio_datasets.system.messages import brief
from audio_datasets.tasks.label_space import LabelSpace
from kd.objectives.base import ObjectiveSettings
from kd.objectives.catalog import create_objective, name_of
from kd.objectives.settings import DistillationConfig
from kd.training.learner import Learner
from kd.training.transfer import freeze
from students import create_student
from students.frontend import LogMelConfig
from students.weight_files import save_tensors
from teacher_logits.processes import start_accelerator

DUMP_FILE = "dump.json"


def write_dump(
    run: Path,
    learner: Learner,
    batch: dict[str, Tensor],
    losses: dict[str, Tensor],
    position: dict[str, int],
    clips: str,
) -> Path:
    """Writes ``run/non_finite/step-…-process-…`` and returns it.

    The student is saved after the forward pass: weights are the same as before, and training mode does not use running statistics.

    Args:
        position: "epoch", "step" and "process".
        clips: names the clips of the batch.
    """
    folder = run / "non_finite" / f"step-{position['step']:08d}-process-{position['process']}"
    make_folder(folder)
    student, objective = learner.student, learner.objective
    for name, tensors in (("batch", batch), ("student", student.state_dict()), ("objective", objective.state_dict())):
        if tensors:
            plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
            save_tensors(plain, folder / f"{name}.safetensors")
    config = _nearest_config(run)
    write_json(
        folder / DUMP_FILE,
        {
            **position,
            "clips": clips,
            "losses": {name: str(float(value.detach())) for name, value in losses.items()},  # JSON has no nan
            "student": asdict(student.config) if student.config else None,
            "objective": {"name": name_of(objective), "settings": objective.settings.to_json()},
            "config": read_json(config) if config is not None else None,
        },
    )
    return folder


def _nearest_config(run: Path) -> Path | None:
    """The configuration file of a run. For a fold or seed it is that of the whole run, in a folder above."""
    return next(
        (path for path in (folder / "config.json" for folder in (run, *run.parents[:2])) if path.exists()), None
    )


@dataclass(frozen=True)
class Findings:
    """The result of repeating the step of a dump."""

    losses: dict[str, float]
    first: str | None
    """The first thing that is not finite: "input …", "output of …", "loss"; None if everything is."""


def run_dump(dump: Path, trusted: Sequence[str] = ()) -> Findings:
    """Repeats the step of a dump, on whatever CPU or GPU is available, and watches every layer.

    Batch norm sees only the clips of this process.

    Args:
        trusted: students and objectives from outside the package (MODULE:CLASS) that a dump may name. They are code, and a
            dump may come from someone else.

    Raises:
        ValueError: not a dump, or one that is incomplete or names a student or objective that is not trusted.
    """
    card = read_json(dump / DUMP_FILE)
    try:
        _refuse_untrusted([card["student"]["name"], card.get("objective", {}).get("name", "")], trusted, dump)
        config: dict[str, Any] = card["config"] or {}
        named, (objective_name, settings) = card["student"], _objective_of(card)
        accelerator = start_accelerator(mixed_precision=config.get("mixed_precision", "no"))
        student = create_student(named["name"], named["num_classes"], **named["options"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{dump / DUMP_FILE} is incomplete or damaged: {type(error).__name__}: {error}") from error
    student.load_state_dict(load_file(dump / "student.safetensors"))
    if not (config.get("weights") and "task" in config) and not config.get("init"):  # what anneals is at its end there
        student.start_epoch(card["epoch"])
    objective = create_objective(objective_name, settings)
    if (dump / "objective.safetensors").exists():
        objective.load_state_dict(load_file(dump / "objective.safetensors"))
    batch = {name: value.to(accelerator.device) for name, value in load_file(dump / "batch.safetensors").items()}
    learner = Learner(student, objective, freeze(student, config.get("freeze", "none")))

    seen = [f"input {name}" for name, value in batch.items() if not is_finite(value)]
    watched = {f"layer {name}": layer for name, layer in leaves(student)}
    watched |= {"the log-mel front end": objective.frontend}
    for name, layer in watched.items():
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: None if is_finite(output) else seen.append(f"output of {name}")
        )
    with torch.no_grad():
        losses = accelerator.prepare(learner).train()(batch)
    seen += [f"the {name}" for name, value in losses.items() if not is_finite(value)]
    return Findings({name: float(value) for name, value in losses.items()}, seen[0] if seen else None)


def _refuse_untrusted(names: Sequence[str], trusted: Sequence[str], dump: Path) -> None:
    """Raises ValueError for a MODULE:CLASS that the user has not named, because loading it runs its code."""
    for name in names:
        if ":" in name and name not in trusted and not name.startswith("timm:"):
            raise ValueError(
                f"{dump} names {name}, which is not part of this package; if you trust it, add --trust {name}"
            )


def _objective_of(card: dict[str, Any]) -> tuple[str, ObjectiveSettings]:
    """The objective of a dump. Version 0.1 saved only the configuration of pretraining, from which it can be inferred."""
    if "objective" in card:
        return card["objective"]["name"], ObjectiveSettings.from_json(card["objective"]["settings"])
    config = card["config"] or {}
    if "distillation" not in config or "task" in config:
        raise ValueError(
            f"the dump is from a fine-tuning run of version 0.1, which did not save its objective; found {brief(config)}"
        )
    class_names = [f"class {number}" for number in range(card["student"]["num_classes"])]
    return "distillation", ObjectiveSettings(
        frontend=LogMelConfig.from_dict(config["frontend"]),
        label_space=LabelSpace.single(class_names, exclusive=False),
        embedding_dim=0,
        distillation=DistillationConfig(**config["distillation"]),
    )


def leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """All layers without sublayers, with their names."""
    return [(name, layer) for name, layer in module.named_modules() if not any(layer.children())]


def is_finite(value: Any) -> bool:
    """Whether all values of a tensor are finite; True for anything that is not a tensor of floats."""
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
