"""Own sounds in one folder per class."""

from pathlib import Path

from audio_datasets.tasks.catalog import read_listing


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
