from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from accelerate.data_loader import BatchSamplerShard
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.task import TaskClips
from kd.data.sampling import (
    EpochBatches,
    SamplingConfig,
    class_frequencies,
    count_classes,
    draw_epoch,
    equal_batches,
    label_frequency_weights,
)


def test_weights_are_the_papers_formula(tiny_store: Path) -> None:
    store = ClipStore.open(tiny_store)
    rows = np.array([0, 2, 3, 7, 9])
    targets = store.targets(rows)
    counts = targets.sum(axis=0)
    expected = [sum(1000 / (100 + counts[c]) for c in np.flatnonzero(clip)) for clip in targets]
    np.testing.assert_allclose(count_classes(store, rows), counts)
    np.testing.assert_allclose(label_frequency_weights(store, rows, counts), expected)


@given(st.integers(1, 60), st.data(), st.integers(0, 2**32), st.integers(0, 500), st.booleans())
def test_an_epoch_draws_without_replacement_and_is_recreated_from_its_key(
    count: int, data: st.DataObject, seed: int, epoch: int, weighted: bool
) -> None:
    drawn = data.draw(st.integers(1, count))
    rows = np.arange(100, 100 + count)
    weights = np.linspace(1, 9, count) if weighted else None
    order = draw_epoch(rows, weights, drawn, seed, epoch)
    assert len(order) == len(set(order.tolist())) == drawn
    assert set(order.tolist()) <= set(rows.tolist())
    np.testing.assert_array_equal(order, draw_epoch(rows, weights, drawn, seed, epoch))


def test_weighted_draws_follow_the_weights_and_the_order_does_not() -> None:
    rows, weights = np.arange(4), np.array([1.0, 1.0, 2.0, 4.0])
    first = np.array([draw_epoch(rows, weights, 1, 0, epoch)[0] for epoch in range(4000)])
    np.testing.assert_allclose(np.bincount(first) / 4000, weights / weights.sum(), atol=0.03)
    # With all clips drawn, every clip is as often in the first place as any other.
    leaders = np.array([draw_epoch(rows, weights, 4, 0, epoch)[0] for epoch in range(4000)])
    np.testing.assert_allclose(np.bincount(leaders) / 4000, 0.25, atol=0.03)


def batches(store: Path, *, batch_size: int, per_step: int, clips: int | None = None, seed: int = 3) -> EpochBatches:
    opened = ClipStore.open(store)
    config = SamplingConfig(clips_per_epoch=clips)
    return EpochBatches(
        opened, np.arange(len(opened)), config, batch_size=batch_size, batches_per_step=per_step, seed=seed
    )


def test_a_step_covers_the_same_clips_however_many_processes_share_it(tiny_store: Path) -> None:
    one = [request for batch in batches(tiny_store, batch_size=6, per_step=1) for request in batch]
    three = [request for batch in batches(tiny_store, batch_size=2, per_step=3) for request in batch]
    assert one == three
    assert [request.position for request in one] == list(range(12))


def test_starting_inside_an_epoch_equals_skipping(tiny_store: Path) -> None:
    sampler = batches(tiny_store, batch_size=2, per_step=2)
    sampler.start_at(epoch=5, step=0)
    whole = list(sampler)
    sampler.start_at(epoch=5, step=2)
    assert len(sampler) == len(list(sampler)) == 2
    assert list(sampler) == whole[4:]
    sampler.start_at(epoch=6, step=0)
    assert list(sampler) != whole


def test_too_many_clips_or_too_large_a_batch_is_refused(tiny_store: Path) -> None:
    with pytest.raises(ValueError, match="clips_per_epoch is 13, but only 12"):
        batches(tiny_store, batch_size=2, per_step=1, clips=13)
    with pytest.raises(
        ValueError,
        match=r"^an epoch of 12 clips is shorter than a step of 2 batches \(processes x accumulation\) of 8 clips; "
        "give --batch-size 6 or less$",
    ):
        batches(tiny_store, batch_size=8, per_step=2)
    batches(tiny_store, batch_size=6, per_step=2)
    with pytest.raises(ValueError, match="shorter than a step of 14 clips; give --batch-size 12 or less$"):
        batches(tiny_store, batch_size=14, per_step=1)
    with pytest.raises(ValueError, match="^12 training clips per epoch are too few for a step of 7 batches"):
        batches(tiny_store, batch_size=2, per_step=7)


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 50), st.integers(0, 2**32), st.data())
@settings(max_examples=40)
def test_the_processes_share_an_epoch_exactly(
    tiny_store: Path, processes: int, accumulated: int, batch_size: int, epoch: int, seed: int, data: st.DataObject
) -> None:
    """Their shares, cut as Accelerate's loader cuts them: disjoint, together the epoch, from any step on."""
    per_step = processes * accumulated
    assume(per_step * batch_size <= 12)
    sampler = batches(tiny_store, batch_size=batch_size, per_step=per_step, seed=seed)
    first = data.draw(st.integers(0, sampler.steps_per_epoch - 1))
    sampler.start_at(epoch, first)
    shares = [
        [request for batch in BatchSamplerShard(sampler, processes, rank) for request in batch]
        for rank in range(processes)
    ]
    assert len({len(share) for share in shares}) == 1
    positions = sorted(request.position for share in shares for request in share)
    assert positions == list(range(first * per_step * batch_size, sampler.steps_per_epoch * per_step * batch_size))
    rows = [request.row for share in shares for request in share]
    assert len(set(rows)) == len(rows)

    # One process with the whole step as its batch draws the same clips at the same positions.
    alone = batches(tiny_store, batch_size=batch_size * per_step, per_step=1, seed=seed)
    alone.start_at(epoch, first)
    assert {request for batch in alone for request in batch} == {request for share in shares for request in share}


class FakeClips:
    """The targets of clips, as a sampler asks for them."""

    is_masked = False

    def __init__(self, targets: np.ndarray) -> None:
        self._targets = targets
        self.class_names = [f"class {index}" for index in range(targets.shape[1])]

    def targets(self, rows: np.ndarray) -> np.ndarray:
        return self._targets[rows]


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 40), st.integers(1, 4)), elements=st.sampled_from([0.0, 1.0])),
    st.sampled_from(["uniform", "label-frequency", "balanced"]),
    st.integers(0, 300),
    st.integers(0, 2**32),
    st.data(),
)
@settings(max_examples=60)
def test_any_sampler_any_position_any_number_of_processes(
    targets: np.ndarray, sampler: str, epoch: int, seed: int, data: st.DataObject
) -> None:
    """An epoch is a permutation; the processes' shares, in turn, are the epoch; going on equals skipping."""
    assume(sampler != "balanced" or targets.any())
    rows = np.arange(len(targets))
    processes, accumulated = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    per_step = processes * accumulated
    assume(per_step <= len(rows))
    batch_size = data.draw(st.integers(1, len(rows) // per_step))
    batches = EpochBatches(
        FakeClips(targets),
        np.arange(len(targets)),
        SamplingConfig(sampler=sampler, clips_per_epoch=len(rows)),
        batch_size=batch_size,
        batches_per_step=per_step,
        seed=seed,
    )
    batches.start_at(epoch, 0)
    whole = list(batches)
    assert len(batches) == len(whole) == len(rows) // (batch_size * per_step) * per_step
    drawn = [request.row for batch in whole for request in batch]
    assert set(drawn) <= set(rows.tolist())
    if sampler != "balanced":  # which draws with replacement
        assert len(set(drawn)) == len(drawn)
        if batch_size * per_step == len(rows):
            assert sorted(drawn) == rows.tolist()
    first = data.draw(st.integers(0, batches.steps_per_epoch))
    batches.start_at(epoch, first)
    assert list(batches) == whole[first * per_step :]
    shares = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    assert [batch for turn in zip(*shares, strict=True) for batch in turn] == whole[first * per_step :]


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 400), st.integers(2, 130), st.integers(1, 4), st.booleans())
def test_batches_are_equal_and_leave_little_over(clips: int, largest: int, per_step: int, pairs: bool) -> None:
    try:
        size = equal_batches(clips, largest, per_step, pairs)
    except ValueError:
        assert clips < 2 * per_step
        return
    assert 2 <= size <= largest
    assert not (pairs and size % 2)
    steps = clips // (size * per_step)
    assert steps >= 1
    assert clips - steps * size * per_step < 2 * steps * per_step


def test_equal_batches() -> None:
    assert equal_batches(320, 128, 1, pairs=True) == 106
    assert equal_batches(320, 32, 1, pairs=True) == 32
    assert equal_batches(129, 128, 1, pairs=True) == 64  # not 128 and 1
    with pytest.raises(ValueError, match="1 training clips are too few"):
        equal_batches(1, 8, 1, pairs=False)


def test_the_balanced_sampler_shows_all_classes_equally_often(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("common",)] * 95 + [("rare",)] * 5)
    batches = EpochBatches(
        clips, np.arange(100), SamplingConfig(sampler="balanced"), batch_size=50, batches_per_step=1, seed=0
    )
    rows = []
    for epoch in range(20):
        batches.start_at(epoch, 0)
        rows += [request.row for batch in batches for request in batch]
    assert len(rows) == 2000
    assert abs(np.mean(np.array(rows) >= 95) - 0.5) < 0.05


def partly_labelled(clips_with_labels: Callable[..., TaskClips], labelled: int, unlabelled: int) -> TaskClips:
    """Clips of two classes, and after them clips without labels."""
    labels = [("a",), ("b",)] * (labelled // 2) + [()] * unlabelled
    return clips_with_labels(labels, known=[None] * labelled + [()] * unlabelled)


@pytest.mark.parametrize("sampler", ["uniform", "label-frequency", "balanced"])
def test_every_sampler_draws_clips_without_labels(clips_with_labels: Callable[..., TaskClips], sampler: str) -> None:
    """20 clips with labels and 140 without make 16 steps of 10, not 2."""
    clips = partly_labelled(clips_with_labels, 20, 140)
    made = EpochBatches(clips, np.arange(160), SamplingConfig(sampler), batch_size=10, batches_per_step=1, seed=0)
    assert made.steps_per_epoch == 16
    rows = np.array([request.row for batch in made for request in batch])
    assert sorted(rows[rows >= 20]) == list(range(20, 160))
    if sampler != "balanced":
        assert sorted(rows[rows < 20]) == list(range(20))
    # Every batch holds its share of clips with labels.
    assert set((rows.reshape(16, 10) < 20).sum(axis=1)) == {1, 2}
    assert made.notes == [
        "an epoch shows 20 clips with labels (of 20) and 140 without (of 140); --unlabelled-per-labelled sets their ratio"
    ]


def test_many_clips_without_labels_are_shown_over_several_epochs(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = partly_labelled(clips_with_labels, 4, 100)
    config = SamplingConfig("uniform", unlabelled_per_labelled=5)
    made = EpochBatches(clips, np.arange(104), config, batch_size=6, batches_per_step=1, seed=1)
    assert made.steps_per_epoch == 4
    seen: list[int] = []
    for epoch in range(5):
        order = made.order(epoch)
        assert sorted(order[order < 4]) == [0, 1, 2, 3]
        seen += order[order >= 4].tolist()
    assert sorted(seen) == list(range(4, 104))  # each once in 5 epochs of 20
    assert made.order(5).tolist() != made.order(0).tolist()
    default = EpochBatches(clips, np.arange(104), SamplingConfig(), batch_size=4, batches_per_step=1, seed=1)
    assert default.steps_per_epoch == 8  # 4 clips with labels and 7 times as many without


def test_pairs_are_of_one_kind_and_processes_change_nothing(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = partly_labelled(clips_with_labels, 10, 30)
    options = {"config": SamplingConfig("uniform"), "seed": 2, "pairs": True}
    one = EpochBatches(clips, np.arange(40), batch_size=8, batches_per_step=1, **options)
    two = EpochBatches(clips, np.arange(40), batch_size=4, batches_per_step=2, **options)
    requests = [request for batch in one for request in batch]
    assert requests == [request for batch in two for request in batch]
    is_labelled = np.array([request.row < 10 for request in requests]).reshape(-1, 2)
    np.testing.assert_array_equal(is_labelled[:, 0], is_labelled[:, 1])
    assert is_labelled.sum() == 10


def test_an_epoch_of_few_labels_and_many_clips_shows_the_labelled_again_and_again(
    clips_with_labels: Callable[..., TaskClips],
) -> None:
    clips = partly_labelled(clips_with_labels, 4, 100)
    config = SamplingConfig("label-frequency", clips_per_epoch=40, unlabelled_per_labelled=3)
    made = EpochBatches(clips, np.arange(104), config, batch_size=10, batches_per_step=1, seed=0)
    order = made.order(0)
    assert sorted(np.bincount(order[order < 4])) == [2, 2, 3, 3]
    assert len(set(order[order >= 4])) == 30


def test_clips_with_none_of_the_classes_are_drawn_and_said(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("a",), ("b",)] * 2 + [()] * 4)
    made = EpochBatches(clips, np.arange(8), SamplingConfig(), batch_size=2, batches_per_step=1, seed=0)
    assert sorted(made.order(0)) == list(range(8))
    assert made.notes[0].startswith(
        "4 of 8 training clips have none of the classes; they are drawn as often as the average"
    )


def test_a_ratio_without_two_kinds_of_clips_is_refused(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("a",), ("b",)] * 2)
    config = SamplingConfig("uniform", unlabelled_per_labelled=2)
    with pytest.raises(ValueError, match="would not be used: no training clip is without labels"):
        EpochBatches(clips, np.arange(4), config, batch_size=2, batches_per_step=1, seed=0)


def test_class_frequencies_count_known_labels_alone(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("a",), ("a", "b"), (), ("b",)], known=[None, None, (), ("b",)])
    np.testing.assert_allclose(class_frequencies(clips, np.arange(4)), [1.0, 2 / 3])
