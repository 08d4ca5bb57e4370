import pytest
import torch
from kd.objectives.losses import distillation_targets, tagging_loss
from torch import Tensor, nn

from kd.objectives.distillation import DistillationConfig, DistillationObjective
from students.frontend import LogMel, LogMelConfig
from students.interface import StudentOutput


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
    return DistillationObjective(LogMel(LogMelConfig()), DistillationConfig(**options))


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
            loss += share * 0.3 * tagging_loss(one, data["targets"][clip : clip + 1])
            loss += share * 0.7 * tagging_loss(one, teacher)
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
