"""The functions that MLflow asks of a flavor; the shape is that of MLflow's own flavors."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow
import numpy as np
import yaml
from mlflow.environment_variables import MLFLOW_LOCK_MODEL_DEPENDENCIES
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelInputExample, ModelSignature
from mlflow.models.model import MLMODEL_FILE_NAME, ModelInfo
from mlflow.models.utils import _save_example
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.tracking._model_registry import DEFAULT_AWAIT_MAX_SLEEP_SECONDS
from mlflow.tracking.artifact_utils import _download_artifact_from_uri
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema, TensorSpec
from mlflow.types.schema import Array
from mlflow.utils.environment import (
    _CONDA_ENV_FILE_NAME,
    _CONSTRAINTS_FILE_NAME,
    _PYTHON_ENV_FILE_NAME,
    _REQUIREMENTS_FILE_NAME,
    _generate_mlflow_version_pinning,
    _mlflow_conda_env,
    _process_conda_env,
    _process_pip_requirements,
    _PythonEnv,
    _validate_env_arguments,
)
from mlflow.utils.file_utils import get_total_file_size, write_to
from mlflow.utils.model_utils import (
    _add_code_from_conf_to_system_path,
    _copy_extra_files,
    _get_flavor_configuration,
    _validate_and_copy_code_paths,
    _validate_and_prepare_target_save_path,
)

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import FoxNasError, InvalidInputError
from foxnas_mlflow.core.files import file_digest
from foxnas_mlflow.core.pins import pins
from foxnas_mlflow.flavor._example import input_example_of
from foxnas_mlflow.flavor._files import (
    CODE,
    DATA,
    MODEL_FORMAT,
    Manifest,
    check_kind,
    read_manifest,
    write_code,
    write_manifest,
)
from foxnas_mlflow.flavor._models import SubnetModel, SupernetModel, TfliteModel, kind_of, main_file, read_model
from foxnas_mlflow.flavor._models import write_model as _write_model
from foxnas_mlflow.flavor._pyfunc import (
    PredictorsPyfunc,
    SubnetPyfunc,
    SupernetPyfunc,
    TflitePyfunc,
    default_model_config,
    subnet_row,
)
from foxnas_mlflow.flavor._seal import check_loaded, seal

if TYPE_CHECKING:
    from foxnas_mlflow.core.predictors import PredictorSet

FLAVOR_NAME = "foxnas"

# Beside MLflow, which its own helpers add; pinned to what is installed where the model is logged, and
# to pins.txt where a package is not (a model can be logged where it cannot run).
_REQUIREMENTS: Mapping[str, Sequence[str]] = {
    "predictors": ("numpy", "pandas", "PyYAML", "scipy"),
    "subnet": ("numpy", "pandas", "PyYAML"),
    "supernet": ("numpy", "pandas", "Pillow", "PyYAML", "safetensors", "torch"),
    # Without uvloop a scoring server with two workers takes 40 ms longer for every request.
    "tflite": ("ai-edge-litert", "httptools", "numpy", "pandas", "Pillow", "uvloop"),
}


def get_default_pip_requirements(kind: str = "tflite", *, weights: bool = False) -> list[str]:
    """Pinned requirements, the least that a kind needs to predict.

    Args:
        kind: Kind of the model.
        weights: Whether a ``subnet`` has weights.

    Returns:
        Pip requirements without MLflow, which every environment gets beside them.

    Examples:
        >>> from foxnas_mlflow import get_default_pip_requirements
        >>> any(requirement.startswith("ai-edge-litert") for requirement in get_default_pip_requirements("tflite"))
        True
    """
    needed = set(_REQUIREMENTS["tflite" if check_kind(kind) == "edgetpu" else kind])
    if kind == "subnet" and weights:
        needed |= set(_REQUIREMENTS["supernet"])
    return [f"{package}=={_installed(package) or pins()[package]}" for package in sorted(needed)]


def get_default_conda_env(kind: str = "tflite", *, weights: bool = False) -> dict[str, Any]:
    """The conda environment with `get_default_pip_requirements` and MLflow.

    Examples:
        >>> from foxnas_mlflow import get_default_conda_env
        >>> sorted(get_default_conda_env("predictors"))
        ['channels', 'dependencies', 'name']
    """
    requirements = get_default_pip_requirements(kind, weights=weights)
    environment: dict[str, Any] = _mlflow_conda_env(additional_pip_deps=requirements)
    return environment


def save_model(
    model: PredictorSet | SupernetModel | SubnetModel | TfliteModel,
    path: str | os.PathLike[str],
    conda_env: str | dict[str, Any] | None = None,
    code_paths: list[str] | None = None,
    mlflow_model: Model | None = None,
    signature: ModelSignature | None = None,
    input_example: ModelInputExample | None = None,
    pip_requirements: list[str] | str | None = None,
    extra_pip_requirements: list[str] | str | None = None,
    kind: str | None = None,
    model_config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
) -> None:
    """Save a model to a path on the local file system.

    Args:
        model: `PredictorSet`, `SupernetModel`, `SubnetModel` or `TfliteModel`.
        path: Directory to write; must be empty or absent.
        conda_env: Conda environment as a dictionary or the path of a YAML file. Default: the
            least that the kind needs, see `get_default_conda_env`; nothing is inferred.
        code_paths: Code to put beside the model. Default: this package as one archive, so that the
            model can be served where foxnas-mlflow is not installed; it wins over an installed
            release. An empty list leaves it out.
        mlflow_model: MLflow's description of the model, filled in.
        signature: Signature of the model. Default: that of the kind. That of ``tflite`` and
            ``edgetpu`` declares one input ``image`` of any type: MLflow enforces either a table or
            a tensor, these kinds take both and check them themselves. `image_signature` declares
            a binary column, as Spark wants it.
        input_example: An example of the input. Default: that of the kind, a grey PNG for images.
        pip_requirements: Requirements as a list or the path of a file, instead of the default.
        extra_pip_requirements: Requirements beside the default, as a list or a path.
        kind: One of `KINDS`; needed only where the object leaves it open (``tflite`` and
            ``edgetpu`` are the same class; ``tflite`` is assumed without a fallback).
        model_config: Runtime options and their values, see `default_model_config`: ``threads``,
            ``pool_size``, ``delegate``, ``max_pixels``.
        metadata: JSON values kept in the MLmodel file.
        extra_files: Further files to put beside the model.

    Raises:
        MlflowException: If the path holds files, or the arguments contradict each other.
        InvalidInputError: If the model does not suit its kind.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from foxnas_mlflow import load_model, reference_predictors, save_model
        >>> path = Path(tempfile.mkdtemp(), "model")
        >>> save_model(reference_predictors("rpi4"), path)
        >>> load_model(str(path)).target
        'rpi4'
    """
    _validate_env_arguments(conda_env, pip_requirements, extra_pip_requirements)
    kind = check_kind(kind or kind_of(model) or "tflite")
    config = default_model_config(kind)
    unknown = sorted(set(model_config or {}) - set(config))
    if unknown:
        raise InvalidInputError(f"model_config of kind {kind!r} has only the keys {sorted(config)}", received=unknown)
    config |= model_config or {}

    path = os.path.abspath(path)
    _validate_and_prepare_target_save_path(path)
    if code_paths is None:
        write_code(Path(path))
        code = CODE
    else:
        code = _validate_and_copy_code_paths(code_paths, path)

    data = Path(path, DATA)
    data.mkdir()
    description = _write_model(model, kind, data)
    weights = str(description.get("weights", "none"))

    mlflow_model = Model() if mlflow_model is None else mlflow_model
    mlflow_model.signature = signature or _default_signature(kind, model)
    _save_example(mlflow_model, input_example_of(model) if input_example is None else input_example, path)
    if metadata is not None:
        mlflow_model.metadata = metadata
    mlflow.pyfunc.add_to_model(
        mlflow_model,
        loader_module="foxnas_mlflow.flavor",
        data=DATA,
        code=code,
        conda_env=_CONDA_ENV_FILE_NAME,
        python_env=_PYTHON_ENV_FILE_NAME,
        model_config=config,
    )
    mlflow_model.add_flavor(
        FLAVOR_NAME,
        kind=kind,
        data=DATA,
        code=code,
        format=MODEL_FORMAT,
        foxnas_version=__version__,
        sha256=file_digest(data / main_file(kind)),
        weights=weights,
        **({"quantization": description["quantization"], "runtime": dict(config)} if config else {}),
        **_copy_extra_files(extra_files, path),
    )
    if size := get_total_file_size(path):
        mlflow_model.model_size_bytes = size
    mlflow_model.save(os.path.join(path, MLMODEL_FILE_NAME))

    constraints = None
    if conda_env is not None:
        conda_env, pip_requirements, constraints = _process_conda_env(conda_env)
    elif (pip_requirements, extra_pip_requirements) != (None, None) or MLFLOW_LOCK_MODEL_DEPENDENCIES.get():
        defaults = None if pip_requirements else get_default_pip_requirements(kind, weights=weights == "trained")
        conda_env, pip_requirements, constraints = _process_pip_requirements(
            defaults, pip_requirements, extra_pip_requirements
        )
    else:
        # What is installed needs no comparing with what is installed: that takes a second, a process.
        defaults = get_default_pip_requirements(kind, weights=weights == "trained")
        pip_requirements = [_generate_mlflow_version_pinning(), *defaults]
        conda_env = _mlflow_conda_env(additional_pip_deps=pip_requirements, install_mlflow=False)
    Path(path, _CONDA_ENV_FILE_NAME).write_text(yaml.safe_dump(conda_env, default_flow_style=False), encoding="utf-8")
    if constraints:
        write_to(os.path.join(path, _CONSTRAINTS_FILE_NAME), "\n".join(constraints))
    write_to(os.path.join(path, _REQUIREMENTS_FILE_NAME), "\n".join(pip_requirements))
    _PythonEnv.current().to_yaml(os.path.join(path, _PYTHON_ENV_FILE_NAME))
    write_manifest(Path(path), kind, description)


class _Sealing:
    """This flavor as `Model.log` asks for one; it remembers the manifest of what was saved."""

    __name__ = "foxnas_mlflow.flavor"
    manifest: Manifest

    def save_model(self, *, path: str, validate_serving_input: bool, **values: Any) -> None:
        """Save, and read the manifest before anything is uploaded."""
        save_model(path=path, **values)
        self.manifest = read_manifest(Path(path, DATA))


def log_model(
    model: PredictorSet | SupernetModel | SubnetModel | TfliteModel,
    artifact_path: str | None = None,
    conda_env: str | dict[str, Any] | None = None,
    code_paths: list[str] | None = None,
    registered_model_name: str | None = None,
    signature: ModelSignature | None = None,
    input_example: ModelInputExample | None = None,
    await_registration_for: int = DEFAULT_AWAIT_MAX_SLEEP_SECONDS,
    pip_requirements: list[str] | str | None = None,
    extra_pip_requirements: list[str] | str | None = None,
    kind: str | None = None,
    model_config: dict[str, Any] | None = None,
    metadata: dict[str, Any] | None = None,
    extra_files: list[str] | None = None,
    name: str | None = None,
    params: dict[str, Any] | None = None,
    tags: dict[str, Any] | None = None,
    model_type: str | None = None,
    step: int = 0,
    model_id: str | None = None,
    run_id: str | None = None,
) -> ModelInfo:
    """Log a model to the active run, or to a new one, seal it, and register it if a name is given.

    The seal is the SHA-256 of the model's manifest, a parameter of the logged model that nobody can
    change: a model whose files were changed afterwards is refused, with whatever checksums.

    Args:
        model: `PredictorSet`, `SupernetModel`, `SubnetModel` or `TfliteModel`.
        artifact_path: Deprecated by MLflow; use `name`.
        registered_model_name: Registers the model as a new version under this name.
        await_registration_for: Seconds to wait until the version is ready; 0 does not wait.
        name: Name of the model.
        params: Parameters of the logged model.
        tags: Tags of the logged model.
        model_type: Type shown by MLflow's model page. Default: the kind.
        step: Training step of the model.
        model_id: Id of an initialised logged model to fill.
        run_id: Id of the run, if not the active one.

    All other arguments are those of `save_model`.

    Returns:
        MLflow's ModelInfo; `model_id` is what metrics of this model are logged with.

    Raises:
        MlflowException, InvalidInputError: As for `save_model`.

    Examples:
        >>> import mlflow
        >>> from foxnas_mlflow import load_model, log_model, reference_predictors
        >>> with mlflow.start_run():
        ...     info = log_model(reference_predictors("rpi4"), name="predictors")
        >>> load_model(info.model_uri).target
        'rpi4'
    """
    flavor = _Sealing()
    info: ModelInfo = Model.log(
        artifact_path=artifact_path,
        name=name,
        flavor=flavor,
        model=model,
        # It would load the model, and write what it found into a description that is sealed by now.
        validate_serving_input=False,
        conda_env=conda_env,
        code_paths=code_paths,
        signature=signature,
        input_example=input_example,
        pip_requirements=pip_requirements,
        extra_pip_requirements=extra_pip_requirements,
        kind=kind,
        model_config=model_config,
        metadata=metadata,
        extra_files=extra_files,
        params=params,
        tags=tags,
        model_type=model_type or kind or kind_of(model) or "tflite",
        step=step,
        model_id=model_id,
        run_id=run_id,
    )
    seal(info.model_id, flavor.manifest)
    if registered_model_name is not None:
        version = mlflow.register_model(
            info.model_uri, registered_model_name, await_registration_for=await_registration_for, tags=tags
        )
        info.registered_model_version = version.version
    return info


def load_model(model_uri: str, dst_path: str | None = None) -> PredictorSet | SupernetModel | SubnetModel | TfliteModel:
    """Load a model natively.

    Args:
        model_uri: ``models:/name/version``, ``models:/name@alias``, ``runs:/...``, or a path.
        dst_path: Existing directory to download to. A `TfliteModel` points to its file there.

    Returns:
        `PredictorSet`, `SupernetModel`, `SubnetModel` or `TfliteModel`, as its kind says.

    Raises:
        InvalidFormatError: If a file was changed after logging, or the format is unknown or newer.
        MlflowException: If there is no such model or it has another flavor.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from foxnas_mlflow import load_model, reference_predictors, save_model
        >>> path = Path(tempfile.mkdtemp(), "model")
        >>> save_model(reference_predictors("rpi4"), path)
        >>> type(load_model(str(path))).__name__
        'PredictorSet'
    """
    local = _download_artifact_from_uri(artifact_uri=model_uri, output_path=dst_path)
    configuration = _get_flavor_configuration(model_path=local, flavor_name=FLAVOR_NAME)
    data = Path(local, configuration["data"])
    manifest = read_manifest(data)
    check_loaded(Path(local), manifest, model_uri)
    # Not before: code that was put beside the model must not run.
    _add_code_from_conf_to_system_path(local, configuration)
    _forget_own_code(local)
    return read_model(data, manifest)


def _forget_own_code(model: str | os.PathLike[str]) -> None:
    """Take a model's copy of this package off `sys.path`, unless it is the one that runs.

    The package is imported by now, and each further path is looked through at every import: with more than a hundred
    of them Python asks 0.4 s for the version of a package.
    """
    archive = os.path.abspath(os.path.join(model, CODE))
    if not os.path.abspath(__file__).startswith(archive + os.sep):
        sys.path[:] = [path for path in sys.path if os.path.abspath(path or os.curdir) != archive]


def _load_pyfunc(
    path: str, model_config: Mapping[str, Any] | None = None
) -> PredictorsPyfunc | SubnetPyfunc | SupernetPyfunc | TflitePyfunc:
    """MLflow's entry from `mlflow.pyfunc.load_model`."""
    data = Path(path)
    try:
        manifest = read_manifest(data)
        check_loaded(data.parent, manifest)
        _forget_own_code(data.parent)
        model = read_model(data, manifest)
        if isinstance(model, TfliteModel):
            return TflitePyfunc(model, {**default_model_config(manifest.kind), **(model_config or {})})
        if isinstance(model, SubnetModel):
            return SubnetPyfunc(model)
        if isinstance(model, SupernetModel):
            return SupernetPyfunc(model)
        return PredictorsPyfunc(model)
    except FoxNasError as error:
        raise MlflowException(str(error), INVALID_PARAMETER_VALUE) from error


def image_signature() -> ModelSignature:
    """The signature of an image classifier that takes a table with a binary column ``image``.

    With it MLflow refuses arrays, which the default signature lets through.
    """
    outputs, params = _image_outputs()
    return ModelSignature(inputs=Schema([ColSpec(DataType.binary, "image")]), outputs=outputs, params=params)


def _default_signature(kind: str, model: Any) -> ModelSignature:
    if kind in ("tflite", "edgetpu"):
        outputs, params = _image_outputs(rejects=model.rejection is not None)
        # The one declaration that lets tables and arrays of every type through to the model's own checks.
        return ModelSignature(
            inputs=Schema([TensorSpec(np.dtype("O"), (-1,), "image")]), outputs=outputs, params=params
        )
    inputs = Schema([ColSpec(DataType.string, "architecture")])
    if kind == "predictors":
        columns = [f"{quantity}{end}" for quantity in ("accuracy", "latency_ms") for end in ("", "_lower", "_upper")]
        return ModelSignature(
            inputs=inputs,
            outputs=Schema([ColSpec(DataType.double, column) for column in columns]),
            params=ParamSchema([ParamSpec("confidence", DataType.double, 0.95)]),
        )
    if kind == "supernet":
        columns = ["params", "macs", "int8_size_bytes", "peak_activation_bytes"]
        return ModelSignature(inputs=inputs, outputs=Schema([ColSpec(DataType.long, column) for column in columns]))
    types = {str: DataType.string, bool: DataType.boolean, int: DataType.long, float: DataType.double}
    row = subnet_row(model)
    return ModelSignature(
        inputs=inputs, outputs=Schema([ColSpec(types[type(value)], key) for key, value in row.items()])
    )


def _image_outputs(*, rejects: bool = False) -> tuple[Schema, ParamSchema]:
    outputs: list[ColSpec | TensorSpec] = [
        ColSpec(DataType.string, "label"),
        ColSpec(DataType.double, "probability"),
        ColSpec(Array(DataType.double), "probabilities"),
        *([ColSpec(DataType.boolean, "rejected")] if rejects else []),
    ]
    params = [ParamSpec("top_k", DataType.long, 1), ParamSpec("threads", DataType.long, 0)]
    return Schema(outputs), ParamSchema(params)


def _installed(package: str) -> str | None:
    try:
        # A local label (+cpu) names a build that is on no index.
        return version(package).split("+")[0]
    except PackageNotFoundError:
        return None
