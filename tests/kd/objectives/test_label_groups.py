"""The losses of label spaces with several groups, against formulas written with torch's own losses."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.objectives.base import ObjectiveSettings
from kd.objectives.distillation import DistillationObjective, distillation_targets
from kd.objectives.label_losses import LabelLoss, loss_space
from kd.objectives.settings import DistillationConfig, LossConfig
from students.frontend import LogMelConfig
from students.interface import StudentOutput

VERBS = LabelGroup("verb", ("cut", "wash", "open"), exclusive=True)
NOUNS = LabelGroup("noun", ("knife", "onion", "pan", "tap"), exclusive=True)
SOUNDS = LabelGroup("sound", ("click", "hiss", "hum"), exclusive=False)
TWO_EXCLUSIVE = LabelSpace((VERBS, NOUNS))
MIXED = LabelSpace((VERBS, SOUNDS))

CLIPS = 8


def draws(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


VERB = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])
NOUN = torch.tensor([3, 2, 1, 0, 0, 1, 2, 3])
SOUND = (draws(CLIPS, 3, seed=1) > 0).float()
VERBS_AND_NOUNS = torch.cat([F.one_hot(VERB, 3), F.one_hot(NOUN, 4)], dim=1).float()
VERBS_AND_SOUNDS = torch.cat([F.one_hot(VERB, 3).float(), SOUND], dim=1)


def test_two_exclusive_groups_are_the_mean_of_two_cross_entropies() -> None:
    logits = draws(CLIPS, 7)
    verb = F.cross_entropy(logits[:, :3], VERB, reduction="none")
    noun = F.cross_entropy(logits[:, 3:], NOUN, reduction="none")
    found = LabelLoss(TWO_EXCLUSIVE, LossConfig())(logits, VERBS_AND_NOUNS)
    torch.testing.assert_close(found, (verb + noun) / 2)
    smoothed = LabelLoss(TWO_EXCLUSIVE, LossConfig(label_smoothing=0.2))(logits, VERBS_AND_NOUNS)
    expected = [
        F.cross_entropy(logits[:, :3], VERB, reduction="none", label_smoothing=0.2),
        F.cross_entropy(logits[:, 3:], NOUN, reduction="none", label_smoothing=0.2),
    ]
    torch.testing.assert_close(smoothed, sum(expected) / 2)


def test_class_weights_of_two_exclusive_groups_with_and_without_smoothing() -> None:
    logits = draws(CLIPS, 7)
    weights = (0.5, 2.0, 1.0, 3.0, 0.1, 1.0, 0.7)
    verb_weights, noun_weights = torch.tensor(weights[:3]), torch.tensor(weights[3:])
    for smoothing in (0.0, 0.1):
        loss = LabelLoss(TWO_EXCLUSIVE, LossConfig(label_smoothing=smoothing), weights)
        found = loss(logits, VERBS_AND_NOUNS).mean()
        if smoothing:
            # torch weighs the smoothed share by each class's own weight; here a clip's weight is that of its label.
            verb = weighted_smooth(logits[:, :3], VERB, verb_weights, smoothing)
            noun = weighted_smooth(logits[:, 3:], NOUN, noun_weights, smoothing)
        else:
            verb = F.cross_entropy(logits[:, :3], VERB, verb_weights)
            noun = F.cross_entropy(logits[:, 3:], NOUN, noun_weights)
        torch.testing.assert_close(found, (verb + noun) / 2)


def weighted_smooth(logits: Tensor, classes: Tensor, weights: Tensor, smoothing: float) -> Tensor:
    """Mean of each clip's smoothed cross entropy, weighted by its class, one clip after the other."""
    total, summed = torch.tensor(0.0), torch.tensor(0.0)
    for row, label in zip(logits, classes.tolist(), strict=True):
        total = total + weights[label] * F.cross_entropy(row, torch.tensor(label), label_smoothing=smoothing)
        summed = summed + weights[label]
    return total / summed


def test_one_exclusive_group_and_one_that_is_not() -> None:
    logits = draws(CLIPS, 6)
    verb = F.cross_entropy(logits[:, :3], VERB, reduction="none")
    sound = F.binary_cross_entropy_with_logits(logits[:, 3:], SOUND, reduction="none").mean(1)
    found = LabelLoss(MIXED, LossConfig())(logits, VERBS_AND_SOUNDS)
    torch.testing.assert_close(found, (verb + sound) / 2)

    weights = (0.5, 2.0, 1.0, 3.0, 0.1, 1.0)
    found = LabelLoss(MIXED, LossConfig(), weights)(logits, VERBS_AND_SOUNDS)
    verb = F.cross_entropy(logits[:, :3], VERB, torch.tensor(weights[:3]))
    positives = torch.tensor(weights[3:])
    sound = F.binary_cross_entropy_with_logits(logits[:, 3:], SOUND, pos_weight=positives)
    torch.testing.assert_close(found.mean(), (verb + sound) / 2)


def test_only_known_labels_count_in_each_group() -> None:
    """The mean over the clips is the mean over a group's clips whose labels are known, and over its known classes."""
    logits = draws(CLIPS, 6)
    known = torch.ones(CLIPS, 6, dtype=torch.bool)
    known[[0, 5], 1] = False  # these clips' verbs are not known: an exclusive group is known as a whole
    known[:, 3:] = draws(CLIPS, 3, seed=2) > 0
    has_verb = known[:, :3].all(1)
    found = LabelLoss(MIXED, LossConfig())(logits, VERBS_AND_SOUNDS, known)
    verb = F.cross_entropy(logits[:, :3][has_verb], VERB[has_verb])
    sounds = known[:, 3:]
    sound = F.binary_cross_entropy_with_logits(logits[:, 3:][sounds], SOUND[sounds])
    torch.testing.assert_close(found.mean(), (verb + sound) / 2)

    weights = (0.5, 2.0, 1.0, 3.0, 0.1, 1.0)
    weighted = LabelLoss(MIXED, LossConfig(), weights)(logits, VERBS_AND_SOUNDS, known)
    verb = F.cross_entropy(logits[:, :3][has_verb], VERB[has_verb], torch.tensor(weights[:3]))
    each = F.binary_cross_entropy_with_logits(
        logits[:, 3:], SOUND, pos_weight=torch.tensor(weights[3:]), reduction="none"
    )
    torch.testing.assert_close(weighted.mean(), (verb + each[sounds].mean()) / 2)


@pytest.mark.parametrize("weights", [None, (0.5, 2.0, 1.0, 3.0, 0.1, 1.0)])
def test_an_unknown_target_has_no_influence_whatever_it_is(weights: tuple[float, ...] | None) -> None:
    known = torch.ones(CLIPS, 6, dtype=torch.bool)
    known[0, :3] = known[1, 4] = False
    loss = LabelLoss(MIXED, LossConfig(label_smoothing=0.1), weights)
    results = []
    for value in (0.0, 1.0, float("nan")):
        logits = draws(CLIPS, 6).requires_grad_()
        found = loss(logits, torch.where(known, VERBS_AND_SOUNDS, value), known)
        found.mean().backward()
        results.append((found.detach(), logits.grad))
    for found, gradient in results[1:]:
        assert torch.equal(found, results[0][0])
        assert torch.equal(gradient, results[0][1])
    assert not results[0][1][0, :3].any()
    assert results[0][1][0, 3:].all()


def test_no_known_label_gives_no_loss() -> None:
    for weights in (None, (1.0,) * 6):
        logits = draws(CLIPS, 6).requires_grad_()
        loss = LabelLoss(MIXED, LossConfig(), weights)(
            logits, VERBS_AND_SOUNDS, torch.zeros(CLIPS, 6, dtype=torch.bool)
        )
        assert not loss.any()
        loss.mean().backward()
        assert not logits.grad.any()


def test_bce_may_be_asked_for_where_classes_exclude_each_other() -> None:
    logits = draws(CLIPS, 7)
    found = LabelLoss(TWO_EXCLUSIVE, LossConfig(loss="bce"))(logits, VERBS_AND_NOUNS)
    each = F.binary_cross_entropy_with_logits(logits, VERBS_AND_NOUNS, reduction="none")
    torch.testing.assert_close(found, (each[:, :3].mean(1) + each[:, 3:].mean(1)) / 2)


def test_losses_that_the_labels_do_not_allow_are_refused() -> None:
    with pytest.raises(ValueError, match="exactly one label"):
        loss_space(MIXED, LossConfig(loss="cross-entropy"))
    with pytest.raises(ValueError, match="label-smoothing"):
        loss_space(LabelSpace((SOUNDS,)), LossConfig(label_smoothing=0.1))
    with pytest.raises(ValueError, match="label-smoothing"):
        loss_space(TWO_EXCLUSIVE, LossConfig(loss="bce", label_smoothing=0.1))
    assert loss_space(MIXED, LossConfig(label_smoothing=0.1)) == MIXED


# -- Distillation ------------------------------------------------------------------------------------------------------


def test_a_teacher_is_softened_group_by_group() -> None:
    teacher = draws(CLIPS, 6, seed=3)
    found = distillation_targets(teacher, 2.0, MIXED)
    torch.testing.assert_close(found[:, :3], torch.softmax(teacher[:, :3] / 2, 1))
    torch.testing.assert_close(found[:, 3:], torch.sigmoid(teacher[:, 3:] / 2))


def objective(space: LabelSpace, **settings: Any) -> DistillationObjective:
    distillation = DistillationConfig(label_weight=0.25, teacher_temperature=2.0)
    return DistillationObjective(
        ObjectiveSettings(LogMelConfig(), space, embedding_dim=2, distillation=distillation, **settings)
    )


def batch(targets: Tensor, **more: Tensor) -> dict[str, Tensor]:
    return {"waveform": 0.1 * draws(CLIPS, 3200, seed=4), "targets": targets, **more}


@pytest.mark.parametrize("space", [TWO_EXCLUSIVE, MIXED])
def test_labels_and_teachers_share_the_loss_of_every_group(space: LabelSpace) -> None:
    """Eq. 8 with cross entropy in exclusive groups and BCE in others, clip by clip, written with torch's losses."""
    classes = len(space.class_names)
    targets = VERBS_AND_NOUNS if classes == 7 else VERBS_AND_SOUNDS
    logits, teacher = draws(CLIPS, classes), draws(CLIPS, classes, seed=3)
    has_teacher = torch.tensor([True] * 5 + [False] * 3)
    found = objective(space)(
        lambda mel: StudentOutput(logits, logits[:, :2]),
        batch(targets, teacher_logits=teacher, has_teacher=has_teacher),
    )
    labels, taught = [], []
    for group, columns in space.parts():
        of_clip, of_teacher = logits[:, columns], teacher[:, columns] / 2
        if group.exclusive:
            labels.append(F.cross_entropy(of_clip, targets[:, columns].argmax(1), reduction="none"))
            taught.append(F.cross_entropy(of_clip, torch.softmax(of_teacher, 1), reduction="none"))
        else:
            labels.append(F.binary_cross_entropy_with_logits(of_clip, targets[:, columns], reduction="none").mean(1))
            soft = torch.sigmoid(of_teacher)
            taught.append(F.binary_cross_entropy_with_logits(of_clip, soft, reduction="none").mean(1))
    label, teachers = sum(labels) / 2, sum(taught) / 2
    torch.testing.assert_close(found["label_loss"], label.mean())
    torch.testing.assert_close(found["distillation_loss"], teachers[:5].mean())
    expected = torch.cat([0.25 * label[:5] + 0.75 * teachers[:5], label[5:]])
    torch.testing.assert_close(found["loss"], expected.mean())


def test_mixup_mixes_every_groups_labels_and_teachers() -> None:
    logits, teacher = draws(CLIPS, 7), draws(CLIPS, 7, seed=3)
    weight = torch.tensor([0.7, 0.7, 0.6, 0.6, 1.0, 1.0, 0.9, 0.9])
    partner = torch.tensor([1, 0, 3, 2, 5, 4, 7, 6])
    everyone = torch.ones(CLIPS, dtype=torch.bool)
    found = objective(TWO_EXCLUSIVE)(
        lambda mel: StudentOutput(logits, logits[:, :2]),
        batch(VERBS_AND_NOUNS, teacher_logits=teacher, has_teacher=everyone, mix_weight=weight),
    )
    soft = torch.cat([torch.softmax(teacher[:, :3] / 2, 1), torch.softmax(teacher[:, 3:] / 2, 1)], dim=1)

    def loss_against(values: Tensor) -> Tensor:
        """Cross entropy is linear in its target, so the loss of a mixture is the mixture of the losses."""
        parts = [
            F.cross_entropy(logits[:, part], values[:, part], reduction="none") for part in (slice(3), slice(3, 7))
        ]
        return sum(parts) / 2

    for name, values in (("label_loss", VERBS_AND_NOUNS), ("distillation_loss", soft)):
        mixture = weight * loss_against(values) + (1 - weight) * loss_against(values[partner])
        torch.testing.assert_close(found[name], mixture.mean())


def test_the_settings_of_an_objective_survive_json() -> None:
    for space in (TWO_EXCLUSIVE, MIXED):
        one = objective(space, class_weights=tuple(range(1, len(space.class_names) + 1)), options={"share": 0.5})
        assert ObjectiveSettings.from_json(one.settings.to_json()) == one.settings
