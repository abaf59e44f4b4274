"""The network in Keras, with fixed batch size 1: the Edge TPU compiler refuses dynamic batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.tflite._graph import INPUT, Operator
from foxnas_mlflow.tflite._weights import FoldedWeights


def build_keras(
    operators: Sequence[Operator], folded: Mapping[str, FoldedWeights], image_shape: tuple[int, ...]
) -> Any:
    """Build the Keras model of a network and load its folded weights.

    Args:
        operators: From `lower`.
        folded: From `fold_weights`.
        image_shape: (height, width, channels) of the input.

    Returns:
        A `tf.keras.Model` of float32 logits.
    """
    tf = import_or_raise("tensorflow", extra="tflite", feature="conversion to TensorFlow Lite")
    layers = tf.keras.layers
    tensors: dict[str, Any] = {INPUT: layers.Input(image_shape, batch_size=1, name=INPUT)}
    for op in operators:
        x = tensors[op.inputs[0]]
        activation = None if op.activation == "none" else op.activation
        layer: Any
        if op.kind == "MEAN":
            layer = layers.GlobalAveragePooling2D(keepdims=True, name=op.name)
        elif op.kind in ("MUL", "ADD"):
            layer = (layers.Multiply if op.kind == "MUL" else layers.Add)(name=op.name)
            x = [x, tensors[op.inputs[1]]]
        elif op.kind == "CONV_2D":
            layer = layers.Conv2D(op.out_channels, op.kernel, op.stride, "same", activation=activation, name=op.name)
        elif op.kind == "DEPTHWISE_CONV_2D":
            layer = layers.DepthwiseConv2D(op.kernel, op.stride, "same", activation=activation, name=op.name)
        else:
            x = layers.Reshape((op.in_channels,), name=f"{op.name}.flatten")(x)
            layer = layers.Dense(op.out_channels, name=op.name)
        tensors[op.name] = layer(x)
        if op.weight:
            kernel = folded[op.name].kernel
            kernel = kernel.T if op.kind == "FULLY_CONNECTED" else kernel.transpose(1, 2, 3, 0)
            layer.set_weights([kernel, folded[op.name].bias])
    return tf.keras.Model(tensors[INPUT], tensors[operators[-1].name])
