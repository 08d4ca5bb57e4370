import os

import pytest
import torch
from accelerate import Accelerator

from kd.training.threads import leave_a_core_to_the_workers


def test_a_core_is_left_unless_the_environment_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    try:
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(6)))
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        leave_a_core_to_the_workers(Accelerator(cpu=True))
        assert torch.get_num_threads() == 5
        monkeypatch.setenv("OMP_NUM_THREADS", "2")
        torch.set_num_threads(2)
        leave_a_core_to_the_workers(Accelerator(cpu=True))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
