"""TensorFlow Lite models on this machine, for evaluation, serving and boards: one runtime, one interpreter pool.

An interpreter is not safe under threads: shared, it fails or, worse, answers wrongly. A pool lends
each call an interpreter of its own. Nothing here imports MLflow, torch or tensorflow, and the module
travels to boards with `deploy.runner`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import queue
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.errors import DeviceError, InvalidFormatError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.places import Places
from foxnas_mlflow.data.preprocess import Normalization, quantize

if TYPE_CHECKING:
    # Boards have older NumPy and Python.
    from typing import Literal

    from numpy.typing import NDArray

RUNTIMES = ("ai_edge_litert", "tflite_runtime")
"""Runtimes in order of preference; full tensorflow is never loaded to run a model."""

FITTING_LIBRARY = (
    "the libedgetpu that is for its runtime: Google's libedgetpu1-std for tflite-runtime 2.5 to 2.11 alone, for a "
    "newer one the build of https://github.com/feranick/libedgetpu for its release of TensorFlow"
)
"""What a machine with an Edge TPU needs, for messages: another pair crashes."""

EDGETPU_DELEGATE = "libedgetpu.so.1"
_ON_PROCESSOR = "model_config={'delegate': ''}, for mlflow models serve in SERVING_MODEL_CONFIG"
_DEVICE = re.compile(r"@((?:usb|pci)(?::\d+)?|:\d+)$")


def load_runtime() -> Any:
    """The module that holds `Interpreter` and `load_delegate`.

    Raises:
        MissingDependencyError: If no runtime is installed.
    """
    for name in RUNTIMES:
        try:
            return importlib.import_module(f"{name}.interpreter")
        except ModuleNotFoundError as error:
            if error.name is None or error.name.split(".")[0] != name:
                raise
    raise MissingDependencyError(
        f"running a TFLite model needs one of the packages {list(RUNTIMES)}",
        remedy="install it with: pip install ai-edge-litert",
    )


def load_delegate(delegate: str, load: Callable[..., Any] | None = None) -> Any:
    """Load a delegate, which runs a model on an accelerator.

    Args:
        delegate: Its shared library, and after ``@`` which of several accelerators, in the library's words:
            ``libedgetpu.so.1@usb:1``.
        load: What loads it; None: the runtime.

    Raises:
        MissingDependencyError: If the library is not installed.
        DeviceError: If no accelerator answers.
    """
    found = _DEVICE.search(delegate)
    library, device = (delegate[: found.start()], found.group(1)) if found else (delegate, "")
    name = Path(library).name
    try:
        # Tried first: the runtime's own object complains on standard error when it cannot load.
        ctypes.CDLL(library)
        return (load or load_runtime().load_delegate)(library, *([{"device": device}] if device else []))
    except OSError as error:
        raise MissingDependencyError(
            "the delegate of this model cannot be loaded",
            received=name,
            remedy=f"use the model for processors, or install its library (for an Edge TPU {FITTING_LIBRARY})",
        ) from error
    except ValueError as error:
        raise DeviceError(
            "the accelerator of this model must be connected",
            received=f"no device answered to {name}" + (f"@{device}" if device else ""),
            remedy="plug it in, check its udev rules and that no other process holds it: one process has it to itself",
        ) from error


def open_interpreter(model: Path | bytes, *, threads: int = 1, delegate: str = "", preserve_all: bool = False) -> Any:
    """Open a model, with its tensors allocated.

    Args:
        model: The flatbuffer, or its path.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty for the processor.
        preserve_all: Keep the values of all tensors, to look at them after an inference.

    Raises:
        MissingDependencyError: If there is no runtime, or the delegate cannot be loaded.
        DeviceError: If the delegate finds no accelerator.
        InvalidFormatError: If the runtime cannot open the file.
    """
    options: dict[str, Any] = {"num_threads": threads}
    options.update({"model_content": model} if isinstance(model, bytes) else {"model_path": str(model)})
    runtime = load_runtime()
    if delegate:
        options["experimental_delegates"] = [load_delegate(delegate)]
    if preserve_all:
        options["experimental_preserve_all_tensors"] = True
    try:
        with warnings.catch_warnings() if preserve_all else contextlib.nullcontext():
            if preserve_all:
                # Meant for debugging only, it says; comparing layers is debugging.
                warnings.filterwarnings("ignore", message=".*experimental_preserve_all_tensors")
            interpreter = runtime.Interpreter(**options)
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        # Not the runtime's own words for a file: they tell where it lies.
        received = str(error) if isinstance(model, bytes) else model.name
        raise InvalidFormatError("a TFLite model must be one that the runtime can open", received=received) from error
    return interpreter


def inspect_model(path: Path) -> dict[str, Any]:
    """Shapes, types and quantization of a model's one input and one output."""
    interpreter = open_interpreter(path)
    inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
    if len(inputs) != 1 or len(outputs) != 1:
        raise InvalidFormatError(
            "a classifier has one input and one output", received=f"{len(inputs)} inputs, {len(outputs)} outputs"
        )
    facts: dict[str, Any] = {}
    for name, detail in (("input", inputs[0]), ("output", outputs[0])):
        scale, zero_point = detail["quantization"]
        facts = {
            **facts,
            f"{name}_shape": [int(n) for n in detail["shape"]],
            f"{name}_dtype": np.dtype(detail["dtype"]).name,
            f"{name}_scale": float(scale),
            f"{name}_zero_point": int(zero_point),
        }
    return facts


def float_level(expected: NDArray[Any]) -> float:
    """What counts as one step between two machines' float outputs: a thousandth of the largest, but no less."""
    finite = np.abs(expected[np.isfinite(expected)])
    return 1e-3 * max(1.0, float(finite.max()) if finite.size else 1.0)


class Classifier:
    """One interpreter: uint8 image in, probabilities out. For one thread at a time.

    This is the "bare interpreter" that serving is compared with.

    Args:
        model: The flatbuffer, or its path.
        normalization: Mean and std of training.
        output: ``logits`` or ``probabilities``: what the network's last layer gives.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty.
    """

    def __init__(
        self,
        model: Path | bytes,
        normalization: Normalization,
        output: Literal["logits", "probabilities"] = "logits",
        *,
        threads: int = 1,
        delegate: str = "",
    ) -> None:
        self._interpreter = open_interpreter(model, threads=threads, delegate=delegate)
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()
        self._normalization = normalization
        self._softmax = output == "logits"
        # What normalising and quantizing do to each value of a uint8 pixel is looked up.
        self._table = self._quantized(normalization.of_levels())

    def close(self) -> None:
        """Give up the interpreter, and the accelerator that it has."""
        del self._interpreter

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image."""
        _, height, width, channels = (int(n) for n in self._input["shape"])
        return height, width, channels

    def __call__(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """Classify one image.

        Args:
            image: (height, width, channels): uint8, or float with values in 0..1.

        Returns:
            float32 (n_classes,), probabilities.
        """
        values = self.last_layer(image)
        if self._softmax:
            exponentials = np.exp(values - values.max())
            values = exponentials / exponentials.sum()
        return values

    def last_layer(self, image: NDArray[Any]) -> NDArray[np.float32]:
        """The real values of what the network's last layer gives for an image, (n_classes,)."""
        scale, zero_point = self._output["quantization"]
        values: NDArray[np.float32] = self.raw(image).astype(np.float32)
        return (values - np.float32(zero_point)) * np.float32(scale) if scale else values

    def raw(self, image: NDArray[Any]) -> NDArray[Any]:
        """The network's own output for an image, as quantized as the network is."""
        self._interpreter.set_tensor(self._input["index"], self.quantize(image)[None])
        self._interpreter.invoke()
        output: NDArray[Any] = self._interpreter.get_tensor(self._output["index"])[0]
        return output

    def quantize(self, image: NDArray[Any]) -> NDArray[Any]:
        """The network's input for an image: normalised, and as quantized as the network is."""
        if image.dtype != np.uint8:
            return self._quantized(self._normalization.of_unit(image))
        levels = np.empty(image.shape, dtype=self._table.dtype)
        for channel in range(image.shape[2]):
            np.take(self._table[:, channel], image[..., channel], out=levels[..., channel], mode="clip")
        return levels

    def _quantized(self, values: NDArray[np.float32]) -> NDArray[Any]:
        dtype = np.dtype(self._input["dtype"])
        return values if dtype == np.float32 else quantize(values, dtype, *self._input["quantization"])


class ClassifierPool:
    """Classifiers of one model, lent to one caller at a time, opened when first needed.

    Args:
        model: The flatbuffer, or its path.
        normalization: Mean and std of training.
        output: ``logits`` or ``probabilities``.
        size: Most interpreters open at once; callers beyond it wait.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty.
    """

    def __init__(
        self,
        model: Path | bytes,
        normalization: Normalization,
        output: Literal["logits", "probabilities"],
        *,
        size: int,
        threads: int = 1,
        delegate: str = "",
    ) -> None:
        for name, value in (("size", size), ("threads", threads)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidInputError(f"a pool's {name} must be a positive integer", received=repr(value))
        self._open: Callable[[], Classifier] = functools.partial(
            Classifier, model, normalization, output, threads=threads, delegate=delegate
        )
        # The first one is opened now, so that a missing runtime or delegate shows when a model is
        # loaded and not at its first request.
        first = self._open()
        self.input_shape = first.input_shape
        self._free: queue.LifoQueue[Classifier | None] = Places()
        for each in (*[None] * (size - 1), first):
            self._free.put(each)

    @contextlib.contextmanager
    def lend(self) -> Iterator[Classifier]:
        """Lend a classifier for the duration of the block; one that fails there is opened anew when it is needed next.

        An accelerator that was unplugged, or reset itself, is found again by that.
        """
        classifier = self._free.get()
        try:
            classifier = classifier or self._open()
            yield classifier
        except BaseException:
            if classifier is not None:
                classifier.close()
            self._free.put(None)
            raise
        self._free.put(classifier)


def open_pool(
    path: Path,
    fallback: Path | None,
    normalization: Normalization,
    output: Literal["logits", "probabilities"],
    *,
    size: int,
    threads: int,
    delegate: str,
) -> ClassifierPool:
    """A pool on the delegate, or of the fallback on the processor: without a delegate, or where its library is missing.

    Raises:
        DeviceError: If no accelerator answers, as where another process has it: the processor in its place would make
            some answers slow, and nobody would know which.
    """
    if not delegate:
        return ClassifierPool(fallback or path, normalization, output, size=size, threads=threads)
    try:
        return ClassifierPool(path, normalization, output, size=size, threads=threads, delegate=delegate)
    except MissingDependencyError as error:
        if fallback is None:
            raise
        warnings.warn(f"running on the processor, which is slower: {error}", UserWarning, stacklevel=2)
        return ClassifierPool(fallback, normalization, output, size=size, threads=threads)
    except DeviceError as error:
        if fallback is None:
            raise
        raise DeviceError(
            error.rule,
            received=error.received,
            remedy=f"{error.remedy}, or have the processor answer: {_ON_PROCESSOR}",
        ) from error
