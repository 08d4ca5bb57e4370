"""Which clips an epoch shows, in which order, and how the order is cut into batches.

Every process computes the same order from (seed, epoch); nothing is exchanged.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from audio_datasets.system.randomness import generator
from kd.data.windows import Clips

ROWS_AT_A_TIME = 8_192  # bounds the memory of a pass over the targets


@dataclass(frozen=True)
class SamplingConfig:
    """How the clips of an epoch are chosen."""

    help_title: ClassVar[str] = "Sampling"

    sampler: Literal["label-frequency", "uniform", "balanced"] = "label-frequency"
    """uniform shuffles all clips. label-frequency draws clips of rare classes more often (PaSST paper). balanced draws with
    replacement, so that all classes occur about equally often."""
    clips_per_epoch: int | None = None
    """Clips drawn per epoch (default: as many as there are; 100,000 in the papers)."""

    def __post_init__(self) -> None:
        if self.clips_per_epoch is not None and self.clips_per_epoch < 1:
            raise ValueError(f"clips_per_epoch must be at least 1; found {self.clips_per_epoch}")


class ClipRequest(NamedTuple):
    """One clip of an epoch; ``position`` in the epoch keys every random draw made for it."""

    epoch: int
    position: int
    row: int


def chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in pieces whose targets fit in memory."""
    return (rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME))


def count_classes(store: Clips, rows: np.ndarray) -> np.ndarray:
    """Clips of each class among ``rows``; (C,) float64."""
    return sum(
        (store.targets(chunk).sum(axis=0, dtype=np.float64) for chunk in chunks(rows)), np.zeros(len(store.class_names))
    )


def label_frequency_weights(store: Clips, rows: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Weight of each clip: the sum over its classes of 1000 / (100 + clips of that class); (N,) float64.

    From the PaSST paper's training set-up (Koutini et al., 2022). A clip without labels gets weight 0.
    """
    class_weights = 1000.0 / (100.0 + class_counts)
    return np.concatenate([store.targets(chunk) @ class_weights for chunk in chunks(rows)])


def balanced_clip_weights(store: Clips, rows: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Weight of each clip: the mean over its classes of 1 / clips of that class; (N,) float64, 0 without labels."""
    class_weights = np.divide(1.0, class_counts, out=np.zeros(len(class_counts)), where=class_counts > 0)
    weights = []
    for chunk in chunks(rows):
        targets = store.targets(chunk)
        weights.append(targets @ class_weights / np.maximum(targets.sum(axis=1), 1))
    return np.concatenate(weights)


def draw_with_replacement(rows: np.ndarray, weights: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch, each draw independent with probability in proportion to the weights; (clips,) int64."""
    cumulative = np.cumsum(weights)
    draws = generator(seed, "epoch order", epoch).random(clips) * cumulative[-1]
    return rows[np.minimum(np.searchsorted(cumulative, draws, side="right"), np.flatnonzero(weights)[-1])]


def draw_epoch(rows: np.ndarray, weights: np.ndarray | None, clips_per_epoch: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch in random order, without replacement; (clips_per_epoch,) int64.

    Weighted drawing follows Efraimidis and Spirakis (2006): the clips with the smallest E / w, E ~ Exp(1), are a weighted
    sample without replacement.
    """
    order = generator(seed, "epoch order", epoch)
    if weights is None:
        return rows[order.permutation(len(rows))[:clips_per_epoch]]
    with np.errstate(divide="ignore"):
        arrival = order.exponential(size=len(rows)) / weights
    chosen = np.argpartition(arrival, clips_per_epoch - 1)[:clips_per_epoch] if clips_per_epoch < len(rows) else None
    chosen = np.arange(len(rows)) if chosen is None else np.sort(chosen)
    return rows[order.permutation(chosen)]


def equal_batches(clips: int, largest: int, batches_per_step: int, pairs: bool) -> int:
    """The batch size that cuts an epoch into equal batches of at most ``largest``, nearly all clips taking part.

    A batch of what is left over would be small, at worst one clip, from which batch norm learns nothing or fails. 320
    clips in batches of at most 128 make three of 106. Clips that do not fit are others in every epoch.

    Args:
        batches_per_step: processes times accumulated batches.
        pairs: whether a batch must be even, since clips are mixed in pairs.

    Raises:
        ValueError: fewer clips than a step needs.
    """
    fewest_steps = -(-clips // (largest * batches_per_step))
    for steps in range(fewest_steps, 0, -1):
        size = min(largest, clips // (steps * batches_per_step))
        size -= size % 2 if pairs else 0
        if size >= 2:
            return size
    raise ValueError(
        f"{clips} training clips are too few: {batches_per_step} batches (processes x accumulation) of at least 2 clips are "
        "needed"
    )


class EpochBatches(Sampler[list[ClipRequest]]):
    """Batch sampler of one epoch at a time, in whole optimizer steps.

    It yields the batches of all processes in turn; Accelerate's loader gives process r every batch whose number is r
    modulo the number of processes, so a step covers the same positions however many processes share it.

    Raises:
        ValueError: more clips asked for than there are (with a positive weight), or fewer than one step needs.
    """

    drop_last = True

    def __init__(
        self,
        store: Clips,
        rows: np.ndarray,
        config: SamplingConfig,
        *,
        batch_size: int,
        batches_per_step: int,
        seed: int,
    ) -> None:
        """``batches_per_step``: processes times accumulated batches; ``batch_size`` is one process's."""
        self.rows = np.asarray(rows, dtype=np.int64)
        self.batch_size = batch_size
        self.batches_per_step = batches_per_step
        self.seed = seed
        self.class_counts = count_classes(store, self.rows)
        self.weights = None
        if config.sampler == "label-frequency":
            self.weights = label_frequency_weights(store, self.rows, self.class_counts)
        elif config.sampler == "balanced":
            self.weights = balanced_clip_weights(store, self.rows, self.class_counts)
            if not self.weights.any():
                raise ValueError("no training clip has a label, so the balanced sampler has nothing to draw")
        self.with_replacement = config.sampler == "balanced"
        available = len(self.rows) if self.weights is None else int((self.weights > 0).sum())
        self.clips_per_epoch = available if config.clips_per_epoch is None else config.clips_per_epoch
        if self.with_replacement:
            self.clips_per_epoch = config.clips_per_epoch or len(self.rows)
        elif self.clips_per_epoch > available:
            raise ValueError(
                f"clips_per_epoch is {self.clips_per_epoch}, but only {available} of {len(self.rows)} training clips can "
                "be drawn (without replacement; clips without labels are never drawn by the label-frequency sampler)"
            )
        self.steps_per_epoch = self.clips_per_epoch // (batch_size * batches_per_step)
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"an epoch of {self.clips_per_epoch} clips is less than one step of {batch_size} clips x "
                f"{batches_per_step} batches (processes x accumulation); lower the batch size"
            )
        self.start_at(epoch=0, step=0)

    def start_at(self, epoch: int, step: int) -> None:
        """The next iteration begins at this optimizer step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.batches_per_step

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        draw = draw_with_replacement if self.with_replacement else draw_epoch
        order = draw(self.rows, self.weights, self.clips_per_epoch, self.seed, self.epoch)
        first = self.first_step * self.batches_per_step
        for batch in range(first, self.steps_per_epoch * self.batches_per_step):
            start = batch * self.batch_size
            yield [
                ClipRequest(self.epoch, position, int(order[position]))
                for position in range(start, start + self.batch_size)
            ]
