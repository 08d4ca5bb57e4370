"""The settings that both stages share. Pretraining and fine-tuning are built from the same parts, with other defaults."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import OnBadClip
from audio_datasets.audio.impulse_responses import load_impulse_responses
from audio_datasets.command_line.help_pages import HelpGroups
from kd.data.sampling import SamplingConfig
from kd.data.windows import ShortClips
from kd.objectives.catalog import check_options, objective_class
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.run_folder.config import parse_options
from kd.training.batch_norm.reestimation import DEFAULT_CLIPS
from kd.training.loop import LoopConfig
from kd.training.optimization import OptimizerConfig
from kd.training.schedule import ScheduleConfig
from kd.training.transfer import IMAGENET, check_imagenet_start
from students.frontend import LogMelConfig
from teacher_logits.stores.ensemble import MeanOf
from teacher_logits.stores.links import LinkKind

Flat = tyro.conf.arg(name="")

NOT_IN_STORED_VIEWS = (
    *("gain_db", "roll_seconds", "waveform_mixup", "impulse_responses"),
    *("freq_mixstyle", "time_masks", "frequency_masks"),
)
"""Augmentation that would change what the teachers heard."""

STAGE_GROUPS: HelpGroups = {
    "Student": ("student", "weights", "student_options"),
    "Teachers": (
        *(
            "logits",
            "label_weight",
            "teacher_temperature",
            "ensemble",
            "teacher_link",
            "missing_logits",
            "views",
            "mixup_of_teacher",
        ),
        *("objective", "objective_options", "unlabelled", "unlabelled_per_labelled"),
    ),
    "Training": (
        "epochs",
        "batch_size",
        "learning_rate",
        "clip_seconds",
        "short_clips",
        "mixed_precision",
        "workers",
        "sync_batch_norm",
        "batch_norm_clips",
    ),
    "Run folder": ("on_bad_clip", "restart", "accept_changes"),
}
"""How the help of both stages arranges the options that they share."""


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a run of either stage."""

    out: Path
    """Run folder to write."""
    student: str = "mn10"
    """Name of the student in the catalog (kd profile lists them), or MODULE:CLASS for your own."""
    student_options: tuple[str, ...] = ()
    """Options of the student, each NAME=VALUE."""
    weights: str | None = None
    """Start from these weights: a file, the name of one in the folder KD_WEIGHTS_DIR (as mn04_as), or "imagenet" (MN of width 1
    and timm's image networks). If the classes differ, the last layer is new."""
    logits: tuple[str, ...] = ()
    """Logit stores of the teachers, each PATH or PATH:WEIGHT (a teacher with weight 0 is not used). A.h5+B.h5 joins two stores
    of one teacher. Logits are looked up by clip id."""
    unlabelled: tuple[Path, ...] = ()
    """More audio to train on, without labels: folders of sounds or clip stores, of any length and sample rate. --logits must cover
    its clips too."""
    ensemble: MeanOf = "logits"
    """Several teachers: average their logits or their probabilities."""
    teacher_link: LinkKind | None = None
    """Activation that the teachers were trained with, where their logit stores do not record it: sigmoid (several labels for a clip, as
    AudioSet) or softmax (one label)."""
    missing_logits: Literal["refuse", "label-only", "leave-out"] = "refuse"
    """A training clip without teacher logits: refuse stops, label-only trains on its labels alone, leave-out drops the clip."""
    views: Literal["own", "stored"] = "own"
    """own: this run's own augmentation. stored: the views that the teachers heard (kd teach --views)."""
    objective: str = "distillation"
    """Training objective: distillation (labels and stored logits), soft-targets, pseudo-labels, embedding, online, mean-teacher
    (docs/add_an_objective.md), or MODULE:CLASS for your own."""
    objective_options: tuple[str, ...] = ()
    """Options of the objective, each NAME=VALUE."""
    clip_seconds: float | None = None
    """Crop or pad training clips to this many seconds."""
    short_clips: ShortClips = "pad"
    """Fill up shorter clips with silence (pad) or by repeating them (repeat)."""
    on_bad_clip: OnBadClip = "refuse"
    """A clip that cannot be decoded: refuse stops and names it; skip trains on another clip in its place, leaves it out of
    evaluation and lists it."""
    workers: int = 2
    """Data-loading processes for each training process."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the student's forward pass."""
    sync_batch_norm: bool = False
    """Compute batch-norm statistics over all processes."""
    batch_norm_clips: int | None = None
    """Recompute batch-norm statistics from up to this many unmixed training clips, before each validation and at the end; 0 keeps
    the running averages (default: 2000 for a student that starts from scratch, otherwise 0)."""
    accept_changes: bool = False
    """Continue the run in the folder although settings that affect its result have changed."""
    restart: bool = False
    """If the folder holds a run with other settings, delete that run and start over."""
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
        if self.batch_norm_clips is not None and self.batch_norm_clips < 0:
            raise ValueError(f"batch_norm_clips must not be negative; found {self.batch_norm_clips}")
        if self.workers < 0:
            raise ValueError(f"workers must be at least 0; found {self.workers}")
        if self.accept_changes and self.restart:
            raise ValueError("--accept-changes continues the run in the folder and --restart deletes it; choose one")
        if self.logits and self.distillation.label_weight == 1.0:
            raise ValueError("with --label-weight 1 the teachers' --logits are not used; leave out one of the two")
        if self.teacher_link is not None and not self.logits:
            raise ValueError("--teacher-link is not used without --logits; leave it out, or give teacher logits")
        if self.loop.batch_size < 2:
            raise ValueError(f"batch_size must be at least 2 (for batch normalisation); found {self.loop.batch_size}")
        if self.views == "stored":
            if not self.logits:
                raise ValueError("--views stored needs --logits: it shows the views that the teachers heard")
            own = [name for name in NOT_IN_STORED_VIEWS if getattr(self.augment, name)]
            own += ["crop"] if self.augment.crop != "start" else []
            own += ["short_clips"] if self.short_clips != "pad" else []
            if own:
                raise ValueError(
                    f"--views stored shows clips exactly as the teachers heard them, so it allows no other augmentation; "
                    f"leave out {', '.join(own)}"
                )
        check_options(self.objective, parse_options(self.objective_options))
        if self.weights == IMAGENET:
            check_imagenet_start(self.student, tuple(self.student_options), self.frontend)

    @property
    def has_teacher_beside(self) -> bool:
        """Whether the objective brings a teacher of its own, and so can do without stored logits."""
        return objective_class(self.objective).learns_from_bare_audio

    @property
    def is_pretrained(self) -> bool:
        """Whether the student starts from trained weights."""
        return self.weights is not None

    @property
    def renews_batch_norms_from(self) -> int:
        """How many training clips batch-norm statistics are taken anew from at most; 0: they are not."""
        if self.batch_norm_clips is not None:
            return self.batch_norm_clips
        return 0 if self.is_pretrained else DEFAULT_CLIPS

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
    *("logits", "unlabelled"),  # their contents are compared, by fingerprint
    "teacher_link",  # compared with the contents
)
"""Settings that may differ when a run is continued, since they do not change what is trained."""
