import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audio_datasets.tasks.label_space import LabelSpace
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective, distillation_targets, weighted_loss
from kd.objectives.label_losses import bce_per_clip
from kd.objectives.settings import DistillationConfig
from students.frontend import LogMel, LogMelConfig
from students.interface import StudentOutput
from teacher_logits.stores.links import TeacherLink


class MeanStudent(nn.Module):
    """Logits are a linear map of the mean log-mel: enough to see what goes in."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(128, 3)

    def forward(self, mel: Tensor) -> StudentOutput:
        self.seen = mel.detach()
        mean = mel.mean(dim=(1, 3))
        return StudentOutput(self.linear(mean), mean)


def batch(has_teacher: tuple[bool, ...] = (True, True, True, True)) -> dict[str, Tensor]:
    torch.manual_seed(1)
    return {
        "waveform": 0.1 * torch.randn(4, 8000),
        "targets": (torch.rand(4, 3) < 0.5).float(),
        "sample_key": torch.arange(4),
        "teacher_logits": 3 * torch.randn(4, 3),
        "has_teacher": torch.tensor(has_teacher),
        "mix_weight": torch.tensor([0.9, 0.6, 0.7, 1.0]),
    }


def objective(**options: float) -> DistillationObjective:
    space = LabelSpace.single(("a", "b", "c"), exclusive=False)
    distillation = DistillationConfig(**options)
    return DistillationObjective(ObjectiveSettings(LogMelConfig(), space, embedding_dim=128, distillation=distillation))


def test_mixup_equals_mixing_the_losses_of_the_two_clips() -> None:
    """BCE is linear in its target: λ·L(y) + (1 − λ)·L(partner's y), taken clip by clip."""
    student, data = MeanStudent(), batch()
    losses = objective(label_weight=0.3, teacher_temperature=2.0)(student, data)
    logits, expected = student(student.seen).logits, []
    for index in range(4):
        mix, partner, one = data["mix_weight"][index], index ^ 1, logits[index : index + 1]
        loss = 0.0
        for share, clip in ((mix, index), (1 - mix, partner)):
            teacher = distillation_targets(data["teacher_logits"][clip : clip + 1], 2.0)
            loss += share * 0.3 * bce_per_clip(one, data["targets"][clip : clip + 1])
            loss += share * 0.7 * bce_per_clip(one, teacher)
        expected.append(loss)
    torch.testing.assert_close(losses["loss"], torch.cat(expected).mean())


def test_mixup_mixes_log_mels() -> None:
    student, data = MeanStudent(), batch()
    objective()(student, data)
    mel = LogMel(LogMelConfig())(data["waveform"])
    torch.testing.assert_close(student.seen[0], 0.9 * mel[0] + 0.1 * mel[1])
    torch.testing.assert_close(student.seen[3], mel[3])


def test_a_clip_without_logits_is_trained_on_labels_also_where_it_is_the_partner() -> None:
    student = MeanStudent()
    data = batch(has_teacher=(True, False, True, True))
    reference = objective()(student, data)["loss"]
    for clip in (0, 1):  # neither the clip without logits nor its partner may feel the teacher
        data["teacher_logits"][clip] = 1000.0
    torch.testing.assert_close(objective()(student, data)["loss"], reference)
    data["teacher_logits"][2] += 1.0
    assert objective()(student, data)["loss"] != reference


def test_label_weight_one_is_training_without_a_teacher() -> None:
    student, data = MeanStudent(), batch()
    with_logits = objective(label_weight=1.0)(student, data)
    del data["teacher_logits"], data["has_teacher"]
    assert with_logits.keys() == {"loss"}
    torch.testing.assert_close(with_logits["loss"], objective(label_weight=1.0)(student, data)["loss"])


@pytest.mark.parametrize("wrong", [{"label_weight": -0.1}, {"label_weight": 1.1}, {"teacher_temperature": 0.0}])
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DistillationConfig(**wrong)


# -- The losses of single clips ------------------------------------------------------------------------------------------


def plain_bce(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The formula written out, in double precision."""
    return -(target * probability.log() + (1 - target) * (1 - probability).log()).mean(dim=1)


def test_the_loss_is_the_papers_equation() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    labels = (torch.rand(5, 7) < 0.3).double()
    expected = 0.1 * plain_bce(student.sigmoid(), labels) + 0.9 * plain_bce(student.sigmoid(), (teacher / 2).sigmoid())
    found = weighted_loss(
        bce_per_clip(student, labels),
        bce_per_clip(student, distillation_targets(teacher, temperature=2.0)),
        torch.ones(5, dtype=torch.bool),
        label_weight=0.1,
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


def test_a_clip_without_teacher_has_the_whole_label_loss_and_no_gradient_from_the_teacher() -> None:
    label_loss = torch.tensor([1.0, 2.0])
    distillation_loss = torch.tensor([10.0, 20.0], requires_grad=True)
    found = weighted_loss(label_loss, distillation_loss, torch.tensor([True, False]), label_weight=0.25)
    assert found.tolist() == [0.25 * 1.0 + 0.75 * 10.0, 2.0]
    found.sum().backward()
    assert distillation_loss.grad.tolist() == [0.75, 0.0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_logits_give_a_finite_float32_loss(dtype: torch.dtype) -> None:
    logits = torch.tensor([[60.0, -60.0]], dtype=dtype)
    loss = bce_per_clip(logits, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(60.0)


@pytest.mark.parametrize("exclusive", [False, True])
def test_a_clip_without_labels_learns_from_its_teacher_at_full_weight(exclusive: bool) -> None:
    """Against the loss written clip by clip: λ · mean of the label losses of those that have labels, and the teachers'."""
    student, data = MeanStudent(), batch()
    del data["mix_weight"]
    data["targets"] = torch.eye(3)[[0, 1, 2, 0]]
    data["known"] = torch.tensor([True, False, False, True])[:, None].expand(4, 3)
    data["targets"][1:3] = float("nan")  # has no influence
    space = LabelSpace.single(("a", "b", "c"), exclusive)
    settings = ObjectiveSettings(LogMelConfig(), space, 128, distillation=DistillationConfig(label_weight=0.3))
    losses = DistillationObjective(settings)(student, data)
    logits = student(student.seen).logits
    with torch.no_grad():
        if exclusive:
            label = -logits.log_softmax(1)[[0, 3], [0, 0]]
            taught = -(data["teacher_logits"].softmax(1) * logits.log_softmax(1)).sum(1)
        else:
            label = bce_per_clip(logits[[0, 3]], data["targets"][[0, 3]])
            taught = bce_per_clip(logits, data["teacher_logits"].sigmoid())
    expected = 0.3 * label.mean() + (0.7 * taught[[0, 3]].sum() + taught[[1, 2]].sum()) / 4
    torch.testing.assert_close(losses["loss"].detach(), expected)
    torch.testing.assert_close(losses["label_loss"].detach(), label.mean())


def test_a_softmax_teacher_is_read_through_its_softmax() -> None:
    """In binary cross entropy as well; exclusive classes get the teacher's distribution from either link."""
    logits, softmax = torch.tensor([[6.0, 0.0, 1.0], [2.0, 2.5, -4.0]]), TeacherLink.whole("softmax", 3)
    odds = (logits / 2.0).exp()
    expected = odds / odds.sum(1, keepdim=True)
    torch.testing.assert_close(distillation_targets(logits, 2.0, None, softmax), expected)
    one = LabelSpace.single(("a", "b", "c"), exclusive=True)
    for link in (softmax, None):
        torch.testing.assert_close(distillation_targets(logits, 2.0, one, link), expected)
    assert distillation_targets(logits, 1.0).mean() > distillation_targets(logits, 1.0, None, softmax).mean()
    # A sigmoid teacher, given that exactly one class is there: p_c times all other 1 - p_j.
    p = torch.sigmoid(logits)
    alone = torch.stack([p[:, c] * torch.cat([1 - p[:, :c], 1 - p[:, c + 1 :]], 1).prod(1) for c in range(3)], 1)
    torch.testing.assert_close(distillation_targets(logits, 1.0, one), alone / alone.sum(1, keepdim=True))


def test_the_link_reaches_the_loss_and_the_dump() -> None:
    settings = replace(objective().settings, teacher_link=TeacherLink.whole("softmax", 3))
    assert ObjectiveSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings
    student, data = MeanStudent(), batch()
    del data["mix_weight"]
    losses = DistillationObjective(settings)(student, data)
    logits = student(student.seen).logits
    teacher = torch.softmax(data["teacher_logits"], 1)
    expected = -(teacher * F.logsigmoid(logits) + (1 - teacher) * F.logsigmoid(-logits)).mean()
    torch.testing.assert_close(losses["distillation_loss"], expected)
