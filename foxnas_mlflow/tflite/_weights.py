"""Weights as they cross from PyTorch: a dictionary of NumPy arrays, folded here for inference.

| key                                    | shape                                          |
|----------------------------------------|------------------------------------------------|
| ``{layer}.weight``                     | conv (out, in, k, k), depthwise (c, 1, k, k), linear (out, in) |
| ``{layer}.bias``                       | (out,): layers without batch norm              |
| ``{layer}.norm.{weight,bias,mean,var}``| (out,): layers with batch norm                 |
| ``{se}.{reduce,expand}.{weight,bias}`` | 1x1 convolutions of a squeeze-excite gate      |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import ConversionError
from foxnas_mlflow.core.network import NORM_EPSILON, Network
from foxnas_mlflow.tflite._graph import Operator, lower

FloatArray = NDArray[np.float32]
Weights = Mapping[str, NDArray[np.floating]]

_NORM_PARTS = ("weight", "bias", "mean", "var")


@dataclass(frozen=True, slots=True)
class FoldedWeights:
    """Parameters of one operator in TensorFlow Lite's layout, batch norm folded.

    Attributes:
        kernel: float32 array of shape `Operator.kernel_shape`.
        bias: float32 array of shape (out_channels,).
    """

    kernel: FloatArray
    bias: FloatArray


def fold_weights(operators: Sequence[Operator], weights: Weights) -> dict[str, FoldedWeights]:
    """Fold batch norm and the gates' constants into weights and biases, in float64.

    Raises:
        ConversionError: If an array is missing, left over, not finite, or of the wrong shape.
    """
    expected = weight_shapes(operators)
    missing = sorted(set(expected) - set(weights))
    if missing:
        raise ConversionError(
            f"the weights must have an array for every layer, {len(missing)} are missing",
            received=f"no {missing[0]!r}",
            remedy="extract the weights from the same architecture and space",
        )
    unknown = sorted(set(weights) - set(expected))
    if unknown:
        raise ConversionError(
            f"the weights must have only arrays of this network's layers, {len(unknown)} are others",
            received=unknown[0],
            remedy="extract the weights from the same architecture and space",
        )
    arrays: dict[str, NDArray[np.float64]] = {}
    for name, shape in expected.items():
        arrays[name] = np.asarray(weights[name], dtype=np.float64)
        if arrays[name].shape != shape:
            raise ConversionError(f"{name} must have the shape {shape}", received=arrays[name].shape)
        if not np.isfinite(arrays[name]).all():
            raise ConversionError(f"{name} must be finite", received="NaN or infinity", remedy="train again")
    folded = {}
    for operator in operators:
        if not operator.weight:
            continue
        name = operator.weight
        kernel = arrays[f"{name}.weight"] * operator.weight_scale
        if operator.norm:
            gain, shift, mean, var = (arrays[f"{name}.norm.{part}"] for part in _NORM_PARTS)
            if (var < 0).any():
                raise ConversionError(f"{name}.norm.var must not be negative", received=float(var.min()))
            gain = gain / np.sqrt(var + NORM_EPSILON)
            kernel = kernel * gain.reshape((-1,) + (1,) * (kernel.ndim - 1))
            bias = shift - mean * gain
        else:
            bias = arrays[f"{name}.bias"] + operator.bias_shift
        if operator.kind == "CONV_2D":
            kernel = kernel.transpose(0, 2, 3, 1)
        elif operator.kind == "DEPTHWISE_CONV_2D":
            kernel = kernel.transpose(1, 2, 3, 0)
        folded[operator.name] = FoldedWeights(np.ascontiguousarray(kernel, dtype=np.float32), bias.astype(np.float32))
    return folded


def weight_shapes(operators: Sequence[Operator]) -> dict[str, tuple[int, ...]]:
    """The names and shapes of all arrays that a network's weight dictionary has."""
    shapes: dict[str, tuple[int, ...]] = {}
    for operator in operators:
        if operator.weight:
            shapes[f"{operator.weight}.weight"] = operator.torch_shape
            parts = [f"norm.{part}" for part in _NORM_PARTS] if operator.norm else ["bias"]
            shapes.update({f"{operator.weight}.{part}": (operator.out_channels,) for part in parts})
    return shapes


def random_weights(network: Network, rng: np.random.Generator) -> dict[str, FloatArray]:
    """Weights of an untrained network that keeps activations in range, norms not trivial.

    For tests and probes: such a network has outputs that vary with its input.
    """
    weights: dict[str, FloatArray] = {}
    operators = lower(network)
    for name, shape in weight_shapes(operators).items():
        if name.endswith((".norm.weight", ".norm.var")):
            values = rng.uniform(0.7, 1.3, shape)
        elif len(shape) == 1:
            values = rng.normal(0, 0.2, shape)
        else:
            values = rng.normal(0, np.sqrt(2 / np.prod(shape[1:])), shape)
        weights[name] = values.astype(np.float32)
    return weights
