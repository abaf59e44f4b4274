"""What `mlflow.pyfunc` calls: one wrapper a kind. Errors become `MlflowException` with one clean line.

A scoring server answers an `MlflowException` with its message and status 400, and anything else
with a stack trace, which would show paths of the server to whoever sent a broken image.
"""

from __future__ import annotations

import functools
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INTERNAL_ERROR, INVALID_PARAMETER_VALUE
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.errors import FoxNasError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.data.preprocess import MAX_PIXELS
from foxnas_mlflow.data.received import checked_pixels, received_image
from foxnas_mlflow.flavor._models import SubnetModel, SupernetModel, TfliteModel
from foxnas_mlflow.runtime import EDGETPU_DELEGATE, ClassifierPool, open_pool

if TYPE_CHECKING:
    from foxnas_mlflow.core.predictors import PredictorSet

_logger = logging.getLogger(__name__)
_F = TypeVar("_F", bound=Callable[..., Any])

MAX_BATCH = 1024
"""Most images of one request."""


def default_model_config(kind: str) -> dict[str, Any]:
    """Options of `mlflow.pyfunc.load_model(model_config=...)` and their defaults.

    - ``threads``: threads of one inference.
    - ``pool_size``: most interpreters open at once; 0 means one for each processor.
    - ``delegate``: shared library of a delegate, empty for the processor.
    - ``max_pixels``: largest image accepted, width x height.
    """
    if kind not in ("tflite", "edgetpu"):
        return {}
    delegate = EDGETPU_DELEGATE if kind == "edgetpu" else ""
    return {"threads": 1, "pool_size": 0, "delegate": delegate, "max_pixels": MAX_PIXELS}


def clean_errors(function: _F) -> _F:
    """Turn every error into an `MlflowException` that shows nothing of this machine."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except MlflowException:
            raise
        except FoxNasError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        except Exception as error:
            _logger.exception("prediction failed")
            raise MlflowException("prediction failed inside the model; its log has the details", INTERNAL_ERROR) from (
                error
            )

    return wrapper  # type: ignore[return-value]


class PredictorsPyfunc:
    """Architectures in, accuracy (percent) and latency (ms) with intervals out."""

    def __init__(self, predictors: PredictorSet) -> None:
        self._predictors = predictors

    def get_raw_model(self) -> PredictorSet:
        """The native model."""
        return self._predictors

    @clean_errors
    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Predict one row an architecture.

        Args:
            model_input: A table or mapping with the column ``architecture`` of JSON texts, or a
                sequence of them.
            params: ``confidence`` of the two-sided prediction interval, in (0, 1).
        """
        confidence = float((params or {}).get("confidence", 0.95))
        return pd.DataFrame(self._predictors.predict_table(_architectures(model_input), confidence))


def subnet_row(model: SubnetModel) -> dict[str, str | int | float | bool]:
    """What a subnet answers: its architecture, and what is known of it in one word or number."""
    facts = {key: value for key, value in model.details.items() if isinstance(value, str | int | float | bool)}
    return {"architecture": model.architecture.to_json(), **facts}


class SubnetPyfunc:
    """A subnet answers every input row with what is known of it: architecture and predictions."""

    def __init__(self, model: SubnetModel) -> None:
        self._model = model
        self._row = subnet_row(model)

    def get_raw_model(self) -> SubnetModel:
        """The native model."""
        return self._model

    @clean_errors
    def predict(self, model_input: Any = None, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """The stored facts, one row for each input row, and one row when there is no input."""
        n_rows = 1 if model_input is None else len(model_input)
        return pd.DataFrame([self._row] * n_rows, columns=list(self._row))


class SupernetPyfunc:
    """Architectures of its space in, what each network costs out.

    Classifying needs statistics of the chosen subnet, which training images give: `foxnas sample`
    and `foxnas search` evaluate subnets, and register the one to use.
    """

    def __init__(self, model: SupernetModel) -> None:
        self._model = model

    def get_raw_model(self) -> SupernetModel:
        """The native model."""
        return self._model

    @clean_errors
    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Count one network a row.

        Args:
            model_input: A table or mapping with the column ``architecture`` of JSON texts, or a
                sequence of them.
            params: None are taken.

        Returns:
            ``params``, ``macs``, ``int8_size_bytes`` and ``peak_activation_bytes``.
        """
        rows = [network_cost(build_network(self._model.space, a)) for a in _architectures(model_input)]
        columns = ("params", "macs", "int8_size_bytes", "peak_activation_bytes")
        return pd.DataFrame({column: [int(getattr(row, column)) for row in rows] for column in columns})


class TflitePyfunc:
    """Images in, labels and probabilities out."""

    def __init__(self, model: TfliteModel, options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(default_model_config("tflite")))
        if unknown:
            raise InvalidInputError(
                f"model_config has only the keys {sorted(default_model_config('tflite'))}", received=f"also {unknown}"
            )
        self._model, self._rejection = model, model.rejection
        self._delegate = str(options["delegate"])
        self._max_pixels = int(options["max_pixels"])
        self._threads = int(options["threads"])
        self._size = int(options["pool_size"]) or n_processors()
        self._process, self._starts = 0, dict[int, threading.Lock]()
        self._start()

    def _start(self) -> None:
        """Make what a process cannot have of another: threads do not survive a fork, and locks may have been held."""
        process = os.getpid()
        with self._starts.setdefault(process, threading.Lock()):
            if self._process != process:
                self._lock = threading.Lock()
                self._pools = {self._threads: self._open(self._threads)}
                self._workers = ThreadPoolExecutor(self._size, thread_name_prefix="foxnas-classify")
                # Last: who finds it uses the others.
                self._process = process

    def get_raw_model(self) -> TfliteModel:
        """The native model."""
        return self._model

    @clean_errors
    def predict(self, model_input: Any, params: Mapping[str, Any] | None = None) -> pd.DataFrame:
        """Classify images.

        Args:
            model_input: A table or mapping with a column ``image``, a sequence of images, or an
                array (n, height, width, channels). An image of a column is the bytes of a JPEG or
                PNG file, their base64 text (also as a data URI, URL-safe or unpadded), or an array
                (height, width, channels). Arrays are uint8 in 0..255, or float in 0..1, at the
                network's own size. Under the default signature MLflow lets tables of files and
                arrays through, and refuses lists.
            params: ``top_k``: if above 1, columns ``top_labels`` and ``top_probabilities`` are
                added. ``threads``: threads of one inference; 0 means as configured.

        Returns:
            One row an image: ``label``, ``probability``, and ``probabilities`` of all classes in
            the order of the model's labels; ``rejected`` where the model knows when an image is none of them.
        """
        values = dict(params or {})
        top_k = _integer("top_k", values.get("top_k", 1), 1, len(self._model.labels))
        threads = _integer("threads", values.get("threads", 0), 0, n_processors()) or self._threads
        images = _column(model_input, "image")
        if len(images) > MAX_BATCH:
            raise InvalidInputError(f"a request has at most {MAX_BATCH} images", received=len(images))
        if self._process != os.getpid():
            self._start()
        classify = functools.partial(self._classify, self._pool(threads))
        # Images of one request are spread over the interpreters; one alone skips the hand-over.
        rows = [classify(images[0])] if len(images) == 1 else list(self._workers.map(classify, images))
        return self._table(rows, top_k)

    def _classify(self, pool: ClassifierPool, image: Any) -> NDArray[np.float32]:
        pixels = self._pixels(image, pool.input_shape)
        with pool.lend() as classifier:
            return classifier(pixels)

    def _pixels(self, image: Any, shape: tuple[int, int, int]) -> NDArray[Any]:
        """One image as uint8, or float in 0..1, of the network's input shape."""
        image = received_image(image)
        if isinstance(image, bytes):
            return self._model.preprocessing.decode(image, max_pixels=self._max_pixels)
        if image.shape != shape:
            raise InvalidInputError(
                f"an image array must have the shape {shape} (height, width, channels)",
                received=f"shape {image.shape}",
                remedy="resize it, or send the JPEG or PNG file itself",
            )
        return checked_pixels(image)

    def _table(self, rows: Sequence[NDArray[np.float32]], top_k: int) -> pd.DataFrame:
        labels = self._model.labels
        probabilities = np.stack(rows) if rows else np.empty((0, len(labels)), np.float32)
        best = probabilities.argmax(axis=1)
        columns: dict[str, Any] = {
            "label": [labels[i] for i in best],
            "probability": probabilities[np.arange(len(best)), best].astype(float),
            "probabilities": probabilities.tolist(),
        }
        if self._rejection is not None:
            columns["rejected"] = self._rejection.rejects(probabilities).tolist() if rows else []
        if top_k > 1:
            # Stable, so that ties come in the order of the labels, as argmax has them.
            order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
            columns["top_labels"] = [[labels[i] for i in row] for row in order]
            columns["top_probabilities"] = np.take_along_axis(probabilities, order, axis=1).tolist()
        return pd.DataFrame(columns)

    def _pool(self, threads: int) -> ClassifierPool:
        with self._lock:
            if threads not in self._pools:
                self._pools[threads] = self._open(threads)
            return self._pools[threads]

    def _open(self, threads: int) -> ClassifierPool:
        model = self._model
        return open_pool(
            Path(model.path),
            model.fallback,
            model.preprocessing.normalization,
            model.output,
            size=self._size,
            threads=threads,
            delegate=self._delegate,
        )


def _architectures(model_input: Any) -> list[Architecture]:
    texts = _column(model_input, "architecture")
    return [text if isinstance(text, Architecture) else Architecture.from_json(str(text)) for text in texts]


def images_of(model_input: Any) -> list[bytes | NDArray[Any]]:
    """The images of an input: files as bytes, arrays as uint8 or float in 0..1, of any shape.

    Args:
        model_input: As for `TflitePyfunc.predict`.

    Raises:
        InvalidInputError: If it has no column ``image``, or an item is no image.
    """
    images = (received_image(image) for image in _column(model_input, "image"))
    return [image if isinstance(image, bytes) else checked_pixels(image) for image in images]


def _column(model_input: Any, name: str) -> Sequence[Any]:
    """The items of an input, however MLflow handed it over."""
    if isinstance(model_input, pd.DataFrame | Mapping):
        if name not in model_input:
            raise InvalidInputError(
                f"the input must have the column {name!r}", received=f"columns {list(map(str, model_input))}"
            )
        model_input = model_input[name]
    if isinstance(model_input, pd.Series):
        return model_input.tolist()
    if isinstance(model_input, str | bytes | Architecture):
        return [model_input]
    if isinstance(model_input, np.ndarray):
        if name == "image" and model_input.ndim not in (1, 4):
            raise InvalidInputError(
                "a batch of images must have the shape (n, height, width, channels)",
                received=f"shape {model_input.shape}",
                remedy="add the missing axis, for one image batch[None]",
            )
        return list(model_input)
    if isinstance(model_input, Sequence):
        return list(model_input)
    raise InvalidInputError(
        f"the input must be a table with the column {name!r}, an array or a list",
        received=f"a {type(model_input).__name__}",
    )


def _integer(name: str, value: Any, lowest: int, highest: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or not lowest <= value <= highest:
        raise InvalidInputError(f"{name} must be an integer from {lowest} to {highest}", received=repr(value))
    return int(value)
