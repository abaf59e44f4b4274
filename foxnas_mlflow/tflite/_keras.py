"""The network in Keras: what TensorFlow converts, and the float network that int8 is compared with."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.tflite._graph import INPUT, Operator
from foxnas_mlflow.tflite._weights import FoldedWeights


def build_keras(
    operators: Sequence[Operator],
    folded: Mapping[str, FoldedWeights],
    image_shape: tuple[int, ...],
    *,
    batch_size: int | None = 1,
) -> Any:
    """Build the Keras model of a network and load its folded weights.

    Args:
        operators: From `lower`.
        folded: From `fold_weights`.
        image_shape: (height, width, channels) of the input.
        batch_size: Fixed for a conversion, because the Edge TPU compiler refuses dynamic batches; None
            leaves it open.

    Returns:
        A `tf.keras.Model` of float32 logits.
    """
    tf = import_or_raise("tensorflow", extra="tflite", feature="conversion to TensorFlow Lite")
    layers = tf.keras.layers
    tensors: dict[str, Any] = {INPUT: layers.Input(image_shape, batch_size=batch_size, name=INPUT)}
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


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[Any]:
    """Keep what TensorFlow's C++ and Python sides print, to be shown only with an error.

    Yields:
        A function that returns what was printed so far.
    """
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.stdout.flush()
    sys.stderr.flush()
    chatty = logging.getLogger("tensorflow")
    level = chatty.level
    with tempfile.TemporaryFile() as sink:
        saved = os.dup(1), os.dup(2)
        # In a notebook Python's streams are not the process's.
        python = open(os.dup(sink.fileno()), "w", encoding="utf-8", errors="replace")  # noqa: SIM115

        def text() -> str:
            python.flush()
            sink.seek(0)
            return " ".join(sink.read().decode("utf-8", "replace").split())

        try:
            os.dup2(sink.fileno(), 1)
            os.dup2(sink.fileno(), 2)
            chatty.setLevel(logging.ERROR)
            with python, contextlib.redirect_stdout(python), contextlib.redirect_stderr(python):
                yield text
        finally:
            chatty.setLevel(level)
            os.dup2(saved[0], 1)
            os.dup2(saved[1], 2)
            os.close(saved[0])
            os.close(saved[1])
