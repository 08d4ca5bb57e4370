"""The clip store: writing, reading, other layouts, damaged files."""

import json
import multiprocessing
import pickle
from pathlib import Path

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from audio_datasets.audio.codec import decode, encode, from_pcm16
from audio_datasets.audio.resampling import resample
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, concatenate, write_clip_store
from audio_datasets.stores.hdf5_arrays import SEAL, BytesOfVaryingLength
from audio_datasets.system.randomness import generator
from audio_datasets.tasks.label_space import LabelGroup, LabelSpace

CLASSES = tuple(f"class {index}, of some" for index in range(11))


def sound(index: int, samples: int = 3200) -> np.ndarray:
    return (0.1 * generator(2, "test sound", 0, index).standard_normal(samples)).astype(np.float32)


def write_encoded(path: Path, first: int = 0, stop: int = 6) -> Path:
    records = [
        ClipRecord(f"clip/{i}", encode(sound(i, 3000 + 100 * i), 32000, "flac"), CLASSES[i % 11 : i % 11 + 2])
        for i in range(first, stop)
    ]
    write_clip_store(path, records, CLASSES)
    return path


def write_foreign(path: Path, *, compressed: bool = False, classes: int = 11) -> Path:
    """The layout of PaSST and EfficientAT, written as their preparation scripts do."""
    targets = np.arange(5)[:, None] == np.arange(classes)[None] % 5
    with h5py.File(path, "w") as file:
        names = np.array([f"Y{i}.mp3".encode() for i in (3, 1, 4, 0, 2)], dtype="S20")
        file.create_dataset("audio_name", data=names, dtype="S20")
        audio = file.create_dataset("mp3", shape=(5,), dtype=h5py.vlen_dtype(np.dtype("uint8")))
        for i in range(5):
            audio[i] = np.frombuffer(encode(sound(i, 16000), 32000, "mp3"), np.uint8)
        options = {"compression": "gzip", "chunks": (2, 1)} if compressed else {}
        file.create_dataset("target", data=np.packbits(targets, axis=1), **options)
    return path


record = st.tuples(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15),
    st.binary(max_size=64),
    st.sets(st.sampled_from(CLASSES)),
)


@settings(max_examples=50)
@given(st.lists(record, max_size=12, unique_by=lambda clip: clip[0]))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, clips: list) -> None:
    path = tmp_path_factory.mktemp("store") / "clips.h5"
    write_clip_store(path, [ClipRecord(i, audio, tuple(labels)) for i, audio, labels in clips], CLASSES)
    store = ClipStore.open(path)
    ids = [clip_id for clip_id, _, _ in clips]
    assert len(store) == len(clips)
    assert store.class_names == CLASSES
    assert store.clip_ids == [store.clip_id(row) for row in range(len(store))] == ids
    np.testing.assert_array_equal(store.rows(ids[::-1]), np.arange(len(ids))[::-1])
    assert [store.encoded(row) for row in range(len(store))] == [audio for _, audio, _ in clips]
    expected = np.array([[name in labels for name in CLASSES] for _, _, labels in clips], dtype=np.float32)
    targets = store.targets(np.arange(len(store)))
    assert targets.dtype == np.float32
    np.testing.assert_array_equal(targets, expected.reshape(len(clips), 11))
    np.testing.assert_array_equal(store.class_counts(), targets.sum(axis=0))


def test_equal_clips_give_equal_files_whatever_the_shards(tmp_path: Path) -> None:
    write_encoded(tmp_path / "whole.h5")
    write_encoded(tmp_path / "again.h5")
    write_encoded(tmp_path / "a.h5", 0, 2)
    write_encoded(tmp_path / "b.h5", 2, 2)
    write_encoded(tmp_path / "c.h5", 2, 6)
    reported = []
    concatenate([tmp_path / f"{part}.h5" for part in "abc"], tmp_path / "joined.h5", report=reported.append)
    whole = (tmp_path / "whole.h5").read_bytes()
    assert whole == (tmp_path / "again.h5").read_bytes() == (tmp_path / "joined.h5").read_bytes()
    assert reported == [2, 0, 4]


def test_stores_that_do_not_belong_together_are_not_joined(tmp_path: Path) -> None:
    first = write_encoded(tmp_path / "a.h5", 0, 2)
    write_clip_store(tmp_path / "classes.h5", [], ["another"])
    write_clip_store(tmp_path / "pcm.h5", [], CLASSES, audio_kind="pcm16", sample_rate_hz=32000)
    for other, message in {"classes": "class 0", "pcm": "pcm16", "a": "more than once"}.items():
        with pytest.raises(ValueError, match=message):
            concatenate([first, tmp_path / f"{other}.h5"], tmp_path / "joined.h5")
    assert not (tmp_path / "joined.h5").exists()


@pytest.mark.parametrize("to_hz", [16000, 32000, 44100])
def test_waveforms_of_encoded_and_pcm_clips_agree(tmp_path: Path, to_hz: int) -> None:
    samples = [np.round(sound(i, 9000) * 32768).astype(np.int16) for i in range(3)]
    write_clip_store(
        tmp_path / "pcm.h5",
        [ClipRecord(str(i), samples[i]) for i in range(3)],
        CLASSES,
        audio_kind="pcm16",
        sample_rate_hz=32000,
    )
    encoded = [ClipRecord(str(i), encode(from_pcm16(samples[i]), 32000, "wav")) for i in range(3)]
    write_clip_store(tmp_path / "wav.h5", encoded, CLASSES)
    pcm, wav = ClipStore.open(tmp_path / "pcm.h5"), ClipStore.open(tmp_path / "wav.h5")
    assert pcm.duration_seconds(1) == wav.duration_seconds(1) == 9000 / 32000
    for row in range(3):
        whole = resample(from_pcm16(samples[row]), 32000, to_hz)
        np.testing.assert_array_equal(pcm.waveform(row, to_hz), whole)
        np.testing.assert_array_equal(wav.waveform(row, to_hz), whole)
        part = whole[round(0.1 * to_hz) : round(0.1 * to_hz) + round(0.05 * to_hz)]
        np.testing.assert_allclose(pcm.waveform(row, to_hz, 0.1, 0.05), part, atol=1e-6)
        np.testing.assert_allclose(wav.waveform(row, to_hz, 0.1, 0.05), part, atol=1e-6)
    with pytest.raises(ValueError, match="waveform"):
        pcm.encoded(0)


def test_digest_and_fingerprint_follow_the_audio_and_not_the_targets(tmp_path: Path) -> None:
    variants = {
        "base": [ClipRecord("a", b"1"), ClipRecord("b", b"2")],
        "labels": [ClipRecord("a", b"1", CLASSES[:1]), ClipRecord("b", b"2")],
        "audio": [ClipRecord("a", b"1"), ClipRecord("b", b"3")],
        "id": [ClipRecord("a", b"1"), ClipRecord("c", b"2")],
        "order": [ClipRecord("b", b"2"), ClipRecord("a", b"1")],
    }
    stores = {}
    for name, records in variants.items():
        write_clip_store(tmp_path / f"{name}.h5", records, CLASSES)
        stores[name] = ClipStore.open(tmp_path / f"{name}.h5")
    base = stores["base"]
    assert base.fingerprint == stores["labels"].fingerprint
    assert len({stores[name].fingerprint for name in ("base", "audio", "id", "order")}) == 4
    np.testing.assert_array_equal(base.audio_digests([1, 0]), stores["order"].audio_digests([0, 1]))
    assert (base.audio_digests([0]) == stores["audio"].audio_digests([0])).all()
    assert (base.audio_digests([1]) != stores["audio"].audio_digests([1])).any()


def test_attributes_are_kept(tmp_path: Path) -> None:
    write_clip_store(tmp_path / "a.h5", [], CLASSES, attributes={"origin": "a field, in May"})
    assert ClipStore.open(tmp_path / "a.h5").attributes == {"origin": "a field, in May"}


def test_a_pickled_store_carries_no_data_and_reads_on(tmp_path: Path) -> None:
    store = ClipStore.open(write_encoded(tmp_path / "a.h5", 0, 200))
    data = pickle.dumps(store)
    assert len(data) < 1000
    np.testing.assert_array_equal(pickle.loads(data).waveform(3, 32000), store.waveform(3, 32000))


def _read_in_child(store: ClipStore, rows: list[int], queue: multiprocessing.Queue) -> None:
    queue.put([store.encoded(row) for row in rows])


@pytest.mark.parametrize("layout", ["native", "foreign"])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_processes_read_right_data_side_by_side(tmp_path: Path, layout: str) -> None:
    if layout == "native":
        store = ClipStore.open(write_encoded(tmp_path / "a.h5", 0, 40))
    else:
        store = ClipStore.open(write_foreign(tmp_path / "a.h5"), CLASSES)
    rows = list(range(len(store))) * 4
    expected = [store.encoded(row) for row in rows]  # opened here, before the fork
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [context.Process(target=_read_in_child, args=(store, rows, queue)) for _ in range(3)]
    for child in children:
        child.start()
    assert [store.encoded(row) for row in rows] == expected
    for _ in children:
        assert queue.get(timeout=60) == expected
    for child in children:
        child.join()


@pytest.mark.parametrize("compressed", [False, True])
def test_the_layout_of_passt_and_efficientat_opens_as_it_is(tmp_path: Path, compressed: bool) -> None:
    store = ClipStore.open(write_foreign(tmp_path / "audioset.hdf", compressed=compressed), CLASSES)
    assert store.clip_ids == ["Y3.mp3", "Y1.mp3", "Y4.mp3", "Y0.mp3", "Y2.mp3"]
    np.testing.assert_array_equal(store.rows(["Y0.mp3", "Y3.mp3"]), [3, 0])
    expected = np.arange(5)[:, None] == np.arange(11)[None] % 5
    np.testing.assert_array_equal(store.targets([4, 0, 0, 2]), expected[[4, 0, 0, 2]])
    np.testing.assert_array_equal(store.class_counts(), expected.sum(axis=0))
    assert not store.audio_digests([0, 1]).any()
    assert store.encoded(2) == encode(sound(2, 16000), 32000, "mp3")
    np.testing.assert_array_equal(store.waveform(2, 16000), decode(encode(sound(2, 16000), 32000, "mp3"), 16000))
    assert store.manifest() is None
    assert len(pickle.loads(pickle.dumps(store)).clip_ids) == 5


def test_a_foreign_file_needs_its_class_names(tmp_path: Path) -> None:
    path = write_foreign(tmp_path / "audioset.hdf")
    with pytest.raises(ValueError, match=r"class_labels_indices\.csv"):
        ClipStore.open(path)
    with pytest.raises(ValueError, match="527 classes"):
        ClipStore.open(path, [str(i) for i in range(527)])
    # As many bytes of bits, but targets outside the list.
    with pytest.raises(ValueError, match="beyond"):
        ClipStore.open(path, CLASSES[:10]).targets(range(5))
    rows = "".join(f'{index},/m/{index},"{name}"\n' for index, name in enumerate(CLASSES))
    (tmp_path / "class_labels_indices.csv").write_text("index,mid,display_name\n" + rows, encoding="utf-8")
    assert ClipStore.open(path).class_names == CLASSES


def test_the_class_list_asked_for_must_be_the_store_s(tmp_path: Path) -> None:
    path = write_encoded(tmp_path / "a.h5")
    ClipStore.open(path, CLASSES)
    with pytest.raises(ValueError, match="class 0 is"):
        ClipStore.open(path, CLASSES[::-1])


def test_ids_that_are_not_there_are_named(tmp_path: Path) -> None:
    store = ClipStore.open(write_encoded(tmp_path / "a.h5"))
    # Longer than any stored id, so that it would be cut to one that is there; shorter; empty; another case.
    for absent in ("clip/1 and more", "clip/", "", "Clip/1"):
        with pytest.raises(ValueError, match="1 of 2 clip ids are not in"):
            store.rows(["clip/1", absent])


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        ([ClipRecord("a", b"1"), ClipRecord("a", b"2")], {}, "more than once: 'a'"),
        ([ClipRecord("", b"1")], {}, "not empty"),
        ([ClipRecord("a", b"1", ("no class",))], {}, "'no class'"),
        ([ClipRecord("a", np.zeros(3, np.int16))], {}, "encoded audio expected"),
        ([ClipRecord("a", b"1")], {"audio_kind": "pcm16", "sample_rate_hz": 32000}, "pcm16 audio expected"),
        ([ClipRecord("a", np.zeros(3))], {"audio_kind": "pcm16", "sample_rate_hz": 32000}, "float64"),
        ([], {"audio_kind": "pcm16"}, "sample rate"),
        ([], {"audio_kind": "aac"}, "encoded"),
    ],
)
def test_clips_that_do_not_fit_are_not_written(tmp_path: Path, records: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_clip_store(tmp_path / "a.h5", records, CLASSES, **options)
    assert list(tmp_path.iterdir()) == []


def test_audio_that_cannot_be_decoded_names_the_clip(tmp_path: Path) -> None:
    write_clip_store(tmp_path / "a.h5", [ClipRecord("street, 5 am", b"no audio")], CLASSES)
    with pytest.raises(ValueError, match=r"clip 'street, 5 am' of .*a\.h5: audio is in no format"):
        ClipStore.open(tmp_path / "a.h5").waveform(0, 32000)


def test_a_file_cut_at_any_byte_is_refused(tmp_path: Path) -> None:
    data = write_encoded(tmp_path / "a.h5", 0, 2).read_bytes()
    cut = tmp_path / "cut.h5"
    for length in [*range(0, 3000, 50), *range(3000, len(data), 211), len(data) - 1]:
        cut.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"cut\.h5"):
            ClipStore.open(cut)


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "text.h5").write_text("no HDF5")
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["weights"] = np.zeros(3)
    with h5py.File(tmp_path / "logits.h5", "w") as file:
        file.attrs["format"] = "kd-logit-store"
    for name, message in {
        "absent.h5": "no such file",
        ".": "folder",
        "text.h5": "not an HDF5 file",
        "other.h5": r"not a clip store: it contains \['weights'\]",
        "logits.h5": "its format is 'kd-logit-store'",
    }.items():
        with pytest.raises(ValueError, match=message):
            ClipStore.open(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.attrs.__setitem__("format_version", 99), "version 99"),
        (lambda file: file.attrs.__delitem__("format_version"), "damaged"),
        (lambda file: file.attrs.__setitem__("class_names", "[1,"), "class names"),
        (
            lambda file: file.attrs.__setitem__("class_names", json.dumps([str(i) for i in range(40)])),
            "found uint8",
        ),
        (lambda file: file.attrs.__setitem__("audio_kind", "aac"), "aac"),
        (lambda file: file.__delitem__("target"), "no dataset 'target'"),
        (lambda file: file["offset"].__setitem__(1, 10**9), "offsets"),
        (lambda file: file["offset"].__setitem__(-1, 5), "offsets"),
    ],
)
def test_damaged_stores_are_refused(tmp_path: Path, change, message: str) -> None:
    path = write_encoded(tmp_path / "a.h5")
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(ValueError, match=message):
        ClipStore.open(path)


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 5000), min_size=1, max_size=30), userblock=st.sampled_from([0, 512]))
def test_bytes_of_varying_length_are_what_hdf5_reads(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], userblock: int
) -> None:
    path = tmp_path_factory.mktemp("varying") / "a.h5"
    elements = [generator(1, "varying", 0, row).integers(0, 256, n, dtype=np.uint8) for row, n in enumerate(lengths)]
    with h5py.File(path, "w", userblock_size=userblock) as file:
        dataset = file.create_dataset("mp3", shape=(len(elements),), dtype=h5py.vlen_dtype(np.uint8))
        for row, element in enumerate(elements):
            dataset[row] = element
    with h5py.File(path) as file:
        assert BytesOfVaryingLength.lies_plain(file["mp3"])
        ours = BytesOfVaryingLength(path, file["mp3"])
    for row, element in enumerate(elements):
        np.testing.assert_array_equal(ours[row], element)


def test_damage_that_hdf5_would_be_given_is_noticed_before(tmp_path: Path) -> None:
    """Every byte besides the arrays; a store that was changed through HDF5 has no seal and opens."""
    path = write_encoded(tmp_path / "a.h5", 0, 2)
    data, changed = path.read_bytes(), tmp_path / "changed.h5"
    store = ClipStore.open(path)
    audio = data.index(store.encoded(0))
    for place in range(48, min(audio, 6000), 37):
        changed.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(ValueError, match="changed.h5"):
            ClipStore.open(changed)
    # The seal itself: moved, or its beginning or what leads to it spoilt, beside other damage.
    spoilt = data[:3000] + bytes([data[3000] ^ 4]) + data[3001:]
    seal = data.index(SEAL)
    for damaged in (
        spoilt[:seal] + b"\0" * 128 + spoilt[seal:],
        spoilt[:seal] + b"x" + spoilt[seal + 1 :],
        spoilt[:8] + b"\1" + spoilt[9:],
        spoilt[:40] + (seal - 8).to_bytes(8, "little") + spoilt[48:],
    ):
        changed.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"changed.h5 is a damaged HDF5 file: its seal is not where"):
            ClipStore.open(changed)
    with h5py.File(path, "r+") as file:
        file.attrs["note"] = "by someone else"
    assert ClipStore.open(path).attributes["note"] == "by someone else"


# -- Unknown labels and groups of classes ------------------------------------------------------------------------------

VERBS_AND_NOUNS = LabelSpace((LabelGroup("verb", CLASSES[:4], True), LabelGroup("noun", CLASSES[4:], True)))


def write_masked(path: Path, known: list[tuple[str, ...] | None], first: int = 0) -> Path:
    records = [ClipRecord(f"clip {first + i}", b"x", CLASSES[:1], names) for i, names in enumerate(known)]
    write_clip_store(path, records, CLASSES)
    return path


def test_what_is_known_of_each_clip_is_read_as_written(tmp_path: Path) -> None:
    known = [CLASSES[:3], None, CLASSES[:1], CLASSES]
    store = pickle.loads(pickle.dumps(ClipStore.open(write_masked(tmp_path / "clips.h5", known))))
    assert store.is_masked
    expected = np.array([[names is None or name in names for name in CLASSES] for names in known])
    np.testing.assert_array_equal(store.mask([0, 1, 2, 3]), expected)
    np.testing.assert_array_equal(store.mask(np.array([2, 0])), expected[[2, 0]])
    with pytest.raises(ValueError, match="clip 'clip 0' has labels that are not among its known ones"):
        write_masked(tmp_path / "wrong.h5", [CLASSES[1:]])


def test_a_store_in_which_all_is_known_has_the_bytes_that_it_always_had(tmp_path: Path) -> None:
    everything = write_masked(tmp_path / "a.h5", [CLASSES, CLASSES]).read_bytes()
    assert everything == write_masked(tmp_path / "b.h5", [None, None]).read_bytes()
    store = ClipStore.open(tmp_path / "a.h5")
    assert not store.is_masked
    assert store.mask([1]).all()
    assert store.label_space == LabelSpace.single(CLASSES, exclusive=False)
    with h5py.File(tmp_path / "a.h5") as file:
        assert file.attrs["format_version"] == 2
        assert "known" not in file
        assert "label_groups" not in file.attrs


def test_shards_with_and_without_unknown_labels_are_concatenated(tmp_path: Path) -> None:
    known = [None, None, CLASSES[:2], None]
    parts = [write_masked(tmp_path / f"{i}.h5", known[i : i + 2], i) for i in (0, 2)]
    concatenate(parts, tmp_path / "joined.h5")
    assert (tmp_path / "joined.h5").read_bytes() == write_masked(tmp_path / "whole.h5", known).read_bytes()


def test_a_changed_mask_is_noticed(tmp_path: Path) -> None:
    path = write_masked(tmp_path / "clips.h5", [CLASSES[:3], None])
    with h5py.File(path) as file:
        offset = file["known"].id.get_offset()
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)
    with pytest.raises(ValueError, match="ids, targets or offsets have changed"):
        ClipStore.open(path)


def test_groups_of_classes_are_kept(tmp_path: Path) -> None:
    records = [ClipRecord("a", b"x", (CLASSES[1], CLASSES[7]))]
    write_clip_store(tmp_path / "one.h5", records, CLASSES, label_space=VERBS_AND_NOUNS)
    concatenate([tmp_path / "one.h5"], tmp_path / "joined.h5")
    for name in ("one", "joined"):
        assert ClipStore.open(tmp_path / f"{name}.h5").label_space == VERBS_AND_NOUNS
    single = LabelSpace.single(CLASSES, exclusive=True)
    write_clip_store(tmp_path / "single.h5", [], CLASSES, label_space=single)
    assert ClipStore.open(tmp_path / "single.h5").label_space == single
    with pytest.raises(ValueError, match="different groups of classes"):
        concatenate([tmp_path / "one.h5", tmp_path / "single.h5"], tmp_path / "wrong.h5")
    with pytest.raises(ValueError, match="the label groups and the class list have different classes"):
        write_clip_store(tmp_path / "wrong.h5", [], CLASSES[:5], label_space=single)


@pytest.mark.parametrize(
    "text", ["", "no JSON", "[]", '[["a", 3, true]]', "[[1]]", '[["a", 5, true], ["a", 6, true]]', '[["a", "x", 1]]']
)
def test_damaged_groups_of_classes_are_a_value_error(tmp_path: Path, text: str) -> None:
    write_clip_store(tmp_path / "clips.h5", [], CLASSES)
    with h5py.File(tmp_path / "clips.h5", "r+") as file:
        file.attrs["label_groups"] = text
    with pytest.raises(ValueError, match=r"clips\.h5 is a damaged clip store: its label_groups cannot be read"):
        ClipStore.open(tmp_path / "clips.h5")
