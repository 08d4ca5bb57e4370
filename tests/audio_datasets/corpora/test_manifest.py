"""Own sounds in a CSV or Parquet list."""

import csv
import os
import unicodedata
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.corpora.manifest import read, write_manifest
from audio_datasets.tasks.catalog import get_task, read_listing
from audio_datasets.tasks.listing import Clip
from audio_datasets.tasks.task import read_task


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def write_csv(path: Path, rows: list[list]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


cell = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=10).map(
    partial(unicodedata.normalize, "NFC")
)


manifest_clip = st.tuples(
    cell,
    cell,
    st.lists(cell.filter(lambda label: ";" not in label), max_size=3, unique=True),
    st.none() | st.integers(0, 99),
)


@settings(max_examples=30)
@given(st.lists(manifest_clip, min_size=1, max_size=6, unique_by=lambda clip: clip[0]))
def test_csv_and_parquet_manifests_agree(tmp_path_factory: pytest.TempPathFactory, clips: list) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    columns = ["clip_id", "path", "labels", "split", "fold"]
    rows = [[i, path, ";".join(labels), "train", fold] for i, path, labels, fold in clips]
    write_csv(folder / "m.csv", [columns, *rows])
    table = {name: [row[index] for row in rows] for index, name in enumerate(columns)}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "m.parquet")
    from_csv, from_parquet = (read_listing(folder / name, allow_outside=True) for name in ("m.csv", "m.parquet"))
    assert from_csv == from_parquet
    assert from_csv.layout == "manifest"
    for clip, (clip_id, path, labels, fold) in zip(from_csv.clips, clips, strict=True):
        assert (clip.clip_id, clip.source, clip.labels) == (clip_id, path, tuple(labels))
        assert (clip.split, clip.fold, clip.group) == ("train", fold, None)
        assert clip.path == folder / path


def test_parquet_manifests_from_data_frames(tmp_path: Path) -> None:
    """Labels as lists, folds as floats with NaN for none, as pandas writes them."""
    table = pyarrow.table(
        {
            "clip_id": ["a", "b"],
            "path": ["x/a.wav", "b.wav"],
            "labels": [["dog", "cat"], []],
            "fold": np.array([1.0, np.nan]),
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    first, second = read_listing(tmp_path / "m.parquet").clips
    assert (first.labels, first.fold) == (("dog", "cat"), 1)
    assert (second.labels, second.fold, second.path) == ((), None, tmp_path / "b.wav")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([["clip_id", "labels"], ["a", "dog"]], r"lacks the columns \['path'\]"),
        ([["clip_id", "path", "labels"]], "no audio files"),
        ([["clip_id", "path", "labels"], ["a", "x", ""], ["a", "y", ""]], r"more than once: 'a' \(x and y\)"),
        ([["clip_id", "path", "labels"], ["", "x", ""]], "row 2: clip_id must be text and not empty; found ''"),
        (
            [["clip_id", "path", "labels"], ["a\tb", "x", ""]],
            r"cannot be used: 'x' \(the name holds a control character \(U\+0009\)",
        ),
        ([["clip_id", "path", "labels"], ["a", "x"]], "line 2"),
        ([["clip_id", "path", "labels", "fold"], ["a", "x", "dog", "one"]], "fold must be a whole number; found 'one'"),
    ],
)
def test_wrong_manifests_are_refused(tmp_path: Path, rows: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_listing(write_csv(tmp_path / "m.csv", rows))


@settings(max_examples=60)
@given(st.binary(max_size=120), st.sampled_from([".csv", ".parquet"]))
def test_any_other_content_is_a_value_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    path = tmp_path_factory.mktemp("manifest") / f"m{suffix}"
    path.write_bytes(b"clip_id,path,labels\n" * (suffix == ".csv") + content)
    message = ""
    try:
        read_listing(path)
    except ValueError as error:
        message = str(error)
    assert not message or str(path) in message


@pytest.mark.parametrize("path", ["../a.wav", "x/../../a.wav", "/etc/passwd", ".."])
def test_a_list_names_nothing_outside_its_folder_unless_trusted(tmp_path: Path, path: str) -> None:
    rows = [["clip_id", "path", "labels"], ["good", "x/../a.wav", "dog"], ["bad", path, "dog"]]
    listing = write_csv(tmp_path / "lists" / "m.csv", rows)
    with pytest.raises(ValueError, match="names 1 files outside of its own folder") as refused:
        read_listing(listing)
    assert repr(path) in str(refused.value)
    assert read_listing(listing, allow_outside=True).clips[1].path == listing.parent / path


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("clip_id", [b"a", b"b"], "row 1: clip_id must be text"),
        ("clip_id", [0.5, 1.5], "row 1: clip_id must be text"),
        ("clip_id", ["same", "same"], "more than once: 'same'"),
        ("path", [True, False], "row 1: path must be text"),
        ("path", ["a\0b", "c"], "row 1: path must be text"),
        ("labels", [1, 2], "row 1: labels must be text"),
        ("labels", [[b"dog"], []], "row 1: labels must be text"),
        ("split", [["train"], []], "row 1: split must be text or a number"),
        ("fold", ["one", "two"], "fold must be a whole number; found 'one'"),
        ("fold", [1.5, 2.0], "fold must be a whole number; found 1.5"),
    ],
)
def test_parquet_manifests_of_wrong_types_are_refused(tmp_path: Path, column: str, values: list, message: str) -> None:
    table = {"clip_id": ["a", "b"], "path": ["a.wav", "b.wav"], "labels": ["dog", "cat"], column: values}
    pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=message):
        read_listing(tmp_path / "m.parquet")


def test_names_that_are_not_utf8_are_refused(tmp_path: Path) -> None:
    latin1 = pyarrow.array([b"caf\xe9.wav"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"clip_id": latin1, "path": latin1, "labels": [""]})
    pyarrow.parquet.write_table(table, tmp_path / "m.parquet")
    with pytest.raises(ValueError, match="m.parquet is damaged or not a Parquet file.*UTF8"):
        read_listing(tmp_path / "m.parquet")
    (tmp_path / "m.csv").write_bytes(b"clip_id,path,labels\ncaf\xe9,a.wav,\n")
    with pytest.raises(ValueError, match="m.csv is not a CSV file in UTF-8"):
        read_listing(tmp_path / "m.csv")
    touch(tmp_path / "sounds" / "dog" / os.fsdecode(b"caf\xe9.wav"))
    with pytest.raises(ValueError, match=r"the name is not in UTF-8 \(byte 0xE9\)"):
        read_listing(tmp_path / "sounds")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_empty_labels_are_unknown_and_a_word_says_none_of_the_classes(tmp_path: Path, suffix: str) -> None:
    cells = ["dog", "", "(unknown)", "(none)", " ", "cat"]
    rows = [[f"c{number}", f"{number}.wav", cell] for number, cell in enumerate(cells)]
    path = tmp_path / f"m.{suffix}"
    if suffix == "csv":
        write_csv(path, [["clip_id", "path", "labels"], *rows])
    else:
        lists = [["dog"], [], ["(unknown)"], ["(none)"], None, ["cat"]]
        pyarrow.parquet.write_table(
            pyarrow.table({"clip_id": [row[0] for row in rows], "path": [row[1] for row in rows], "labels": lists}),
            path,
        )
    listing = read_listing(path)
    assert [clip.labels for clip in listing.clips] == [("dog",), (), (), (), (), ("cat",)]
    assert [clip.is_labelled for clip in listing.clips] == [True, False, False, True, False, True]
    assert listing.class_names == ("cat", "dog")
    assert listing.notes[0].startswith("3 of 6 clips have unknown labels ('c1', 'c2', 'c4')")


def test_clips_with_unknown_labels_leave_the_classes_exclusive(tmp_path: Path) -> None:
    rows = [["a", "a.wav", "dog"], ["b", "b.wav", "cat"], ["c", "c.wav", ""]]
    path = write_csv(tmp_path / "m.csv", [["clip_id", "path", "labels"], *rows])
    for name in "abc":
        touch(tmp_path / f"{name}.wav")
    clips, notes = read_task(get_task("manifest"), path)
    assert clips.label_space.exclusive
    assert clips.mask([0, 1, 2]).tolist() == [[True, True], [True, True], [False, False]]
    assert "every labelled clip has one label, so they exclude each other (single-label)" in notes
    write_csv(path, [["clip_id", "path", "labels"], *rows[:2], ["c", "c.wav", "(none)"]])
    clips, notes = read_task(get_task("manifest"), path)
    assert not clips.label_space.exclusive
    assert clips.mask([2]).all()
    assert "multi-label, since clip 'c' has 0 labels" in notes


def test_a_word_beside_labels_is_refused(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "m.csv", [["clip_id", "path", "labels"], ["a", "a.wav", "dog;(none)"]])
    with pytest.raises(ValueError, match=r"row 2: \(none\) stands in place of labels.*found dog, \(none\)"):
        read_listing(path)


def test_a_manifest_that_is_written_is_read_alike(tmp_path: Path) -> None:
    clips = [
        Clip("a", tmp_path / "a.wav", ("dog;cat", "hum"), split="train", fold=2, group="g"),
        Clip("b", tmp_path / "b.wav", (), known=(), split="test"),
        Clip("c", tmp_path / "c.wav", (), split="train"),
    ]
    write_manifest(tmp_path / "out" / "clips.parquet", clips)
    found = read(tmp_path / "out" / "clips.parquet").clips
    assert [(clip.clip_id, clip.path, clip.labels, clip.is_labelled, clip.split, clip.fold) for clip in found] == [
        ("a", tmp_path / "a.wav", ("dog;cat", "hum"), True, "train", 2),
        ("b", tmp_path / "b.wav", (), False, "test", None),
        ("c", tmp_path / "c.wav", (), True, "train", None),
    ]
    for clip in (Clip("d", tmp_path, (), known=("hum",)), Clip("d", tmp_path, ("hum",), row=3)):
        with pytest.raises(ValueError, match="clip 'd'"):
            write_manifest(tmp_path / "clips.parquet", [clip])
