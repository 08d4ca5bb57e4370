"""A batch whose loss is not finite: kept with the student that it met, and looked into again.

    python kd/non_finite.py runs/mn10/non_finite/step-00001234-process-0

gives the losses again, and names the first input, layer or loss that is not finite. A dump holds ``batch.safetensors``,
``student.safetensors`` and ``dump.json`` (position, clips, losses, and the run's configuration).
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import make_folder, read_json, write_json
from kd.objectives.distillation import DistillationConfig, DistillationObjective
from students import create_student
from students.frontend import LogMel, LogMelConfig
from students.interface import Student
from teacher_logits.processes import start_accelerator

DUMP_FILE = "dump.json"


def write_dump(
    run: Path,
    student: Student,
    batch: dict[str, Tensor],
    losses: dict[str, Tensor],
    position: dict[str, int],
    clips: str,
) -> Path:
    """Writes ``run/non_finite/step-…-process-…`` and returns it.

    The student is as the forward pass left it: the same weights, and running statistics which that pass does not use.

    Args:
        position: "epoch", "step" and "process".
        clips: names the clips of the batch.
    """
    folder = run / "non_finite" / f"step-{position['step']:08d}-process-{position['process']}"
    make_folder(folder)
    save_file({name: value.detach().cpu().contiguous() for name, value in batch.items()}, folder / "batch.safetensors")
    state = {name: value.detach().cpu().contiguous() for name, value in student.state_dict().items()}
    save_file(state, folder / "student.safetensors")
    config = run / "config.json"
    write_json(
        folder / DUMP_FILE,
        {
            **position,
            "clips": clips,
            "losses": {name: str(float(value.detach())) for name, value in losses.items()},  # JSON has no nan
            "student": asdict(student.config) if student.config else None,
            "config": read_json(config) if config.exists() else None,
        },
    )
    return folder


@dataclass(frozen=True)
class NonFiniteConfig:
    """Look into a batch whose loss was not finite in a run of kd pretrain."""

    dump: tyro.conf.Positional[Path]
    """Folder inside the run's non_finite/."""


@dataclass(frozen=True)
class Findings:
    """What looking into a dump gave."""

    losses: dict[str, float]
    first: str | None
    """The first thing that is not finite: "input …", "output of …", "loss"; None if everything is."""


def look_into(dump: Path) -> Findings:
    """Does the step of a dump once more, on the CPU or GPU that is there, and watches every layer.

    Batch norm sees this one process's clips.

    Raises:
        ValueError: no dump of a distillation run.
    """
    card = read_json(dump / DUMP_FILE)
    config: dict[str, Any] = card["config"] or {}
    if card["student"] is None or "distillation" not in config:
        raise ValueError(f"{dump} is of a run other than kd pretrain's; its batch and student can be loaded by hand")
    accelerator = start_accelerator(mixed_precision=config["mixed_precision"])
    named = card["student"]
    student = create_student(named["name"], named["num_classes"], **named["options"])
    student.load_state_dict(load_file(dump / "student.safetensors"))
    student.start_epoch(card["epoch"])
    batch = {name: value.to(accelerator.device) for name, value in load_file(dump / "batch.safetensors").items()}
    frontend = LogMel(LogMelConfig.from_dict(config["frontend"])).to(accelerator.device)
    objective = DistillationObjective(frontend, DistillationConfig(**config["distillation"]))

    seen = [f"input {name}" for name, value in batch.items() if not is_finite(value)]
    watched = {"the log-mel front end": frontend, **{f"layer {name}": layer for name, layer in leaves(student)}}
    for name, layer in watched.items():
        layer.register_forward_hook(
            lambda layer, inputs, output, name=name: None if is_finite(output) else seen.append(f"output of {name}")
        )
    with torch.no_grad():
        losses = objective(accelerator.prepare(student).train(), batch)
    seen += [f"the {name}" for name, value in losses.items() if not is_finite(value)]
    return Findings({name: float(value) for name, value in losses.items()}, seen[0] if seen else None)


def leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every layer without layers of its own, under its name."""
    return [(name, layer) for name, layer in module.named_modules() if not any(layer.children())]


def is_finite(value: Any) -> bool:
    """Whether a tensor is finite throughout; True for what is no tensor of floats."""
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())


def report(config: NonFiniteConfig) -> None:
    findings = look_into(config.dump)
    card = read_json(config.dump / DUMP_FILE)
    print(f"epoch {card['epoch']}, step {card['step']}. {card['clips']}")
    for name, value in findings.losses.items():
        print(f"{name}: {value} (in the run: {card['losses'].get(name)})")
    print(f"first that is not finite: {findings.first or 'nothing: the step came out finite this time'}")


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    return run_command(lambda: report(parse(NonFiniteConfig, arguments, "non_finite.py")))


if __name__ == "__main__":
    raise SystemExit(main())
