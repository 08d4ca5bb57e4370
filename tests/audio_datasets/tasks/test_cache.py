"""A task's clips decoded once into a clip store."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import audio_datasets
from audio_datasets.audio.codec import to_pcm16
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks import cache as cache_module
from audio_datasets.tasks.cache import CachedClips, cache_path, fill_cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task


def test_a_cache_gives_the_same_sound_to_16_bits(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    clips, _ = read_task(get_task("folder"), make_task_folder("folder"))
    with pytest.raises(ValueError, match="no cache"):
        CachedClips(clips, tmp_path / "cache", 16000)
    fill_cache(clips, tmp_path / "cache", 16000)
    cached = pickle.loads(pickle.dumps(CachedClips(clips, tmp_path / "cache", 16000)))
    for row in range(len(clips)):
        for part in ({}, {"start_seconds": 0.1, "seconds": 0.2}, {"start_seconds": 0.2, "seconds": 9.0}):
            np.testing.assert_allclose(
                cached.waveform(row, 16000, **part), clips.waveform(row, 16000, **part), atol=1e-4
            )
        assert cached.duration_seconds(row) == pytest.approx(clips.duration_seconds(row), abs=1e-3)
    np.testing.assert_array_equal(cached.targets([0, 9]), clips.targets([0, 9]))
    with pytest.raises(ValueError, match="16000 Hz; requested were 32000 Hz"):
        cached.waveform(0, 32000)
    files = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}
    fill_cache(clips, tmp_path / "cache", 16000)
    assert files == {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}


@pytest.mark.parametrize("shard_bytes", [1, 30_000, 2**26])
def test_a_cache_is_an_ordinary_clip_store(
    make_task_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shard_bytes: int
) -> None:
    clips, _ = read_task(get_task("openmic"), make_task_folder("openmic"))
    monkeypatch.setattr(cache_module, "SHARD_BYTES", shard_bytes)
    fill_cache(clips, tmp_path, 16000)
    (path,) = tmp_path.glob("*.h5")
    assert path == cache_path(clips, tmp_path, 16000)
    store, rows = ClipStore.open(path), np.arange(len(clips))
    assert (store.audio_kind, store.sample_rate_hz) == ("pcm16", 16000)
    assert store.clip_ids == clips.clip_ids
    np.testing.assert_array_equal(store.targets(rows), clips.targets(rows))
    np.testing.assert_array_equal(store.mask(rows), clips.mask(rows))
    for row in rows:
        np.testing.assert_array_equal(to_pcm16(store.waveform(row, 16000)), to_pcm16(clips.waveform(row, 16000)))


def test_changed_files_labels_and_rates_have_caches_of_their_own(
    make_task_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_task_folder("fsd50k")
    clips, _ = read_task(get_task("fsd50k"), folder)
    first = cache_path(clips, tmp_path, 16000)
    assert cache_path(clips, tmp_path, 32000) != first
    table = folder / "FSD50K.ground_truth" / "dev.csv"
    table.write_text(table.read_text().replace("Bark,Accordion", "Bark,Rain"))
    relabelled, _ = read_task(get_task("fsd50k"), folder)
    assert cache_path(relabelled, tmp_path, 16000) != first
    again, path = (read_task(get_task("fsd50k"), folder)[0] for _ in range(2)), clips.clips[0].path
    labels = cache_path(relabelled, tmp_path, 16000)
    os.utime(path, (5, 5))  # the content decides
    assert cache_path(next(again), tmp_path, 16000) == labels
    path.write_bytes(path.read_bytes()[:-2] + b"\1\2")
    os.utime(path, (5, 5))
    assert cache_path(next(again), tmp_path, 16000) != labels


@pytest.mark.parametrize("on_bad_clip", ["refuse", "skip"])
def test_bad_clips_are_told_by_their_files(
    make_task_folder: Callable[..., Path], tmp_path: Path, on_bad_clip: str
) -> None:
    clips, _ = read_task(get_task("folder"), make_task_folder("folder"))
    clips.clips[2].path.write_bytes(b"no audio")
    if on_bad_clip == "refuse":
        with pytest.raises(ValueError, match="fan/take 2.flac"):
            fill_cache(clips, tmp_path / "cache", 16000)
        assert not list((tmp_path / "cache").iterdir())
        return
    fill_cache(clips, tmp_path / "cache", 16000, "skip")
    cached = CachedClips(clips, tmp_path / "cache", 16000)
    assert len(cached.store) == len(clips) - 1
    for ask in (lambda: cached.waveform(2, 16000), lambda: cached.duration_seconds(2)):
        with pytest.raises(ValueError, match=r"fan/take 2\.flac.*in no format"):
            ask()
    np.testing.assert_array_equal(
        cached.waveform(3, 16000), CachedClips(clips, tmp_path / "cache", 16000).waveform(3, 16000)
    )
    assert len(cached.waveform(9, 16000)) > 0


FILL = """
import sys
from pathlib import Path
from audio_datasets.tasks import cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task

cache.SHARD_BYTES = 1
clips, _ = read_task(get_task("folder"), Path(sys.argv[1]))
cache.fill_cache(clips, Path(sys.argv[2]), 16000)
"""


@pytest.mark.parametrize("shards", [1, 6, 30])
def test_a_killed_process_leaves_a_whole_cache_or_none(
    make_task_folder: Callable[..., Path], tmp_path: Path, shards: int
) -> None:
    data = make_task_folder("folder", clips=15)
    clips, _ = read_task(get_task("folder"), data)
    path = cache_path(clips, tmp_path / "cache", 16000)
    environment = os.environ | {"PYTHONPATH": str(Path(audio_datasets.__file__).parents[1])}
    command = [sys.executable, "-c", FILL, str(data), str(tmp_path / "cache")]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    while len(list(path.parent.glob(".*.shards/*.h5"))) < shards and run.poll() is None:
        time.sleep(0.001)
    run.send_signal(signal.SIGKILL)
    run.wait()
    if path.exists():
        assert len(ClipStore.open(path)) == len(clips)
    fill_cache(clips, path.parent, 16000)
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    fill_cache(clips, tmp_path / "whole", 16000)
    assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()


def test_a_full_disk_is_told_beforehand(
    make_task_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clips, _ = read_task(get_task("folder"), make_task_folder("folder"))
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(ValueError, match=r"filling the cache .* needs about .* in .*cache, but only 1.0 KB are free"):
        fill_cache(clips, tmp_path / "cache", 16000)
