"""The settings of a fine-tuning run, and the options that decide their defaults."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, ClassVar

import numpy as np

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.command_line.help_pages import HelpGroups
from audio_datasets.tasks.task import MissingAudio, Task, TaskClips, usable_durations
from kd.data.sampling import SamplingConfig, are_labelled
from kd.data.windows import WINDOW_TOLERANCE, ShortClips
from kd.evaluation.label_metrics import metric_names
from kd.objectives.label_losses import loss_space
from kd.objectives.settings import DistillationConfig
from kd.run_folder.config import parse_options
from kd.stages import stage_config
from kd.stages.stage_config import STAGE_GROUPS, Flat, StageConfig
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from kd.training.transfer import Freeze

LONGEST_WINDOW_SECONDS = 10.0
"""Your own sounds are heard in windows of at most this length unless told otherwise: the public weights were trained on it."""
SHORTEST_WINDOW_SECONDS = 1.0
"""Your own sounds are repeated up to at least this length: shorter maps leave the last layers of a student a single position."""
WINDOW_PERCENTILE = 90
"""Percentage of your own sounds that fit into a window. With the longest as window, a few long sounds would make almost all of
what a student hears of the others silence, or the same sound over and over."""


def shared_schedule(epochs: int) -> ScheduleConfig:
    """10 epochs of warm-up, 65 of ramp down and 5 at 1 % of the peak, or these shares of another number (DyMN paper)."""
    return ScheduleConfig(
        warmup_epochs=0.125 * epochs, ramp_down_start=0.125 * epochs, ramp_down_epochs=0.8125 * epochs
    )


ASKS_FOR = ("fold", "probe", "probe_only", "report")
"""Settings that say how much to do. They do not change the result of what is already done."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Fine-tune a student on a task."""

    help_groups: ClassVar[HelpGroups] = {
        "Data": ("task", "data", "out", "test_share", "valid_share", "cache", "missing_audio", "allow_outside"),
        "Student": ("student", "weights", "init", "student_options", "from_probe", "freeze", "layer_decay"),
        "Training": ("recipe", *STAGE_GROUPS["Training"], "early_stopping", "patience"),
        "Evaluation": ("fold", "seeds", "probe", "probe_only", "probe_regularization", "report", "eval_batch_size"),
        **{title: names for title, names in STAGE_GROUPS.items() if title not in ("Student", "Training")},
    }
    main_options: ClassVar[tuple[str, ...]] = (
        *("task", "data", "out", "student", "weights", "init", "epochs", "batch_size", "learning_rate", "clip_seconds"),
        *("freeze", "test_share", "valid_share", "early_stopping", "fold", "seeds", "cache", "logits", "restart"),
    )

    task: str
    """Name of the task: esc50, fsd50k, openmic, dcase20; folder or manifest for your own sounds; MODULE:TASK for a task of
    your own."""
    data: Path
    """Folder of the data set in its official layout. folder: one sub-folder per class; manifest: the CSV or Parquet file."""
    out: Path = Path("runs/TASK")
    """Run folder to write."""
    init: Path | None = None
    """Start from the student in this run folder, with its options and front end."""
    recipe: str = "dymn"
    """Source of all defaults: dymn (shared by all tasks) or mergenet (the MergeNet paper's protocols)."""
    fold: tuple[int, ...] = ()
    """Run only these test folds (default: all)."""
    seeds: tuple[int, ...] = (0,)
    """Train once with each of these seeds, or once per fold and seed; the result is the mean with its spread."""
    missing_audio: MissingAudio = "refuse"
    """Audio files that the task lists but that do not exist: refuse stops, leave-out trains without them."""
    allow_outside: bool = False
    """Allow a list to name files outside its own folder, by an absolute path or through ".."."""
    test_share: float = 0.2
    """Your own sounds, without folds or splits: share of the clips held out for testing. 0: train on all clips and test on none."""
    valid_share: float = 0.0
    """Share of the training clips held out for validation, if the task has no validation clips of its own."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or filled up to, and of the windows that evaluation averages (default: the task's;
    for your own sounds the length that 90 % of them do not exceed, from 1 to 10 s)."""
    freeze: Freeze = "none"
    """backbone: train only the classifier (the layers after the last feature map). batch-norm: keep the running statistics of
    all batch norms except the first (default for your own sounds, with --weights or --init)."""
    layer_decay: float = 1.0
    """Learning rate of each layer, as a fraction of the next layer's."""
    early_stopping: str | None = None
    """Stop when this metric of the validation clips no longer improves, and keep the best weights."""
    patience: int = 10
    """Early stopping: number of validations without improvement before training stops."""
    probe: bool = False
    """First fit a linear probe on the frozen embeddings, a check that takes seconds (default: with --weights or --init)."""
    from_probe: bool = False
    """Train on from the linear probe, whose linear layer takes the place of the student's head (default: for your own sounds, with
    --weights or --init): a few epochs do not reach the probe from a fresh head."""
    probe_only: bool = False
    """Fit the linear probe only; do not train."""
    probe_regularization: float = 1.0
    """Inverse regularization strength of the probe (scikit-learn's C)."""
    cache: Path | None = None
    """Decode every clip once into this folder, as 16-bit samples, and read it from there. Several runs can share it."""
    report: bool = True
    """Write report.html and report.md at the end (kd report writes them later)."""
    eval_batch_size: int = 32
    """Evaluation windows in a batch."""
    loop: Annotated[LoopConfig, Flat] = field(
        default_factory=lambda: LoopConfig(epochs=80, batch_size=64, keep_checkpoints=1, log_every_steps=10)
    )
    optimizer: Annotated[OptimizerConfig, Flat] = field(default_factory=lambda: OptimizerConfig(learning_rate=6e-5))
    schedule: Annotated[ScheduleConfig, Flat] = field(default_factory=lambda: shared_schedule(80))
    sampling: Annotated[SamplingConfig, Flat] = field(default_factory=lambda: SamplingConfig(sampler="uniform"))
    augment: Annotated[AugmentConfig, Flat] = field(
        default_factory=lambda: AugmentConfig(gain_db=7.0, roll_seconds=0.125, crop="random", waveform_mixup=0.5)
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weights is not None and self.init is not None:
            raise ValueError("--weights and --init both name a starting point; leave out one of the two")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(
                f"seeds must be one or more different whole numbers, 0 or greater; found {list(self.seeds)}"
            )
        if self.patience < 1 or self.eval_batch_size < 1:
            raise ValueError(
                f"patience and eval_batch_size must be at least 1; found {self.patience} and {self.eval_batch_size}"
            )
        if not 0.0 < self.layer_decay <= 1.0:
            raise ValueError(f"layer_decay must be above 0 and at most 1; found {self.layer_decay}")
        if not 0.0 <= self.test_share < 1.0 or not 0.0 <= self.valid_share < 1.0:
            raise ValueError(
                f"test_share and valid_share must be at least 0 and below 1; found {self.test_share} and {self.valid_share}"
            )
        if not self.probe_regularization > 0:
            raise ValueError(f"probe_regularization must be positive; found {self.probe_regularization}")
        if (
            not (self.logits or self.has_teacher_beside)
            and replace(self.distillation, label_weight=0.1) != DistillationConfig()
        ):
            raise ValueError(
                "--teacher-temperature and --mixup-of-teacher have no effect without --logits; leave them out"
            )

    @property
    def is_pretrained(self) -> bool:
        """Whether the student starts from trained weights."""
        return super().is_pretrained or self.init is not None

    @property
    def starts_from_probe(self) -> bool:
        """Whether training goes on from the linear probe. A head that was asked for is not replaced."""
        return self.from_probe and "head" not in parse_options(self.student_options)


CHANGES_NOTHING = (*stage_config.CHANGES_NOTHING, *ASKS_FOR, "allow_outside", "data", "cache")
"""Settings that may differ when a run is continued, since they do not change the result of a fold."""


def decided_by_data(config: FinetuneConfig, task: Task, clips: TaskClips) -> FinetuneConfig:
    """The configuration with what the data decide filled in: the loss and the length of a clip.

    Raises:
        ValueError: a loss or a metric that the task's labels do not allow.
    """
    label_space = clips.label_space
    loss_space(label_space, config.loss)  # refuses what does not fit
    allowed = metric_names(label_space)
    if config.early_stopping is not None and config.early_stopping not in allowed:
        raise ValueError(f"--early-stopping must be one of {', '.join(allowed)}; found {config.early_stopping!r}")
    if task.metric is not None and task.metric not in allowed:
        raise ValueError(f"the metric of task {task.name} must be one of {', '.join(allowed)}; found {task.metric!r}")
    seconds = config.clip_seconds or task.clip_seconds
    if seconds is None:
        durations = _labelled_durations(clips, config.on_bad_clip)
        if not durations:
            raise ValueError(f"{clips.path}: none of the {len(clips)} clips can be used")
        seconds = window_for(durations, config.short_clips)
    loss = config.loss.loss
    if loss is None and len({group.exclusive for group in label_space.groups}) == 1:
        loss = "cross-entropy" if label_space.exclusive else "bce"
    return replace(config, loss=replace(config.loss, loss=loss), clip_seconds=seconds)


def window_for(durations: Sequence[float], short_clips: ShortClips) -> float:
    """The window in seconds for sounds of these lengths: the length that ``WINDOW_PERCENTILE`` of them do not exceed, in bounds."""
    shortest = SHORTEST_WINDOW_SECONDS if short_clips == "repeat" else 0.01
    seconds = round(float(np.percentile(durations, WINDOW_PERCENTILE)), 2)
    return min(LONGEST_WINDOW_SECONDS, max(shortest, seconds))


def _labelled_durations(clips: TaskClips, on_bad_clip: OnBadClip) -> list[float]:
    """The lengths of the clips with labels, in seconds. Audio without labels may be of any length."""
    every = np.arange(len(clips))
    return usable_durations(clips, on_bad_clip, rows=every[are_labelled(clips, every)])


def window_note(config: FinetuneConfig, clips: TaskClips) -> str:
    """What the window means for clips whose lengths it was chosen from."""
    durations, seconds = _labelled_durations(clips, "skip"), config.clip_seconds
    shorter = sum(duration < seconds for duration in durations)
    longer = sum(duration > seconds * (1 + WINDOW_TOLERANCE) for duration in durations)
    filled = "repeated to fill it" if config.short_clips == "repeat" else "filled up with silence"
    return (
        f"clips are {min(durations):.2g} to {max(durations):.2g} s long (median {np.median(durations):.2g} s) and heard in windows "
        f"of {seconds:g} s: {shorter} shorter ones are {filled}; {longer} longer ones are cropped at random in training, and "
        "tested window by window (--clip-seconds and --short-clips change this)"
    )


@dataclass(frozen=True)
class Deciding:
    """The options that decide the defaults of all others; None where an option is not given."""

    task: str | None = None
    data: Path | None = None
    out: Path | None = None
    student: str | None = None
    weights: str | None = None
    init: Path | None = None
    recipe: str | None = None
    views: str | None = None
    epochs: int | None = None


def read_deciding(arguments: Sequence[str]) -> Deciding:
    """Reads those options from a command line. All other options are checked later."""
    reader = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in ("task", "student", "weights", "recipe", "views"):
        reader.add_argument(f"--{name}")
    for name in ("data", "out", "init"):
        reader.add_argument(f"--{name}", type=Path)
    reader.add_argument("--epochs", type=int)
    try:
        return Deciding(**vars(reader.parse_known_args(arguments)[0]))
    except argparse.ArgumentError as error:
        raise ValueError(f"{error}") from error
