"""Checkpoints of a run that goes on: what was saved comes back, and nothing else does."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd.objectives.base import Objective
from kd.run_folder.metrics_log import MetricsLog
from kd.training.checkpoint import DIGESTS, digests_of, load_checkpoint, resume_state, save_state
from kd.training.learner import Learner
from kd.training.loop import Hooks, LoopConfig, Run, fit
from kd.training.optimization import OptimizerConfig, create_optimizer, load_optimizer
from kd.training.schedule import ScheduleConfig
from kd.training.state import TrainState


class NoObjective(Objective):
    """An objective without parameters, for a learner whose loss is computed elsewhere."""

    def __init__(self) -> None:
        nn.Module.__init__(self)


def begun(folder: Path, weight_decay: float = 0.1, outputs: int = 2) -> tuple[TrainState, Run, MetricsLog]:
    """A run of a tiny network after one step."""
    torch.manual_seed(3)
    network = nn.Linear(3, outputs)
    config = OptimizerConfig(weight_decay=weight_decay)
    state = TrainState(Learner(network, NoObjective()), create_optimizer(config, network), None)
    network(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    state.optimizer.zero_grad()
    state.step = state.step_in_epoch = 1
    run = Run(folder, LoopConfig(epochs=1), config, ScheduleConfig())
    return state, run, MetricsLog(run.metrics_path, Accelerator(cpu=True))


def saved(folder: Path) -> tuple[Path, MetricsLog]:
    """A run folder with a checkpoint, and what was logged before it and after."""
    state, run, log = begun(folder)
    log.write("train", 1, 0, {"loss": 0.75})
    save_state(log.accelerator, state, run.checkpoint_folder, 2, log)
    log.write("train", 2, 0, {"loss": 0.5})
    return next(run.checkpoint_folder.iterdir()), log


def test_a_byte_that_has_changed_in_any_file_is_noticed(tmp_path: Path) -> None:
    checkpoint, _ = saved(tmp_path)
    files = sorted(checkpoint.iterdir())
    assert [file.name for file in files] == [DIGESTS, "optimizer.pt", "state.json", "student.safetensors"]
    load_checkpoint(checkpoint)
    for file in files:
        content = file.read_bytes()
        for place in range(3, len(content), max(1, len(content) // 8)):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(
                ValueError, match=r"step-00000001 is damaged .* remove it to continue from the one before"
            ):
                load_checkpoint(checkpoint)
        file.write_bytes(content)
    (checkpoint / DIGESTS).unlink()  # as version 0.1 wrote it
    assert load_checkpoint(checkpoint)["state"]["step"] == 1


def test_the_log_is_cut_back_to_the_checkpoint_unless_it_was_changed(tmp_path: Path) -> None:
    saved(tmp_path)
    state, run, log = begun(tmp_path)
    text = run.metrics_path.read_text()
    run.metrics_path.write_text(text.replace("0.75", "0.25"))
    with pytest.raises(ValueError, match="metrics.jsonl was changed"):
        resume_state(log.accelerator, state, run.checkpoint_folder, log)
    run.metrics_path.write_text(text)
    assert resume_state(log.accelerator, state, run.checkpoint_folder, log)
    assert run.metrics_path.read_text() == text.splitlines(keepends=True)[0]


def changed(checkpoint: Path, **state: Any) -> None:
    """Writes other values into ``state.json``, with the digest that they have."""
    content = json.loads((checkpoint / "state.json").read_text()) | state
    (checkpoint / "state.json").write_text(json.dumps(content))
    (checkpoint / DIGESTS).write_text(json.dumps(digests_of(checkpoint)))


@pytest.mark.parametrize("state", [{"step": -1}, {"epoch": "1"}, {"loss_sums": 3}, {"metrics_bytes": None}])
def test_a_position_that_is_none_is_refused(tmp_path: Path, state: dict[str, Any]) -> None:
    checkpoint, _ = saved(tmp_path)
    changed(checkpoint, **state)
    fresh, run, log = begun(tmp_path)
    with pytest.raises(ValueError, match="step-00000001 does not fit this run"):
        resume_state(log.accelerator, fresh, run.checkpoint_folder, log)


def test_a_checkpoint_of_another_student_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    fresh, run, log = begun(tmp_path, outputs=4)
    with pytest.raises(ValueError, match=r"(?s)step-00000001 does not fit this run .*size mismatch"):
        resume_state(log.accelerator, fresh, run.checkpoint_folder, log)


def test_an_optimizer_keeps_the_settings_that_the_run_goes_on_with(tmp_path: Path) -> None:
    old, new = (begun(tmp_path, weight_decay)[0] for weight_decay in (0.1, 0.4))
    averages = old.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    load_optimizer(new.optimizer, old.optimizer.state_dict())
    assert [group["weight_decay"] for group in new.optimizer.param_groups] == [0.4]
    assert torch.equal(new.optimizer.state_dict()["state"][0]["exp_avg"], averages)
    wrong = old.optimizer.state_dict()
    wrong["state"][0]["exp_avg_sq"] = torch.zeros(7)
    with pytest.raises(ValueError, match="exp_avg_sq does not fit a parameter of shape"):
        load_optimizer(new.optimizer, wrong)


def test_a_run_that_stands_behind_the_end_of_a_shorter_epoch_validates_it(tmp_path: Path) -> None:
    """As when it goes on, by --accept-changes, with larger steps."""
    state, run, log = begun(tmp_path)
    state.step_in_epoch = 30
    batches = SimpleNamespace(steps_per_epoch=20, start_at=lambda epoch, step: None)
    fit(log.accelerator, state, batches, [], run, log, Hooks(validate=lambda student: {"mAP": 0.5}))
    assert state.epoch == 1
    assert json.loads(run.metrics_path.read_text())["mAP"] == 0.5
