"""The students of one run as a teacher: their mean, and the mean of those that were not trained on a clip's labels."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.system.files import write_json
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore
from teacher_logits.teachers.loaders import load_teacher
from teacher_logits.teachers.run_ensemble import RunEnsemble, read_trained_on, students_of_run, write_trained_on
from teacher_logits.verify import main as verify

CLASSES = ("hiss", "hum, low", "click")
IDS = [f"clip-{number:04d}" for number in range(12)]


@pytest.fixture(scope="module")
def folds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three folds over the first nine clips: fold f holds out every third of them. Clips 9 to 11 have no labels."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    for fold in range(3):
        torch.manual_seed(fold)
        student = create_student("mn01", num_classes=3, n_mels=32)
        for layer in student.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.momentum = 1.0
        student.train()(torch.randn(8, 1, 32, 50))
        torch.nn.init.normal_(student.get_parameter("classifier.5.weight"))
        save_student(folder / f"fold{fold}", student, CLASSES, LogMelConfig(n_mels=32), {"clip_seconds": 0.5})
        write_trained_on(folder / f"fold{fold}", [IDS[number] for number in range(9) if number % 3 != fold])
    write_json(folder / "results.json", {"runs": [{"folder": f"fold{fold}"} for fold in range(3)]})
    return folder


@pytest.fixture(scope="module")
def each_fold(folds: Path, tiny_store: Path) -> np.ndarray:
    """What each fold's student says of each clip, alone: (3, 12, 3)."""
    clips = ClipStore.open(tiny_store)
    waveform = torch.stack([torch.from_numpy(clips.waveform(row, 32000)) for row in range(12)])
    with torch.inference_mode():
        return np.stack([load_teacher(folds / f"fold{fold}")(waveform).numpy() for fold in range(3)])


def test_folds_are_taught_by_their_mean(folds: Path, tiny_store: Path, each_fold: np.ndarray, tmp_path: Path) -> None:
    assert teach(["--clips", str(tiny_store), "--teacher", str(folds), "--out", str(tmp_path), "--workers", "0"]) == 0
    store = LogitStore.open(tmp_path / "mine.h5")
    np.testing.assert_allclose(store.read(IDS), each_fold.mean(axis=0), atol=5e-3)
    assert len(store.teacher["architecture"]["mean_of"]) == 3
    assert verify(["--clips", str(tiny_store), "--logits", str(tmp_path / "mine.h5"), "--teacher", str(folds)]) == 0


def test_a_clip_is_taught_by_the_fold_that_held_it_out(
    folds: Path, tiny_store: Path, each_fold: np.ndarray, tmp_path: Path
) -> None:
    given = ["--clips", str(tiny_store), "--teacher", str(folds), "--cross-fitted", "--out", str(tmp_path)]
    assert teach([*given, "--workers", "1", "--batch-size", "5"]) == 0
    path = tmp_path / "mine-cross-fitted.h5"
    found = LogitStore.open(path).read(IDS)
    for number in range(9):
        np.testing.assert_allclose(found[number], each_fold[number % 3, number], atol=5e-3)
        assert np.abs(found[number] - each_fold[:, number].mean(axis=0)).max() > 0.02  # and not by the mean
    np.testing.assert_allclose(found[9:], each_fold[:, 9:].mean(axis=0), atol=5e-3)  # no labels: all students
    assert verify(["--clips", str(tiny_store), "--logits", str(path), "--teacher", str(folds)]) == 0
    assert load_teacher(folds).fingerprint != load_teacher(folds, cross_fitted=True).fingerprint


def test_views_are_cross_fitted_too(folds: Path, tiny_store: Path, tmp_path: Path) -> None:
    given = [
        "--clips",
        str(tiny_store),
        "--views",
        "2",
        "--view-seconds",
        "0.3",
        "--out",
        str(tmp_path),
        "--workers",
        "0",
    ]
    assert teach([*given, "--teacher", str(folds), "--cross-fitted"]) == 0
    assert teach([*given, "--teacher", str(folds / "fold1")]) == 0
    both = [LogitStore.open(tmp_path / name) for name in ("mine-cross-fitted.h5", "fold1.h5")]
    for view in (0, 1):
        found, alone = (store.read([IDS[4]], np.array([view])) for store in both)
        np.testing.assert_allclose(found, alone, atol=5e-3)


def test_a_clip_that_all_were_trained_on_gets_no_logits(
    folds: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    given = ["--clips", str(tiny_store), "--teacher", str(folds / "fold0"), "--cross-fitted", "--out", str(tmp_path)]
    assert teach([*given, "--workers", "0", "--batch-size", "2"]) == 0
    shown = capsys.readouterr().out
    assert "6 of 12 clips get no logits: 'clip-0001' (every student of the teacher was trained on its labels)" in shown
    store = LogitStore.open(tmp_path / "fold0-cross-fitted.h5")
    assert store.clip_ids == [IDS[number] for number in (0, 3, 6, 9, 10, 11)]
    assert len((tmp_path / "fold0-cross-fitted.skipped.txt").read_text().splitlines()) == 6
    assert teach([*given, "--workers", "0", "--batch-size", "2"]) == 0  # complete, and nothing is refused as a bad clip
    assert "nothing to do" in capsys.readouterr().out


def test_a_mapped_teacher_is_cross_fitted(
    folds: Path, tmp_path: Path, each_fold: np.ndarray, make_tiny_store: Callable[..., Path]
) -> None:
    store = make_tiny_store("others.h5", class_names=("noise", "hum", "knock"))
    (tmp_path / "map.csv").write_text('teacher_class,class\nhiss,noise\n"hum, low",hum\nclick,knock\nhiss,knock\n')
    given = ["--clips", str(store), "--teacher", str(folds), "--cross-fitted", "--out", str(tmp_path), "--workers", "0"]
    assert teach([*given, "--class-map", str(tmp_path / "map.csv")]) == 0
    path = tmp_path / "mine-cross-fitted.h5"
    one = each_fold[1, 4]
    np.testing.assert_allclose(
        LogitStore.open(path).read([IDS[4]])[0], [one[0], one[1], max(one[0], one[2])], atol=5e-3
    )
    assert verify(["--clips", str(store), "--logits", str(path), "--teacher", str(folds)]) == 0


def test_what_is_no_run_of_several_students_is_refused(
    folds: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(ValueError, match="--cross-fitted needs run folders"):
        load_teacher("mn01@weights.pt", CLASSES, cross_fitted=True)
    old = tmp_path / "old"
    save_student(old, create_student("mn01", 3), CLASSES, LogMelConfig())
    with pytest.raises(ValueError, match="does not tell which clips its student was trained on"):
        load_teacher(old, cross_fitted=True)
    (old / "trained_on.json").write_text("[]")
    with pytest.raises(ValueError, match="trained_on.json is damaged"):
        read_trained_on(old)
    for runs, message in (
        ([], "names no folders of students"),
        ([{"folder": 3}], "names no folders of students"),
        ([{"folder": "../old"}], "is no folder of the run"),
        ([{"folder": "fold7"}], "has no student in fold7; 0 of its 1 students are there"),
    ):
        write_json(tmp_path / "bad" / "results.json", {"runs": runs})
        with pytest.raises(ValueError, match=message):
            students_of_run(tmp_path / "bad")
    others = [load_teacher(folds / "fold0"), load_teacher(old)]
    with pytest.raises(ValueError, match="differ in their classes, front ends or links"):
        RunEnsemble("both", others)
