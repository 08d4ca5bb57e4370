"""DyMN against the reference weights, the published sizes, a plain implementation and, option by option, itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from students import create_student, load_weights
from students.families.dymn import (
    DynamicBlock,
    DynamicConv,
    DynamicReLU,
    Recalibration,
    annealed_temperature,
    set_temperature,
)
from students.interface import Student, StudentOutput
from students.profile import profile_student

# Parameters and millions of multiply-accumulates for 527 classes and 128 mels × 1000 frames.
SIZES = {
    "dymn04": ({}, 1_961_239, 117.4),
    "dymn10": ({}, 10_548_479, 581.7),
    "dymn20": ({}, 39_966_143, 2_221),
    "dymn10 replace_se": ({"dynamic_blocks": "replace_se"}, 9_833_935, 574.4),
}

# Every row of Tables II to XI that is not the proposed DyMN, under options that differ from the defaults.
ABLATIONS = {
    "static": {"dyconv": False, "dyrelu": False, "coord_attention": False},
    "no coordinate attention": {"coord_attention": False},
    "no dynamic ReLU": {"dyrelu": False},
    "no dynamic convolution": {"dyconv": False},
    "dynamic convolution alone": {"coord_attention": False, "dyrelu": False},
    "dynamic ReLU alone": {"coord_attention": False, "dyconv": False},
    "coordinate attention alone": {"dyrelu": False, "dyconv": False},
    "first5": {"dynamic_blocks": "first5"},
    "mid5": {"dynamic_blocks": "mid5"},
    "last5": {"dynamic_blocks": "last5"},
    "replace_se": {"dynamic_blocks": "replace_se"},
    "convolution at 2": {"dyconv_positions": [2]},
    "ReLU at 1": {"dyrelu_positions": [1]},
    "ReLU at 2 and 1": {"dyrelu_positions": [1, 2]},
    "ReLU at 2 and 3": {"dyrelu_positions": [2, 3]},
    "frequency alone": {"coord_axes": "f"},
    "time alone": {"coord_axes": "t"},
    "2 kernels": {"dyconv_kernels": 2},
    "6 kernels": {"dyconv_kernels": 6},
    "1 map": {"dyrelu_maps": 1},
    "3 maps": {"dyrelu_maps": 3},
    "own contexts": {"context": "own"},
    "unshared sequences": {"shared_sequences": False},
    "concatenated sequences": {"concat_pooled": True},
    "r = 8": {"context_ratio": 8},
    "r = 16": {"context_ratio": 16},
    "at least 16": {"context_min": 16},
    "at least 64": {"context_min": 64},
    "at most 64": {"context_max": 64},
    "at most 256": {"context_max": 256},
    "fully convolutional": {"head": "fully_convolutional"},
    "attention pooling": {"head": "attention_pooling"},
}


def small(**options: object) -> Student:
    torch.manual_seed(0)
    return create_student("dymn04", num_classes=4, **options)


@pytest.mark.parametrize("student", SIZES)
def test_has_the_published_size(student: str) -> None:
    options, parameters, megamacs = SIZES[student]
    with torch.device("meta"):
        profile = profile_student(create_student(student.split()[0], num_classes=527, **options))
    assert profile.parameters == parameters
    assert round(profile.macs / 1e6, 1 if isinstance(megamacs, float) else None) == megamacs


@pytest.mark.parametrize("fused", [False, True])
def test_reproduces_the_reference_for_random_weights(reference_dir: Path, fused: bool) -> None:
    reference = torch.load(reference_dir / "reference" / "dymn04_random.pt", weights_only=True)
    student = create_student("dymn04", num_classes=reference["logits"].shape[1]).eval()
    student.load_state_dict(reference["state_dict"])
    assert student.temperature == reference["temperature"]
    student = student.fuse() if fused else student
    with torch.inference_mode():
        output = student(reference["input"])
    torch.testing.assert_close(output.logits, reference["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(output.embedding, reference["embedding"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_an_ablation_changes_the_parameters_and_trains_a_step(ablation: str) -> None:
    student = small(**ABLATIONS[ablation])
    shapes = {name: tuple(parameter.shape) for name, parameter in student.named_parameters()}
    assert shapes != {name: tuple(parameter.shape) for name, parameter in small().named_parameters()}

    optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
    mel = torch.randn(2, 1, 128, 50)
    output = student(mel)
    (output.logits.square().sum() + output.embedding.square().sum()).backward()
    for name, parameter in student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    before = student.eval()(mel).logits
    optimizer.step()
    assert not torch.equal(student(mel).logits, before)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_folded_it_gives_the_same_and_so_does_a_row_of_a_batch(ablation: str, as_if_trained) -> None:
    student = as_if_trained(small(**ABLATIONS[ablation]))
    mel = torch.randn(3, 1, 128, 61)
    fused = student.fuse()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    with torch.inference_mode():
        expected = student(mel)
        assert expected.logits.std() > 0.01
        for found in (fused(mel), StudentOutput(*map(torch.cat, zip(*map(student, mel.split(1)), strict=True)))):
            for values, wanted in zip(found, expected, strict=True):
                tolerance = 1e-3 * max(
                    1.0, float(wanted.abs().max())
                )  # 1e-4 with weights that are less wild: see above
                torch.testing.assert_close(values, wanted, atol=tolerance, rtol=0)


def test_one_map_of_dynamic_relu_is_linear_and_more_are_convex() -> None:
    relu = DynamicReLU(3, context_size=8, maps=3, own_context_size=None)
    context, x, y = torch.randn(2, 8), torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    assert (relu((x + y) / 2, context) <= (relu(x, context) + relu(y, context)) / 2 + 1e-6).all()
    nn.init.zeros_(relu.coef_net[0].weight)
    nn.init.zeros_(relu.coef_net[0].bias)
    torch.testing.assert_close(relu(x, context), functional.relu(x))  # before training


# --- The block written another way -------------------------------------------------------------------------------------


def plain_block(block: DynamicBlock, x: Tensor) -> Tensor:
    """The block of Fig. 1 clip by clip, map by map, from its parameters."""
    rows = []
    generation = block.context_gen
    pooled = torch.cat((x.mean(3), x.mean(2)), dim=2)[..., None]  # (B, C, F + T, 1)
    # Statistics over the batch, so before the clips part.
    joint = functional.hardswish(generation.joint_norm(generation.joint_conv(pooled)))
    frequency, time = joint.split((x.shape[2], x.shape[3]), dim=2)
    vectors = joint.mean((2, 3))

    def convolved(conv: DynamicConv, maps: list[Tensor]) -> Tensor:
        out = []
        for one, vector in zip(maps, vectors, strict=True):
            logits = conv.residuals[0](vector) / conv.temperature
            weights = logits.exp() / logits.exp().sum()
            kernel = sum(
                weight * one_kernel.view(conv.kernel_shape)
                for weight, one_kernel in zip(weights, conv.weight[0, 0], strict=True)
            )
            groups = one.shape[1] // kernel.shape[1]
            out.append(functional.conv2d(one, kernel, None, conv.stride, kernel.shape[-1] // 2, 1, groups))
        return torch.cat(out)

    y = x
    if block.exp_conv is not None:
        y = block.exp_norm(convolved(block.exp_conv, y.split(1)))
        y = functional.relu(y) if isinstance(block.exp_act, nn.ReLU) else functional.hardswish(y)
    y = block.depth_norm(convolved(block.depth_conv, y.split(1)))
    for index, vector in enumerate(vectors):
        theta = 2 * torch.sigmoid(block.depth_act.coef_net(vector)).view(-1, 4) - 1
        slope, intercept = theta[:, :2] + torch.tensor([1.0, 0.0]), theta[:, 2:] / 2
        maps = y[index][:, None] * slope[:, :, None, None] + intercept[:, :, None, None]  # (C, M, F, T)
        stride = block.depth_conv.stride
        pool = (lambda s: functional.avg_pool1d(s, 3, 2, 1)) if stride == 2 else (lambda s: s)
        weights_f = (generation.conv_f.weight[:, :, 0, 0] @ pool(frequency[index, :, :, 0][None])[0]).T
        weights_t = (generation.conv_t.weight[:, :, 0, 0] @ pool(time[index, :, :, 0][None])[0]).T
        gate_f = torch.sigmoid(weights_f + generation.conv_f.bias).T[:, :, None]
        gate_t = torch.sigmoid(weights_t + generation.conv_t.bias).T[:, None]
        rows.append(maps.amax(1) * gate_f * gate_t)
    y = block.proj_norm(convolved(block.proj_conv, [row[None] for row in rows]))
    return x + y if block.has_residual else y


@pytest.mark.parametrize("place", [0, 1, 2, 8, 12, 13])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("training", [False, True])
def test_the_block_agrees_with_one_written_clip_by_clip(place: int, batch: int, training: bool, as_if_trained) -> None:
    student = as_if_trained(small())
    block = student.layers[place].train(training)
    set_temperature(student, 3.0)
    nn.init.normal_(block.context_gen.conv_f.bias)
    x = torch.randn(batch, block.context_gen.joint_conv.in_channels, 13, 18)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    state = {name: value.clone() for name, value in block.state_dict().items()}
    outputs, gradients, statistics = [], [], []
    for function, one in zip((block, lambda one: plain_block(block, one)), inputs, strict=True):
        block.load_state_dict(state)
        output = function(one)
        block.zero_grad()
        output.sin().sum().backward()
        outputs.append(output.detach())
        gradients.append([one.grad, *(parameter.grad.clone() for parameter in block.parameters())])
        statistics.append([value.clone() for value in block.buffers()])
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-4, rtol=1e-3)
    for names_gradients in zip(*gradients, strict=True):
        torch.testing.assert_close(*names_gradients, atol=1e-3, rtol=1e-3)
    for pair in zip(*statistics, strict=True):
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-3)
    with torch.no_grad():  # another path, in place
        block.load_state_dict(state)
        torch.testing.assert_close(block(x.clone()), outputs[0], atol=1e-4, rtol=1e-3)


# --- Temperature -------------------------------------------------------------------------------------------------------


def test_temperature_falls_linearly_and_stays() -> None:
    assert [annealed_temperature(epoch) for epoch in (0, 15, 30, 200)] == [30.0, 15.5, 1.0, 1.0]
    assert annealed_temperature(7, end=10.0, epochs=0) == 10.0
    assert small(temperature=2.0, temperature_start=12.0, temperature_epochs=10).temperature_at(5) == 7.0
    assert small(temperature=10.0, temperature_epochs=0).temperature_at(0) == 10.0


def test_temperature_evens_out_the_kernels(as_if_trained) -> None:
    student, mel = as_if_trained(small()), torch.randn(2, 1, 128, 64)
    assert student.temperature == 1.0
    context = torch.randn(5, student.layers[3].proj_conv.residuals[0].in_features)
    sharp = student.layers[3].proj_conv.attention(context)
    before = student(mel).logits
    student.temperature = 30.0
    assert student.temperature == 30.0
    even = student.layers[3].proj_conv.attention(context)
    torch.testing.assert_close(even.sum(1), torch.ones(5))
    assert (even - 0.25).abs().max() < (sharp - 0.25).abs().max() / 10
    assert not torch.allclose(student(mel).logits, before, rtol=1e-4)
    set_temperature(create_student("mn01", num_classes=2), 30.0)  # has none: nothing to set
    with pytest.raises(ValueError, match="above 0; found 0"):
        set_temperature(student, 0.0)


def test_temperature_is_an_option_and_not_a_weight() -> None:
    student = small(temperature=10.0)
    assert student.temperature == 10.0
    assert not any("temperature" in name for name in student.state_dict())


# --- The rest ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dynamic_blocks": "some"}, "unknown dynamic_blocks 'some'; choices: all, replace_se, first5"),
        ({"context": "none"}, "unknown context 'none'; choices: shared, own"),
        ({"coord_axes": "tf"}, "unknown coord_axes 'tf'; choices: ft, f, t"),
        ({"dyconv_positions": []}, "dyconv_positions must be one or more of 1, 2, 3"),
        ({"dyrelu_positions": [2, 4]}, "dyrelu_positions must be one or more of 1, 2, 3"),
        ({"dyrelu_positions": 2}, "value of the wrong type"),
        ({"dyconv": 1}, "dyconv must be true or false"),
        ({"dyconv_kernels": 0}, "dyconv_kernels must be a whole number above 0"),
        ({"context_min": 200}, "context_min must be at most context_max; found 200 and 128"),
        ({"temperature": 0}, "temperature must be above 0"),
        ({"temperature_epochs": -1}, "temperature_epochs must be a whole number, 0 or more"),
        ({"width": 0}, "width must be above 0"),
        ({"head": "pyramid"}, "unknown head"),
    ],
)
def test_a_value_that_is_not_allowed_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_student("dymn04", num_classes=2, **options)


def test_a_hook_can_take_hold_of_each_dynamic_part(as_if_trained) -> None:
    """What looking inside a trained student needs: kernel logits, coefficients and recalibration weights come by modules."""
    student, mel = as_if_trained(small()), torch.randn(2, 1, 128, 64)
    before = student(mel).logits
    kinds = {
        DynamicConv: lambda module: module.residuals[0].register_forward_hook(lambda *a: a[2].flip(1)),
        DynamicReLU: lambda module: module.coef_net.register_forward_hook(lambda *a: a[2].flip(1)),
        Recalibration: lambda module: module.register_forward_pre_hook(lambda m, a: (a[0], a[1].flip(1), a[2].flip(1))),
    }
    for kind, register in kinds.items():
        hooks = [register(module) for module in student.modules() if isinstance(module, kind)]
        assert hooks
        assert not torch.allclose(student(mel).logits, before)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(student(mel).logits, before)


def test_a_fresh_one_treats_clips_alike_and_learns() -> None:
    """Kernels and slopes that were drawn for each clip at random would keep it from learning (a loss of 2 and more)."""
    torch.manual_seed(0)
    student = create_student("dymn04", num_classes=4, width=0.2).train()
    contexts = torch.rand(5, 200)
    for module in student.modules():
        if isinstance(module, DynamicConv):
            attention = module.attention(contexts[:, : module.residuals[0].in_features])
            torch.testing.assert_close(attention, torch.full_like(attention, 1 / module.kernels), atol=0.2, rtol=0)
    mel, classes = torch.randn(16, 1, 128, 60), torch.arange(16) % 4
    mel += torch.linspace(-1, 1, 128).view(1, 1, -1, 1) * (classes.view(-1, 1, 1, 1) - 1.5)
    optimizer = torch.optim.Adam(student.parameters(), lr=1e-3)
    for _ in range(15):
        loss = functional.cross_entropy(student(mel).logits, classes)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5


def test_context_convolutions_that_a_public_checkpoint_holds_without_attention_are_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Public checkpoints trained without coordinate attention still hold its two convolutions."""
    source = create_student("dymn04", 3, coord_attention=False)
    with_attention = create_student("dymn04", 3).state_dict()
    unused = {name: value for name, value in with_attention.items() if "conv_f." in name or "conv_t." in name}
    assert len(unused) == 15 * 4
    torch.save(source.state_dict() | unused, tmp_path / "public.pt")
    student = create_student("dymn04", 3, coord_attention=False)
    load_weights(student, tmp_path / "public.pt")
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in source.state_dict().items())
    assert "do not use them: layers.0.context_gen.conv_f.bias" in caplog.text
    assert "and 57 more" in caplog.text
    # What another switched-off part leaves unused is not known, and stays an error.
    torch.save(source.state_dict() | unused | {"layers.3.context_gen.other": torch.ones(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"not in the student: .*"):
        load_weights(student, tmp_path / "other.pt")


def test_a_block_without_dynamic_parts_passes_over_its_whole_context(tmp_path: Path) -> None:
    static = {"coord_attention": False, "dyconv": False, "dyrelu": False}
    source = create_student("dymn04", 3, **static)
    whole = create_student("dymn04", 3).state_dict()
    context = {name: value for name, value in whole.items() if ".context_gen." in name}
    torch.save(source.state_dict() | context, tmp_path / "static.pt")
    student = create_student("dymn04", 3, **static)
    load_weights(student, tmp_path / "static.pt")
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in source.state_dict().items())
