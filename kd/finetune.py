"""Fine-tunes a student on a task of the catalog: ``python kd/finetune.py --task esc50 --data DIR --out RUN …``."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from audio_datasets.system.command import parse, run_command
from audio_datasets.tasks.catalog import get_task
from kd.recipes.finetuning import recipe_config
from kd.stages.finetuning import finetune
from kd.stages.finetuning_config import FinetuneConfig, read_deciding
from kd.training.transfer import start_from_run

GUIDE = """\
finetune.py carries a student over to a task. It needs:
  --task NAME   esc50, fsd50k, openmic, dcase20; folder or manifest for your own sounds
  --data DIR    the data set in its official layout; for folder: one sub-folder of audio files per class
and mostly
  --out RUN     a folder for checkpoints, metrics, predictions and the trained student (runs/TASK if left out)
and, to start from a trained student, one of:
  --init RUN                            a run folder of kd pretrain (or of this command)
  --student mn04 --weights mn04_as.pt   a student of the catalog with weights from a file
All options: --help."""

ONLY_WITH_LOGITS = ("--label-weight", "--teacher-temperature", "--mixup-of-teacher", "--ensemble", "--missing-logits")


def configure(arguments: Sequence[str]) -> FinetuneConfig:
    """The configuration of a command line: the recipe's for its task and student, and over it what is given.

    Raises:
        ValueError: an unknown task or recipe; an --init that holds no student; settings that would not be used.
    """
    given = read_deciding(arguments)
    if None in (given.task, given.data):
        return parse(FinetuneConfig, arguments, "kd finetune")  # says what is missing, or what there is (--help)
    if given.init is not None and given.weights is not None:
        raise ValueError("--weights and --init both say what to start from; leave one of the two out")
    task = get_task(given.task)
    trained: dict[str, Any] = {}
    if given.init is not None:
        start, card = start_from_run(given.init, allow=() if given.student is None else (given.student,))
        trained = {"student": start.name, "frontend": card.frontend, "init": given.init}
    names = ("student", "weights", "recipe", "views", "epochs")
    settings = {name: value for name in names if (value := getattr(given, name)) is not None}
    default = recipe_config(task, given.data, given.out or Path("runs") / task.name, **{**settings, **trained})
    config = parse(FinetuneConfig, arguments, "kd finetune", default)
    typed = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    if unused := [option for option in ONLY_WITH_LOGITS if option in typed and not config.logits]:
        raise ValueError(f"{unused[0]} would not be used without --logits; leave it out, or give teacher logits")
    return config


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(GUIDE, file=sys.stderr)
        return 2
    return run_command(lambda: finetune(configure(arguments), shlex.join(["kd", "finetune", *arguments])))


if __name__ == "__main__":
    raise SystemExit(main())
