"""What both stages are configured with: pretraining and fine-tuning are the same parts with other defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.audio.impulse_responses import load_impulse_responses
from kd.data.sampling import SamplingConfig
from kd.data.windows import ShortClips
from kd.objectives.catalog import check_options
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.run_folder.config import parse_options
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from kd.training.transfer import IMAGENET, check_imagenet_start
from students.frontend import LogMelConfig
from teacher_logits.stores.ensemble import MeanOf

Flat = tyro.conf.arg(name="")

NOT_IN_STORED_VIEWS = (
    *("gain_db", "roll_seconds", "waveform_mixup", "impulse_responses"),
    *("freq_mixstyle", "time_masks", "frequency_masks"),
)
"""Augmentation that would change what the teachers heard."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a run, whichever stage it belongs to."""

    out: Path
    """Run folder to write."""
    student: str = "mn10"
    """Name of the student in the catalog, or MODULE:CLASS for your own."""
    student_options: tuple[str, ...] = ()
    """Options of the student, each NAME=VALUE."""
    weights: str | None = None
    """Start from these weights: a file, or "imagenet" (MN of width 1 and timm's image networks)."""
    logits: tuple[str, ...] = ()
    """Logit stores of the teachers, each PATH or PATH:WEIGHT (weight 0: takes no part); A.h5+B.h5 is one teacher's logits for
    clips in two stores. Found by clip id."""
    ensemble: MeanOf = "logits"
    """What several teachers' weighted mean is taken of."""
    missing_logits: Literal["refuse", "label-only", "leave-out"] = "refuse"
    """A training clip without teacher logits: stop, train it on its labels alone, or train without it."""
    views: Literal["own", "stored"] = "own"
    """Augmentation: this run's own, or the stored views that the teachers heard (kd teach --views)."""
    objective: str = "distillation"
    """What gives the losses: distillation (labels and stored logits), or MODULE:CLASS for your own."""
    objective_options: tuple[str, ...] = ()
    """Options of the objective, each NAME=VALUE."""
    clip_seconds: float | None = None
    """Length that training clips are cropped or padded to."""
    short_clips: ShortClips = "pad"
    """What fills up clips that are shorter: silence, or the clip again."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops with its name; skip trains on another in its place, leaves it out of
    evaluation, and lists it."""
    workers: int = 2
    """Data-loading processes for each training process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the student's forward pass."""
    sync_batch_norm: bool = False
    """Take batch-norm statistics over all processes."""
    accept_changes: bool = False
    """Go on with an unfinished or finished run although settings have changed that change its result."""
    restart: bool = False
    """Give up the run in the folder if it was begun with other settings, and begin again."""
    loop: Annotated[LoopConfig, Flat] = field(default_factory=LoopConfig)
    optimizer: Annotated[OptimizerConfig, Flat] = field(default_factory=OptimizerConfig)
    schedule: Annotated[ScheduleConfig, Flat] = field(default_factory=ScheduleConfig)
    loss: Annotated[LossConfig, Flat] = field(default_factory=LossConfig)
    distillation: Annotated[DistillationConfig, Flat] = field(default_factory=DistillationConfig)
    sampling: Annotated[SamplingConfig, Flat] = field(default_factory=SamplingConfig)
    augment: Annotated[AugmentConfig, Flat] = field(default_factory=AugmentConfig)
    frontend: Annotated[LogMelConfig, Flat] = field(default_factory=LogMelConfig)

    def __post_init__(self) -> None:
        if self.clip_seconds is not None and not self.clip_seconds > 0:
            raise ValueError(f"clip_seconds must be positive; found {self.clip_seconds}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0; found {self.workers}")
        if self.accept_changes and self.restart:
            raise ValueError(
                "--accept-changes goes on with the run in the folder and --restart gives it up; choose one"
            )
        if self.logits and self.distillation.label_weight == 1.0:
            raise ValueError("--logits would not be used with --label-weight 1; leave one of the two out")
        if self.loop.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (batch normalisation); found {self.loop.batch_size}")
        if self.views == "stored":
            if not self.logits:
                raise ValueError("--views stored shows the views that teachers heard, and needs their --logits")
            own = [name for name in NOT_IN_STORED_VIEWS if getattr(self.augment, name)]
            own += ["crop"] if self.augment.crop != "start" else []
            own += ["short_clips"] if self.short_clips != "pad" else []
            if own:
                raise ValueError(
                    f"--views stored shows clips exactly as the teachers heard them; leave out {', '.join(own)}"
                )
        check_options(self.objective, parse_options(self.objective_options))
        if self.weights == IMAGENET:
            check_imagenet_start(self.student, tuple(self.student_options), self.frontend)

    @property
    def options_of_objective(self) -> dict[str, Any]:
        return parse_options(self.objective_options)

    def impulse_responses(self) -> Sequence[np.ndarray]:
        """The impulse responses to augment with, at the front end's rate."""
        if self.augment.impulse_responses is None:
            return ()
        return load_impulse_responses(self.augment.impulse_responses, self.frontend.sample_rate_hz)


CHANGES_NOTHING = (
    *("accept_changes", "restart", "on_bad_clip", "workers", "out"),
    *("loop.keep_checkpoints", "loop.checkpoint_every_steps"),
    "logits",  # what is in them counts, by their fingerprints
)
"""Settings that a run may go on with otherwise, since they do not change what is trained."""
