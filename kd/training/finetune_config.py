"""The settings of a fine-tuning run, and what of the command line decides their defaults."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.tasks.task import MissingAudio, Task, TaskClips, usable_durations
from kd.data.finetune_data import TaskAugmentConfig
from kd.data.sampling import SamplingConfig
from kd.evaluation.task_metrics import METRICS
from kd.objectives.distillation import DistillationConfig
from kd.objectives.finetune_objective import LossConfig
from kd.training.loop import LoopConfig, OptimizerConfig
from kd.training.schedule import ScheduleConfig
from kd.training.transfer import Freeze
from students.frontend import LogMelConfig

Flat = tyro.conf.arg(name="")

LONGEST_CLIP_SECONDS = 10.0
"""Own sounds longer than this are cropped to it unless told otherwise: what the public weights were trained on."""


def shared_schedule(epochs: int) -> ScheduleConfig:
    """10 epochs of warm-up, 65 of ramp down and 5 at 1 % of the peak, or these shares of another number (DyMN paper)."""
    return ScheduleConfig(
        warmup_epochs=0.125 * epochs, ramp_down_start=0.125 * epochs, ramp_down_epochs=0.8125 * epochs
    )


@dataclass(frozen=True)
class FinetuneConfig:
    """Fine-tune a student on a task."""

    task: str
    """Name of the task in the catalog, as esc50; folder and manifest are for your own sounds."""
    data: Path
    """Folder of the data set in its official layout (for the task manifest: the CSV or Parquet file)."""
    out: Path = Path("runs/TASK")
    """Run folder to write; TASK stands for the task's name."""
    student: str = "mn10"
    """Name of the student in the catalog (with --init: the run's)."""
    student_options: tuple[str, ...] = ()
    """Options of the student, each NAME=VALUE."""
    weights: str | None = None
    """Start from these weights: a file, or "imagenet"."""
    init: Path | None = None
    """Start from the student of this run folder, with its options and front end."""
    recipe: str = "dymn"
    """What all settings are unless given: dymn (shared by all tasks) or mergenet (that paper's protocols)."""
    fold: tuple[int, ...] = ()
    """Only the runs that these folds test (all folds if left out)."""
    seeds: tuple[int, ...] = (0,)
    """One run (or one of each fold) for each of these seeds; the result is their mean and spread."""
    missing_audio: MissingAudio = "refuse"
    """What to do if audio files that the task's lists name are not there."""
    allow_outside: bool = False
    """Take files that a list names outside of its own folder, by an absolute path or through ".."."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops with its name; skip trains on another in its place, leaves it out of
    evaluation, and lists it."""
    test_share: float = 0.2
    """Own sounds without folds and splits: share of the clips to test on."""
    valid_share: float = 0.0
    """Share of the training clips to validate on, where the task has no validation clips of its own."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or padded to, and of the windows that are averaged in evaluation (the task's
    if left out; for own sounds that of the longest clip, at most 10)."""
    short_clips: Literal["pad", "repeat"] = "pad"
    """What fills up clips that are shorter: silence, or the clip again."""
    freeze: Freeze = "none"
    """backbone: train the layers after the last map alone. batch-norm: keep the running statistics of all batch norms but
    the first."""
    layer_decay: float = 1.0
    """Each layer learns so many times as fast as the one after it."""
    early_stopping: str | None = None
    """Keep the weights that are best on the validation clips by this metric, and stop when it no longer gets better."""
    patience: int = 10
    """Validations without a better value after which early stopping stops."""
    logits: tuple[str, ...] = ()
    """Logit stores of your own teachers, each PATH or PATH:WEIGHT, with the task's classes; found by clip id."""
    missing_logits: Literal["refuse", "label-only"] = "refuse"
    """What to do with a training clip without teacher logits: stop, or train it on its labels alone."""
    probe: bool = False
    """First fit a linear probe on the frozen embeddings, as a check that takes seconds."""
    probe_only: bool = False
    """Fit the probe and train nothing."""
    probe_regularization: float = 1.0
    """Inverse strength of the probe's regularization (scikit-learn's C)."""
    cache: Path | None = None
    """Decode every clip once into this folder, as 16-bit samples, and read those; may be shared between runs."""
    report: bool = True
    """Write report.html and report.md at the end (kd report does so later)."""
    eval_batch_size: int = 32
    """Windows in a batch of evaluation."""
    workers: int = 2
    """Data-loading processes for each training process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the student's forward pass."""
    accept_changes: bool = False
    """Go on with an unfinished or finished run although settings have changed that change its result."""
    restart: bool = False
    """Give up the run in the folder if it was begun with other settings, and begin again."""
    loop: Annotated[LoopConfig, Flat] = field(
        default_factory=lambda: LoopConfig(epochs=80, batch_size=64, keep_checkpoints=1, log_every_steps=10)
    )
    optimizer: Annotated[OptimizerConfig, Flat] = field(default_factory=lambda: OptimizerConfig(learning_rate=6e-5))
    schedule: Annotated[ScheduleConfig, Flat] = field(default_factory=lambda: shared_schedule(80))
    loss: Annotated[LossConfig, Flat] = field(default_factory=LossConfig)
    distillation: Annotated[DistillationConfig, Flat] = field(default_factory=DistillationConfig)
    sampling: Annotated[SamplingConfig, Flat] = field(default_factory=lambda: SamplingConfig(sampler="uniform"))
    augment: Annotated[AugmentConfig, Flat] = field(
        default_factory=lambda: AugmentConfig(gain_db=7.0, roll_seconds=0.125, crop="random")
    )
    task_augment: Annotated[TaskAugmentConfig, Flat] = field(default_factory=TaskAugmentConfig)
    frontend: Annotated[LogMelConfig, Flat] = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        if self.weights is not None and self.init is not None:
            raise ValueError("--weights and --init both say what to start from; leave one of the two out")
        if self.clip_seconds is not None and not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be positive; found {self.clip_seconds}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are one or more different numbers from 0; found {list(self.seeds)}")
        if self.workers < 0 or self.patience < 1 or self.eval_batch_size < 1:
            raise ValueError(
                "workers must be at least 0, patience and eval_batch_size at least 1; found "
                f"{self.workers}, {self.patience} and {self.eval_batch_size}"
            )
        if self.accept_changes and self.restart:
            raise ValueError(
                "--accept-changes goes on with the run in the folder and --restart gives it up; choose one"
            )
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be above 0 and at most 1; found {self.layer_decay}")
        if not 0.0 < self.test_share < 1.0 or not 0.0 <= self.valid_share < 1.0:
            raise ValueError(
                f"test_share must lie between 0 and 1, valid_share from 0 to below 1; found {self.test_share} and "
                f"{self.valid_share}"
            )
        if not self.probe_regularization > 0:
            raise ValueError(f"probe_regularization must be positive; found {self.probe_regularization}")
        if self.logits and self.distillation.label_weight == 1.0:
            raise ValueError("--logits would not be used with --label-weight 1; leave one of the two out")
        if self.loop.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (batch normalisation); found {self.loop.batch_size}")

    @property
    def is_pretrained(self) -> bool:
        """Whether the student starts from trained weights."""
        return self.weights is not None or self.init is not None


def decided_by_data(config: FinetuneConfig, task: Task, clips: TaskClips) -> FinetuneConfig:
    """The configuration with what the data decide filled in: the loss and the length of a clip.

    Raises:
        ValueError: a loss or a metric that the task's labels do not allow.
    """
    exclusive = is_exclusive(task, clips)
    loss = config.loss.loss or ("cross-entropy" if exclusive else "bce")
    if loss == "cross-entropy" and not exclusive:
        raise ValueError("--loss cross-entropy needs exactly one label for each clip; use bce")
    if loss == "bce" and config.loss.label_smoothing:
        raise ValueError("--label-smoothing is for --loss cross-entropy")
    allowed = METRICS["one" if exclusive else "several"]
    if config.early_stopping is not None and config.early_stopping not in allowed:
        raise ValueError(f"--early-stopping must be one of {', '.join(allowed)}; found {config.early_stopping!r}")
    seconds = config.clip_seconds or task.clip_seconds
    if seconds is None:
        durations = usable_durations(clips, config.on_bad_clip)
        if not durations:
            raise ValueError(f"{clips.path}: none of the {len(clips)} clips can be used")
        longest = max(durations)
        seconds = min(LONGEST_CLIP_SECONDS, max(0.01, round(longest, 2)))
    return replace(config, loss=replace(config.loss, loss=loss), clip_seconds=seconds)


def is_exclusive(task: Task, clips: TaskClips) -> bool:
    """Whether the task's classes exclude each other."""
    return clips.label_space.exclusive and len(clips.label_space.groups) == 1


@dataclass(frozen=True)
class Deciding:
    """What of a command line decides the defaults of everything else; None where it is not given."""

    task: str | None = None
    data: Path | None = None
    out: Path | None = None
    student: str | None = None
    weights: str | None = None
    init: Path | None = None
    recipe: str | None = None
    epochs: int | None = None


def read_deciding(arguments: Sequence[str]) -> Deciding:
    """Picks those options out of a command line and passes over all others, which are checked later."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("task", "student", "weights", "recipe"):
        reader.add_argument(f"--{name}")
    for name in ("data", "out", "init"):
        reader.add_argument(f"--{name}", type=Path)
    reader.add_argument("--epochs", type=int)
    try:
        return Deciding(**vars(reader.parse_known_args(arguments)[0]))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}") from error
