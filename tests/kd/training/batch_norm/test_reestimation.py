"""Batch-norm statistics taken anew: against PyTorch's own cumulative mean, on several processes, and what is left alone."""

import copy
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from torch.multiprocessing import get_context

from audio_datasets.stores.clip_store import ClipStore
from kd.data.windows import Window
from kd.training.batch_norm import reestimation
from kd.training.batch_norm.reestimation import BatchNormStatistics, has_statistics, too_few_steps, trained_batch_norms
from kd.training.batch_norm.synchronized import synchronize_batch_norms
from kd.training.transfer import freeze
from students import create_student
from students.frontend import LogMel, LogMelConfig

FRONTEND = LogMelConfig(n_mels=64, hop_samples=640)
WINDOW = Window(32000, 0.4)
STUDENTS = {
    "mn01": {"n_mels": 64},
    "mn01 with attention pooling": {"n_mels": 64, "head": "attention_pooling"},
    "dymn04": {"width": 0.1, "n_mels": 64},  # folds batch norms into its kernels in evaluation mode
    "efficientnet_b2": {},  # batch norms of timm, with activations
}


def student_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return create_student(name.split()[0], num_classes=3, **STUDENTS[name])


def statistics_of(store: Path, student: nn.Module, rows: np.ndarray, clips: int = 100) -> BatchNormStatistics:
    names = trained_batch_norms(student)
    return BatchNormStatistics(Accelerator(cpu=True), ClipStore.open(store), rows, WINDOW, names, clips, seed=3)


def running(student: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in student.named_buffers() if "running" in name}


@contextmanager
def batches_of(clips: int) -> Iterator[None]:
    with mock.patch.object(reestimation, "CLIPS_PER_BATCH", clips):
        yield


@pytest.mark.parametrize("name", STUDENTS)
def test_it_is_the_cumulative_mean_of_what_batch_norms_see_in_training(name: str, tiny_store: Path) -> None:
    student, log_mel = student_of(name), LogMel(FRONTEND)
    by_torch = copy.deepcopy(student).eval()
    heard = []

    def frontend(waveform: torch.Tensor) -> torch.Tensor:
        heard.append(log_mel(waveform))
        return heard[-1]

    with batches_of(5):
        assert statistics_of(tiny_store, student, np.arange(12)).renew(student, frontend) == 12
    assert [len(mel) for mel in heard] == [6, 6]
    for layer in by_torch.modules():
        if has_statistics(layer):
            layer.train()
            layer.reset_running_stats()
            layer.momentum = None  # PyTorch's cumulative average
    with torch.no_grad():
        for mel in heard:
            by_torch(mel)
    for buffer, expected in running(by_torch).items():
        torch.testing.assert_close(running(student)[buffer], expected, rtol=1e-4, atol=1e-5)
    assert not any(module.training for module in student.modules())
    momenta = {layer.momentum for layer in student_of(name).modules() if has_statistics(layer)}
    assert {layer.momentum for layer in student.modules() if has_statistics(layer)} == momenta


def test_equal_weights_get_equal_statistics_whatever_they_had(tiny_store: Path) -> None:
    student, log_mel = student_of("mn01"), LogMel(FRONTEND)
    other = copy.deepcopy(student)
    for layer in other.modules():
        if has_statistics(layer):
            layer.running_mean.uniform_(-1, 1)
            layer.running_var.uniform_(1, 2)
    for each in (student, other):
        assert statistics_of(tiny_store, each, np.arange(12), clips=7).renew(each, log_mel) == 7
    assert all(torch.equal(value, running(other)[name]) for name, value in running(student).items())


def test_frozen_batch_norms_keep_their_statistics(tiny_store: Path) -> None:
    student = student_of("mn01")
    norms = [name for name, layer in student.named_modules() if has_statistics(layer)]
    frozen = freeze(student, "batch-norm")
    assert trained_batch_norms(student, frozen) == norms[:1]
    before = running(student)
    statistics = statistics_of(tiny_store, student, np.arange(12))
    statistics.names = trained_batch_norms(student, frozen)
    statistics.renew(student, LogMel(FRONTEND))
    changed = [name for name, value in running(student).items() if not torch.equal(value, before[name])]
    assert changed == [f"{norms[0]}.running_mean", f"{norms[0]}.running_var"]
    assert trained_batch_norms(student, freeze(student, "backbone")) == []
    statistics.names = []
    assert statistics.num_clips == statistics.renew(student, LogMel(FRONTEND)) == 0


def test_clips_that_cannot_be_used_are_left_out(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from audio_datasets.audio.bad_clips import BadClipError

    student, clips, intact = student_of("mn01"), ClipStore.open(tiny_store), ClipStore.waveform
    alone = copy.deepcopy(student)

    def waveform(store: ClipStore, row: int, *arguments: object) -> np.ndarray:
        if row in bad:
            raise BadClipError(clips.clip_id(row), "damaged")
        return intact(store, row, *arguments)

    monkeypatch.setattr(ClipStore, "waveform", waveform)
    bad = {2, 5}
    statistics = statistics_of(tiny_store, student, np.arange(12))
    with pytest.raises(BadClipError):
        statistics.renew(student, LogMel(FRONTEND))
    statistics.on_bad_clip = "skip"
    assert statistics.renew(student, LogMel(FRONTEND)) == 10
    rest = np.setdiff1d(np.arange(12), list(bad))
    assert statistics_of(tiny_store, alone, rest).renew(alone, LogMel(FRONTEND)) == 10
    for name, value in running(alone).items():
        torch.testing.assert_close(running(student)[name], value, rtol=1e-4, atol=1e-5)
    bad = set(range(12))
    with pytest.raises(ValueError, match="none of 12 training clips can be used to recompute batch-norm statistics"):
        statistics.renew(student, LogMel(FRONTEND))


def one_of_two(rank: int, port: int, store: Path, answer: Connection) -> None:
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    # Without the second, Accelerate chooses the number of threads, and sums are rounded in another order.
    os.environ.update(ACCELERATE_USE_CPU="true", OMP_NUM_THREADS="1")
    accelerator = Accelerator(cpu=True)
    student = synchronize_batch_norms(student_of("mn01"), accelerator.device)
    statistics = statistics_of(store, student, np.arange(12))
    statistics.accelerator = accelerator
    asked = []
    with batches_of(4):
        heard = statistics.renew(student, LogMel(FRONTEND), lambda: asked.append(rank))
    answer.send((accelerator.num_processes, heard, len(asked), {k: v.numpy() for k, v in running(student).items()}))
    torch.distributed.destroy_process_group()


def test_the_number_of_processes_changes_nothing(tiny_store: Path) -> None:
    """Three batches on two processes, with batch norms that exchange their statistics in training."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [
        context.Process(target=one_of_two, args=(rank, port, tiny_store, pipes[rank][1]), daemon=True)
        for rank in range(2)
    ]
    for process, (_, sending) in zip(ranks, pipes, strict=True):
        process.start()
        sending.close()
    answers = []
    for process, (receiving, _) in zip(ranks, pipes, strict=True):
        assert receiving.poll(120), "a process did not answer"
        answers.append(receiving.recv())
        process.join()
    student = student_of("mn01")
    with batches_of(4):
        statistics_of(tiny_store, student, np.arange(12)).renew(student, LogMel(FRONTEND))
    for processes, heard, asked, values in answers:
        assert (processes, heard, asked) == (2, 12, 2)
        for name, value in running(student).items():
            np.testing.assert_array_equal(values[name], value.numpy())


def test_few_steps_are_worth_a_warning() -> None:
    student = student_of("mn01")
    names = trained_batch_norms(student)
    warning = too_few_steps(student, names, 300)
    assert warning is not None
    assert "300 steps are too few" in warning
    assert "4.9% of their initial values" in warning  # 0.99 ** 300
    assert "--batch-norm-clips 2000" in warning
    assert too_few_steps(student, names, 1000) is None
    assert too_few_steps(student, [], 1) is None
    by_timm = student_of("efficientnet_b2")
    assert too_few_steps(by_timm, trained_batch_norms(by_timm), 100) is None
