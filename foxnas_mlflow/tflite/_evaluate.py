"""Top-1 of a float network and of its int8 file on the same images."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.network import Network
from foxnas_mlflow.data import Evaluation, evaluate
from foxnas_mlflow.data.preprocess import Normalization
from foxnas_mlflow.tflite._graph import lower
from foxnas_mlflow.tflite._int8 import Int8Model
from foxnas_mlflow.tflite._keras import build_keras, quiet_tensorflow
from foxnas_mlflow.tflite._weights import FloatArray, Weights, fold_weights


@dataclass(frozen=True, slots=True)
class QuantizationLoss:
    """What quantization costs in accuracy.

    Attributes:
        float_top1_percent: Top-1 of the float network.
        int8_top1_percent: Top-1 of the int8 file.
        standard_error: How far `drop_points` may lie from the one of all images of this kind, in
            percentage points. Both networks saw the same images: only those count on which they differ.
        n_images: Number of images.
        int8: The int8 file's answers.
    """

    float_top1_percent: float
    int8_top1_percent: float
    standard_error: float
    n_images: int
    int8: Evaluation = field(compare=False, repr=False)

    @property
    def drop_points(self) -> float:
        """Float less int8, in percentage points: of whole images, so that a drop of what is allowed is no more."""
        return 100 * round((self.float_top1_percent - self.int8_top1_percent) * self.n_images / 100) / self.n_images


class FloatModel:
    """A network in float32 on this host, batch norm folded: the Keras mirror that is converted.

    Args:
        network: Its description.
        weights: Its weights.
        normalization: Of the images.

    Raises:
        ConversionError: If the weights do not fit.
        MissingDependencyError: If TensorFlow is not installed.
    """

    def __init__(self, network: Network, weights: Weights, normalization: Normalization) -> None:
        operators = lower(network)
        shape = (network.image_size, network.image_size, network.in_channels)
        self._normalization = normalization
        with quiet_tensorflow():
            self._model = build_keras(operators, fold_weights(operators, weights), shape, batch_size=None)

    def logits(self, images: NDArray[np.uint8]) -> FloatArray:
        """Logits, shape (n, n_classes), of uint8 images (n, height, width, channels)."""
        with quiet_tensorflow():
            logits: FloatArray = self._model.predict_on_batch(self._normalization(images))
        return logits


def quantization_loss(
    exact: FloatModel, int8: Int8Model, batches: Iterable[tuple[NDArray[np.uint8], NDArray[np.integer]]]
) -> QuantizationLoss:
    """Evaluate both on the same images.

    Args:
        exact: The float network.
        int8: Its int8 file.
        batches: uint8 images at the network's size, and the index of the class of each.

    Raises:
        InvalidInputError: If there are no images, or they do not fit.
    """
    float_, quantized = evaluate(batches, exact.logits, int8.logits)
    n_images = float_.n_images
    drop = float(np.mean(float_.correct) - np.mean(quantized.correct))
    variance = float(np.mean(float_.correct != quantized.correct)) - drop**2
    error = 100 * math.sqrt(variance / n_images)
    return QuantizationLoss(float_.top1_percent, quantized.top1_percent, error, n_images, quantized)
