"""How students start on a new task, what is frozen, how fast layers learn, and the linear probe."""

from pathlib import Path

import numpy as np
import pytest
import torch

from kd.training.optimization import OptimizerConfig, create_optimizer
from kd.training.transfer import Start, freeze, layer_groups, start_from_run, starting_student
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig

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
    optimizer = create_optimizer(OptimizerConfig(), student, groups=groups)
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
        return starting_student(start, class_names, LogMelConfig(), seed=seed).state_dict()

    same = state(NAMES)
    assert all(torch.equal(same[name], value) for name, value in source.state_dict().items())
    torch.randn(3)  # the global generator has no say
    first, second, other_seed = state(("x", "y", "z")), state(("x", "y", "z")), state(("x", "y", "z"), seed=1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    new = [name for name in first if not torch.equal(first[name], same[name])]
    assert new == ["classifier.5.weight"]  # its bias starts at 0 in both
    assert not torch.equal(first["classifier.5.weight"], other_seed["classifier.5.weight"])


def test_a_fresh_multi_label_student_expects_one_class_for_each_clip() -> None:
    student = starting_student(
        Start("mn01", {}), NAMES, LogMelConfig(), seed=0, prior=np.full(3, 1 / 3, dtype=np.float32)
    )
    torch.testing.assert_close(torch.sigmoid(student.classifier[-1].bias), torch.full((3,), 1 / 3))


def test_imagenet_weights_that_cannot_be_downloaded_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr("timm.models._builder.load_pretrained", offline)
    with pytest.raises(
        OSError, match=r"timm's weights of mobilenetv3_large_100 cannot be downloaded \(.*no route to host"
    ):
        starting_student(Start("mn10", {}, "imagenet"), NAMES, LogMelConfig(), seed=0)
    with pytest.raises(ValueError, match="fit an MN of width 1"):  # before anything is tried
        starting_student(Start("mn01", {}, "imagenet"), NAMES, LogMelConfig(), seed=0)


def test_weights_of_another_number_of_classes_start_a_new_last_layer(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where the weights' classes are taken for the clips', as in pretraining."""
    with torch.random.fork_rng():
        source = create_student("mn01", 5)
    save_student(tmp_path, source, tuple("abcde"), LogMelConfig())
    start = Start("mn01", {}, str(tmp_path / "student.safetensors"))
    prior = np.array([0.9, 0.5, 0.1])

    def started(classes: int) -> torch.nn.Module:
        names = tuple("abcde"[:classes])
        return starting_student(start, names, LogMelConfig(), seed=0, prior=prior[:classes], keep_classes=True)

    student = started(3)
    assert "initialised" in caplog.text
    (weight, bias) = [value for value in student.state_dict().values() if value.shape[:1] == (3,)]
    assert weight.shape[0] == 3
    np.testing.assert_allclose(torch.sigmoid(bias).numpy(), prior, atol=1e-6)
    features = [name for name in source.state_dict() if name.startswith("features.")]
    assert features
    assert all(torch.equal(student.state_dict()[name], source.state_dict()[name]) for name in features)
    same = starting_student(start, tuple("abcde"), LogMelConfig(), seed=0, keep_classes=True).state_dict()
    assert all(torch.equal(same[name], value) for name, value in source.state_dict().items())
