import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta

from audio_datasets.audio.augment import (
    AugmentConfig,
    augment_waveform,
    both_of_pair,
    draw_mix_weight,
    mix_with_partner,
)
from audio_datasets.system.randomness import generator


@given(st.integers(1, 6), st.integers(0, 2**32))
def test_mixing_is_the_weighted_mean_of_neighbours(pairs: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    values = torch.rand(2 * pairs, 1, 3, 4, generator=rng)
    weight = torch.rand(2 * pairs, generator=rng)
    mixed = mix_with_partner(values, weight)
    for index in range(2 * pairs):
        expected = weight[index] * values[index] + (1 - weight[index]) * values[index ^ 1]
        torch.testing.assert_close(mixed[index], expected)


def test_mixing_does_not_depend_on_how_the_batch_is_cut() -> None:
    values, weight = torch.rand(8, 5), torch.rand(8)
    whole = mix_with_partner(values, weight)
    parts = [mix_with_partner(values[at : at + 2], weight[at : at + 2]) for at in range(0, 8, 2)]
    assert torch.equal(whole, torch.cat(parts))


def test_both_of_pair() -> None:
    flags = torch.tensor([True, True, True, False, False, False])
    assert both_of_pair(flags).tolist() == [True, True, False, False, False, False]


@given(st.integers(0, 2**40), st.integers(0, 1000), st.integers(0, 10**7))
def test_mix_weight_is_the_larger_part_and_recreated_from_its_key(seed: int, epoch: int, position: int) -> None:
    weight = draw_mix_weight(seed, epoch, position, 0.3)
    assert 0.5 <= weight <= 1.0
    assert weight == draw_mix_weight(seed, epoch, position, 0.3)


def test_mix_weights_follow_the_beta_distribution() -> None:
    weights = np.array([draw_mix_weight(1, 0, position, 0.3) for position in range(2000)])
    quantiles = beta.ppf((np.arange(10_000) + 0.5) / 10_000, 0.3, 0.3)
    expected = np.maximum(quantiles, 1 - quantiles).mean()
    assert weights.mean() == pytest.approx(expected, abs=0.02)
    assert draw_mix_weight(1, 0, 0, 0.0) == 1.0


def test_waveform_augmentation_pads_rolls_and_changes_the_gain() -> None:
    wave = np.arange(1, 101, dtype=np.float32)
    plain = augment_waveform(wave, 150, 100, AugmentConfig(), generator(0, "waveform"))
    assert plain.shape == (150,)
    np.testing.assert_array_equal(plain[:100], wave)
    assert not plain[100:].any()

    louder = augment_waveform(wave, 100, 100, AugmentConfig(gain_db=6), generator(0, "waveform"))
    ratio = louder / wave
    assert ratio.max() == pytest.approx(ratio.min())
    assert 10 ** (-6 / 20) <= ratio[0] <= 10 ** (6 / 20)
    assert ratio[0] != 1

    rolled = augment_waveform(wave, 100, 100, AugmentConfig(roll_seconds=0.5), generator(0, "waveform"))
    assert sorted(rolled) == sorted(wave)
    assert (rolled != wave).any()


@pytest.mark.parametrize("wrong", [{"mixup_alpha": -0.1}, {"gain_db": -1}, {"roll_seconds": -1}])
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        AugmentConfig(**wrong)
