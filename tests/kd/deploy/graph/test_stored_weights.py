"""Rounding of weights."""

import numpy as np

from kd.deploy.graph.stored_weights import quantized_rows


def test_rows_are_within_half_a_step_and_use_the_whole_range() -> None:
    values = np.random.default_rng(0).standard_normal((3, 20, 64)).astype(np.float32)
    values *= 10.0 ** np.arange(-2, 1, dtype=np.float32)[:, None, None]
    integers, scales = quantized_rows(values)
    assert integers.dtype == np.int8
    assert scales.shape == (3, 20, 1)
    assert np.abs(integers).max() == 127
    error = np.square(integers * scales - values).sum()
    plain = np.abs(values).max(-1, keepdims=True) / 127
    assert error <= 1.0001 * np.square(np.rint(values / plain) * plain - values).sum(), "worse than plain rounding"
    assert error < 1e-3 * np.square(values).sum()


def test_a_row_of_zeros_stays_zero() -> None:
    integers, scales = quantized_rows(np.zeros((2, 4), np.float32))
    assert not integers.any()
    assert np.isfinite(scales).all()
