"""Early stopping: which weights are kept, when it stops, and that a resumed run decides alike."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from kd.training.early_stopping import EarlyStopping


def follow(stopping: EarlyStopping, log: Path, values: list[float]) -> list[bool]:
    """A run whose student's weight is the number of the validation."""
    student, stopped = torch.nn.Linear(1, 1, bias=False), []
    for number, value in enumerate(values):
        with torch.no_grad():
            student.weight.fill_(number)
        stopping.keep_if_best({stopping.metric: value}, student, log)
        with open(log, "a") as file:
            record = {"kind": "validation", "step": number, "epoch": number, stopping.metric: value}
            file.write(json.dumps(record) + "\n")
        stopped.append(stopping.should_stop(log))
    return stopped


@pytest.mark.parametrize(
    ("metric", "values"), [("accuracy", [0.1, 0.5, 0.5, 0.4, 0.3]), ("log_loss", [2.0, 0.5, 0.5, 0.7, 0.9])]
)
def test_the_first_best_weights_are_kept(metric: str, values: list[float], tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert follow(EarlyStopping(metric, 2, tmp_path, Accelerator()), log, values[:2]) == [False, False]
    # A new object, as after a kill: what was best is in the log.
    resumed = EarlyStopping(metric, 2, tmp_path, Accelerator())
    assert follow(resumed, log, values[2:]) == [False, True, True]
    student = torch.nn.Linear(1, 1, bias=False)
    resumed.load_best(student)
    assert student.weight.item() == 1.0


def test_without_a_metric_nothing_happens(tmp_path: Path) -> None:
    stopping = EarlyStopping(None, 1, tmp_path, Accelerator())
    student = torch.nn.Linear(1, 1)
    stopping.keep_if_best({}, student, tmp_path / "log")
    stopping.load_best(student)
    assert not stopping.should_stop(tmp_path / "log")
    assert not list(tmp_path.iterdir())


def test_the_best_weights_are_those_that_were_kept(tmp_path: Path) -> None:
    stopping = EarlyStopping("accuracy", 1, tmp_path, Accelerator(cpu=True))
    network = nn.Linear(2, 2)
    stopping.keep_if_best({"accuracy": 0.5}, network, tmp_path / "metrics.jsonl")
    other = nn.Linear(2, 2)
    stopping.load_best(other)
    assert torch.equal(other.weight, network.weight)
    content = bytearray(stopping.path.read_bytes())
    content[-1] ^= 1
    stopping.path.write_bytes(content)
    with pytest.raises(ValueError, match="best.safetensors is damaged"):
        stopping.load_best(other)
    stopping.path.write_bytes(content[:-4])
    with pytest.raises(ValueError, match="best.safetensors is damaged"):
        stopping.load_best(other)
