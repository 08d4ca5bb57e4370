"""Weights go in only where they belong."""

import logging
import os
import pickle
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from students import create_student, load_weights
from students.weights import load_imagenet_weights, read_state_dict, weights_fingerprint

CLASSES = ["rain", "dog", "crow"]


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return weights_fingerprint(one) == weights_fingerprint(other)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A checkpoint of an mn01 with three classes."""
    path = tmp_path / "mn01.pt"
    torch.manual_seed(0)
    torch.save(create_student("mn01", num_classes=3).state_dict(), path)
    return path


def test_loads_the_public_checkpoint_by_its_key_names(reference_dir: Path) -> None:
    path = reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt"
    student = create_student("mn04", num_classes=527)
    load_weights(student, path)
    expected = torch.load(path, weights_only=True)
    assert student.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in student.state_dict().items())


def test_a_loaded_student_is_ready_to_use(checkpoint: Path) -> None:
    """Without ``eval()``, dropout and the batch's own statistics would turn a dog's bark into speech."""
    student = create_student("mn01", num_classes=3).train()
    load_weights(student, checkpoint)
    assert not any(module.training for module in student.modules())
    mel = torch.randn(2, 1, 128, 50)
    torch.testing.assert_close(student(mel).logits[:1], student(mel[:1]).logits)
    load_weights(student.train(), checkpoint, new_classes=True)
    assert not student.training


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_loads_both_kinds_of_file(tmp_path: Path, suffix: str) -> None:
    source, target = (create_student("mn01", num_classes=3, head="fully_convolutional") for _ in range(2))
    path = tmp_path / f"weights.{suffix}"
    (torch.save if suffix == "pt" else save_file)(source.state_dict(), path)
    assert not same_weights(source, target)
    load_weights(target, path)
    assert same_weights(source, target)


def test_another_number_of_classes_is_refused_unless_asked_for(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    student = create_student("mn01", num_classes=7)
    before = weights_fingerprint(student)
    with pytest.raises(ValueError, match=r"has 3 classes, the student 7; .*new_classes"):
        load_weights(student, checkpoint)
    assert weights_fingerprint(student) == before
    with caplog.at_level(logging.WARNING):
        load_weights(student, checkpoint, new_classes=True)
    assert "reinitialised for 7 classes: classifier.5.weight, classifier.5.bias" in caplog.text
    stored = torch.load(checkpoint, weights_only=True)
    for name, value in student.state_dict().items():
        assert name.startswith("classifier.5.") or torch.equal(value, stored[name]), name
    fresh = student.state_dict()["classifier.5.weight"]
    assert fresh.std() == pytest.approx((2 / fresh.shape[1]) ** 0.5, rel=0.2)  # He's rule, as for a new student


def test_new_classes_may_be_as_many_as_the_old_ones(checkpoint: Path) -> None:
    student = create_student("mn01", num_classes=3)
    load_weights(student, checkpoint, new_classes=True)
    stored = torch.load(checkpoint, weights_only=True)
    assert not torch.equal(student.state_dict()["classifier.5.weight"], stored["classifier.5.weight"])
    assert torch.equal(student.state_dict()["classifier.2.weight"], stored["classifier.2.weight"])


@pytest.mark.parametrize("head", ["mlp", "fully_convolutional", "attention_pooling", "linear"])
def test_new_classes_work_for_every_head(tmp_path: Path, head: str) -> None:
    source = create_student("mn01", num_classes=1, head=head)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    student = create_student("mn01", num_classes=4, head=head)
    with pytest.raises(ValueError, match="has 1 classes, the student 4"):
        load_weights(student, tmp_path / "w.pt")
    load_weights(student, tmp_path / "w.pt", new_classes=True)
    assert same_weights(student.features, source.features)


@pytest.mark.parametrize("new_classes", [False, True])
def test_another_students_weights_are_refused_and_named(checkpoint: Path, new_classes: bool) -> None:
    student = create_student("mn02", num_classes=3)
    with pytest.raises(
        ValueError, match=r"does not contain the weights of mn02 .*it fits mn01 with 3 classes"
    ) as caught:
        load_weights(student, checkpoint, new_classes)
    assert "of another shape: features." in str(caught.value)


def test_another_head_is_refused_with_the_names_that_differ(checkpoint: Path) -> None:
    student = create_student("mn01", num_classes=3, head="attention_pooling")
    message = r"missing: classifier\.head_weight.*not in the student: classifier\.2\.weight.*it fits mn01 with 3"
    with pytest.raises(ValueError, match=message):
        load_weights(student, checkpoint)


def test_one_missing_and_one_extra_tensor_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    state = torch.load(checkpoint, weights_only=True)
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "extra.pt")
    with pytest.raises(ValueError, match="not in the student: extra"):
        load_weights(create_student("mn01", num_classes=3), tmp_path / "extra.pt")
    del state["features.0.1.running_var"]
    torch.save(state, tmp_path / "missing.pt")
    with pytest.raises(ValueError, match=r"missing: features\.0\.1\.running_var"):
        load_weights(create_student("mn01", num_classes=3), tmp_path / "missing.pt")


def test_what_is_no_weights_file_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no such weights file: .*nothing\.pt"):
        read_state_dict(tmp_path / "nothing.pt")
    with pytest.raises(ValueError, match="no such weights file"):
        read_state_dict(tmp_path)
    torch.save({"model": {}, "epoch": 3}, tmp_path / "training.pt")
    with pytest.raises(ValueError, match=r"is not a state dict .* found a dict with 'model', 'epoch'"):
        read_state_dict(tmp_path / "training.pt")
    for text in ("teacher_class,class\nBark,dog\n", "index,mid\n", "# AudioSet\n", "{}"):
        (tmp_path / "text.pt").write_text(text)
        with pytest.raises(ValueError, match="not a PyTorch checkpoint"):
            read_state_dict(tmp_path / "text.pt")
    torch.save(torch.ones(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match="is not a state dict"):
        read_state_dict(tmp_path / "tensor.pt")
    whole = checkpoint.read_bytes()
    save_file(torch.load(checkpoint, weights_only=True), tmp_path / "whole.safetensors")
    whole_safetensors = (tmp_path / "whole.safetensors").read_bytes()
    for suffix, content in (("pt", whole), ("safetensors", whole_safetensors)):
        for length in (0, 1, 7, 100, 5_000, len(content) // 2, len(content) - 1):
            path = tmp_path / f"cut.{suffix}"
            path.write_bytes(content[:length])
            with pytest.raises(ValueError, match="is truncated"):
                read_state_dict(path)


def test_a_state_dict_inside_a_training_checkpoint_is_found(checkpoint: Path, tmp_path: Path) -> None:
    plain = read_state_dict(checkpoint)
    torch.save({"state_dict": plain, "epoch": 3}, tmp_path / "training.pt")
    found = read_state_dict(tmp_path / "training.pt")
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["model", "model_state_dict"])
def test_other_names_that_training_loops_use_are_found(checkpoint: Path, tmp_path: Path, name: str) -> None:
    torch.save({"epoch": 3, "optimizer": {"state": {}}, name: read_state_dict(checkpoint)}, tmp_path / "training.pt")
    student = create_student("mn01", num_classes=3)
    load_weights(student, tmp_path / "training.pt")
    assert_holds(student, checkpoint)


def assert_holds(student: nn.Module, checkpoint: Path) -> None:
    stored = torch.load(checkpoint, weights_only=True)
    assert all(torch.equal(value, stored[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.module.net."])
def test_a_wrappers_prefix_is_taken_off_aloud(
    checkpoint: Path, tmp_path: Path, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    state = {f"{prefix}{name}": value for name, value in read_state_dict(checkpoint).items()}
    torch.save({"state_dict": state}, tmp_path / "wrapped.pt")
    student = create_student("mn01", num_classes=3)
    load_weights(student, tmp_path / "wrapped.pt")
    assert_holds(student, checkpoint)
    assert f"every name begins with {prefix!r}, which was taken off" in caplog.text
    other = create_student("mn01", num_classes=4)
    load_weights(other, tmp_path / "wrapped.pt", new_classes=True)
    assert same_weights(other.features, student.features)


def test_an_averaged_models_count_is_no_weight(checkpoint: Path, tmp_path: Path) -> None:
    source = create_student("mn01", num_classes=3)
    averaged = torch.optim.swa_utils.AveragedModel(source)
    torch.save(averaged.state_dict(), tmp_path / "averaged.pt")
    student = create_student("mn01", num_classes=3)
    load_weights(student, tmp_path / "averaged.pt")
    assert same_weights(student, source)


def test_a_prefix_stays_where_the_rest_does_not_fit(checkpoint: Path, tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in read_state_dict(checkpoint).items()}
    torch.save(state, tmp_path / "wrapped.pt")
    with pytest.raises(ValueError, match=r"does not contain the weights of mn02 .*it fits mn01 with 3 classes"):
        load_weights(create_student("mn02", num_classes=3), tmp_path / "wrapped.pt")
    some = {f"module.{name}" if name.startswith("classifier") else name: value for name, value in state.items()}
    torch.save({**read_state_dict(checkpoint), **dict(list(some.items())[:1])}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"not in the student: module\."):
        load_weights(create_student("mn01", num_classes=3), tmp_path / "mixed.pt")


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "attacked"),)

    path = tmp_path / "attack.pt"
    path.write_bytes(pickle.dumps({"weight": Attack()}))
    with pytest.raises(ValueError, match="more than plain tensors"):
        read_state_dict(path)
    torch.save({"weight": Attack()}, path)
    with pytest.raises(ValueError, match="more than plain tensors"):
        read_state_dict(path)
    assert not (tmp_path / "attacked").exists()


def test_a_student_built_by_hand_says_what_it_lacks(checkpoint: Path) -> None:
    student = create_student("mn01", num_classes=3)
    student.config = None
    with pytest.raises(ValueError, match="build it with create_student"):
        load_weights(student, checkpoint)


# --- ImageNet ---


@pytest.fixture(scope="module")
def imagenet() -> nn.Module:
    """timm's network with random weights; batch norms too, so that each must find its place."""
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_large_100", pretrained=False).eval()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
            nn.init.normal_(layer.bias, std=0.1)
            nn.init.normal_(layer.running_mean, std=0.1)
            nn.init.uniform_(layer.running_var, 0.5, 1.5)
    return model


def align(student: nn.Module, imagenet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes the two differences between the networks, so that outputs can be compared."""
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eps = 1e-5
    for module in imagenet.modules():
        if hasattr(module, "conv_reduce"):
            monkeypatch.setattr(module, "gate", nn.Sigmoid())


def test_imagenet_weights_compute_what_timm_computes(imagenet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    student = create_student("mn10", num_classes=5).eval()
    last_layer = student.classifier[5].weight.clone()
    load_imagenet_weights(student, imagenet.state_dict())
    assert torch.equal(student.classifier[5].weight, last_layer)
    align(student, imagenet, monkeypatch)
    picture = torch.randn(2, 1, 128, 96)
    with torch.inference_mode():
        expected = imagenet.forward_head(imagenet.forward_features(picture.expand(-1, 3, -1, -1)), pre_logits=True)
        hidden = student.classifier[:4](student.features(picture))
    assert expected.std() > 0.1
    torch.testing.assert_close(hidden, expected, atol=1e-3, rtol=1e-3)


def test_imagenet_weights_go_into_the_other_heads_features(imagenet: nn.Module) -> None:
    mlp, attention = (create_student("mn10", num_classes=5, head=head) for head in ("mlp", "attention_pooling"))
    for student in (mlp, attention):
        load_imagenet_weights(student, imagenet.state_dict())
    assert same_weights(mlp.features, attention.features)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mn04", {}, "fit an MN of width 1"),
        ("mn10", {"se_reduction": 8}, "se_reduction 4"),
        ("mn10", {"se_dims": "none"}, "need squeeze-excitation over channels"),
        ("mn10", {"se_dims": "cf"}, "over channels only"),
    ],
)
def test_imagenet_weights_need_the_same_network(imagenet: nn.Module, name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_imagenet_weights(create_student(name, num_classes=5, **options), imagenet.state_dict())


def test_other_timm_weights_are_refused() -> None:
    other = timm.create_model("resnet18", pretrained=False)
    with pytest.raises(ValueError, match=r"not the weights of timm.*: conv_stem\.weight is missing"):
        load_imagenet_weights(create_student("mn10", num_classes=5), other.state_dict())


# --- Fingerprints ---


def test_a_fingerprint_changes_with_every_bit_and_only_then() -> None:
    linear = nn.Linear(3, 2)
    fingerprint = weights_fingerprint(linear)
    assert len(fingerprint) == 32
    assert weights_fingerprint(linear) == fingerprint
    with torch.no_grad():
        linear.weight.view(torch.int32)[1, 2] ^= 1
    assert weights_fingerprint(linear) != fingerprint


def test_a_fingerprint_sees_names_shapes_and_types() -> None:
    def named(**tensors: torch.Tensor) -> nn.Module:
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    modules = [
        named(a=torch.zeros(2, 3), b=torch.zeros(4)),
        named(a=torch.zeros(3, 2), b=torch.zeros(4)),
        named(a=torch.zeros(2, 3), c=torch.zeros(4)),
        named(a=torch.zeros(2, 3), b=torch.zeros(4, dtype=torch.int32)),
        named(a=torch.zeros(2, 3), b=torch.zeros(8, dtype=torch.bfloat16)),
    ]
    assert len({weights_fingerprint(module) for module in modules}) == len(modules)
    in_another_order = named(b=torch.zeros(4), a=torch.zeros(2, 3))
    assert weights_fingerprint(in_another_order) == weights_fingerprint(modules[0])
