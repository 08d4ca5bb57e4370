"""Fine-tuning: adapts a student to a task, with one run for each fold and seed."""

from pathlib import Path

import torch
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from audio_datasets.audio.bad_clips import ClipList, summary
from audio_datasets.audio.heard import Heard
from audio_datasets.system.stop_signals import Stopped, StopSignals
from audio_datasets.tasks.cache import CachedClips, fill_cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import TaskClips, read_task, usable_durations
from kd.data.splits import partitions
from kd.data.unlabelled import open_sources, with_unlabelled
from kd.recipes.finetuning import unpublished_settings
from kd.run_folder.config import parse_options
from kd.run_folder.seen_files import take_down_contents
from kd.run_folder.start import LOCK_FILE, SUSPICIOUS_CLIPS_FILE, check_run_folder
from kd.stages.build_run import enter
from kd.stages.cross_validation import CrossValidation
from kd.stages.finetuning_config import ASKS_FOR, CHANGES_NOTHING, FinetuneConfig, decided_by_data, window_note
from kd.stages.finetuning_setup import FinetuneSetup
from kd.stages.teachers import open_teachers
from kd.training.threads import leave_a_core_to_the_workers
from kd.training.transfer import Start, start_from_run
from students.catalog import family_of
from teacher_logits.processes import LONGEST_WAIT, locked_by_main_process, on_main_process, start_accelerator


def finetune(config: FinetuneConfig, command: str = "") -> Path:
    """Runs the fine-tuning described by ``config``, or continues it, and returns the run folder.

    There is one student for each seed and fold. Finished ones are kept.

    The folder then contains ``config.json``, ``results.json`` and, for each seed and fold (in separate folders if there are
    several, see docs/finetune.md), ``metrics.jsonl``, ``checkpoints/``, ``predictions.npz`` and the student. ``command`` is
    the user's command line, which is recorded.

    Raises:
        ValueError: data, weights or settings that do not fit together, a run folder that contains another run or is in use by
            another process, or a loss that is not finite.
        Stopped: on SIGTERM, SIGUSR1 or SIGHUP, after the run was saved.
    """
    check_run_folder(config, config.out)
    torch.set_flush_denormal(True)
    accelerator = start_accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.loop.gradient_accumulation_steps),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)],
    )
    leave_a_core_to_the_workers(accelerator)
    task = get_task(config.task)
    how = {"allow_outside": config.allow_outside, "on_bad_clip": config.on_bad_clip}
    clips, notes = read_task(task, config.data, config.missing_audio, **how)
    unlabelled = open_sources(config.unlabelled, clips.class_names)
    files = take_down_contents(accelerator, (clips, *unlabelled), config.out)
    chooses_window = config.clip_seconds is None and task.clip_seconds is None
    config = decided_by_data(config, task, clips)
    parts, told = partitions(clips, folds=config.fold, test_share=config.test_share, valid_share=config.valid_share)
    every_part, _ = partitions(clips, test_share=config.test_share, valid_share=config.valid_share)
    with_unlabelled(clips, unlabelled, accelerator.print)  # raises an error for sources that do not fit
    setup = FinetuneSetup(
        config, task, clips, read_start(config), open_teachers(config), accelerator, StopSignals(), unlabelled
    )
    runs = CrossValidation(setup, parts)
    notes = (*notes, *notes_on_lengths(config, clips, chooses_window), *unpublished_settings(config, task))
    for note in (*notes, told, f"{len(clips)} clips, {config.clip_seconds:g} s each, loss {loss_in_words(config)}"):
        accelerator.print(note)
    if not config.is_pretrained:
        accelerator.print(f"{config.student} starts from scratch; to start from a trained student: --init or --weights")
    runs.check()
    with setup.signals, locked_by_main_process(accelerator, config.out / LOCK_FILE, str(config.out)):
        inputs, defaults = runs.fingerprints(every_part), FinetuneConfig(task="", data=Path())
        asked = {"asks_for": ASKS_FOR, "results": runs.results(), "files": files}
        folder = enter(accelerator, config, inputs, defaults, CHANGES_NOTHING, **asked)
        if folder.state == "finished":
            return config.out
        list_suspicious(setup)
        if config.cache is not None:
            setup.clips = cached_clips(setup, setup.clips, config.cache)
            setup.unlabelled = [
                cached_clips(setup, source, config.cache) if isinstance(source, TaskClips) else source
                for source in setup.unlabelled
            ]
        runs.run(folder, command)
        if accelerator.is_main_process:
            folder.finish()
        accelerator.end_training()
    return config.out


def loss_in_words(config: FinetuneConfig) -> str:
    return config.loss.loss or "cross-entropy or bce, by group"


def notes_on_lengths(config: FinetuneConfig, clips: TaskClips, chooses_window: bool) -> list[str]:
    """Notes on the window, on clips whose length differs from their header's, and on audio that training never hears.

    Args:
        chooses_window: the window's length was chosen from the data.

    Raises:
        BadClipError: a clip that cannot be read, unless such clips are to be skipped.
    """
    notes = [window_note(config, clips)] if chooses_window else []
    heard = Heard.of_beginnings(usable_durations(clips, config.on_bad_clip), config.clip_seconds)
    if clips.suspicious:
        where = config.out / SUSPICIOUS_CLIPS_FILE
        notes.append(f"{summary(clips.suspicious, len(clips), 'are suspicious')}; all are listed in {where}")
    if config.augment.crop == "start" and config.views == "own" and str(heard):
        notes.append(f"training hears only the first {config.clip_seconds:g} s of each clip: {heard}")
    return notes


def list_suspicious(setup: FinetuneSetup) -> None:
    """Writes the list of the clips whose headers are wrong; removes it where there are none."""
    if setup.accelerator.is_main_process:
        ClipList(setup.config.out / SUSPICIOUS_CLIPS_FILE).replace(setup.clips.suspicious)


def cached_clips(setup: FinetuneSetup, clips: TaskClips, folder: Path) -> TaskClips:
    """The clips with their waveforms from a cache. The main process fills it if necessary."""
    rate = setup.config.frontend.sample_rate_hz

    def stop() -> None:
        if setup.signals.requested:
            raise Stopped(f"{setup.signals.reason}; the same command decodes the clips into {folder} again")

    bad = setup.config.on_bad_clip
    on_main_process(setup.accelerator, lambda: fill_cache(clips, folder, rate, bad, before_clip=stop))
    return CachedClips(clips, folder, rate)


def read_start(config: FinetuneConfig) -> Start:
    """The starting point of the students of a run.

    Raises:
        ValueError: a run folder without a student, or settings that differ from that student's.
    """
    options = parse_options(config.student_options)
    if not config.is_pretrained:
        return Start(config.student, family_of(config.student).options_for_training(options, config.loop.epochs))
    if unused := [name for name in family_of(config.student).only_from_scratch if name in options]:
        raise ValueError(
            f"--student-options {unused[0]} would not be used: it only affects training a {config.student} from scratch"
        )
    if config.init is None:
        return Start(config.student, options, config.weights)
    start, card = start_from_run(config.init)
    wrong = {name: value for name, value in options.items() if start.options.get(name) != value}
    if config.student != start.name or wrong:
        found = f"--student {config.student}" if config.student != start.name else f"--student-options {wrong}"
        raise ValueError(f"{config.init} contains a {start.name} with the options {card.config.options}; found {found}")
    return start
