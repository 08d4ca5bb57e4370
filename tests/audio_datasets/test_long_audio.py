"""Long recordings are packed, converted and cached in pieces, with the same result."""

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets import pack_audio
from audio_datasets.audio import spool
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks import cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd.cli import main


@pytest.fixture
def sounds(tmp_path: Path) -> Path:
    rng = np.random.default_rng(5)
    for name, rate, seconds in (("fan", 32_000, 3.0), ("pump", 44_100, 2.5), ("pump", 8_000, 0.2)):
        folder = tmp_path / "sounds" / name
        folder.mkdir(parents=True, exist_ok=True)
        wave = 0.2 * rng.standard_normal(round(seconds * rate)).clip(-3, 3)
        soundfile.write(folder / f"{rate}.flac", wave, rate)
    return tmp_path / "sounds"


def in_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the clips were hours long: blocks of 10,000 samples, nothing kept in memory."""
    monkeypatch.setattr("audio_datasets.audio.codec.BLOCK_SAMPLES", 10_000)
    monkeypatch.setattr(pack_audio, "WHOLE_SAMPLES", 20_000)
    monkeypatch.setattr(pack_audio, "WHOLE_FILE_BYTES", 10_000)
    monkeypatch.setattr(pack_audio, "BLOCK_SECONDS", 0.25)
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 1_000)
    monkeypatch.setattr(spool, "BYTES_AT_ONCE", 4_096)
    monkeypatch.setattr(cache, "WHOLE_SAMPLES", 20_000)
    monkeypatch.setattr(cache, "PART_SECONDS", 1)


@pytest.mark.parametrize("audio", ["keep", "flac", "mp3", "pcm16"])
def test_packing_in_pieces(audio: str, sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["pack", str(sounds), "--audio", audio, "--workers", "1", "--out"]
    assert main([*command, str(tmp_path / "whole.h5")]) == 0
    in_small_pieces(monkeypatch)
    assert main([*command, str(tmp_path / "pieces.h5")]) == 0
    whole, pieces = (ClipStore.open(tmp_path / f"{name}.h5") for name in ("whole", "pieces"))
    assert whole.clip_ids == pieces.clip_ids
    for row in range(len(whole)):
        one, other = whole.waveform(row, 32_000), pieces.waveform(row, 32_000)
        assert len(one) == len(other)
        assert np.abs(one - other).max() <= (
            0.0 if "fan" in whole.clip_id(row) else 0.01 if audio == "mp3" else 1 / 32768
        )
    if audio == "keep":
        assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "pieces.h5").read_bytes()
    assert not list(tmp_path.glob("*.partial"))


def test_a_full_disk_is_not_the_clips_fault(sounds: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    in_small_pieces(monkeypatch)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(spool.Spool, "keep_pieces", full)
    assert main(["pack", str(sounds), "--workers", "1", "--out", str(tmp_path / "a.h5")]) == 2
    assert "No space left on device" in capsys.readouterr().err
    assert not (tmp_path / "a.h5").exists()


def test_a_cache_in_pieces(sounds: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips, _ = read_task(get_task("folder"), sounds)
    caches = []
    for name in ("whole", "pieces"):
        folder = tmp_path / name
        folder.mkdir()
        if name == "pieces":
            in_small_pieces(monkeypatch)
        cache.fill_cache(clips, folder, 32_000)
        caches.append(cache.CachedClips(clips, folder, 32_000))
    for row in range(len(clips)):
        one, other = (each.waveform(row, 32_000) for each in caches)
        assert len(one) == len(other) > 0
        assert np.abs(one - other).max() <= 1 / 32768
