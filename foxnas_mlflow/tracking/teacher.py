"""Weights and answers of models that MLflow keeps, for a training to begin with and to learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.flavor import FLAVOR_NAME, SubnetModel, SupernetModel, TfliteModel, load_model


@dataclass(frozen=True, eq=False)
class AnsweringTeacher:
    """A model that a training learns from by its answers.

    Attributes:
        answer: Its probabilities (n, n_classes) for uint8 images (n, height, width, channels).
        image_size: Size of the images that `answer` takes; None: any.
    """

    answer: Callable[[NDArray[np.uint8]], NDArray[np.float64]]
    image_size: int | None


def open_init(uri: str) -> SupernetModel:
    """The supernet behind a URI.

    Raises:
        InvalidInputError: If it is another kind of model.
        MlflowException: If there is no such model.
    """
    model = load_model(uri)
    if not isinstance(model, SupernetModel):
        raise InvalidInputError("init must be the URI of a supernet", received=f"{uri}, a {type(model).__name__}")
    return model


def open_teacher(uri: str, *, labels: Sequence[str], channels: int) -> SupernetModel | SubnetModel | AnsweringTeacher:
    """The model behind a URI, as a teacher of these classes.

    One of ours with weights is itself; any other answers: an int8 file of ours, or a pyfunc: it gets an array of uint8
    images, or of floats in 0..1 where its signature says float, with channels last or, where its signature says so,
    first; and gives one probability a class, in the order of the labels.

    Args:
        uri: Its URI.
        labels: Our classes in order.
        channels: Our number of colour channels.

    Raises:
        InvalidInputError: If its classes or channels are others, as far as it says.
        MlflowException: If there is no such model.
    """
    info = mlflow.models.get_model_info(uri)
    if FLAVOR_NAME in info.flavors:
        model = load_model(uri)
        if isinstance(model, SupernetModel | SubnetModel):
            if isinstance(model, SubnetModel) and model.weights is None:
                raise InvalidInputError("a teacher must have weights", received=f"{uri}, an untrained subnet")
            _check_labels(uri, model.labels, labels, model.space.n_classes)
            _check_channels(uri, model.space.in_channels, channels)
            return model
        if not isinstance(model, TfliteModel):
            raise InvalidInputError("a teacher must classify images", received=f"{uri}, a {type(model).__name__}")
        _check_labels(uri, model.labels, labels, len(model.labels))
        _check_channels(uri, model.preprocessing.channels, channels)
        return _pyfunc_teacher(uri, channels, model.preprocessing.image_size)
    return _pyfunc_teacher(uri, channels)


def _pyfunc_teacher(uri: str, channels: int, image_size: int = 0) -> AnsweringTeacher:
    model = mlflow.pyfunc.load_model(uri)
    shape, kind = _tensor_input(model)
    first = len(shape) == 4 and shape[1] == channels and shape[3] != channels
    declared = (shape[2] if first else shape[1]) if len(shape) == 4 else 0
    size = image_size or max(declared, 0)

    def answer(images: NDArray[np.uint8]) -> NDArray[np.float64]:
        shown: NDArray[Any] = images.astype(np.float32) / 255 if kind == "f" else images
        try:
            return _probabilities(model.predict(np.ascontiguousarray(shown.transpose(0, 3, 1, 2)) if first else shown))
        except (MlflowException, RuntimeError, TypeError, ValueError) as error:
            raise InvalidInputError(
                "a teacher must answer images given as an array (n, height, width, channels)",
                received=f"{uri}: {str(error).strip().splitlines()[0]}",
            ) from error

    return AnsweringTeacher(answer, size or None)


def _tensor_input(model: Any) -> tuple[tuple[int, ...], str]:
    """Shape and kind of number of the tensor that a model declares as its input, if it does."""
    signature = model.metadata.signature
    if signature is None or signature.inputs is None or not signature.inputs.is_tensor_spec():
        return (), "u"
    spec = signature.inputs.inputs[0]
    return tuple(int(n) for n in spec.shape), spec.type.kind


def _probabilities(answer: Any) -> NDArray[np.float64]:
    if isinstance(answer, pd.DataFrame):
        answer = np.array(answer["probabilities"].tolist()) if "probabilities" in answer else answer.to_numpy()
    elif isinstance(answer, dict):
        answer = next(iter(answer.values()))
    return np.asarray(answer, np.float64)


def _check_labels(uri: str, its: Sequence[str], ours: Sequence[str], n_classes: int) -> None:
    if n_classes != len(ours):
        raise InvalidInputError(f"a teacher must have the {len(ours)} classes of the images", received=f"{n_classes}")
    differing = [f"{a!r} instead of {b!r}" for a, b in zip(its, ours, strict=False) if a != b]
    if differing:
        raise InvalidInputError("a teacher must have the classes of the images, in order", received=differing[0])


def _check_channels(uri: str, its: int, ours: int) -> None:
    if its != ours:
        raise InvalidInputError(
            f"a teacher must take images of {ours} channels, as the training's are", received=f"{its} channels in {uri}"
        )
