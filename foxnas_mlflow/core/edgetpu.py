"""What a network costs a Coral Edge TPU: the amounts that its latency cost model prices.

| term            | counts                                                                     |
|-----------------|----------------------------------------------------------------------------|
| `array`         | ms of a weight-stationary 64 x 64 systolic array at 480 MHz, dense layers  |
| `depthwise`     | millions of multiply-accumulates of depthwise convolutions, which fill one |
|                 | column of the array at a time: their price is fitted                       |
| `depthwise_out` | millions of elements that depthwise convolutions write: most of their time |
|                 | is moving them, whatever the kernel                                        |
| `link`          | megabytes (10^6) over the link: image, class scores, weights that do not   |
|                 | fit on chip                                                                |

A dense layer multiplies M output pixels by a K x N matrix (K = kernel^2 * in_channels,
N = out_channels) in tiles of 64 x 64. A tile takes ``M + 2 * 64 + 64 - 2`` cycles: 64 to load its
weights, M to stream the pixels, and the skew of the array to fill and drain. Size and clock are a
community's estimate (docs/METHOD.md); 64 * 64 * 480 MHz is 3.93 of the 4 advertised TOPS.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.cost import layer_cost
from foxnas_mlflow.core.network import Layer

FloatArray = NDArray[np.float64]

EDGETPU_TERMS: tuple[str, ...] = ("array", "depthwise", "depthwise_out", "link")
"""Names of the cost terms, in the order of `edgetpu_terms`."""

COMPILED_OPERATOR = "edgetpu-custom-op"
"""The operator of a compiled file that stands for everything that the Edge TPU runs."""

CHIP_BYTES = 8 * 2**20
"""On-chip memory; weights that exceed it are sent over the link in every inference for sure."""

CACHE_BYTES = int(6.9 * 2**20)
"""What of it is left for weights: the compiler keeps a part for activations, 0.8 to 1.7 MiB by its logs of networks
that do not fit."""

_ARRAY = 64
_CYCLES_PER_MS = 480_000


def array_ms(pixels: int, depth: int, channels: int) -> float:
    """Milliseconds of a dense layer on the array.

    Args:
        pixels: Output pixels, M.
        depth: Products summed into one output, K.
        channels: Output channels, N.
    """
    tiles = -(-depth // _ARRAY) * -(-channels // _ARRAY)
    return (tiles * (pixels + 3 * _ARRAY - 2) - 1) / _CYCLES_PER_MS


def edgetpu_terms(layers: Iterable[Layer]) -> FloatArray:
    """Sum the terms over layers; `link` holds all int8 weights in MB, on chip or not.

    Which weights travel is decided by their sum over the network (`core.predictors`, formula ``edgetpu-outputs``).
    """
    total = np.zeros(len(EDGETPU_TERMS))
    for layer in layers:
        cost = layer_cost(layer)
        if layer.op == "depthwise":
            total[1] += cost.macs / 1e6
            total[2] += cost.out_elements / 1e6
        elif layer.op in ("conv", "linear"):
            total[0] += array_ms(layer.out_size**2, layer.kernel**2 * layer.in_channels, layer.out_channels)
        elif layer.op == "se":
            total[0] += array_ms(1, layer.in_channels, layer.squeeze) + array_ms(1, layer.squeeze, layer.in_channels)
        total[3] += cost.int8_bytes / 1e6
    return total
