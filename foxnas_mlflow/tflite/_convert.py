"""A subnet and its weights to full-integer int8 TensorFlow Lite.

TensorFlow does the conversion and the calibration; everything it returns is checked before it is
handed over: the float mirror against the NumPy reference (and the trainer's own outputs, if
given), the file against the layer description.
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import ConversionError, InvalidInputError, import_or_raise
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.targets import Int8Runtime
from foxnas_mlflow.data.preprocess import Normalization
from foxnas_mlflow.tflite._checks import check_int8
from foxnas_mlflow.tflite._graph import INPUT, lower
from foxnas_mlflow.tflite._grids import Integers, with_integers
from foxnas_mlflow.tflite._keras import build_keras, quiet_tensorflow
from foxnas_mlflow.tflite._model import read_tflite, with_metadata, with_signature
from foxnas_mlflow.tflite._reference import reference_forward
from foxnas_mlflow.tflite._weights import FloatArray, Weights, fold_weights

MAX_PARITY_ERROR = 1e-4
"""Largest difference of float logits between the trainer and the mirror, relative to the largest logit (or 1)."""

_PARITY_IMAGES = 4
_MIN_REPRESENTATIVE = 8


@dataclass(frozen=True, slots=True)
class Conversion:
    """An int8 model that passed every check.

    Attributes:
        data: The TensorFlow Lite file, with metadata.
        sha256: SHA-256 of `data`.
        parity_error: Largest difference of float logits between reference and Keras mirror, relative
            to the largest logit (or 1).
        operator_counts: How often each operator occurs.
        seconds: Time that the conversion took.
        metadata: What the file says about itself.
    """

    data: bytes = field(repr=False)
    sha256: str
    parity_error: float
    operator_counts: Mapping[str, int]
    seconds: float
    metadata: Mapping[str, Any] = field(repr=False)

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.data)

    def save(self, path: str | Path) -> None:
        """Write the file in one step."""
        write_atomically(path, self.data)


def convert(
    network: Network,
    weights: Weights,
    representative: NDArray[np.uint8],
    *,
    normalization: Normalization,
    labels: Sequence[str] | None = None,
    architecture: Architecture | None = None,
    provenance: Mapping[str, Any] | None = None,
    reference_logits: FloatArray | None = None,
    runtime: Int8Runtime = "litert",
    input_type: Literal["int8", "uint8"] = "int8",
) -> Conversion:
    """Convert a network to full-integer int8.

    Args:
        network: From `build_network`.
        weights: NumPy weights, see `foxnas_mlflow.tflite._weights`.
        representative: uint8 images of the training set, shape (n, height, width, channels), at
            the network's image size; a hundred or so of all classes.
        normalization: What the network was trained with; stored in the file.
        labels: Class names in the order of the outputs; stored in the file.
        architecture: Stored in the file.
        provenance: Stored in the file, for example run and model ids.
        reference_logits: Float logits of the trainer for the first images of `representative`,
            shape (m, n_classes): the mirror is held against them too.
        runtime: ``edgetpu`` gives the classifier one scale, which the Edge TPU compiler needs;
            ``litert`` one a channel.
        input_type: Type of the input; ``uint8`` costs one operator that turns it into int8.

    Raises:
        InvalidInputError: If images or labels do not fit the network.
        ConversionError: If weights do not fit, TensorFlow fails, or a check on the result fails.
        MissingDependencyError: If TensorFlow is not installed.
    """
    start = time.monotonic()
    shape = (network.image_size, network.image_size, network.in_channels)
    if (
        representative.dtype != np.uint8
        or representative.shape[1:] != shape
        or len(representative) < _MIN_REPRESENTATIVE
    ):
        raise InvalidInputError(
            f"representative images must be at least {_MIN_REPRESENTATIVE} uint8 images of shape {shape}",
            received=f"{representative.dtype} {representative.shape}",
        )
    if labels is not None and len(labels) != network.n_classes:
        raise InvalidInputError(
            f"there must be one label for each of {network.n_classes} classes", received=len(labels)
        )
    operators = lower(network)
    folded = fold_weights(operators, weights)
    images = normalization(representative)

    with quiet_tensorflow() as log:
        model = build_keras(operators, folded, shape)
        parity = _parity_error(model, operators, folded, images, reference_logits)
        tf = import_or_raise("tensorflow", extra="tflite", feature="conversion to TensorFlow Lite")
        # From a graph: a Keras model would be written as a SavedModel and read again, which takes thrice as long.
        traced = tf.function(lambda image: model(image, training=False))
        graph = traced.get_concrete_function(tf.TensorSpec((1, *shape), tf.float32, name=INPUT))
        converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
        converter.representative_dataset = lambda: ([image[None]] for image in images)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
        converter.inference_input_type = getattr(tf, input_type)
        converter.inference_output_type = tf.int8
        if runtime == "edgetpu":
            converter._experimental_disable_per_channel_quantization_for_dense_layers = True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Statistics for quantized inputs were expected")
                data: bytes = converter.convert()
        except Exception as error:  # the converter raises many kinds, some only from its C++ side
            raise ConversionError(
                "TensorFlow must be able to convert the network", received=f"{error} {log()[-500:]}"
            ) from error
    check_int8(read_tflite(data), operators, runtime)

    metadata = {
        "labels": None if labels is None else list(labels),
        "normalization": {"mean": list(normalization.mean), "std": list(normalization.std)},
        "architecture": None if architecture is None else architecture.to_dict(),
        "provenance": dict(provenance or {}),
        "runtime": runtime,
        "parity_error": parity,
        "model_sha256": hashlib.sha256(data).hexdigest(),
        "made_by": f"foxnas-mlflow {__version__}, tensorflow {tf.__version__}",
    }
    data = with_signature(with_metadata(data, metadata), INPUT)
    result = read_tflite(data)
    check_int8(result, operators, runtime)
    return Conversion(data, result.sha256, parity, result.operator_counts, time.monotonic() - start, metadata)


def with_weights(conversion: Conversion, network: Network, integers: Mapping[str, Integers], how: str) -> Conversion:
    """The same file with weights that were trained on its grids.

    Args:
        conversion: The file.
        network: The network that it was converted from.
        integers: Parameters of every operator that has some, by its name.
        how: What was done, for the file's metadata.

    Raises:
        ConversionError: If the result breaks a rule of int8 files.
    """
    start = time.monotonic()
    data = with_integers(read_tflite(conversion.data), network, integers)
    metadata = {**conversion.metadata, "repaired": how}
    result = read_tflite(with_metadata(data, metadata))
    check_int8(result, lower(network), metadata["runtime"])
    seconds = conversion.seconds + time.monotonic() - start
    return Conversion(result.data, result.sha256, conversion.parity_error, result.operator_counts, seconds, metadata)


def _parity_error(
    model: Any,
    operators: Any,
    folded: Any,
    images: FloatArray,
    reference_logits: FloatArray | None,
) -> float:
    """Compare the mirror with the NumPy reference, and with the trainer's logits if there are any."""
    n = _PARITY_IMAGES if reference_logits is None else min(len(reference_logits), len(images))
    mirror = np.concatenate([np.asarray(model(images[i : i + 1], training=False)) for i in range(n)])
    ours = reference_forward(operators, folded, images[: min(n, _PARITY_IMAGES)])[operators[-1].name]
    error = _relative_error(mirror[: len(ours)], ours, "the NumPy reference")
    if reference_logits is not None:
        error = max(error, _relative_error(mirror, reference_logits[:n], "the trainer's outputs"))
    return error


def _relative_error(mirror: FloatArray, reference: FloatArray, name: str) -> float:
    if mirror.shape != reference.shape:
        raise ConversionError(f"the logits of {name} must have the shape {mirror.shape}", received=reference.shape)
    error = float(np.max(np.abs(mirror - reference)) / max(1.0, float(np.max(np.abs(reference)))))
    if not error < MAX_PARITY_ERROR:
        raise ConversionError(
            f"float outputs of the Keras mirror and of {name} must agree within {MAX_PARITY_ERROR:g}",
            received=f"{error:.3g}",
            remedy="check that weights, architecture and space belong together",
        )
    return error
