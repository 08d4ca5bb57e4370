import math

import pytest

from kd.training.schedule import ScheduleConfig, learning_rate_factor

PAPER = ScheduleConfig(warmup_epochs=8, ramp_down_start=80, ramp_down_epochs=95)


@pytest.mark.parametrize(
    ("epoch", "expected"),
    [
        (0, math.exp(-5 * (1 - 0.5 / 8) ** 2)),
        (4, math.exp(-5 * 0.25)),
        (8, 1.0),
        (80, 1.0),
        (127, 0.01 + 0.99 * (175 - 127) / 95),
        (175, 0.01),
        (199, 0.01),
    ],
)
def test_the_papers_phases(epoch: int, expected: float) -> None:
    assert learning_rate_factor(PAPER, epoch, 0.0, epochs=200) == pytest.approx(expected)


def test_phases_left_out_are_the_papers_shares() -> None:
    for epoch in range(200):
        assert learning_rate_factor(ScheduleConfig(), epoch, 0.0, 200) == pytest.approx(
            learning_rate_factor(PAPER, epoch, 0.0, 200)
        )


def test_the_rate_changes_inside_an_epoch_only_if_asked() -> None:
    per_step = ScheduleConfig(8, 80, 95, lr_update="step")
    assert learning_rate_factor(PAPER, 100, 0.9, 200) == learning_rate_factor(PAPER, 100, 0.0, 200)
    assert learning_rate_factor(per_step, 100, 0.9, 200) < learning_rate_factor(per_step, 100, 0.0, 200)


@pytest.mark.parametrize("wrong", [{"warmup_epochs": -1}, {"last_factor": 1.5}])
def test_wrong_values_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScheduleConfig(**wrong)


def test_no_phase_of_length_zero_divides_by_zero() -> None:
    config = ScheduleConfig(warmup_epochs=0, ramp_down_start=0, ramp_down_epochs=0)
    assert learning_rate_factor(config, 0, 0.0, 10) == 1.0
    assert learning_rate_factor(config, 5, 0.0, 10) == 0.01
