"""The logit store: round trips, look-up by id, and everything that must be refused."""

import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit, logit

from audio_datasets.stores.hdf5_arrays import SEAL
from teacher_logits.store import LogitStore, to_float16, write_logit_store

CLASSES = ("dog", "rain, heavy", "Geige ♪")


def write(path: Path, ids, logits=None, classes=CLASSES, digests=None, block=2, teacher=None, keep=None) -> np.ndarray:
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
        keep=keep,
    )
    return logits


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
@example(thousandths=992)  # exactly the seal is missing
def test_a_truncated_store_is_refused(tmp_path_factory, thousandths):
    folder = tmp_path_factory.mktemp("truncated")
    write(folder / "whole.h5", [f"clip{i}" for i in range(20)])
    data = (folder / "whole.h5").read_bytes()
    size = len(data) * thousandths // 1000
    (folder / "cut.h5").write_bytes(data[:size])
    if size == data.rindex(SEAL):  # all that HDF5 reads is there: only what would notice damage is missing
        assert LogitStore.open(folder / "cut.h5").read_fingerprint() == LogitStore.open(folder / "whole.h5").fingerprint
        return
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


@pytest.mark.parametrize("damage", ["version", "shape", "dataset", "attribute", "json", "storage"])
def test_a_damaged_or_newer_store_is_refused(tmp_path, damage):
    write(tmp_path / "a.h5", ["a", "b"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        if damage == "version":
            file.attrs["format_version"] = 3
        elif damage == "storage":
            file.attrs["storage"] = "sparse"
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


# -- Only the largest logits of each clip


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    classes=st.integers(2, 12),
    keep=st.integers(1, 11),
    block=st.integers(1, 9),
    coarse=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_largest_logits_are_kept_and_the_rest_is_their_mean_probability(
    tmp_path_factory, rows, classes, keep, block, coarse, seed
):
    keep = min(keep, classes - 1)
    path = tmp_path_factory.mktemp("top") / "top.h5"
    ids = [f"clip{i}" for i in range(rows)]
    values = np.random.default_rng(seed).normal(-2, 3, (rows, classes))
    values = np.round(values / 4) * 4 if coarse else values  # many equal ones, and -0.0
    logits = write(path, ids, values, classes=[f"c{i}" for i in range(classes)], block=block, keep=keep)
    store = LogitStore.open(path)
    assert (store.keep, len(store)) == (keep, rows)
    read = store.read(ids)

    kept = np.zeros(logits.shape, bool)
    for row, values in enumerate(logits.astype(np.float64) + 0.0):
        kept[row, sorted(range(classes), key=lambda index: (-values[index], index))[:keep]] = True
    exact = read == logits.astype(np.float32)
    if not coarse:  # which of two equal values (0.0 and -0.0 too) is kept shows nowhere else
        assert exact[kept].all()
        for index in range(classes):
            left_out = expit(logits[~kept[:, index], index].astype(np.float64))
            if len(left_out):
                floor = np.unique(read[~kept[:, index], index])
                assert len(floor) == 1
                np.testing.assert_allclose(floor[0], logit(left_out.mean()), rtol=1e-3, atol=1e-3)
    assert (exact.sum(axis=1) >= keep).all()
    np.testing.assert_array_equal(np.concatenate([values for _, values in store.blocks(4)]), read)
    assert store.read_fingerprint() == store.fingerprint


def test_a_compact_store_has_equal_bytes_however_it_is_cut_and_is_smaller(tmp_path):
    ids = [f"clip{i}" for i in range(200)]
    logits = np.random.default_rng(0).normal(-6, 3, (200, 527))
    options = {"classes": [f"c{i}" for i in range(527)]}
    write(tmp_path / "one.h5", ids, logits, block=7, keep=20, **options)
    write(tmp_path / "two.h5", ids, logits, block=200, keep=20, **options)
    write(tmp_path / "dense.h5", ids, logits, **options)
    assert (tmp_path / "one.h5").read_bytes() == (tmp_path / "two.h5").read_bytes()
    assert (tmp_path / "one.h5").stat().st_size < (tmp_path / "dense.h5").stat().st_size / 5
    # The floor keeps the mean probability of every class.
    stored, dense = (expit(LogitStore.open(tmp_path / name).read(ids)) for name in ("one.h5", "dense.h5"))
    np.testing.assert_allclose(stored.mean(axis=0), dense.mean(axis=0), rtol=2e-3)


def test_a_compact_store_has_views_and_is_pickled_like_any_other(tmp_path):
    teacher = {"name": "T", "views": {"views": 2}}
    logits = np.random.default_rng(1).normal(size=(6, 3))
    ids = ["a", "b", "c"]
    path = tmp_path / "v.h5"
    write_logit_store(
        path,
        clip_ids=ids,
        audio_digests=np.zeros((3, 16), np.uint8),
        logit_blocks=[logits.astype(np.float16)],
        class_names=CLASSES,
        teacher=teacher,
        clip_store_fingerprint="",
        keep=2,
    )
    store = pickle.loads(pickle.dumps(LogitStore.open(path)))
    largest = logits.astype(np.float16).max(axis=1)
    for view in (0, 1):
        read = store.read(ids, np.full(3, view))
        np.testing.assert_array_equal(read.max(axis=1), largest[view::2].astype(np.float32))


@pytest.mark.parametrize("keep", [0, -1, 3, 4])
def test_numbers_of_logits_that_cannot_be_kept(tmp_path, keep):
    with pytest.raises(
        ValueError, match=f"the number of logits to keep of each clip must be from 1 to 2 of 3 .* found {keep}"
    ):
        write(tmp_path / "a.h5", ["a"], keep=keep)
    assert list(tmp_path.iterdir()) == []


def test_damage_in_a_compact_store(tmp_path):
    write(tmp_path / "a.h5", ["a", "b"], keep=1)
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        kept = file["kept"][:]
        kept["class"][1, 0] = 3
        file["kept"][...] = kept
    store = LogitStore.open(tmp_path / "a.h5")
    assert store.read_fingerprint() != store.fingerprint
    with pytest.raises(ValueError, match=r"a\.h5 is a damaged logit store: it refers to a class beyond its 3"):
        store.read(["b"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        del file["kept"]
        file["kept"] = np.zeros((2, 1), np.float16)
    with pytest.raises(ValueError, match=r"a\.h5 is a damaged logit store: kept must be rows of .*; found float16"):
        LogitStore.open(tmp_path / "a.h5")


def test_version_1_is_read(tmp_path):
    """What version 2 added is how rows are kept; version 1 is version 2 without that attribute, and always dense."""
    logits = write(tmp_path / "a.h5", ["a", "b"])
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        file.attrs["format_version"] = 1
        del file.attrs["storage"]
    store = LogitStore.open(tmp_path / "a.h5")
    np.testing.assert_array_equal(store.read(["b", "a"]), logits[[1, 0]].astype(np.float32))
    assert store.read_fingerprint() == store.fingerprint
