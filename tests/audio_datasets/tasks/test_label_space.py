"""What classes mean together: groups, their columns, their targets and their JSON."""

import json

import numpy as np
import pytest

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace

VERBS = LabelGroup("verb", ("open", "shut"), exclusive=True)
NOUNS = LabelGroup("noun", ("door", "tap", "lid"), exclusive=True)
EXTRAS = LabelGroup("extra", ("loud", "far"), exclusive=False)
SPACE = LabelSpace((VERBS, NOUNS, EXTRAS))

IDS = ["a", "b", "c"]
TARGETS = np.array(
    [
        # open shut door tap lid loud far
        [1, 0, 0, 1, 0, 1, 1],
        [0, 1, 1, 0, 0, 0, 0],
        [1, 0, 0, 0, 1, 1, 0],
    ],
    dtype=bool,
)


def test_columns_follow_one_another_in_the_order_of_the_groups() -> None:
    names = np.array(SPACE.class_names)
    for group, columns in SPACE.parts():
        assert tuple(names[columns]) == group.class_names
        assert SPACE.columns(group) == columns
    assert [columns.stop for _, columns in SPACE.parts()] == list(np.cumsum([2, 3, 2]))
    # A group that was read again from a file is the same one.
    assert SPACE.columns(LabelGroup("noun", ("door", "tap", "lid"), exclusive=True)) == slice(2, 5)
    with pytest.raises(ValueError, match="no such label group: 'noun'"):
        SPACE.columns(LabelGroup("noun", ("door", "tap"), exclusive=True))


def test_a_space_is_exclusive_if_all_of_its_groups_are() -> None:
    assert LabelSpace((VERBS, NOUNS)).exclusive
    assert not SPACE.exclusive
    assert LabelSpace.single(["a", "b"], exclusive=True).exclusive
    assert LabelSpace.single(iter(["a", "b"]), exclusive=False).groups == (LabelGroup("", ("a", "b"), False),)


@pytest.mark.parametrize("space", [SPACE, LabelSpace((VERBS,)), LabelSpace.single(("hum, low", "Ö"), exclusive=True)])
def test_json_gives_the_same_space_again(space: LabelSpace) -> None:
    assert LabelSpace.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ((), "groups need different names"),
        ((VERBS, VERBS), r"found \['verb', 'verb'\]"),
        ((VERBS, LabelGroup("", ("x",), True)), "groups need different names"),
        ((VERBS, LabelGroup("other", ("open",), True)), "open"),
    ],
)
def test_groups_that_cannot_be_told_apart_are_refused(groups: tuple[LabelGroup, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelSpace(groups)


def test_a_group_without_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="label group 'verb' has no classes"):
        LabelGroup("verb", (), exclusive=True)


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        "verb",
        [],
        ["verb"],
        [{"name": "verb"}],
        [{"name": "verb", "class_names": 3, "exclusive": True}],
        [{"name": "verb", "class_names": ["a"]}],
    ],
)
def test_json_that_is_no_label_space_is_refused(content: object) -> None:
    with pytest.raises(ValueError, match="label groups|groups need different names"):
        LabelSpace.from_json(content)


def everything_known() -> np.ndarray:
    return np.ones(TARGETS.shape, dtype=bool)


def test_targets_with_one_class_of_each_exclusive_group_pass() -> None:
    SPACE.check_targets(TARGETS, everything_known(), IDS, "the list")
    # Other groups may have any number, also none; what is not known does not count.
    nothing = TARGETS.copy()
    nothing[:, 5:] = False
    SPACE.check_targets(nothing, everything_known(), IDS, "the list")
    unknown = everything_known()
    unknown[1, 3] = False
    twice = TARGETS.copy()
    twice[1, 2:5] = True
    SPACE.check_targets(twice, unknown, IDS, "the list")


@pytest.mark.parametrize(
    ("row", "columns", "value", "message"),
    [
        (1, slice(0, 2), True, r"the list: .* exactly one label of verb; clip 'b' has \['open', 'shut'\]"),
        (2, slice(2, 5), False, r"the list: .* exactly one label of noun; clip 'c' has \[\]"),
    ],
)
def test_more_or_fewer_classes_are_refused_with_the_clip(row: int, columns: slice, value: bool, message: str) -> None:
    targets = TARGETS.copy()
    targets[row, columns] = value
    with pytest.raises(ValueError, match=message):
        SPACE.check_targets(targets, everything_known(), IDS, "the list")
    single = LabelSpace.single(SPACE.class_names, exclusive=True)
    with pytest.raises(ValueError, match="exactly one label; clip 'a' has"):
        single.check_targets(TARGETS, everything_known(), IDS, "the list")
