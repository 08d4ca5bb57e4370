"""Layers against the same thing written another way."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from students.layers.blocks import (
    AttentionPoolingHead,
    ConcurrentSqueezeExcitation,
    KeyedDropout,
    SqueezeExcitation,
    conv_norm_activation,
    fully_convolutional_head,
    keyed_uniform,
    make_divisible,
    mlp_head,
    set_sample_keys,
)

MASK_64 = (1 << 64) - 1


def splitmix(word: int) -> int:
    """SplitMix64's output function with Python's unbounded integers."""
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK_64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK_64
    return word ^ (word >> 31)


@given(st.integers(-(2**63), 2**63 - 1), st.integers(0, 50), st.integers(1, 9))
@settings(deadline=None, max_examples=50)
def test_keyed_numbers_are_the_hash_they_claim_to_be(key: int, stream: int, count: int) -> None:
    gamma = 0x9E3779B97F4A7C15
    state = splitmix((key + gamma * (stream + 1)) & MASK_64)
    expected = [(splitmix((state + gamma * column) & MASK_64) >> 40) / 2**24 for column in range(1, count + 1)]
    assert keyed_uniform(torch.tensor([key]), stream, count)[0].tolist() == expected


def test_keyed_numbers_are_uniform_and_not_correlated() -> None:
    numbers = keyed_uniform(torch.arange(400), 0, 500).double().numpy()
    assert abs(numbers.mean() - 0.5) < 0.003
    assert abs(numbers.var() - 1 / 12) < 0.001
    counts, _ = np.histogram(numbers, bins=64, range=(0, 1))
    assert np.abs(counts / numbers.size * 64 - 1).max() < 0.08
    for first, second in [
        (numbers[:-1], numbers[1:]),  # neighbouring keys
        (numbers[:, :-1], numbers[:, 1:]),  # neighbouring features
        (numbers, keyed_uniform(torch.arange(400), 1, 500).double().numpy()),  # neighbouring layers
    ]:
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.01


def test_a_mask_depends_on_its_sample_and_not_on_the_batch() -> None:
    dropout = KeyedDropout(0.4)
    x = torch.ones(4, 3, 50)
    set_sample_keys(dropout, torch.tensor([11, 12, 13, 14]))
    together = dropout(x)
    torch.manual_seed(1)
    set_sample_keys(dropout, torch.tensor([13]))
    assert torch.equal(dropout(x[:1]), together[2:3])
    set_sample_keys(dropout, torch.tensor([14, 11]))
    assert torch.equal(dropout(x[:2]), together[[3, 0]])
    assert not torch.equal(together[0], together[1])
    assert together.unique().tolist() == pytest.approx([0.0, 1 / 0.6])


def test_dropout_layers_of_one_model_drop_different_features() -> None:
    model = nn.Sequential(KeyedDropout(0.5), nn.Identity(), KeyedDropout(0.5))
    set_sample_keys(model, torch.tensor([5]))
    x = torch.ones(1, 64)
    assert not torch.equal(model[0](x), model[2](x))


def test_dropout_keeps_the_mean_and_masks_the_gradient() -> None:
    dropout = KeyedDropout(0.3)
    set_sample_keys(dropout, torch.arange(200))
    x = torch.ones(200, 300, requires_grad=True)
    y = dropout(x)
    assert y.mean().item() == pytest.approx(1.0, abs=0.01)
    y.sum().backward()
    assert torch.equal(x.grad, y.detach())


def test_dropout_without_keys_is_the_usual_one() -> None:
    dropout = KeyedDropout(0.5)
    x = torch.ones(8, 100)
    set_sample_keys(dropout, torch.arange(8))
    set_sample_keys(dropout, None)
    torch.manual_seed(3)
    dropped = dropout(x)
    torch.manual_seed(3)
    assert torch.equal(dropped, nn.functional.dropout(x, 0.5))
    assert torch.equal(dropout.eval()(x), x)
    assert torch.equal(KeyedDropout(0.0)(x), x)


def test_wrong_keys_are_refused() -> None:
    dropout = KeyedDropout(0.5)
    set_sample_keys(dropout, torch.arange(3))
    with pytest.raises(ValueError, match="3 sample keys were set for a batch of 2"):
        dropout(torch.ones(2, 5))
    with pytest.raises(ValueError, match="sample keys are int64"):
        set_sample_keys(dropout, torch.arange(3.0))
    with pytest.raises(ValueError, match="sample keys are int64"):
        set_sample_keys(dropout, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="below 1; found 1"):
        KeyedDropout(1.0)


def test_keys_are_no_part_of_the_weights_and_copies_work() -> None:
    model = nn.Sequential(nn.Linear(2, 2), KeyedDropout(0.5))
    set_sample_keys(model, torch.arange(3))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(copy.deepcopy(model)[1].sample_keys, torch.arange(3))


def expected_weights(layer: SqueezeExcitation, x: np.ndarray, axis: int) -> np.ndarray:
    squeezed = x.mean(axis=tuple({1, 2, 3} - {axis}))
    hidden = np.maximum(squeezed @ layer.fc1.weight.detach().numpy().T + layer.fc1.bias.detach().numpy(), 0)
    logits = hidden @ layer.fc2.weight.detach().numpy().T + layer.fc2.bias.detach().numpy()
    return np.expand_dims(1 / (1 + np.exp(-logits)), tuple({1, 2, 3} - {axis}))


@pytest.mark.parametrize("aggregation", ["max", "avg", "add", "min"])
@pytest.mark.parametrize("axes", ["c", "f", "t", "cf", "ct", "ft", "cft"])
def test_squeeze_excitation_is_its_formula(axes: str, aggregation: str) -> None:
    torch.manual_seed(0)
    sizes = (24, 10, 13)
    module = ConcurrentSqueezeExcitation(axes, aggregation, 4, sizes)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(3, *sizes)
    outputs = [
        x.numpy() * expected_weights(layer, x.numpy(), 1 + "cft".index(axis))
        for axis, layer in zip(axes, module.conc_se_layers, strict=True)
    ]
    combine = {"max": np.maximum.reduce, "min": np.minimum.reduce, "add": sum, "avg": lambda o: sum(o) / len(o)}
    np.testing.assert_allclose(module(x).detach().numpy(), combine[aggregation](outputs), atol=1e-5)


def test_squeeze_excitation_over_time_takes_other_lengths() -> None:
    layer = SqueezeExcitation("t", 12, 8)
    nominal = torch.randn(2, 4, 5, 12)
    # A clip that is stretched exactly twice, by repetition, squeezes to the same vector up to interpolation.
    constant = nominal.mean((1, 2, 3), keepdim=True).expand(-1, 4, 5, 12)
    longer = constant[..., :1].expand(-1, 4, 5, 24)
    weights = layer.weights(longer)
    assert weights.shape == (2, 24)
    resampled = nn.functional.interpolate(layer.weights(constant)[:, None], size=24, mode="linear")[:, 0]
    torch.testing.assert_close(weights, resampled)
    for frames in (1, 2, 11, 13, 300):
        assert layer(torch.randn(1, 4, 5, frames)).shape == (1, 4, 5, frames)


def test_fully_convolutional_head_is_the_mean_of_frame_scores() -> None:
    head = fully_convolutional_head(6, 3).eval()
    nn.init.normal_(head[1].running_mean)
    nn.init.uniform_(head[1].running_var, 0.5, 2.0)
    x = torch.randn(2, 6, 4, 5)
    positions = x.flatten(2).mean(2)  # linear up to the mean, so the mean may come first
    scores = positions @ head[0].weight.detach()[:, :, 0, 0].T
    expected = (scores - head[1].running_mean) / torch.sqrt(head[1].running_var + 1e-3)
    torch.testing.assert_close(head(x), expected)


def test_mlp_head_is_its_formula() -> None:
    head = mlp_head(6, 8, 3, dropout=0.2).eval()
    x = torch.randn(2, 6, 4, 5)
    hidden = x.mean((2, 3)) @ head[2].weight.T + head[2].bias
    hidden = hidden * (hidden + 3).clamp(0, 6) / 6
    torch.testing.assert_close(head(x), hidden @ head[5].weight.T + head[5].bias)


def test_attention_pooling_is_its_formula() -> None:
    torch.manual_seed(0)
    batch, channels, frequencies, frames, heads, classes = 2, 6, 3, 7, 4, 5
    head = AttentionPoolingHead(channels, classes, heads)
    nn.init.normal_(head.subspace_proj.weight)
    nn.init.normal_(head.head_weight)
    x = torch.randn(batch, channels, frequencies, frames)
    expected = torch.zeros(batch, classes)
    weight, bias = head.subspace_proj.weight, head.subspace_proj.bias
    for b in range(batch):
        for h in range(heads):
            for k in range(classes):
                attention_row, value_row = h * classes + k, (heads + h) * classes + k
                frame_vectors = x[b].mean(1).T  # (frames, channels)
                attention = torch.sigmoid(frame_vectors @ weight[attention_row] + bias[attention_row])
                attention = attention.clamp(1e-7, 1 - 1e-7)
                value = frame_vectors @ weight[value_row] + bias[value_row]
                expected[b, k] += head.head_weight[0, h, 0] * (attention / attention.sum() * value).sum()
    torch.testing.assert_close(head(x), expected, atol=1e-5, rtol=1e-4)


def test_attention_that_vanishes_everywhere_becomes_a_mean() -> None:
    head = AttentionPoolingHead(2, 1, heads=1)
    nn.init.zeros_(head.subspace_proj.weight)
    with torch.no_grad():
        head.subspace_proj.bias.copy_(torch.tensor([-1e4, 3.0]))
    assert head(torch.randn(1, 2, 2, 9)).item() == pytest.approx(3.0)


@pytest.mark.parametrize(
    ("value", "rounded"),
    [(1.6, 8), (8, 8), (8.8, 8), (11.9, 16), (18, 24), (28.8, 32), (67.2, 64), (68, 72), (1280, 1280)],
)
def test_widths_are_rounded_as_in_the_mobilenet_papers(value: float, rounded: int) -> None:
    assert make_divisible(value) == rounded


@given(st.floats(0.1, 5000))
def test_a_rounded_width_is_near(value: float) -> None:
    rounded = make_divisible(value)
    assert rounded % 8 == 0
    assert rounded >= 0.9 * value
    assert rounded <= max(8, value + 8)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolution_blocks_keep_or_halve_the_map(kernel: int, stride: int) -> None:
    block = conv_norm_activation(2, 4, kernel=kernel, stride=stride, groups=2, activation=nn.ReLU)
    assert block(torch.randn(1, 2, 9, 14)).shape == (1, 4, -(-9 // stride), -(-14 // stride))
    assert block[0].bias is None
    assert (block[1].eps, block[1].momentum) == (1e-3, 0.01)
