"""Widths and maps of the shared convolutions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from students.layers.convolutions import conv_norm_activation, make_divisible


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
