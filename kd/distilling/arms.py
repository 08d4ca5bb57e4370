"""The steps of a distillation, each one of our ordinary commands: make the teacher, let it speak, train the students."""

import math
from dataclasses import dataclass, fields
from pathlib import Path

from kd.distilling.clip_lists import ClipList
from kd.distilling.commands import run
from kd.distilling.config import DistillConfig
from kd.distilling.teacher_weights import TeacherStart
from students.catalog import family_of
from students.frontend import LogMelConfig

TEACHER, LABELS_ALONE, DISTILLED = "teacher", "labels_alone", "distilled"
HELD_OUT = "held_out"
"""Folder of the runs of a cross-validation; the runs beside it are trained on all labels."""

AUGMENTATION = ("--waveform-mixup", 0, "--roll-seconds", 2.5, "--no-mel-jitter")
"""For students of a few hundred steps: clips anywhere in time and one mixup. That of the fine-tuning recipe is for trained networks."""
PROBE_TEMPERATURE = 0.5
"""The logits of a probe are divided by this, which sharpens it: fitted to a few labels, it is less sure than it is right."""


@dataclass(frozen=True)
class Distillation:
    """One division of the clips, and where its runs are."""

    config: DistillConfig
    start: TeacherStart
    clip_list: ClipList
    steps: int
    """Training steps of each student."""
    class_map: Path | None = None
    """Maps the classes of a given teacher to ours."""

    @property
    def is_tested(self) -> bool:
        return len(self.clip_list.part.test) > 0

    def folder(self, arm: str) -> Path:
        """The run folder of the teacher or of a student, or the place of the teacher's logits."""
        name = self.clip_list.name
        return self.config.out / HELD_OUT / arm / name if name else self.config.out / arm

    @property
    def manifest(self) -> Path:
        return self.folder("clips").with_suffix(".parquet")

    @property
    def logits(self) -> Path:
        return self.folder("logits") / f"{TEACHER}.h5"

    def run(self, clips: Path, labels_alone: bool) -> None:
        """Everything that is not done yet; ``clips`` is the store with the audio of all clips.

        Raises:
            ValueError: a command failed (it has said why).
            Stopped: on request; what was done is kept.
        """
        self.clip_list.write(self.manifest)
        self.make_teacher()
        run(
            *("teach", *self._restart, "--clips", clips, "--teacher", self.teacher_run, "--name", TEACHER),
            *("--out", self.logits.parent, "--workers", self.config.workers, "--on-bad-clip", self.config.on_bad_clip),
            *self._about_a_given_teacher,
        )
        if labels_alone:
            # Few labels are drawn again and again: both students take the same number of steps of the same size.
            again = len(self.clip_list.part.train) < self.clips_per_epoch
            self.train(LABELS_ALONE, *(("--sampler", "balanced") if again else ()))
        weight = ("--logits", self.logits, "--label-weight", self.config.label_weight)
        sharpened = ("--teacher-temperature", PROBE_TEMPERATURE) if self.config.teacher == "probe" else ()
        self.train(DISTILLED, *weight, *sharpened, *self._ratio)

    @property
    def clips_per_epoch(self) -> int:
        return max(1, self.clip_list.training_clips // self.config.batch_size) * self.config.batch_size

    @property
    def _ratio(self) -> tuple[object, ...]:
        """All clips are drawn equally often, however few of them have labels."""
        part = self.clip_list.part
        return ("--unlabelled-per-labelled", len(part.unlabelled) / len(part.train)) if len(part.unlabelled) else ()

    @property
    def _restart(self) -> tuple[str, ...]:
        return ("--restart",) if self.config.restart else ()

    @property
    def _about_a_given_teacher(self) -> tuple[object, ...]:
        config = self.config
        about = (
            ("--class-map", self.class_map),
            ("--teacher-class-names", config.teacher_class_names),
            ("--teacher-link", config.teacher_link),
        )
        return tuple(word for flag, value in about if value is not None for word in (flag, value))

    def make_teacher(self) -> None:
        """Fits the probe, or fine-tunes the pretrained network."""
        if self.config.teacher == "given":
            return
        how = (
            ("--probe-only",)
            if self.config.teacher == "probe"
            else ("--no-probe", "--epochs", self.config.teacher_epochs)
        )
        self._finetune(self.folder(TEACHER), *self.start.arguments, *how)

    @property
    def teacher_run(self) -> Path | str:
        if self.config.teacher == "given":
            return self.start.teacher
        folder = self.folder(TEACHER)
        return folder / "probe" if self.config.teacher == "probe" else folder

    def train(self, arm: str, *arguments: object) -> None:
        """Trains a student from scratch for ``steps`` steps."""
        config = self.config
        epochs = math.ceil(self.steps * config.batch_size / self.clips_per_epoch)
        seconds = () if config.clip_seconds is None else ("--clip-seconds", config.clip_seconds)
        self._finetune(
            self.folder(arm),
            *("--student", config.student, "--epochs", epochs, "--batch-size", config.batch_size),
            *("--clips-per-epoch", self.clips_per_epoch, "--learning-rate", config.learning_rate),
            *frontend_options(config.frontend, family_of(config.student).published_frontend()),
            *seconds,
            *AUGMENTATION,
            *("--seeds", config.seed, "--cache", config.out / "cache", *arguments),
        )

    def _finetune(self, folder: Path, *arguments: object) -> None:
        """``kd finetune`` on this division, with a report of its own and what all runs share."""
        arguments = (*arguments, *(() if self.is_tested else ("--test-share", 0)), *self._restart)
        run(
            *("finetune", "--task", "manifest", "--data", self.manifest, "--allow-outside", "--out", folder),
            *("--workers", self.config.workers, "--on-bad-clip", self.config.on_bad_clip, *arguments),
        )


def frontend_options(frontend: LogMelConfig, default: LogMelConfig) -> tuple[object, ...]:
    """The command-line options that turn the default front end into this one."""
    options: list[object] = []
    for item in fields(frontend):
        value, flag = getattr(frontend, item.name), item.name.replace("_", "-")
        if value == getattr(default, item.name):
            continue
        options += [f"--{'' if value else 'no-'}{flag}"] if isinstance(value, bool) else [f"--{flag}", value]
    return tuple(options)
