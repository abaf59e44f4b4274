"""The grids that an int8 file rounds to, and other integers in the place of its weights."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.network import Network
from foxnas_mlflow.tflite._checks import body_operators
from foxnas_mlflow.tflite._graph import INPUT, lower
from foxnas_mlflow.tflite._model import TfliteFile, _schema, pack


class Integers(Protocol):
    """Parameters of one operator.

    Attributes:
        kernel: int8 weights in PyTorch's layout.
        scale: Of the weights: one an output channel, or one.
        bias: int32 (out,), in units of the input's scale times the weights'.
    """

    @property
    def kernel(self) -> NDArray[np.int8]: ...

    @property
    def scale(self) -> NDArray[np.float32]: ...

    @property
    def bias(self) -> NDArray[np.int32]: ...


def grids_of(model: TfliteFile, network: Network) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the image and of every operator's output, by the operators' names."""
    operators, entries = lower(network), body_operators(model)
    tensors = {INPUT: model.tensors[entries[0].inputs[0]]}
    tensors |= {
        operator.name: model.tensors[entry.outputs[0]] for operator, entry in zip(operators, entries, strict=True)
    }
    return {name: (tensor.scale[0], tensor.zero_point[0]) for name, tensor in tensors.items()}


def one_scale_of(model: TfliteFile, network: Network) -> list[str]:
    """Names of the operators with several output channels whose weights have one scale."""
    pairs = zip(lower(network), body_operators(model), strict=True)
    return [
        operator.name
        for operator, entry in pairs
        if operator.weight and len(model.tensors[entry.inputs[1]].scale) == 1 < operator.out_channels
    ]


def with_integers(model: TfliteFile, network: Network, integers: Mapping[str, Integers]) -> bytes:
    """The same file with other weights and biases; the grids of its activations stay.

    Args:
        model: The file.
        network: The network that it was converted from.
        integers: Parameters of every operator that has some, by its name.
    """
    schema = _schema()
    content = schema.ModelT.InitFromPackedBuf(model.data, 0)
    graph = content.subgraphs[0]
    kept = {id(entry) for entry in body_operators(model)}
    body = [graph.operators[i] for i, entry in enumerate(model.operators) if id(entry) in kept]
    for operator, entry in zip(lower(network), body, strict=True):
        if not operator.weight:
            continue
        own = integers[operator.name]
        kernel = own.kernel
        if operator.kind == "CONV_2D":
            kernel = kernel.transpose(0, 2, 3, 1)
        elif operator.kind == "DEPTHWISE_CONV_2D":
            kernel = kernel.transpose(1, 2, 3, 0)
        scale = np.float32(graph.tensors[entry.inputs[0]].quantization.scale[0]) * own.scale
        entry.inputs = np.array(entry.inputs, np.int32)
        for position, values, scales in ((1, np.ascontiguousarray(kernel), own.scale), (2, own.bias, scale)):
            entry.inputs[position] = _replaced(schema, content, int(entry.inputs[position]), values, scales)
    return pack(content)


def _replaced(schema: Any, content: Any, index: int, values: NDArray[Any], scale: NDArray[np.float32]) -> int:
    """Index of a constant tensor after it, or where others share it a copy of it, was given other values."""
    graph = content.subgraphs[0]
    if sum(int(i) == index for operator in graph.operators for i in operator.inputs) > 1:
        graph.tensors.append(copy.copy(graph.tensors[index]))
        index = len(graph.tensors) - 1
    tensor = graph.tensors[index]
    tensor.quantization = copy.copy(tensor.quantization)
    tensor.quantization.scale = scale.astype(np.float32)
    tensor.quantization.zeroPoint = np.zeros(len(scale), np.int64)
    if sum(other.buffer == tensor.buffer for other in graph.tensors) > 1:
        content.buffers.append(schema.BufferT())
        tensor.buffer = len(content.buffers) - 1
    content.buffers[tensor.buffer].data = np.frombuffer(values.tobytes(), np.uint8)
    return index
