"""Ways to run a student that must not change what it says: compiled, channels-last, in half precision, twice."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from students import create_student
from students.families.dymn import set_temperature
from students.interface import Student

NAMES = ("mn01", "dymn04")


@pytest.fixture(params=NAMES)
def student(request: pytest.FixtureRequest, as_if_trained) -> Student:
    torch.manual_seed(0)
    return as_if_trained(create_student(request.param, num_classes=5))


@pytest.fixture
def mel() -> torch.Tensor:
    return torch.randn(2, 1, 128, 50) + torch.linspace(-1, 1, 2).view(2, 1, 1, 1)


def assert_about_equal(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("fused", [False, pytest.param(True, marks=pytest.mark.sweep)])
def test_compiled_in_one_graph_it_gives_the_same(student: Student, mel: torch.Tensor, fused: bool) -> None:
    torch.compiler.reset()
    run = student.fuse() if fused else student
    with torch.inference_mode():
        expected = student(mel).logits
        assert_about_equal(torch.compile(run, fullgraph=True, backend="aot_eager")(mel).logits, expected, 1e-3)


def test_compiled_to_machine_code_a_dynamic_block_gives_the_same(as_if_trained) -> None:
    """One block, as a whole student takes two minutes to compile on one core."""
    torch.compiler.reset()
    torch.manual_seed(0)
    block = as_if_trained(create_student("dymn04", num_classes=5)).layers[1]
    x = torch.randn(2, 8, 12, 9)
    with torch.inference_mode():
        assert_about_equal(torch.compile(block, fullgraph=True)(x), block(x), 1e-4)


@pytest.mark.sweep
def test_training_compiles_in_one_graph(as_if_trained, mel: torch.Tensor) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student = as_if_trained(create_student("dymn04", num_classes=5, dynamic_blocks="replace_se"))
    student.classifier[4].probability = 0.0  # draws from another generator when compiled
    gradients = []
    for run in (student, torch.compile(student, fullgraph=True, backend="aot_eager")):
        student.zero_grad()
        run.train()(mel).logits.square().mean().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    difference = (gradients[0] - gradients[1]).norm() / gradients[0].norm()
    assert difference < 1e-2


def test_another_temperature_does_not_compile_again(as_if_trained, mel: torch.Tensor) -> None:
    torch.compiler.reset()
    torch.manual_seed(0)
    student = as_if_trained(create_student("dymn04", num_classes=5))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(student, fullgraph=True, backend=counter)
    logits = []
    with torch.no_grad():
        for temperature in (30.0, 10.0, 1.0):
            set_temperature(student, temperature)
            logits.append(compiled(mel).logits)
    assert counter.frame_count == 1
    assert not torch.allclose(logits[0], logits[1])
    assert not torch.allclose(logits[1], logits[2])


@pytest.mark.parametrize("fused", [False, True])
def test_channels_last_gives_the_same(student: Student, mel: torch.Tensor, fused: bool) -> None:
    run = student.fuse() if fused else student
    with torch.inference_mode():
        expected = student(mel).logits
        found = run.to(memory_format=torch.channels_last)(mel.contiguous(memory_format=torch.channels_last)).logits
    assert_about_equal(found, expected, 1e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_half_precision_says_about_the_same(student: Student, mel: torch.Tensor, fused: bool) -> None:
    run = student.fuse() if fused else student
    with torch.inference_mode():
        expected = student(mel)
        with torch.autocast("cpu", torch.bfloat16):
            found = run(mel)
            maps = run.feature_maps(mel)
    assert {one.dtype for one in maps} == {torch.bfloat16}
    similarity = torch.nn.functional.cosine_similarity(found.embedding.float(), expected.embedding)
    assert similarity.min() > 0.8  # random weights carry rounding much further than trained ones


def test_half_precision_trains(student: Student, mel: torch.Tensor) -> None:
    student.train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = student(mel).logits
    logits.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    assert student.classifier[-1].weight.grad.norm() > 0


def test_twice_gives_the_same_bits(student: Student, mel: torch.Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(student(mel).logits, student(mel).logits)
    gradients = []
    for _ in range(2):
        student.zero_grad()
        student(mel).logits.sum().backward()
        gradients.append([p.grad.clone() for p in student.parameters() if p.grad is not None])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
