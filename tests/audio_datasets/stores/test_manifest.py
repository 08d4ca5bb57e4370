"""The manifest beside a clip store, and the choice of rows by split and fold."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.stores import clip_store
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import (
    SCHEMA,
    ManifestRow,
    manifest_path,
    read_manifest,
    select_rows,
    write_manifest,
)

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
row = st.builds(
    ManifestRow,
    clip_id=text,
    source=st.none() | text,
    labels=st.lists(text, max_size=3),
    source_labels=st.lists(text, max_size=3),
    split=st.none() | text,
    fold=st.none() | st.integers(-(2**31), 2**31 - 1),
    group=st.none() | text,
    device=st.none() | text,
    duration_seconds=st.none() | st.floats(0, 1e6, allow_subnormal=False),
    sample_rate_hz=st.none() | st.integers(1, 768000),
    channels=st.none() | st.integers(1, 64),
)


@settings(max_examples=30)
@given(st.lists(row, max_size=8))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[ManifestRow]) -> None:
    path = tmp_path_factory.mktemp("manifest") / "clips.h5"
    write_manifest(manifest_path(path), rows)
    assert read_manifest(path).to_pylist() == [asdict(row) for row in rows]


def store_with_manifest(path: Path) -> ClipStore:
    places = [("train", 1), ("train", 2), ("test", 1), (None, None), ("train", 1)]
    write_clip_store(path, [ClipRecord(f"c{i}", b"x") for i in range(5)], ["a"])
    rows = [ManifestRow(f"c{i}", split=split, fold=fold) for i, (split, fold) in enumerate(places)]
    write_manifest(manifest_path(path), rows)
    return ClipStore.open(path)


def test_rows_are_chosen_by_split_and_fold(tmp_path: Path) -> None:
    store = store_with_manifest(tmp_path / "clips.h5")
    for options, expected in [
        ({}, [0, 1, 2, 3, 4]),
        ({"split": "train"}, [0, 1, 4]),
        ({"folds": [1]}, [0, 2, 4]),
        ({"folds": [2, 1]}, [0, 1, 2, 4]),
        ({"split": "train", "folds": [1]}, [0, 4]),
    ]:
        rows = select_rows(store, **options)
        assert rows.dtype == np.int64
        assert rows.tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "valid"}, r"no clip in split \['valid'\]; its splits are \['test', 'train'\]"),
        ({"folds": [1, 7]}, r"no clip in fold \[7\]; its folds are \[1, 2\]"),
        ({"folds": []}, "its folds are"),
        ({"split": "test", "folds": [2]}, "in split 'test' and in folds"),
    ],
)
def test_splits_and_folds_that_are_not_there_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_rows(store_with_manifest(tmp_path / "clips.h5"), **options)


def test_a_store_without_manifest_has_no_splits(tmp_path: Path) -> None:
    write_clip_store(tmp_path / "clips.h5", [ClipRecord("c", b"x")], ["a"])
    store = ClipStore.open(tmp_path / "clips.h5")
    assert select_rows(store).tolist() == [0]
    with pytest.raises(ValueError, match="no manifest"):
        select_rows(store, split="train")


def test_a_manifest_of_other_clips_is_refused(tmp_path: Path) -> None:
    store = store_with_manifest(tmp_path / "clips.h5")
    write_manifest(manifest_path(store.path), [ManifestRow(f"c{i}") for i in (0, 1, 2, 4, 3)])
    with pytest.raises(ValueError, match="other clips"):
        store.manifest()


def test_only_the_columns_asked_for_are_read_and_ids_are_compared_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clip_store, "ROWS_AT_ONCE", 2)
    store = store_with_manifest(tmp_path / "clips.h5")
    assert store.manifest(["fold"]).column_names == ["clip_id", "fold"]
    for ids in ([0, 1, 2, 3, 5], [0, 1, 2, 3], [0, 1, 2, 3, 4, 5]):
        write_manifest(manifest_path(store.path), [ManifestRow(f"c{i}") for i in ids])
        with pytest.raises(ValueError, match="other clips"):
            store.manifest(["fold"])


def test_a_damaged_or_foreign_parquet_file_is_refused(tmp_path: Path) -> None:
    store = store_with_manifest(tmp_path / "clips.h5")
    path = manifest_path(store.path)
    data = path.read_bytes()
    for content in (b"", b"no parquet", data[:100], data[:-3]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"clips\.parquet"):
            store.manifest()
    pyarrow.parquet.write_table(pyarrow.table({"clip_id": ["c0"]}), path)
    with pytest.raises(ValueError, match="are missing"):
        store.manifest()


def test_a_manifest_from_before_there_were_devices_is_read(tmp_path: Path) -> None:
    store = store_with_manifest(tmp_path / "clips.h5")
    path = manifest_path(store.path)
    pyarrow.parquet.write_table(pyarrow.parquet.read_table(path).drop_columns(["device"]), path)
    assert store.manifest(["device", "fold"]).column("device").to_pylist() == [None] * 5
    assert store.manifest().column_names == SCHEMA.names
    assert select_rows(store, split="test").tolist() == [2]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("fold", ["one"] * 6, "a column has the wrong type"),
        ("clip_id", list(range(6)), "lists other clips|the wrong type"),
        ("labels", ["dog"] * 6, "a column has the wrong type"),
        ("clip_id", ["clip-0000"] * 6, "lists other clips"),
        ("duration_seconds", ["long"] * 6, "a column has the wrong type"),
    ],
)
def test_columns_of_wrong_types_and_repeated_ids_are_refused(
    make_tiny_store: Callable[..., Path], column: str, values: list, message: str
) -> None:
    path = make_tiny_store("a.h5", clips=6)
    table = pyarrow.parquet.read_table(manifest_path(path))
    place = table.column_names.index(column)
    pyarrow.parquet.write_table(table.set_column(place, column, pyarrow.array(values)), manifest_path(path))
    with pytest.raises(ValueError, match=message):
        ClipStore.open(path).manifest()


def test_names_that_are_not_utf8_are_refused(make_tiny_store: Callable[..., Path]) -> None:
    path = make_tiny_store("a.h5", clips=6)
    table = pyarrow.parquet.read_table(manifest_path(path))
    latin1 = pyarrow.array([b"caf\xe9"] * 6, pyarrow.binary()).view(pyarrow.string())
    place = table.column_names.index("source")
    pyarrow.parquet.write_table(table.set_column(place, "source", latin1), manifest_path(path))
    with pytest.raises(ValueError, match=r"a\.parquet is damaged or not a Parquet file.*UTF8"):
        ClipStore.open(path).manifest()
