"""`kd import-logits`: an array of predictions and a dict of file name -> row, as they are published."""

import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.system.randomness import generator
from teacher_logits.import_logits import logit, main
from teacher_logits.store import LogitStore
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.stores.links import TeacherLink
from teacher_logits.verify import VerifyConfig, verify

CLASSES = tuple(f"class {index}" for index in range(527))
NAMES = tuple(f"Yabcdefgh-{index}_" for index in range(6))


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with six clips' predictions in the layout of the public ones; row 2 belongs to no name."""
    predictions = 3 * generator(5, "published logits").standard_normal((7, 527)).astype(np.float32) - 4
    np.save(tmp_path / "predictions.npy", predictions)
    rows = dict(zip(NAMES, (6, 0, 5, 1, 4, 3), strict=True))
    (tmp_path / "names.pkl").write_bytes(pickle.dumps(rows))
    (tmp_path / "classes.txt").write_text("\n".join(CLASSES))
    return tmp_path


def run(
    folder: Path, *more: str, index: str = "names.pkl", logits: str = "predictions.npy", classes: bool = True
) -> int:
    options = ["--logits", str(folder / logits), "--index", str(folder / index), "--out", str(folder / "teacher.h5")]
    options += ["--class-names", str(folder / "classes.txt")] if classes else []
    return main([*options, *more])


def clip_store(path: Path, ids: list[str]) -> Path:
    write_clip_store(path, [ClipRecord(i, b"audio", (CLASSES[k],)) for k, i in enumerate(ids)], CLASSES)
    return path


def test_the_published_layout(published: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(published, "--teacher-name", "PaSST ensemble") == 0
    assert "7 rows × 527 classes, 6 of them named" in capsys.readouterr().out
    store = LogitStore.open(published / "teacher.h5")
    predictions = np.load(published / "predictions.npy")
    np.testing.assert_array_equal(store.read(NAMES), predictions[[6, 0, 5, 1, 4, 3]].astype(np.float16))
    assert store.class_names == CLASSES
    assert store.teacher["name"] == "PaSST ensemble"
    assert store.read_fingerprint() == store.fingerprint
    assert run(published) == 2
    assert "replace it with --overwrite" in capsys.readouterr().err
    assert run(published, "--overwrite") == 0
    assert LogitStore.open(published / "teacher.h5").teacher["name"] == "predictions"


@pytest.mark.parametrize(
    ("index", "content"),
    [
        ("names.json", json.dumps({f"00/{name}.mp3": row for row, name in enumerate(NAMES)})),
        ("names.csv", "file,row\n" + "".join(f"00/{name}.wav,{row}\n" for row, name in enumerate(NAMES))),
        ("plain.csv", "".join(f"{name},{row}\n" for row, name in enumerate(NAMES))),
        ("numpy.pkl", pickle.dumps({f"a/b/{name}.flac": np.int64(row) for row, name in enumerate(NAMES)})),
        ("bytes.pkl", pickle.dumps({name.encode(): row for row, name in enumerate(NAMES)}, protocol=2)),
    ],
)
def test_other_kinds_of_index_and_names_with_folder_and_suffix(
    published: Path, index: str, content: str | bytes
) -> None:
    (published / index).write_bytes(content.encode() if isinstance(content, str) else content)
    assert run(published, index=index) == 0
    assert LogitStore.open(published / "teacher.h5").clip_ids == list(NAMES)
    named = [name.split(",")[0] for name in content.splitlines() if "/" in name] if index == "names.csv" else None
    if named:
        assert run(published, "--ids", "name", "--overwrite", index=index) == 0
        assert LogitStore.open(published / "teacher.h5").clip_ids == named


def test_ids_of_clip_stores_are_taken_over(published: Path, capsys: pytest.CaptureFixture) -> None:
    """As users of PaSST's HDF5 files have them, in two stores; one clip has no prediction, one prediction no clip."""
    a = clip_store(published / "a.h5", [f"0{k}/{NAMES[k]}.mp3" for k in (3, 1)])
    b = clip_store(published / "b.h5", [NAMES[0], "00/Yno-such-id0.mp3", f"02/{NAMES[2]}.mp3", f"x/{NAMES[5]}.wav"])
    assert run(published, "--clips", str(a), str(b), classes=False) == 0
    printed = capsys.readouterr().out
    assert "5 of 6 clips of" in printed
    assert "(83.3%); none for '00/Yno-such-id0.mp3'" in printed
    assert "1 names match no clip" in printed
    store = LogitStore.open(published / "teacher.h5")
    predictions = np.load(published / "predictions.npy").astype(np.float16)
    ids = [f"03/{NAMES[3]}.mp3", f"01/{NAMES[1]}.mp3", NAMES[0], f"02/{NAMES[2]}.mp3", f"x/{NAMES[5]}.wav"]
    np.testing.assert_array_equal(store.read(ids), predictions[[1, 0, 6, 5, 3]])
    assert run(published, "--clips", str(a), "--ids", "name", "--overwrite") == 2
    assert "0 of 2 clips" in capsys.readouterr().err

    assert run(published, "--clips", str(a), "--overwrite") == 0
    verify(VerifyConfig(logits=(str(published / "teacher.h5"),), clips=(a,)))
    assert not LogitEnsemble.open([published / "teacher.h5"]).check_against(ClipStore.open(a)).any()


@pytest.mark.parametrize("named", ["{}", "Y{}", "00/Y{}.mp3", "Y{}.wav"])
@pytest.mark.parametrize("clip", ["{}", "Y{}", "Y{}.mp3"])
def test_audiosets_ids_match_whichever_way_they_are_written(
    published: Path, capsys: pytest.CaptureFixture, named: str, clip: str
) -> None:
    keys = [name[1:] for name in NAMES]
    (published / "bare.json").write_text(json.dumps({named.format(key): row for row, key in enumerate(keys)}))
    clips = clip_store(published / "clips.h5", [clip.format(key) for key in keys[::-1]] + ["YnotInIndex1"])
    assert run(published, "--clips", str(clips), index="bare.json", classes=False) == 0
    output = capsys.readouterr().out
    assert "6 of 7 clips" in output
    assert ("found by their YouTube id" in output) == (named.removeprefix("00/")[:1] != clip[:1])
    predictions = np.load(published / "predictions.npy")[:6].astype(np.float16)
    store = LogitStore.open(published / "teacher.h5")
    np.testing.assert_array_equal(store.read([clip.format(key) for key in keys]), predictions)
    # Imported without clips, the ids are the index's own, and are found all the same.
    assert run(published, "--overwrite", index="bare.json") == 0
    np.testing.assert_array_equal(
        LogitStore.open(published / "teacher.h5").read([clip.format(key) for key in keys]), predictions
    )


def test_clips_found_under_another_spelling_are_told_of(published: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys = [name[1:] for name in NAMES]
    (published / "bare.json").write_text(json.dumps({key: row for row, key in enumerate(keys)}))
    assert run(published, index="bare.json") == 0
    clips = ClipStore.open(clip_store(published / "clips.h5", list(NAMES)))
    ensemble = LogitEnsemble.open([published / "teacher.h5"])
    assert not ensemble.check_against(clips).any()
    assert f"6 clips are found under another spelling of their id, as {NAMES[0]!r} under {keys[0]!r}" in caplog.text


def test_probabilities_become_logits(published: Path, capsys: pytest.CaptureFixture) -> None:
    values = np.load(published / "predictions.npy").astype(np.float64)
    probabilities = (1 / (1 + np.exp(-values))).astype(np.float32)
    probabilities[0, :2] = (0.0, 1.0)
    np.save(published / "probabilities.npy", probabilities)
    assert run(published, logits="probabilities.npy") == 2
    assert "give --probabilities" in capsys.readouterr().err
    assert not (published / "teacher.h5").exists()
    assert run(published, "--probabilities", logits="probabilities.npy") == 0
    found = LogitStore.open(published / "teacher.h5").read(NAMES)
    np.testing.assert_allclose(found[0], values[6], rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(found[1, :2], [-16.12, 16.12], atol=0.01)
    np.testing.assert_allclose(logit(np.float32([0.25, 0.5])), [np.log(1 / 3), 0], atol=1e-6)
    assert run(published, "--probabilities", "--overwrite") == 2
    assert "not probabilities" in capsys.readouterr().err


class Malicious:
    def __reduce__(self) -> tuple:
        return os.system, ("touch executed",)


WRONG = {
    "a pickle that runs code": ("index.pkl", pickle.dumps({"a": Malicious()}), "nothing was executed"),
    "a pickled list": ("index.pkl", pickle.dumps(["a"]), "must contain a dict"),
    "a row beyond the end": (
        "index.pkl",
        pickle.dumps({"a": 0, "b": 7}),
        "gives 'b' the row 7; the array has rows 0 to 6",
    ),
    "a negative row": ("index.pkl", pickle.dumps({"a": -1}), "rows 0 to 6"),
    "a row that is no number": ("index.pkl", pickle.dumps({"a": "0"}), "must map file names to row numbers"),
    "a row that is true": ("index.pkl", pickle.dumps({"a": True}), "must map file names to row numbers"),
    "a row twice": ("index.json", b'{"a": 1, "b": 2, "c": 1}', "gives 'a' and 'c' the same row, 1"),
    "a name twice": ("index.json", b'{"a": 1, "a": 2}', "more than once: 'a'"),
    "two names with one stem": ("index.json", b'{"0/a.mp3": 1, "1/a.mp3": 2}', "clip ids must be unique"),
    "a JSON list": ("index.json", b'["a"]', "expected a JSON object"),
    "no JSON": ("index.json", b"{", "index.json"),
    "a wrong line": ("index.csv", b"file,row\na,0\nb,x\n", "line 3: 'x' is not a row number"),
    "too many columns": ("index.csv", b"a,0,1\n", "line 1: expected a file name"),
    "no names": ("index.csv", b"file,row\n", "names no rows"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_index_is_refused(
    published: Path, name: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(published)
    index, content, message = WRONG[name]
    (published / index).write_bytes(content)
    assert run(published, index=index) == 2
    assert message in capsys.readouterr().err
    assert not (published / "executed").exists()
    assert not (published / "teacher.h5").exists()


def test_a_wrong_array_is_refused(published: Path, capsys: pytest.CaptureFixture) -> None:
    def refused(array: np.ndarray | bytes) -> str:
        path = published / "wrong.npy"
        path.write_bytes(array) if isinstance(array, bytes) else np.save(path, array)
        assert run(published, logits="wrong.npy") == 2
        return capsys.readouterr().err

    assert "has 526 columns; the class list has 527 names" in refused(np.zeros((7, 526)))
    assert "found int64 (7, 527)" in refused(np.zeros((7, 527), dtype=int))
    assert "found float64 (527,)" in refused(np.zeros(527))
    assert "is not an .npy file" in refused(np.array([Malicious()], dtype=object))
    assert "is not an .npy file" in refused(b"no array")
    infinite = np.load(published / "predictions.npy")
    infinite[5, 3] = np.inf
    assert f"logits for clip '{NAMES[2]}' cannot be stored: found inf" in refused(infinite)


def test_clips_that_would_share_logits_are_refused(published: Path, capsys: pytest.CaptureFixture) -> None:
    clips = clip_store(published / "clips.h5", [f"0/{NAMES[0]}.mp3", f"1/{NAMES[0]}.mp3", NAMES[1]])
    assert run(published, "--clips", str(clips)) == 2
    assert f"would all get the logits of '{NAMES[0]}'" in capsys.readouterr().err


def test_the_teachers_link_is_stored(published: Path, capsys: pytest.CaptureFixture) -> None:
    store = published / "teacher.h5"
    assert run(published) == 0
    assert LogitStore.open(store).link is None
    assert "sigmoid or a softmax is not known; --teacher-link stores it" in capsys.readouterr().out
    assert run(published, "--overwrite", "--teacher-link", "softmax") == 0
    assert LogitStore.open(store).link == TeacherLink.whole("softmax", 527)
    shares = softmax(np.load(published / "predictions.npy"), axis=1)
    np.save(published / "shares.npy", shares)
    expected = shares[[6, 0, 5, 1, 4, 3]]
    for options in ((), ("--teacher-link", "softmax")):
        assert run(published, "--overwrite", "--probabilities", *options, logits="shares.npy") == 0
        opened = LogitStore.open(store)
        found = opened.link.probabilities(torch.from_numpy(opened.read(NAMES)))
        np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-6)
    (published / "classes.txt").write_text("\n".join([*CLASSES[2:], "Speech", "Male speech, man speaking"]))
    assert run(published, "--overwrite") == 0
    assert LogitStore.open(store).link == TeacherLink.whole("sigmoid", 527)
