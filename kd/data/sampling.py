"""Chooses the clips of an epoch and their order, and divides them into batches.

Every process computes the same order from (seed, epoch); nothing is exchanged. Clips with labels and clips without are drawn
apart and spread evenly over the epoch, so that every batch holds both in the same proportion.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import numpy as np
from torch.utils.data import Sampler

from audio_datasets.system.randomness import generator
from kd.data.windows import Clips

ROWS_AT_A_TIME = 8_192  # bounds the memory of a pass over the targets
MOST_UNLABELLED = 7.0
"""Clips without labels drawn for each clip with labels, where there are more and nothing else is asked for. The ratio of FixMatch
(Sohn et al., 2020, Section 4)."""


@dataclass(frozen=True)
class SamplingConfig:
    """How the clips of an epoch are chosen."""

    help_title: ClassVar[str] = "Sampling"

    sampler: Literal["label-frequency", "uniform", "balanced"] = "label-frequency"
    """uniform shuffles all clips. label-frequency draws clips of rare classes more often (PaSST paper). balanced draws with
    replacement, so that all classes occur about equally often."""
    clips_per_epoch: int | None = None
    """Clips drawn per epoch (default: as many as there are; 100,000 in the papers)."""
    unlabelled_per_labelled: float | None = None
    """Clips without labels per clip with labels in a batch (default: as many as there are, at most 7)."""

    def __post_init__(self) -> None:
        if self.clips_per_epoch is not None and self.clips_per_epoch < 1:
            raise ValueError(f"clips_per_epoch must be at least 1; found {self.clips_per_epoch}")
        if self.unlabelled_per_labelled is not None and not 0 <= self.unlabelled_per_labelled < float("inf"):
            raise ValueError(f"unlabelled_per_labelled must be at least 0; found {self.unlabelled_per_labelled}")


class ClipRequest(NamedTuple):
    """One clip of an epoch; its ``position`` in the epoch keys all its random draws."""

    epoch: int
    position: int
    row: int


def chunks(rows: np.ndarray) -> Iterator[np.ndarray]:
    """``rows`` in pieces whose targets fit in memory."""
    return (rows[start : start + ROWS_AT_A_TIME] for start in range(0, len(rows), ROWS_AT_A_TIME))


def are_labelled(store: Clips, rows: np.ndarray) -> np.ndarray:
    """bool (N,): which of ``rows`` have labels, if only that a clip has none of the classes."""
    if not store.is_masked:
        return np.ones(len(rows), dtype=bool)
    return np.concatenate([store.mask(chunk).any(axis=1) for chunk in chunks(rows)] or [np.empty(0, dtype=bool)])


def labelled_rows(store: Clips, rows: np.ndarray) -> tuple[np.ndarray, int]:
    """Those of ``rows`` that have labels, and how many have none. ValueError if no clip has labels."""
    has_labels = are_labelled(store, rows)
    if not has_labels.any():
        raise ValueError(f"none of the {len(rows)} clips of {store.path} has labels")
    return rows[has_labels], int((~has_labels).sum())


def known_targets(store: Clips, rows: np.ndarray) -> np.ndarray:
    """(k, C) float32: 1.0 where it is known that a clip has the class, else 0.0."""
    targets = store.targets(rows)
    return targets * store.mask(rows) if store.is_masked else targets


def count_classes(store: Clips, rows: np.ndarray) -> np.ndarray:
    """Clips of each class among ``rows``; (C,) float64."""
    counts = (known_targets(store, chunk).sum(axis=0, dtype=np.float64) for chunk in chunks(rows))
    return sum(counts, np.zeros(len(store.class_names)))


def class_frequencies(store: Clips, rows: np.ndarray) -> np.ndarray:
    """Share of the clips that have each class, among those of ``rows`` for which that is known; (C,) float64."""
    if not store.is_masked:
        return count_classes(store, rows) / max(1, len(rows))
    known = (store.mask(chunk).sum(axis=0, dtype=np.float64) for chunk in chunks(rows))
    return count_classes(store, rows) / np.maximum(1, sum(known, np.zeros(len(store.class_names))))


def label_frequency_weights(store: Clips, rows: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Weight of each clip: the sum over its classes of 1000 / (100 + clips of that class); (N,) float64.

    From the PaSST paper's training set-up (Koutini et al., 2022). A clip that has none of the classes gets weight 0.
    """
    class_weights = 1000.0 / (100.0 + class_counts)
    return np.concatenate([known_targets(store, chunk) @ class_weights for chunk in chunks(rows)])


def balanced_clip_weights(store: Clips, rows: np.ndarray, class_counts: np.ndarray) -> np.ndarray:
    """Weight of each clip: the mean over its classes of 1 / clips of that class; (N,) float64, 0 without classes."""
    class_weights = np.divide(1.0, class_counts, out=np.zeros(len(class_counts)), where=class_counts > 0)
    weights = []
    for chunk in chunks(rows):
        targets = known_targets(store, chunk)
        weights.append(targets @ class_weights / np.maximum(targets.sum(axis=1), 1))
    return np.concatenate(weights)


def draw_with_replacement(rows: np.ndarray, weights: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """Rows of one epoch, each draw independent with probability in proportion to the weights; (clips,) int64."""
    cumulative = np.cumsum(weights)
    draws = generator(seed, "epoch order", epoch).random(clips) * cumulative[-1]
    return rows[np.minimum(np.searchsorted(cumulative, draws, side="right"), np.flatnonzero(weights)[-1])]


def draw_epoch(
    rows: np.ndarray,
    weights: np.ndarray | None,
    clips_per_epoch: int,
    seed: int,
    epoch: int,
    purpose: str = "epoch order",
) -> np.ndarray:
    """Rows of one epoch in random order, without replacement; (clips_per_epoch,) int64.

    Weighted drawing follows Efraimidis and Spirakis (2006): the clips with the smallest E / w, E ~ Exp(1), are a weighted
    sample without replacement.
    """
    order = generator(seed, purpose, epoch)
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


def draw_in_rounds(rows: np.ndarray, weights: np.ndarray | None, clips: int, seed: int, epoch: int) -> np.ndarray:
    """As ``draw_epoch``, for any number of clips: all of them again and again, each round in an order of its own."""
    rounds = [draw_epoch(rows, weights, min(clips, len(rows)), seed, epoch)]
    for start in range(len(rows), clips, len(rows)):
        purpose = f"epoch order, round {start // len(rows)}"
        rounds.append(draw_epoch(rows, weights, min(clips - start, len(rows)), seed, epoch, purpose))
    return np.concatenate(rounds)


def draw_in_passes(rows: np.ndarray, clips: int, seed: int, epoch: int) -> np.ndarray:
    """The next ``clips`` rows of endless passes over all rows, each in random order; (clips,) int64.

    Epochs that show only some of the clips so come to show all of them, none twice before the last once.
    """
    first, end = epoch * clips, (epoch + 1) * clips
    parts = []
    for number in range(first // len(rows), -(-end // len(rows))):
        order = generator(seed, "order without labels", number).permutation(len(rows))
        start = number * len(rows)
        parts.append(rows[order[max(0, first - start) : end - start]])
    return np.concatenate(parts)


class EpochBatches(Sampler[list[ClipRequest]]):
    """Batch sampler of one epoch at a time, in whole optimizer steps.

    It yields the batches of all processes in turn; Accelerate's loader gives process r every batch whose number is r
    modulo the number of processes, so a step covers the same positions however many processes share it.

    Attributes:
        labelled, unlabelled: rows of the clips that are drawn, with and without labels; int64.
        notes: what is to be said of the clips that are drawn.

    Raises:
        ValueError: more clips asked for than there are, or fewer than one step needs; a share of clips without labels where
            there are none.
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
        pairs: bool = False,
        equal: bool = False,
    ) -> None:
        """
        Args:
            batch_size: one process's.
            batches_per_step: processes times accumulated batches.
            pairs: clips 2k and 2k + 1 of a batch are mixed, and are therefore either both labelled or neither.
            equal: cut the epoch into equal batches of at most ``batch_size`` (``equal_batches``).
        """
        self.rows = np.asarray(rows, dtype=np.int64)
        self.batches_per_step = batches_per_step
        self.seed = seed
        has_labels = are_labelled(store, self.rows)
        self.labelled, self.unlabelled = self.rows[has_labels], self.rows[~has_labels]
        self.notes: list[str] = []
        self.with_replacement = config.sampler == "balanced" and len(self.labelled) > 0
        self.weights = self._weights(store, config)
        self.clips_per_epoch, share = self._size_of_epoch(config)
        self.batch_size = (
            equal_batches(self.clips_per_epoch, batch_size, batches_per_step, pairs) if equal else batch_size
        )
        self.steps_per_epoch = self.clips_per_epoch // (self.batch_size * batches_per_step)
        if self.steps_per_epoch == 0:
            raise ValueError(self._too_few_clips(pairs))
        self._unit = 2 if pairs and share not in (0.0, 1.0) else 1
        self._places = self._labelled_places(share)
        if share == 1.0 and len(self.unlabelled):
            self.notes.append(
                f"{len(self.unlabelled)} clips without labels are not shown (--unlabelled-per-labelled 0)"
            )
        elif 0.0 < share < 1.0:
            shown = self._unit * int(self._places.sum())
            self.notes.append(
                f"an epoch shows {shown} clips with labels (of {len(self.labelled)}) and "
                f"{self._unit * len(self._places) - shown} without (of {len(self.unlabelled)}); --unlabelled-per-labelled "
                "sets their ratio"
            )
        self.start_at(epoch=0, step=0)

    def _too_few_clips(self, pairs: bool) -> str:
        """What to do about an epoch that is shorter than one step."""
        of_batches = f"{self.batches_per_step} batches (processes x accumulation)"
        largest = self.clips_per_epoch // self.batches_per_step
        largest -= largest % 2 if pairs else 0
        if largest < 2:
            return f"{self.clips_per_epoch} training clips per epoch are too few for a step of {of_batches} of at least 2 clips"
        step = f"{self.batch_size} clips" if self.batches_per_step == 1 else f"{of_batches} of {self.batch_size} clips"
        return f"an epoch of {self.clips_per_epoch} clips is shorter than a step of {step}; give --batch-size {largest} or less"

    def _weights(self, store: Clips, config: SamplingConfig) -> np.ndarray | None:
        """Of each labelled clip; None for all alike. A clip with none of the classes is drawn as often as the mean of the others."""
        if config.sampler == "uniform" or not len(self.labelled):
            return None
        kinds = {"label-frequency": label_frequency_weights, "balanced": balanced_clip_weights}
        weights = kinds[config.sampler](store, self.labelled, count_classes(store, self.labelled))
        without = weights == 0
        if without.all():
            if self.with_replacement:
                raise ValueError("no training clip has a class, so the balanced sampler has nothing to draw")
            self.notes.append(f"no training clip has a class: the {config.sampler} sampler draws all alike")
            return None
        if without.any():
            weights[without] = weights[~without].mean()
            self.notes.append(
                f"{int(without.sum())} of {len(self.rows)} training clips have none of the classes; they are drawn as often as "
                "the average of the others. If their labels are only unknown, pack them so (an empty labels cell)"
            )
        return weights

    def _size_of_epoch(self, config: SamplingConfig) -> tuple[int, float]:
        """How many clips an epoch has, and the share of those that have labels."""
        labelled, unlabelled, asked = len(self.labelled), len(self.unlabelled), config.unlabelled_per_labelled
        if asked is not None and not (labelled and unlabelled):
            which = "without" if labelled else "with"
            raise ValueError(f"--unlabelled-per-labelled would not be used: no training clip is {which} labels")
        if not (labelled and unlabelled):
            share, clips = float(labelled > 0), len(self.rows)
        else:
            ratio = min(unlabelled / labelled, MOST_UNLABELLED) if asked is None else asked
            share, clips = 1 / (1 + ratio), labelled + round(ratio * labelled)
        if config.clips_per_epoch is None:
            return clips, share
        if config.clips_per_epoch > len(self.rows) and not self.with_replacement:
            raise ValueError(
                f"clips_per_epoch is {config.clips_per_epoch}, but only {len(self.rows)} training clips can be drawn "
                "(without replacement)"
            )
        return config.clips_per_epoch, share

    def _labelled_places(self, share: float) -> np.ndarray:
        """bool (clips or pairs of an epoch,): which of them have labels, evenly spread; at least one, unless no clip has labels."""
        places = self.steps_per_epoch * self.batches_per_step * self.batch_size // self._unit
        count = min(places, max(1, round(share * places))) if share else 0
        return np.diff(np.arange(places + 1) * count // places).astype(bool)

    def start_at(self, epoch: int, step: int) -> None:
        """The next iteration begins at this optimizer step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def __len__(self) -> int:
        return (self.steps_per_epoch - self.first_step) * self.batches_per_step

    def order(self, epoch: int) -> np.ndarray:
        """The rows of an epoch in their order, int64."""
        is_labelled = np.repeat(self._places, self._unit)
        if is_labelled.all():  # one draw of the whole epoch, of which what fills no step is left out
            return self._draw_labelled(self.clips_per_epoch, epoch)
        order = np.empty(len(is_labelled), dtype=np.int64)
        labelled = int(is_labelled.sum())
        if labelled:
            order[is_labelled] = self._draw_labelled(labelled, epoch)
        order[~is_labelled] = draw_in_passes(self.unlabelled, len(order) - labelled, self.seed, epoch)
        return order

    def _draw_labelled(self, clips: int, epoch: int) -> np.ndarray:
        draw = draw_with_replacement if self.with_replacement else draw_in_rounds
        return draw(self.labelled, self.weights, clips, self.seed, epoch)

    def __iter__(self) -> Iterator[list[ClipRequest]]:
        order = self.order(self.epoch)
        first = self.first_step * self.batches_per_step
        for batch in range(first, self.steps_per_epoch * self.batches_per_step):
            start = batch * self.batch_size
            yield [
                ClipRequest(self.epoch, position, int(order[position]))
                for position in range(start, start + self.batch_size)
            ]
