"""The public AudioSet student on real recordings, through our own commands; skipped where the reference data are absent."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from kd.evaluate import main as evaluate
from kd.finetune import main as finetune
from kd.pretrain import main as pretrain
from kd.run_folder.metrics_log import read_metrics
from students.card import load_student
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore
from teacher_logits.verify import main as verify


@pytest.fixture(scope="module")
def esc10(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 400 recordings of ESC-10 with AudioSet's classes as targets, at 32 kHz."""
    store = tmp_path_factory.mktemp("esc10") / "esc10.h5"
    class_names = reference_dir / "data" / "labels" / "audioset_class_labels_indices.csv"
    options = f"--audio pcm16 --class-names {class_names} --label-map esc50_to_audioset --workers 1"
    assert pack([str(reference_dir / "data" / "ESC-10"), "--out", str(store), *options.split()]) == 0
    return store


@pytest.fixture(scope="module")
def checkpoint(reference_dir: Path) -> str:
    return f"mn04@{reference_dir / 'data' / 'checkpoints' / 'mn04_as_mAP_432.pt'}"


def test_the_audioset_student_names_the_category_of_95_percent_of_the_recordings(
    esc10: Path, checkpoint: str, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    options = f"--label-map esc50_to_audioset --clip-seconds 5 --workers 0 --out {out}"
    assert evaluate(["--tagger", checkpoint, "--clips", str(esc10), *options.split()]) == 0
    found = json.loads(out.read_text())
    assert found["num_clips"] == 400
    assert found["category_accuracy"] >= 0.95
    assert found["category_baseline"] == {"chance": 0.1, "majority": 0.1}  # ten categories of 40 recordings
    assert found["mAP"] >= 0.95


def test_real_logits_distil_into_a_student(esc10: Path, checkpoint: str, tmp_path: Path, reference_dir: Path) -> None:
    """The stored logits of the three reference clips are the reference's, and a student trains on them."""
    logits = tmp_path / "mn04_as_mAP_432.h5"
    assert teach(["--clips", str(esc10), "--teacher", checkpoint, "--out", str(tmp_path), "--clip-seconds", "5"]) == 0
    assert verify(["--logits", str(logits), "--clips", str(esc10)]) == 0
    reference = np.load(reference_dir / "reference" / "mn04_as_esc10_clips.npz")
    manifest = ClipStore.open(esc10).manifest().to_pylist()
    ids = [next(row["clip_id"] for row in manifest if Path(row["source"]).name == name) for name in reference["clip"]]
    # Resampled to int16 by other code than the reference's, and stored as float16.
    np.testing.assert_allclose(LogitStore.open(logits).read(ids), reference["logits"], atol=0.05)

    run = tmp_path / "run"
    settings = "--student mn01 --epochs 1 --clips-per-epoch 32 --batch-size 8 --clip-seconds 5 --folds 1 --workers 0"
    assert pretrain(["--clips", str(esc10), "--logits", str(logits), "--out", str(run), *settings.split()]) == 0
    student = load_student(run)
    card = student.card
    assert student.config.num_classes == len(card.class_names) == 527
    assert all(torch.isfinite(value).all() for value in student.state_dict().values())
    assert 0 < read_metrics(run / "metrics.jsonl", "train")[-1]["distillation_loss"] < 1


def test_a_linear_probe_on_the_audioset_student_names_95_percent_of_the_recordings(
    reference_dir: Path, tmp_path: Path
) -> None:
    """Over the five official folds, on embeddings of a student that never saw ESC-50's classes."""
    weights = reference_dir / "data" / "checkpoints" / "mn04_as_mAP_432.pt"
    options = f"--task esc50 --student mn04 --weights {weights} --out {tmp_path} --probe-only --workers 0"
    assert finetune(["--data", str(reference_dir / "data" / "ESC-10"), *options.split()]) == 0
    found = json.loads((tmp_path / "probe" / "results.json").read_text())
    assert [run["fold"] for run in found["runs"]] == [1, 2, 3, 4, 5]
    assert found["headline"]["mean"] >= 0.95
