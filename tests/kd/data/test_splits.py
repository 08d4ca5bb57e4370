"""Splits: folds, shares, groups."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from audio_datasets.tasks.task import TaskClips
from kd.data.splits import partitions, stratified_share


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 9)), min_size=10, max_size=60),
    st.floats(0.1, 0.4),
)
def test_a_stratified_share_divides_no_group(
    clips_with_labels: Callable[..., TaskClips], content: list[tuple[str, bool, int]], share: float
) -> None:
    labels = [(name, "extra") if extra else (name,) for name, extra, _ in content]
    clips = clips_with_labels(labels, groups=[str(group) for *_, group in content])
    chosen = stratified_share(clips, np.arange(len(clips)), share, "test")
    groups = np.array([clip.group for clip in clips.clips])
    rest = np.setdiff1d(np.arange(len(clips)), chosen)
    assert not set(groups[chosen]) & set(groups[rest])
    assert len(rest)


def test_a_stratified_share_holds_each_class_in_proportion(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("rare",)] * 10 + [("common",)] * 90 + [("single",)])
    chosen = stratified_share(clips, np.arange(101), 0.2, "test")
    counts = dict(zip(clips.class_names, clips.targets(chosen).sum(axis=0), strict=True))
    assert counts == {"rare": 2, "common": 18, "single": 0}
    np.testing.assert_array_equal(chosen, stratified_share(clips, np.arange(101), 0.2, "test"))
    other = stratified_share(clips, np.arange(101), 0.2, "another purpose")
    assert not np.array_equal(chosen, other)


def test_folds_with_validation_clips_set_aside(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("a",), ("b",)] * 15, fold=[index // 10 for index in range(30)])
    parts, told = partitions(clips, valid_share=0.2)
    assert "cross-validation" in told
    assert [part.fold for part in parts] == [0, 1, 2]
    for part in parts:
        assert len(part.test) == 10
        assert len(part.valid) == 4
        assert len(part.train) == 16
        assert not set(part.valid) & set(part.train)


def test_clips_of_one_group_on_both_sides_are_refused(clips_with_labels: Callable[..., TaskClips]) -> None:
    clips = clips_with_labels([("a",), ("b",)] * 2, groups=["x", "x", "y", "y"], fold=[1, 2, 1, 2])
    with pytest.raises(ValueError, match=r"2 groups have clips both inside and outside the test of fold 1.*'x', 'y'"):
        partitions(clips)


def test_splits_must_be_whole(clips_with_labels: Callable[..., TaskClips]) -> None:
    with pytest.raises(ValueError, match="'clip1' has none"):
        partitions(clips_with_labels([("a",), ("b",)], split=["train", None]))
    with pytest.raises(ValueError, match="no clip to test on"):
        partitions(clips_with_labels([("a",), ("b",)], split=["train", "valid"]))


def test_clips_without_labels_train_in_every_fold_but_their_own(clips_with_labels: Callable[..., TaskClips]) -> None:
    labels = [("a",), ("b",), ("a",), ("b",), (), (), ()]
    clips = clips_with_labels(labels, fold=[1, 1, 2, 2, None, 1, 2], known=[None] * 4 + [()] * 3)
    parts, told = partitions(clips)
    assert [part.unlabelled.tolist() for part in parts] == [[4, 6], [4, 5]]
    assert [part.train.tolist() for part in parts] == [[2, 3], [0, 1]]
    assert [part.test.tolist() for part in parts] == [[0, 1], [2, 3]]
    assert told.endswith("; 3 clips without labels may train and are never tested on")


def test_no_clip_without_labels_is_tested_or_validated(clips_with_labels: Callable[..., TaskClips]) -> None:
    listed = clips_with_labels(
        [("a",), ("b",), ("a",), (), (), ()],
        split=["train", "valid", "test", None, "test", "valid"],
        known=[None] * 3 + [()] * 3,
    )
    (part,), told = partitions(listed)
    assert [rows.tolist() for rows in (part.train, part.valid, part.test, part.unlabelled)] == [[0], [1], [2], [3]]
    assert "1 clips without labels may train" in told
    assert "2 more are left out" in told

    shares = clips_with_labels([("a",), ("b",)] * 10 + [()] * 30, known=[None] * 20 + [()] * 30)
    (part,), _ = partitions(shares, test_share=0.2, valid_share=0.25)
    assert [len(rows) for rows in (part.train, part.valid, part.test, part.unlabelled)] == [12, 4, 4, 30]
    assert set(part.unlabelled) == set(range(20, 50))


def test_a_clip_without_labels_whose_group_is_tested_is_left_out(clips_with_labels: Callable[..., TaskClips]) -> None:
    labels = [("a",), ("b",), ("a",), ("b",), (), ()]
    groups = ["w", "w", "x", "x", "x", "w"]
    clips = clips_with_labels(labels, groups=groups, fold=[1, 1, 2, 2, None, None], known=[None] * 4 + [()] * 2)
    parts, _ = partitions(clips)
    assert [part.unlabelled.tolist() for part in parts] == [[4], [5]]


def test_without_any_label_there_is_nothing_to_divide(clips_with_labels: Callable[..., TaskClips]) -> None:
    with pytest.raises(ValueError, match="none of the 2 clips has a label"):
        partitions(clips_with_labels([("a",), ("b",)], known=[(), ()]))
