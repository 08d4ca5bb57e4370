"""Learning-rate schedule: exponential warm-up, constant, linear ramp down, and a last phase at a small fraction of the peak.

It is a pure function of the epoch, so there is no scheduler state to save.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple


@dataclass(frozen=True)
class ScheduleConfig:
    """Phases of the learning rate, in epochs. Phases that are not given take the same share of the run as in the paper.

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
    """Lengths and starting points of the phases, in epochs."""

    warmup_epochs: float
    ramp_down_start: float
    ramp_down_epochs: float


def phases(config: ScheduleConfig, epochs: int) -> Phases:
    """The phases of a run of this length: as configured, otherwise with the paper's shares."""
    return Phases(
        0.04 * epochs if config.warmup_epochs is None else config.warmup_epochs,
        0.4 * epochs if config.ramp_down_start is None else config.ramp_down_start,
        0.475 * epochs if config.ramp_down_epochs is None else config.ramp_down_epochs,
    )


def learning_rate_factor(config: ScheduleConfig, epoch: int, epoch_share: float, epochs: int) -> float:
    """The learning rate as a fraction of its peak, in (0, 1].

    Args:
        epoch: number of finished epochs.
        epoch_share: finished share of the current epoch, in [0, 1); used with ``lr_update="step"``.
        epochs: length of the run. Phases that are not configured are derived from it.
    """
    warmup, start, length = phases(config, epochs)
    now = epoch + (epoch_share if config.lr_update == "step" else 0.0)

    factor = 1.0
    if now < warmup:
        # exp(-5 (1 - t)^2), as in Laine and Aila, "Temporal ensembling" (2017). t starts at half an epoch, so that the first
        # epoch is not wasted at a learning rate near zero.
        factor = math.exp(-5.0 * (1.0 - min(max(now, 0.5), warmup) / warmup) ** 2)
    if now > start:
        left = max(0.0, 1.0 - (now - start) / length) if length > 0 else 0.0
        factor *= config.last_factor + (1.0 - config.last_factor) * left
    return factor
