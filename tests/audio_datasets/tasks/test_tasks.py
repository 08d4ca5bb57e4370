"""The fine-tuning tasks: every official layout with its awkward parts, and what is said of a wrong one."""

import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.tasks.catalog import get_task, list_tasks
from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import MissingAudio, TaskClips, read_task


def read(name: str, path: Path, missing_audio: MissingAudio = "refuse") -> TaskClips:
    return read_task(get_task(name), path, missing_audio)[0]


def in_split(clips: TaskClips, split: str) -> list[str]:
    return [clip.clip_id for clip in clips.clips if clip.split == split]


def test_esc50(make_task_folder: Callable[..., Path]) -> None:
    clips = read("esc50", make_task_folder("esc50"))
    assert clips.class_names == ("dog", "rain", "clock_tick")
    assert len(clips) == 18
    assert sorted({clip.fold for clip in clips.clips}) == [1, 2, 3]
    # Found although it is Ogg and the list says WAV, by the id that `kd pack` gives it.
    assert clips.clips[0].path.suffix == ".ogg"
    assert clips.clip_id(0) == "1-1000-A-0"
    assert clips.clips[0].group == clips.clips[1].group == "1000"
    assert len(clips.waveform(0, 32000)) == 16000
    np.testing.assert_array_equal(clips.targets([0, 2])[:, :2], [[1, 0], [0, 1]])
    assert clips.label_space.exclusive


def test_fsd50k(make_task_folder: Callable[..., Path]) -> None:
    clips = read("fsd50k", make_task_folder("fsd50k"))
    assert in_split(clips, "train") == ["64760", "16399", "16401", "16402"]
    assert in_split(clips, "valid") == ["345111", "389607"]
    assert in_split(clips, "test") == ["37199", "175151", "253463"]
    np.testing.assert_array_equal(clips.targets(clips.rows(["16399", "37199"])), [[1, 1, 0], [1, 0, 1]])
    assert clips.duration_seconds(clips.rows(["253463"])[0]) == 30.0
    assert not clips.label_space.exclusive


@pytest.mark.parametrize("keys_as_objects", [True, False])
def test_openmic(make_task_folder: Callable[..., Path], keys_as_objects: bool) -> None:
    clips = read("openmic", make_task_folder("openmic", keys_as_objects=keys_as_objects))
    assert len(clips) == 7  # one sample is in no partition
    assert in_split(clips, "test") == ["001001_0", "001002_0", "001003_0"]
    np.testing.assert_array_equal(clips.targets([0, 1]), [[1, 0, 0], [0, 1, 0]])
    np.testing.assert_array_equal(clips.mask([0, 1]), [[True, True, False], [False, True, True]])
    assert clips.is_masked
    assert len(clips.waveform(0, 32000)) > 0


def test_openmic_labels_are_known_only_above_a_half(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("openmic")
    with np.load(folder / "openmic-2018.npz", allow_pickle=True) as arrays:
        content = dict(arrays)
    content["Y_true"][0, 0] = 0.5
    np.savez(folder / "openmic-2018.npz", **content)
    clips = read("openmic", folder)
    assert clips.targets([0])[0, 0] == 0
    assert clips.mask([0])[0, 0]


def test_openmic_runs_nothing_that_its_archive_holds(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder, trace = make_task_folder("openmic"), tmp_path / "was run"

    class Malicious:
        def __reduce__(self) -> tuple:
            return Path.touch, (trace,)

    archive = folder / "openmic-2018.npz"
    rewritten = folder / "rewritten.npz"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(rewritten, "w") as new:
        for name in old.namelist():
            data = old.read(name)
            if name == "sample_key.npy":
                header = data[: data.index(b"\n") + 1]
                data = header + pickle.dumps(np.array([Malicious()], dtype=object))
            new.writestr(name, data)
    shutil.move(rewritten, archive)
    with pytest.raises(ValueError, match=r"would call .*nothing was executed"):
        read("openmic", folder)
    assert not trace.exists()


def test_dcase20(make_task_folder: Callable[..., Path]) -> None:
    clips = read("dcase20", make_task_folder("dcase20"))
    assert clips.class_names == ("airport", "bus")
    assert len(in_split(clips, "train")) == 8
    assert len(in_split(clips, "test")) == 6
    assert {clip.device for clip in clips.clips if clip.split == "train"} == {"a", "s1"}
    assert {clip.device for clip in clips.clips if clip.split == "test"} == {"a", "s1", "s4"}
    assert clips.clips[0].group == "barcelona-0"


def test_own_folder(make_task_folder: Callable[..., Path]) -> None:
    clips, notes = read_task(get_task("folder"), make_task_folder("folder"))
    assert clips.class_names == ("fan", "pump")
    assert clips.clip_id(1) == "fan/take 1.mp3"
    assert any("single-label" in note for note in notes)
    for row in range(len(clips)):
        assert abs(len(clips.waveform(row, 16000)) / 16000 - clips.duration_seconds(row)) < 0.1


def test_own_manifest(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("folder")
    file = folder / "list.csv"
    file.write_text(
        "clip_id,path,labels,split,group\n"
        "a,fan/take 0.wav,fan,train,x\n"
        "b,fan/take 1.mp3,fan;loud,val,y\n"
        "c,pump/take 0.wav,,eval,\n"
    )
    clips, notes = read_task(get_task("manifest"), file)
    assert [clip.split for clip in clips.clips] == ["train", "valid", "test"]
    assert [clip.group for clip in clips.clips] == ["x", "y", None]
    np.testing.assert_array_equal(clips.targets([0, 1, 2]), [[1, 0], [1, 1], [0, 0]])
    assert any("multi-label, since clip 'b' has 2 labels" in note for note in notes)


def test_a_part_of_a_long_clip_equals_that_part_of_the_whole(make_task_folder: Callable[..., Path]) -> None:
    clips = read("fsd50k", make_task_folder("fsd50k"))
    row = clips.rows(["253463"])[0]
    whole = clips.waveform(row, 32000)
    part = clips.waveform(row, 32000, start_seconds=12.5, seconds=2.0)
    np.testing.assert_array_equal(part, whole[400_000:464_000])


def test_missing_audio_is_named_and_can_be_left_out(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("esc50")
    (folder / "audio" / "1-1000-B-0.wav").unlink()
    with pytest.raises(ValueError, match=r"1 of 18 audio files are missing.*1-1000-B-0"):
        read("esc50", folder)
    clips, notes = read_task(get_task("esc50"), folder, "leave-out")
    assert len(clips) == 17
    assert any("left out" in note for note in notes)


EXPECTED = {
    "audioset": "class_labels_indices.csv",
    "esc50": "meta/esc50.csv",
    "fsd50k": "FSD50K.ground_truth",
    "openmic": "openmic-2018.npz",
    "dcase20": "evaluation_setup",
    "folder": "sub-folder per class",
    "manifest": "clip_id, path, labels",
    "panns": "class_labels_indices.csv",
}


@pytest.mark.parametrize("name", list_tasks())
def test_a_wrong_folder_is_told_what_was_expected_where(name: str, tmp_path: Path) -> None:
    assert name in EXPECTED
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=str(path)) as raised:
            read(name, path)
        assert EXPECTED[name] in str(raised.value)
        assert f"Task {name} needs" in str(raised.value)


def test_labels_outside_the_vocabulary_are_named(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("fsd50k")
    dev = folder / "FSD50K.ground_truth" / "dev.csv"
    dev.write_text(dev.read_text().replace("Bark,Accordion", "Bark,Yodelling"))
    with pytest.raises(ValueError, match=r"'16399'.*'Yodelling'.*'Accordion'"):
        read("fsd50k", folder)


def test_ids_that_repeat_are_refused(tmp_path: Path) -> None:
    clip = Clip("a", tmp_path / "a.wav", ("dog",))
    with pytest.raises(ValueError, match=r"more than once: 'a'"):
        TaskClips(tmp_path, ("dog",), [clip, clip])


def test_a_list_names_no_files_outside_of_its_folder(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("folder")
    names = ["fan/take 0.wav", "pump/take 0.wav", str(folder / "fan" / "take 1.mp3"), "../folder/pump/take 1.mp3"]
    rows = [f"{index},{name},{('fan', 'pump')[index % 2]}" for index, name in enumerate(names)]
    for number, count in enumerate((0, 1, 2)):
        file = folder / f"{number}.csv"
        file.write_text("\n".join(["clip_id,path,labels", *rows[: 2 + count]]) + "\n")
        if count == 0:
            assert len(read("manifest", file)) == 2
            continue
        moved = folder / "lists" / file.name
        moved.parent.mkdir(exist_ok=True)
        file.rename(moved)
        with pytest.raises(ValueError, match=r"files outside of its own folder.*--allow-outside"):
            read("manifest", moved)
    assert len(read_task(get_task("manifest"), folder / "0.csv", allow_outside=True)[0]) == 2
    esc50 = make_task_folder("esc50")
    table = esc50 / "meta" / "esc50.csv"
    table.write_text(table.read_text().replace("1-1000-B-0.wav", "../../folder/fan/take 0.wav"))
    with pytest.raises(ValueError, match="names 1 files outside of its own folder"):
        read("esc50", esc50)


def test_what_cannot_be_a_file_name_is_refused_by_name(make_task_folder: Callable[..., Path]) -> None:
    folder = make_task_folder("fsd50k")
    table = folder / "FSD50K.ground_truth" / "dev.csv"
    good = table.read_text()
    for name in ("../../secret", "/etc/passwd", "", ".."):
        table.write_text(good.replace("64760", name, 1))
        with pytest.raises(ValueError, match=f"can hold no file that is called '{name}'"):
            read("fsd50k", folder)
    own = make_task_folder("folder")
    (own / "fan" / "take\x1b 9.wav").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"take\\x1b 9\.wav' \(the name holds a control character"):
        read("folder", own)
