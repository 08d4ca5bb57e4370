"""`kd pretrain --dry-run`: what a run will take, and nothing written."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from timm.utils import ModelEmaV3
from torch import nn

from kd.objectives.base import Objective
from kd.pretrain import main
from kd.stages.dry_run import MeasuredSteps
from kd.training.checkpoint import checkpoint_bytes
from kd.training.learner import Learner
from kd.training.optimization import OptimizerConfig, create_optimizer
from kd.training.state import TrainState
from students import create_student


class NoObjective(Objective):
    """An objective without parameters, for a learner whose loss is computed elsewhere."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def arguments(store: Path, logits: Path, out: Path, *more: str) -> list[str]:
    settings = "--student mn01 --epochs 3 --batch-size 2 --clip-seconds 0.4 --workers 0 --dry-run"
    return ["--clips", str(store), "--logits", str(logits), "--out", str(out), *settings.split(), *more]


def test_an_estimate_from_a_few_real_steps(
    tiny_store: Path, tiny_logits: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "run"
    options = ["--split", "train", "--valid-split", "valid", "--validate-every-epochs", "2", "--ema-decay", "0.9"]
    assert main(arguments(tiny_store, tiny_logits, out, *options, "--gradient-accumulation-steps", "2")) == 0
    assert not out.exists()
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["clips"] == [str(tiny_store)]
    estimate = found["estimate"]
    assert estimate["student_parameters"] == sum(p.numel() for p in create_student("mn01", 3).parameters())
    assert estimate["training_clips"] == 8
    assert (estimate["clips_per_step"], estimate["steps_per_epoch"], estimate["steps"]) == (4, 2, 6)
    assert estimate["measured_steps"] == 1  # of the two in an epoch, one warms up
    assert estimate["training_hours"] == pytest.approx(6 * estimate["seconds_per_step"] / 3600)
    assert 0 <= estimate["share_waiting_for_data"] < 1
    assert estimate["validation_hours"] > 0
    assert estimate["memory"]["process_peak_bytes"] > 50e6
    assert estimate["disk"]["clips_bytes"] == tiny_store.stat().st_size
    assert estimate["disk"]["logits_bytes"] == tiny_logits.stat().st_size
    assert estimate["disk"]["run_folder_peak_bytes"] == 3 * estimate["disk"]["checkpoint_bytes"]
    assert estimate["disk"]["free_bytes"] > 0


def test_the_size_of_a_checkpoint_is_what_a_run_writes(tiny_store: Path, tmp_path: Path) -> None:
    options = ["--student", "mn01", "--epochs", "1", "--batch-size", "12", "--clip-seconds", "0.4", "--workers", "0"]
    options += ["--label-weight", "1", "--ema-decay", "0.9", "--clips", str(tiny_store), "--out", str(tmp_path / "run")]
    assert main(options) == 0
    folder = next((tmp_path / "run" / "checkpoints").iterdir())
    written = sum(file.stat().st_size for file in folder.iterdir())
    student = create_student("mn01", 3)
    learner = Learner(student, NoObjective())
    state = TrainState(learner, create_optimizer(OptimizerConfig(), student), ModelEmaV3(learner))
    numbers = checkpoint_bytes(state)
    tensors = 2 * len(student.state_dict()) + 3 * len(list(student.parameters()))
    assert numbers <= written <= numbers + 1000 * tensors


def test_only_json_goes_to_standard_output_and_a_mistake_is_found_before_the_first_step(
    tiny_store: Path, make_tiny_logits: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    logits = make_tiny_logits("part.h5", tiny_store, rows=range(6))
    options = arguments(tiny_store, logits, tmp_path / "run", "--workers", "1")
    assert main(options) == 2
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "6 of 12 training clips have no teacher logits" in captured.err
    assert main([*options, "--missing-logits", "label-only"]) == 0
    captured = capfd.readouterr()
    estimate = json.loads(captured.out)["estimate"]
    assert estimate["measured_steps"] == 5
    assert "trained on their labels only" in captured.err
    if estimate["memory"]["workers_bytes"] is not None:  # where the system tells
        assert estimate["memory"]["workers_bytes"] > 1e6
    assert not (tmp_path / "run").exists()


def test_workers_that_cannot_keep_up_decide_the_time_of_a_step() -> None:
    steps = {"seconds": (1.0, 3.0), "waited_seconds": (0.5, 1.5), "clips_per_step": 100}
    fast = MeasuredSteps(**steps, clip_seconds=0.01, workers=4)
    assert (fast.seconds_per_step, fast.waiting_share) == (2.0, 0.5)
    slow = MeasuredSteps(**steps, clip_seconds=0.16, workers=4)
    assert (slow.seconds_per_step, slow.waiting_share) == (4.0, 0.75)
    alone = MeasuredSteps(**steps, clip_seconds=0.16, workers=0)
    assert alone.seconds_per_step == 2.0
