"""One teacher's logits in several stores: `a.h5+b.h5`."""

import pickle
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from teacher_logits.store import LogitStore, write_logit_store
from teacher_logits.stores.ensemble import LogitEnsemble, open_logits
from teacher_logits.stores.joined import JoinedLogits
from teacher_logits.verify import main as verify


def write_part(path: Path, clips: ClipStore, logits: np.ndarray, first: int, **teacher) -> Path:
    rows = np.arange(first, first + len(logits) // teacher.get("views", {"views": 1})["views"])
    write_logit_store(
        path,
        clip_ids=[clips.clip_id(int(row)) for row in rows],
        audio_digests=clips.audio_digests(rows),
        logit_blocks=[logits.astype(np.float16)],
        class_names=clips.class_names,
        teacher={"name": "one", "fingerprint": "1" * 32, **teacher},
        clip_store_fingerprint=clips.fingerprint,
    )
    return path


def test_two_stores_of_a_teacher_read_as_one(clips: ClipStore, tmp_path: Path) -> None:
    logits = np.arange(len(clips) * 3).reshape(-1, 3)
    a = write_part(tmp_path / "a.h5", clips, logits[:5], 0)
    b = write_part(tmp_path / "b.h5", clips, logits[5:], 5)
    whole = write_part(tmp_path / "whole.h5", clips, logits, 0)
    joined = open_logits(Path(f"{b}+{a}"))
    assert isinstance(joined, JoinedLogits)
    assert len(joined) == len(clips)
    ids = [clips.clip_id(row) for row in (11, 0, 4, 5, 4)]
    for store in (joined, pickle.loads(pickle.dumps(joined))):
        np.testing.assert_array_equal(store.read(ids), LogitStore.open(whole).read(ids))
        assert [store.clip_id(int(row)) for row in store.rows(ids)] == ids
        np.testing.assert_array_equal(store.audio_digests(store.rows(ids)), clips.audio_digests([11, 0, 4, 5, 4]))
    assert joined.rows(["x", ids[0]]).tolist() == [-1, 6]
    with pytest.raises(ValueError, match="no logits for 1 of 2 clips: 'x'"):
        joined.read(["x", ids[0]])
    with pytest.raises(ValueError, match="rows must be from 0 to 11"):
        joined.read_rows(np.array([12]))

    ensemble = LogitEnsemble.open([f"{a}+{b}:3", f"{whole}:1"])
    assert ensemble.weights == (3.0, 1.0)
    mean, present = ensemble.read([*ids, "x"])
    np.testing.assert_allclose(mean[:-1], LogitStore.open(whole).read(ids))
    assert present.tolist() == [True] * 5 + [False]
    assert not ensemble.check_against(clips).any()
    assert LogitEnsemble.open([f"{a}"]).check_against(clips).sum() == 7


def test_joined_logits_are_verified_against_joined_clips(
    make_tiny_store: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    a = make_tiny_store("clips-a.h5", clips=6)
    clips_a = ClipStore.open(a)
    records = [ClipRecord(f"more-{row}", np.full(100, row, np.int16), ("hiss",)) for row in range(4)]
    write_clip_store(tmp_path / "clips-b.h5", records, clips_a.class_names, audio_kind="pcm16", sample_rate_hz=32000)
    clips_b = ClipStore.open(tmp_path / "clips-b.h5")
    logits_a = write_part(tmp_path / "a.h5", clips_a, np.ones((6, 3)), 0)
    logits_b = write_part(tmp_path / "b.h5", clips_b, np.ones((4, 3)), 0)
    command = ["--logits", f"{logits_a}+{logits_b}", "--clips", str(clips_b.path), str(a)]
    assert verify(command) == 0
    assert "covers 10 of 10 clips" in capsys.readouterr().out
    assert verify([*command, str(make_tiny_store("clips-c.h5", clips=3))]) == 2
    capsys.readouterr()
    assert verify([*command[:3], str(a)]) == 2
    assert "made from another clip store" in capsys.readouterr().err
    with h5py.File(logits_b, "r+") as file:
        file["logits"][2, 1] = np.nan
    assert verify(command) == 2
    assert "logits that are not finite, the first: 'more-2'" in capsys.readouterr().err


def test_each_clip_has_its_views(clips: ClipStore, tmp_path: Path) -> None:
    logits, views = np.arange(len(clips) * 6).reshape(-1, 2, 3), {"views": {"views": 2}}
    parts = [
        write_part(tmp_path / f"{first}.h5", clips, logits[first:stop].reshape(-1, 3), first, **views)
        for first, stop in ((0, 5), (5, len(clips)))
    ]
    ensemble = LogitEnsemble.open(["+".join(map(str, parts))])
    assert ensemble.views.views == 2
    read, _ = ensemble.read([clips.clip_id(7), clips.clip_id(2)], np.array([1, 0]))
    np.testing.assert_array_equal(read, [logits[7, 1], logits[2, 0]])


def test_stores_that_are_not_of_one_teacher_are_refused(
    clips: ClipStore, tmp_path: Path, make_tiny_store: Callable[..., Path]
) -> None:
    logits = np.zeros((5, 3))
    a = write_part(tmp_path / "a.h5", clips, logits, 0)
    same_clips = write_part(tmp_path / "b.h5", clips, logits, 4)
    with pytest.raises(ValueError, match=f"both have logits for '{clips.clip_id(4)}'"):
        open_logits(Path(f"{a}+{same_clips}"))
    other = write_part(tmp_path / "c.h5", clips, logits, 5, name="two", fingerprint="2" * 32)
    with pytest.raises(ValueError, match=r"from different teachers.*'one' \(111111111111.*'two' \(222222222222"):
        open_logits(Path(f"{a}+{other}"))
    other_classes = ClipStore.open(make_tiny_store("other.h5", class_names=("hiss", "hum", "click")))
    renamed = write_part(tmp_path / "d.h5", other_classes, logits, 5)
    with pytest.raises(ValueError, match="class lists differ: class 1"):
        open_logits(Path(f"{a}+{renamed}"))
    with pytest.raises(ValueError, match="joined as A.h5"):
        open_logits(Path(f"{a}+"))
    with pytest.raises(ValueError, match="no such file"):
        open_logits(Path(f"{a}+{tmp_path / 'absent.h5'}"))


def test_a_file_with_a_plus_in_its_name_is_one_store(clips: ClipStore, tmp_path: Path) -> None:
    path = write_part(tmp_path / "one+two.h5", clips, np.ones((5, 3)), 0)
    assert isinstance(open_logits(path), LogitStore)
