"""Tasks by name, layouts that are recognised, and tasks from modules of the user."""

import itertools
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.tasks.catalog import get_task, list_tasks, read_listing, task_of_layout
from audio_datasets.tasks.task import read_task


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_sources_in_no_known_layout_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file or folder"):
        read_listing(tmp_path / "absent")
    with pytest.raises(ValueError, match="none of the known layouts"):
        read_listing(tmp_path)
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        read_listing(touch(tmp_path / "list.txt"))
    with pytest.raises(ValueError, match="meta/esc50"):
        read_listing(tmp_path, "esc50")
    with pytest.raises(ValueError, match="layout must be"):
        read_listing(tmp_path, "kaldi")
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match="no audio files"):
        read_listing(tmp_path)


def test_an_unknown_task_lists_the_choices() -> None:
    with pytest.raises(ValueError, match=r"esc500.*audioset, dcase20, esc50, folder, fsd50k, manifest, openmic, panns"):
        get_task("esc500")


@pytest.mark.parametrize("name", list_tasks())
def test_every_layout_is_recognised(name: str, make_task_folder: Callable[..., Path]) -> None:
    path = make_task_folder(name)
    assert task_of_layout(path).name == name
    layout = {"folder": "folders"}.get(name, name)
    assert read_listing(path) == read_listing(path, layout)
    assert read_listing(path).layout == layout


def test_a_folder_in_two_layouts_is_refused(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("esc50")
    shutil.copytree(make_task_folder("fsd50k"), folder, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="matches the layouts of esc50 and fsd50k; choose one with --layout"):
        read_listing(folder)
    assert len(read_listing(folder, "esc50").clips) == 18


OWN_TASK = """
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace
from audio_datasets.tasks.listing import Clip, Listing
from audio_datasets.tasks.task import Task

SPACE = LabelSpace((LabelGroup("verb", ("open", "shut"), True), LabelGroup("noun", ("door", "tap"), True)))


def read(folder):
    clips = []
    for file in sorted(folder.glob("*.wav")):
        verb, noun, number = file.stem.split("-")
        clips.append(Clip(file.stem, file, (verb, noun), split="train" if int(number) < 2 else "test"))
    return Listing(SPACE.class_names, tuple(clips), label_space=SPACE)


KITCHEN = Task("kitchen", "Kitchen", "my own", "mine", "a folder with VERB-NOUN-NUMBER.wav", read)
"""


def test_a_task_from_a_module_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kitchen_sounds.py").write_text(OWN_TASK)
    for verb, noun in itertools.product(("open", "shut"), ("door", "tap")):
        for number in range(3):
            touch(tmp_path / "sounds" / f"{verb}-{noun}-{number}.wav")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    task = get_task("kitchen_sounds:KITCHEN")
    clips, _ = read_task(task, tmp_path / "sounds")
    assert [group.name for group in clips.label_space.groups] == ["verb", "noun"]
    assert clips.label_space.exclusive
    np.testing.assert_array_equal(clips.targets(clips.rows(["open-tap-1"])), [[1, 0, 0, 1]])
    touch(tmp_path / "sounds" / "open-open-3.wav")
    with pytest.raises(ValueError, match="exactly one label of noun; clip 'open-open-3' has"):
        read_task(task, tmp_path / "sounds")
    for name, message in {
        "kitchen_sounds:read": "read must be a Task; kitchen_sounds has a function of that name",
        "kitchen_sounds:BATH": "BATH must be a Task; kitchen_sounds has nothing of that name",
        "bath_sounds:BATH": "there is no module 'bath_sounds'",
        "../x:BATH": "expected module:NAME",
        "kitchen_sounds:": "expected module:NAME",
    }.items():
        with pytest.raises(ValueError, match=message):
            get_task(name)
