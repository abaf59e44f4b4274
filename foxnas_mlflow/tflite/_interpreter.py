"""Int8 models on this host: logits, top-1, and where quantization loses."""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import DeviceError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.data.preprocess import Normalization, quantize
from foxnas_mlflow.tflite._checks import body_operators, check_classifier
from foxnas_mlflow.tflite._graph import INPUT, lower
from foxnas_mlflow.tflite._model import TensorInfo, TfliteModel, read_tflite
from foxnas_mlflow.tflite._reference import reference_forward, run_operator
from foxnas_mlflow.tflite._weights import FloatArray, Weights, fold_weights

EDGETPU_LIBRARY = "libedgetpu.so.1"


class Int8Model:
    """An int8 model and its interpreter.

    Args:
        source: Path or bytes of a TensorFlow Lite file.
        threads: Threads of the interpreter.
        normalization: Of the images; None takes the file's own metadata.
        edgetpu: Run on an Edge TPU through its delegate; the file must be compiled for it.

    Attributes:
        model: The content of the file.
        labels: Class names, or None if the file has none.
    """

    def __init__(
        self,
        source: bytes | str | Path | TfliteModel,
        *,
        threads: int = 1,
        normalization: Normalization | None = None,
        edgetpu: bool = False,
    ) -> None:
        self.model = source if isinstance(source, TfliteModel) else read_tflite(source)
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
        # What normalising and quantizing do to each value of a pixel is looked up.
        given = self.model.input
        self._table = quantize(normalization.of_levels(), given.type, given.scale[0], given.zero_point[0])
        self._interpreter = make_interpreter(self.model.data, threads=threads, edgetpu=edgetpu)

    def quantize(self, images: NDArray[np.uint8]) -> NDArray[np.int8] | NDArray[np.uint8]:
        """The model's input for uint8 images of shape (n, height, width, channels)."""
        height, width, channels = self.model.input.shape[1:]
        _check_images(images, channels)
        if images.shape[1:3] != (height, width):
            raise InvalidInputError(f"images must have {height} x {width} pixels", received=images.shape[1:3])
        return self._table[images, np.arange(channels)]

    def logits(self, images: NDArray[np.uint8]) -> FloatArray:
        """Dequantized logits, shape (n, n_classes), of uint8 images (n, height, width, channels)."""
        batch = self.quantize(images)
        output = self.model.output
        rows = np.empty((len(batch), output.shape[-1]), np.float32)
        for i, image in enumerate(batch):
            self._interpreter.set_tensor(self.model.inputs[0], image[None])
            self._interpreter.invoke()
            rows[i] = dequantize(self._interpreter.get_tensor(self.model.outputs[0]), output)[0]
        return rows

    def top1(self, images: NDArray[np.uint8], labels: NDArray[np.integer]) -> float:
        """Top-1 accuracy in percent."""
        if len(images) != len(labels) or len(images) == 0:
            raise InvalidInputError("there must be as many labels as images, at least one", received=len(labels))
        return float(100 * np.mean(self.logits(images).argmax(axis=1) == labels))


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
    interpreter = make_interpreter(model.data, preserve_all=True)
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


def make_interpreter(data: bytes, *, threads: int = 1, edgetpu: bool = False, preserve_all: bool = False) -> Any:
    """A LiteRT interpreter with its tensors allocated; ``tflite_runtime`` where LiteRT is not installed.

    Raises:
        MissingDependencyError: If there is no runtime.
        DeviceError: If the Edge TPU's library or the device itself is missing.
        InvalidInputError: If the runtime refuses the file.
    """
    interpreter_class, load_delegate = _runtime()
    options: dict[str, Any] = {"num_threads": threads, "experimental_preserve_all_tensors": preserve_all}
    if edgetpu:
        options["experimental_delegates"] = [load_edgetpu(load_delegate)]
    try:
        with warnings.catch_warnings():
            # Meant for debugging only, it says; comparing layers is debugging.
            warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors")
            interpreter = interpreter_class(model_content=data, **options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise InvalidInputError(
            "the runtime must be able to load the model", received=str(error), remedy="update ai-edge-litert"
        ) from error
    return interpreter


def sample_answer(data: bytes, *, seed: int = 0) -> tuple[NDArray[Any], NDArray[Any]]:
    """A random input of an 8-bit model and this host's output for it, to compare another machine with.

    Raises:
        MissingDependencyError: If there is no runtime here.
        InvalidInputError: If the runtime refuses the file (one compiled for an Edge TPU).
    """
    interpreter = make_interpreter(data)
    detail = interpreter.get_input_details()[0]
    limits = np.iinfo(detail["dtype"])
    rng = np.random.default_rng(seed)
    given = rng.integers(limits.min, limits.max, detail["shape"], dtype=detail["dtype"], endpoint=True)
    interpreter.set_tensor(detail["index"], given)
    interpreter.invoke()
    return given, interpreter.get_tensor(interpreter.get_output_details()[0]["index"])


def load_edgetpu(load_delegate: Callable[[str], Any], library: str = EDGETPU_LIBRARY) -> Any:
    """Load the Edge TPU delegate.

    Raises:
        DeviceError: If its library is not installed, or no Edge TPU answers.
    """
    try:
        # Tried first: the runtime's own object complains on standard error when it cannot load.
        ctypes.CDLL(library)
        return load_delegate(library)
    except OSError as error:
        raise DeviceError(
            f"an Edge TPU needs the library {library}, which is not installed",
            remedy="install libedgetpu1-std (a build that matches the runtime), or use the target rpi4 or cpu",
        ) from error
    except ValueError as error:
        raise DeviceError(
            "an Edge TPU must be connected",
            received="no device answered",
            remedy="plug it in, check the udev rules of libedgetpu and that no other process holds it",
        ) from error


def dequantize(values: NDArray[Any], tensor: TensorInfo) -> FloatArray:
    """The real values of a tensor's integers."""
    return (values.astype(np.float32) - np.float32(tensor.zero_point[0])) * np.float32(tensor.scale[0])


def _runtime() -> tuple[Any, Any]:
    try:
        from ai_edge_litert.interpreter import Interpreter, load_delegate
    except ModuleNotFoundError:
        try:
            from tflite_runtime.interpreter import Interpreter, load_delegate
        except ModuleNotFoundError:
            raise MissingDependencyError(
                "running a TensorFlow Lite model needs ai-edge-litert or tflite-runtime",
                remedy="install it with: pip install ai-edge-litert",
            ) from None
    return Interpreter, load_delegate


def _check_images(images: NDArray[np.uint8], channels: int) -> None:
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] != channels:
        raise InvalidInputError(
            f"images must be uint8 of shape (n, height, width, {channels})", received=f"{images.dtype} {images.shape}"
        )
