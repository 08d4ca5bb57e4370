"""`kd evaluate`: every kind of tagger, the label map, and wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from audio_datasets.audio.codec import to_pcm16
from audio_datasets.stores.clip_store import ClipStore
from audio_datasets.stores.clip_writer import ClipRecord, write_clip_store
from audio_datasets.stores.manifest import select_rows
from audio_datasets.system.files import write_json
from kd.evaluate import EvaluateConfig, as_results, main
from kd.evaluation.metrics import tagging_metrics
from students import create_student
from students.card import save_student
from students.frontend import LogMel, LogMelConfig
from teacher_logits.precompute import main as teach
from teacher_logits.store import LogitStore


@pytest.fixture(scope="module")
def run(tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student whose batch norms know the tiny clips, so that its outputs differ from clip to clip."""
    clips, frontend = ClipStore.open(tiny_store), LogMelConfig()
    torch.manual_seed(0)
    student = create_student("mn01", len(clips.class_names)).train()
    for layer in student.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    waveforms = np.stack([clips.waveform(row, frontend.sample_rate_hz) for row in range(len(clips))])
    with torch.no_grad():
        student(LogMel(frontend)(torch.from_numpy(waveforms)))
    out = tmp_path_factory.mktemp("runs") / "run"
    save_student(out, student, clips.class_names, frontend, {"clip_seconds": 0.5})
    return out


def results(tmp_path: Path, *arguments: object) -> dict:
    out = tmp_path / "results.json"
    assert main([*map(str, arguments), "--workers", "0", "--out", str(out)]) == 0
    return json.loads(out.read_text(), parse_constant=pytest.fail)  # JSON has no Infinity


def test_the_metrics_are_those_of_the_stored_logits(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    found = results(tmp_path, "--tagger", run, "--clips", tiny_store, "--folds", 1, 3, "--batch-size", 3)
    assert teach(["--clips", str(tiny_store), "--teacher", str(run), "--out", str(tmp_path), "--workers", "0"]) == 0
    clips, stored = ClipStore.open(tiny_store), LogitStore.open(tmp_path / "run.h5")
    rows = select_rows(clips, folds=(1, 3))
    logits = stored.read([clips.clip_id(int(row)) for row in rows])
    expected = tagging_metrics(clips.targets(rows), logits, clips.class_names).summary()
    assert found["num_clips"] == len(rows) == 8
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6), name


def test_a_perfect_tagger_leaves_json(tiny_store: Path, tmp_path: Path) -> None:
    """Its d′ is infinite, and no class's ROC AUC is defined where every clip has the class."""
    clips, rows = ClipStore.open(tiny_store), np.arange(12)
    targets = clips.targets(rows)
    targets[:, 2] = 1
    metrics = tagging_metrics(targets, 2 * targets - 1, clips.class_names)
    assert metrics.d_prime == np.inf
    write_json(tmp_path / "out.json", as_results(EvaluateConfig("run", tiny_store), clips, 12, metrics, {}))
    found = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert (found["mAP"], found["roc_auc"], found["d_prime"]) == (1.0, 1.0, None)
    assert [entry["roc_auc"] for entry in found["classes"].values()] == [1.0, 1.0, None]


def test_unknown_labels_do_not_count(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    clips = ClipStore.open(tiny_store)
    rows = np.arange(len(clips))
    known = [clips.class_names if row % 3 else clips.class_names[:1] for row in rows]
    records = []
    for row, names in zip(rows, known, strict=True):
        labels = [name for name, has in zip(clips.class_names, clips.targets([row])[0], strict=True) if has]
        samples = to_pcm16(clips.waveform(row, 32000))
        records.append(ClipRecord(clips.clip_id(row), samples, tuple(n for n in labels if n in names), names))
    masked = tmp_path / "masked.h5"
    write_clip_store(masked, records, clips.class_names, audio_kind="pcm16", sample_rate_hz=32000)
    found = results(tmp_path, "--tagger", run, "--clips", masked)
    assert teach(["--clips", str(masked), "--teacher", str(run), "--out", str(tmp_path), "--workers", "0"]) == 0
    store, logits = ClipStore.open(masked), LogitStore.open(tmp_path / "run.h5").read(clips.clip_ids)
    expected = tagging_metrics(store.targets(rows), logits, clips.class_names, store.mask(rows)).summary()
    assert found["mAP"] == pytest.approx(expected["mAP"], abs=1e-6)
    assert found["mAP"] != pytest.approx(
        tagging_metrics(store.targets(rows), logits, clips.class_names).summary()["mAP"]
    )


def test_weights_with_a_name_equal_the_run_folder(run: Path, tiny_store: Path, tmp_path: Path) -> None:
    by_folder = results(tmp_path, "--tagger", run, "--clips", tiny_store, "--clip-seconds", 0.5)
    spec = f"mn01@{run / 'student.safetensors'}"
    by_weights = results(tmp_path, "--tagger", spec, "--clips", tiny_store, "--clip-seconds", 0.5)
    assert by_folder["classes"] == by_weights["classes"]


def test_wrong_input(
    run: Path, tiny_store: Path, make_tiny_store: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    def fails(*arguments: object) -> str:
        assert main([*map(str, arguments), "--workers", "0"]) == 2
        shown = capsys.readouterr().err
        assert shown.startswith("error: ")
        return shown

    assert "absent" in fails("--tagger", tmp_path / "absent", "--clips", tiny_store)
    assert "absent.h5" in fails("--tagger", run, "--clips", tmp_path / "absent.h5")
    renamed = make_tiny_store("renamed.h5", class_names=("hiss", "hum, high", "click"))
    assert "class 1 is 'hum, high' in" in fails("--tagger", run, "--clips", renamed)
    weights = run / "student.safetensors"
    assert "mn01" in fails("--tagger", f"mn02@{weights}", "--clips", tiny_store)
    assert "mn99" in fails("--tagger", f"mn99@{weights}", "--clips", tiny_store)
    names = tmp_path / "names.txt"
    names.write_text("one\ntwo\n")
    shown = fails("--tagger", f"mn01@{weights}", "--clips", tiny_store, "--tagger-class-names", names)
    assert "has 3 classes, but the class list has 2. Give the class list of the weights with" in shown
    assert "--tagger-class-names FILE" in shown
    assert "--class-map FILE" in shown
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(weights.read_bytes()[:-100])
    assert "damaged.safetensors" in fails("--tagger", f"mn01@{damaged}", "--clips", tiny_store)
    assert "needs clips with exactly one category" in fails(
        "--tagger", run, "--clips", tiny_store, "--label-map", "esc50_to_audioset"
    )
