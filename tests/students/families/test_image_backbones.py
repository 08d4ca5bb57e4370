"""The image networks: published sizes, one input channel, ImageNet's weights."""

import pytest
import timm
import torch
from torch import nn

from students import create_student
from students.layers.keyed import KeyedDropout, set_sample_keys
from students.profile import profile_student
from students.weights import imagenet_architecture, load_imagenet_weights

# timm's name, parameters and millions of multiply-accumulates for 200 classes and 128 mels × 1000 frames.
SIZES = {
    "efficientnet_b2": ("efficientnet_b2", 7_982_218, 1_677),
    "efficientnetv2_b2": ("tf_efficientnetv2_b2", 8_968_310, 2_979),
}


@pytest.fixture(scope="module", params=SIZES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_has_the_published_size(name: str) -> None:
    with torch.device("meta"):
        profile = profile_student(create_student(name, num_classes=200))
    assert (profile.parameters, round(profile.macs / 1e6)) == SIZES[name][1:]


def test_hears_a_grey_picture_with_imagenets_weights(name: str) -> None:
    """Kernels averaged over colour see in one channel a third of what the colour kernels see in three such channels."""
    network = timm.create_model(SIZES[name][0], num_classes=7).train()
    student = create_student(name, 5).train()
    own_classifier = student.classifier[-1].weight.clone()
    load_imagenet_weights(student, network.state_dict())
    assert torch.equal(student.classifier[-1].weight, own_classifier)
    mel = torch.randn(2, 1, 96, 50)
    grey = mel.expand(-1, 3, -1, -1)
    with torch.no_grad():
        torch.testing.assert_close(3 * student.features.conv_stem(mel), network.conv_stem(grey))
        network.conv_stem.weight /= 3
        # With batch statistics (train), since those of a fresh network let almost nothing through.
        torch.testing.assert_close(student.features(mel), network.forward_features(grey), atol=1e-3, rtol=1e-3)


def test_another_networks_weights_are_refused(name: str) -> None:
    other = timm.create_model("efficientnet_b1").state_dict()
    with pytest.raises(ValueError, match=f"not the weights of timm's {SIZES[name][0]}: .* is "):
        load_imagenet_weights(create_student(name, 5), other)


def test_the_weights_to_fetch_are_known_by_student(name: str) -> None:
    assert imagenet_architecture(create_student(name, 2)) == SIZES[name][0]
    with pytest.raises(
        ValueError, match="no ImageNet weights for MergeNet; families with such weights: mn, efficientnet"
    ):
        imagenet_architecture(create_student("mergenet32", 2))


def test_dropout_depends_on_the_samples_key_alone(name: str) -> None:
    student = create_student(name, 3)
    assert [layer.probability for layer in student.modules() if isinstance(layer, KeyedDropout)] == [0.3]
    assert not [
        layer for layer in student.modules() if isinstance(layer, nn.Dropout) or "DropPath" in type(layer).__name__
    ]
    with torch.no_grad():  # batch statistics without running ones: the same in both passes
        mel = torch.randn(2, 1, 64, 40)
        set_sample_keys(student.train(), torch.tensor([1, 2]))
        torch.manual_seed(0)
        first = student(mel).logits
        assert torch.equal(student(mel).logits, first)
        set_sample_keys(student, torch.tensor([3, 4]))
        assert not torch.equal(student(mel).logits, first)


def test_another_dropout_changes_training(name: str) -> None:
    student = create_student(name, 3, dropout=0.0).train()
    mel = torch.randn(2, 1, 64, 40)
    with torch.no_grad():
        output = student(mel)
        torch.testing.assert_close(output.logits, student.classifier[-1](output.embedding))
    with pytest.raises(ValueError, match=r"dropout must be at least 0 and below 1; found 1"):
        create_student(name, 3, dropout=1.0)


def test_a_student_that_hears_nothing_predicts_the_class_frequencies(name: str) -> None:
    student = create_student(name, 3).eval()
    student.set_class_prior(torch.tensor([0.5, 0.02, 0.0]))
    nn.init.zeros_(student.classifier[-1].weight)
    predicted = student(torch.randn(1, 1, 128, 32)).logits.sigmoid()
    torch.testing.assert_close(predicted, torch.tensor([[0.5, 0.02, 0.001]]), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 128, 100), (2, 3, 128, 100)])
def test_another_shape_is_refused(name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"takes \(batch, 1, n_mels, frames\); found"):
        create_student(name, 2)(torch.randn(shape))
