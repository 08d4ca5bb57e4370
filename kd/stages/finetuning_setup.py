"""Everything that the runs of one fine-tuning command share: clips, starting point, teachers, devices."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.system.messages import listed
from audio_datasets.system.stop_signals import StopSignals
from audio_datasets.tasks.label_space import LabelSpace
from audio_datasets.tasks.task import Task, TaskClips
from audio_datasets.tasks.unlabelled import AnySounds
from kd.data.sampling import EpochBatches
from kd.data.splits import Partition
from kd.data.unlabelled import WithUnlabelled
from kd.data.windows import Window
from kd.evaluation.predict import ClipEvaluator, Tagger
from kd.objectives.label_losses import loss_space
from kd.run_folder.start import SKIPPED_CLIPS_FILE
from kd.stages.finetuning_config import FinetuneConfig
from kd.stages.teachers import training_rows
from kd.training.transfer import Start, starting_student
from students.interface import Student
from teacher_logits.stores.ensemble import LogitEnsemble


@dataclass
class FinetuneSetup:
    """Everything that is the same for each seed and fold."""

    config: FinetuneConfig
    task: Task
    clips: TaskClips
    start: Start
    """The starting point of the students."""
    teachers: LogitEnsemble | None
    accelerator: Accelerator
    signals: StopSignals
    unlabelled: Sequence[AnySounds] = ()
    """Additional audio to train on."""

    def __post_init__(self) -> None:
        config = self.config
        self.skipped = ClipList(config.out / SKIPPED_CLIPS_FILE)
        self.label_space: LabelSpace = self.clips.label_space
        self.window = Window(config.frontend.sample_rate_hz, config.clip_seconds, config.short_clips)
        self.impulse_responses = config.impulse_responses()
        self._students: dict[int, Student] = {}
        self.own_teacher: str | None = None
        """Fingerprint of the teacher that the objective loads itself, which each fold does anew."""

    def starting_student(self, seed: int) -> Student:
        """The initial student, the same for every fold."""
        if seed not in self._students:
            prior = None
            if not loss_space(self.label_space, self.config.loss).exclusive:
                # 1 / classes: with the class frequencies of its clips, each fold would start differently.
                classes = len(self.clips.class_names)
                prior = np.full(classes, 1.0 / max(2, classes), dtype=np.float32)
            self._students[seed] = starting_student(
                self.start, self.clips.class_names, self.config.frontend, seed=seed, prior=prior
            )
        return copy.deepcopy(self._students[seed])

    @property
    def training_clips(self) -> TaskClips | WithUnlabelled:
        """The clips followed by the additional audio."""
        return WithUnlabelled(self.clips, self.unlabelled) if self.unlabelled else self.clips

    def batches(self, rows: np.ndarray, seed: int) -> EpochBatches:
        """The training batches of an epoch, all of the same size."""
        config = self.config
        return EpochBatches(
            self.training_clips,
            rows,
            config.sampling,
            batch_size=config.loop.batch_size,
            batches_per_step=self.accelerator.num_processes * config.loop.gradient_accumulation_steps,
            seed=seed,
            pairs=config.augment.in_pairs,
            equal=True,
        )

    def training_rows(self, part: Partition, say: Callable[[str], None] = lambda text: None) -> np.ndarray:
        """The rows of ``training_clips`` to train on: with labels, with teacher logits, or both."""
        where = "" if part.fold is None else f"fold {part.fold}: "
        return training_rows(self.config, self.teachers, self.training_clips, self.listed_rows(part), say, where)

    def listed_rows(self, part: Partition) -> np.ndarray:
        """All rows of ``training_clips`` available for training, whether or not they have labels or teacher logits."""
        further = np.arange(len(self.clips), len(self.training_clips))
        return np.sort(np.concatenate([part.train, part.unlabelled, further]))

    def evaluator(self, rows: np.ndarray, description: str) -> ClipEvaluator:
        return ClipEvaluator(
            self.accelerator,
            self.clips,
            rows,
            self.window,
            batch_size=self.config.eval_batch_size,
            workers=self.config.workers,
            description=description,
            on_bad_clip=self.config.on_bad_clip,
        )

    def predict(self, evaluator: ClipEvaluator, tagger: Tagger, before_batch: Callable[[], None]) -> np.ndarray:
        """A tagger's output for each clip. Skipped clips are listed."""
        values = evaluator.predict(tagger, before_batch)
        if self.accelerator.is_main_process:
            for clip_id, reason in evaluator.skipped.items():
                self.skipped.add(clip_id, reason)
        return values

    def name_absent_classes(self, part: Partition) -> None:
        where = "" if part.fold is None else f"fold {part.fold}: "
        for rows, what in ((part.train, "training"), *(((part.test, "test"),) if len(part.test) else ())):
            counts = (self.clips.targets(rows) * self.clips.mask(rows)).sum(axis=0)
            absent = [name for name, count in zip(self.clips.class_names, counts, strict=True) if not count]
            if absent:
                self.accelerator.print(f"{where}{len(absent)} classes have no {what} clips: {listed(absent)}")

    def set_epoch(self, student: Student, epoch: int) -> None:
        """Tells a student that trains from scratch its epoch. In a trained student, annealing has ended already."""
        if not self.config.is_pretrained:
            student.start_epoch(epoch)
