"""Processes that a launcher started in a way that cannot work."""

import sys
from pathlib import Path

import pytest
import torch

from kd import evaluate
from teacher_logits import processes


@pytest.fixture
def _two_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a launcher sets for the first of two processes, apart from what would make Accelerate wait for the other."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(sys, "argv", ["/home/me/a b/evaluate.py", "--clips", "c.h5"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)


@pytest.mark.usefixtures("_two_processes")
def test_two_processes_without_a_gpu_are_told_the_command_that_works(capsys: pytest.CaptureFixture) -> None:
    assert evaluate.main(["--tagger", "run", "--clips", "c.h5"]) == 2
    assert capsys.readouterr().err == (
        "error: 2 processes were started, but without a GPU each would do all of the work alone. To share it on CPUs, run:\n"
        "  ACCELERATE_USE_CPU=true python -m torch.distributed.run --nproc_per_node 2 '/home/me/a b/evaluate.py' --clips c.h5\n"
    )


@pytest.mark.usefixtures("_two_processes")
def test_only_the_first_process_speaks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main(["--tagger", "run", "--clips", "c.h5"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("_two_processes")
def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ValueError, match=r"^2 processes .* has 1 GPU\. .*\n  accelerate launch --num_processes 1 '/home"
    ):
        processes.refuse_too_many_processes()
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    processes.refuse_too_many_processes()
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    processes.refuse_too_many_processes()


def test_a_module_is_launched_by_its_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/anywhere/kd/pretrain.py", "--out", str(tmp_path)])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", processes.__spec__)
    assert processes.this_command() == f"-m teacher_logits.processes --out {tmp_path}"
