"""Depthwise convolution with a fast gradient of its weights on processors.

oneDNN has a fast kernel for that gradient only where the kernel is at most 3 wide and not higher
than the image; for 5x5 and 7x7 it takes 10 to 40 times the time of 3x3, and half of a training
step. But the gradient of a wide kernel falls into strips 3 wide that each are the gradient of a
k x 3 kernel over shifted columns:

    dW[c, i, j] = sum over n, y, x of dY[n, c, y, x] X[n, c, s y + i - p, s x + j - p]

needs, for the taps j0 to j0 + 2, only a window of X's columns. Forward and the gradient of the
input are PyTorch's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import Tensor

_STRIP = 3
"""Widest kernel with a fast gradient."""


def depthwise(x: Tensor, weight: Tensor, *, stride: int, padding: int) -> Tensor:
    """Depthwise convolution of (n, c, h, w) with (c, 1, k, k), without bias.

    The same values and gradients as ``torch.nn.functional.conv2d`` with c groups, up to rounding.
    """
    if x.is_cuda or weight.shape[-1] <= _STRIP:
        return F.conv2d(x, weight, None, stride, padding, 1, weight.shape[0])
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    y: Tensor = _Depthwise.apply(x, weight, stride, padding)  # type: ignore[no-untyped-call]
    return y


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride, ctx.padding = stride, padding
        return F.conv2d(x, weight, None, stride, padding, 1, weight.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        padding = (ctx.padding, ctx.padding)
        dx = _backward(gradient, x, weight, ctx.stride, padding, (True, False))[0] if need_x else None
        dw = _weight_gradient(gradient, x, weight.shape[-1], ctx.stride, ctx.padding) if need_weight else None
        return dx, dw, None, None


def _weight_gradient(gradient: Tensor, x: Tensor, k: int, stride: int, padding: int) -> Tensor:
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
    ).zero_()
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
