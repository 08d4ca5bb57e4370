"""Squeeze-excitation against its formula in NumPy."""

import numpy as np
import pytest
import torch
from torch import nn

from students.layers.squeeze_excitation import ConcurrentSqueezeExcitation, SqueezeExcitation


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
