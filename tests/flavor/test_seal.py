"""Files that were changed together with their checksums: the registry knows better."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.flavor import SEAL, TfliteModel, load_model, log_model, model_id_of, sealed

pytestmark = pytest.mark.server

URI = "models:/foxnas-cpu/1"


@pytest.fixture
def files(tracking: str, colour_model: TfliteModel, tmp_path: Path) -> Path:
    """Directory in the artifact store of a registered version."""
    with mlflow.start_run():
        log_model(colour_model, name="model", registered_model_name="foxnas-cpu")
    (description,) = tmp_path.glob("mlruns/**/artifacts/MLmodel")
    return description.parent


def forge(files: Path, change: Callable[[dict[str, object]], None] = lambda manifest: None) -> None:
    """Write checksums that are right again, as anybody can who writes to the store."""
    file = files / "data" / "foxnas.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    for key, directory in (("files", files / "data"), ("model_files", files)):
        if key in manifest:
            manifest[key] = {
                name: hashlib.sha256((directory / name).read_bytes()).hexdigest() for name in manifest[key]
            }
    file.write_text(json.dumps(manifest))


def swap_weights(files: Path) -> None:
    file = files / "data" / "model.tflite"
    file.write_bytes(file.read_bytes() + b"\0")
    forge(files)


def swap_labels(files: Path) -> None:
    forge(files, lambda manifest: manifest["metadata"].update(labels=["green", "red", "blue"]))  # type: ignore[attr-defined]


def swap_signature(files: Path) -> None:
    description = files / "MLmodel"
    description.write_text(description.read_text().replace("probability", "likelihood"))
    forge(files)


def claim_to_be_old(files: Path) -> None:
    def old(manifest: dict[str, object]) -> None:
        manifest["format"] = 2
        del manifest["model_files"]

    forge(files, old)


def deny_its_name(files: Path) -> None:
    description = files / "MLmodel"
    values = yaml.safe_load(description.read_text())
    del values["model_id"]
    description.write_text(yaml.safe_dump(values))
    forge(files)


def test_a_model_that_nobody_touched_is_loaded(files: Path) -> None:
    assert isinstance(load_model(URI), TfliteModel)
    assert mlflow.pyfunc.load_model(URI).metadata.flavors["foxnas"]["kind"] == "tflite"
    digest = hashlib.sha256((files / "data" / "foxnas.json").read_bytes()).hexdigest()
    model_id = model_id_of(mlflow.MlflowClient().get_model_version("foxnas-cpu", "1"))
    assert model_id is not None
    assert sealed(model_id) == digest
    assert isinstance(load_model(f"models:/{model_id}"), TfliteModel)


@pytest.mark.parametrize("tamper", [swap_weights, swap_labels, swap_signature, claim_to_be_old, deny_its_name])
def test_what_was_changed_with_its_checksums_is_refused(files: Path, tamper: Callable[[Path], None]) -> None:
    tamper(files)
    with pytest.raises(InvalidFormatError, match="changed together with their checksums"):
        load_model(URI)
    with pytest.raises(MlflowException, match="changed together with their checksums"):
        mlflow.pyfunc.load_model(URI)


def test_a_seal_cannot_be_replaced(files: Path) -> None:
    client = mlflow.MlflowClient()
    model_id = model_id_of(client.get_model_version("foxnas-cpu", "1")) or ""
    before = sealed(model_id)
    with pytest.raises(MlflowException):
        client.log_model_params(model_id, {SEAL: "0" * 64})
    assert sealed(model_id) == before


def test_copies_and_what_was_registered_again_are_the_same_model(files: Path) -> None:
    client = mlflow.MlflowClient()
    first = client.get_model_version("foxnas-cpu", "1")
    copy = client.copy_model_version(URI, "shelf")
    copy_of_copy = client.copy_model_version("models:/shelf/1", "shelf-2")
    again = mlflow.register_model(f"models:/{model_id_of(first)}", "foxnas-cpu")
    assert {model_id_of(client.get_model_version(v.name, v.version)) for v in (first, copy, copy_of_copy, again)} == {
        model_id_of(first)
    }
    swap_labels(files)
    for uri in ("models:/shelf/1", "models:/shelf-2/1", "models:/foxnas-cpu/2"):
        with pytest.raises(InvalidFormatError, match="changed together"):
            load_model(uri)


def test_where_there_is_no_registry_the_manifest_counts(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container: no store is asked, and none is made."""
    away = tmp_path / "away"
    shutil.copytree(files, away / "model")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    mlflow.set_tracking_uri(None)
    monkeypatch.chdir(away)
    assert len(mlflow.pyfunc.load_model("model").predict(mlflow.pyfunc.load_model("model").input_example)) == 1
    assert [path.name for path in away.iterdir()] == ["model"]
    (away / "model" / "data" / "model.tflite").write_bytes(b"")
    with pytest.raises(MlflowException, match="changed or missing"):
        mlflow.pyfunc.load_model("model")


def test_a_registry_that_does_not_answer_stops_no_serving(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    mlflow.set_tracking_uri("http://127.0.0.1:9")
    with pytest.warns(UserWarning, match="was not compared with its registry"):
        assert isinstance(load_model(str(files)), TfliteModel)


def test_a_seal_that_was_deleted_with_its_model_is_missed(files: Path) -> None:
    client = mlflow.MlflowClient()
    client.delete_logged_model(str(model_id_of(client.get_model_version("foxnas-cpu", "1"))))
    with pytest.warns(UserWarning, match="not compared with its registry: its logged model m-[0-9a-f]* was deleted"):
        load_model(URI)


@pytest.mark.parametrize("half", ["", "model_name: foxnas-cpu\n", "model_name: 'foxn"])
def test_what_another_loader_is_writing_is_not_waited_for(files: Path, half: str) -> None:
    (files / "registered_model_meta").write_text(half)
    assert isinstance(load_model(str(files)), TfliteModel)
    swap_labels(files)
    with pytest.raises(InvalidFormatError, match="as they were logged"):
        load_model(str(files))
