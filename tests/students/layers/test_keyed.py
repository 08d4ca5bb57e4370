"""Random numbers by key against SplitMix64 in plain Python; dropout masks."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from students.layers.keyed import KeyedDropout, keyed_uniform, set_sample_keys

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
    with pytest.raises(ValueError, match="sample keys must be int64"):
        set_sample_keys(dropout, torch.arange(3.0))
    with pytest.raises(ValueError, match="sample keys must be int64"):
        set_sample_keys(dropout, torch.zeros(3, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match="below 1; found 1"):
        KeyedDropout(1.0)


def test_keys_are_no_part_of_the_weights_and_copies_work() -> None:
    model = nn.Sequential(nn.Linear(2, 2), KeyedDropout(0.5))
    set_sample_keys(model, torch.arange(3))
    assert set(model.state_dict()) == {"0.weight", "0.bias"}
    assert torch.equal(copy.deepcopy(model)[1].sample_keys, torch.arange(3))
