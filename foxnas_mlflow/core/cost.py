"""What a network costs: operations, elements, parameters and memory, per layer and summed.

Everything here is counted from the layers of `foxnas_mlflow.core.network`; nothing is measured.
The sums named by `COST_TERMS` are the regressors of the calibrated latency predictor
(docs/METHOD.md): one coefficient each, readable as milliseconds per million.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.network import Layer, Network, Unit, same_padding

FloatArray = NDArray[np.float64]

COST_TERMS: tuple[str, ...] = ("pw", "dw", "dw_in", "act", "se", "se_fc", "res")
"""Names of the cost terms, in the order of `layer_terms`.

| term    | counts                                                                           |
|---------|----------------------------------------------------------------------------------|
| `pw`    | multiply-accumulates of dense convolutions and of the classifier                 |
| `dw`    | multiply-accumulates of depthwise convolutions, taps on padding left out (the    |
|         | kernels skip them), channels rounded up to the 16 lanes of an int8 vector        |
| `dw_in` | elements read by depthwise convolutions                                          |
| `act`   | elements written by convolutions and depthwise convolutions                      |
| `se`    | elements gated by squeeze-excite                                                 |
| `se_fc` | multiply-accumulates of the two layers inside squeeze-excite gates               |
| `res`   | elements of residual adds                                                        |
"""

LAUNCH_TERMS: tuple[str, ...] = ("layers", "gates")
"""Names of the terms of what is started, whatever its size: convolutions, classifiers and residual adds; and
squeeze-excite gates, which are several small layers."""

FAST_TAPS = 25
"""Most taps of a depthwise kernel that XNNPACK, which today's LiteRT runs on, has a kernel for."""

_INT8_LANES = 16


@dataclass(frozen=True, slots=True)
class LayerCost:
    """The cost of one layer at batch 1.

    Attributes:
        name: Name of the layer.
        op: Its kind.
        macs: Multiply-accumulates.
        params: Weights and biases, batch norm folded.
        in_elements, out_elements: Elements of the main input and of the output.
        int8_bytes: Bytes of int8 weights and int32 biases.
        peak_elements: Elements alive while the layer runs: input, output and a held residual.
    """

    name: str
    op: str
    macs: int
    params: int
    in_elements: int
    out_elements: int
    int8_bytes: int
    peak_elements: int


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """The cost of a network at batch 1.

    Attributes:
        layers: The cost of each layer in order.
        macs: Multiply-accumulates.
        params: Weights and biases, batch norm folded.
        int8_size_bytes: Bytes of all int8 weights and int32 biases: the parameters of the int8
            file, without its graph and quantization tables.
        peak_activation_bytes: Largest sum of int8 activations alive at once.
        terms: The sums named by `COST_TERMS`.

    Examples:
        >>> from foxnas_mlflow import build_network, get_space, network_cost
        >>> space = get_space("cpu")
        >>> small, large = (network_cost(build_network(space, a)) for a in (space.smallest(192), space.largest(192)))
        >>> small.int8_size_bytes < large.int8_size_bytes
        True
    """

    layers: tuple[LayerCost, ...]
    macs: int
    params: int
    int8_size_bytes: int
    peak_activation_bytes: int
    terms: dict[str, float]


def network_cost(network: Network) -> NetworkCost:
    """Count a network, layer by layer and summed.

    Examples:
        >>> from foxnas_mlflow import build_network, get_space, network_cost
        >>> space = get_space("cpu")
        >>> cost = network_cost(build_network(space, space.smallest(192)))
        >>> cost.macs == sum(layer.macs for layer in cost.layers)
        True
    """
    layers = tuple(
        layer_cost(layer, held=_held_elements(unit, layer)) for unit in network.units for layer in unit.layers
    )
    terms = cost_terms(network.layers)
    return NetworkCost(
        layers=layers,
        macs=sum(layer.macs for layer in layers),
        params=sum(layer.params for layer in layers),
        int8_size_bytes=sum(layer.int8_bytes for layer in layers),
        peak_activation_bytes=max(layer.peak_elements for layer in layers),
        terms={name: float(value) for name, value in zip(COST_TERMS, terms, strict=True)},
    )


def layer_cost(layer: Layer, *, held: int = 0) -> LayerCost:
    """Count one layer; `held` is the number of elements kept alive for a later residual add."""
    weights, biases = _parameters(layer)
    in_elements = layer.in_size**2 * layer.in_channels
    out_elements = layer.out_size**2 * layer.out_channels
    return LayerCost(
        name=layer.name,
        op=layer.op,
        macs=_macs(layer),
        params=weights + biases,
        in_elements=in_elements,
        out_elements=out_elements,
        int8_bytes=weights + 4 * biases,
        peak_elements=in_elements + out_elements + held,
    )


def layer_terms(layer: Layer) -> tuple[float, ...]:
    """One layer's contribution to each of `COST_TERMS`."""
    macs = float(_macs(layer))
    in_elements = float(layer.in_size**2 * layer.in_channels)
    out_elements = float(layer.out_size**2 * layer.out_channels)
    terms = dict.fromkeys(COST_TERMS, 0.0)
    if layer.op in ("conv", "linear"):
        terms["pw"], terms["act"] = macs, out_elements
    elif layer.op == "depthwise":
        lanes = -(-layer.out_channels // _INT8_LANES) * _INT8_LANES
        terms["dw"] = float(_taps(layer) ** 2 * lanes)
        terms["dw_in"], terms["act"] = in_elements, out_elements
    elif layer.op == "se":
        terms["se"], terms["se_fc"] = out_elements, macs
    elif layer.op == "add":
        terms["res"] = out_elements
    return tuple(terms.values())


def cost_terms(layers: Iterable[Layer]) -> FloatArray:
    """Sum `layer_terms` over layers: an array of shape (len(COST_TERMS),)."""
    rows = [layer_terms(layer) for layer in layers]
    total: FloatArray = np.asarray(rows, dtype=np.float64).reshape(-1, len(COST_TERMS)).sum(axis=0)
    return total


def launch_terms(layers: Iterable[Layer]) -> FloatArray:
    """Numbers of layers and of gates: an array of shape (len(LAUNCH_TERMS),)."""
    ops = [layer.op for layer in layers]
    return np.array(
        [sum(op in ("conv", "depthwise", "linear", "add") for op in ops), ops.count("se")], dtype=np.float64
    )


def wide_depthwise_macs(layers: Iterable[Layer]) -> float:
    """Multiply-accumulates of depthwise kernels of more than `FAST_TAPS` taps.

    Taps on padding count and channels are not rounded: what runs them is no vector kernel.
    """
    return float(sum(_macs(layer) for layer in layers if layer.op == "depthwise" and layer.kernel**2 > FAST_TAPS))


def _macs(layer: Layer) -> int:
    pixels = layer.out_size**2
    if layer.op == "conv":
        return pixels * layer.kernel**2 * layer.in_channels * layer.out_channels
    if layer.op == "depthwise":
        return pixels * layer.kernel**2 * layer.out_channels
    if layer.op == "linear":
        return layer.in_channels * layer.out_channels
    if layer.op == "se":
        return 2 * layer.in_channels * layer.squeeze
    return 0


def _taps(layer: Layer) -> int:
    """Kernel taps along one dimension that fall on the image, summed over the output positions."""
    before, _ = same_padding(layer.in_size, layer.kernel, layer.stride)
    starts = [i * layer.stride - before for i in range(layer.out_size)]
    return sum(min(start + layer.kernel, layer.in_size) - max(start, 0) for start in starts)


def _parameters(layer: Layer) -> tuple[int, int]:
    if layer.op == "conv":
        return layer.kernel**2 * layer.in_channels * layer.out_channels, layer.out_channels
    if layer.op == "depthwise":
        return layer.kernel**2 * layer.out_channels, layer.out_channels
    if layer.op == "linear":
        return layer.in_channels * layer.out_channels, layer.out_channels
    if layer.op == "se":
        return 2 * layer.in_channels * layer.squeeze, layer.squeeze + layer.in_channels
    return 0, 0


def _held_elements(unit: Unit, layer: Layer) -> int:
    """Elements of the unit's input kept for its residual add while later layers run.

    The input is itself the first layer's input and, at the add, one of its two inputs beside
    the branch that `in_elements` counts.
    """
    if not unit.residual or layer is unit.layers[0]:
        return 0
    return unit.in_size**2 * unit.in_channels
