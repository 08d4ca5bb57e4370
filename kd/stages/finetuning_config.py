"""The settings of a fine-tuning run, and what of the command line decides their defaults."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.tasks.task import MissingAudio, Task, TaskClips, usable_durations
from kd.data.sampling import SamplingConfig
from kd.evaluation.label_metrics import metric_names
from kd.objectives.label_losses import loss_space
from kd.objectives.settings import DistillationConfig
from kd.stages import stage_config
from kd.stages.stage_config import Flat, StageConfig
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from kd.training.transfer import Freeze

LONGEST_CLIP_SECONDS = 10.0
"""Own sounds longer than this are cropped to it unless told otherwise: what the public weights were trained on."""


def shared_schedule(epochs: int) -> ScheduleConfig:
    """10 epochs of warm-up, 65 of ramp down and 5 at 1 % of the peak, or these shares of another number (DyMN paper)."""
    return ScheduleConfig(
        warmup_epochs=0.125 * epochs, ramp_down_start=0.125 * epochs, ramp_down_epochs=0.8125 * epochs
    )


ASKS_FOR = ("fold", "probe", "probe_only", "report")
"""Settings that say how much is to be done, and change nothing of what is done already."""


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(StageConfig):
    """Fine-tune a student on a task."""

    task: str
    """Name of the task in the catalog, as esc50; folder and manifest are for your own sounds, MODULE:TASK for a task of
    your own."""
    data: Path
    """Folder of the data set in its official layout (for the task manifest: the CSV or Parquet file)."""
    out: Path = Path("runs/TASK")
    """Run folder to write; TASK stands for the task's name."""
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
    test_share: float = 0.2
    """Own sounds without folds and splits: share of the clips held out for testing."""
    valid_share: float = 0.0
    """Share of the training clips to validate on, where the task has no validation clips of its own."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or padded to, and of the windows that are averaged in evaluation (the task's
    if left out; for own sounds that of the longest clip, at most 10)."""
    freeze: Freeze = "none"
    """backbone: train the layers after the last map alone. batch-norm: keep the running statistics of all batch norms but
    the first."""
    layer_decay: float = 1.0
    """Each layer learns so many times as fast as the one after it."""
    early_stopping: str | None = None
    """Keep the weights that are best on the validation clips by this metric, and stop when it no longer gets better."""
    patience: int = 10
    """Validations without a better value after which early stopping stops."""
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
            raise ValueError("--weights and --init both say what to start from; leave one of the two out")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are one or more different numbers from 0; found {list(self.seeds)}")
        if self.patience < 1 or self.eval_batch_size < 1:
            raise ValueError(
                f"patience and eval_batch_size must be at least 1; found {self.patience} and {self.eval_batch_size}"
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
        if not self.logits and replace(self.distillation, label_weight=0.1) != DistillationConfig():
            raise ValueError(
                "--teacher-temperature and --mixup-of-teacher would not be used without --logits; leave them out"
            )

    @property
    def is_pretrained(self) -> bool:
        """Whether the student starts from trained weights."""
        return self.weights is not None or self.init is not None


CHANGES_NOTHING = (*stage_config.CHANGES_NOTHING, *ASKS_FOR, "allow_outside", "data", "cache")
"""Settings that a run may go on with otherwise, since they do not change the result of a fold."""


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
        durations = usable_durations(clips, config.on_bad_clip)
        if not durations:
            raise ValueError(f"{clips.path}: none of the {len(clips)} clips can be used")
        longest = max(durations)
        seconds = min(LONGEST_CLIP_SECONDS, max(0.01, round(longest, 2)))
    loss = config.loss.loss
    if loss is None and len({group.exclusive for group in label_space.groups}) == 1:
        loss = "cross-entropy" if label_space.exclusive else "bce"
    return replace(config, loss=replace(config.loss, loss=loss), clip_seconds=seconds)


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
    views: str | None = None
    epochs: int | None = None


def read_deciding(arguments: Sequence[str]) -> Deciding:
    """Picks those options out of a command line and passes over all others, which are checked later."""
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
