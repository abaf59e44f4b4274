"""Int8 models for latency alone, written straight from the layer description.

A full conversion takes TensorFlow seconds; a latency probe needs the same operators, shapes,
types and quantization scheme, but no trained weights. This writer makes that file in a fraction of
a second: random int8 weights, and quantization parameters that keep the activations in range, so
that outputs vary with the input and can be compared between a board and the host.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.network import Network
from foxnas_mlflow.tflite._graph import INPUT, Operator, lower
from foxnas_mlflow.tflite._model import _schema, pack, set_metadata

OPERATOR_VERSIONS: dict[str, int] = {
    "CONV_2D": 3,
    "DEPTHWISE_CONV_2D": 3,
    "ADD": 2,
    "MEAN": 2,
    "MUL": 2,
    "FULLY_CONNECTED": 4,
}
"""Versions that TensorFlow writes for int8; the Edge TPU compiler 16.0 accepts all of them."""

_MIN_RUNTIME = b"1.14.0"
_WEIGHT_SQUARE = 127 * 128 / 3  # mean square of a uniform integer in [-127, 127]


def write_probe(network: Network, *, per_channel_dense: bool = True, seed: int = 0) -> bytes:
    """Write an int8 model of a network with random weights.

    Args:
        network: The network.
        per_channel_dense: One scale a channel for the classifier's weights; the Edge TPU compiler
            needs False.
        seed: Of the weights.

    Returns:
        The bytes of a TensorFlow Lite file: batch 1, int8 input and output.
    """
    operators = lower(network)
    writer = _Writer(np.random.default_rng(seed))
    image = (1, network.image_size, network.image_size, network.in_channels)
    # An input uniform over int8 with scale 1/73 has unit variance.
    writer.add_activation(INPUT, image, scale=1 / 73, zero_point=0, square=1.0)
    for operator in operators:
        writer.add_operator(operator, per_channel=operator.kind != "FULLY_CONNECTED" or per_channel_dense)
    return writer.finish(operators[-1].name)


class _Writer:
    """Builds the object form of a model operator by operator.

    `square` is the mean square that each activation is expected to have; weights are scaled by it
    so that variances neither vanish nor saturate.
    """

    def __init__(self, rng: np.random.Generator) -> None:
        self._schema = _schema()
        self._rng = rng
        self._buffers: list[Any] = [self._schema.BufferT()]
        self._tensors: list[Any] = []
        self._operators: list[Any] = []
        self._codes: dict[str, int] = {}
        self._indices: dict[str, int] = {}
        self._scales: dict[str, float] = {}
        self._squares: dict[str, float] = {}
        self._axes: int | None = None

    def add_activation(
        self, name: str, shape: tuple[int, ...], *, scale: float, zero_point: int, square: float
    ) -> None:
        quantization = self._quantization(np.asarray([scale], np.float32), zero_point, 0)
        self._indices[name] = self._tensor(name, shape, self._schema.TensorType.INT8, None, quantization)
        self._scales[name], self._squares[name] = scale, square

    def add_operator(self, operator: Operator, *, per_channel: bool) -> None:
        options, inputs = self._options(operator), [self._indices[name] for name in operator.inputs]
        square = self._squares[operator.inputs[0]]
        if operator.kind == "MEAN":
            inputs.append(self._mean_axes())
            scale, zero_point = self._scales[operator.inputs[0]], -128
            square /= 2  # the mean of a half-normal squared is about two thirds of its mean square
        elif operator.kind == "MUL":
            scale, zero_point = 12 / 255, -128
            square *= self._squares[operator.inputs[1]]
        elif operator.kind == "ADD":
            square += self._squares[operator.inputs[1]]
            scale, zero_point = 6 * square**0.5 / 255, 0
        else:
            inputs += self._parameters(operator, per_channel)
            if operator.activation == "none":
                scale, zero_point, square = 8 / 255, 0, 1.0
            else:
                scale, zero_point, square = 6 / 255, -128, 1.5
        shape = (1, *operator.out_shape)
        self.add_activation(operator.name, shape, scale=scale, zero_point=zero_point, square=square)
        entry = self._schema.OperatorT()
        entry.opcodeIndex = self._codes.setdefault(operator.kind, len(self._codes))
        entry.inputs = np.asarray(inputs, np.int32)
        entry.outputs = np.asarray([self._indices[operator.name]], np.int32)
        entry.builtinOptionsType, entry.builtinOptions = options
        self._operators.append(entry)

    def finish(self, output: str) -> bytes:
        schema = self._schema
        graph = schema.SubGraphT()
        graph.name = "main"
        graph.tensors, graph.operators = self._tensors, self._operators
        graph.inputs = np.asarray([self._indices[INPUT]], np.int32)
        graph.outputs = np.asarray([self._indices[output]], np.int32)
        model = schema.ModelT()
        model.version = 3
        model.description = "foxnas-mlflow latency probe: random weights"
        model.subgraphs, model.buffers = [graph], self._buffers
        model.operatorCodes = []
        for kind in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode = code.deprecatedBuiltinCode = getattr(schema.BuiltinOperator, kind)
            code.version = OPERATOR_VERSIONS[kind]
            model.operatorCodes.append(code)
        set_metadata(schema, model, "min_runtime_version", _MIN_RUNTIME.ljust(16, b"\0"))
        return pack(model)

    def _parameters(self, operator: Operator, per_channel: bool) -> list[int]:
        """Weights whose outputs have a mean square of 1 (linear) or 4 (before ReLU6), and zero biases."""
        shape = operator.kernel_shape
        channels = operator.out_channels
        fan_in = operator.kernel**2 * (1 if operator.kind == "DEPTHWISE_CONV_2D" else operator.in_channels)
        spread = 1.0 if operator.activation == "none" else 2.0
        mean = spread / (fan_in * self._squares[operator.inputs[0]] * _WEIGHT_SQUARE) ** 0.5
        scales = np.full(channels if per_channel else 1, mean, np.float32)
        if per_channel:
            scales *= self._rng.uniform(0.8, 1.2, channels).astype(np.float32)
        values = self._rng.integers(-127, 128, shape, dtype=np.int8)
        types = self._schema.TensorType
        dimension = 3 if operator.kind == "DEPTHWISE_CONV_2D" else 0
        weights = self._tensor(
            f"{operator.name}.weight", shape, types.INT8, values, self._quantization(scales, 0, dimension)
        )
        bias_scales = np.float32(self._scales[operator.inputs[0]]) * scales
        bias = self._tensor(
            f"{operator.name}.bias",
            (channels,),
            types.INT32,
            np.zeros(channels, np.int32),
            self._quantization(bias_scales, 0, 0),
        )
        return [weights, bias]

    def _mean_axes(self) -> int:
        if self._axes is None:
            axes = np.asarray([1, 2], np.int32)
            self._axes = self._tensor("axes", (2,), self._schema.TensorType.INT32, axes, None)
        return self._axes

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: int, values: NDArray[np.generic] | None, quantization: Any
    ) -> int:
        tensor = self._schema.TensorT()
        tensor.name, tensor.type = name, kind
        tensor.shape = np.asarray(shape, np.int32)
        tensor.quantization = quantization
        tensor.hasRank = True
        if values is not None:
            tensor.buffer = len(self._buffers)
            content = self._schema.BufferT()
            content.data = values.reshape(-1).view(np.uint8)
            self._buffers.append(content)
        self._tensors.append(tensor)
        return len(self._tensors) - 1

    def _quantization(self, scales: NDArray[np.float32], zero_point: int, dimension: int) -> Any:
        quantization = self._schema.QuantizationParametersT()
        quantization.scale = scales
        quantization.zeroPoint = np.full(len(scales), zero_point, np.int64)
        quantization.quantizedDimension = dimension
        return quantization

    def _options(self, operator: Operator) -> tuple[int, Any]:
        schema = self._schema
        activation = {
            "none": schema.ActivationFunctionType.NONE,
            "relu": schema.ActivationFunctionType.RELU,
            "relu6": schema.ActivationFunctionType.RELU6,
        }[operator.activation]
        name, options = {
            "CONV_2D": ("Conv2DOptions", schema.Conv2DOptionsT),
            "DEPTHWISE_CONV_2D": ("DepthwiseConv2DOptions", schema.DepthwiseConv2DOptionsT),
            "MEAN": ("ReducerOptions", schema.ReducerOptionsT),
            "ADD": ("AddOptions", schema.AddOptionsT),
            "MUL": ("MulOptions", schema.MulOptionsT),
            "FULLY_CONNECTED": ("FullyConnectedOptions", schema.FullyConnectedOptionsT),
        }[operator.kind]
        value = options()
        if operator.kind == "MEAN":
            value.keepDims = True
        else:
            value.fusedActivationFunction = activation
        if operator.kind in ("CONV_2D", "DEPTHWISE_CONV_2D"):
            value.padding = schema.Padding.SAME
            value.strideH = value.strideW = operator.stride
            value.dilationHFactor = value.dilationWFactor = 1
        if operator.kind == "DEPTHWISE_CONV_2D":
            value.depthMultiplier = 1
        return getattr(schema.BuiltinOptions, name), value
