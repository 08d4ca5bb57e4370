"""The logit store: round trips, look-up by id, ensembles, and everything that must be refused."""

import multiprocessing
import pickle
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from teacher_logits.store import (
    LogitEnsemble,
    LogitStore,
    check_same_classes,
    parse_weighted_path,
    to_float16,
    write_logit_store,
)

CLASSES = ("dog", "rain, heavy", "Geige ♪")


def write(path: Path, ids, logits=None, classes=CLASSES, digests=None, block=2, teacher=None) -> np.ndarray:
    """Writes a store with random logits (or the given ones) and returns them as float16."""
    if logits is None:
        logits = np.random.default_rng(len(ids)).normal(0, 4, (len(ids), len(classes)))
    logits = to_float16(np.asarray(logits), ids)
    write_logit_store(
        path,
        clip_ids=ids,
        audio_digests=np.zeros((len(ids), 16), np.uint8) if digests is None else digests,
        logit_blocks=(logits[start : start + block] for start in range(0, len(ids), block)),
        class_names=classes,
        teacher=teacher or {"name": "T", "fingerprint": "f"},
        clip_store_fingerprint="clips",
    )
    return logits


@dataclass
class Clips:
    """As much of a clip store as ``check_against`` looks at."""

    ids: list[str]
    digests: np.ndarray
    class_names: tuple[str, ...] = CLASSES
    path: Path = field(default=Path("clips.h5"))

    def __len__(self) -> int:
        return len(self.ids)

    def clip_id(self, row: int) -> str:
        return self.ids[row]

    def audio_digests(self, rows: np.ndarray) -> np.ndarray:
        return self.digests[rows]


@settings(max_examples=30, deadline=None)
@given(
    ids=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1), min_size=1, unique=True),
    seed=st.integers(0, 1000),
    block=st.integers(1, 7),
)
def test_every_id_finds_its_own_row(tmp_path_factory, ids, seed, block):
    path = tmp_path_factory.mktemp("store") / "logits.h5"
    rng = np.random.default_rng(seed)
    logits = write(path, ids, rng.normal(0, 9, (len(ids), 3)), block=block)
    store = LogitStore.open(path)

    assert (store.clip_ids, store.class_names, len(store)) == (ids, CLASSES, len(ids))
    asked = rng.permutation(len(ids))
    read = store.read([ids[i] for i in asked])
    assert read.dtype == np.float32
    np.testing.assert_array_equal(read, logits[asked].astype(np.float32))
    np.testing.assert_array_equal(np.concatenate([block for _, block in store.blocks(3)]), logits)


def test_ids_that_only_look_alike_are_missing(tmp_path):
    write(tmp_path / "a.h5", ["abc", "abd"])
    store = LogitStore.open(tmp_path / "a.h5")
    assert store.rows(["abcd", "ab", "abd", "", "abe", "\0"]).tolist() == [-1, -1, 1, -1, -1, -1]
    assert store.read([]).shape == (0, 3)
    with pytest.raises(ValueError, match=r"a\.h5 has no logits for 2 of 3 clips: 'abcd', 'x'"):
        store.read(["abc", "abcd", "x"])
    with pytest.raises(ValueError, match="rows must be from 0 to 1"):
        store.read_rows(np.array([0, -1]))


def test_a_read_longer_than_one_release_of_pages(tmp_path):
    ids = [f"clip{i}" for i in range(1300)]
    logits = write(tmp_path / "a.h5", ids, block=100)
    store = LogitStore.open(tmp_path / "a.h5")
    for _ in range(3):
        np.testing.assert_array_equal(store.read(ids[::-1]), logits[::-1].astype(np.float32))


def test_equal_content_gives_equal_bytes_however_it_is_cut(tmp_path):
    ids = ["b", "a", "ccc"]
    write(tmp_path / "one.h5", ids, block=1)
    write(tmp_path / "two.h5", ids, block=3)
    write(tmp_path / "other.h5", ids, np.zeros((3, 3)))
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    assert LogitStore.open(tmp_path / "one.h5").fingerprint != LogitStore.open(tmp_path / "other.h5").fingerprint


def test_fingerprint_notices_one_changed_logit(tmp_path):
    write(tmp_path / "a.h5", ["a", "b"])
    store = LogitStore.open(tmp_path / "a.h5")
    assert store.read_fingerprint() == store.fingerprint
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file["logits"][1, 2] += 1
    changed = LogitStore.open(tmp_path / "a.h5")
    assert changed.read_fingerprint() != changed.fingerprint


def _read_in_worker(store: LogitStore, ids: list[str], queue) -> None:
    queue.put(store.read(ids))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_the_same(tmp_path, method):
    ids = [f"clip{i}" for i in range(40)]
    logits = write(tmp_path / "a.h5", ids)
    store = LogitStore.open(tmp_path / "a.h5")
    store.read(ids[:3])
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    worker = context.Process(target=_read_in_worker, args=(store, ids[5:9], queue))
    worker.start()
    np.testing.assert_array_equal(queue.get(timeout=120), logits[5:9].astype(np.float32))
    worker.join()


def test_a_pickled_store_is_small_and_notices_a_replaced_file(tmp_path):
    ids = [f"clip{i}" for i in range(500)]
    write(tmp_path / "a.h5", ids)
    store = LogitStore.open(tmp_path / "a.h5")
    store.read(ids)
    sent = pickle.dumps(store)
    assert len(sent) < 2000
    np.testing.assert_array_equal(pickle.loads(sent).read(ids), store.read(ids))

    before = store.read(ids)
    write(tmp_path / "a.h5", ids, np.zeros((500, 3)))
    np.testing.assert_array_equal(store.read(ids), before)  # still the old file, whole
    with pytest.raises(ValueError, match="was replaced"):
        pickle.loads(sent).read(ids)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 70_000.0])
def test_logits_that_cannot_be_stored_are_refused(value):
    logits = np.zeros((3, 2))
    logits[1, 1] = value
    with pytest.raises(ValueError, match="clip 'b' cannot be stored: found"):
        to_float16(logits, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("ids", "message"),
    [(["a", "b", "a"], "found more than once: 'a'"), ([], "at least one clip"), (["a\0"], "NUL"), ([""], "empty")],
)
def test_clip_ids_that_are_refused(tmp_path, ids, message):
    with pytest.raises(ValueError, match=message):
        write(tmp_path / "a.h5", ids)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=40, deadline=None)
@given(thousandths=st.integers(0, 999))
def test_a_truncated_store_is_refused(tmp_path_factory, thousandths):
    folder = tmp_path_factory.mktemp("truncated")
    write(folder / "whole.h5", [f"clip{i}" for i in range(20)])
    data = (folder / "whole.h5").read_bytes()
    (folder / "cut.h5").write_bytes(data[: len(data) * thousandths // 1000])
    with pytest.raises(ValueError, match=r"cut\.h5"):
        LogitStore.open(folder / "cut.h5")


def test_files_of_another_kind_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no such file: .*none\.h5"):
        LogitStore.open(tmp_path / "none.h5")
    with pytest.raises(ValueError, match="folder"):
        LogitStore.open(tmp_path)
    (tmp_path / "text.h5").write_text("class,score\n" * 400)
    with pytest.raises(ValueError, match=r"text\.h5"):
        LogitStore.open(tmp_path / "text.h5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = [1]
    with pytest.raises(ValueError, match=r"other\.h5 is not a logit store"):
        LogitStore.open(tmp_path / "other.h5")


@pytest.mark.parametrize("damage", ["version", "shape", "dataset", "attribute", "json"])
def test_a_damaged_or_newer_store_is_refused(tmp_path, damage):
    write(tmp_path / "a.h5", ["a", "b"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        if damage == "version":
            file.attrs["format_version"] = 2
        elif damage == "attribute":
            del file.attrs["teacher"]
        elif damage == "json":
            file.attrs["teacher"] = "{"
        else:
            del file["logits"]
            if damage == "shape":
                file["logits"] = np.zeros((2, 5), np.float16)
    with pytest.raises(ValueError, match=r"a\.h5"):
        LogitStore.open(tmp_path / "a.h5")


def test_an_ensemble_is_the_weighted_mean_where_all_have_the_clip(tmp_path):
    a = write(tmp_path / "a.h5", ["x", "y", "z"]).astype(np.float64)
    b = write(tmp_path / "b.h5", ["z", "y"]).astype(np.float64)
    ensemble = LogitEnsemble.open([f"{tmp_path / 'a.h5'}:3", tmp_path / "b.h5"])
    mean, present = ensemble.read(["z", "x", "y"])
    assert present.tolist() == [True, False, True]
    np.testing.assert_allclose(mean[0], 0.75 * a[2] + 0.25 * b[0], rtol=1e-6)
    np.testing.assert_allclose(mean[2], 0.75 * a[1] + 0.25 * b[1], rtol=1e-6)
    assert not mean[1].any()
    assert ensemble.present(["x", "y", "?"]).tolist() == [False, True, False]
    assert [store["weight"] for store in ensemble.describe()] == [3.0, 1.0]


def test_ensembles_that_are_refused(tmp_path):
    write(tmp_path / "a.h5", ["x"])
    write(tmp_path / "b.h5", ["x"], classes=("dog", "rain", "Geige ♪"))
    with pytest.raises(ValueError, match=r"class 1 is 'rain, heavy' in .*a\.h5 and 'rain' in .*b\.h5"):
        LogitEnsemble.open([tmp_path / "a.h5", tmp_path / "b.h5"])
    for weight in ("0", "-1", "nan", "inf"):
        with pytest.raises(ValueError, match="must be a positive number"):
            LogitEnsemble.open([f"{tmp_path / 'a.h5'}:{weight}"])
    with pytest.raises(ValueError, match="at least one logit store"):
        LogitEnsemble.open([])
    with pytest.raises(ValueError, match="must be a number; found 'much'"):
        LogitEnsemble.open([f"{tmp_path / 'a.h5'}:much"])


def test_parse_weighted_path(tmp_path):
    assert parse_weighted_path("a.h5") == (Path("a.h5"), 1.0)
    assert parse_weighted_path("a.h5:0.25") == (Path("a.h5"), 0.25)
    (tmp_path / "odd:2").touch()
    assert parse_weighted_path(str(tmp_path / "odd:2")) == (tmp_path / "odd:2", 1.0)


def test_class_lists_of_another_length_are_refused():
    check_same_classes(["a", "b"], ("a", "b"), "clips", "logits")
    with pytest.raises(ValueError, match="2 classes in clips and 1 in logits"):
        check_same_classes(["a", "b"], ["a"], "clips", "logits")


def test_check_against_a_clip_store(tmp_path):
    digests = np.arange(64, dtype=np.uint8).reshape(4, 16) + 1
    ids = ["a", "b", "c", "d"]
    write(tmp_path / "a.h5", ids[:3], digests=digests[:3])
    ensemble = LogitEnsemble.open([tmp_path / "a.h5"])
    assert ensemble.check_against(Clips(ids, digests)).tolist() == [False, False, False, True]
    assert ensemble.check_against(Clips(ids, digests), rows=np.array([3, 0])).tolist() == [True, False]

    other = digests.copy()
    other[1, 0] = 200
    with pytest.raises(ValueError, match="clip 'b' has other audio"):
        ensemble.check_against(Clips(ids, other))
    assert not ensemble.check_against(Clips(ids, other), rows=np.array([0, 2])).any()
    other[1] = 0  # not known, as in a store of the foreign layout
    assert ensemble.check_against(Clips(ids, other)).tolist() == [False, False, False, True]
    with pytest.raises(ValueError, match="class lists differ"):
        ensemble.check_against(Clips(ids, digests, class_names=("dog", "rain", "x")))
