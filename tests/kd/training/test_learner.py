"""What a run trains: precision of each part, frozen modules, and parameters of both student and objective."""

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from audio_datasets.tasks.label_space import LabelSpace
from kd.objectives.base import Batch, CallStudent, Objective, ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.training.learner import Learner
from students import create_student
from students.frontend import LogMelConfig
from students.interface import Student

CLASSES = 3
FRONTEND = LogMelConfig(n_mels=64, hop_samples=640)


class Projected(DistillationObjective):
    """Adds a term with weights and a running mean of its own, and notes the precision of what it computes with."""

    def __init__(self, settings: ObjectiveSettings) -> None:
        super().__init__(settings)
        self.projection = nn.Linear(settings.embedding_dim, CLASSES)
        self.register_buffer("mean_logit", torch.zeros(()))
        self.seen: dict[str, torch.dtype] = {}

    def forward(self, student: CallStudent, batch: Batch) -> dict[str, Tensor]:
        def noted(mel: Tensor) -> object:
            output = student(mel)
            projected = self.projection(output.embedding)
            self.seen |= {"mel": mel.dtype, "logits": output.logits.dtype, "embedding": output.embedding.dtype}
            self.seen |= {"projection": projected.dtype}
            self.extra = (projected - batch["teacher_logits"]).square().mean()
            if self.training:
                self.mean_logit.lerp_(output.logits.detach().mean(), 0.1)
            return output

        losses = super().forward(noted, batch)
        return {**losses, "loss": losses["loss"] + self.extra}


def built(kind: type[Objective] = Projected, **options: object) -> tuple[Student, Objective]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = create_student("mn01", CLASSES, n_mels=64)
        space = LabelSpace.single(("a", "b", "c"), exclusive=False)
        objective = kind(ObjectiveSettings(FRONTEND, space, embedding_dim=student.embedding_dim, **options))
    return student, objective


def batch(clips: int = 4) -> Batch:
    draws = torch.Generator().manual_seed(0)
    return {
        "waveform": 0.1 * torch.randn(clips, 12800, generator=draws),
        "targets": (torch.rand(clips, CLASSES, generator=draws) < 0.5).float(),
        "sample_key": torch.arange(clips),
        "teacher_logits": torch.randn(clips, CLASSES, generator=draws),
        "has_teacher": torch.ones(clips, dtype=torch.bool),
    }


@dataclass
class Precisions:
    """What each part of a learner computes in."""

    convolutions: set[torch.dtype]
    frontend: set[torch.dtype]
    label_loss: set[torch.dtype]


@pytest.fixture
def bf16() -> Iterator[Accelerator]:
    """Accelerate allows one precision in a process."""
    AcceleratorState._reset_state(True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(True)


def watched(learner: Learner) -> Precisions:
    found = Precisions(set(), set(), set())
    for layer in learner.student.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(lambda layer, inputs, output: found.convolutions.add(output.dtype))
    frontend, label_loss = learner.objective.frontend, learner.objective.label_loss
    frontend.register_forward_hook(lambda layer, inputs, output: found.frontend.add(output.dtype))
    label_loss.register_forward_hook(
        lambda layer, inputs, output: found.label_loss.update({inputs[0].dtype, output.dtype})
    )
    return found


FLOAT32 = {"mel", "logits", "embedding", "projection"}


def test_only_the_student_is_computed_in_bf16(bf16: Accelerator) -> None:
    student, objective = built()
    learner = Learner(student, objective)
    found = watched(learner)
    prepared = bf16.prepare(learner)
    losses = prepared.train()(batch())
    assert found == Precisions({torch.bfloat16}, {torch.float32}, {torch.float32})
    assert objective.seen == dict.fromkeys(FLOAT32, torch.float32)
    assert {value.dtype for value in losses.values()} == {torch.float32}
    bf16.backward(losses["loss"])
    assert {parameter.grad.dtype for parameter in learner.parameters()} == {torch.float32}
    # Close to the same in float32, and not the same.
    plain = Learner(*built())
    learner_loss = plain.train()(batch())["loss"]
    loss, expected = losses["loss"].item(), learner_loss.item()
    assert 0 < abs(loss - expected) < 0.05 * expected


def test_without_mixed_precision_everything_is_float32() -> None:
    learner = Learner(*built())
    found = watched(learner)
    losses = learner.train()(batch())
    assert found == Precisions({torch.float32}, {torch.float32}, {torch.float32})
    assert {value.dtype for value in losses.values()} == {torch.float32}


def test_the_front_end_and_the_losses_are_the_same_in_either_precision(bf16: Accelerator) -> None:
    """Bit for bit, given what the student said."""
    student, objective = built()
    outputs = {}
    student.register_forward_hook(lambda layer, inputs, output: outputs.update(mel=inputs[0], output=output))
    losses = bf16.prepare(Learner(student, objective)).eval()(batch())
    alone = objective(
        lambda mel: outputs["output"]._replace(
            **{name: getattr(outputs["output"], name).float() for name in ("logits", "embedding")}
        ),
        batch(),
    )
    assert torch.equal(outputs["mel"], objective.frontend(batch()["waveform"]))
    assert losses.keys() == alone.keys()
    assert all(torch.equal(losses[name], alone[name]) for name in losses)


def test_the_average_follows_student_and_objective_alike() -> None:
    """EMA of both modules' weights and buffers, against the formula."""
    learner = Learner(*built())
    average = ModelEmaV3(learner, decay=0.75)
    start = {name: value.clone() for name, value in learner.state_dict().items()}
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.1)
    learner.train()(batch())["loss"].backward()
    optimizer.step()
    average.update(learner, step=2)  # the first step's average is what it gave
    now = learner.state_dict()
    for name in ("objective.projection.weight", "objective.mean_logit", "student.classifier.5.weight"):
        assert not torch.equal(now[name], start[name]), name
        torch.testing.assert_close(average.module.state_dict()[name], 0.75 * start[name] + 0.25 * now[name])
    # Its copy is one of its own: the average is not the learner's, nor are its frozen modules.
    assert average.module.objective is not learner.objective


def test_frozen_modules_stay_in_evaluation_mode_also_in_the_average() -> None:
    student, objective = built()
    learner = Learner(student, objective, frozen=[student.features])
    average = ModelEmaV3(learner, decay=0.5)
    for module in (learner, average.module):
        module.train()
        assert not module.student.features.training
        assert not any(layer.training for layer in module.student.features.modules())
        assert module.student.classifier.training
        assert module.objective.training
    assert average.module._frozen[0] is average.module.student.features
    assert "_frozen" not in "".join(learner.state_dict())
    learner.eval()
    assert not learner.student.classifier.training


def test_dropout_is_drawn_from_the_batchs_keys() -> None:
    """The same keys give the same losses whatever torch's generator stands at; other keys give others."""
    student, objective = built(DistillationObjective)
    learner = Learner(student, objective).train()
    results = []
    for seed, keys in ((0, torch.arange(4)), (1, torch.arange(4)), (0, torch.arange(4) + 7)):
        torch.manual_seed(seed)
        results.append(learner({**batch(), "sample_key": keys})["loss"].item())
    assert results[0] == results[1] != results[2]
