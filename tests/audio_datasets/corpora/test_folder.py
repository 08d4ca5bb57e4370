"""Own sounds in one folder per class."""

import os
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.audio.codec import encode
from audio_datasets.audio.impulse_responses import load_impulse_responses
from audio_datasets.pack import PackConfig, main, pack
from audio_datasets.stores.class_lists import read_class_names
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.catalog import get_task, read_listing
from audio_datasets.tasks.listing import describe
from audio_datasets.tasks.task import read_task
from audio_datasets.tasks.unlabelled import SoundFolder


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_one_folder_per_class(tmp_path: Path) -> None:
    for name in (
        "dog/b.WAV",
        "dog/more/a.mp3",
        "cat/a.flac",
        ".hidden/x.wav",
        "dog/.x.wav",
        "dog/notes.txt",
        "top.wav",
    ):
        touch(tmp_path / name)
    source = read_listing(tmp_path)
    assert source.layout == "folders"
    assert [clip.clip_id for clip in source.clips] == ["cat/a.flac", "dog/b.WAV", "dog/more/a.mp3"]
    assert [clip.labels for clip in source.clips] == [("cat",), ("dog",), ("dog",)]
    assert source.class_names == ("cat", "dog")
    assert set(source.ignored) == {"dog/notes.txt", "top.wav"}
    assert "skipped 2 files: 1 .txt, 1 .wav (audio, but not where the layout has clips)" in describe(source)


def test_folders_for_unknown_labels_and_for_none_of_the_classes(tmp_path: Path) -> None:
    for name in ("dog/a.wav", "cat/b.wav", "unlabelled/c.wav", "unlabelled/far/d.wav", "(none)/e.wav"):
        touch(tmp_path / name)
    source = read_listing(tmp_path)
    assert source.class_names == ("cat", "dog")
    found = {clip.clip_id: (clip.labels, clip.is_labelled) for clip in source.clips}
    assert found == {
        "dog/a.wav": (("dog",), True),
        "cat/b.wav": (("cat",), True),
        "unlabelled/c.wav": ((), False),
        "unlabelled/far/d.wav": ((), False),
        "(none)/e.wav": ((), True),
    }
    assert "2 of 5 clips have unknown labels" in source.notes[0]


def labels_of(folder: Path) -> dict[str, tuple[str, ...]]:
    return {clip.clip_id: clip.labels for clip in read_listing(folder).clips}


# -- Symbolic links ----------------------------------------------------------------------------------------------------


def test_links_to_folders_and_files_are_followed(tmp_path: Path) -> None:
    elsewhere = touch(tmp_path / "elsewhere" / "deep" / "b.wav").parents[1]
    touch(tmp_path / "sounds" / "dog" / "a.wav")
    (tmp_path / "sounds" / "cat").symlink_to(elsewhere)
    (tmp_path / "sounds" / "dog" / "linked.wav").symlink_to(elsewhere / "deep" / "b.wav")
    found = {"cat/deep/b.wav": ("cat",), "dog/a.wav": ("dog",), "dog/linked.wav": ("dog",)}
    assert labels_of(tmp_path / "sounds") == found
    touch(tmp_path / "splits" / "test" / "dog" / "c.wav")
    (tmp_path / "splits" / "train").symlink_to(tmp_path / "sounds")
    assert labels_of(tmp_path / "splits") == {f"train/{name}": labels for name, labels in found.items()} | {
        "test/dog/c.wav": ("dog",)
    }


def test_links_are_followed_wherever_sounds_are_looked_for(tmp_path: Path) -> None:
    touch(tmp_path / "elsewhere" / "a.wav").write_bytes(_wav())
    (tmp_path / "sounds").mkdir()
    (tmp_path / "sounds" / "more").symlink_to(tmp_path / "elsewhere")
    assert len(load_impulse_responses(tmp_path / "sounds", 8000)) == 1
    (tmp_path / "sounds" / "gone.wav").symlink_to("nowhere")
    unlabelled = SoundFolder(tmp_path / "sounds", ("dog", "cat"))
    assert unlabelled.clip_ids == ["more/a.wav"]
    assert "1 file or folder cannot be used: 'gone.wav' (the symbolic link leads nowhere" in unlabelled.note


def test_links_in_circles_end(tmp_path: Path) -> None:
    touch(tmp_path / "dog" / "a.wav")
    touch(tmp_path / "cat" / "b.wav")
    (tmp_path / "dog" / "again").symlink_to(tmp_path / "dog")
    (tmp_path / "dog" / "all").symlink_to(tmp_path)
    (tmp_path / "cat" / "dogs").symlink_to(tmp_path / "dog")  # not read yet for this class
    source = read_listing(tmp_path)
    assert [clip.clip_id for clip in source.clips] == ["cat/b.wav", "cat/dogs/a.wav", "dog/a.wav"]
    (note,) = [note for note in source.notes if "not entered" in note]
    assert "'cat/dogs/again'" in note
    assert "'cat/dogs/all'" in note
    assert "2 more" not in note


def test_links_that_lead_nowhere_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds = tmp_path / "sounds"
    for name in ("dog/a.wav", "cat/b.wav"):
        touch(sounds / name).write_bytes(_wav())
    (sounds / "cow").symlink_to(tmp_path / "gone")
    (sounds / "dog" / "c.wav").symlink_to("gone.wav")
    (sounds / "dog" / "notes.txt").symlink_to("gone.txt")  # no clip either way
    source = read_listing(sounds)
    assert [name for name, _ in source.unusable] == ["cow", "dog/c.wav"]
    with pytest.raises(ValueError, match=r"2 files or folders cannot be used: 'cow' \(the symbolic link leads nowhere"):
        pack(PackConfig(sounds, tmp_path / "clips.h5", on_bad_clip="refuse"), show_progress=False)
    assert main([str(sounds), "--out", str(tmp_path / "clips.h5"), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    assert "skipped dog/c.wav: the symbolic link leads nowhere (to 'gone.wav')" in output
    assert "packed: 2 clips" in output
    assert "(2 skipped: 1 .wav, 1 without a suffix)" in output
    assert [line.split("\t")[0] for line in (tmp_path / "clips.skipped.txt").read_text().splitlines()] == [
        "cow",
        "dog/c.wav",
    ]
    with pytest.raises(ValueError, match=r"'cow' .* --on-bad-clip skip"):
        read_task(get_task("folder"), sounds)
    clips, notes = read_task(get_task("folder"), sounds, on_bad_clip="skip")
    assert clips.clip_ids == ["cat/b.wav", "dog/a.wav"]
    assert "'dog/c.wav' (the symbolic link leads nowhere" in notes[0]


def test_a_folder_that_may_not_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dog/a.wav", "cat/b.wav", "cat/closed/c.wav"):
        touch(tmp_path / name)
    scandir = os.scandir

    def guarded(path: Path) -> object:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", guarded)
    source = read_listing(tmp_path)
    assert len(source.clips) == 2
    assert source.unusable == (("cat/closed", "the folder cannot be opened: Permission denied"),)


# -- Splits, flat folders, empty folders -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("train", "test"), ("train", "test")),
        (("Training", "validation", "eval"), ("train", "valid", "test")),
        (("train", "val", "evaluation"), ("train", "valid", "test")),
        (("train", "dev", "test"), ("train", "valid", "test")),
        (("dev", "eval"), ("train", "test")),  # as in FSD50K, where dev is all that is not eval
    ],
)
def test_split_folders_with_class_folders_inside(tmp_path: Path, folders: tuple, splits: tuple) -> None:
    for folder in folders:
        for name in ("dog/a.wav", "cat/b.wav"):
            touch(tmp_path / folder / name)
    source = read_listing(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert source.layout == "split folders"
    found = {clip.clip_id: (clip.labels, clip.split) for clip in source.clips}
    for folder, split in zip(folders, splits, strict=True):
        assert found[f"{folder}/dog/a.wav"] == (("dog",), split)
        assert f"{folder!r} is {split}" in source.notes[0]
    clips, notes = read_task(get_task("folder"), tmp_path)
    assert {clip.split for clip in clips.clips} == set(splits)
    assert any("the folders at the top are splits" in note for note in notes)


def test_a_class_that_a_split_lacks_and_empty_class_folders_are_named(tmp_path: Path) -> None:
    for name in ("train/dog/a.wav", "train/cat/b.wav", "test/dog/c.wav", "test/cow/d.wav", "unlabelled/e.wav"):
        touch(tmp_path / name)
    touch(tmp_path / "train" / "cow" / "notes.txt")
    touch(tmp_path / "train" / "stray.wav")
    source = read_listing(tmp_path)
    assert source.class_names == ("cat", "cow", "dog")
    notes = "\n".join(source.notes)
    assert "no clips in train of 1 of 3 classes: 'cow'" in notes
    assert "no clips in test of 1 of 3 classes: 'cat'" in notes
    assert "1 folder without audio: 'train/cow'" in notes
    assert source.ignored == ("train/cow/notes.txt", "train/stray.wav")
    (unlabelled,) = [clip for clip in source.clips if not clip.is_labelled]
    assert (unlabelled.clip_id, unlabelled.split) == ("unlabelled/e.wav", "train")


def test_an_empty_class_folder_is_named(tmp_path: Path) -> None:
    touch(tmp_path / "dog" / "a.wav")
    touch(tmp_path / "cat" / "b.wav")
    (tmp_path / "cow" / "empty").mkdir(parents=True)
    source = read_listing(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert any("1 folder without audio" in note and "'cow'" in note for note in source.notes)


@pytest.mark.parametrize(
    ("names", "warning"),
    [
        (("train/a.wav", "test/b.wav"), "'test', 'train' are taken as classes, and look like splits"),
        (("en/a.wav", "de-AT/b.wav"), "'de-AT', 'en' are taken as classes, and look like languages"),
        (("farm/dog/a.wav", "city/dog/b.wav"), r"hold folders of the same names \('dog'\); if those are the classes"),
    ],
)
def test_folders_that_may_not_be_classes_are_warned_of(tmp_path: Path, names: tuple, warning: str) -> None:
    for name in names:
        touch(tmp_path / name)
    source = read_listing(tmp_path)
    assert len(source.class_names) == 2
    with pytest.raises(AssertionError, match=warning):
        assert not source.notes


@pytest.mark.parametrize(
    "names", [("dog/a.wav", "train/b.wav", "cat/c.wav"), ("yes/a.wav", "no/b.wav"), ("a/x/1.wav", "b/y/2.wav")]
)
def test_ordinary_classes_are_not_warned_of(tmp_path: Path, names: tuple) -> None:
    for name in names:
        touch(tmp_path / name)
    assert read_listing(tmp_path).notes == ()


def test_a_flat_folder_is_told_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index in range(1_001):
        touch(tmp_path / "flat" / f"{index}.wav")
    says = r"holds 1,001 audio files side by side, and no folders that say which class .*\(as dog/one\.wav, .*clip_id, path, labels"
    with pytest.raises(ValueError, match=says):
        read_listing(tmp_path / "flat")
    with pytest.raises(ValueError, match=says):
        read_task(get_task("folder"), tmp_path / "flat")
    assert main([str(tmp_path / "flat"), "--out", str(tmp_path / "clips.h5")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    touch(tmp_path / "flat" / "labels.csv")
    with pytest.raises(ValueError, match=r"or give the list itself .*flat/labels\.csv"):
        read_listing(tmp_path / "flat")
    touch(tmp_path / "odd" / "dog" / "a.xyz")
    with pytest.raises(ValueError, match=r"has no audio files in folders named like classes .*; found 1 \.xyz"):
        read_listing(tmp_path / "odd")


# -- Names -------------------------------------------------------------------------------------------------------------


def _wav(index: int = 0) -> bytes:
    return encode(0.1 * generator(5, "folder test", 0, index).standard_normal(800).astype(np.float32), 8000, "flac")


PRINTABLE = [
    "a\u00a0b",  # no-break space
    "a\u202fb",  # narrow no-break space, as in macOS's screenshots
    "a\u3000b",  # ideographic space
    "می\u200cروم",  # Persian, with a zero-width non-joiner
    "क्\u200dष",  # Devanagari, with a zero-width joiner
    "👩\u200d🚒",
    "\U0001fae9",  # newer than Python 3.11
    "\uf8ff",  # private use
]


@pytest.mark.parametrize("name", PRINTABLE)
def test_any_printable_name_is_a_name(tmp_path: Path, name: str) -> None:
    touch(tmp_path / "sounds" / name / f"{name}.flac").write_bytes(_wav())
    touch(tmp_path / "sounds" / "dog" / "a.flac").write_bytes(_wav(1))
    result = pack(PackConfig(tmp_path / "sounds", tmp_path / "clips.h5", workers=1), show_progress=False)
    assert not result.skipped
    store = ClipStore.open(result.store)
    assert set(store.clip_ids) == {f"{name}/{name}.flac", "dog/a.flac"}
    assert set(store.class_names) == {name, "dog"}
    assert store.targets(store.rows([f"{name}/{name}.flac"]))[0, store.class_names.index(name)] == 1
    (tmp_path / "classes.txt").write_text(f"{name}\ndog\n", encoding="utf-8")
    assert read_class_names(tmp_path / "classes.txt") == (name, "dog")


def test_a_broken_clip_is_listed_under_its_exact_name(tmp_path: Path) -> None:
    names = [f"dog/{name}.flac" for name in PRINTABLE]
    for name in names:
        touch(tmp_path / "sounds" / name)
    touch(tmp_path / "sounds" / "cat" / "a.flac").write_bytes(_wav())
    result = pack(PackConfig(tmp_path / "sounds", tmp_path / "clips.h5", workers=1), show_progress=False)
    assert {name for name, _ in result.skipped} == set(names)
    assert set(ClipList(tmp_path / "clips.skipped.txt").read()) == set(names)


def test_odd_names_are_skipped_and_all_of_them_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sounds, odd = (
        tmp_path / "sounds",
        ["dog/a\x07.flac", "dog/line\u2028break.flac", os.fsdecode(b"dog/caf\xe9.flac"), "b\x01d/c.flac"],
    )
    for index, name in enumerate(["dog/a.flac", "cat/b.flac", *odd]):
        touch(sounds / name).write_bytes(_wav(index))
    with pytest.raises(ValueError, match="4 files or folders cannot be used") as error:
        pack(PackConfig(sounds, tmp_path / "clips.h5", on_bad_clip="refuse"), show_progress=False)
    assert r"(the name holds a control character (U+0007))" in str(error.value)
    assert r"(the name is not in UTF-8 (byte 0xE9))" in str(error.value)
    assert main([str(sounds), "--out", str(tmp_path / "clips.h5"), "--workers", "1"]) == 0
    output = capsys.readouterr().out
    output.encode()  # nothing that a terminal cannot take
    assert r"skipped dog/a\x07.flac: the name holds a control character (U+0007)" in output
    result = pack(PackConfig(sounds, tmp_path / "clips.h5", workers=1, overwrite=True), show_progress=False)
    assert result.clips == 2
    assert ClipStore.open(result.store).class_names == ("cat", "dog")
    assert {name for name, _ in result.skipped} == set(odd)
    assert len((tmp_path / "clips.skipped.txt").read_text(encoding="utf-8").splitlines()) == 4


COMPOSED, DECOMPOSED = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def test_both_unicode_forms_of_a_name_are_one_name(tmp_path: Path) -> None:
    sounds = tmp_path / "sounds"
    names = [
        f"{COMPOSED}/a.flac",
        f"{DECOMPOSED}/b.flac",
        f"dog/{DECOMPOSED}.flac",
        f"dog/{COMPOSED}.flac",
        f"{DECOMPOSED}/a.flac",
    ]
    for index, name in enumerate(names):
        touch(sounds / name).write_bytes(_wav(index))
    source = read_listing(sounds)
    assert source.class_names == (COMPOSED, "dog")
    assert sorted(clip.clip_id for clip in source.clips) == sorted(
        [f"{COMPOSED}/a.flac", f"{COMPOSED}/b.flac", f"dog/{COMPOSED}.flac"]
    )
    assert all("in another Unicode form" in reason for _, reason in source.unusable)
    assert len(source.unusable) == 2
    for form in (COMPOSED, DECOMPOSED):
        (tmp_path / "classes.txt").write_text(f"dog\n{form}\n", encoding="utf-8")
        config = PackConfig(
            sounds, tmp_path / "clips.h5", class_names=tmp_path / "classes.txt", workers=1, overwrite=True
        )
        store = ClipStore.open(pack(config, show_progress=False).store)
        assert store.class_names == ("dog", COMPOSED)
        assert store.class_counts().tolist() == [1, 2]
        assert store.find([f"{DECOMPOSED}/b.flac"]) == store.find([f"{COMPOSED}/b.flac"]) >= 0
    (tmp_path / "list.csv").write_text(
        f"clip_id,path,labels\n1,sounds/{COMPOSED}/b.flac,{DECOMPOSED}\n", encoding="utf-8"
    )
    (clip,) = read_listing(tmp_path / "list.csv").clips  # the file's folder has the other form
    assert clip.path.is_file()
    assert clip.labels == (COMPOSED,)
