"""The exported network against the student, in PyTorch; the ONNX file is tested in tests/kd/deploy/exporting."""

import pytest
import torch

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd.deploy.graph.network import ExportedNetwork, UnmixedDepthwise, channels_of_weights, for_runtimes
from students import create_student
from students.frontend import LogMel, LogMelConfig

FRONTEND = LogMelConfig(n_mels=32)


def trained(name: str, **options):
    student = create_student(name, 5, **options)
    draws = torch.Generator().manual_seed(3)
    for module in student.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.running_mean.uniform_(-0.5, 0.5, generator=draws)
            module.running_var.uniform_(0.5, 2.0, generator=draws)
    return student.eval()


@pytest.mark.parametrize(
    ("options", "one_clip"),
    [({}, False), ({"context": "own"}, False), ({"dynamic_blocks": "replace_se"}, False), ({}, True)],
)
@torch.inference_mode()
def test_dynamic_convolutions_give_the_same_in_both_forms(options: dict, one_clip: bool) -> None:
    torch.manual_seed(0)
    student = trained("dymn04", n_mels=32, **options)
    for module in student.modules():  # contexts that differ from clip to clip
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.normal_(module.weight, std=0.5)
    mel = torch.randn(1 if one_clip else 3, 1, 32, 50)
    fused = for_runtimes(student, one_clip)
    unmixed = [module for module in fused.modules() if isinstance(module, UnmixedDepthwise)]
    assert bool(unmixed) is not one_clip
    wanted, found = student(mel), fused(mel)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.embedding, wanted.embedding, rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, UnmixedDepthwise) for module in student.modules()), "the student was changed"


@torch.inference_mode()
def test_scores_are_softmax_within_exclusive_groups_and_sigmoid_in_others() -> None:
    space = LabelSpace((LabelGroup("verb", ("a", "b"), True), LabelGroup("sound", ("c", "d", "e"), False)))
    student = trained("mn01", n_mels=32)
    waveform = 0.1 * torch.randn(2, 16000)
    found = ExportedNetwork(student, FRONTEND, space)(waveform)
    wanted = student(LogMel(FRONTEND)(waveform))
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores[:, :2], wanted.logits[:, :2].softmax(1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.scores[:, 2:], wanted.logits[:, 2:].sigmoid(), rtol=1e-4, atol=1e-4)


def test_each_linear_layer_and_pointwise_convolution_may_be_int8() -> None:
    network = for_runtimes(trained("dymn04", n_mels=32))
    shapes = channels_of_weights(network)
    assert shapes["classifier.5.weight"] == (5, 512)
    assert (4, 16, 16) in [tuple(shape) for shape in shapes.values() if len(shape) == 3] or any(
        len(shape) == 3 for shape in shapes.values()
    )
    assert not any("depth_conv.weight" in name for name in shapes)
