"""Several clip stores as one, among them files in PaSST's and EfficientAT's layout."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio_datasets.audio.codec import encode
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.joined import JoinedClips, open_clips
from audio_datasets.stores.manifest import manifest_path, select_rows
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.label_space import LabelSpace

CLASSES = tuple(f"class {index}" for index in range(527))
RATE_HZ = 32000


def sound(index: int) -> np.ndarray:
    return (0.1 * generator(2, "joined test", 0, index).standard_normal(1600)).astype(np.float32)


def write_passt_file(path: Path, first: int, stop: int) -> Path:
    """As users of PaSST and EfficientAT have it: ``balanced_train_segments_mp3.hdf`` with names like ``00/Yxxxxxxxxxxx.mp3``."""
    targets = np.zeros((stop - first, 527), dtype=bool)
    targets[np.arange(stop - first), np.arange(first, stop)] = True
    with h5py.File(path, "w") as file:
        names = [f"{index % 100:02d}/Yabcdefgh{index:03d}.mp3".encode() for index in range(first, stop)]
        assert max(map(len, names)) == 19
        file.create_dataset("audio_name", shape=(stop - first,), dtype="S20")[:] = names
        audio = file.create_dataset("mp3", shape=(stop - first,), dtype=h5py.vlen_dtype(np.dtype("uint8")))
        for index in range(first, stop):
            audio[index - first] = np.frombuffer(encode(sound(index), RATE_HZ, "mp3"), np.uint8)
        file.create_dataset("target", data=np.packbits(targets, axis=-1))
    return path


def write_own_file(path: Path, first: int, stop: int) -> Path:
    pcm = [np.round(sound(index) * 32768).astype(np.int16) for index in range(first, stop)]
    records = [ClipRecord(f"own-{first + i}", samples, (CLASSES[first + i],)) for i, samples in enumerate(pcm)]
    write_clip_store(path, records, CLASSES, audio_kind="pcm16", sample_rate_hz=RATE_HZ)
    return path


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return [
        write_passt_file(tmp_path / "balanced_train_segments_mp3.hdf", 0, 3),
        write_own_file(tmp_path / "own.h5", 3, 5),
        write_passt_file(tmp_path / "unbalanced_train_segments_mp3.hdf", 5, 9),
    ]


def test_a_joined_set_reads_as_its_stores_do(paths: list[Path]) -> None:
    joined = JoinedClips.open(paths, CLASSES)
    stores = [ClipStore.open(path, CLASSES) for path in paths]
    assert len(joined) == 9
    assert joined.clip_ids == [joined.clip_id(row) for row in range(9)]
    assert joined.clip_ids == [clip_id for store in stores for clip_id in store.clip_ids]
    assert joined.clip_id(0) == "00/Yabcdefgh000.mp3"
    np.testing.assert_array_equal(joined.targets(np.arange(9)), np.eye(527, dtype=np.float32)[:9])
    order = np.array([8, 0, 4, 4, 3, -1])
    np.testing.assert_array_equal(joined.targets(order), np.eye(527)[[8, 0, 4, 4, 3, 8]])
    np.testing.assert_array_equal(joined.class_counts(), np.arange(527) < 9)
    np.testing.assert_array_equal(joined.audio_digests(order)[2], stores[1].audio_digests([1])[0])
    assert not joined.audio_digests([0]).any()
    for row, (store, its_row) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]):
        np.testing.assert_array_equal(joined.waveform(row, 16000), stores[store].waveform(its_row, 16000))
    assert joined.duration_seconds(4) == 0.05
    np.testing.assert_array_equal(joined.find(["own-4", "x", "08/Yabcdefgh008.mp3"]), [4, -1, 8])
    np.testing.assert_array_equal(joined.rows(["own-4", "08/Yabcdefgh008.mp3"]), [4, 8])
    with pytest.raises(ValueError, match="1 of 2 clip ids are not in .*'x'"):
        joined.rows(["own-4", "x"])
    for row in (9, -10):
        with pytest.raises(IndexError):
            joined.clip_id(row)
    with pytest.raises(IndexError):
        joined.targets([0, 9])
    assert joined.targets([]).shape == (0, 527)
    copy = pickle.loads(pickle.dumps(joined))
    assert (copy.clip_id(7), copy.fingerprint) == (joined.clip_id(7), joined.fingerprint)
    assert joined.fingerprint == JoinedClips.open(paths[::-1], CLASSES).fingerprint
    assert joined.fingerprint != JoinedClips.open(paths[:2], CLASSES).fingerprint


def test_one_store_stays_what_it_is(paths: list[Path]) -> None:
    assert isinstance(open_clips(paths[1:2]), ClipStore)
    assert len(open_clips(paths, CLASSES)) == 9
    with pytest.raises(ValueError, match="class list"):
        open_clips(paths)  # the file does not hold one, and none lies beside it


def test_stores_that_do_not_belong_together_are_refused(paths: list[Path], tmp_path: Path) -> None:
    again = write_passt_file(tmp_path / "again.hdf", 2, 4)
    with pytest.raises(ValueError, match=r"balanced_train.*again.hdf both contain the clips '02/Yabcdefgh002.mp3'"):
        JoinedClips.open([*paths, again], CLASSES)
    other = tmp_path / "other.h5"
    write_clip_store(other, [], ["class 0", "class one"])
    with pytest.raises(ValueError, match="class lists differ: .*other.h5"):
        JoinedClips.open([paths[1], other])
    with pytest.raises(ValueError, match="at least one"):
        JoinedClips.open([])
    names = np.array([b"00/Ya.mp3", b"00/Ya.mp3"], dtype="S20")
    with h5py.File(paths[0], "r+") as file:
        file["audio_name"][:2] = names
    with pytest.raises(ValueError, match="names in audio_name must be unique"):
        ClipStore.open(paths[0], CLASSES)


def test_splits_and_folds_go_through_all_manifests(make_tiny_store: Callable[..., Path], tmp_path: Path) -> None:
    first = make_tiny_store("a.h5", clips=6)
    write_clip_store(tmp_path / "b.h5", [], ClipStore.open(first).class_names)
    second = tmp_path / "b.h5"
    with pytest.raises(ValueError, match=r"no manifest beside '.*b.h5'"):
        select_rows(open_clips([first, second]), split="train")
    manifest_path(second).write_bytes(manifest_path(first).read_bytes())
    records = [ClipRecord(f"clip-{index:04d}", np.zeros(8, np.int16)) for index in range(6)]
    with pytest.raises(ValueError, match="other clips"):
        select_rows(open_clips([first, second]), split="train")
    write_clip_store(second, records, ClipStore.open(first).class_names, audio_kind="pcm16", sample_rate_hz=RATE_HZ)
    joined = JoinedClips([ClipStore.open(first), ClipStore.open(second)])
    np.testing.assert_array_equal(select_rows(joined, split="valid"), [4, 5, 10, 11])
    np.testing.assert_array_equal(select_rows(joined, folds=[2]), [1, 4, 7, 10])
    np.testing.assert_array_equal(select_rows(joined), np.arange(12))


def test_unknown_labels_and_groups_of_classes_of_joined_stores(tmp_path: Path) -> None:
    names = ("a", "b", "c")
    write_clip_store(tmp_path / "plain.h5", [ClipRecord(f"p{i}", b"x", ("a",)) for i in range(2)], names)
    write_clip_store(tmp_path / "masked.h5", [ClipRecord(f"m{i}", b"x", ("b",), ("b",)) for i in range(2)], names)
    joined = JoinedClips.open([tmp_path / "plain.h5", tmp_path / "masked.h5"])
    assert joined.is_masked
    assert joined.label_space == LabelSpace.single(names, exclusive=False)
    np.testing.assert_array_equal(joined.mask([3, 0]), [[False, True, False], [True, True, True]])
    exclusive = LabelSpace.single(names, exclusive=True)
    write_clip_store(tmp_path / "exclusive.h5", [ClipRecord("e", b"x", ("c",))], names, label_space=exclusive)
    with pytest.raises(
        ValueError, match=r"different label groups \(not exclusive and exclusive\); pack both with --task"
    ):
        JoinedClips.open([tmp_path / "plain.h5", tmp_path / "exclusive.h5"])
    assert not JoinedClips.open([tmp_path / "plain.h5"]).is_masked
