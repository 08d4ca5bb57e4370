"""Students, including PaSST, as teachers: from a run folder or from bare weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from students import create_student, list_students, load_weights
from students.card import load_student
from students.catalog import list_families
from students.frontend import LogMel, LogMelConfig
from students.interface import Student, StudentCard
from students.weights import OtherClasses, student_from_weights
from teacher_logits.stores.links import TeacherLink
from teacher_logits.teachers.base import DEFAULT_CLIP_SECONDS, Teacher


class StudentTeacher(Teacher):
    """A trained student in evaluation mode, as a teacher."""

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        student: Student,
        frontend: LogMelConfig,
        clip_seconds: float = DEFAULT_CLIP_SECONDS,
        short_clips: str = "pad",
        link: TeacherLink | None = None,
    ) -> None:
        super().__init__(
            name,
            class_names,
            sample_rate_hz=frontend.sample_rate_hz,
            clip_seconds=clip_seconds,
            short_clips=short_clips,
            frontend=frontend.to_dict(),
            architecture=dataclasses.asdict(student.config),
            link=link,
        )
        self.log_mel = LogMel(frontend)
        self.student = student
        self.eval()

    def forward(self, waveform: Tensor) -> Tensor:
        """(batch, samples) -> (batch, classes)"""
        return self.logits_of_mel(self.log_mel(waveform))

    def logits_of_mel(self, mel: Tensor) -> Tensor:
        """(batch, 1, bands, frames) -> (batch, classes)"""
        return self.student(mel).logits


def teacher_from_run(folder: Path) -> Teacher:
    """The student in a run folder. Raises ValueError if there is none, or if weights and card do not belong together."""
    student = load_student(folder)
    card = student.card
    clip_seconds = card.provenance.get("clip_seconds", DEFAULT_CLIP_SECONDS)
    short_clips, link = card.provenance.get("short_clips", "pad"), link_of_card(card)
    name = folder.resolve().name
    return StudentTeacher(name, card.class_names, student, card.frontend, clip_seconds, short_clips, link)


def link_of_card(card: StudentCard) -> TeacherLink | None:
    """The link that a student was trained with; None if its card does not tell, as older cards of single-label tasks do not.

    Raises ValueError for a card whose link is damaged.
    """
    content = card.provenance.get("link")
    if content is None:
        config = card.provenance.get("config")
        loss = config.get("loss") if isinstance(config, dict) else None
        content = "sigmoid" if isinstance(loss, dict) and loss.get("loss") == "bce" else None
    return None if content is None else TeacherLink.from_json(content, len(card.class_names))


def other_classes(weights: str, in_file: int, given: int) -> str:
    """What to do about weights of another number of classes than the clips have."""
    return (
        f"{weights} has {in_file} classes, but the class list has {given}. Give the class list of the weights with "
        "--teacher-class-names FILE (kd evaluate: --tagger-class-names FILE), and map its classes to those of the clips with "
        "--class-map FILE. Or fine-tune the weights on the clips' classes first: kd finetune --weights"
    )


def teacher_from_weights(spec: str, class_names: Sequence[str] | None) -> Teacher:
    """``NAME@WEIGHTS``: a student with weights from a file; or FAMILY@WEIGHTS, with the size inferred from the weights."""
    student_name, _, weights = spec.partition("@")
    if class_names is None:
        raise ValueError(f"the weights of teacher {spec!r} have no class names; give them with --class-names FILE")
    if student_name in list_families() and student_name not in list_students():
        student = student_from_weights(student_name, weights)
        if student.num_classes != len(class_names):
            raise ValueError(other_classes(weights, student.num_classes, len(class_names)))
    else:
        student = create_student(student_name, len(class_names))
        try:
            load_weights(student, weights)
        except OtherClasses as error:
            raise ValueError(other_classes(weights, error.in_file, len(class_names))) from error
    clip_seconds = student.clip_seconds or DEFAULT_CLIP_SECONDS
    frontend = type(student).published_frontend()
    return StudentTeacher(Path(weights).stem, class_names, student, frontend, clip_seconds)
