"""What each kind of model is in Python, and how it is written to and read from a directory.

| kind       | class           | files                                                             |
|------------|-----------------|-------------------------------------------------------------------|
| supernet   | `SupernetModel` | weights.safetensors, space.json                                   |
| predictors | `PredictorSet`  | predictors.json                                                   |
| subnet     | `SubnetModel`   | architecture.json, space.json, details.json, [weights.safetensors]|
| tflite     | `TfliteModel`   | model.tflite, [architecture.json]                                 |
| edgetpu    | `TfliteModel`   | model_edgetpu.tflite, [model.tflite], [architecture.json]         |

Weights are safetensors, descriptions JSON, networks flatbuffers: loading a model runs no code of it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, import_or_raise
from foxnas_mlflow.core.rejection import Rejection
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor._files import Manifest

if TYPE_CHECKING:
    from foxnas_mlflow.core.predictors import PredictorSet
    from foxnas_mlflow.core.space import SearchSpace

Weights = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, eq=False)
class SupernetModel:
    """A trained supernet.

    Attributes:
        space: Its search space.
        weights: Arrays by parameter name.
        config: What training must know to go on or to evaluate, JSON values only.
        preprocessing: How images are prepared; its image size is the largest of training.
        labels: Class names in output order; empty when the classes have no names.
    """

    space: SearchSpace
    weights: Weights
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class SubnetModel:
    """A subnet: its architecture, what is known of it, and its weights once it was trained.

    Attributes:
        architecture: The subnet.
        space: The search space that it belongs to.
        details: Predictions, certificate, provenance; JSON values only.
        weights: Arrays by parameter name, or None for an untrained subnet.
        preprocessing: How images are prepared, when there are weights.
        labels: Class names in output order; empty when the classes have no names.
    """

    architecture: Architecture
    space: SearchSpace
    details: Mapping[str, Any] = field(default_factory=dict)
    weights: Weights | None = None
    preprocessing: Preprocessing | None = None
    labels: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class TfliteModel:
    """A TensorFlow Lite classifier, for a processor or compiled for an Edge TPU.

    Attributes:
        path: The flatbuffer. It is copied when the model is saved.
        labels: Class names in output order, one for each output.
        preprocessing: How images are prepared.
        output: ``logits`` or ``probabilities``: what the network's last layer gives.
        architecture: The subnet that it was converted from, if it was one.
        weights: ``trained`` or ``random`` (a network that was only converted to be timed).
        fallback: For kind ``edgetpu``: the same network for a processor, used where no delegate is asked for, and
            with a warning where its library is not installed.
        details: Anything else worth keeping; JSON values only.
    """

    path: Path
    labels: tuple[str, ...]
    preprocessing: Preprocessing
    output: Literal["logits", "probabilities"] = "logits"
    architecture: Architecture | None = None
    weights: Literal["trained", "random"] = "trained"
    fallback: Path | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rejection(self) -> Rejection | None:
        """When an image is none of the classes, where the details say so (``details["rejection"]``)."""
        return _optional(Rejection.from_dict, self.details.get("rejection"))  # type: ignore[no-any-return]

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        object.__setattr__(self, "labels", tuple(str(label) for label in self.labels))
        if self.output not in ("logits", "probabilities"):
            raise InvalidInputError("output must be 'logits' or 'probabilities'", received=repr(self.output))
        if self.weights not in ("trained", "random"):
            raise InvalidInputError("weights must be 'trained' or 'random'", received=repr(self.weights))


def kind_of(model: object) -> str | None:
    """The kind that an object can only be, or None when it must be named."""
    if isinstance(model, SupernetModel):
        return "supernet"
    if isinstance(model, SubnetModel):
        return "subnet"
    if isinstance(model, TfliteModel):
        return "edgetpu" if model.fallback is not None else None
    return "predictors" if hasattr(model, "predict_table") else None


def write_model(model: Any, kind: str, directory: Path) -> dict[str, Any]:
    """Write a model's files and return its metadata.

    Raises:
        InvalidInputError: If the object is not one of the kind.
    """
    if kind == "predictors":
        if not hasattr(model, "predict_table"):
            raise InvalidInputError("kind 'predictors' needs a PredictorSet", received=type(model).__name__)
        model.save(directory / "predictors.json")
        return {"target": model.target}
    if kind == "supernet":
        _require(model, SupernetModel, kind)
        _write_json(model.space.to_dict(), directory / "space.json")
        _write_weights(model.weights, directory)
        return {**_image_metadata(model), "config": dict(model.config), "weights": "trained"}
    if kind == "subnet":
        _require(model, SubnetModel, kind)
        model.space.validate(model.architecture)
        (directory / "architecture.json").write_text(model.architecture.to_json(indent=2), encoding="utf-8")
        _write_json(model.space.to_dict(), directory / "space.json")
        _write_json(dict(model.details), directory / "details.json")
        if model.weights is not None:
            _write_weights(model.weights, directory)
        return {**_image_metadata(model), "weights": "none" if model.weights is None else "trained"}
    _require(model, TfliteModel, kind)
    return _write_tflite(model, kind, directory)


def read_model(directory: Path, manifest: Manifest) -> PredictorSet | SupernetModel | SubnetModel | TfliteModel:
    """Read a model whose files were checked by `read_manifest`."""
    metadata = manifest.metadata
    if manifest.kind == "predictors":
        from foxnas_mlflow.core.predictors import load_predictors

        return load_predictors(directory)
    if manifest.kind in ("tflite", "edgetpu"):
        return _read_tflite(directory, manifest)

    from foxnas_mlflow.core.space import SearchSpace

    space = SearchSpace.from_dict(_read_json(directory / "space.json"))
    image = {
        "preprocessing": _optional(Preprocessing.from_dict, metadata.get("preprocessing")),
        "labels": tuple(metadata.get("labels", ())),
    }
    if manifest.kind == "supernet":
        return SupernetModel(space, _read_weights(directory), metadata.get("config", {}), **image)
    return SubnetModel(
        Architecture.from_json((directory / "architecture.json").read_text(encoding="utf-8")),
        space,
        _read_json(directory / "details.json"),
        _read_weights(directory) if "weights.safetensors" in manifest.files else None,
        **image,
    )


def main_file(kind: str) -> str:
    """Name of the file that is the model itself."""
    return {
        "supernet": "weights.safetensors",
        "predictors": "predictors.json",
        "subnet": "architecture.json",
        "tflite": "model.tflite",
        "edgetpu": "model_edgetpu.tflite",
    }[kind]


def _write_tflite(model: TfliteModel, kind: str, directory: Path) -> dict[str, Any]:
    if kind == "tflite" and model.fallback is not None:
        raise InvalidInputError("only kind 'edgetpu' has a fallback", received=model.fallback.name)
    target = directory / main_file(kind)
    for source, destination in ((model.path, target), (model.fallback, directory / "model.tflite")):
        if source is not None:
            if not source.is_file():
                raise InvalidInputError("a TFLite model must be a file that exists", received=str(source))
            shutil.copyfile(source, destination)
    # A compiled file can only be opened where its delegate is; its processor twin has the same input and output.
    inspected = directory / "model.tflite"
    runtime = None
    if inspected.is_file():
        from foxnas_mlflow.runtime import inspect_model

        runtime = inspect_model(inspected)
        size, channels = model.preprocessing.image_size, model.preprocessing.channels
        if runtime["input_shape"][1:] != [size, size, channels]:
            raise InvalidInputError(
                "a network's input must be what its preprocessing makes",
                received=f"input {runtime['input_shape']}, preprocessing {size} px with {channels} channels",
            )
        if runtime["input_shape"][0] != 1:
            raise InvalidInputError(
                "a network must take one image at a time",
                received=f"a fixed batch of {runtime['input_shape'][0]}",
                remedy="convert it with a batch of 1, or one that is not fixed",
            )
        if runtime["output_shape"][-1] != len(model.labels):
            raise InvalidInputError(
                "there must be one label for each output",
                received=f"{len(model.labels)} labels, {runtime['output_shape'][-1]} outputs",
            )
    if model.architecture is not None:
        (directory / "architecture.json").write_text(model.architecture.to_json(indent=2), encoding="utf-8")
    return {
        "labels": list(model.labels),
        "preprocessing": model.preprocessing.to_dict(),
        "output": model.output,
        "weights": model.weights,
        "details": dict(model.details),
        "quantization": runtime,
    }


def _read_tflite(directory: Path, manifest: Manifest) -> TfliteModel:
    metadata = manifest.metadata
    architecture = directory / "architecture.json"
    fallback = directory / "model.tflite" if manifest.kind == "edgetpu" else None
    try:
        return TfliteModel(
            directory / main_file(manifest.kind),
            tuple(metadata["labels"]),
            Preprocessing.from_dict(metadata["preprocessing"]),
            metadata["output"],
            Architecture.from_json(architecture.read_text(encoding="utf-8"))
            if architecture.name in manifest.files
            else None,
            metadata["weights"],
            fallback if fallback is not None and fallback.name in manifest.files else None,
            metadata["details"],
        )
    except KeyError as error:
        raise InvalidFormatError("the metadata of a TFLite model is incomplete", received=f"no {error}") from error


def _image_metadata(model: SupernetModel | SubnetModel) -> dict[str, Any]:
    return {
        "labels": list(model.labels),
        "preprocessing": None if model.preprocessing is None else model.preprocessing.to_dict(),
    }


def _write_weights(weights: Weights, directory: Path) -> None:
    safetensors = import_or_raise("safetensors.numpy", extra="train", feature="saving weights")
    arrays = {name: np.ascontiguousarray(array) for name, array in weights.items()}
    safetensors.save_file(arrays, str(directory / "weights.safetensors"))


def _read_weights(directory: Path) -> Weights:
    safetensors = import_or_raise("safetensors.numpy", extra="train", feature="loading weights")
    weights: Weights = safetensors.load_file(str(directory / "weights.safetensors"))
    return weights


def _write_json(value: Any, path: Path) -> None:
    path.write_text(json.dumps(value, indent=1, allow_nan=False), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _require(model: object, cls: type, kind: str) -> None:
    if not isinstance(model, cls):
        raise InvalidInputError(f"kind {kind!r} needs a {cls.__name__}", received=type(model).__name__)


def _optional(read: Any, value: Any) -> Any:
    return None if value is None else read(value)
