"""Clips without labels from end to end: packed, taught, trained on in both stages, never tested on, and counted."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.tasks.catalog import get_task
from audio_datasets.tasks.task import read_task
from kd import finetune, pretrain
from kd.evaluate import EvaluateConfig, evaluate
from kd.reports.run_reader import RunFolder
from kd.reports.sections.circumstances import training_clips
from kd.run_folder.metrics_log import read_metrics
from kd.stages.finetuning_config import decided_by_data
from students import create_student
from students.card import load_student, save_student
from students.frontend import LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore

FRONTEND = ["--n-mels", "32", "--hop-samples", "640"]
SHORT = ["--student", "mn01", "--workers", "0", "--clip-seconds", "0.4", "--epochs", "1"]


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 clips of each of two classes, 24 without labels beside them, and 8 more of other lengths and rates elsewhere."""
    folder = tmp_path_factory.mktemp("sounds")

    def write(name: str, number: int, seconds: float, rate: int) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).standard_normal(round(seconds * rate))
        soundfile.write(path, 0.1 * noise, rate)

    for number in range(4):
        for name in ("dog", "rain"):
            write(f"data/{name}/{number}.wav", number, 0.4, 16000)
    for number in range(24):
        write(f"data/unlabelled/{number}.wav", number, 0.3, 16000)
    for number in range(8):
        write(f"more/{number}.flac", number, 0.2 + 0.3 * number, 8000 + 2000 * number)
    return folder


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with a student of the two classes."""
    folder = tmp_path_factory.mktemp("teacher") / "teacher"
    frontend = LogMelConfig(n_mels=32)
    save_student(folder, create_student("mn01", 2, n_mels=32), ("dog", "rain"), frontend, {"clip_seconds": 1.0})
    return folder


@pytest.fixture(scope="module")
def logits(sounds: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The teacher's logits for all of them: of the packed clips and, straight from its files, of the folder."""
    out = tmp_path_factory.mktemp("logits")
    clips = sounds / "clips.h5"
    assert pack([str(sounds / "data"), "--out", str(clips), "--task", "folder", "--workers", "1"]) == 0
    for source, name in ((clips, "clips"), (sounds / "more", "more")):
        assert (
            teach(
                ["--clips", str(source), "--teacher", str(teacher), "--out", str(out), "--name", name, "--workers", "0"]
            )
            == 0
        )
    return f"{out / 'clips.h5'}+{out / 'more.h5'}"


def test_a_folder_of_sounds_is_heard_without_packing_it(
    sounds: Path, teacher: Path, logits: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    store = LogitStore.open(logits.split("+")[1])
    assert store.clip_ids == [f"{number}.flac" for number in range(8)]
    assert store.class_names == ("dog", "rain")
    again = ["--clips", str(sounds / "more"), "--teacher", str(teacher), "--out", str(tmp_path), "--workers", "0"]
    assert teach(again) == 0
    shown = capsys.readouterr().out
    assert "8 clips without labels" in shown
    assert (
        "hears only the first 1 s of each clip: 5 of 8 clips are longer: 3.5 s of 10.0 s (35.0 %) are not heard"
        in shown
    )
    np.testing.assert_array_equal(
        LogitStore.open(tmp_path / "teacher.h5").read(store.clip_ids), store.read(store.clip_ids)
    )
    assert teach(again) == 0
    assert "is complete: nothing to do" in capsys.readouterr().out
    bare = [
        "--clips",
        str(sounds / "more"),
        "--teacher",
        f"mn01@{teacher / 'student.safetensors'}",
        "--out",
        str(tmp_path),
    ]
    assert teach(bare) == 2
    assert "is a folder of sounds and" in (message := capsys.readouterr().err)
    assert "--class-names" in message


def test_pretraining_draws_clips_without_labels(
    sounds: Path, logits: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """8 clips with labels and 24 without: 4 steps of 8 an epoch, not 1."""
    out = tmp_path / "run"
    options = [
        "--clips",
        str(sounds / "clips.h5"),
        "--logits",
        logits.split("+")[0],
        "--out",
        str(out),
        "--batch-size",
        "8",
    ]
    assert pretrain.main([*options, *SHORT, *FRONTEND, "--log-every-steps", "1"]) == 0
    records = read_metrics(out / "metrics.jsonl", "train")
    assert len(records) == 4
    assert all(record["label_loss"] > 0 for record in records)  # each batch holds clips with labels
    assert "an epoch shows 8 clips with labels (of 8) and 24 without (of 24)" in capsys.readouterr().out
    card = load_student(out).card
    assert card.provenance["training_clips"] == {"labelled": 8, "unlabelled": 24}


def test_pretraining_with_a_further_folder(
    sounds: Path, logits: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = [
        "--clips",
        str(sounds / "clips.h5"),
        "--logits",
        logits,
        "--unlabelled",
        str(sounds / "more"),
        "--out",
        str(out),
    ]
    options += ["--batch-size", "8", "--unlabelled-per-labelled", "1", *SHORT, *FRONTEND]
    assert pretrain.main(options) == 0
    card = load_student(out).card
    assert card.provenance["training_clips"] == {"labelled": 8, "unlabelled": 32}
    assert card.provenance["steps"] == 2
    # The folder may lie elsewhere; with other content it is another run.
    moved = shutil.copytree(sounds / "more", tmp_path / "moved")
    options[options.index(str(sounds / "more"))] = str(moved)
    assert pretrain.main(options) == 0
    assert "already finished" in capsys.readouterr().out
    (moved / "7.flac").unlink()
    assert pretrain.main(options) == 2
    assert "inputs.clips" in capsys.readouterr().err


def test_fine_tuning_trains_on_clips_without_labels_and_never_tests_them(
    sounds: Path, logits: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = [
        "--task",
        "folder",
        "--data",
        str(sounds / "data"),
        "--out",
        str(out),
        "--test-share",
        "0.25",
        "--no-report",
        "--logits",
        logits,
    ]
    options += [
        "--unlabelled",
        str(sounds / "more"),
        "--batch-size",
        "10",
        "--cache",
        str(tmp_path / "cache"),
        *SHORT,
        *FRONTEND,
    ]
    assert finetune.main(options) == 0
    shown = capsys.readouterr().out
    assert "24 of 32 clips have unknown labels" in shown
    assert "24 clips without labels may train and are never tested on" in shown
    card = load_student(out).card
    assert card.provenance["training_clips"] == {"labelled": 6, "unlabelled": 32}
    with np.load(out / "predictions.npz") as predictions:
        assert len(predictions["clip_ids"]) == 2
        assert not any("unlabelled" in clip_id for clip_id in predictions["clip_ids"])
    assert json.loads((out / "results.json").read_text())["headline"]["metric"] == "accuracy"
    assert training_clips(RunFolder.read(out)) == [("training clips", "6 with labels, 32 without")]


def test_fine_tuning_on_labels_alone_leaves_them_out_aloud(
    sounds: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = [
        "--task",
        "folder",
        "--data",
        str(sounds / "data"),
        "--out",
        str(out),
        "--batch-size",
        "4",
        "--no-report",
    ]
    assert finetune.main([*options, *SHORT, *FRONTEND]) == 0
    assert "24 of 30 training clips have neither labels nor teacher logits and are left out" in capsys.readouterr().out
    card = load_student(out).card
    assert card.provenance["training_clips"] == {"labelled": 6, "unlabelled": 0}
    assert finetune.main([*options, *SHORT, *FRONTEND, "--unlabelled", str(sounds / "more"), "--restart"]) == 2
    assert "--unlabelled would not be used; give teacher logits with --logits" in capsys.readouterr().err


def test_validation_clips_without_labels_are_left_out(
    sounds: Path, make_tiny_logits: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [["clip_id", "path", "labels", "split"]]
    for number in range(8):
        rows.append(
            [f"c{number}", f"data/{'dog' if number % 2 else 'rain'}/{number // 2}.wav", "dog" if number % 2 else "rain"]
        )
        rows[-1].append("train" if number < 4 else "valid")
    rows.append(["x", "data/unlabelled/0.wav", "", "valid"])
    with open(sounds / "list.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    clips = tmp_path / "clips.h5"
    assert pack([str(sounds / "list.csv"), "--out", str(clips), "--workers", "1"]) == 0
    assert not ClipStore.open(clips).mask([8]).any()
    options = [
        "--clips",
        str(clips),
        "--label-weight",
        "1",
        "--split",
        "train",
        "--valid-split",
        "valid",
        "--batch-size",
        "2",
    ]
    assert pretrain.main([*options, *SHORT, *FRONTEND, "--out", str(tmp_path / "run")]) == 0
    assert "1 of 5 validation clips have no labels and are left out" in capsys.readouterr().out
    found = evaluate(EvaluateConfig(tagger=str(tmp_path / "run"), clips=clips, workers=0))
    assert (found["num_clips"], found["clips_trained_on"]) == (8, 4)
    shown = capsys.readouterr().out
    assert "1 of 9 clips have no labels and are not evaluated" in shown
    assert f"warning: {tmp_path / 'run'} was trained on 4 of these 8 clips" in shown


def test_folds_teach_the_clips_that_they_held_out(make_task_folder: Callable[..., Path], tmp_path: Path) -> None:
    """What a cross-fitted teacher says of a clip is what the fold that tested on it has predicted."""
    data, run, clips = make_task_folder("esc50"), tmp_path / "run", tmp_path / "clips.h5"
    options = ["--task", "esc50", "--data", str(data), "--no-report", "--batch-size", "6", *SHORT, *FRONTEND]
    options[options.index("--clip-seconds") + 1] = "0.5"
    assert finetune.main([*options, "--out", str(run)]) == 0
    assert pack([str(data), "--task", "esc50", "--out", str(clips), "--workers", "1"]) == 0
    teaching = ["--clips", str(clips), "--teacher", str(run), "--out", str(tmp_path), "--workers", "0"]
    assert teach([*teaching, "--cross-fitted"]) == 0
    store, seen = LogitStore.open(tmp_path / "run-cross-fitted.h5"), 0
    for fold in (1, 2, 3):
        with np.load(run / f"fold{fold}" / "predictions.npz") as predictions:
            np.testing.assert_allclose(store.read(predictions["clip_ids"].tolist()), predictions["logits"], atol=5e-3)
            seen += len(predictions["clip_ids"])
    assert seen == len(store) == 18
    distilled = [*options, "--out", str(tmp_path / "distilled"), "--logits", str(store.path), "--fold", "1"]
    assert finetune.main(distilled) == 0
    assert (
        load_student(tmp_path / "distilled" / "fold1").card.provenance["teachers"][0]["teacher"]["name"]
        == "run-cross-fitted"
    )


def test_the_length_of_a_clip_is_decided_by_those_with_labels(sounds: Path, tmp_path: Path) -> None:
    data = shutil.copytree(sounds / "data", tmp_path / "data")
    soundfile.write(data / "unlabelled" / "long.wav", np.zeros(8000 * 7), 8000)
    config = finetune.configure(["--task", "folder", "--data", str(data), "--student", "mn01", "--short-clips", "pad"])
    task = get_task("folder")
    assert decided_by_data(config, task, read_task(task, data)[0]).clip_seconds == 0.4
