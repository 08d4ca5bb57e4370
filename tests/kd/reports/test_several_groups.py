"""Reports of runs whose classes are in several groups."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from kd import compare, report
from kd.reports.run_reader import RunFolder

NAMES = ("cut", "wash", "knife", "pan")


def space(*exclusive: bool) -> LabelSpace:
    return LabelSpace((LabelGroup("verb", NAMES[:2], exclusive[0]), LabelGroup("noun", NAMES[2:], exclusive[1])))


@pytest.mark.parametrize("exclusive", [(True, True), (True, False), (False, False)])
def test_a_clip_has_several_labels_where_there_are_several_groups(
    exclusive: tuple[bool, bool], make_run: Callable[..., Path], tmp_path: Path
) -> None:
    """Also if the classes of each group exclude each other: a confusion matrix over all classes would mean nothing."""
    run = make_run("run", NAMES, one_label=False, metric="accuracy")
    path = run / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_groups": space(*exclusive).to_json()}))
    found = RunFolder.read(run)
    assert found.label_space == space(*exclusive)
    assert not found.one_label
    assert report.main([str(run)]) == 0
    assert all(name in (run / "report.md").read_text() for name in NAMES)
    assert compare.main([str(run), str(run), "--out", str(tmp_path / "both.html")]) == 0


def test_one_exclusive_group_is_one_label(make_run: Callable[..., Path]) -> None:
    run = make_run("run", NAMES)
    path = run / "results.json"
    groups = LabelSpace.single(NAMES, exclusive=True).to_json()
    path.write_text(json.dumps(json.loads(path.read_text()) | {"label_groups": groups}))
    assert RunFolder.read(run).one_label
