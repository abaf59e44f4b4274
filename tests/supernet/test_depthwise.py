from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from foxnas_mlflow.supernet._depthwise import depthwise


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7, 9])
@pytest.mark.parametrize("size", [2, 5, 14])
def test_values_and_gradients_are_those_of_a_grouped_convolution(
    size: int, kernel: int, stride: int, layout: torch.memory_format
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 8, size, size + 1, generator=generator, dtype=torch.float64).to(memory_format=layout)
    weight = torch.randn(8, 1, kernel, kernel, generator=generator, dtype=torch.float64)
    for padding in (kernel // 2, kernel // 2 + 1):
        results = []
        for convolve in (depthwise, lambda x, w, stride, padding: F.conv2d(x, w, None, stride, padding, 1, 8)):
            inputs = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
            y = convolve(*inputs, stride=stride, padding=padding)
            results.append((y, *torch.autograd.grad((y * y).sum(), inputs)))
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5, 7])
@pytest.mark.parametrize("size", [4, 7, 12])
def test_autocast_computes_in_bfloat16_and_returns_float_gradients(size: int, kernel: int, stride: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, size, size).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(8, 1, kernel, kernel, requires_grad=True)
    padding = kernel // 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = depthwise(x, weight, stride=stride, padding=padding)
    assert y.dtype == torch.bfloat16
    got = torch.autograd.grad(y.float().sum(), (x, weight))
    expected = torch.autograd.grad(F.conv2d(x, weight, None, stride, padding, 1, 8).sum(), (x, weight))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0.05, atol=0.5)
