"""Arrays in HDF5 files that are mapped, or read row by row."""

import os
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio_datasets.stores.hdf5_arrays import FileRows, create_hdf5, encode_ids, open_hdf5
from audio_datasets.system.messages import Tally

PAIR = np.dtype([("class", "<u2"), ("logit", "<f2")])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with create_hdf5(tmp_path / "a.h5") as file:
        file["rows"] = np.arange(35, dtype=np.float16).reshape(7, 5)
        file["line"] = np.arange(100, dtype=np.int16)
        file["none"] = np.empty((0, 3))
        pairs = np.zeros((4, 2), PAIR)
        pairs["class"] = np.arange(8).reshape(4, 2)
        file["pairs"] = pairs
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.create_dataset("chunked", data=np.zeros((4, 4)), chunks=(2, 2))
    return tmp_path / "a.h5"


def file_rows(path: Path, name: str) -> FileRows:
    with open_hdf5(path) as file:
        return FileRows(path, file[name])


def test_rows_are_read_in_any_order_also_more_than_once(path: Path) -> None:
    rows, expected = file_rows(path, "rows"), np.arange(35, dtype=np.float16).reshape(7, 5)
    for asked in ([3], [2, 3, 4], [6, 0, 0, 5], []):
        read = rows.read(np.array(asked, dtype=np.int64))
        assert (read.dtype, read.shape) == (np.float16, (len(asked), 5))
        np.testing.assert_array_equal(read, expected[asked])
    np.testing.assert_array_equal(rows.read_run(2, 5), expected[2:])
    assert rows.read_run(7, 0).shape == (0, 5)


def test_arrays_of_numbers_pairs_and_nothing(path: Path) -> None:
    np.testing.assert_array_equal(file_rows(path, "line").read(np.array([99, 3])), [99, 3])
    np.testing.assert_array_equal(file_rows(path, "line").read_run(10, 3), [10, 11, 12])
    assert file_rows(path, "pairs").read(np.array([3, 1]))["class"].tolist() == [[6, 7], [2, 3]]
    assert file_rows(path, "none").read_run(0, 0).shape == (0, 3)


def test_what_cannot_be_read_by_offset(path: Path) -> None:
    with pytest.raises(ValueError, match=r"'/chunked' of .*a\.h5 is chunked"):
        file_rows(path, "chunked")
    rows = file_rows(path, "pairs")
    with h5py.File(path) as file:
        end = file["pairs"].id.get_offset() + file["pairs"].nbytes
    os.truncate(path, end - 1)
    assert rows.read_run(0, 3).shape == (3, 2)
    with pytest.raises(ValueError, match="truncated after it was opened"):
        rows.read_run(0, 4)
    with h5py.File(path.with_name("b.h5"), "w") as file:
        file["rows"] = np.zeros(1000)
        file.flush()
        os.truncate(file.filename, 3000)
        with pytest.raises(ValueError, match=r"b\.h5 is truncated: it ends within '/rows'"):
            FileRows(path.with_name("b.h5"), file["rows"])


def test_ids_of_another_store_are_taken_as_they_are_encoded() -> None:
    wide = np.array([b"b", "ä".encode(), b"ccc"], dtype="S20")
    assert encode_ids(wide).tobytes() == encode_ids(["b", "ä", "ccc"]).tobytes()
    with pytest.raises(ValueError, match="more than once: 'b'"):
        encode_ids(np.array([b"b", b"b"]))


def test_a_tally_names_the_first_and_counts_all() -> None:
    tally = Tally(limit=2)
    assert not tally
    tally.add(["a"])
    tally.add(["b", "c", "d"])
    assert (len(tally), str(tally)) == (4, "'a', 'b' and 2 more")
