"""Synchronised batch norm on a CPU: two processes compute what one does with both their batches, gradients included."""

import copy
import socket
from multiprocessing.connection import Connection

import pytest
import torch
from torch import distributed, nn
from torch.multiprocessing import get_context
from torch.nn.parallel import DistributedDataParallel

from kd.training.batch_norm.synchronized import SYNCHRONIZED, synchronize_batch_norms
from students import create_student

STUDENTS = {
    "mn01": {},
    "mn01 with attention pooling": {"head": "attention_pooling"},
    "dymn04": {"width": 0.1},
    "efficientnet_b2": {},
}


def students() -> list[nn.Module]:
    """One of each kind in double precision, in which rounding cannot hide a wrong gradient; without dropout."""
    torch.manual_seed(0)
    made = [create_student(name.split()[0], num_classes=3, **options).double() for name, options in STUDENTS.items()]
    for student in made:
        for layer in student.modules():
            if hasattr(layer, "probability"):
                layer.probability = 0.0
    return made


def batch() -> torch.Tensor:
    return torch.randn(4, 1, 128, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def step(student: nn.Module, mel: torch.Tensor) -> torch.Tensor:
    """One backward pass; returns the logits."""
    logits = student.train()(mel).logits
    logits.square().sum(dim=1).mean().backward()
    return logits.detach()


def one_of_two(rank: int, port: int, answer: Connection) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    results = []
    for student in students():
        parallel = DistributedDataParallel(synchronize_batch_norms(student, torch.device("cpu")))
        logits = step(parallel, batch().chunk(2)[rank])
        gradients = {name: value.grad.numpy() for name, value in student.named_parameters() if value.grad is not None}
        results.append((logits.numpy(), gradients, {name: value.numpy() for name, value in student.named_buffers()}))
    answer.send(results)
    distributed.destroy_process_group()


def test_two_processes_compute_what_one_does_with_both_batches() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    context = get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    ranks = [context.Process(target=one_of_two, args=(rank, port, pipes[rank][1]), daemon=True) for rank in range(2)]
    for process, (_, sending) in zip(ranks, pipes, strict=True):
        process.start()
        sending.close()  # so that a child that fails is the end of its pipe
    answers = []
    for process, (receiving, _) in zip(ranks, pipes, strict=True):
        assert receiving.poll(120), "a process did not answer"
        answers.append(receiving.recv())
        process.join()
    for student, *parts in zip(students(), *answers, strict=True):
        logits = step(student, batch())
        torch.testing.assert_close(torch.cat([torch.from_numpy(part[0]) for part in parts]), logits)
        parameters, buffers = dict(student.named_parameters()), dict(student.named_buffers())
        for _, gradients, running in parts:
            assert gradients.keys() == {name for name, value in parameters.items() if value.grad is not None}
            for name, gradient in gradients.items():
                torch.testing.assert_close(torch.from_numpy(gradient), parameters[name].grad, rtol=1e-6, atol=1e-9)
            for name, values in running.items():
                torch.testing.assert_close(torch.from_numpy(values), buffers[name])


@pytest.mark.parametrize("name", STUDENTS)
def test_on_one_process_nothing_changes(name: str) -> None:
    student = create_student(name.split()[0], num_classes=3, **STUDENTS[name])
    converted = synchronize_batch_norms(copy.deepcopy(student), torch.device("cpu"))
    assert any(type(layer) in SYNCHRONIZED.values() for layer in converted.modules())
    assert not any(type(layer) in SYNCHRONIZED for layer in converted.modules())
    assert list(converted.state_dict()) == list(student.state_dict())
    mel = torch.randn(2, 1, 128, 40)
    assert torch.equal(converted.eval()(mel).logits, student.eval()(mel).logits)


def test_another_kind_of_batch_norm_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="found BatchNorm3d at '0'"):
        synchronize_batch_norms(nn.Sequential(nn.BatchNorm3d(2)), torch.device("cpu"))
