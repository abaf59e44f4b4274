"""What entry points are given by a name: supernets, subnets, predictors and tables of measurements.

Each comes as a path or as a URI of MLflow (``models:/NAME/VERSION``, ``runs:/RUN/PATH``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, InvalidMeasurementsError
from foxnas_mlflow.core.measurements import Measurement, read_measurements
from foxnas_mlflow.core.predictors import PredictorSet, load_predictors, reference_predictors
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.data import ImageDataset, load_dataset
from foxnas_mlflow.data.preprocess import WHITE
from foxnas_mlflow.flavor import SubnetModel, SupernetModel, load_model
from foxnas_mlflow.tracking.registry import fixed_uri, is_version, list_versions, newest, registered_name, version_uri
from foxnas_mlflow.tracking.run import download_artifact

MEASUREMENTS, SPACE = "measurements.csv", "space.json"
"""Artifacts of a run that sampled: the rows, and the search space that they belong to."""

NOISE_FLOOR = "sample/noise_floor"
"""Metric of such a run: root mean square of the accuracies' standard errors, in points."""


@dataclass(frozen=True, eq=False)
class TrainedSupernet:
    """A supernet and the images that it was trained on.

    Attributes:
        uri: Where it was loaded from.
        model: The supernet.
        dataset: Its images, split and normalised as in training.
    """

    uri: str
    model: SupernetModel
    dataset: ImageDataset

    @property
    def space(self) -> SearchSpace:
        """Its search space."""
        return self.model.space

    @property
    def digest(self) -> str:
        """SHA-256 of weights, space and images: what an accuracy depends on."""
        content = hashlib.sha256(f"{self.space.digest} {self.dataset.digest}".encode())
        for name, values in sorted(self.model.weights.items()):
            content.update(name.encode())
            content.update(values.tobytes())
        return content.hexdigest()


def open_supernet(uri: str, *, data: str = "", name: str = "foxnas") -> TrainedSupernet:
    """Load a supernet and its images.

    Args:
        uri: Model URI; empty: the newest version of ``{name}-supernet``.
        data: Where its images are now; empty: where they were in training.
        name: Prefix of registered models.

    Raises:
        InvalidInputError: If there is no such supernet, or the images are not those of its training.
        MlflowException: If there is no such model.
    """
    if not uri:
        registered = registered_name(name, "supernet")
        version = newest(list_versions(registered))
        if version is None:
            raise InvalidInputError(
                "supernet must be the URI of a registered supernet",
                received=f"none, and there is no model {registered!r}",
                remedy="train one with: foxnas supernet",
            )
        uri = version_uri(registered, version)
    uri = fixed_uri(uri)
    model = load_model(uri)
    if not isinstance(model, SupernetModel):
        raise InvalidFormatError("supernet must be a model of kind 'supernet'", received=uri)
    config = model.config
    dataset = load_dataset(
        data or config["data"],
        seed=config["seed"],
        max_train=config["max_train"] or None,
        sizes=model.space.image_sizes,
        digest=config["data_digest"],
        background=config.get("background", WHITE),
    )
    if dataset.digest != config["data_digest"]:
        # Other images, or the same ones split otherwise, may have been trained on.
        raise InvalidInputError(
            "data must be the images that the supernet was trained on",
            received=f"{dataset.source} with the digest {dataset.digest[:12]}, not {config['data_digest'][:12]}",
            remedy="give the same images with data, or train a supernet on these",
        )
    if model.preprocessing is not None:
        dataset = dataclasses.replace(dataset, normalization=model.preprocessing.normalization)
    return TrainedSupernet(uri, model, dataset)


def open_subnet(uri: str) -> tuple[SubnetModel, Mapping[str, NDArray[Any]], str]:
    """Load a registered subnet that has weights.

    Args:
        uri: Model URI.

    Returns:
        The subnet, its weights, and its URI with the version in place of an alias.

    Raises:
        InvalidInputError: If it is no URI, or the subnet has no weights.
        InvalidFormatError: If it is another kind of model.
        MlflowException: If there is no such model.
    """
    if not uri or Path(uri).is_file():
        raise InvalidInputError(
            "subnet must be the model URI of a subnet with weights",
            received=uri or None,
            remedy="make one with: foxnas search --supernet models:/foxnas-supernet/1",
        )
    uri = fixed_uri(uri)
    model = load_model(uri)
    if not isinstance(model, SubnetModel):
        raise InvalidFormatError(
            "subnet must be a model of kind 'subnet'", received=f"{uri}: {type(model).__name__.removesuffix('Model')}"
        )
    if model.weights is None:
        raise InvalidInputError(
            "the subnet must have weights",
            received=f"{uri} (weights=none)",
            remedy="search again with --supernet, which gives the found network its weights",
        )
    return model, model.weights, uri


def open_predictors(source: str, target: str) -> tuple[PredictorSet, str]:
    """Load predictors, and say where they are from: a URI, a path, or ``reference``.

    Args:
        source: Model URI, or path of a JSON file; empty or ``reference``: those packaged for the target.
        target: Name of the target.

    Raises:
        OutOfDomainError: If none are packaged.
        InvalidFormatError: If it is something else.
        MlflowException: If there is no such model.
    """
    if source in ("", "reference"):
        return reference_predictors(target), "reference"
    if not is_uri(source):
        return load_predictors(source), source
    source = fixed_uri(source)
    model = load_model(source)
    if not isinstance(model, PredictorSet):
        raise InvalidFormatError("predictors must be a model of kind 'predictors'", received=source)
    return model, source


def open_measurements(source: str, directory: Path) -> tuple[list[Measurement], SearchSpace | None]:
    """Read a table of measurements, and the search space beside it if there is one.

    Args:
        source: Path of the file, URI of the artifact, or URI of a model whose run has it.
        directory: Where artifacts are downloaded to.

    Raises:
        InvalidMeasurementsError: If there is no such table or it cannot be used.
        MlflowException: If there is no such run or model.
    """
    if not is_uri(source):
        return read_measurements(source), None
    if source.startswith("models:/"):
        run_id = _run_of(source)
        if run_id is None:
            raise InvalidMeasurementsError("the model must have been logged by a run", received=source)
        source = f"runs:/{run_id}/{MEASUREMENTS}"
    if not source.startswith("runs:/") or source.count("/") != 2:
        return read_measurements(mlflow.artifacts.download_artifacts(source, dst_path=str(directory))), None
    run_id, name = source.removeprefix("runs:/").split("/")
    rows = read_measurements(download_artifact(run_id, name, directory))
    if not any(file.path == SPACE for file in MlflowClient().list_artifacts(run_id)):
        return rows, None
    space = json.loads(download_artifact(run_id, SPACE, directory).read_bytes())
    return rows, SearchSpace.from_dict(space)


def origin_of(source: str) -> dict[str, str]:
    """What the run of a table sampled: ``supernet``, ``target``, ``data``, ``data_digest``, each where it is known."""
    run_id = _run_of(source)
    if run_id is None:
        return {}
    run = mlflow.get_run(run_id)
    known = {key: run.data.params.get(f"cfg.{key}", "") for key in ("data", "data_digest")}
    known["target"] = run.data.tags.get("foxnas.target", "")
    supernet = run.data.params.get("cfg.supernet", "")
    # What an alias, a stage or "latest" meant then is not known any more.
    if is_version(supernet):
        known["supernet"] = supernet
    return {key: value for key, value in known.items() if value}


def _run_of(source: str) -> str | None:
    """The run that a URI names, or that logged the model that it names; None: it is another."""
    if source.startswith("models:/"):
        run_id: str | None = mlflow.models.get_model_info(source).run_id
        return run_id
    return run_in(source)


def run_in(uri: str) -> str | None:
    """The run that ``runs:/RUN/PATH`` names; None: it is another URI, or a path."""
    return uri.split("/")[1] if uri.startswith("runs:/") else None


def noise_floor(source: str) -> float | None:
    """Standard error (points) of a table's accuracies, or None where its run does not tell."""
    run_id = run_in(source)
    if run_id is None:
        return None
    value = mlflow.get_run(run_id).data.metrics.get(NOISE_FLOOR)
    return None if value is None else float(value)


def is_uri(source: str) -> bool:
    """Whether a source is MLflow's to open rather than a path."""
    return "://" in source or source.startswith(("models:/", "runs:/"))
