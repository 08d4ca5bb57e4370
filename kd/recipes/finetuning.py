"""The recipes of fine-tuning: the defaults of a run.

A recipe is a function from a configuration to a changed one. ``dymn`` is the one that all tasks share; learning rate and
batch size are those that the student's family was published with for the task (``Student.fine_tuning``).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.tasks.task import Task
from kd.stages.finetuning_config import FinetuneConfig, shared_schedule
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from students.catalog import family_of
from students.families.image_backbones import EfficientNet
from students.families.mergenet import MergeNet, mergenet_frontend
from students.families.mn import MN
from students.frontend import LogMelConfig
from students.interface import FineTuning

EPOCHS = 80
AS_MERGENET = (MergeNet, EfficientNet)
"""Families that the MergeNet paper trains, on its front end."""
FOR_ANY_TASK = FineTuning(1e-4, 16)
"""For a task that MN was not published with: what is used for one's own sounds."""
SCRATCH_LEARNING_RATE = 1e-3
"""Peak learning rate of a student without trained weights: the published ones are for pre-trained students."""


def dymn(config: FinetuneConfig, task: Task, epochs: int | None) -> FinetuneConfig:
    """DyMN paper, Section V-B: 80 epochs of Adam, roll, gain, mixup on waveforms and spectrograms, mel jitter.

    The phases of the learning rate are 10, 65 and 5 of 80 epochs; a run of another length has the same shares.

    Your own sounds have lengths of their own. Short ones are repeated rather than followed by silence, which would be most of
    what the student hears.
    """
    epochs = epochs or EPOCHS
    published = family_of(config.student).fine_tuning.get(task.name) or as_mn(task)
    learning_rate = published.learning_rate if config.is_pretrained else SCRATCH_LEARNING_RATE
    return replace(
        config,
        loop=replace(config.loop, epochs=epochs, batch_size=published.batch_size),
        optimizer=OptimizerConfig(learning_rate=learning_rate),
        schedule=shared_schedule(epochs),
        short_clips="pad" if task.clip_seconds is not None else "repeat",
    )


def as_mn(task: Task) -> FineTuning:
    """Learning rate and batch size for a student whose family has none for the task."""
    return MN.fine_tuning.get(task.name, FOR_ANY_TASK)


def unpublished_settings(config: FinetuneConfig, task: Task) -> list[str]:
    """Says, of settings that were neither given nor published for the student and the task, what is used in their place."""
    if config.recipe != "dymn" or task.name in family_of(config.student).fine_tuning:
        return []
    used = {"batch size": (config.loop.batch_size, as_mn(task).batch_size)}
    if config.is_pretrained:
        used["learning rate"] = (config.optimizer.learning_rate, as_mn(task).learning_rate)
    why = "as for MN" if task.name in MN.fine_tuning else "as for your own sounds"
    return [
        f"no {what} is known for {config.student} on {task.name}: using {value:g}, {why}"
        for what, (value, default) in used.items()
        if value == default
    ]


def mergenet(config: FinetuneConfig, task: Task, epochs: int | None) -> FinetuneConfig:
    """MergeNet's protocols (Careddu, 2024, Sections III-B and VI-B and C): batch 8, constant learning rate of 1e-3.

    Several labels, as FSD50K: 30 epochs, half of the clips the average of two waveforms. One label, as ESC-50: 10 epochs
    from scratch or 5 from trained weights, no mixup. Short clips are repeated. Unlike there, every fold begins afresh.
    The learning rate's schedule is not given; a constant one is the plainest reading.
    """
    several = task.exclusive is False
    # Weights of another student were not trained to hear what MergeNet hears.
    own_ears = config.init is not None or (config.weights is not None and family_of(config.student) not in AS_MERGENET)
    epochs = epochs or (30 if several else 5 if config.is_pretrained else 10)
    return replace(
        config,
        loop=replace(config.loop, epochs=epochs, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        schedule=ScheduleConfig(warmup_epochs=0.0, ramp_down_start=float(epochs), ramp_down_epochs=0.0),
        augment=AugmentConfig(
            mixup_alpha=0.0,
            mel_jitter=False,
            crop="random",
            waveform_mixup=0.5 if several else 0.0,
            waveform_mixup_alpha=0.0,
        ),
        short_clips="repeat",
        batch_norm_clips=0,
        frontend=config.frontend if own_ears else mergenet_frontend(),
    )


RECIPES: dict[str, Callable[[FinetuneConfig, Task, int | None], FinetuneConfig]] = {"dymn": dymn, "mergenet": mergenet}


def recipe_config(
    task: Task,
    data: Path,
    out: Path,
    *,
    recipe: str = "dymn",
    student: str = "mn10",
    weights: str | None = None,
    init: Path | None = None,
    frontend: LogMelConfig | None = None,
    epochs: int | None = None,
    views: str = "own",
    **settings: Any,
) -> FinetuneConfig:
    """The configuration that a recipe gives a task and a student; ``settings`` are further fields of it.

    ``views`` is what the command line gives: with stored ones a recipe neither augments nor repeats clips. A student with trained
    weights gets a linear probe first. On your own sounds it goes on from that (Kumar et al., "Fine-Tuning can Distort Pretrained
    Features and Underperform Out-of-Distribution", 2022: first a linear probe, then all layers), and keeps the statistics of its batch
    norms: the probe was fitted to what they give, and those of a few small batches are others.
    ``frontend`` is the one that ``init`` was trained with; without it a MergeNet hears what MergeNet was published with.

    Raises:
        ValueError: an unknown recipe.
    """
    if recipe not in RECIPES:
        raise ValueError(f"unknown recipe {recipe!r}; choices: {', '.join(RECIPES)}")
    if frontend is None:
        frontend = family_of(student).published_frontend()
    config = FinetuneConfig(
        task=task.name,
        data=data,
        out=out,
        recipe=recipe,
        student=student,
        weights=weights,
        init=init,
        frontend=frontend,
        loop=LoopConfig(epochs=EPOCHS, batch_size=64, keep_checkpoints=1, log_every_steps=10),
    )
    config = RECIPES[recipe](config, task, epochs)
    if views == "stored":  # clips are shown as the teachers heard them
        only_mixup = AugmentConfig(mixup_alpha=config.augment.mixup_alpha, mel_jitter=False)
        config = replace(config, augment=only_mixup, short_clips="pad")
    if config.is_pretrained and recipe == "dymn" and task.clip_seconds is None:
        config = replace(config, from_probe=True, freeze="batch-norm")
    return replace(config, **{"probe": config.is_pretrained, **settings})
