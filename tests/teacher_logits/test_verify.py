"""``kd verify``: says that a good store is good, and finds everything that can be wrong with one."""

import csv
from pathlib import Path
from types import SimpleNamespace

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.hdf5_arrays import id_order
from audio_datasets.system.tables import no_formulas
from teacher_logits.precompute import TeachConfig, teach
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.stores import class_precisions as precisions_module
from teacher_logits.stores.class_precisions import ClassPrecisions, average_precision, class_precisions
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.precision_tables import write_class_table
from teacher_logits.verify import VerifyConfig, main

CLASSES = ("hiss", "hum", "never")
IDS = [f"clip{i}" for i in range(30)]


def write_clips(path: Path, ids=IDS, labelled=True) -> ClipStore:
    """Thirty short clips; every second one hisses, every third one hums."""
    records = [
        ClipRecord(name, np.full(50, int(name[4:]) + 1, np.int16), labels_of(int(name[4:])) if labelled else ())
        for name in ids
    ]
    write_clip_store(path, records, CLASSES, audio_kind="pcm16", sample_rate_hz=8000)
    return ClipStore.open(path)


def labels_of(index: int) -> tuple[str, ...]:
    return ("hiss",) * (index % 2 == 0) + ("hum",) * (index % 3 == 0)


def write_logits(path: Path, clips: ClipStore, seed=0, **changes) -> np.ndarray:
    """A store with logits that are right more often than not; returns them."""
    rng = np.random.default_rng(seed)
    logits = (clips.targets(np.arange(len(clips))) * 2 + rng.normal(0, 1.5, (len(clips), 3))).astype(np.float16)
    settings = {
        "clip_ids": clips.clip_ids,
        "audio_digests": clips.audio_digests(np.arange(len(clips))),
        "class_names": CLASSES,
        "teacher": {"name": "t", "fingerprint": "f"},
        "clip_store_fingerprint": clips.fingerprint,
        "logit_blocks": [logits],
        **changes,
    }
    write_logit_store(path, **settings)
    return logits


@pytest.fixture
def clips(tmp_path) -> ClipStore:
    return write_clips(tmp_path / "clips.h5")


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command on logits.h5 and clips.h5 in the test's folder; gives exit code, output and error."""

    def run_command(*more: str, logits=("logits.h5",)) -> tuple[int, str, str]:
        paths = [str(tmp_path / name) for name in logits]
        code = main(["--logits", *paths, "--clips", str(tmp_path / "clips.h5"), *more])
        return code, *capsys.readouterr()

    return run_command


def test_good_stores_pass_and_their_map_is_told(clips, tmp_path, run, monkeypatch):
    one = write_logits(tmp_path / "logits.h5", clips).astype(np.float64)
    two = write_logits(tmp_path / "two.h5", clips, seed=1).astype(np.float64)
    code, out, _ = run(logits=("logits.h5", "two.h5:3"))
    assert code == 0
    assert "covers 30 of 30 clips; 0 more" in out

    targets = clips.targets(np.arange(30))
    for scores in (one, two, one / 4 + two * 3 / 4):
        expected = np.mean([average_precision_score(targets[:, c], scores[:, c]) for c in (0, 1)])
        assert f"mAP {expected:.4f}" in out
    ensemble = LogitEnsemble.open([tmp_path / "logits.h5", tmp_path / "two.h5"])
    whole = class_precisions(ensemble, clips)
    monkeypatch.setattr(precisions_module, "COLUMN_BYTES_AT_ONCE", 1)  # one class at a time
    monkeypatch.setattr(precisions_module, "ROWS_PER_BLOCK", 7)
    pieces = class_precisions(ensemble, clips)
    for field in ("positives", "stores", "ensemble", "without"):
        np.testing.assert_array_equal(getattr(pieces, field), getattr(whole, field))


def test_a_clip_counts_for_the_classes_that_are_known_of_it(tmp_path, monkeypatch):
    known = [CLASSES if i % 4 else CLASSES[i % 3 : i % 3 + 1] for i in range(30)]
    records = [
        ClipRecord(f"clip{i}", np.full(50, i + 1, np.int16), tuple(n for n in labels_of(i) if n in known[i]), known[i])
        for i in range(30)
    ]
    write_clip_store(tmp_path / "clips.h5", records, CLASSES, audio_kind="pcm16", sample_rate_hz=8000)
    clips = ClipStore.open(tmp_path / "clips.h5")
    logits = write_logits(tmp_path / "logits.h5", clips).astype(np.float64)
    monkeypatch.setattr(precisions_module, "ROWS_PER_BLOCK", 7)
    found = class_precisions(LogitEnsemble.open([tmp_path / "logits.h5"]), clips)
    targets, mask = clips.targets(np.arange(30)), clips.mask(np.arange(30))
    unmasked = []
    for index in (0, 1):
        rows = mask[:, index]
        expected = average_precision_score(targets[rows, index], logits[rows, index])
        assert found.ensemble[index] == pytest.approx(expected)
        unmasked.append(average_precision_score(targets[:, index], logits[:, index]))
    assert found.ensemble[:2] != pytest.approx(unmasked)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 40))
def test_average_precision_is_scikit_learns_also_with_equal_scores(data, count):
    scores = np.array(data.draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count)), np.float32)
    targets = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    if targets.any():
        expected = average_precision_score(targets, scores)
        assert average_precision(scores, np.flatnonzero(targets)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("mean", ["logits", "probabilities"])
def test_the_classes_that_a_teacher_hurts_are_named(clips, tmp_path, run, mean):
    """The second teacher takes hissing for its opposite; the third takes no part."""
    targets = clips.targets(np.arange(30))
    right = (8 * targets - 4 + np.random.default_rng(0).normal(0, 0.5, targets.shape)).astype(np.float16)
    wrong = right * np.array([-1, 1, 1], np.float16)
    write_logits(tmp_path / "right.h5", clips, logit_blocks=[right])
    write_logits(tmp_path / "wrong.h5", clips, logit_blocks=[wrong])
    write_logits(tmp_path / "idle.h5", clips, logit_blocks=[-right])
    names = ("right.h5", "wrong.h5:3", "idle.h5:0")
    table = tmp_path / "table.csv"
    code, out, _ = run("--ensemble", mean, "--classes", "--table", str(table), logits=names)
    assert code == 0
    without_right, without_wrong = (line for line in out.splitlines() if "it hurts" in line)
    assert without_right.endswith("classes that it hurts: 0")
    assert "mAP 1.0000" in without_wrong
    assert "classes that it hurts: 1 (hiss +0." in without_wrong

    rows = {row["class"]: row for row in csv.DictReader(table.open())}
    assert list(rows) == list(CLASSES)
    hiss = rows["hiss"]
    assert (hiss["clips"], rows["never"]["clips"], rows["never"]["ensemble"]) == ("15", "0", "")
    assert float(hiss[f"{tmp_path / 'right.h5'}"]) == float(hiss[f"without {tmp_path / 'wrong.h5'}"]) == 1.0
    assert float(hiss["ensemble"]) < 0.6
    assert hiss[f"without {tmp_path / 'idle.h5'}"] == ""
    (line,) = (line for line in out.splitlines() if line.startswith("hiss"))
    assert line.split()[1:4] == ["15", "1.000", hiss[f"{tmp_path / 'wrong.h5'}"][:5]]
    assert line.endswith("1.000*  -")


def test_precisions_are_compared_over_the_clips_that_all_stores_have(clips, tmp_path, run):
    write_logits(tmp_path / "all.h5", clips)
    some = np.arange(3, 30)
    logits = np.random.default_rng(3).normal(size=(27, 3)).astype(np.float16)
    digests = clips.audio_digests(some)
    write_logits(tmp_path / "some.h5", clips, clip_ids=IDS[3:], audio_digests=digests, logit_blocks=[logits])
    code, out, _ = run("--allow-missing", logits=("all.h5", "some.h5"))
    assert code == 0
    assert "over the 27 clips that all stores have" in out
    targets, read = clips.targets(some), LogitStore.open(tmp_path / "all.h5").read(IDS[3:])
    expected = np.mean([average_precision_score(targets[:, c], read[:, c]) for c in (0, 1)])
    assert f"mAP {expected:.4f}  {tmp_path / 'all.h5'}" in out


def test_checks_alone(clips, tmp_path, run):
    write_logits(tmp_path / "logits.h5", clips)
    code, out, _ = run("--no-average-precision")
    assert (code, "mAP" in out) == (0, False)


def test_clips_without_labels_have_no_map(tmp_path, run):
    clips = write_clips(tmp_path / "clips.h5", labelled=False)
    write_logits(tmp_path / "logits.h5", clips)
    code, out, _ = run()
    assert code == 0
    assert "no mAP" in out


def test_missing_clips(clips, tmp_path, run):
    first = slice(0, 20)
    logits = np.zeros((20, 3), np.float16)
    digests = clips.audio_digests(np.arange(20))
    write_logits(tmp_path / "logits.h5", clips, clip_ids=IDS[first], audio_digests=digests, logit_blocks=[logits])
    code, _, error = run()
    assert code == 2
    assert "10 of 30 clips have no logits: 'clip20', 'clip21'" in error
    code, out, _ = run("--allow-missing")
    assert code == 0
    assert "covers 20 of 30 clips" in out


def test_logits_of_another_clip_store(clips, tmp_path, run):
    larger = write_clips(tmp_path / "larger.h5", [*IDS, "clip99"])
    write_logits(tmp_path / "logits.h5", larger)
    code, _, error = run()
    assert code == 2
    assert "made from another clip store" in error
    code, out, _ = run("--other-clip-store")
    assert code == 0
    assert "1 more clips are not in" in out

    write_logits(tmp_path / "logits.h5", larger, audio_digests=np.zeros((31, 16), np.uint8))
    code, _, error = run("--other-clip-store")
    assert code == 2
    assert "for 30 clips there are no digests to check whether the audio is the same" in error


def test_other_audio(clips, tmp_path, run):
    digests = clips.audio_digests(np.arange(30)).copy()
    digests[[3, 4]] = digests[[4, 3]]
    write_logits(tmp_path / "logits.h5", clips, audio_digests=digests)
    code, _, error = run()
    assert code == 2
    assert "2 clips have different audio from what the teacher heard: 'clip3', 'clip4'" in error


def test_a_class_name_that_was_removed_is_noticed(clips, tmp_path, run):
    """With its column gone too, the store is whole but of other classes; with the name alone gone, it is damaged."""
    write_logits(tmp_path / "logits.h5", clips, class_names=CLASSES[:2], logit_blocks=[np.zeros((30, 2), np.float16)])
    code, _, error = run()
    assert (code, "3 classes in" in error and "2 in" in error) == (2, True)

    write_logits(tmp_path / "logits.h5", clips)
    with h5py.File(tmp_path / "logits.h5", "r+") as file:
        file.attrs["class_names"] = '["hiss", "hum"]'
    code, _, error = run()
    assert code == 2
    assert "logits for 30 clips, 1 views and 2 class names must have shape (30, 2); found (30, 3)" in error


def test_other_classes(clips, tmp_path, run):
    write_logits(tmp_path / "logits.h5", clips, class_names=("hiss", "hum", "always"))
    code, _, error = run()
    assert code == 2
    assert "class 2 is 'never' in" in error


def test_values_and_ids_changed_afterwards(clips, tmp_path, run):
    write_logits(tmp_path / "logits.h5", clips)
    with h5py.File(tmp_path / "logits.h5", "r+") as file:
        file["logits"][7, 1] = np.inf
        ids = file["clip_id"][:]
        ids[5] = ids[6]
        file["clip_id"][...] = ids
        file["clip_id_order"][...] = id_order(ids)
    code, _, error = run()
    assert code == 2
    assert "5 mismatches" in error
    assert "1 clips have logits that are not finite, the first: 'clip7'" in error
    assert "1 clip ids occur more than once: 'clip6'" in error
    assert "1 of 30 clips have no logits: 'clip5'" in error
    assert "has changed since it was written" in error


@pytest.mark.parametrize(("order", "message"), [("reversed", "are not sorted"), ("zeros", "every row exactly once")])
def test_a_damaged_order_of_ids(clips, tmp_path, run, order, message):
    write_logits(tmp_path / "logits.h5", clips)
    with h5py.File(tmp_path / "logits.h5", "r+") as file:
        stored = file["clip_id_order"][:]
        file["clip_id_order"][...] = stored[::-1] if order == "reversed" else 0 * stored
    code, _, error = run()
    assert code == 2
    assert message in error


def test_the_teacher_is_checked(clips, run_folder, tiny_store, tmp_path, capsys):
    (path,) = teach(TeachConfig(tiny_store, (str(run_folder),), tmp_path / "out", workers=0, clip_seconds=0.25))
    good = ["--logits", str(path), "--clips", str(tiny_store)]
    assert main([*good, "--teacher", str(run_folder)]) == 0
    capsys.readouterr()

    other = LogitStore.open(path)
    tiny = ClipStore.open(tiny_store)
    write_logit_store(
        tmp_path / "changed.h5",
        clip_ids=other.clip_ids,
        audio_digests=tiny.audio_digests(np.arange(len(tiny))),
        logit_blocks=[logits for _, logits in other.blocks()],
        class_names=other.class_names,
        teacher={**other.teacher, "fingerprint": "another"},
        clip_store_fingerprint=tiny.fingerprint,
    )
    code = main(["--logits", str(tmp_path / "changed.h5"), "--clips", str(tiny_store), "--teacher", str(run_folder)])
    assert code == 2
    assert "its logits are not from teacher" in capsys.readouterr().err


def test_files_of_another_kind(clips, tmp_path, run):
    for content in (b"", b"no HDF5"):
        (tmp_path / "logits.h5").write_bytes(content)
        code, _, error = run()
        assert code == 2
        assert "logits.h5" in error
    code, _, error = run(logits=("clips.h5",))
    assert code == 2
    assert "is not a logit store" in error
    code, _, error = run(logits=("none.h5",))
    assert (code, "no such file" in error) == (2, True)


def test_settings_that_are_refused():
    with pytest.raises(ValueError, match="found 2 for 1"):
        VerifyConfig(("a.h5",), Path("c.h5"), teacher=("x", "y"))
    with pytest.raises(ValueError, match="at least one logit store"):
        VerifyConfig((), Path("c.h5"))
    with pytest.raises(ValueError, match="need average precisions; leave out --no-average-precision"):
        VerifyConfig(("a.h5",), Path("c.h5"), classes=True, average_precision=False)


names = st.text(st.characters(codec="utf-8"), min_size=1, max_size=6).filter(str.strip)


@given(st.lists(names, min_size=1, max_size=5, unique=True))
@settings(max_examples=30)
def test_a_table_of_any_class_names_reads_back(tmp_path_factory, class_names):
    path = tmp_path_factory.mktemp("table") / "table.csv"
    values = np.linspace(0, 1, len(class_names))
    positives = np.arange(len(class_names))
    precisions = ClassPrecisions(9, positives, values[None], values, np.full((1, len(class_names)), np.nan))
    store = SimpleNamespace(path="teacher, one.h5")
    ensemble = SimpleNamespace(stores=(store,), class_names=tuple(class_names), mean="logits", weights=(1.0,))
    write_class_table(path, precisions, ensemble)
    with open(path, encoding="utf-8", newline="") as file:
        head, *rows = csv.reader(file, strict=True)
    assert head == ["class", "clips", "teacher, one.h5"]
    assert [(name, int(clips), float(value)) for name, clips, value in rows] == list(
        zip(no_formulas(class_names), positives.tolist(), values.tolist(), strict=True)
    )


def test_names_that_are_formulas_get_a_quote() -> None:
    row = ["=1+1", "@cat", "+a", "-a", "-1.5", "a=b", -2, 0.5, ""]
    assert no_formulas(row) == ["'=1+1", "'@cat", "'+a", "'-a", "-1.5", "a=b", -2, 0.5, ""]
