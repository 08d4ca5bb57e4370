"""Further audio without labels behind the clips of a run."""

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from audio_datasets.tasks.unlabelled import SoundFolder
from kd.data.unlabelled import WithUnlabelled, open_sources, with_unlabelled


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    """Sounds of other lengths and rates, some in sub-folders, and a file that is none."""
    folder = tmp_path / "sounds"
    for name, seconds, rate in (("a.wav", 0.2, 8000), ("far/b.flac", 3.0, 44100), ("far/away/c.ogg", 1.0, 22050)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(folder / name, np.full(round(seconds * rate), 0.25), rate)
    (folder / "notes.txt").write_text("no sound")
    (folder / ".hidden.wav").write_text("no sound")
    return folder


def test_further_audio_follows_the_clips(tiny_store: Path, sounds: Path) -> None:
    clips, said = ClipStore.open(tiny_store), []
    both = with_unlabelled(clips, open_sources([sounds], clips.class_names), said.append)
    assert said == [
        f"{sounds}: 3 clips without labels; skipped, as not audio: 1 .txt, as 'notes.txt'; passed over, since they are hidden: '.hidden.wav'"
    ]
    assert len(both) == 15
    assert both.further_rows.tolist() == [12, 13, 14]
    assert [both.clip_id(row) for row in (0, 11, 12, 13, 14)] == [
        *("clip-0000", "clip-0011", "a.wav", "far/away/c.ogg", "far/b.flac")
    ]
    rows = [14, 3, 12]
    np.testing.assert_array_equal(both.mask(rows).all(axis=1), [False, True, False])
    np.testing.assert_array_equal(both.targets(rows)[1], clips.targets([3])[0])
    np.testing.assert_array_equal(both.audio_digests(rows)[1], clips.audio_digests([3])[0])
    assert len(both.waveform(14, 32000, 0.5, 1.0)) == 32000
    np.testing.assert_array_equal(both.waveform(3, 32000), clips.waveform(3, 32000))
    assert both.duration_seconds(12) == pytest.approx(0.2)
    assert pickle.loads(pickle.dumps(both)).clip_id(13) == "far/away/c.ogg"
    assert with_unlabelled(clips, []) is clips


def test_the_labels_of_a_further_store_are_not_used(tiny_store: Path, tmp_path: Path) -> None:
    path = tmp_path / "more.h5"
    write_clip_store(
        path, [ClipRecord("x", np.zeros(800, "<i2"), ("dog",))], ("dog",), audio_kind="pcm16", sample_rate_hz=8000
    )
    clips, said = ClipStore.open(tiny_store), []
    both = with_unlabelled(clips, open_sources([path], clips.class_names), said.append)
    assert said == [f"{path}: 1 clips without labels; its labels are not used"]
    assert not both.mask([12]).any()
    assert both.class_names == clips.class_names


def make_empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_is_there_twice_is_refused(tiny_store: Path, sounds: Path, make_task_folder: Callable[..., Path]) -> None:
    clips = ClipStore.open(tiny_store)
    with pytest.raises(ValueError, match="both have the clip ids 'clip-0000', 'clip-0001', 'clip-0002' and 9 more"):
        with_unlabelled(clips, open_sources([tiny_store], clips.class_names))
    folder = make_task_folder("folder")
    (folder / "unlabelled").mkdir()
    (folder / "unlabelled" / "x.wav").write_bytes((sounds / "a.wav").read_bytes())
    task_clips, _ = read_task(get_task("folder"), folder)
    with pytest.raises(ValueError, match="1 files of --unlabelled .* are also clips of .*: 'x.wav'"):
        with_unlabelled(task_clips, open_sources([folder / "unlabelled"], task_clips.class_names))
    with pytest.raises(ValueError, match="no such folder of sounds or clip store"):
        open_sources([sounds / "none"], clips.class_names)
    with pytest.raises(ValueError, match="has no audio files"):
        open_sources([make_empty(folder.parent / "empty")], clips.class_names)


def test_the_fingerprint_follows_the_sources(tiny_store: Path, sounds: Path) -> None:
    clips = ClipStore.open(tiny_store)
    before = WithUnlabelled(clips, [SoundFolder(sounds, clips.class_names)]).fingerprint
    (sounds / "d.wav").write_bytes((sounds / "a.wav").read_bytes())
    assert WithUnlabelled(clips, [SoundFolder(sounds, clips.class_names)]).fingerprint != before != clips.fingerprint
