"""Trains a student on labels and teacher logits: ``accelerate launch kd/pretrain.py --clips … --logits … --out …``."""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import tyro

from audio_datasets.command_line.help_pages import HelpGroups, wants_help
from audio_datasets.system.command import parse, run_command
from audio_datasets.system.files import json_text
from kd.recipes.pretraining import GLOBAL_BATCH, RECIPES, RecipeName, recipe_for
from kd.run_folder.config import as_json
from kd.stages.dry_run import estimate
from kd.stages.pretraining import create_accelerator, prepare, pretrain, student_options
from kd.stages.pretraining_config import PretrainConfig
from kd.training.schedule import phases
from students.catalog import default_options

GUIDE = """\
pretrain.py trains a student on a clip store and the logits of teachers. It needs:
  --clips clips.h5     audio and labels, made by: kd pack FOLDER_OR_MANIFEST --out clips.h5 (several are treated as one)
  --logits teacher.h5  teacher logits, made by:   kd teach --clips clips.h5 --teacher SPEC --out logits/
                       (or --label-weight 1 to train on labels alone)
  --out runs/NAME      run folder for checkpoints, metrics and the trained student
Settings of the papers: --recipe mn10, dymn_m … Estimate of a run's time, memory and disk: --dry-run.
Main options: --help. All options: --help-all. Several processes: accelerate launch -m kd.pretrain …
No data at hand? `kd demo` (or `make demo`) runs every stage on synthetic sound scenes."""


@dataclass(frozen=True)
class PretrainCommand:
    """Train a student on labels and teacher logits."""

    help_groups: ClassVar[HelpGroups] = {
        **PretrainConfig.help_groups,
        "Training": ("recipe", *PretrainConfig.help_groups["Training"], "seed", "log_with", "dry_run"),
    }
    main_options: ClassVar[tuple[str, ...]] = ("recipe", "dry_run", *PretrainConfig.main_options)

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    recipe: RecipeName | None = None
    """Use a paper's settings as defaults. Options on the command line override them."""
    dry_run: bool = False
    """Measure a few steps, print the configuration and an estimate of steps, hours, memory and disk as JSON, and write
    nothing. Without --clips: print the configuration only."""


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(GUIDE, file=sys.stderr)
        return 2
    return run_command(lambda: _run(arguments))


def _run(arguments: Sequence[str]) -> None:
    command = _defaults(arguments)
    if wants_help(arguments):
        command = _with_phases(command)
    command = parse(PretrainCommand, arguments, "kd pretrain", default=command)
    config = command.config
    if command.recipe is not None and int(os.environ.get("RANK", "0")) == 0:
        clips = config.loop.batch_size * config.loop.gradient_accumulation_steps * processes_of_this_run()
        if clips != GLOBAL_BATCH:
            print(
                f"recipe {command.recipe}: a step has {clips} clips here, {GLOBAL_BATCH} in the paper", file=sys.stderr
            )
    if command.dry_run:
        dry_run(config)
    else:
        pretrain(config, shlex.join(["kd", "pretrain", *arguments]))


def _defaults(arguments: Sequence[str]) -> PretrainCommand:
    """The defaults: the recipe's settings if the command line names one, else our own."""
    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--recipe")
    early.add_argument("--dry-run", "--dry_run", action="store_true")
    early.add_argument("--clips")
    given, _ = early.parse_known_args(arguments)
    settings: dict[str, Any] = {}
    if given.recipe in RECIPES:  # any other name is refused later, with the rest of the command line
        settings = recipe_for(given.recipe, processes_of_this_run()).settings()
    if given.dry_run and given.clips is None:
        return PretrainCommand(PretrainConfig(clips=(), out=Path("runs"), **settings))
    return PretrainCommand(PretrainConfig(clips=tyro.MISSING, out=tyro.MISSING, **settings))


def _with_phases(command: PretrainCommand) -> PretrainCommand:
    """The same defaults with the phases of the learning rate in epochs, as the help shows them."""
    schedule = command.config.schedule
    schedule = replace(schedule, **phases(schedule, command.config.loop.epochs)._asdict())
    return replace(command, config=replace(command.config, schedule=schedule))


def processes_of_this_run() -> int:
    """How many processes the launcher has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def dry_run(config: PretrainConfig) -> None:
    """Prints the configuration and what a run with it will take, as JSON on standard output; all else goes to standard error.

    Raises:
        ValueError: what ``pretrain`` would raise before its first step.
    """
    result: dict[str, Any] = {
        "config": as_json(config),
        "student_options": default_options(config.student) | student_options(config),
        "schedule": phases(config.schedule, config.loop.epochs)._asdict(),
    }
    accelerator = None
    with redirect_stdout(sys.stderr):
        if config.clips:
            accelerator = create_accelerator(config)
            result["estimate"] = estimate(config, prepare(config, accelerator))
    if accelerator is None or accelerator.is_main_process:
        print(json_text(result, indent=2))
    if accelerator is not None:
        accelerator.end_training()


if __name__ == "__main__":
    raise SystemExit(main())
