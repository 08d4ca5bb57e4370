"""MN against the reference weights, the published sizes and, option by option, itself."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from students import create_student, load_weights
from students.layers.attention import ATTENTIONS, create_attention
from students.layers.keyed import set_sample_keys
from students.layers.squeeze_excitation import SqueezeExcitation
from students.profile import profile_student

# Parameters and millions of multiply-accumulates for 527 classes and 128 mels × 1000 frames.
SIZES = {
    "mn01": ({}, 123_783, 18.15),
    "mn02": ({}, 324_695, 40.32),
    "mn04": ({}, 983_599, 110.64),
    "mn05": ({}, 1_431_239, 159.96),
    "mn10": ({}, 4_876_831, 541.1),
    "mn20": ({}, 17_909_287, 2_059),
    "mn30": ({}, 39_086_367, 4_555),
    "mn40": ({}, 68_427_303, 8_028),
    "mn10 fully convolutional": ({"head": "fully_convolutional"}, 3_478_638, 603.9),
    "mn10 attention pooling": ({"head": "attention_pooling"}, 7_023_244, 668.7),
}


@pytest.mark.parametrize("student", SIZES)
def test_has_the_published_size(student: str) -> None:
    options, parameters, megamacs = SIZES[student]
    with torch.device("meta"):
        profile = profile_student(create_student(student.split()[0], num_classes=527, **options))
    assert profile.parameters == parameters
    digits = len(str(megamacs).partition(".")[2]) if isinstance(megamacs, float) else 0
    assert round(profile.macs / 1e6, digits) == megamacs


def test_reproduces_the_reference_for_random_weights(reference_dir: Path) -> None:
    reference = torch.load(reference_dir / "reference" / "mn04_random.pt", weights_only=True)
    student = create_student("mn04", num_classes=reference["logits"].shape[1]).eval()
    student.load_state_dict(reference["state_dict"])
    with torch.inference_mode():
        output = student(reference["input"])
    torch.testing.assert_close(output.logits, reference["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.embedding, reference["embedding"], atol=1e-5, rtol=0)


def test_the_public_checkpoint_hears_what_the_reference_hears(reference_dir: Path) -> None:
    reference = np.load(reference_dir / "reference" / "mn04_as_esc10_clips.npz")
    student = create_student("mn04", num_classes=527).eval()
    load_weights(student, reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt")
    with torch.inference_mode():
        logits = student(torch.from_numpy(reference["log_mel"])[:, None]).logits
    np.testing.assert_allclose(logits.numpy(), reference["logits"], atol=1e-4, rtol=0)
    with open(reference_dir / "data" / "labels" / "audioset_class_labels_indices.csv", encoding="utf-8") as file:
        names = [row["display_name"] for row in csv.DictReader(file)]
    # 1-100032-A-0 and 5-203128-A-0 are recordings of dogs.
    heard = [names[index] for index in logits.argmax(1)]
    assert heard[0] in ("Dog", "Bark", "Bow-wow", "Animal", "Domestic animals, pets")
    assert heard[2] in ("Dog", "Bark", "Bow-wow", "Animal", "Domestic animals, pets")


@pytest.mark.parametrize(
    ("base", "change"),
    [
        ({}, {"width": 0.2}),
        ({}, {"head": "fully_convolutional"}),
        ({}, {"head": "attention_pooling"}),
        ({}, {"se_dims": "none"}),
        ({}, {"se_dims": "f"}),
        ({}, {"se_dims": "cft"}),
        ({}, {"se_reduction": 2}),
        *[({}, {"attention": name}) for name in ("se", *ATTENTIONS, "none")],
        ({"attention": "ca"}, {"attention": "ca", "se_reduction": 2}),
        ({"se_dims": "f"}, {"n_mels": 64}),
    ],
)
def test_an_option_that_changes_the_layers_changes_the_parameters(base: dict, change: dict) -> None:
    def shapes(**options: object) -> dict[str, tuple[int, ...]]:
        student = create_student("mn01", num_classes=5, **options)
        return {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}

    assert shapes(**base) != shapes(**base | change)


@pytest.mark.parametrize("change", [{"strides": s} for s in ((1, 2, 2, 2), (2, 1, 2, 2), (2, 2, 1, 2), (2, 2, 2, 1))])
def test_strides_change_the_computation(change: dict) -> None:
    mel = torch.randn(1, 1, 128, 64)
    base = create_student("mn01", num_classes=5).eval()
    changed = create_student("mn01", num_classes=5, **change).eval()
    changed.load_state_dict(base.state_dict())
    with torch.inference_mode():
        assert base.features(mel).shape[2:] == (4, 2)
        assert changed.features(mel).shape[2:] == (8, 4)
        assert not torch.allclose(base(mel).embedding, changed(mel).embedding)


def test_each_way_to_combine_squeeze_excitation_gives_something_else() -> None:
    mel = torch.randn(1, 1, 128, 64)
    base = create_student("mn01", num_classes=5, se_dims="cft", se_agg="max").eval()
    for layer in base.modules():
        if isinstance(layer, SqueezeExcitation):  # so that axes differ more than at the start of training
            torch.nn.init.normal_(layer.fc2.bias, std=2.0)
    embeddings = [base(mel).embedding]
    for aggregation in ("avg", "add", "min"):
        student = create_student("mn01", num_classes=5, se_dims="cft", se_agg=aggregation).eval()
        student.load_state_dict(base.state_dict())
        embeddings.append(student(mel).embedding)
    for first, embedding in enumerate(embeddings):
        for other in embeddings[first + 1 :]:
            assert not torch.allclose(embedding, other, rtol=1e-3)


def test_dropout_changes_training_and_not_inference() -> None:
    mel = torch.randn(2, 1, 128, 32)
    without = create_student("mn01", num_classes=5, dropout=0.0)
    with_dropout = create_student("mn01", num_classes=5, dropout=0.5)
    with_dropout.load_state_dict(without.state_dict())
    assert torch.equal(without.eval()(mel).logits, with_dropout.eval()(mel).logits)
    set_sample_keys(with_dropout, torch.tensor([1, 2]))
    assert not torch.equal(without.train()(mel).logits, with_dropout.train()(mel).logits)


@pytest.mark.parametrize("head", ["mlp", "fully_convolutional", "attention_pooling", "linear"])
@pytest.mark.parametrize("se_dims", ["none", "t", "cf", "cft"])
def test_every_head_and_axis_trains_on_odd_sizes(head: str, se_dims: str) -> None:
    student = create_student("mn01", num_classes=1, head=head, se_dims=se_dims, se_agg="avg", n_mels=40)
    for frames in (32, 77, 501):
        output = student(torch.randn(1, 1, 40, frames))
        assert output.logits.shape == (1, 1)
        output.logits.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in student.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("n_mels", [40, 101, 256])
@pytest.mark.parametrize("strides", [[2, 2, 2, 2], [2, 1, 2, 1]])
def test_squeeze_excitation_has_the_size_of_the_map(n_mels: int, strides: list[int]) -> None:
    """Frequency does not resample, so a wrong size would fail; time would hide it, so its size is looked at."""
    student = create_student("mn01", num_classes=2, se_dims="ft", strides=strides, n_mels=n_mels).eval()
    time_sizes = [layer.size for name, layer in student.named_modules() if name.endswith("conc_se_layers.1")]
    with torch.inference_mode():
        student(torch.randn(1, 1, n_mels, 32))
    first, last = math.ceil(500 / strides[0] / strides[1]), math.ceil(500 / math.prod(strides))
    assert (time_sizes[0], time_sizes[-1]) == (first, last)


@pytest.mark.parametrize("shape", [(2, 128, 100), (2, 2, 128, 100), (2, 1, 64, 100), (128, 100)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 1, 128, frames\); found"):
        create_student("mn01", num_classes=2)(torch.randn(shape))


@pytest.mark.parametrize("options", [{}, {"head": "attention_pooling", "se_dims": "cft"}])
def test_can_be_exported(options: dict) -> None:
    student = create_student("mn01", num_classes=4, **options).eval()
    mel = torch.randn(2, 1, 128, 50)
    exported = torch.export.export(student, (mel,)).module()
    torch.testing.assert_close(exported(mel).logits, student(mel).logits)


def test_mixed_precision_stays_close() -> None:
    student = create_student("mn04", num_classes=4, head="attention_pooling").eval()
    mel = torch.randn(1, 1, 128, 50)
    with torch.inference_mode():
        exact = student(mel).embedding
        with torch.autocast("cpu", dtype=torch.bfloat16):
            rough = student(mel)
    assert rough.logits.isfinite().all()
    torch.testing.assert_close(rough.embedding.float(), exact, atol=0.05, rtol=0.1)


# --- Attention in all blocks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["se", *ATTENTIONS, "none"])
def test_every_attention_trains_on_odd_sizes_and_on_one_clip(attention: str) -> None:
    student = create_student("mn01", num_classes=2, attention=attention)
    for batch, frames in ((1, 32), (2, 77)):
        output = student.train()(torch.randn(batch, 1, 128, frames))
        (output.logits.square().sum() + output.embedding.square().sum()).backward()
        assert student.eval()(torch.randn(batch, 1, 128, frames)).logits.isfinite().all()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_attention_depends_on_the_clip_and_bears_a_silent_channel(attention: str) -> None:
    torch.manual_seed(0)
    layer = create_attention(attention, channels=16, reduction=2)
    if attention == "grn":
        torch.nn.init.normal_(layer.scale)
    x = torch.randn(3, 16, 5, 7)
    x[:, 3] = 0.0
    x.requires_grad_()
    factor = layer.eval()(x) - x if attention == "gc" else layer.eval()(x) / x
    changed = x.detach() * torch.linspace(0.5, 2.0, 16)[:, None, None]
    other = layer(changed) - changed if attention == "gc" else layer(changed) / changed
    kept = [channel for channel in range(16) if channel != 3]
    assert not torch.allclose(factor[:, kept], other[:, kept], rtol=1e-2)
    layer.train()(x).square().sum().backward()
    assert x.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_coordinate_attention_weighs_rows_and_columns() -> None:
    layer = create_attention("ca", channels=8, reduction=4).eval()
    x = torch.randn(2, 8, 6, 9)
    weights = layer(x) / x
    first = weights[:, :, :1, :1]
    torch.testing.assert_close(weights, weights[:, :, :, :1] * weights[:, :, :1] / first, rtol=1e-3, atol=1e-4)
    frequency = layer.to_frequency(layer.joint(x.mean(3, keepdim=True))).sigmoid()
    torch.testing.assert_close(weights[:, :, :, 0] / weights[:, :, :1, 0], (frequency / frequency[:, :, :1])[..., 0])


def test_a_squeezed_style_is_mean_and_deviation() -> None:
    layer = create_attention("srm", channels=4, reduction=1).eval()
    x = torch.randn(2, 4, 6, 9)
    style = layer.weight[:, 0] * x.mean((2, 3)) + layer.weight[:, 1] * x.flatten(2).std(2, correction=0)
    style = (style / math.sqrt(1.0 + layer.norm.eps)).sigmoid()
    torch.testing.assert_close(layer(x), x * style[:, :, None, None], rtol=1e-3, atol=1e-4)


def test_an_unknown_attention_lists_the_choices() -> None:
    with pytest.raises(
        ValueError, match="unknown attention 'eca'; choices: baseline, se, ca, ta, srm, grn, cbam, gc, none"
    ):
        create_student("mn01", num_classes=2, attention="eca")


# --- Folded ------------------------------------------------------------------------------------------------------------


def test_folded_the_public_checkpoint_gives_the_same(reference_dir: Path) -> None:
    reference = np.load(reference_dir / "reference" / "mn04_as_esc10_clips.npz")
    student = create_student("mn04", num_classes=527).eval()
    load_weights(student, reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt")
    fused = student.fuse()
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    mel = torch.from_numpy(reference["log_mel"])[:, None]
    with torch.inference_mode():
        expected, found = student(mel), fused(mel)
    torch.testing.assert_close(found.logits, expected.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.embedding, expected.embedding, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "options",
    [{"head": "fully_convolutional"}, {"head": "attention_pooling"}, *[{"attention": name} for name in ATTENTIONS]],
)
def test_folded_every_variant_gives_the_same(options: dict, as_if_trained) -> None:
    torch.manual_seed(0)
    student = as_if_trained(create_student("mn01", num_classes=4, **options))
    fused = student.fuse()
    assert fused.config is None
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in fused.modules())
    mel = torch.randn(2, 1, 128, 61)
    with torch.inference_mode():
        for found, expected in zip(fused(mel), student(mel), strict=True):
            assert expected.std() > 1e-3
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * max(1.0, float(expected.abs().max())))
