"""Fine-tunes a student on a task of the catalog: ``python kd/finetune.py --task esc50 --data DIR --out RUN …``."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from audio_datasets.system.command import parse, run_command
from audio_datasets.system.stop_signals import StopSignals
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd.data.splits import partitions
from kd.recipes.finetuning import recipe_config, unpublished_settings
from kd.training.config import as_json
from kd.training.finetune_config import FinetuneConfig, decided_by_data, read_deciding
from kd.training.finetune_job import Job
from kd.training.run_start import LOCK_FILE, enter_run_folder
from kd.training.threads import leave_a_core_to_the_workers
from kd.training.transfer import start_from_run
from teacher_logits.processes import LONGEST_WAIT, locked_by_main_process, on_main_process, start_accelerator

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

ASKS_FOR = ("fold", "probe", "probe_only", "report")
"""Settings that say how much is to be done, and change nothing of what is done already."""

CHANGES_NOTHING = (
    *ASKS_FOR,
    *(
        "accept_changes",
        "restart",
        "on_bad_clip",
        "allow_outside",
        "workers",
        "out",
        "loop.keep_checkpoints",
        "loop.checkpoint_every_steps",
    ),
    *("data", "logits", "cache"),  # what is in them counts, by their fingerprints
)
"""Settings that a run may go on with otherwise, since they do not change the result of a fold."""


def finetune(config: FinetuneConfig, command: str = "") -> Path:
    """Runs the fine-tuning described by ``config``, or goes on with it, and returns the run folder.

    There is one student for each seed and fold; those that are finished are kept.

    The folder then holds ``config.json``, ``results.json`` and, for each seed and fold in a folder of its own where there
    are several (docs/finetune.md), ``metrics.jsonl``, ``checkpoints/``, ``predictions.npz`` and the student. ``command`` is
    what was typed, for the record.

    Raises:
        ValueError: data, weights or settings that do not fit together, a run folder with another run in it or in use by
            another process, or a loss that is not finite.
        Stopped: SIGTERM or SIGUSR1 came; the run is saved.
    """
    torch.set_flush_denormal(True)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.loop.gradient_accumulation_steps),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    leave_a_core_to_the_workers(accelerator)
    task = get_task(config.task)
    clips, notes = read_task(task, config.data, config.missing_audio, allow_outside=config.allow_outside)
    config = decided_by_data(config, task, clips)
    parts, told = partitions(clips, folds=config.fold, test_share=config.test_share, valid_share=config.valid_share)
    every_part, _ = partitions(clips, test_share=config.test_share, valid_share=config.valid_share)
    job = Job(config, task, clips, accelerator, StopSignals())
    notes = (*notes, *unpublished_settings(config, task))
    for note in (*notes, told, f"{len(clips)} clips, {config.clip_seconds:g} s each, loss {config.loss.loss}"):
        accelerator.print(note)
    if not config.is_pretrained:
        accelerator.print(
            f"{config.student} starts from scratch; --init or --weights would start from a trained student"
        )
    job.check(parts)
    description = {**as_json(config), "processes": accelerator.num_processes, "inputs": job.fingerprints(every_part)}
    with job.signals, locked_by_main_process(accelerator, config.out / LOCK_FILE, str(config.out)):
        folder = on_main_process(
            accelerator,
            lambda: enter_run_folder(
                config.out,
                description,
                changes_nothing=CHANGES_NOTHING,
                asks_for=ASKS_FOR,
                accept_changes=config.accept_changes,
                restart=config.restart,
                results=job.results(parts),
            ),
        )
        for note in folder.notes:
            accelerator.print(note)
        if folder.state == "finished":
            accelerator.print(f"the run in {config.out} is finished already: nothing to do")
            return config.out
        if config.cache is not None:
            job.read_from_cache(config.cache)
        job.run(parts, folder, command)
        if accelerator.is_main_process:
            folder.finish()
        accelerator.end_training()
    return config.out


def configure(arguments: Sequence[str]) -> FinetuneConfig:
    """The configuration of a command line: the recipe's for its task and student, and over it what is given.

    Raises:
        ValueError: an unknown task or recipe; an --init that holds no student.
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
    settings = {name: getattr(given, name) for name in ("student", "weights", "recipe", "epochs")}
    settings = {name: value for name, value in settings.items() if value is not None}
    default = recipe_config(task, given.data, given.out or Path("runs") / task.name, **{**settings, **trained})
    return parse(FinetuneConfig, arguments, "kd finetune", default)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments:
        print(GUIDE, file=sys.stderr)
        return 2
    return run_command(lambda: finetune(configure(arguments), shlex.join(["kd", "finetune", *arguments])))


if __name__ == "__main__":
    raise SystemExit(main())
