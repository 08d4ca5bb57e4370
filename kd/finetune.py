"""Fine-tunes a student on a task of the catalog: ``python kd/finetune.py --task esc50 --data DIR --out RUN …``."""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import tyro

from audio_datasets.command_line.help_pages import wants_help
from audio_datasets.system.command import parse, run_command
from audio_datasets.tasks.catalog import get_task
from kd.recipes.finetuning import recipe_config
from kd.stages.finetuning import finetune
from kd.stages.finetuning_config import Deciding, FinetuneConfig, read_deciding
from kd.training.transfer import start_from_run
from students.public_weights import student_of

ALSO_BESIDE = ("--label-weight", "--teacher-temperature")
"""Options of teachers that also count for an objective with a teacher of its own."""
GUIDE = """\
finetune.py trains a student on a task. It needs:
  --task NAME   esc50, fsd50k, openmic, dcase20; folder or manifest for your own sounds
  --data DIR    the data set in its official layout; for folder: one sub-folder of audio files per class
Usually also:
  --out RUN     run folder for checkpoints, metrics, predictions and the trained student (default: runs/TASK)
and one of these, to start from a trained student:
  --init RUN                            a run folder of kd pretrain or kd finetune
  --student mn04 --weights mn04_as.pt   a student of the catalog with weights from a file
Main options: --help. All options: --help-all."""

ONLY_WITH_LOGITS = (
    "--label-weight",
    "--teacher-temperature",
    "--mixup-of-teacher",
    "--ensemble",
    "--missing-logits",
    "--teacher-link",
)


def configure(arguments: Sequence[str]) -> FinetuneConfig:
    """The configuration for a command line: the recipe's defaults for its task and student, with the given options on top.

    Raises:
        ValueError: an unknown task or recipe; an --init that holds no student; options that have no effect.
    """
    given = read_deciding(arguments)
    if wants_help(arguments):
        return show_help(given, arguments)
    if None in (given.task, given.data):
        return parse(FinetuneConfig, arguments, "kd finetune")  # reports what is missing
    config = parse(FinetuneConfig, arguments, "kd finetune", defaults(given))
    typed = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if unused := [
        option
        for option in ONLY_WITH_LOGITS
        if option in typed and not config.logits and not (config.has_teacher_beside and option in ALSO_BESIDE)
    ]:
        raise ValueError(f"{unused[0]} has no effect without --logits; leave it out, or give teacher logits")
    return config


def defaults(given: Deciding) -> FinetuneConfig:
    """The defaults for the options that decide them."""
    if given.init is not None and given.weights is not None:
        raise ValueError("--weights and --init both name a starting point; leave out one of the two")
    task = get_task(given.task)
    trained: dict[str, Any] = {}
    if given.init is not None:
        start, card = start_from_run(given.init, allow=() if given.student is None else (given.student,))
        trained = {"student": start.name, "frontend": card.frontend, "init": given.init}
    names = ("student", "weights", "recipe", "views", "epochs")
    settings = {name: value for name in names if (value := getattr(given, name)) is not None}
    if given.weights is not None and given.student is None and (student := student_of(given.weights)) is not None:
        settings["student"] = student
    return recipe_config(task, given.data, given.out or Path("runs") / task.name, **{**settings, **trained})


def show_help(given: Deciding, arguments: Sequence[str]) -> FinetuneConfig:
    """Prints the help with the defaults for the given task and student, and ends with SystemExit 0."""
    task = given.task or "folder"
    config = defaults(replace(given, task=task, data=given.data or Path()))
    start = (
        f"--init {config.init}" if config.init else f"--weights {config.weights}" if config.weights else "no --weights"
    )
    note = f"The defaults shown are for --task {task}, --student {config.student} and {start}."
    if given.task is None or not config.is_pretrained:
        note += " Give --task, --student and --weights or --init to see the defaults for yours."
    missing = dict.fromkeys(("task", "data"), tyro.MISSING)
    seconds = config.clip_seconds or get_task(task).clip_seconds
    return parse(
        FinetuneConfig, arguments, "kd finetune", replace_unchecked(config, **missing, clip_seconds=seconds), note
    )


def replace_unchecked(config: FinetuneConfig, **values: Any) -> FinetuneConfig:
    """A copy with other values that are only shown, such as one that says an option is required."""
    shown = replace(config)
    for name, value in values.items():
        object.__setattr__(shown, name, value)
    return shown


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(GUIDE, file=sys.stderr)
        return 2
    return run_command(lambda: finetune(configure(arguments), shlex.join(["kd", "finetune", *arguments])))


if __name__ == "__main__":
    raise SystemExit(main())
