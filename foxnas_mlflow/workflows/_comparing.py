"""Making predictions face reality: int8 files of found networks, evaluated and measured."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.comparison import Comparison
from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data import Preprocessing, calibration_images, evaluate, prepared_batches
from foxnas_mlflow.flavor import TfliteModel, load_model
from foxnas_mlflow.tracking.inputs import TrainedSupernet
from foxnas_mlflow.workflows._boards import first_answering
from foxnas_mlflow.workflows._evaluation import supernet_evaluator
from foxnas_mlflow.workflows._timers import open_meter

CALIBRATION_IMAGES = 200
"""Training images that the ranges of activations are measured on."""


@dataclass(frozen=True)
class Found:
    """The network that a search found.

    Attributes:
        data: Its int8 file.
        architecture: The network.
    """

    data: bytes
    architecture: Architecture


def find_found(model_uri: str, directory: Path) -> Found:
    """What a pipeline registered as its int8 model.

    Args:
        model_uri: ``models:/name/version``.
        directory: Where the model is downloaded to.

    Raises:
        InvalidFormatError: If it is no int8 model of a network of a space.
    """
    model = load_model(model_uri, str(directory))
    if not isinstance(model, TfliteModel) or model.architecture is None:
        raise InvalidFormatError("the found network must be an int8 model with its architecture", received=model_uri)
    # A file for an Edge TPU runs there only; its twin for processors has the same answers.
    path = model.fallback or model.path
    return Found(path.read_bytes(), model.architecture)


def compare(
    found: Found,
    others: Sequence[Architecture],
    *,
    supernet: TrainedSupernet,
    predictors: PredictorSet,
    confidence: float,
    target: Target,
    device: str,
    compiler_image: str = "",
    seed: int,
    directory: Path,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Convert, evaluate and measure networks; each is on disk before the next one begins.

    Args:
        found: The found network.
        others: Networks of the front.
        supernet: Gives them weights, and images to evaluate them on.
        predictors: What predicted them.
        confidence: Of the search.
        target: The target.
        device: Where to measure; empty: nowhere.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        seed: Seed of the choice of calibration images.
        directory: Where the results are kept; those that are there are not made again.
        on_row: Told of networks done and all networks.

    Raises:
        ConversionError, DeviceError: If a network cannot be converted or measured.
    """
    plan = [found.architecture, *others]
    rows = []
    with contextlib.ExitStack() as stack:
        measure = _measure(stack, target, device, compiler_image)
        int8 = _Int8(supernet, target, seed)
        for i, architecture in enumerate(plan):
            path = directory / f"{i}.json"
            if not path.exists():
                data = found.data if i == 0 else int8.convert(architecture)
                correct = int8.evaluate(data, architecture)
                figures = {
                    "accuracy": 100 * float(correct.mean()),
                    "n_images": len(correct),
                    "correct": np.packbits(correct).tobytes().hex(),
                }
                # Written in one step: a kill leaves all of a network's figures or none.
                write_atomically(path, json.dumps({**figures, **measure(data)}))
            kept = json.loads(path.read_text(encoding="utf-8"))
            bits = np.frombuffer(bytes.fromhex(kept.pop("correct")), dtype=np.uint8)
            predicted = predictors.predict_table([architecture], confidence=confidence)
            rows.append(
                Comparison(
                    architecture=architecture,
                    role="front" if i else "found",
                    predicted_accuracy=predicted["accuracy"][0],
                    predicted_latency_ms=predicted["latency_ms"][0],
                    predicted_latency_upper_ms=predictors.latency_bound_ms(architecture, confidence),
                    correct=np.unpackbits(bits, count=kept["n_images"]).astype(bool),
                    **kept,
                )
            )
            on_row(i + 1, len(plan))
    return rows


class _Int8:
    """Int8 files of a supernet's subnets; what only they need is made when the first is asked for."""

    def __init__(self, supernet: TrainedSupernet, target: Target, seed: int) -> None:
        self._supernet, self._target, self._seed = supernet, target, seed
        self._evaluator: Any = None

    def convert(self, architecture: Architecture) -> bytes:
        """The int8 file of a subnet with inherited weights."""
        from foxnas_mlflow.tflite import convert

        space, dataset = self._supernet.space, self._supernet.dataset
        if self._evaluator is None:
            self._evaluator = supernet_evaluator(self._supernet, image_sizes=space.image_sizes, seed=self._seed)
        preprocessing = self._preprocessing(architecture)
        conversion = convert(
            build_network(space, architecture),
            self._evaluator.weights(architecture),
            calibration_images(dataset, preprocessing, CALIBRATION_IMAGES, seed=self._seed),
            normalization=dataset.normalization,
            labels=dataset.labels,
            architecture=architecture,
            runtime="edgetpu" if self._target.runtime == "edgetpu" else "litert",
        )
        return conversion.data

    def evaluate(self, data: bytes, architecture: Architecture) -> NDArray[np.bool_]:
        """Whether each of the validation images is answered right, in their order."""
        from foxnas_mlflow.tflite import Int8Model

        batches = prepared_batches(self._supernet.dataset.val, self._preprocessing(architecture))
        (evaluation,) = evaluate(batches, Int8Model(data).logits)
        return evaluation.correct

    def _preprocessing(self, architecture: Architecture) -> Preprocessing:
        return self._supernet.dataset.preprocessing(architecture.image_size)


def _measure(
    stack: contextlib.ExitStack, target: Target, device: str, compiler_image: str
) -> Callable[[bytes], dict[str, Any]]:
    """Latency of an int8 file on the device, as values of a `Comparison`; nothing without a device."""
    if not device:
        return lambda data: {}
    measure_int8 = stack.enter_context(open_meter(target, first_answering(device), compiler_image=compiler_image))

    def timed(data: bytes) -> dict[str, Any]:
        benchmark = measure_int8(data)
        return {"latency_ms": benchmark.latency_ms_p50, "latency_valid": benchmark.valid}

    return timed
