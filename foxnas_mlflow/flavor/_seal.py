"""The seal of a logged model: the SHA-256 of its manifest, kept in the registry and not among its files.

A manifest alone shows damage, not intent: who may write to the artifacts can change a file and the
manifest with it. The seal is a parameter of the logged model, which MLflow lets nobody change or
delete: a model is loaded, and promoted, only if its manifest is the one that was sealed.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import mlflow
import yaml
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.models.model import MLMODEL_FILE_NAME

from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.flavor._files import Manifest

SEAL = "foxnas.manifest_sha256"
"""Parameter of a logged model: SHA-256 of its ``data/foxnas.json``."""

REGISTRATION = "registered_model_meta"
"""File that MLflow's client writes beside a registered version that it has downloaded."""

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "NOT_FOUND", "ENDPOINT_NOT_FOUND")


def seal(model_id: str, manifest: Manifest) -> None:
    """Keep a manifest's SHA-256 with its logged model."""
    MlflowClient().log_model_params(model_id, {SEAL: manifest.sha256})


def sealed(model_id: str) -> str | None:
    """The SHA-256 that a logged model was sealed with, or None: it was logged by a release before seals.

    Raises:
        MlflowException: If the registry cannot be asked, or knows no such model.
    """
    return MlflowClient().get_logged_model(model_id).params.get(SEAL)


def check_seal(manifest: Manifest, expected: str | None) -> None:
    """Refuse a manifest that is not the one that was sealed.

    Args:
        manifest: What lies beside the model.
        expected: What `sealed` said.

    Raises:
        InvalidFormatError: If it is another one.
    """
    if expected is not None and manifest.sha256 != expected:
        raise InvalidFormatError(
            "a model's files must be as they were logged",
            received=f"a manifest {manifest.sha256[:12]}, where the registry has {expected[:12]}: "
            "files were changed together with their checksums",
            remedy="do not use it; find out who can write to the artifact store, and log the model again",
        )


def check_loaded(model: Path, manifest: Manifest, uri: str = "") -> None:
    """Compare a model that is being loaded with its seal, where a registry can be asked.

    A model in a container, or copied to where its registry is not, is loaded with what its own
    manifest says. A registry that is there and does not answer, or has the version and no more the logged model with
    its seal, is warned of: serving goes on.

    Args:
        model: Directory of the model.
        manifest: Its manifest, checked against its files.
        uri: What it was loaded by, where that is known.

    Raises:
        InvalidFormatError: If the registry has another seal for it.
    """
    if not _store_exists():
        return
    # What the caller asked for, what MLflow's client noted when it downloaded, what the files say.
    registration: Callable[[], str | None] = functools.partial(_of_registration, model)
    for find in (functools.partial(_of_uri, uri), registration, functools.partial(_of_description, model)):
        model_id = None
        try:
            model_id = find()
            expected = None if model_id is None else sealed(model_id)
        except MlflowException as error:
            if error.error_code in _ABSENT:
                if model_id is not None and find is registration:
                    text = f"its logged model {model_id} was deleted there"
                    warnings.warn(f"the model was not compared with its registry: {text}", UserWarning, stacklevel=2)
                continue
            first = str(error).strip().splitlines()[0]
            warnings.warn(f"the model was not compared with its registry: {first}", UserWarning, stacklevel=2)
            return
        check_seal(manifest, expected)


def model_id_of(version: ModelVersion) -> str | None:
    """Id of the logged model that a version was registered from, or None.

    SQL stores leave `model_id` of a version empty. What it was registered from names it, or, for a
    copy of a version, the place of its files, which the registry looks up.
    """
    if version.model_id:
        return str(version.model_id)
    source = version.source or ""
    if not source.startswith("models:/m-"):
        source = MlflowClient().get_model_version_download_uri(version.name, str(version.version)) or source
    found = re.search(r"\bm-[0-9a-f]{32}\b", source)
    return found.group() if found else None


def _of_uri(uri: str) -> str | None:
    found = re.fullmatch(r"models:/(m-[0-9a-f]{32})/?", uri)
    return None if found is None else found[1]


def _of_registration(model: Path) -> str | None:
    registration = model / REGISTRATION
    if not registration.is_file():
        return None
    try:
        meta = yaml.safe_load(registration.read_text(encoding="utf-8"))
        name, version = meta["model_name"], meta["model_version"]
    except (yaml.YAMLError, TypeError, KeyError):
        # Where the artifacts are a directory that several load from, another may be writing it now.
        return None
    if name is None:  # a logged model that was loaded by its own id
        return None
    return model_id_of(MlflowClient().get_model_version(name, str(version)))


def _of_description(model: Path) -> str | None:
    found = yaml.safe_load((model / MLMODEL_FILE_NAME).read_text(encoding="utf-8")).get("model_id")
    return None if found is None else str(found)


def _store_exists() -> bool:
    """Whether there is a store to ask: asking one that is not there would make it."""
    uri = mlflow.get_tracking_uri()
    if uri.startswith("sqlite:///"):
        return Path(uri.removeprefix("sqlite:///").partition("?")[0]).is_file()
    return "://" in uri and not uri.startswith("file:")
