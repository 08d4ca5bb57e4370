"""A network of ours as a teacher: a student of the catalog or a PaSST, from a run folder or from bare weights."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from students import create_student, load_weights
from students.frontend import LogMel, LogMelConfig
from students.layers.blocks import Student
from students.weights import StudentCard, load_student, read_card
from teacher_logits.teachers.base import DEFAULT_CLIP_SECONDS, Teacher
from teacher_logits.teachers.passt import catalog_of, create_passt, list_passts, load_passt_weights, passt_from_weights


class StudentTeacher(Teacher):
    """A student of the catalog, or a PaSST, with weights, in evaluation mode, as a teacher."""

    def __init__(
        self,
        name: str,
        class_names: Sequence[str],
        student: Student,
        frontend: LogMelConfig,
        clip_seconds: float = DEFAULT_CLIP_SECONDS,
    ) -> None:
        super().__init__(
            name,
            class_names,
            sample_rate_hz=frontend.sample_rate_hz,
            clip_seconds=clip_seconds,
            frontend=frontend.to_dict(),
            architecture=dataclasses.asdict(student.config),
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


def load_network(folder: str | Path) -> tuple[Student, StudentCard]:
    """The student or PaSST of a run folder, on the CPU in evaluation mode, and its card.

    Raises ValueError if the folder holds none, or if weights and card do not belong together.
    """
    return load_student(folder, catalog_of(read_card(folder).config.name))


def teacher_from_run(folder: Path) -> Teacher:
    network, card = load_network(folder)
    clip_seconds = card.provenance.get("clip_seconds", DEFAULT_CLIP_SECONDS)
    return StudentTeacher(folder.resolve().name, card.class_names, network, card.frontend, clip_seconds)


def teacher_from_weights(spec: str, class_names: Sequence[str] | None) -> Teacher:
    network_name, _, weights = spec.partition("@")
    if class_names is None:
        raise ValueError(f"the weights of teacher {spec!r} carry no class names; give them with --class-names FILE")
    clip_seconds = DEFAULT_CLIP_SECONDS
    if network_name == "passt" or network_name in list_passts():
        if network_name == "passt":
            network = passt_from_weights(weights)
        else:
            network = create_passt(network_name, len(class_names))
            load_passt_weights(network, weights)
        clip_seconds = network.options.clip_seconds
        if network.num_classes != len(class_names):
            raise ValueError(f"{weights} has {network.num_classes} classes; {len(class_names)} class names were given")
    else:
        network = create_student(network_name, len(class_names))
        load_weights(network, Path(weights))
    return StudentTeacher(Path(weights).stem, class_names, network, LogMelConfig(), clip_seconds)
