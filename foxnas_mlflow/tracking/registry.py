"""Registered models: their names, versions, tags and figures."""

from __future__ import annotations

from collections.abc import Mapping

import mlflow
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from foxnas_mlflow.core.errors import InvalidInputError


def registered_name(prefix: str, kind: str, target: str = "") -> str:
    """Name of the registered model of a kind.

    Args:
        prefix: The parameter ``name`` of every entry point, default ``foxnas``.
        kind: Kind of the model.
        target: Name of the target; a supernet has none.

    Raises:
        InvalidInputError: If the name has ``/`` or ``:``, which MLflow's URIs use.
    """
    parts = {
        "supernet": (prefix, "supernet"),
        "predictors": (prefix, "predictors", target),
        "subnet": (prefix, "subnet", target),
        "tflite": (prefix, target),
        "edgetpu": (prefix, target, "edgetpu"),
    }
    name = "-".join(parts[kind])
    return check_name(name)


def check_name(name: str) -> str:
    """Return a name that a registered model can have.

    Raises:
        InvalidInputError: If it cannot.
    """
    if not name.strip() or "/" in name or ":" in name:
        raise InvalidInputError("a registered model's name is not empty and has no '/' or ':'", received=repr(name))
    return name


def register(
    model_uri: str, name: str, *, tags: Mapping[str, object] | None = None, description: str | None = None
) -> ModelVersion:
    """Register a logged model as a new version.

    Args:
        model_uri: ``models:/<model id>`` (`ModelInfo.model_uri`) or ``runs:/...``.
        name: Name of the registered model; it is made if there is none.
        tags: Tags of the version.
        description: Text shown with the version.

    Returns:
        The version.

    Raises:
        InvalidInputError: If the name cannot be one.
        MlflowException: If there is no such model, or the registry refuses.
    """
    version = mlflow.register_model(
        model_uri, check_name(name), tags={key: str(value) for key, value in (tags or {}).items()}
    )
    client = MlflowClient()
    if description is not None:
        client.update_model_version(name, version.version, description=description)
    return client.get_model_version(name, version.version)


def tag_version(name: str, version: str | int | None, tags: Mapping[str, object]) -> None:
    """Set tags of a registered version; without a version (nothing was registered) do nothing."""
    if version is None:
        return
    client = MlflowClient()
    for key, value in tags.items():
        client.set_model_version_tag(name, str(version), key, str(value))


def version_metrics(version: ModelVersion) -> dict[str, float]:
    """The figures of a version: the latest value of every metric of its logged model.

    Metrics that only its run has are left out: a run may hold figures of several models.
    """
    return {key: value for key, (value, _) in version_metric_sources(version).items()}


def version_metric_sources(version: ModelVersion) -> dict[str, tuple[float, str]]:
    """The figures of a version, each with the id of the run that logged it."""
    if not version.model_id:
        return {}
    model = MlflowClient().get_logged_model(version.model_id)
    latest: dict[str, tuple[int, int, float, str]] = {}
    for metric in model.metrics or []:
        candidate = (metric.timestamp, metric.step, metric.value, metric.run_id or "")
        if metric.key not in latest or candidate[:2] >= latest[metric.key][:2]:
            latest[metric.key] = candidate
    return {key: (value, run_id) for key, (_, _, value, run_id) in latest.items()}
