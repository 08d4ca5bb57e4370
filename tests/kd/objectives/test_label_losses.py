"""The losses of labels, each against a formula written another way."""

import pytest
import torch
import torch.nn.functional as F

from audio_datasets.tasks.label_space import LabelSpace
from kd.data.spectrograms import freq_mixstyle
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective
from kd.objectives.label_losses import balanced_class_weights, bce_per_clip, cross_entropy_per_clip
from kd.objectives.settings import DistillationConfig, LossConfig
from kd.training.learner import Learner
from students import create_student
from students.frontend import LogMel, LogMelConfig, mask_spectrogram


def draws(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LOGITS = draws(6, 4)
ONE_HOT = F.one_hot(torch.tensor([0, 1, 2, 3, 1, 1]), 4).float()


def test_cross_entropy_is_torchs() -> None:
    classes = ONE_HOT.argmax(1)
    weights = torch.tensor([1.0, 0.2, 3.0, 0.5])
    torch.testing.assert_close(cross_entropy_per_clip(LOGITS, ONE_HOT).mean(), F.cross_entropy(LOGITS, classes))
    torch.testing.assert_close(
        cross_entropy_per_clip(LOGITS, ONE_HOT, label_smoothing=0.1).mean(),
        F.cross_entropy(LOGITS, classes, label_smoothing=0.1),
    )
    torch.testing.assert_close(
        cross_entropy_per_clip(LOGITS, ONE_HOT, class_weights=weights).mean(),
        F.cross_entropy(LOGITS, classes, weight=weights),
    )
    mixed = 0.7 * ONE_HOT + 0.3 * ONE_HOT.flip(0)
    torch.testing.assert_close(cross_entropy_per_clip(LOGITS, mixed).mean(), F.cross_entropy(LOGITS, mixed))


def test_masked_bce_is_the_mean_over_what_is_known() -> None:
    known = torch.rand(6, 4, generator=torch.Generator().manual_seed(1)) < 0.5
    expected = F.binary_cross_entropy_with_logits(LOGITS[known], ONE_HOT[known])
    torch.testing.assert_close(bce_per_clip(LOGITS, ONE_HOT, known).mean(), expected)
    assert bce_per_clip(LOGITS, ONE_HOT, torch.zeros(6, 4, dtype=torch.bool)).mean() == 0.0


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    return {
        "waveform": 0.1 * draws(4, 6400),
        "targets": ONE_HOT[:4, :3].contiguous(),
        "sample_key": torch.arange(4),
        "mix_weight": torch.tensor([0.8, 0.8, 1.0, 0.6]),
        **more,
    }


def objective(loss: str, **distillation: float) -> DistillationObjective:
    space = LabelSpace.single(("a", "b", "c"), exclusive=loss == "cross-entropy")
    settings = {"loss": LossConfig(loss=loss), "distillation": DistillationConfig(**distillation)}
    return DistillationObjective(ObjectiveSettings(LogMelConfig(), space, embedding_dim=1, **settings))


@pytest.fixture(scope="module")
def student() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return create_student("mn01", 3).eval()


@pytest.mark.parametrize("wrong", [1.0, 7.0, float("nan")])
def test_an_unlabelled_target_has_no_influence(student: torch.nn.Module, wrong: float) -> None:
    """Neither on the loss nor on any gradient, not even through mixup."""
    bce = objective("bce")
    known = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1]], dtype=torch.bool)

    def result(targets: torch.Tensor) -> tuple[float, torch.Tensor]:
        student.zero_grad()
        loss = bce(student, batch(targets=targets, known=known))["loss"]
        loss.backward()
        return loss.item(), student.classifier[-1].weight.grad.clone()

    plain = batch()["targets"]
    changed = torch.where(known, plain, wrong)
    first, second = result(plain), result(changed)
    assert first[0] == second[0] > 0
    assert torch.equal(first[1], second[1])
    known_changed = plain.clone()
    known_changed[0, 0] = 1 - known_changed[0, 0]
    assert not torch.equal(result(known_changed)[1], first[1])  # a fresh student's loss is ln 2, whatever the labels


def test_a_mixed_clip_has_a_label_only_where_both_parts_do(student: torch.nn.Module) -> None:
    known = torch.ones(4, 3, dtype=torch.bool)
    known[0] = False  # clips 0 and 1 are mixed with each other
    found = objective("bce")(student, batch(known=known))["loss"]
    both = known.clone()
    both[1] = False
    torch.testing.assert_close(objective("bce")(student, batch(known=both))["loss"], found)


@pytest.mark.parametrize("loss", ["bce", "cross-entropy"])
def test_teachers_share_the_loss_with_the_labels(student: torch.nn.Module, loss: str) -> None:
    teacher_logits = draws(4, 3, seed=3)
    teacher = torch.softmax(teacher_logits, 1) if loss == "cross-entropy" else torch.sigmoid(teacher_logits)
    content = batch(teacher_logits=teacher_logits, has_teacher=torch.tensor([True, True, False, True]))
    del content["mix_weight"]
    losses = objective(loss, label_weight=0.25)(student, content)
    logits = student(LogMel()(content["waveform"])).logits
    expected = []
    for index in range(4):
        if loss == "bce":
            label = F.binary_cross_entropy_with_logits(logits[index], content["targets"][index])
            taught = F.binary_cross_entropy_with_logits(logits[index], teacher[index])
        else:
            label = F.cross_entropy(logits[index], content["targets"][index])
            taught = F.cross_entropy(logits[index], teacher[index])
        expected.append(label if index == 2 else 0.25 * label + 0.75 * taught)
    if loss == "cross-entropy":
        # The fourth row of ONE_HOT has its class outside the three: a label of no class.
        expected[3] = 0.75 * F.cross_entropy(logits[3], teacher[3])
        share = torch.tensor([0.25, 0.25, 1.0, 0.25])
        label_part = -(content["targets"] * F.log_softmax(logits, 1)).sum(1) * share
        rest = 0.75 * torch.stack([F.cross_entropy(logits[i], teacher[i]) for i in (0, 1, 3)]).sum() / 4
        torch.testing.assert_close(losses["loss"], label_part.sum() / 4 + rest)
    else:
        torch.testing.assert_close(losses["loss"], torch.stack(expected).mean())


def test_frozen_modules_stay_in_evaluation_mode(student: torch.nn.Module) -> None:
    learner = Learner(student, objective("bce"), frozen=[student.features]).train()
    before = student.features[0][1].running_mean.clone()
    learner(batch())
    assert torch.equal(student.features[0][1].running_mean, before)
    assert student.classifier.training
    student.eval()


def test_balanced_class_weights() -> None:
    positives, negatives = torch.tensor([10, 30, 0]), torch.tensor([30, 10, 40])
    torch.testing.assert_close(balanced_class_weights(True, positives, negatives), torch.tensor([2.0, 2 / 3, 1.0]))
    torch.testing.assert_close(balanced_class_weights(False, positives, negatives), torch.tensor([3.0, 1 / 3, 1.0]))
    assert balanced_class_weights(False, torch.tensor([1]), torch.tensor([10_000])) == 100.0


def test_freq_mixstyle_changes_statistics_and_nothing_else() -> None:
    mel = draws(4, 1, 8, 50) * torch.linspace(0.5, 2.0, 4).view(4, 1, 1, 1) + draws(4, 1, 8, 1, seed=2)
    torch.testing.assert_close(freq_mixstyle(mel, torch.ones(4)), mel)
    mixed = freq_mixstyle(mel, torch.zeros(4))
    for clip, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
        torch.testing.assert_close(mixed[clip].mean(2), mel[partner].mean(2))
        torch.testing.assert_close(mixed[clip].std(2), mel[partner].std(2))
        shape = (mixed[clip] - mixed[clip].mean(2, keepdim=True)) / mixed[clip].std(2, keepdim=True)
        torch.testing.assert_close(
            shape, (mel[clip] - mel[clip].mean(2, keepdim=True)) / mel[clip].std(2, keepdim=True)
        )


def test_masks_hide_ranges() -> None:
    mel = draws(2, 1, 10, 20) + 5.0
    time = torch.tensor([[[0.5, 0.75]], [[0.0, 0.0]]])
    masked = mask_spectrogram(mel, time, None)
    assert torch.equal(masked[1], mel[1])
    torch.testing.assert_close(masked[0, :, :, 10:15], mel[0].mean().expand(1, 10, 5))
    assert torch.equal(masked[0, :, :, :10], mel[0, :, :, :10])
    both = mask_spectrogram(mel, None, torch.tensor([[[0.0, 0.1], [0.9, 1.0]]] * 2))
    changed = (both != mel).any(dim=3)[:, 0]
    assert changed.tolist() == [[True, *[False] * 8, True]] * 2


def test_wrong_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        LossConfig(label_smoothing=1.0)
