"""TensorFlow Lite interpreters for serving: runtime lookup, delegates, quantization, a pool.

An interpreter is not safe under threads: shared, it fails or, worse, answers wrongly. A pool lends
each call an interpreter of its own. Nothing here imports MLflow, torch or tensorflow.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import os
import queue
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.data.preprocess import Normalization, quantize

RUNTIMES = ("ai_edge_litert", "tflite_runtime")
"""Runtimes in order of preference; full tensorflow is never loaded to serve."""

EDGETPU_DELEGATE = "libedgetpu.so.1"


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


def open_interpreter(path: Path, *, threads: int = 1, delegate: str = "") -> Any:
    """Open a model, with its tensors allocated.

    Args:
        path: The flatbuffer.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty for the processor.

    Raises:
        MissingDependencyError: If there is no runtime, or the delegate cannot be loaded.
        InvalidFormatError: If the runtime cannot open the file.
    """
    runtime = load_runtime()
    delegates = []
    if delegate:
        try:
            # Tried first: the runtime's own object complains on standard error when it cannot load.
            ctypes.CDLL(delegate)
            delegates = [runtime.load_delegate(delegate)]
        except (ValueError, OSError) as error:
            raise MissingDependencyError(
                "the delegate of this model cannot be loaded",
                received=Path(delegate).name,
                remedy="attach the accelerator and install its library",
            ) from error
    try:
        interpreter = runtime.Interpreter(
            model_path=str(path), num_threads=threads, experimental_delegates=delegates or None
        )
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        raise InvalidFormatError("a TFLite model must be one that the runtime can open", received=path.name) from error
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
        facts |= {
            f"{name}_shape": [int(n) for n in detail["shape"]],
            f"{name}_dtype": np.dtype(detail["dtype"]).name,
            f"{name}_scale": float(scale),
            f"{name}_zero_point": int(zero_point),
        }
    return facts


class Classifier:
    """One interpreter: uint8 image in, probabilities out. For one thread at a time.

    This is the "bare interpreter" that serving is compared with.

    Args:
        path: The flatbuffer.
        normalization: Mean and std of training.
        output: ``logits`` or ``probabilities``.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty.
    """

    def __init__(
        self,
        path: Path,
        normalization: Normalization,
        output: Literal["logits", "probabilities"],
        *,
        threads: int = 1,
        delegate: str = "",
    ) -> None:
        self._interpreter = open_interpreter(path, threads=threads, delegate=delegate)
        (self._input,) = self._interpreter.get_input_details()
        (self._output,) = self._interpreter.get_output_details()
        self._normalization = normalization
        self._softmax = output == "logits"
        # What normalising and quantizing do to each value of a uint8 pixel is looked up.
        self._table = self._quantize(normalization.of_levels())

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
        scale, zero_point = self._output["quantization"]
        values: NDArray[np.float32] = self.raw(image).astype(np.float32)
        if scale:
            values = (values - np.float32(zero_point)) * np.float32(scale)
        if self._softmax:
            exponentials = np.exp(values - values.max())
            values = exponentials / exponentials.sum()
        return values

    def raw(self, image: NDArray[Any]) -> NDArray[Any]:
        """The network's own output for an image, as quantized as the network is."""
        if image.dtype == np.uint8:
            batch = np.empty((1, *image.shape), dtype=self._table.dtype)
            for channel in range(image.shape[2]):
                np.take(self._table[:, channel], image[..., channel], out=batch[0, ..., channel], mode="clip")
        else:
            batch = self._quantize(self._normalization.of_unit(image))[None]
        self._interpreter.set_tensor(self._input["index"], batch)
        self._interpreter.invoke()
        output: NDArray[Any] = self._interpreter.get_tensor(self._output["index"])[0]
        return output

    def _quantize(self, values: NDArray[np.float32]) -> NDArray[Any]:
        dtype = np.dtype(self._input["dtype"])
        return values if dtype == np.float32 else quantize(values, dtype, *self._input["quantization"])


class ClassifierPool:
    """Classifiers of one model, lent to one caller at a time, opened when first needed.

    Args:
        path: The flatbuffer.
        normalization: Mean and std of training.
        output: ``logits`` or ``probabilities``.
        size: Most interpreters open at once; callers beyond it wait.
        threads: Threads of one inference.
        delegate: Shared library of a delegate, or empty.
    """

    def __init__(
        self,
        path: Path,
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
            Classifier, path, normalization, output, threads=threads, delegate=delegate
        )
        # The first one is opened now, so that a missing runtime or delegate shows when a model is
        # loaded and not at its first request. Last in, first out keeps a warm one busy.
        first = self._open()
        self.input_shape = first.input_shape
        self._free: queue.LifoQueue[Classifier] = queue.LifoQueue()
        self._free.put(first)
        self._unopened = size - 1
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def lend(self) -> Iterator[Classifier]:
        """Lend a classifier for the duration of the block."""
        classifier = self._take()
        try:
            yield classifier
        finally:
            self._free.put(classifier)

    def _take(self) -> Classifier:
        try:
            return self._free.get_nowait()
        except queue.Empty:
            pass
        with self._lock:
            may_open = self._unopened > 0
            self._unopened -= may_open
        if not may_open:
            return self._free.get()
        try:
            return self._open()
        except BaseException:
            with self._lock:
                self._unopened += 1
            raise


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
    """A pool on the delegate, or with a warning on the processor where there is a fallback."""
    try:
        return ClassifierPool(path, normalization, output, size=size, threads=threads, delegate=delegate)
    except MissingDependencyError as error:
        if fallback is None or not delegate:
            raise
        warnings.warn(f"running on the processor, which is slower: {error}", UserWarning, stacklevel=2)
        return ClassifierPool(fallback, normalization, output, size=size, threads=threads)


def n_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
