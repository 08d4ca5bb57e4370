"""The operations on batch-inner maps against plain PyTorch on the same numbers, gradients included."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from students.layers import batch_inner as operations

SHAPES = [(1, 8, 5, 7), (3, 16, 8, 13), (2, 4, 1, 1), (3, 1, 6, 2), (2, 8, 40, 3)]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a small map has several, the last one shorter."""
    monkeypatch.setattr(operations, "_TILE_BYTES", 1 << 8)


def assert_same(ours: Callable[..., Tensor], plain: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Equal results and gradients, and the same without gradients, for inputs in either order of memory."""
    for layout in (lambda x: x, lambda x: operations.batch_inner(x) if x.ndim == 4 else x):
        results = []
        for function in (ours, plain):
            leaves = [layout(one.clone()).detach().requires_grad_() for one in inputs]
            output = function(*leaves)
            assert operations.batch_inner(output).shape == output.shape
            (output * torch.linspace(-1, 1, output.numel()).view(output.shape)).sum().backward()
            results.append([output.detach(), *(leaf.grad for leaf in leaves)])
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        with torch.no_grad():
            found, expected = (function(*map(layout, inputs)) for function in (ours, plain))
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_pointwise(shape: tuple[int, ...], has_bias: bool) -> None:
    kernel, bias = torch.randn(shape[0], 6, shape[1]), torch.randn(6)
    assert_same(
        lambda x, kernel, bias: (
            operations.pointwise(x, kernel, bias if has_bias else None) + (0 if has_bias else 0 * bias.sum())
        ),
        lambda x, kernel, bias: torch.einsum("boi,bift->boft", kernel, x) + bias[:, None, None] * has_bias,
        torch.randn(shape),
        kernel,
        bias,
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", [3, 5, 7])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(shape: tuple[int, ...], size: int, stride: int) -> None:
    def clip_by_clip(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        rows = [
            functional.conv2d(one[None], own[:, None], bias, stride, size // 2, groups=len(own))
            for one, own in zip(x, kernel, strict=True)
        ]
        return torch.cat(rows)

    kernel, bias = torch.randn(*shape[:2], size, size), torch.randn(shape[1])
    assert_same(lambda *a: operations.depthwise(*a, stride), clip_by_clip, torch.randn(shape), kernel, bias)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("maps", [1, 2, 3])
def test_max_of_linear_maps(shape: tuple[int, ...], maps: int) -> None:
    slopes, intercepts = torch.randn(maps, *shape[:2]), torch.randn(maps, *shape[:2])
    assert_same(
        operations.max_of_linear_maps,
        lambda x, a, b: (x * a[..., None, None] + b[..., None, None]).amax(0),
        torch.randn(shape),
        slopes,
        intercepts,
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_recalibrate(shape: tuple[int, ...]) -> None:
    frequency, time = torch.randn(*shape[:3], 1), torch.randn(*shape[:2], 1, shape[3])
    assert_same(operations.recalibrate, lambda x, f, t: x * f * t, torch.randn(shape), frequency, time)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[4]])
def test_normalize(shape: tuple[int, ...]) -> None:
    norms = [nn.BatchNorm2d(shape[1]), nn.BatchNorm2d(shape[1])]
    assert_same(
        lambda x: operations.normalize(x, norms[0], nn.ReLU(inplace=True)),
        lambda x: functional.relu(norms[1](x)),
        torch.randn(shape),
    )
    for found, expected in zip(*(norm.buffers() for norm in norms), strict=True):
        torch.testing.assert_close(found, expected)


def test_maps_stay_batch_inner_without_a_copy() -> None:
    x = operations.batch_inner(torch.randn(3, 16, 8, 13))
    kernel = torch.randn(3, 16, 3, 3)
    maps = [
        operations.pointwise(x, torch.randn(3, 6, 16), None),
        operations.depthwise(x, kernel, None, 2),
        operations.max_of_linear_maps(x, *torch.randn(2, 2, 3, 16)),
        operations.recalibrate(x, torch.rand(3, 16, 8, 1), torch.rand(3, 16, 1, 13)),
        operations.normalize(x, nn.BatchNorm2d(16), nn.ReLU(inplace=True)),
    ]
    for one in maps:
        assert one.permute(2, 3, 0, 1).is_contiguous()
    assert operations.batch_inner(x).data_ptr() == x.data_ptr()
