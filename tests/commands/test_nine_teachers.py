"""Nine PaSST teachers over real recordings, nine logit stores, one ensemble, one student."""

import csv
import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch

from audio_datasets.pack import main as pack
from audio_datasets.stores.clip_store import ClipStore
from kd.pretrain import main as pretrain
from students import create_student
from students.card import save_student
from students.frontend import LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore
from teacher_logits.stores.ensemble import LogitEnsemble
from teacher_logits.verify import main as verify


@pytest.fixture(scope="module")
def recordings(reference_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clip store of three recordings of each of ESC-10's ten categories."""
    folder = tmp_path_factory.mktemp("recordings")
    taken: dict[str, int] = {}
    with open(reference_dir / "data" / "ESC-10" / "meta" / "esc50.csv", newline="") as file:
        for line in csv.DictReader(file):
            if taken.setdefault(line["category"], 0) < 3:
                taken[line["category"]] += 1
                (folder / "audio" / line["category"]).mkdir(parents=True, exist_ok=True)
                audio = reference_dir / "data" / "ESC-10" / "audio" / f"{Path(line['filename']).stem}.ogg"
                shutil.copy(audio, folder / "audio" / line["category"])
    assert pack([str(folder / "audio"), "--out", str(folder / "clips.h5"), "--workers", "1"]) == 0
    return folder / "clips.h5"


@pytest.fixture(scope="module")
def stores(recordings: Path) -> list[Path]:
    """The logits of nine random PaSST networks of three strides."""
    class_names = ClipStore.open(recordings).class_names
    runs = []
    for number in range(9):
        torch.manual_seed(number)
        stride = (10, 12, 16)[number % 3]
        passt = create_student("passt_tiny", 10, width=64, heads=1, depth=1, stride=stride, time_positions=19)
        torch.nn.init.normal_(passt.head[1].weight, std=0.5)  # so that what it hears shows in its logits
        runs.append(recordings.parent / f"passt{number}")
        save_student(runs[-1], passt, class_names, LogMelConfig(), {"clip_seconds": 2.0})
    out = recordings.parent / "logits"
    command = ["--clips", str(recordings), "--teacher", *map(str, runs), "--out", str(out), "--workers", "0"]
    assert teach(command) == 0
    return [out / f"passt{number}.h5" for number in range(9)]


def test_nine_stores_make_one_ensemble_and_a_student(recordings, stores, tmp_path, capsys):
    assert verify(["--clips", str(recordings), "--logits", *map(str, stores)]) == 0
    assert "ensemble" in capsys.readouterr().out
    ensemble, ids = LogitEnsemble.open(stores), ClipStore.open(recordings).clip_ids
    logits, present = ensemble.read(ids)
    assert present.all()
    assert np.ptp(logits, axis=0).min() > 0  # recordings are told apart
    each = [LogitStore.open(path).read(ids) for path in stores]
    np.testing.assert_allclose(logits, np.mean(each, axis=0), atol=1e-5)

    run = tmp_path / "run"
    words = [
        "--clips",
        recordings,
        "--logits",
        *stores,
        "--teacher-link",
        "sigmoid",
        "--out",
        run,
        "--student",
        "mn01",
        "--clip-seconds",
        2,
    ]
    assert pretrain([*map(str, words), "--epochs", "1", "--batch-size", "10", "--workers", "0"]) == 0
    provenance = json.loads((run / "student.json").read_text())["provenance"]
    assert len(provenance["teachers"]) == 9


def test_a_weight_of_zero_changes_the_targets_without_a_teacher_run(recordings, stores):
    ids = ClipStore.open(recordings).clip_ids
    before = [path.stat().st_mtime_ns for path in stores]
    all_nine = LogitEnsemble.open(stores).read(ids)[0]
    without_first = LogitEnsemble.open([f"{stores[0]}:0", *map(str, stores[1:])]).read(ids)[0]
    np.testing.assert_allclose(without_first, LogitEnsemble.open(stores[1:]).read(ids)[0], atol=1e-5)
    assert np.abs(without_first - all_nine).max() > 0.01
    assert [path.stat().st_mtime_ns for path in stores] == before


def test_a_store_with_a_class_less_is_refused(recordings, stores, tmp_path, capsys):
    shorter = tmp_path / "shorter.h5"
    shutil.copy(stores[0], shorter)
    with h5py.File(shorter, "r+") as file:
        names = json.loads(file.attrs["class_names"])
        file.attrs["class_names"] = json.dumps(names[:-1])
    words = [
        "--clips",
        recordings,
        "--logits",
        *stores[1:],
        shorter,
        "--teacher-link",
        "sigmoid",
        "--out",
        tmp_path / "run",
        "--student",
        "mn01",
    ]
    assert pretrain([*map(str, words), "--epochs", "1"]) == 2
    assert str(shorter) in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
