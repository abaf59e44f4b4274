"""Making predictions face reality: int8 files of found networks, evaluated and measured."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.comparison import Comparison, Searched
from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.files import write_atomically
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.core.workers import Executor, each
from foxnas_mlflow.data import Preprocessing, calibration_images, evaluate, packed, prepared_batches, unpacked
from foxnas_mlflow.flavor import SubnetModel, TfliteModel, load_model
from foxnas_mlflow.tracking.inputs import TrainedSupernet
from foxnas_mlflow.workflows._evaluation import EvaluatorMaking, evaluator_making
from foxnas_mlflow.workflows._images import CALIBRATION_IMAGES
from foxnas_mlflow.workflows._timers import first_answering, open_meter, time_subnet

_MADE = ".made"
"""End of the name of a file that is converted and evaluated, and not yet measured."""


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
        directory: New directory that the model is downloaded to.

    Raises:
        InvalidFormatError: If it is no int8 model of a network of a space.
    """
    directory.mkdir()
    model = load_model(model_uri, str(directory))
    if not isinstance(model, TfliteModel) or model.architecture is None:
        raise InvalidFormatError("the found network must be an int8 model with its architecture", received=model_uri)
    # A file for an Edge TPU runs there only; its twin for processors has the same answers.
    path = model.fallback or model.path
    return Found(path.read_bytes(), model.architecture)


def find_searched(subnet_uri: str, directory: Path) -> Searched | None:
    """What a search measured of a network that it registered; None where it had no device or no supernet.

    Args:
        subnet_uri: ``models:/name/version``.
        directory: New directory that the model is downloaded to.
    """
    directory.mkdir()
    model = load_model(subnet_uri, str(directory))
    known = model.details if isinstance(model, SubnetModel) else {}
    if not {"evaluated_accuracy", "measured_latency_ms"} <= set(known):
        return None
    return Searched(
        float(known["evaluated_accuracy"]),
        float(known["evaluated_accuracy_standard_error"]),
        float(known["measured_latency_ms"]),
        str(known["device"]),
    )


def compare(
    found: Sequence[Found],
    others: Sequence[Architecture],
    *,
    supernet: TrainedSupernet,
    predictors: PredictorSet,
    confidence: float,
    target: Target,
    device: str,
    compiler_image: str = "",
    executor: Executor | None = None,
    workers: int = 1,
    seed: int,
    directory: Path,
    on_row: Callable[[int, int], None] = lambda done, total: None,
) -> list[Comparison]:
    """Convert and evaluate networks, then measure them; what is finished of each is on disk.

    Args:
        found: The found networks.
        others: Networks of the front.
        supernet: Gives them weights, and images to evaluate them on.
        predictors: What predicted them.
        confidence: Of the search.
        target: The target.
        device: Where to measure; empty: nowhere.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        executor, workers: Where networks are converted, and how many at once; None: here, one by one. Boards that the
            executor has are measured from there.
        seed: Seed of the choice of calibration images.
        directory: Where the results are kept; those that are there are not made again.
        on_row: Told of networks done and all networks.

    Raises:
        ConversionError, DeviceError: If a network cannot be converted or measured.
    """
    plan = [*(f.architecture for f in found), *others]
    missing = [i for i in range(len(plan)) if not any((directory / f"{i}{end}").exists() for end in (".json", _MADE))]

    def keep(asked: _Asked, made: _Made) -> None:
        content = json.dumps(made.figures).encode() + b"\n" + made.data
        write_atomically(directory / f"{asked.place}{_MADE}", content)

    each(
        _Converting(evaluator_making(supernet, image_sizes=supernet.space.image_sizes, seed=seed), target),
        [_Asked(i, plan[i], found[i].data if i < len(found) else None) for i in missing],
        executor=executor,
        n=workers,
        on_result=keep,
    )
    rows = []
    with contextlib.ExitStack() as stack:
        measure = _measure(stack, target, device, compiler_image, executor)
        for i, architecture in enumerate(plan):
            path = directory / f"{i}.json"
            if not path.exists():
                made = directory / f"{i}{_MADE}"
                figures, _, data = made.read_bytes().partition(b"\n")
                # Written in one step: a kill leaves all of a network's figures or none.
                write_atomically(path, json.dumps({**json.loads(figures), **measure(data)}))
                made.unlink()
            kept = json.loads(path.read_text(encoding="utf-8"))
            correct = unpacked(kept.pop("correct"), kept["n_images"])
            predicted = predictors.predict_table([architecture], confidence=confidence)
            rows.append(
                Comparison(
                    architecture=architecture,
                    role="found" if i < len(found) else "front",
                    predicted_accuracy=predicted["accuracy"][0],
                    predicted_latency_ms=predicted["latency_ms"][0],
                    predicted_latency_upper_ms=predictors.latency_bound_ms(architecture, confidence),
                    correct=correct,
                    **kept,
                )
            )
            on_row(i + 1, len(plan))
    return rows


@dataclass(frozen=True)
class _Asked:
    """A network to convert.

    Attributes:
        place: Its number in the comparison.
        architecture: The network.
        data: Its int8 file, where there is one already.
    """

    place: int
    architecture: Architecture
    data: bytes | None


@dataclass(frozen=True)
class _Made:
    """An int8 file, and how often it is right: values of a `Comparison`."""

    data: bytes
    figures: dict[str, Any]


@dataclass(frozen=True)
class _Converting:
    """Converts a supernet's subnets and evaluates their int8 files, where it is asked to."""

    making: EvaluatorMaking
    target: Target

    def __call__(self) -> Callable[[_Asked], _Made]:
        evaluator = functools.cache(self.making.evaluator)

        def make(asked: _Asked) -> _Made:
            # What only conversions need is made when the first is asked for.
            data = asked.data or self._convert(asked.architecture, evaluator().weights(asked.architecture))
            correct = self._evaluate(data, asked.architecture)
            return _Made(
                data,
                {
                    "accuracy": 100 * float(correct.mean()),
                    "n_images": len(correct),
                    "correct": packed(correct),
                },
            )

        return make

    def _convert(self, architecture: Architecture, weights: Mapping[str, NDArray[Any]]) -> bytes:
        """The int8 file of a subnet with inherited weights."""
        from foxnas_mlflow.tflite import convert

        dataset, preprocessing = self.making.dataset, self._preprocessing(architecture)
        conversion = convert(
            build_network(self.making.space, architecture),
            weights,
            calibration_images(dataset, preprocessing, CALIBRATION_IMAGES, seed=self.making.seed),
            normalization=dataset.normalization,
            labels=dataset.labels,
            architecture=architecture,
            runtime=self.target.int8_runtime("compare"),
        )
        return conversion.data

    def _evaluate(self, data: bytes, architecture: Architecture) -> NDArray[np.bool_]:
        """Whether each of the validation images is answered right, in their order."""
        from foxnas_mlflow.tflite import Int8Model

        batches = prepared_batches(self.making.dataset.val, self._preprocessing(architecture))
        (evaluation,) = evaluate(batches, Int8Model(data).logits)
        return evaluation.correct

    def _preprocessing(self, architecture: Architecture) -> Preprocessing:
        return self.making.dataset.preprocessing(architecture.image_size)


def _measure(
    stack: contextlib.ExitStack, target: Target, device: str, compiler_image: str, executor: Executor | None
) -> Callable[[bytes], dict[str, Any]]:
    """Latency of an int8 file on the device, as values of a `Comparison`; nothing without a device."""
    if not device:
        return lambda data: {}
    board = first_answering(device, executor)
    measure_int8 = stack.enter_context(open_meter(target, board, compiler_image=compiler_image, executor=executor))

    def timed(data: bytes) -> dict[str, Any]:
        timing = time_subnet(measure_int8, data)
        return {"latency_ms": timing.latency_ms, "latency_valid": not timing.problems}

    return timed
