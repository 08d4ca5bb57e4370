"""`kd doctor`: what it finds, what it advises, and its exit code."""

import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
import torch

from audio_datasets.audio.codec import to_pcm16
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from kd import doctor
from kd.doctor import bottleneck, main

QUICK = ["--seconds", "0.05", "--student", "mn01", "--batch-size", "2", "--clip-seconds", "0.3"]


def findings(capsys: pytest.CaptureFixture, *arguments: object, code: int = 0) -> dict[str, dict]:
    capsys.readouterr()
    assert main([*QUICK, "--json", *map(str, arguments)]) == code
    return {finding["topic"]: finding for finding in json.loads(capsys.readouterr().out)}


def test_good_data(tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    found = findings(capsys, "--clips", tiny_store, "--logits", tiny_logits, "--out", tmp_path, "--every-clip")
    assert found["versions"]["status"] == "ok"
    assert f"torch {torch.__version__.split('+')[0]}" in found["versions"]["found"]
    assert found["clip store"]["found"].startswith("12 clips (PCM) of 3 classes")
    assert found["audio"]["found"].startswith("all can be decoded")
    assert found["manifest"]["status"] == found["logits"]["status"] == "ok"
    for topic in ("decoding", "front end", "training mn01"):
        assert found[topic]["numbers"]["clips_per_second"] > 0
    assert found["disk"]["numbers"]["disk_bytes_per_second"] > 0
    assert found["bottleneck"]["numbers"]["workers_needed"] >= 1


def test_without_data_it_makes_some_up_and_tells_people_what_to_do(capsys: pytest.CaptureFixture) -> None:
    assert main(QUICK) == 0
    told = capsys.readouterr().out
    assert "synthetic MP3 clips" in told
    assert "→ give --clips" in told
    assert "0 problems" in told


def test_bad_data_are_problems_with_advice(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_clip_store(tmp_path / "bad.h5", [ClipRecord("broken", b"no audio", ("a",))], ("a", "b"))
    found = findings(capsys, "--clips", tmp_path / "bad.h5", code=1)
    assert "'broken'" in found["audio"]["found"]
    assert "--on-bad-clip skip" in found["audio"]["advice"]
    assert found["manifest"]["status"] == "warning"
    assert found["speed"]["status"] == "problem"

    content = bytearray(tiny_store.read_bytes())
    samples = to_pcm16(ClipStore.open(tiny_store).waveform(3, 32000)).tobytes()
    content[content.index(samples) + 500] ^= 1
    (tmp_path / "changed.h5").write_bytes(content)
    found = findings(capsys, "--clips", tmp_path / "changed.h5", "--every-clip", code=1)
    assert found["audio"]["numbers"]["bad_clips"] == 1
    assert "has changed since it was packed" in found["audio"]["found"]

    (tmp_path / "cut.h5").write_bytes(content[:-5000])
    found = findings(capsys, "--clips", tmp_path / "cut.h5", code=1)
    assert found["clip store"]["status"] == "problem"

    shutil.copy(tiny_store, tmp_path / "good.h5")
    shutil.copy(tmp_path / "bad.h5", tmp_path / "logits.h5")
    found = findings(capsys, "--clips", tmp_path / "good.h5", "--logits", tmp_path / "logits.h5", code=1)
    assert "not a logit store" in found["logits"]["found"]
    assert "kd teach" in found["logits"]["advice"]


def test_a_torchaudio_for_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(doctor.check_companions()) == []

    def broken(name: str) -> None:
        if name == "torchaudio":
            raise OSError("Could not load this library: _torchaudio.so")

    monkeypatch.setattr(doctor, "import_module", broken)
    (finding,) = doctor.check_companions()
    assert (finding.topic, finding.status) == ("torchaudio", "problem")
    assert (
        finding.found
        == f"torchaudio does not fit torch {torch.__version__}: Could not load this library: _torchaudio.so"
    )
    assert "docs/install.md" in finding.advice


def test_versions_that_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr(doctor.metadata, "version", lambda name: "1.0" if name == "torch" else real(name))
    (finding,) = doctor.check_versions()
    assert finding.status == "problem"
    assert "torch 1.0 (needed: " in finding.found
    assert "constraints.txt" in finding.advice


def test_little_shared_memory_and_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage._replace(total=64 * 2**20, free=10**9))
    status = {finding.topic: finding for finding in doctor.check_machine(doctor.DoctorConfig(out=tmp_path))}
    assert status["free space"].status == "warning"
    if os.path.isdir("/dev/shm"):
        assert status["shared memory"].status == "warning"
        assert "--shm-size" in status["shared memory"].advice


@pytest.mark.parametrize(
    ("loaded", "trained", "available", "workers", "status"),
    [(100, 50, 8, 1, "ok"), (100, 500, 8, 6, "ok"), (100, 1000, 8, 12, "warning"), (84, 4, 1, 1, "ok")],
)
def test_what_training_waits_for(loaded: float, trained: float, available: int, workers: int, status: str) -> None:
    finding = bottleneck(loaded, trained, available, "encoded")
    assert finding.numbers == {"workers_needed": workers}
    assert finding.status == status
    assert ("pcm16" in finding.advice) == (status == "warning")


def test_wrong_arguments(capsys: pytest.CaptureFixture) -> None:
    assert main(["--student", "mn99", "--seconds", "0.05"]) == 2
    with pytest.raises(SystemExit) as stopped:
        main(["--every-clip"])
    assert stopped.value.code == 2
    assert "needs --clips" in capsys.readouterr().err
