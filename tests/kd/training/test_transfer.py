"""How students start on a new task, what is frozen, how fast layers learn, and the linear probe."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import TaskClips
from kd.data.splits import Partition
from kd.evaluation.metrics import tagging_metrics
from kd.evaluation.probe import probe_logits
from kd.evaluation.task_metrics import device_metrics, multi_label_metrics, single_label_metrics
from kd.training.loop import OptimizerConfig, create_optimizer
from kd.training.transfer import Start, freeze, layer_groups, start_from_run, starting_student
from students import create_student
from students.frontend import LogMelConfig
from students.weights import save_student

NAMES = ("a", "b", "c")


@pytest.mark.parametrize("name", ["mn01", "dymn04", "mergenet32"])
def test_layers_learn_the_slower_the_deeper(name: str) -> None:
    with torch.device("meta"):
        student = create_student(name, 3)
    groups = layer_groups(student, 0.5)
    parameters = [parameter for group in groups for parameter in group["params"]]
    assert {id(parameter) for parameter in parameters} == {id(parameter) for parameter in student.parameters()}
    scales = [group["lr_scale"] for group in groups]
    assert scales == [0.5 ** (len(groups) - 1 - place) for place in range(len(groups))]
    assert len(groups) >= 10
    head = {id(parameter) for parameter in student.classifier.parameters()}
    assert {id(parameter) for parameter in groups[-1]["params"]} == head
    optimizer = create_optimizer(student, OptimizerConfig(), groups)
    assert [group["lr_scale"] for group in optimizer.param_groups] == scales


def test_freezing() -> None:
    student = create_student("mn01", 3)
    (features,) = freeze(student, "backbone")
    assert features is student.features
    assert all(not parameter.requires_grad for parameter in features.parameters())
    assert all(parameter.requires_grad for parameter in student.classifier.parameters())
    assert len(layer_groups(student, 0.9)) == 1
    student = create_student("mn01", 3)
    norms = [module for module in student.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert freeze(student, "batch-norm") == norms[1:]
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert freeze(student, "none") == []


def test_a_start_is_the_same_every_time_and_keeps_what_fits(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        source = create_student("mn01", 3)
    save_student(tmp_path, source, NAMES, LogMelConfig())
    start, card = start_from_run(tmp_path)
    assert card.class_names == NAMES

    def state(class_names: tuple[str, ...], seed: int = 0) -> dict[str, torch.Tensor]:
        return starting_student(start, class_names, LogMelConfig(), seed=seed, loss="cross-entropy").state_dict()

    same = state(NAMES)
    assert all(torch.equal(same[name], value) for name, value in source.state_dict().items())
    torch.randn(3)  # the global generator has no say
    first, second, other_seed = state(("x", "y", "z")), state(("x", "y", "z")), state(("x", "y", "z"), seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    new = [name for name in first if not torch.equal(first[name], same[name])]
    assert new == ["classifier.5.weight"]  # its bias starts at 0 in both
    assert not torch.equal(first["classifier.5.weight"], other_seed["classifier.5.weight"])


def test_a_fresh_multi_label_student_expects_one_class_for_each_clip() -> None:
    student = starting_student(Start("mn01", {}), NAMES, LogMelConfig(), seed=0, loss="bce")
    torch.testing.assert_close(torch.sigmoid(student.classifier[-1].bias), torch.full((3,), 1 / 3))


def labelled(labels: list[tuple[str, ...]], known: list[tuple[str, ...]] | None = None) -> TaskClips:
    clips = [
        Clip(f"clip{index}", Path("nowhere"), names, known=known[index] if known else None)
        for index, names in enumerate(labels)
    ]
    return TaskClips(Path("own"), NAMES, clips)


def test_the_probe_is_logistic_regression_on_standardised_embeddings() -> None:
    rng = np.random.default_rng(0)
    classes = np.arange(60) % 3
    embeddings = rng.standard_normal((60, 5)) + 2.0 * np.eye(5)[classes]
    clips = labelled([(NAMES[index],) for index in classes])
    part = Partition(None, np.arange(40), np.arange(0), np.arange(40, 60))
    logits = probe_logits(clips, part, embeddings, exclusive=True)
    mean, deviation = embeddings[:40].mean(axis=0), embeddings[:40].std(axis=0)
    scaled = (embeddings - mean) / deviation
    expected = LogisticRegression(max_iter=1000).fit(scaled[:40], classes[:40]).predict_proba(scaled[40:])
    found = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    absent = Partition(None, np.flatnonzero(classes != 1), np.arange(0), np.flatnonzero(classes == 1))
    assert not (probe_logits(clips, absent, embeddings, exclusive=True).argmax(axis=1) == 1).any()


def test_the_probe_and_the_metrics_see_only_known_labels() -> None:
    rng = np.random.default_rng(1)
    embeddings = rng.standard_normal((30, 4))
    labels = [tuple(name for name in NAMES if rng.random() < 0.5) for _ in range(30)]
    known = [tuple(name for name in NAMES if rng.random() < 0.7) for _ in range(30)]
    part = Partition(None, np.arange(20), np.arange(0), np.arange(20, 30))
    plain = labelled(labels, known)
    flipped = labelled(
        [
            tuple(name for name in NAMES if (name in has) == (name in knows))
            for has, knows in zip(labels, known, strict=True)
        ],
        known,
    )
    assert not np.array_equal(plain.targets(part.test), flipped.targets(part.test))
    one, other = (probe_logits(clips, part, embeddings, exclusive=False) for clips in (plain, flipped))
    np.testing.assert_array_equal(one, other)
    first, second = (
        multi_label_metrics(clips.targets(part.test), one, clips.mask(part.test), NAMES) for clips in (plain, flipped)
    )
    assert first == second
    everything = multi_label_metrics(plain.targets(part.test), one, np.ones((10, 3), dtype=bool), NAMES)
    assert everything["mAP"] == tagging_metrics(plain.targets(part.test), one, NAMES).mean_average_precision


def test_accuracy_and_log_loss_by_class_and_device() -> None:
    classes = np.array([0, 0, 0, 1])
    probabilities = np.array([[0.7, 0.2, 0.1], [0.2, 0.7, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1]])
    found = single_label_metrics(classes, np.log(probabilities), NAMES)
    assert found["accuracy"] == 0.75
    assert found["macro_accuracy"] == pytest.approx((2 / 3 + 1) / 2)
    per_clip = -np.log([0.7, 0.2, 0.5, 0.8])
    assert found["log_loss"] == pytest.approx(per_clip.mean())
    assert found["macro_log_loss"] == pytest.approx((per_clip[:3].mean() + per_clip[3]) / 2)
    assert found["absent"] == ["c"]
    tables = device_metrics(["a", "s4", "a", "s4"], ["a"], classes, np.log(probabilities), NAMES)
    assert tables["devices"]["a"]["accuracy"] == 1.0
    assert tables["unseen_devices"] == {key: tables["devices"]["s4"][key] for key in tables["unseen_devices"]}
    assert tables["unseen_devices"]["accuracy"] == 0.5
