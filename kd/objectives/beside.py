"""Teachers that run beside the student, on the very batch that it is shown: online distillation of logits or of embeddings.

Nothing is stored, any augmentation is allowed, and every step costs a forward pass of the teacher: for those with a GPU.

Shapes: B clips, C classes, E size of an embedding.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_datasets.stores.class_lists import check_same_classes
from kd.objectives.base import Batch, CallStudent, Objective, ObjectiveSettings
from kd.objectives.distillation import DistillationObjective, distillation_targets
from students import load_student
from students.frontend import LogMel, LogMelConfig
from students.interface import StudentOutput
from students.weights import named_student_from_weights, weights_fingerprint
from teacher_logits.stores.links import LinkKind, TeacherLink, link_of_classes
from teacher_logits.teachers.network import link_of_card


class TeacherBeside:
    """A network with its front end, in evaluation mode. No part of the objective's state: it is neither trained nor saved, and
    copies of the objective share it."""

    def __init__(self, spec: str, frontend: LogMelConfig) -> None:
        """``spec``: a run folder, or NAME@WEIGHTS; ``frontend``: the student's.

        Raises:
            ValueError: no such teacher, or one that hears another sample rate than the student.
        """
        self.spec = spec
        self.link: TeacherLink | None = None
        self.class_names: tuple[str, ...] | None = None
        own = LogMelConfig()
        if Path(spec).is_dir():
            self.network = load_student(spec)
            card = self.network.card
            own, self.class_names, self.link = card.frontend, tuple(card.class_names), link_of_card(card)
        elif "@" in spec:
            name, _, weights = spec.partition("@")
            self.network = named_student_from_weights(name, weights)
            own = type(self.network).published_frontend()
        else:
            raise ValueError(
                f"a teacher beside the student is a run folder or NAME@WEIGHTS, such as mn10@mn10.pt; found {spec!r}"
            )
        if own.sample_rate_hz != frontend.sample_rate_hz:
            raise ValueError(f"{spec} hears {own.sample_rate_hz} Hz, the student {frontend.sample_rate_hz} Hz")
        self.fingerprint = weights_fingerprint(self.network)
        self.network.eval().requires_grad_(False)
        self.log_mel = LogMel(own)

    def __deepcopy__(self, memo: dict[int, Any]) -> "TeacherBeside":
        return self

    @torch.no_grad()
    def hear(self, objective: Objective, batch: Batch) -> StudentOutput:
        """What the teacher says of a batch with all its augmentation, through its own front end; float32."""
        device = batch["waveform"].device
        self.network.to(device)
        output = self.network(objective.inputs(batch, self.log_mel.to(device)).mel)
        return StudentOutput(output.logits.float(), output.embedding.float())


@dataclass(frozen=True)
class OnlineOptions:
    teacher: str = ""
    """Run folder, or NAME@WEIGHTS; it has the classes of the clips."""
    link: LinkKind | None = None
    """Activation that the teacher was trained with, if it does not tell: sigmoid or softmax."""

    def __post_init__(self) -> None:
        if not self.teacher or not isinstance(self.teacher, str):
            raise ValueError("name the teacher: --objective-options teacher=RUN_OR_NAME@WEIGHTS")
        if self.link not in (None, "sigmoid", "softmax"):
            raise ValueError(f"link must be sigmoid or softmax; found {self.link!r}")


class OnlineObjective(DistillationObjective):
    """``DistillationObjective`` whose teacher hears the student's own augmented batch; mixed clips as they are mixed."""

    Options = OnlineOptions
    learns_from_bare_audio = True

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        options, names = OnlineOptions(**settings.options), settings.label_space.class_names
        self.teacher = TeacherBeside(options.teacher, settings.frontend)
        own = self.teacher.class_names
        if own is not None:
            check_same_classes(names, own, "the clips", options.teacher)
        elif self.teacher.network.num_classes != len(names):
            raise ValueError(
                f"{options.teacher} has {self.teacher.network.num_classes} classes, the clips have {len(names)}"
            )
        told = options.link or (None if self.teacher.link else link_of_classes(names))
        self.link = TeacherLink.whole(told, len(names)) if told else self.teacher.link
        if self.link is None and not (len(settings.label_space.groups) == 1 and self.label_loss.label_space.exclusive):
            raise ValueError(
                f"{options.teacher} does not tell whether it was trained with a sigmoid or a softmax; add link=sigmoid or "
                "link=softmax to --objective-options"
            )

    @property
    def teacher_fingerprint(self) -> str:
        return self.teacher.fingerprint

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        refuse_stored_logits(batch, "online")
        said = self.teacher.hear(self, batch).logits
        everywhere = torch.ones(len(said), dtype=torch.bool, device=said.device)
        return super().forward(student, {**batch, "teacher_logits": said, "has_teacher": everywhere})

    def teacher_targets(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The teacher has heard the mixture itself, so nothing is left to mix."""
        space, temperature = self.label_loss.label_space, self.distillation.teacher_temperature
        return distillation_targets(batch["teacher_logits"], temperature, space, self.link), batch["has_teacher"]


@dataclass(frozen=True)
class EmbeddingOptions:
    teacher: str = ""
    """Run folder, or NAME@WEIGHTS; its classes do not matter."""
    weight: float = 1.0
    """Of the embedding loss, beside the others."""

    def __post_init__(self) -> None:
        if not self.teacher or not isinstance(self.teacher, str):
            raise ValueError("name the teacher: --objective-options teacher=RUN_OR_NAME@WEIGHTS")
        if not self.weight > 0:
            raise ValueError(f"weight must be positive; found {self.weight}")


class EmbeddingObjective(DistillationObjective):
    """``DistillationObjective`` and weight · (1 − cosine of a learned linear projection of the student's embedding and the teacher's).

    Romero et al., "FitNets", 2015, on the last embedding. Stored logits are optional.
    """

    Options = EmbeddingOptions
    learns_from_bare_audio = True

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.options = EmbeddingOptions(**settings.options)
        self.teacher = TeacherBeside(self.options.teacher, settings.frontend)
        self.projection = nn.Linear(settings.embedding_dim, self.teacher.network.embedding_dim)

    @property
    def teacher_fingerprint(self) -> str:
        return self.teacher.fingerprint

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        outputs: list[StudentOutput] = []

        def call(mel: Tensor) -> StudentOutput:  # the student runs only once
            outputs.append(student(mel))
            return outputs[0]

        losses = super().forward(call, batch)
        wanted = self.teacher.hear(self, batch).embedding
        loss = (1.0 - F.cosine_similarity(self.projection(outputs[0].embedding), wanted, dim=1)).mean()
        return {**losses, "embedding_loss": loss, "loss": losses["loss"] + self.options.weight * loss}


def refuse_stored_logits(batch: Batch, objective: str) -> None:
    """ValueError for stored logits beside a teacher that runs along."""
    if "teacher_logits" in batch:
        raise ValueError(f"--objective {objective} has a teacher of its own; leave out --logits")
