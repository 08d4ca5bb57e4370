"""Fine-tuning: a student carried over to a task, one run for each of its folds and seeds."""

from pathlib import Path

import torch
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.tasks.cache import CachedClips, fill_cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import TaskClips, read_task
from kd.data.splits import partitions
from kd.recipes.finetuning import unpublished_settings
from kd.stages.build_run import open_teachers
from kd.stages.cross_validation import CrossValidation
from kd.stages.finetuning_config import ASKS_FOR, CHANGES_NOTHING, FinetuneConfig, decided_by_data
from kd.training.config import as_json
from kd.training.run_folder import LOCK_FILE, enter_run_folder
from kd.training.threads import leave_a_core_to_the_workers
from teacher_logits.processes import LONGEST_WAIT, locked_by_main_process, on_main_process, start_accelerator


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
    runs = CrossValidation(config, task, clips, parts, open_teachers(config), accelerator, StopSignals())
    loss = config.loss.loss or "cross-entropy or bce, by group"
    notes = (*notes, *unpublished_settings(config, task))
    for note in (*notes, told, f"{len(clips)} clips, {config.clip_seconds:g} s each, loss {loss}"):
        accelerator.print(note)
    if not config.is_pretrained:
        accelerator.print(
            f"{config.student} starts from scratch; --init or --weights would start from a trained student"
        )
    runs.check()
    description = {**as_json(config), "processes": accelerator.num_processes, "inputs": runs.fingerprints(every_part)}
    with runs.signals, locked_by_main_process(accelerator, config.out / LOCK_FILE, str(config.out)):
        folder = on_main_process(
            accelerator,
            lambda: enter_run_folder(
                config.out,
                description,
                changes_nothing=CHANGES_NOTHING,
                asks_for=ASKS_FOR,
                accept_changes=config.accept_changes,
                restart=config.restart,
                results=runs.results(),
                defaults=as_json(FinetuneConfig(task="", data=Path())),
            ),
        )
        for note in folder.notes:
            accelerator.print(note)
        if folder.state == "finished":
            accelerator.print(f"the run in {config.out} is finished already: nothing to do")
            return config.out
        if config.cache is not None:
            runs.clips = cached_clips(runs, config.cache)
        runs.run(folder, command)
        if accelerator.is_main_process:
            folder.finish()
        accelerator.end_training()
    return config.out


def cached_clips(runs: CrossValidation, folder: Path) -> TaskClips:
    """The clips with their waveforms from a cache, which the main process fills if need be."""
    rate = runs.config.frontend.sample_rate_hz

    def stop() -> None:
        if runs.signals.requested:
            raise Stopped(f"{runs.signals.reason} came; the same command decodes the clips into {folder} again")

    bad = runs.config.on_bad_clip
    on_main_process(runs.accelerator, lambda: fill_cache(runs.clips, folder, rate, bad, before_clip=stop))
    return CachedClips(runs.clips, folder, rate)
