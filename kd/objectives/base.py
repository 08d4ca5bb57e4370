"""The interface of an objective: a module that computes losses from a student and a batch. This is all that the training loop
knows about a task.

Its parameters and buffers are optimised, averaged, synchronised and checkpointed together with the student's
(``kd.training.learner``). A new objective is a subclass of ``Objective`` in its own file, inside or outside this package
(docs/add_an_objective.md).

Shapes: B clips, S samples, C classes, M mel bands, T frames.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, NamedTuple

from torch import Tensor, nn

from audio_datasets.audio.augment import both_of_pair, mix_with_partner
from audio_datasets.tasks.label_space import LabelSpace
from kd.data.spectrograms import freq_mixstyle
from kd.objectives.settings import DistillationConfig, LossConfig
from students.frontend import LogMel, LogMelConfig, mask_spectrogram, mask_stripes
from students.interface import StudentOutput
from teacher_logits.stores.links import TeacherLink

Batch = dict[str, Tensor]
"""A collated batch of ``kd.data.examples.TrainingExamples``: the first axis of each entry is B."""

CallStudent = Callable[[Tensor], StudentOutput]
"""mel (B, 1, M, T) -> logits (B, C) and embedding (B, E), float32, with gradients."""


@dataclass(frozen=True)
class ObjectiveSettings:
    """All settings of an objective. They can be written as JSON and read back."""

    frontend: LogMelConfig
    label_space: LabelSpace
    embedding_dim: int
    """Size of the student's embedding."""
    loss: LossConfig = field(default_factory=LossConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    class_weights: tuple[float, ...] | None = None
    """(C,), from ``label_losses.balanced_class_weights``; None for equal weights."""
    teacher_link: TeacherLink | None = None
    """What turns the batch's teacher logits into probabilities; None: a softmax in exclusive groups, otherwise a sigmoid."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the objective's own, by name."""

    def to_json(self) -> dict[str, Any]:
        return {
            "frontend": self.frontend.to_dict(),
            "label_space": self.label_space.to_json(),
            "embedding_dim": self.embedding_dim,
            "loss": asdict(self.loss),
            "distillation": asdict(self.distillation),
            "class_weights": None if self.class_weights is None else list(self.class_weights),
            "teacher_link": None if self.teacher_link is None else self.teacher_link.to_json(),
            "options": dict(self.options),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "ObjectiveSettings":
        """The reverse of ``to_json``. KeyError, TypeError or ValueError for other content."""
        weights, link = content["class_weights"], content.get("teacher_link")  # absent in dumps of older versions
        label_space = LabelSpace.from_json(content["label_space"])
        return cls(
            frontend=LogMelConfig.from_dict(content["frontend"]),
            label_space=label_space,
            embedding_dim=content["embedding_dim"],
            loss=LossConfig(**content["loss"]),
            distillation=DistillationConfig(**content["distillation"]),
            class_weights=None if weights is None else tuple(map(float, weights)),
            teacher_link=None if link is None else TeacherLink.from_json(link, len(label_space.class_names)),
            options=content["options"],
        )


class Inputs(NamedTuple):
    """A batch as the student gets it."""

    mel: Tensor
    """(B, 1, M, T)"""
    targets: Tensor
    """(B, C), mixed"""
    known: Tensor | None
    """(B, C) bool: which targets are known; None for all"""


class Objective(nn.Module):
    """Computes a dict of scalar losses from a student and a batch. ``"loss"`` is minimised; the others are only logged."""

    Options: ClassVar[type | None] = None
    """A frozen dataclass of the options allowed in ``settings.options``; None if there are none."""
    learns_from_bare_audio: ClassVar[bool] = False
    """Whether it learns from clips that have neither labels nor stored logits, as with a teacher that runs beside the student."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__()
        self.settings = settings
        self.frontend = LogMel(
            settings.frontend
        )  # its buffers are computed from settings, so they are not in the state dict

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError

    @property
    def teacher_fingerprint(self) -> str | None:
        """Digest of the weights of a teacher that this objective has loaded itself; None without one."""
        return None

    def start_from(self, student: nn.Module) -> None:
        """Told the student once, before training and before a checkpoint is loaded. Most objectives need only ``forward``."""

    def follow(self, student: nn.Module) -> None:
        """Told the student before each batch of training."""

    def inputs(self, batch: Batch, frontend: LogMel | None = None) -> Inputs:
        """The batch's spectrograms with all augmentation applied, and their targets; ``frontend``: another one than the student's.

        Batch: ``waveform`` (B, S), ``targets`` (B, C); optionally ``known`` (B, C) bool, ``band_edges`` (B, 2) in Hz,
        ``stripes`` (B, 4), ``style_weight`` (B,), ``mix_weight`` (B,), ``time_masks`` and ``frequency_masks`` (B, n, 2).
        A label of a mixed clip is known only if it is known for both parts.
        """
        mel = (frontend or self.frontend)(batch["waveform"], batch.get("band_edges"))
        targets, known = batch["targets"], batch.get("known")
        if "stripes" in batch:
            mel = mask_stripes(mel, batch["stripes"])
        if "style_weight" in batch:
            mel = freq_mixstyle(mel, batch["style_weight"])
        if "mix_weight" in batch:
            weight = batch["mix_weight"]
            mel, targets = mix_with_partner(mel, weight), mix_with_partner(targets, weight)
            known = None if known is None else both_of_pair(known)
        mel = mask_spectrogram(mel, batch.get("time_masks"), batch.get("frequency_masks"))
        return Inputs(mel, targets, known)
