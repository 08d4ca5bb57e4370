import pytest
import torch

from kd.objectives.losses import distillation_targets, tagging_loss, weighted_loss


def plain_bce(probability: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The formula written out, in double precision."""
    return -(target * probability.log() + (1 - target) * (1 - probability).log()).mean(dim=1)


def test_the_loss_is_the_papers_equation() -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 7, dtype=torch.float64), 3 * torch.randn(5, 7, dtype=torch.float64)
    labels = (torch.rand(5, 7) < 0.3).double()
    expected = 0.1 * plain_bce(student.sigmoid(), labels) + 0.9 * plain_bce(student.sigmoid(), (teacher / 2).sigmoid())
    found = weighted_loss(
        tagging_loss(student, labels),
        tagging_loss(student, distillation_targets(teacher, temperature=2.0)),
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
    loss = tagging_loss(logits, torch.tensor([[0.0, 1.0]]))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(60.0)
