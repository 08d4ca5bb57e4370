"""`kd pack` and `kd finetune` read every corpus alike: the same clips, classes, splits and known labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.pack import PackConfig, main, pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.catalog import get_task, list_tasks
from audio_datasets.tasks.task import TaskClips, read_task


def packed(source: Path, out: Path, **options: object) -> ClipStore:
    return ClipStore.open(pack(PackConfig(source, out, workers=1, **options), show_progress=False).store)


def assert_same_clips(store: ClipStore, clips: TaskClips) -> None:
    rows = np.arange(len(clips))
    assert store.clip_ids == clips.clip_ids
    assert store.class_names == clips.class_names
    assert store.is_masked == clips.is_masked
    np.testing.assert_array_equal(store.mask(rows), clips.mask(rows))
    np.testing.assert_array_equal(store.targets(rows), clips.targets(rows))
    table = store.manifest(["split", "fold", "group", "device"]).to_pylist()
    for name in ("split", "fold", "group", "device"):
        assert [row[name] for row in table] == [getattr(clip, name) for clip in clips.clips], name


@pytest.mark.parametrize("name", list_tasks())
def test_pack_and_finetune_see_the_same_task(name: str, make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    path = make_task_folder(name)
    clips, _ = read_task(get_task(name), path)
    store = packed(path, tmp_path / "clips.h5", task=name, shard_clips=4)
    assert_same_clips(store, clips)
    assert store.label_space == clips.label_space
    for row in range(len(store)):
        np.testing.assert_array_equal(store.waveform(row, 16000), clips.waveform(row, 16000))


@pytest.mark.parametrize("name", ["fsd50k", "openmic", "dcase20"])
def test_layouts_of_data_sets_are_recognised(
    name: str, make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = make_task_folder(name)
    assert main([str(path), "--out", str(tmp_path / "clips.h5"), "--workers", "1"]) == 0
    assert f"labels (layout: {name})" in capsys.readouterr().err
    store = ClipStore.open(tmp_path / "clips.h5")
    assert_same_clips(store, read_task(get_task(name), path)[0])
    assert len(store.label_space.groups) == 1
    assert not store.label_space.exclusive  # that is for --task to say


def test_a_store_of_unknown_labels_has_a_version_of_its_own(
    make_task_folder: Callable[..., Path], tmp_path: Path
) -> None:
    masked = packed(make_task_folder("openmic"), tmp_path / "masked.h5", task="openmic")
    plain = packed(make_task_folder("fsd50k"), tmp_path / "plain.h5", task="fsd50k")
    for store, version in ((masked, 3), (plain, 2)):
        assert store.contents.version == version
        assert store.is_masked == (version == 3)


def test_a_label_map_makes_classes_that_need_not_exclude_each_other(
    make_task_folder: Callable[..., Path], tmp_path: Path
) -> None:
    esc50, openmic = make_task_folder("esc50"), make_task_folder("openmic")
    (tmp_path / "map.csv").write_text("label,class\ndog,Dog\ndog,Animal\nrain,Rain\nclock_tick,Tick\n")
    store = packed(esc50, tmp_path / "mapped.h5", task="esc50", label_map=str(tmp_path / "map.csv"))
    assert not store.label_space.exclusive
    (tmp_path / "classes.txt").write_text("rain\nsnow\ndog\nclock_tick\n")
    store = packed(esc50, tmp_path / "listed.h5", task="esc50", class_names=tmp_path / "classes.txt")
    assert store.label_space.exclusive
    (tmp_path / "map.csv").write_text("label,class\naccordion,A\nbanjo,B\nbass,C\n")
    with pytest.raises(ValueError, match="--label-map cannot be used with the layout openmic"):
        packed(openmic, tmp_path / "openmic.h5", label_map=str(tmp_path / "map.csv"))
    (tmp_path / "classes.txt").write_text("flute\nbass\nbanjo\naccordion\n")
    store = packed(openmic, tmp_path / "more.h5", class_names=tmp_path / "classes.txt")
    assert not store.mask(range(len(store)))[:, 0].any()  # nobody has listened for a flute


def test_wrong_tasks_and_layouts_are_refused(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = ["--out", str(tmp_path / "clips.h5")]
    folder = str(make_task_folder("folder"))
    for options, message in (
        (["--task", "esc500"], "unknown task 'esc500'; choices: audioset"),
        (["--task", "esc50"], "Task esc50 needs a folder with meta/esc50.csv"),
        (["--layout", "kaldi"], "layout must be auto or one of ['audioset', 'dcase20', 'esc50', 'folders'"),
        (["--task", "folder", "--segments", "eval"], "--audio-root and --segments are for the layout audioset"),
    ):
        assert main([folder, *out, *options]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())
    with pytest.raises(ValueError, match="--task esc50 has its own layout; leave out --layout folders"):
        PackConfig(tmp_path, tmp_path / "clips.h5", task="esc50", layout="folders")
