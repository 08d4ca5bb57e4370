"""Clips that cannot be used, through every command: refused by name, or skipped, counted and listed."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from audio_datasets.audio.augment import AugmentConfig
from audio_datasets.audio.bad_clips import ClipList
from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from kd.data.examples import TrainingExamples
from kd.data.replacements import Replacements
from kd.data.sampling import ClipRequest
from kd.data.windows import Window
from kd.evaluate import main as evaluate
from kd.inspect_student import main as inspect
from kd.pretrain import main as pretrain
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore
from teacher_logits.stores.shards import ShardFolder
from teacher_logits.verify import main as verify

CLASSES = ("hiss", 'hum, "low"', "ключ 🔑")
"""Names with a comma, quotes and Unicode: they go through every stage too."""
RATE = 8000
GOOD = 10


def wav(waveform: np.ndarray, rate: int = RATE, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, rate, format="WAV", subtype=subtype)
    return buffer.getvalue()


def noise(index: int, channels: int = 1) -> np.ndarray:
    return 0.1 * np.random.default_rng(index).standard_normal((RATE // 2, channels))


def with_nan() -> np.ndarray:
    waveform = noise(0)
    waveform[17] = np.nan
    return waveform


BAD = {
    "no-audio": (b"no audio at all", "in no format"),
    "no-samples": (wav(np.zeros((0, 1))), "empty"),
    "nan": (wav(with_nan(), subtype="FLOAT"), "NaN"),
    "absurd": (wav(1e30 * noise(0), subtype="FLOAT"), "times full scale"),
    "cut": (wav(noise(0))[:30], "in no format"),
}
ODD = {
    "one-sample": wav(np.full((1, 1), 0.5)),
    "silent": wav(np.zeros((RATE // 2, 1))),
    "clipped": wav(np.sign(noise(5))),
    "eight-channels": wav(noise(1, channels=8)),
    "192-kHz": wav(np.repeat(noise(2), 24, axis=0), rate=24 * RATE),
}


@pytest.fixture(scope="module")
def sounds() -> dict[str, bytes]:
    """Clips by id: good ones, odd ones that can be used, and bad ones, in between one another."""
    good = {f"good-{index}": wav(noise(index)) for index in range(GOOD)}
    bad = {name: content for name, (content, _) in BAD.items()}
    return dict(sorted((good | ODD | bad).items(), key=lambda item: item[0][::-1]))


@pytest.fixture(scope="module")
def store(sounds: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip store with the bad clips in it, as another program may write it."""
    path = tmp_path_factory.mktemp("bad") / "clips.h5"
    records = [ClipRecord(name, data, (CLASSES[i % 3],)) for i, (name, data) in enumerate(sounds.items())]
    write_clip_store(path, records, CLASSES)
    return path


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "small"
    torch.manual_seed(0)
    student = create_student("mn01", len(CLASSES))
    save_student(folder, student, CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    return folder


def run(main, *arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def test_packing(sounds: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name, data in sounds.items():
        path = tmp_path / "sounds" / ("a, b" if name in BAD else 'c "d"') / f"{name}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    out = tmp_path / "clips.h5"
    command = (pack, tmp_path / "sounds", "--out", out, "--workers", 1)
    assert run(*command, "--on-bad-clip", "refuse") == 2
    assert f"{len(BAD)} of {len(sounds)} clips cannot be used ({len(BAD)} .wav): 'a, b/" in capsys.readouterr().err
    assert run(*command) == 0
    told = capsys.readouterr().out
    skipped = ClipList(tmp_path / "clips.skipped.txt").read()
    assert {Path(name).stem for name in skipped} == set(BAD)
    for name, (_, reason) in BAD.items():
        assert reason in skipped[f"a, b/{name}.wav"]
        assert f"skipped a, b/{name}.wav: " in told
    suspicious = ClipList(tmp_path / "clips.suspicious.txt").read()
    assert {Path(name).stem: reason.split(" (")[0] for name, reason in suspicious.items()} == {
        "one-sample": "very short",
        "silent": "silent",
        "clipped": "clipped",
    }
    assert f"3 of {len(sounds) - len(BAD)} clips are suspicious" in told
    packed = ClipStore.open(out)
    assert packed.class_names == ("a, b", 'c "d"')
    for row in range(len(packed)):
        assert np.isfinite(packed.waveform(row, 32000)).all()


def test_teaching_without_them_and_training_without_what_was_not_taught(
    store: Path, run_folder: Path, sounds: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = ("--clips", store, "--teacher", run_folder, "--out", tmp_path, "--workers", 0, "--batch-size", 4)
    command = (*command, "--shard-clips", 7)
    assert run(teach, *command) == 2
    error = capsys.readouterr().err
    assert "--on-bad-clip skip" in error
    assert any(f"clip {name!r}" in error and reason in error for name, (_, reason) in BAD.items())
    assert run(teach, *command, "--on-bad-clip", "skip") == 0
    assert f"{len(BAD)} of {len(sounds)} clips get no logits" in capsys.readouterr().out
    assert set(ClipList(tmp_path / "small.skipped.txt").read()) == set(BAD)
    logits = LogitStore.open(tmp_path / "small.h5")
    assert logits.clip_ids == [name for name in sounds if name not in BAD]
    # What a clip is told does not depend on what lay beside it.
    good = [ClipRecord(name, data, CLASSES[:1]) for name, data in sounds.items() if name not in BAD]
    write_clip_store(tmp_path / "good.h5", good, CLASSES)
    alone = ("--clips", tmp_path / "good.h5", "--teacher", run_folder, "--out", tmp_path / "alone", "--workers", 0)
    assert run(teach, *alone) == 0
    expected = LogitStore.open(tmp_path / "alone" / "small.h5")
    np.testing.assert_allclose(logits.read(expected.clip_ids), expected.read(expected.clip_ids), atol=2e-3)

    # A finished store without them is not passed off as a whole one.
    assert run(teach, *command) == 2
    assert run(teach, *command, "--on-bad-clip", "skip") == 0
    assert "nothing to do" in capsys.readouterr().out
    check = (verify, "--logits", tmp_path / "small.h5", "--clips", store)
    assert run(*check) == 2
    assert run(*check, "--allow-missing") == 0

    training = (
        "--clips", store, "--logits", tmp_path / "small.h5", "--student", "mn01", "--out", tmp_path / "run", "--epochs", 1,
        "--batch-size", 4, "--clip-seconds", 0.5, "--workers", 0, "--teacher-link", "sigmoid",
    )  # fmt: skip
    assert run(pretrain, *training) == 2
    assert "--missing-logits leave-out" in capsys.readouterr().err
    assert run(pretrain, *training, "--missing-logits", "leave-out") == 0
    assert not (tmp_path / "run" / "skipped_clips.txt").exists()


def test_a_shard_that_has_skipped_clips_is_not_taken_by_a_run_that_refuses_them(
    store: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = ("--clips", store, "--teacher", run_folder, "--out", tmp_path, "--workers", 0, "--shard-clips", 7)
    with monkeypatch.context() as patched:
        patched.setattr(ShardFolder, "publish", lambda *_: (_ for _ in ()).throw(ValueError("stopped")))
        assert run(teach, *command, "--on-bad-clip", "skip") == 2
    assert "stopped" in capsys.readouterr().err
    assert run(teach, *command) == 2
    assert "clips cannot be used" in capsys.readouterr().err
    assert run(teach, *command, "--on-bad-clip", "skip") == 0


def test_training_draws_other_clips_in_their_place(
    store: Path, sounds: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def training(out: str, *more: object) -> int:
        return run(
            pretrain, "--clips", store, "--label-weight", 1, "--student", "mn01", "--out", tmp_path / out, "--epochs", 2,
            "--batch-size", 4, "--clip-seconds", 0.5, *more,
        )  # fmt: skip

    assert training("refusing", "--workers", 0) == 2
    error = capsys.readouterr().err
    assert any(f"clip {name!r}" in error for name in BAD)
    assert "Traceback" not in error
    assert training("a", "--on-bad-clip", "skip", "--workers", 0) == 0
    assert f"{len(BAD)} of {len(sounds)} clips skipped" in capsys.readouterr().out
    assert training("b", "--on-bad-clip", "skip", "--workers", 2) == 0
    for name in ("metrics.jsonl", "student.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    for out in ("a", "b"):
        listed = ClipList(tmp_path / out / "skipped_clips.txt").read()
        assert set(listed) == set(BAD)
        assert all(reason in listed[name] for name, (_, reason) in BAD.items())


def test_the_clip_drawn_in_place_of_another_brings_its_own_labels(store: Path, tmp_path: Path) -> None:
    clips = ClipStore.open(store)
    rows = np.arange(len(clips))
    dataset = TrainingExamples(
        clips,
        rows,
        Window(32000, 0.5),
        frontend=LogMelConfig(),
        augment=AugmentConfig(),
        seed=3,
        replacements=Replacements(rows, ClipList(tmp_path / "skipped.txt")),
    )
    bad_row = int(clips.rows(["nan"])[0])
    drawn = set()
    for position in range(20):
        example = dataset[ClipRequest(0, position, bad_row)]
        row = example["row"]
        drawn.add(row)
        assert clips.clip_id(row) not in BAD
        np.testing.assert_array_equal(example["targets"], clips.targets([row])[0])
        assert dataset[ClipRequest(0, position, bad_row)]["row"] == row
    assert len(drawn) > 5


def test_evaluating_without_them(
    store: Path, run_folder: Path, sounds: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    command = (evaluate, "--tagger", run_folder, "--clips", store, "--workers", 0, "--out", tmp_path / "results.json")
    assert run(*command) == 2
    error = capsys.readouterr().err
    assert any(f"clip {name!r}" in error for name in BAD)
    assert run(*command, "--on-bad-clip", "skip") == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["skipped_clips"]) == set(BAD)
    assert results["num_clips"] == len(sounds) - len(BAD)
    assert f"{len(BAD)} of {len(sounds)} clips skipped" in capsys.readouterr().out
    good = [
        ClipRecord(name, data, (CLASSES[i % 3],)) for i, (name, data) in enumerate(sounds.items()) if name not in BAD
    ]
    write_clip_store(tmp_path / "good.h5", good, CLASSES)
    alone = (evaluate, "--tagger", run_folder, "--clips", tmp_path / "good.h5", "--workers", 0)
    assert run(*alone, "--out", tmp_path / "alone.json") == 0
    expected = json.loads((tmp_path / "alone.json").read_text())
    assert results["classes"] == expected["classes"]


def test_inspecting_without_them(
    store: Path, sounds: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    torch.manual_seed(0)
    student = create_student("dymn04", len(CLASSES), width=0.2)
    save_student(tmp_path / "dymn", student, CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    command = (inspect, "--tagger", tmp_path / "dymn", "--clips", store, "--workers", 0, "--repeats", 1)
    assert run(*command, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert any(f"clip {name!r}" in error for name in BAD)
    assert run(*command, "--out", tmp_path / "out", "--on-bad-clip", "skip") == 0
    assert f"{len(BAD)} of {len(sounds)} clips skipped" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert set(results["skipped_clips"]) == set(BAD)
    good = [
        ClipRecord(name, data, (CLASSES[i % 3],)) for i, (name, data) in enumerate(sounds.items()) if name not in BAD
    ]
    write_clip_store(tmp_path / "good.h5", good, CLASSES)
    alone = (inspect, "--tagger", tmp_path / "dymn", "--clips", tmp_path / "good.h5", "--workers", 0, "--repeats", 1)
    assert run(*alone, "--out", tmp_path / "alone") == 0
    expected = json.loads((tmp_path / "alone" / "inspect.json").read_text())
    for name in ("untouched", "interventions", "dyrelu"):
        assert results[name] == expected[name]


def test_audio_that_has_changed_on_disk_is_not_taught(store: Path, run_folder: Path, tmp_path: Path, capsys) -> None:
    content = bytearray(store.read_bytes())
    good = ClipStore.open(store)
    place = content.find(good.encoded(int(good.rows(["good-1"])[0]))) + 500
    content[place] ^= 1
    (tmp_path / "clips.h5").write_bytes(content)
    command = ("--clips", tmp_path / "clips.h5", "--teacher", run_folder, "--out", tmp_path, "--workers", 0)
    assert run(teach, *command, "--on-bad-clip", "skip") == 0
    assert ClipList(tmp_path / "small.skipped.txt").read()["good-1"].startswith("its audio has changed")


def test_weights_whose_logits_are_not_finite_are_refused_with_a_clip(
    store: Path, run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    student = create_student("mn01", len(CLASSES))
    torch.nn.init.constant_(student.get_parameter("classifier.5.bias"), torch.nan)
    save_student(tmp_path / "broken", student, CLASSES, LogMelConfig(), {"clip_seconds": 0.5})
    command = (evaluate, "--tagger", tmp_path / "broken", "--clips", store, "--workers", 0, "--on-bad-clip", "skip")
    assert run(*command) == 2
    assert "logits are not finite for clip '" in capsys.readouterr().err
