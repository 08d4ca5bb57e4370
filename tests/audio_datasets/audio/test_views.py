import dataclasses

import numpy as np
import pytest

from audio_datasets.audio.views import ViewConfig, clip_code, view_stripes, view_waveform

RATE = 1000
CONFIG = ViewConfig(views=4, view_roll_seconds=0.5, view_gain_db=6.0, view_seed=3)


def test_a_view_is_made_again_from_seed_clip_and_number_alone() -> None:
    wave = np.random.default_rng(0).standard_normal(5000).astype(np.float32)

    def view(config: ViewConfig = CONFIG, clip: str = "a", number: int = 1) -> bytes:
        made = view_waveform(wave, 2000, RATE, config, clip, number)
        assert made.dtype == np.float32
        assert made.shape == (2000,)
        return made.tobytes()

    first = view()
    others = {view(clip="b"), view(number=2), view(dataclasses.replace(CONFIG, view_seed=4))}
    assert view() == first
    assert len({first, *others}) == 4


def test_a_view_is_a_part_of_the_clip_rolled_and_scaled() -> None:
    wave = np.arange(1, 5001, dtype=np.float32)
    for number in range(20):
        made = view_waveform(wave, 2000, RATE, CONFIG, "clip", number)
        steps = np.diff(made)
        scale = np.median(steps)  # neighbours of the clip differ by 1
        assert 10 ** (-6 / 20) <= scale <= 10 ** (6 / 20)
        seams = np.flatnonzero(np.abs(steps - scale) > 0.1 * scale)
        assert len(seams) <= 1  # where the roll has joined the ends
        assert len(seams) == 0 or min(seams[0] + 1, 1999 - seams[0]) <= 0.5 * RATE
        assert sorted(np.round(made / scale).astype(int)) == list(
            range(round(made.min() / scale), round(made.max() / scale) + 1)
        )


def test_starts_reach_both_ends_of_the_clip_and_do_not_depend_on_the_rate() -> None:
    still = dataclasses.replace(CONFIG, view_roll_seconds=0.0, view_gain_db=0.0)
    starts = [view_waveform(np.arange(300, dtype=np.float32), 200, 100, still, "clip", n)[0] for n in range(400)]
    assert (min(starts), max(starts)) == (0, 100)
    twice = [view_waveform(np.arange(600, dtype=np.float32), 400, 200, still, "clip", n)[0] / 2 for n in range(400)]
    np.testing.assert_allclose(starts, twice, atol=1)


def test_a_short_clip_is_padded() -> None:
    made = view_waveform(np.ones(500, np.float32), 2000, RATE, CONFIG, "clip", 0)
    assert np.count_nonzero(made) == 500


def test_stripes_are_as_wide_as_allowed_and_inside() -> None:
    config = dataclasses.replace(CONFIG, view_masked_bands=0.25, view_masked_time=0.5)
    stripes = np.array([view_stripes(config, "clip", view) for view in range(300)])
    widths = stripes[:, 1::2] - stripes[:, ::2]
    assert stripes.min() >= 0
    assert stripes.max() <= 1
    assert (widths.min(axis=0) >= 0).all()
    np.testing.assert_allclose(widths.max(axis=0), [0.25, 0.5], atol=0.02)


def test_codes_of_clips_are_63_bits_and_differ() -> None:
    codes = {clip_code(f"Y{index}") for index in range(1000)}
    assert len(codes) == 1000
    assert max(codes) < 2**63


@pytest.mark.parametrize(
    "wrong",
    [
        {"views": -1},
        {"view_seconds": 0.0},
        {"view_gain_db": -1.0},
        {"view_masked_bands": 1.0},
        {"view_masked_time": -0.1},
        {"view_seed": -1},
    ],
)
def test_settings_that_cannot_be(wrong: dict) -> None:
    with pytest.raises(ValueError, match="found"):
        ViewConfig(**wrong)
