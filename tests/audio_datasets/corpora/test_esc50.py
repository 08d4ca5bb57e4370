"""ESC-50's layout."""

import csv
from pathlib import Path

import pytest

from audio_datasets.tasks.catalog import read_listing


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def write_csv(path: Path, rows: list[list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def esc50_folder(folder: Path) -> Path:
    touch(folder / "audio" / "1-100-A-5.ogg")
    touch(folder / "audio" / "2-100-B-0.wav")
    header = ["filename", "fold", "target", "category", "esc10", "src_file", "take"]
    rows = [["1-100-A-5.wav", 1, 5, "cat", "False", 100, "A"], ["2-100-B-0.wav", 2, 0, "dog", "True", 100, "B"]]
    write_csv(folder / "meta" / "esc50.csv", [header, *rows])
    return folder


def test_esc50_s_layout_with_files_in_another_format(tmp_path: Path) -> None:
    source = read_listing(esc50_folder(tmp_path))
    assert source.layout == "esc50"
    assert source.class_names == ("dog", "cat")  # by target, not by name or line
    first, second = source.clips
    assert (first.clip_id, first.labels, first.fold, first.group) == ("1-100-A-5", ("cat",), 1, "100")
    assert (first.source, second.source) == ("audio/1-100-A-5.ogg", "audio/2-100-B-0.wav")
    assert first.path.exists()


def test_esc50_files_that_are_missing_are_kept_for_the_report(tmp_path: Path) -> None:
    folder = esc50_folder(tmp_path)
    (folder / "audio" / "1-100-A-5.ogg").unlink()
    assert read_listing(folder).clips[0].source == "audio/1-100-A-5.wav"


def test_real_esc10(reference_dir: Path) -> None:
    source = read_listing(reference_dir / "data" / "ESC-10")
    assert len(source.clips) == 400
    assert source.class_names[:2] == ("dog", "rooster")
    assert all(clip.path.exists() for clip in source.clips)
    assert {clip.fold for clip in source.clips} == {1, 2, 3, 4, 5}


def test_a_table_in_esc50s_layout_names_nothing_outside_its_folder(tmp_path: Path) -> None:
    write_csv(tmp_path / "meta" / "esc50.csv", [["filename", "category"], ["../../a.wav", "dog"]])
    with pytest.raises(ValueError, match="names 1 files outside of its own folder"):
        read_listing(tmp_path, "esc50")
