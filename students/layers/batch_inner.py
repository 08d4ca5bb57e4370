"""Operations whose coefficients differ from clip to clip, and a memory layout that makes them fast.

In eager float32 on the CPU a map (B, C, F, T) is kept "batch inner": its memory order is (F, T, B, C), with C innermost. A
depthwise convolution whose kernels differ from clip to clip is then one channels-last convolution with B * C groups. Coefficients
per clip and channel are a contiguous row of numbers. A 1×1 convolution is one batched matrix product. None of these needs a
copy. Operations limited by memory bandwidth process the map in tiles that fit into the cache, without intermediate maps, so their gradients
are written by hand. In all other cases (GPU, half precision, torch.compile, export) each function here is plain PyTorch on maps
in the usual memory order (B, C, F, T). The results are the same.

Shapes: B batch, C channels, F frequency positions, T time positions, M linear maps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

_TILE_BYTES = 1 << 20
"""Small enough for several tiles to fit into a core's cache. Smaller tiles would add call overhead."""


def prefers_batch_inner(x: Tensor) -> bool:
    """Whether maps are kept batch inner: in eager mode, in float32 on the CPU."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()
        and not torch.is_autocast_enabled("cpu")
    )


def batch_inner(x: Tensor) -> Tensor:
    """(B, C, F, T) -> the same values in memory order F, T, B, C. Does not copy if they are in that order already."""
    return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)


def _rows(x: Tensor) -> Tensor:
    """(B, C, F, T) batch inner -> (F, T, B * C), contiguous"""
    return batch_inner(x).permute(2, 3, 0, 1).flatten(2)


def _from_rows(rows: Tensor, batch: int) -> Tensor:
    """(F, T, B * C) -> (B, C, F, T)"""
    return rows.unflatten(2, (batch, -1)).permute(2, 3, 0, 1)


def _tiles(rows: Tensor) -> Iterator[slice]:
    """Slices of the first axis with about ``_TILE_BYTES`` each."""
    step = max(1, _TILE_BYTES // max(1, rows[0].numel() * rows.element_size()))
    return (slice(start, start + step) for start in range(0, len(rows), step))


# --- 1×1 convolution ---------------------------------------------------------------------------------------------------


def pointwise(x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
    """1×1 convolution: x (B, I, F, T), kernel (B, O, I), bias (O,) -> (B, O, F, T)."""
    if prefers_batch_inner(x):
        x = batch_inner(x)
        if not torch.is_grad_enabled():
            return _product(x, kernel, bias)
        out = _Pointwise.apply(x, kernel)
        return out if bias is None else out + bias[:, None, None]
    if bias is None:
        out = torch.bmm(kernel, x.flatten(2))
    else:
        out = torch.baddbmm(bias.to(x.dtype)[:, None], kernel.to(x.dtype), x.flatten(2))
    return out.unflatten(2, x.shape[2:])


def _product(x: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
    batch, _, frequencies, times = x.shape
    out = x.new_empty(frequencies, times, batch, kernel.shape[1])
    rows, product = x.flatten(2).transpose(1, 2), out.flatten(0, 1).transpose(0, 1)  # (B, F * T, I), (B, F * T, O)
    kernel = kernel.transpose(1, 2)
    if bias is None:
        torch.bmm(rows, kernel, out=product)
    elif out.numel() * out.element_size() < 8 * _TILE_BYTES:
        torch.baddbmm(bias, rows, kernel, out=product)
    else:  # baddbmm writes the bias to the whole output first; in tiles, the output is still cached when the product is added
        for tile in _tiles(out.flatten(0, 1)):
            torch.baddbmm(bias, rows[:, tile], kernel, out=product[:, tile])
    return out.permute(2, 3, 0, 1)


class _Pointwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor) -> Tensor:
        ctx.save_for_backward(x, kernel)
        return _product(x, kernel)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel = ctx.saved_tensors
        grad = batch_inner(grad)
        grad_x = _product(grad, kernel.transpose(1, 2)) if ctx.needs_input_grad[0] else None
        grad_kernel = torch.bmm(grad.flatten(2), x.flatten(2).transpose(1, 2)) if ctx.needs_input_grad[1] else None
        return grad_x, grad_kernel


# --- Depthwise convolution ---------------------------------------------------------------------------------------------


def depthwise(x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Depthwise convolution: x (B, C, F, T), kernel (B, C, k, k), bias (C,) -> (B, C, ceil(F / stride), ceil(T / stride)).

    Computed as one convolution with a group for each channel of each clip.
    """
    batch, channels, frequencies, times = x.shape
    merged_kernel = kernel.reshape(batch * channels, 1, *kernel.shape[2:])
    merged_bias = None if bias is None else bias.repeat(batch).to(x.dtype)
    if prefers_batch_inner(x):
        out = _Depthwise.apply(_rows(x)[None].permute(0, 3, 1, 2), merged_kernel, merged_bias, stride)
    else:
        merged = x.reshape(1, batch * channels, frequencies, times)
        padding = kernel.shape[-1] // 2
        out = functional.conv2d(merged, merged_kernel, merged_bias, stride, padding, groups=batch * channels)
    return out.unflatten(1, (batch, channels))[0]


class _Depthwise(torch.autograd.Function):
    """x (1, G, F, T) channels last, kernel (G, 1, k, k), bias (G,) -> (1, G, F', T') channels last."""

    @staticmethod
    def forward(ctx, x: Tensor, kernel: Tensor, bias: Tensor | None, stride: int) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.stride = stride
        return functional.conv2d(x, kernel, bias, stride, kernel.shape[-1] // 2, groups=len(kernel))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, kernel = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        grad_x = grad_kernel = grad_bias = None
        if ctx.needs_input_grad[0]:
            padding = kernel.shape[-1] // 2
            grad_x = _convolution_backward(grad, x, kernel, ctx.stride, padding, (True, False, False))[0]
        if ctx.needs_input_grad[1]:
            grad_kernel = _depthwise_kernel_gradient(grad, x, kernel, ctx.stride)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum((0, 2, 3))
        return grad_x, grad_kernel, grad_bias, None


def _depthwise_kernel_gradient(grad: Tensor, x: Tensor, kernel: Tensor, stride: int) -> Tensor:
    """Computes the gradient of 5×5 kernels from four overlapping 3×3 windows, for which the library is 4 to 20 times faster."""
    size = kernel.shape[-1]
    if size <= 3:
        return _convolution_backward(grad, x, kernel, stride, size // 2, (False, True, False))[1]
    padded = functional.pad(x, (size // 2,) * 4)
    rows, columns = (stride * (length - 1) + 3 for length in grad.shape[2:])
    result, window = torch.empty_like(kernel), kernel[:, :, :3, :3].contiguous()
    starts = range(0, size - 2, 2)
    for top in starts:
        for left in starts:
            part = padded[:, :, top : top + rows, left : left + columns].contiguous(memory_format=torch.channels_last)
            result[:, :, top : top + 3, left : left + 3] = _convolution_backward(
                grad, part, window, stride, 0, (False, True, False)
            )[1]
    return result


def _convolution_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, stride: int, padding: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten.convolution_backward(
        grad, x, kernel, None, [stride] * 2, [padding] * 2, [1, 1], False, [0, 0], len(kernel), wanted
    )


# --- Batch norm --------------------------------------------------------------------------------------------------------


def normalize(x: Tensor, norm: nn.Module, activation: nn.Module | None) -> Tensor:
    """Batch norm and an optional in-place activation: (B, C, F, T) -> (B, C, F, T)."""
    if prefers_batch_inner(x):
        # Batch norm treats clips and positions alike, so we pass one channels-last map (1, C, F * T, B): it has a fast kernel.
        batch, channels, frequencies, times = x.shape
        map_of_all = _rows(x).view(1, frequencies * times, batch, channels).permute(0, 3, 1, 2)
    else:
        map_of_all = x
    out = norm(map_of_all)
    if activation is not None:
        out = activation(out)
    if map_of_all is x:
        return out
    return _from_rows(out.permute(0, 2, 3, 1).reshape(frequencies, times, batch * channels), batch)


# --- Maximum of linear maps --------------------------------------------------------------------------------------------


def max_of_linear_maps(x: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
    """Maximum over m of x * slopes[m] + intercepts[m]: x (B, C, F, T), slopes and intercepts (M, B, C) -> (B, C, F, T)."""
    if prefers_batch_inner(x) and len(slopes) == 2:
        rows = _rows(x)
        out = _MaxOfTwo.apply(rows, slopes.flatten(1), intercepts.flatten(1))
        return _from_rows(out, len(x))
    slopes, intercepts = slopes[..., None, None], intercepts[..., None, None]
    out = torch.addcmul(intercepts[0], x, slopes[0])
    for slope, intercept in zip(slopes[1:], intercepts[1:], strict=True):
        out = torch.maximum(out, torch.addcmul(intercept, x, slope))
    return out


class _MaxOfTwo(torch.autograd.Function):
    """rows (F, T, N), slopes and intercepts (2, N) -> (F, T, N). Saves only its inputs for the gradient."""

    @staticmethod
    def forward(ctx, rows: Tensor, slopes: Tensor, intercepts: Tensor) -> Tensor:
        ctx.save_for_backward(rows, slopes, intercepts)
        out = torch.empty_like(rows)
        for tile in _tiles(rows):
            one, other = out[tile], torch.addcmul(intercepts[1], rows[tile], slopes[1])
            torch.addcmul(intercepts[0], rows[tile], slopes[0], out=one)
            torch.maximum(one, other, out=one)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, slopes, intercepts = ctx.saved_tensors
        grad = grad.contiguous()
        slope, intercept = slopes[0] - slopes[1], intercepts[0] - intercepts[1]
        grad_rows = torch.empty_like(rows)
        sums = rows.new_zeros(4, rows.shape[2])
        for tile in _tiles(rows):
            x, g, taken = rows[tile], grad[tile], grad_rows[tile]
            # The first map gets the gradient where it is the larger one; the second gets the rest.
            torch.addcmul(intercept, x, slope, out=taken).ge_(0.0).mul_(g)
            sums[0] += taken.sum((0, 1))
            sums[1] += g.sum((0, 1))
            product = taken * x
            sums[2] += product.sum((0, 1))
            sums[3] += torch.mul(g, x, out=product).sum((0, 1))
            taken.mul_(slope).addcmul_(g, slopes[1])
        grad_intercepts = torch.stack((sums[0], sums[1] - sums[0]))
        grad_slopes = torch.stack((sums[2], sums[3] - sums[2]))
        return grad_rows, grad_slopes, grad_intercepts


# --- Recalibration -----------------------------------------------------------------------------------------------------


def recalibrate(x: Tensor, frequency: Tensor, time: Tensor) -> Tensor:
    """x * frequency * time: x (B, C, F, T), frequency (B, C, F, 1), time (B, C, 1, T) -> (B, C, F, T)."""
    if not prefers_batch_inner(x):
        return x * frequency * time
    return _from_rows(_Recalibrate.apply(_rows(x), _rows(frequency), _rows(time)), len(x))


class _Recalibrate(torch.autograd.Function):
    """rows (F, T, N), frequency (F, 1, N), time (1, T, N) -> (F, T, N)"""

    @staticmethod
    def forward(ctx, rows: Tensor, frequency: Tensor, time: Tensor) -> Tensor:
        ctx.save_for_backward(rows, frequency, time)
        out = torch.empty_like(rows)
        for tile in _tiles(rows):
            torch.mul(rows[tile], frequency[tile], out=out[tile]).mul_(time)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows, frequency, time = ctx.saved_tensors
        grad = grad.contiguous()
        grad_rows, grad_frequency = torch.empty_like(rows), torch.empty_like(frequency)
        grad_time = torch.zeros_like(time)
        for tile in _tiles(rows):
            product = grad[tile] * rows[tile]
            weighted = product * frequency[tile]
            grad_time += weighted.sum(0, keepdim=True)
            torch.sum(torch.mul(product, time, out=weighted), 1, keepdim=True, out=grad_frequency[tile])
            torch.mul(grad[tile], frequency[tile], out=grad_rows[tile]).mul_(time)
        return grad_rows, grad_frequency, grad_time
