"""Int8 models on this host: logits, and where quantization loses."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.data.preprocess import Normalization
from foxnas_mlflow.runtime import ClassifierPool, open_interpreter
from foxnas_mlflow.tflite._checks import body_operators, check_classifier
from foxnas_mlflow.tflite._graph import INPUT, lower
from foxnas_mlflow.tflite._model import TensorInfo, TfliteFile, read_tflite
from foxnas_mlflow.tflite._reference import reference_forward, run_operator
from foxnas_mlflow.tflite._weights import FloatArray, Weights, fold_weights

_PART_IMAGES = 50
"""Images for which another interpreter is worth its opening."""


class Int8Model:
    """An int8 file that is evaluated, on the interpreter that serves it.

    Args:
        source: Path or bytes of a TensorFlow Lite file.
        normalization: Of the images; None takes the file's own metadata.

    Attributes:
        model: The content of the file.
        labels: Class names, or None if the file has none.
    """

    def __init__(self, source: bytes | str | Path | TfliteFile, *, normalization: Normalization | None = None) -> None:
        self.model = source if isinstance(source, TfliteFile) else read_tflite(source)
        check_classifier(self.model)
        metadata = self.model.metadata
        if normalization is None:
            if "normalization" not in metadata:
                raise InvalidInputError(
                    "the model must tell how images are normalised",
                    received="a file without our metadata",
                    remedy="pass a normalization, or convert with foxnas quantize",
                )
            normalization = Normalization(
                tuple(metadata["normalization"]["mean"]), tuple(metadata["normalization"]["std"])
            )
        self.labels: tuple[str, ...] | None = tuple(metadata["labels"]) if metadata.get("labels") else None
        self._classifiers = ClassifierPool(self.model.data, normalization, "logits", size=n_processors())

    def quantize(self, images: NDArray[np.uint8]) -> NDArray[np.int8] | NDArray[np.uint8]:
        """The model's input for uint8 images of shape (n, height, width, channels)."""
        with self._classifiers.lend() as classifier:
            return np.stack([classifier.quantize(image) for image in self._checked(images)])

    def logits(self, images: NDArray[np.uint8]) -> FloatArray:
        """Dequantized logits, shape (n, n_classes), of uint8 images (n, height, width, channels).

        Each processor answers a part of many images.
        """
        n = min(n_processors(), max(len(self._checked(images)) // _PART_IMAGES, 1))
        if n == 1:
            return self._answers(images)
        with ThreadPoolExecutor(n, "foxnas") as threads:
            return np.concatenate(list(threads.map(self._answers, np.array_split(images, n))))

    def _answers(self, images: NDArray[np.uint8]) -> FloatArray:
        with self._classifiers.lend() as classifier:
            return np.stack([classifier.last_layer(image) for image in images])

    def _checked(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        height, width, channels = self._classifiers.input_shape
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != channels or not len(images):
            raise InvalidInputError(
                f"images must be uint8 of shape (n, height, width, {channels})",
                received=f"{images.dtype} {images.shape}",
            )
        if images.shape[1:3] != (height, width):
            raise InvalidInputError(f"images must have {height} x {width} pixels", received=images.shape[1:3])
        return images


@dataclass(frozen=True, slots=True)
class LayerError:
    """What quantization does to one operator's output.

    Attributes:
        name: Name of the operator.
        kind: Its kind.
        error: Root mean square of (int8 - float) over that of float, all layers before included.
        own_error: The same with the float operator fed the int8 model's own inputs: what this
            layer alone adds.
        saturated: Share of values at the largest quantized value of a layer without ReLU6.
    """

    name: str
    kind: str
    error: float
    own_error: float
    saturated: float


def layer_errors(
    network: Network,
    weights: Weights,
    source: bytes | str | Path,
    images: NDArray[np.uint8],
    *,
    normalization: Normalization | None = None,
) -> list[LayerError]:
    """Compare every operator of an int8 model with the float network, worst `own_error` first.

    Args:
        network: The network that was converted.
        weights: The float weights that it was converted from.
        source: The int8 file.
        images: A few uint8 images, shape (n, height, width, channels).
        normalization: Of the images; None takes the file's own.
    """
    operators = lower(network)
    folded = fold_weights(operators, weights)
    int8 = Int8Model(source, normalization=normalization)
    model = int8.model
    entries = body_operators(model)
    interpreter = open_interpreter(model.data, preserve_all=True)
    sums = {operator.name: np.zeros(4) for operator in operators}
    batch = int8.quantize(images)
    float_input = dequantize(batch, model.input)
    for i in range(len(batch)):
        interpreter.set_tensor(model.inputs[0], batch[i : i + 1])
        interpreter.invoke()
        exact = reference_forward(operators, folded, float_input[i : i + 1])
        seen: dict[str, FloatArray] = {INPUT: float_input[i : i + 1]}
        for operator, entry in zip(operators, entries, strict=True):
            tensor = model.tensors[entry.outputs[0]]
            raw = interpreter.get_tensor(entry.outputs[0])
            own = run_operator(operator, folded, seen)
            got = dequantize(raw, tensor)
            seen[operator.name] = got
            want = exact[operator.name]
            sums[operator.name] += (
                float(np.sum((got - want) ** 2)),
                float(np.sum(want**2)),
                float(np.sum((got - own) ** 2)),
                float(np.mean(raw == np.iinfo(raw.dtype).max)) if operator.activation == "none" else 0.0,
            )
    rows = []
    for operator in operators:
        squared, power, own_squared, saturated = sums[operator.name]
        power = np.maximum(power, 1e-30)
        rows.append(
            LayerError(
                operator.name,
                operator.kind,
                float(np.sqrt(squared / power)),
                float(np.sqrt(own_squared / power)),
                float(saturated / len(batch)),
            )
        )
    return sorted(rows, key=lambda row: -row.own_error)


def dequantize(values: NDArray[Any], tensor: TensorInfo) -> FloatArray:
    """The real values of a tensor's integers."""
    return (values.astype(np.float32) - np.float32(tensor.zero_point[0])) * np.float32(tensor.scale[0])
