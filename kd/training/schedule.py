"""Learning-rate schedule: exponential warm-up, constant, linear ramp down, a last phase at a small fraction.

A pure function of the epoch, so there is no scheduler state to save.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple


@dataclass(frozen=True)
class ScheduleConfig:
    """Phases of the learning rate, in epochs. A phase that is not given has the paper's share of the run.

    The DyMN paper (Section IV-A) trains 200 epochs: warm-up to epoch 8 (4 % of the run), constant to epoch 80 (40 %), a ramp
    down over 95 epochs (47.5 %), and the last 25 at 1 % of the peak.
    """

    help_title: ClassVar[str] = "Learning-rate schedule"

    warmup_epochs: float | None = None
    """Length of the exponential warm-up, in epochs."""
    ramp_down_start: float | None = None
    """Epoch at which the linear ramp down begins."""
    ramp_down_epochs: float | None = None
    """Length of the linear ramp down, in epochs."""
    last_factor: float = 0.01
    """Learning rate after the ramp down, as a fraction of the peak."""
    lr_update: Literal["epoch", "step"] = "epoch"
    """Update the learning rate after every epoch (as published) or after every step."""

    def __post_init__(self) -> None:
        for name in ("warmup_epochs", "ramp_down_start", "ramp_down_epochs"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise ValueError(f"{name} must not be negative; found {value}")
        if not 0.0 <= self.last_factor <= 1.0:
            raise ValueError(f"last_factor must lie in [0, 1]; found {self.last_factor}")


class Phases(NamedTuple):
    """Lengths and beginning of the phases, in epochs."""

    warmup_epochs: float
    ramp_down_start: float
    ramp_down_epochs: float


def phases(config: ScheduleConfig, epochs: int) -> Phases:
    """The phases of a run of so many epochs: as configured, or else the paper's shares of it."""
    return Phases(
        0.04 * epochs if config.warmup_epochs is None else config.warmup_epochs,
        0.4 * epochs if config.ramp_down_start is None else config.ramp_down_start,
        0.475 * epochs if config.ramp_down_epochs is None else config.ramp_down_epochs,
    )


def learning_rate_factor(config: ScheduleConfig, epoch: int, epoch_share: float, epochs: int) -> float:
    """Share of the peak learning rate, in (0, 1].

    Args:
        epoch: epochs that are finished.
        epoch_share: share of the running epoch that is finished, in [0, 1); used with ``lr_update="step"``.
        epochs: length of the run, from which phases that the configuration leaves out are derived.
    """
    warmup, start, length = phases(config, epochs)
    now = epoch + (epoch_share if config.lr_update == "step" else 0.0)

    factor = 1.0
    if now < warmup:
        # exp(-5 (1 - t)^2), as in Laine and Aila, "Temporal ensembling" (2017); half an epoch is the least, so that the
        # first epoch is not spent near zero.
        factor = math.exp(-5.0 * (1.0 - min(max(now, 0.5), warmup) / warmup) ** 2)
    if now > start:
        left = max(0.0, 1.0 - (now - start) / length) if length > 0 else 0.0
        factor *= config.last_factor + (1.0 - config.last_factor) * left
    return factor
