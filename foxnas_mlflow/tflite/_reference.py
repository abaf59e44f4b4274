"""The network in NumPy float32: the oracle that conversions are held against.

It reads the same operators as the Keras mirror but shares no kernel with TensorFlow or PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from foxnas_mlflow.core.network import same_padding
from foxnas_mlflow.tflite._graph import INPUT, Operator
from foxnas_mlflow.tflite._weights import FloatArray, FoldedWeights


def reference_forward(
    operators: Sequence[Operator], folded: Mapping[str, FoldedWeights], images: FloatArray
) -> dict[str, FloatArray]:
    """Run the network and keep what every operator writes.

    Args:
        operators: From `lower`.
        folded: From `fold_weights`.
        images: Normalised images, shape (n, height, width, channels).

    Returns:
        The output of each operator by name, shape (n, height, width, channels); the last one's is
        (n, n_classes).
    """
    tensors: dict[str, FloatArray] = {INPUT: images.astype(np.float32)}
    for operator in operators:
        tensors[operator.name] = run_operator(operator, folded, tensors)
    return tensors


def run_operator(
    operator: Operator, folded: Mapping[str, FoldedWeights], tensors: Mapping[str, FloatArray]
) -> FloatArray:
    """Run one operator on the tensors that it reads."""
    x = tensors[operator.inputs[0]]
    y: FloatArray
    if operator.kind == "MEAN":
        y = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64).astype(np.float32)
    elif operator.kind == "MUL":
        y = x * tensors[operator.inputs[1]]
    elif operator.kind == "ADD":
        y = x + tensors[operator.inputs[1]]
    else:
        y = _linear(operator, folded[operator.name], x)
    if operator.activation == "none":
        return y
    return np.clip(y, 0, 6 if operator.activation == "relu6" else None)


def _linear(operator: Operator, parameters: FoldedWeights, x: FloatArray) -> FloatArray:
    kernel = parameters.kernel
    y: FloatArray
    if operator.kind == "FULLY_CONNECTED":
        y = x.reshape(len(x), -1) @ kernel.T
    elif operator.kernel == 1 and operator.kind == "CONV_2D":
        y = x[:, :: operator.stride, :: operator.stride] @ kernel[:, 0, 0].T
    else:
        pad = same_padding(x.shape[1], operator.kernel, operator.stride)
        padded = np.pad(x, ((0, 0), pad, pad, (0, 0)))
        windows = sliding_window_view(padded, (operator.kernel, operator.kernel), axis=(1, 2))
        windows = windows[:, :: operator.stride, :: operator.stride]  # (n, h, w, c, k, k)
        if operator.kind == "CONV_2D":
            y = np.tensordot(windows, kernel, axes=((4, 5, 3), (1, 2, 3)))
        else:
            y = np.einsum("nhwcij,ijc->nhwc", windows, kernel[0])
    return y + parameters.bias
