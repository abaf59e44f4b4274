"""The MLflow flavor ``foxnas``: kinds ``predictors`` and ``subnet``.

A model is a directory of JSON files and ``foxnas.json``, which names the kind, the format version
and the SHA-256 of every other file; a file that was changed after logging is refused at load. The
package itself travels with the model (`code_paths`), because it is not on an index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import yaml
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_ALREADY_EXISTS
from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema
from mlflow.utils.environment import _mlflow_conda_env, _PythonEnv
from mlflow.utils.model_utils import _validate_and_copy_code_paths

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import FoxNasError, InvalidFormatError
from foxnas_mlflow.core.predictors import PredictorSet, load_predictors
from foxnas_mlflow.core.space import SearchSpace

FLAVOR_NAME = "foxnas"
MODEL_FORMAT = 1
KINDS = ("predictors", "subnet")
_DATA = "data"


def get_default_pip_requirements() -> list[str]:
    """The least that predicting needs; no torch, tensorflow or statsmodels."""
    return [f"{name}=={_version(name)}" for name in ("mlflow", "numpy", "pandas", "PyYAML", "scipy")]


def get_default_conda_env() -> dict[str, Any]:
    """The conda environment of `get_default_pip_requirements`."""
    env: dict[str, Any] = _mlflow_conda_env(  # type: ignore[no-untyped-call]
        additional_pip_deps=get_default_pip_requirements()
    )
    return env


def save_model(
    path: str | Path,
    *,
    kind: str,
    predictors: PredictorSet | None = None,
    architecture: Architecture | None = None,
    space: SearchSpace | None = None,
    details: Mapping[str, Any] | None = None,
    mlflow_model: Model | None = None,
) -> None:
    """Save a model.

    Args:
        path: Directory to write; must be empty or absent.
        kind: ``predictors`` or ``subnet``.
        predictors: The predictors, for kind ``predictors``.
        architecture, space: The subnet and its space, for kind ``subnet``.
        details: Predictions and certificate of a subnet.
        mlflow_model: MLflow's own description, filled in.

    Raises:
        MlflowException: If the kind is unknown or the path holds files.
    """
    path = Path(path)
    if kind not in KINDS:
        raise MlflowException(f"kind must be one of {list(KINDS)}; received {kind!r}", INVALID_PARAMETER_VALUE)
    if path.exists() and any(path.iterdir()):
        raise MlflowException(f"path must be empty; received {path}", RESOURCE_ALREADY_EXISTS)
    data = path / _DATA
    data.mkdir(parents=True)
    if kind == "predictors" and predictors is not None:
        predictors.save(data / "predictors.json")
    elif kind == "subnet" and architecture is not None and space is not None:
        (data / "architecture.json").write_text(architecture.to_json(indent=2), encoding="utf-8")
        (data / "space.json").write_text(json.dumps(space.to_dict(), indent=1), encoding="utf-8")
        (data / "details.json").write_text(json.dumps(dict(details or {}), indent=1), encoding="utf-8")
    else:
        raise MlflowException(f"kind {kind!r} needs its own arguments; see save_model", INVALID_PARAMETER_VALUE)
    files = {file.name: _sha256(file) for file in sorted(data.iterdir())}
    conf = {"format": MODEL_FORMAT, "kind": kind, "files": files}
    (data / "foxnas.json").write_text(json.dumps(conf, indent=1), encoding="utf-8")

    package = Path(__file__).resolve().parents[1]
    code = _validate_and_copy_code_paths([str(package)], str(path))  # type: ignore[no-untyped-call]
    mlflow_model = mlflow_model or Model()
    mlflow_model.signature = _signature(kind)
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module="foxnas_mlflow.flavor",
        data=_DATA,
        code=code,
        conda_env="conda.yaml",
        python_env="python_env.yaml",
    )
    mlflow_model.add_flavor(FLAVOR_NAME, kind=kind, data=_DATA, code=code, foxnas_version=__version__)
    mlflow_model.model_size_bytes = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
    mlflow_model.save(str(path / MLMODEL_FILE_NAME))
    (path / "conda.yaml").write_text(yaml.safe_dump(get_default_conda_env()), encoding="utf-8")
    (path / "requirements.txt").write_text("\n".join(get_default_pip_requirements()) + "\n", encoding="utf-8")
    python_env = _PythonEnv.current()  # type: ignore[no-untyped-call]
    python_env.to_yaml(str(path / "python_env.yaml"))


def log_model(
    *,
    kind: str,
    name: str,
    registered_model_name: str | None = None,
    metadata: dict[str, Any] | None = None,
    **kwargs: Any,
) -> Any:
    """Log a model to the active run; `kwargs` are those of `save_model`.

    Returns:
        MLflow's ModelInfo.
    """
    import foxnas_mlflow.flavor as this_module

    return Model.log(
        artifact_path=None,
        name=name,
        flavor=this_module,
        registered_model_name=registered_model_name,
        metadata=metadata,
        kind=kind,
        **kwargs,
    )


def load_model(model_uri: str) -> PredictorSet | Architecture:
    """Load a model: `PredictorSet` for kind ``predictors``, `Architecture` for kind ``subnet``.

    Raises:
        InvalidFormatError: If a file was changed after logging or the format is unknown.
    """
    path = Path(mlflow.artifacts.download_artifacts(artifact_uri=model_uri))
    data = path / _DATA
    if _checked_kind(data) == "predictors":
        return load_predictors(data)
    return Architecture.from_json((data / "architecture.json").read_text(encoding="utf-8"))


def _load_pyfunc(path: str) -> Any:
    """MLflow's entry to `mlflow.pyfunc.load_model`."""
    data = Path(path)
    try:
        kind = _checked_kind(data)
        if kind == "predictors":
            return _PredictorsModel(load_predictors(data))
        return _SubnetModel(data)
    except FoxNasError as error:
        raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error


class _PredictorsModel:
    """Architectures in, accuracy and latency with intervals out."""

    def __init__(self, predictors: PredictorSet) -> None:
        self._predictors = predictors

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        confidence = float((params or {}).get("confidence", 0.95))
        try:
            architectures = [Architecture.from_json(text) for text in model_input["architecture"]]
            table = self._predictors.predict_table(architectures, confidence)
        except KeyError as error:
            raise MlflowException("the input must have the column 'architecture'", INVALID_PARAMETER_VALUE) from error
        except FoxNasError as error:
            raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error
        return pd.DataFrame(table)


class _SubnetModel:
    """A subnet without weights: answers with its stored predictions, one row an input row."""

    def __init__(self, data: Path) -> None:
        self._details = json.loads((data / "details.json").read_text(encoding="utf-8"))

    def predict(self, model_input: pd.DataFrame, params: dict[str, Any] | None = None) -> pd.DataFrame:
        row = {key: value for key, value in self._details.items() if np.isscalar(value)}
        return pd.DataFrame([row] * len(model_input))


def _signature(kind: str) -> ModelSignature:
    names = [f"{q}{end}" for q in ("accuracy", "latency_ms") for end in ("", "_lower", "_upper")]
    inputs = Schema([ColSpec("string", "architecture")])
    if kind == "subnet":
        return ModelSignature(inputs=inputs)
    return ModelSignature(
        inputs=inputs,
        outputs=Schema([ColSpec("double", name) for name in names]),
        params=ParamSchema([ParamSpec("confidence", "double", 0.95)]),
    )


def _checked_kind(data: Path) -> str:
    """The kind of a model whose files are as they were logged.

    Raises:
        InvalidFormatError: If they are not, or the format or kind is unknown.
    """
    try:
        conf = json.loads((data / "foxnas.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidFormatError("a foxnas model must hold a readable foxnas.json", received=data.name) from error
    if conf.get("format") != MODEL_FORMAT or conf.get("kind") not in KINDS:
        raise InvalidFormatError(
            f"a foxnas model must have format {MODEL_FORMAT} and a kind of {list(KINDS)}",
            received=f"format {conf.get('format')}, kind {conf.get('kind')}",
            remedy="load it with the release of foxnas-mlflow that wrote it, or a later one",
        )
    for name, expected in conf["files"].items():
        file = data / name
        if Path(name).name != name or not file.is_file() or _sha256(file) != expected:
            raise InvalidFormatError(
                "a model's files must be as they were logged", received=f"{name} changed", remedy="log the model again"
            )
    return str(conf["kind"])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _version(package: str) -> str:
    from importlib.metadata import version

    return version(package)
