"""Cost terms against brute-force counting."""

from __future__ import annotations

import numpy as np
import pytest

from foxnas_mlflow.core.cost import COST_TERMS, cost_terms, layer_cost, layer_terms, network_cost
from foxnas_mlflow.core.network import Layer, build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 1), (8, 7, 2), (9, 5, 2), (2, 7, 1)])
def test_depthwise_terms_count_only_taps_on_the_image(size: int, kernel: int, stride: int) -> None:
    out = -(-size // stride)
    padding = max((out - 1) * stride + kernel - size, 0) // 2
    taps = 0
    for y in range(out):
        for x in range(out):
            for i in range(kernel):
                for j in range(kernel):
                    row, column = y * stride - padding + i, x * stride - padding + j
                    taps += 0 <= row < size and 0 <= column < size
    layer = Layer("d.depthwise", "depthwise", size, out, 24, 24, kernel=kernel, stride=stride)
    terms = dict(zip(COST_TERMS, layer_terms(layer), strict=True))
    assert terms["dw"] == taps * 32  # 24 channels take two vectors of 16
    assert terms["dw_in"] == size**2 * 24
    assert terms["act"] == out**2 * 24


def test_closed_form_of_one_convolution() -> None:
    cost = layer_cost(Layer("c", "conv", 10, 5, 8, 16, kernel=3, stride=2), held=7)
    assert cost.macs == 25 * 9 * 8 * 16
    assert cost.params == 9 * 8 * 16 + 16
    assert cost.int8_bytes == 9 * 8 * 16 + 4 * 16
    assert cost.peak_elements == 100 * 8 + 25 * 16 + 7


def test_sums_are_the_sums_of_layers(rng: np.random.Generator) -> None:
    for space in (CPU_SPACE, TPU_SPACE):
        for size in space.image_sizes:
            network = build_network(space, space.sample(rng, image_size=size))
            cost = network_cost(network)
            assert cost.macs == sum(layer.macs for layer in cost.layers)
            assert cost.params == sum(layer.params for layer in cost.layers)
            np.testing.assert_allclose(list(cost.terms.values()), cost_terms(network.layers))


def test_mobilenet_sized_networks_have_known_sizes() -> None:
    # design: 2.4M to 4.7M parameters at depth 3 for e = 4..8, the tail's expansion left open.
    params = [
        network_cost(build_network(TPU_SPACE, TPU_SPACE.uniform(192, depth=3, expansion=e, kernel=3))).params / 1e6
        for e in (4, 6, 8)
    ]
    np.testing.assert_allclose(params, [2.4, 3.5, 4.7], atol=0.2)
