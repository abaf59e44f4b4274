"""Depthwise convolution with fast gradients on processors.

oneDNN has a fast kernel for that gradient only where the kernel is at most 3 wide and not higher
than the image; for 5x5 and 7x7 it takes 10 to 40 times the time of 3x3, and half of a training
step. But the gradient of a wide kernel falls into strips 3 wide that each are the gradient of a
k x 3 kernel over shifted columns:

    dW[c, i, j] = sum over n, y, x of dY[n, c, y, x] X[n, c, s y + i - p, s x + j - p]

needs, for the taps j0 to j0 + 2, only a window of X's columns.

Where a kernel is wider than the image, as in the last stages of small images, the gradient of the
input is slow too. There the convolution is, in each channel, a small dense matrix from the pixels
of X to those of Y, and both gradients are products with it.

In bfloat16, oneDNN's gradient of the input is slow in another way: with stride 2 it takes 10 to 60
times the time of float32. It is computed in float32, copies included.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

_STRIP = 3
"""Widest kernel with a fast gradient."""

_DENSE_ENTRIES = 1024
"""Largest matrix, pixels of the output times pixels of the input, for which products beat the strips."""


def depthwise(x: Tensor, weight: Tensor, *, stride: int, padding: int) -> Tensor:
    """Depthwise convolution of (n, c, h, w) with (c, 1, k, k), without bias.

    The same values and gradients as ``torch.nn.functional.conv2d`` with c groups, up to rounding.
    """
    if not x.is_cpu:
        return _convolution(x, weight, stride, padding)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if weight.shape[-1] <= _STRIP and (stride == 1 or x.dtype != torch.bfloat16):
        return _convolution(x, weight, stride, padding)
    y: Tensor = _Depthwise.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return _convolution(x, weight, stride, padding)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        if x.shape[-2:].numel() * gradient.shape[-2:].numel() <= _DENSE_ENTRIES:
            return *_dense_gradients(gradient, x, weight, ctx.stride, ctx.padding), None, None
        dx = _input_gradient(gradient, x, weight, ctx.stride, ctx.padding) if need_x else None
        dw = _weight_gradient(gradient, x, weight.shape[-1], ctx.stride, ctx.padding) if need_weight else None
        return dx, dw, None, None


def _convolution(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    return F.conv2d(x, weight, None, stride, padding, 1, weight.shape[0])


def _dense_gradients(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weights, by products in each channel."""
    n, c, height, width = x.shape
    # Matrices this small are slower in bfloat16. Copies that transpose and convert at once are slow too.
    dtype = torch.float32 if x.dtype == torch.bfloat16 else x.dtype
    taps = _taps(x.shape[-2:], gradient.shape[-2:], weight.shape[-1], stride, padding).to(dtype)
    outputs = gradient.flatten(2).permute(1, 2, 0).contiguous().to(dtype)  # c, pixels of the output, n
    inputs = x.flatten(2).permute(1, 2, 0).contiguous().to(dtype)  # c, pixels of the input, n
    matrices = (weight.to(dtype).flatten(1) @ taps.t()).view(c, outputs.shape[1], inputs.shape[1])
    dx = torch.bmm(matrices.transpose(1, 2), outputs).to(x.dtype).permute(2, 1, 0).contiguous()
    dw = torch.bmm(outputs, inputs.transpose(1, 2)).flatten(1) @ taps
    return dx.view(n, height, width, c).permute(0, 3, 1, 2), dw.view_as(weight).to(weight.dtype)


@functools.lru_cache(maxsize=64)
def _taps(source: torch.Size, target: torch.Size, k: int, stride: int, padding: int) -> Tensor:
    """1 where tap (i, j) leads from a pixel of the input to one of the output: (outputs * inputs, k * k)."""
    taps = torch.zeros(*target, *source, k, k)
    for y in range(target[0]):
        for x in range(target[1]):
            for i in range(k):
                for j in range(k):
                    row, column = stride * y + i - padding, stride * x + j - padding
                    if 0 <= row < source[0] and 0 <= column < source[1]:
                        taps[y, x, row, column, i, j] = 1
    return taps.view(-1, k * k)


def _input_gradient(gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    # Of X only the shape counts.
    template = torch.empty_like(x, dtype=torch.float32) if x.dtype == torch.bfloat16 else x
    gradient, weight = gradient.to(template.dtype), weight.to(template.dtype)
    return _backward(gradient, template, weight, stride, (padding, padding), (True, False))[0].to(x.dtype)


def _weight_gradient(gradient: Tensor, x: Tensor, k: int, stride: int, padding: int) -> Tensor:
    if k <= _STRIP:
        template = x.new_empty(x.shape[1], 1, k, k)
        return _backward(gradient, x, template, stride, (padding, padding), (False, True))[1]
    height, width = x.shape[-2:]
    bottom, reach = (stride * (n - 1) for n in gradient.shape[-2:])
    # The fast kernel wants an image as high as the kernel, and no padding beside a stride.
    bordered = height < k or stride > 1
    rows = (padding, bottom + k - height - padding) if bordered else (0, 0)
    template = x.new_empty(x.shape[1], 1, k, _STRIP)
    strips = []
    for first in range(0, k - 2, 2):
        left = padding - first
        right = reach + _STRIP - left - width
        if left == right == 1 and not bordered:
            window, inside = x, (padding, 1)
        else:
            window, inside = _window(x, rows, (left, right)), (0 if bordered else padding, 0)
        strip = _backward(gradient, window, template, stride, inside, (False, True))[1]
        strips.append(strip if first == k - _STRIP else strip[..., : _STRIP - 1])
    return torch.cat(strips, 3)


def _window(x: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """Add zeros before and after rows and columns; negative numbers cut off."""
    (top, bottom), (left, right) = rows, columns
    n, c, h, w = x.shape
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    window = torch.empty(
        (n, c, h + top + bottom, w + left + right),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    # The borders alone: to write everything twice would take as long as the copy.
    for border in (
        window[:, :, : max(top, 0)],
        window[:, :, window.shape[2] - max(bottom, 0) :],
        window[..., : max(left, 0)],
        window[..., window.shape[3] - max(right, 0) :],
    ):
        border.zero_()
    kept = window[..., max(top, 0) : h + top + min(bottom, 0), max(left, 0) : w + left + min(right, 0)]
    kept.copy_(x[..., max(-top, 0) : h + min(bottom, 0), max(-left, 0) : w + min(right, 0)])
    return window


def _backward(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: int, padding: tuple[int, int], wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    dx, dw, _ = torch.ops.aten.convolution_backward(
        gradient, x, weight, None, [stride] * 2, padding, [1, 1], False, [0, 0], weight.shape[0], [*wanted, False]
    )
    return dx, dw
