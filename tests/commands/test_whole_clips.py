"""What is there is heard: evaluation in windows, and the same numbers from files, from a cache and from a packed store."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.audio.codec import encode, to_pcm16
from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import ManifestRow, manifest_path, write_manifest
from audio_datasets.tasks.cache import CachedClips, fill_cache
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd.data.windows import EvaluationWindows, Window
from kd.evaluate import main as evaluate
from kd.finetune import main as finetune
from teacher_logits.precompute import main as teach
from teacher_logits.teachers.base import Teacher

RATE = 16000
CLASSES = ("high", "low")


class Loudness(Teacher):
    """A tagger of one-second windows whose logits are the loudness of high and of low tones."""

    def __init__(self) -> None:
        super().__init__("loudness", CLASSES, sample_rate_hz=RATE, clip_seconds=1.0)

    def forward(self, waveform: torch.Tensor) -> torch.Tensor:
        power = torch.fft.rfft(waveform).abs() / waveform.shape[1]
        return torch.stack([power[:, 2000:].sum(dim=1), power[:, :2000].sum(dim=1)], dim=1)


def tone(hz: float, seconds: float) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def loudness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    monkeypatch.setattr("teacher_logits.teachers.loaders.named_attribute", lambda spec, what: Loudness)
    return "some.module:loudness"


@pytest.fixture
def late_sounds(tmp_path: Path) -> Path:
    """A store of MP3 clips of 4 s whose own sound is in the last second; before it, all are alike."""
    records, rows = [], []
    for index in range(8):
        name = CLASSES[index % 2]
        wave = np.concatenate([tone(500, 1.5), np.zeros(RATE * 3 // 2, np.float32), tone(4000 - 3500 * (index % 2), 1)])
        records.append(ClipRecord(f"{index}.mp3", encode(wave, RATE, "mp3"), (name,)))
        rows.append(ManifestRow(f"{index}.mp3", labels=(name,), duration_seconds=4.0))
    write_clip_store(tmp_path / "late.h5", records, CLASSES)
    write_manifest(manifest_path(tmp_path / "late.h5"), rows)
    return tmp_path / "late.h5"


def test_evaluation_hears_whole_clips_unless_restricted(
    late_sounds: Path, loudness: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def results(*options: str) -> dict:
        out = tmp_path / "results.json"
        command = ["--tagger", loudness, "--clips", str(late_sounds), "--workers", "0", "--out", str(out), *options]
        assert evaluate(command) == 0
        return json.loads(out.read_text())

    whole = results()
    assert (whole["mAP"], whole["num_windows"], whole["unheard_seconds"]) == (1.0, 32, 0.0)
    assert "heard: 8 whole clips, 32.0 s, in 32 windows of 1 s" in capsys.readouterr().out
    beginning = results("--clip-seconds", "1")
    assert beginning["mAP"] < 0.8
    assert (beginning["num_windows"], beginning["unheard_seconds"]) == (8, 24.0)
    told = capsys.readouterr().out
    assert "heard: the first 1 s of each clip; 8 of 8 clips are longer: 24.0 s of 32.0 s (75.0 %) are not heard" in told


def test_a_teacher_says_how_much_it_does_not_hear(
    late_sounds: Path, loudness: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert teach(["--clips", str(late_sounds), "--teacher", loudness, "--out", str(tmp_path), "--workers", "0"]) == 0
    assert "8 of 8 clips are longer: 24.0 s of 32.0 s (75.0 %) are not heard" in capsys.readouterr().out


# -- Files, a cache and a packed store ---------------------------------------------------------------------------------


def write_sounds(folder: Path, rate_hz: int, sound_steps: SimpleNamespace) -> None:
    """Two classes of 2 s: a good WAV, one of a recorder that was killed, and a file that is no audio."""
    for number, name in enumerate(("hiss", "hum")):
        (folder / name).mkdir(parents=True)
        wave = sound_steps.wave(2.0, rate_hz, number)
        for copy in range(3):
            soundfile.write(folder / name / f"good{copy}.wav", to_pcm16(np.roll(wave, 999 * copy)), rate_hz)
        killed = bytearray((folder / name / "good0.wav").read_bytes())
        killed[4:8] = killed[40:44] = bytes(4)
        (folder / name / "killed.wav").write_bytes(killed)
        (folder / name / "notes.txt").write_text("no sound")


@pytest.fixture
def own_sounds(tmp_path: Path, sound_steps: SimpleNamespace) -> Path:
    """Files as they really are: besides good ones an interrupted MP3, a phone's M4A, GSM, and a killed recorder's WAV."""
    folder = tmp_path / "own"
    write_sounds(folder, RATE, sound_steps)
    for name in ("hiss", "hum"):
        wave, _ = soundfile.read(folder / name / "good1.wav", dtype="float32")
        mp3 = encode(np.tile(wave, 2), RATE, "mp3")
        (folder / name / "cut.mp3").write_bytes(mp3[: len(mp3) // 2])
        (folder / name / "phone.m4a").write_bytes(sound_steps.encode(wave, RATE, "ipod", "aac"))
        soundfile.write(folder / name / "telephone.wav", wave, RATE, subtype="GSM610")
    return folder


def test_files_a_cache_and_a_packed_store_have_the_same_windows(
    own_sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert pack([str(own_sounds), "--out", str(tmp_path / "own.h5"), "--workers", "1"]) == 0
    told = capsys.readouterr()
    assert "skipped 2 files: 2 .txt" in told.err
    assert "packed: 14 clips" in told.out
    odd = ClipList(tmp_path / "own.suspicious.txt").read()
    assert {Path(name).name for name in odd} == {"cut.mp3", "killed.wav"}
    packed = ClipStore.open(tmp_path / "own.h5")
    lengths = packed.manifest(["duration_seconds"]).column("duration_seconds").to_pylist()
    assert lengths == [packed.duration_seconds(row) for row in range(len(packed))]
    assert [round(length) for length in lengths] == [2] * 14

    files, _ = read_task(get_task("folder"), own_sounds)
    fill_cache(files, tmp_path / "cache", 32000)
    cached = CachedClips(files, tmp_path / "cache", 32000)
    of_files, of_store, of_cache = (
        EvaluationWindows(clips, np.arange(14), Window(32000, 0.5)) for clips in (files, packed, cached)
    )
    assert files.suspicious == odd
    assert of_files.starts == of_store.starts == of_cache.starts
    for number in range(len(of_files)):
        expected = of_files[number][1].numpy()
        np.testing.assert_array_equal(of_store[number][1].numpy(), expected)
        np.testing.assert_allclose(of_cache[number][1].numpy(), expected, atol=2e-5)  # 16 bits


def test_training_from_files_and_from_a_cache_gives_the_same_numbers(
    tmp_path: Path, sound_steps: SimpleNamespace, capsys: pytest.CaptureFixture
) -> None:
    write_sounds(tmp_path / "sounds", 32000, sound_steps)  # in which a cache loses nothing
    short = ["--student", "mn01", "--epochs", "1", "--clip-seconds", "0.5", "--n-mels", "32", "--workers", "0"]
    logits = {}
    for name, more in {"files": [], "cache": ["--cache", str(tmp_path / "cache")]}.items():
        command = ["--task", "folder", "--data", str(tmp_path / "sounds"), "--out", str(tmp_path / name), *short, *more]
        assert finetune([*command, "--no-report", "--batch-size", "4", "--eval-batch-size", "8"]) == 0
        told = capsys.readouterr().out
        assert "skipped 2 files: 2 .txt" in told
        assert (
            "2 of 8 clips are suspicious (2 .wav): 'hiss/killed.wav' (its header says 0.0 s, but it holds 2.0 s)"
            in told
        )
        assert set(ClipList(tmp_path / name / "suspicious_clips.txt").read()) == {"hiss/killed.wav", "hum/killed.wav"}
        with np.load(tmp_path / name / "predictions.npz") as predictions:
            logits[name] = predictions["logits"]
    np.testing.assert_array_equal(logits["cache"], logits["files"])
