"""Run folders that version 0.1 began: the same command goes on with them, and their results are read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kd import finetune, pretrain, report
from kd.run_folder.results import Results
from kd.training.checkpoint import DIGESTS, checkpoints

ONLY_OF_FINE_TUNING = (
    *("waveform_mixup", "waveform_mixup_alpha", "freq_mixstyle", "freq_mixstyle_alpha", "impulse_responses"),
    *("impulse_response_share", "time_masks", "time_mask_share", "frequency_masks", "frequency_mask_share"),
)
"""Augmentation that fine-tuning kept in a part of its own, and pretraining did not have."""
NEW = {
    "finetune": ("ensemble", "views", "objective", "objective_options", "sync_batch_norm"),
    "pretrain": ("short_clips", "objective", "objective_options", "loss"),
}
"""Settings that there were not."""
WRITTEN_LAST = ("results.json", "result.json", "predictions.npz", "student.json", "student.safetensors")


def as_version_0_1(whole: Path, run: Path, stage: str, steps: int) -> None:
    """Leaves in ``run`` what version 0.1 would have left at a step of a run that is finished in ``whole``."""
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    path = run / "config.json"
    config = json.loads(path.read_text())
    for name in ("finished", *NEW[stage]):
        del config[name]
    apart = {name: config["augment"].pop(name) for name in ONLY_OF_FINE_TUNING}
    if stage == "finetune":
        config["task_augment"] = apart
    path.write_text(json.dumps(config))
    for name in WRITTEN_LAST:
        (run / name).unlink(missing_ok=True)
    for place in checkpoints(run / "checkpoints"):
        if int(place.name.removeprefix("step-")) > steps:
            shutil.rmtree(place)
            continue
        (place / DIGESTS).unlink()
        state = json.loads((place / "state.json").read_text())
        for name in ("skipped_steps", "metrics_digest"):
            del state[name]
        (place / "state.json").write_text(json.dumps(state))


def assert_same_result(one: Path, other: Path) -> None:
    for name in ("student.safetensors", "metrics.jsonl"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


KEPT = [
    "--keep-checkpoints",
    "99",
    "--checkpoint-every-steps",
    "1",
    "--log-every-steps",
    "1",
    "--ema-decay",
    "0.5",
    "--workers",
    "0",
]


def test_a_fine_tuning_run_goes_on(
    make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    command = ["--task", "folder", "--data", str(make_task_folder("folder")), "--student", "mn01", *KEPT, "--no-report"]
    command += [
        "--epochs",
        "2",
        "--batch-size",
        "4",
        "--clip-seconds",
        "0.4",
        "--time-masks",
        "2",
        "--freq-mixstyle",
        "0.5",
    ]
    assert finetune.main([*command, "--out", str(whole)]) == 0
    as_version_0_1(whole, out, "finetune", steps=1)
    capsys.readouterr()
    assert finetune.main([*command, "--out", str(out)]) == 0
    assert " at epoch 0, step 1 of 2" in capsys.readouterr().out
    assert_same_result(whole, out)
    assert (out / "result.json").read_text() == (whole / "result.json").read_text()

    # Another setting of what was kept apart is still another setting.
    as_version_0_1(whole, out, "finetune", steps=1)
    assert finetune.main([*command, "--out", str(out), "--time-masks", "3"]) == 2
    assert "augment.time_masks: 2 -> 3" in capsys.readouterr().err
    # So is one that there was not, unless it is what it always was.
    assert finetune.main([*command, "--out", str(out), "--sync-batch-norm"]) == 2
    assert "sync_batch_norm: false -> true" in capsys.readouterr().err


def test_a_pretraining_run_goes_on(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "run"
    command = ["--clips", str(tiny_store), "--logits", str(tiny_logits), "--student", "mn01", "--n-mels", "64", *KEPT]
    command += ["--hop-samples", "640", "--epochs", "2", "--batch-size", "4", "--clip-seconds", "0.4"]
    assert pretrain.main([*command, "--out", str(whole)]) == 0
    as_version_0_1(whole, out, "pretrain", steps=4)
    capsys.readouterr()
    assert pretrain.main([*command, "--out", str(out)]) == 0
    assert " at epoch 1, step 1 of 3" in capsys.readouterr().out
    assert_same_result(whole, out)
    as_version_0_1(whole, out, "pretrain", steps=4)
    assert pretrain.main([*command, "--out", str(out), "--time-masks", "3"]) == 2
    assert "augment.time_masks: 0 -> 3" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "labels"), [("folder", "one"), ("openmic", "several")])
def test_a_report_of_a_finished_run(
    task: str, labels: str, make_task_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Its results told "one" or "several" labels, where today's tell the groups of classes."""
    out = tmp_path / "run"
    command = ["--task", task, "--data", str(make_task_folder(task)), "--student", "mn01", "--no-report"]
    command += ["--out", str(out), *["--epochs", "1", "--batch-size", "2", "--clip-seconds", "0.4", "--workers", "0"]]
    assert finetune.main(command) == 0
    path = out / "results.json"
    content: dict[str, Any] = json.loads(path.read_text())
    del content["label_groups"]
    path.write_text(json.dumps({**content, "labels": labels}))
    assert Results.read(out).label_space.exclusive == (labels == "one")
    capsys.readouterr()
    assert report.main([str(out)]) == 0
    text = (out / "report.md").read_text()
    assert ("accuracy" in text) == (labels == "one")
