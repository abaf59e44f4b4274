"""A registry that asks who is there: MLflow's own server with users, of whom some may only read."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlflow
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.flavor import model_id_of
from tests.measuring import shorten
from tests.servers import ADMIN, login_server
from tests.versions import NAME, register_version, state, version_metrics

pytestmark = [pytest.mark.server, pytest.mark.slow]

READER = ("reader", "password of the reader")
SUBNET = "foxnas-subnet-rpi4"


@pytest.fixture(scope="module")
def server(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server on which a user may only read what is not their own."""
    directory = tmp_path_factory.mktemp("rights")
    store = shutil.copy(empty_store, directory / "mlflow.db")
    with login_server(f"sqlite:///{store}", directory, READER) as url:
        yield url


@pytest.fixture
def reader(server: str, tracking: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Two versions of the admin's, of which one holds production; then the reader has logged in."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the admin")
    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    log_in(monkeypatch, ADMIN)
    # Once: no test may change them.
    if not mlflow.MlflowClient().search_registered_models(f"name = '{NAME}'"):
        for _ in range(2):
            register_version(tmp_path)
        assert main(["promote", "--model", f"models:/{NAME}/1", "--stage", "Production"]) == 0
    assert state() == {"aliases": {"production": "1"}, "stages": {"1": "Production", "2": "None"}}
    log_in(monkeypatch, READER)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the reader")
    return server


def log_in(patch: pytest.MonkeyPatch, user: tuple[str, str]) -> None:
    patch.setenv("MLFLOW_TRACKING_USERNAME", user[0])
    patch.setenv("MLFLOW_TRACKING_PASSWORD", user[1])


def everything(name: str) -> dict[str, Any]:
    """All that a promotion writes."""
    client = mlflow.MlflowClient()
    versions = client.search_model_versions(f"name='{name}'")
    return {
        **state(name),
        "tags": client.get_registered_model(name).tags,
        "versions": {str(v.version): (v.tags, v.description) for v in versions},
    }


def runs_of_the_reader() -> list[mlflow.entities.Run]:
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("of the reader")
    return [] if experiment is None else client.search_runs([experiment.experiment_id])


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [x for x in error.splitlines() if x.startswith("foxnas:")]
    return line


def test_who_may_only_read_moves_nothing(reader: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything(NAME)
    capsys.readouterr()
    for argv, refused in (
        (["--stage", "Staging"], "model-versions/set-tag"),
        (["--stage", "Archived"], "model-versions/transition-stage"),
    ):
        assert main(["promote", "--model", f"models:/{NAME}/2", *argv]) == 2
        line = one_line(capsys)
        assert line == (
            "foxnas: promoting needs the right to change the registered model; "
            f"received {NAME}: {refused}: HTTP 403: Permission denied; "
            "nothing was moved; ask for that right, or let someone who has it promote."
        )
        run = runs_of_the_reader()[0]
        assert run.info.status == "FAILED"
        written = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/promotion.json"))
        assert f"foxnas: {written['error']}" == line
    # Judging needs no more than reading.
    assert main(["promote", "--model", f"models:/{NAME}/2", "--stage", "Production", "--dry-run"]) == 0
    assert everything(NAME) == before


def test_who_is_not_known_or_writes_where_they_must_not(
    reader: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = everything(NAME)
    capsys.readouterr()
    command = ["promote", "--model", f"models:/{NAME}/2", "--stage", "Production"]
    with monkeypatch.context() as patch:
        log_in(patch, (READER[0], "guessed"))
        assert main(command) == 2
        line = one_line(capsys)
        assert "HTTP 401: You are not authenticated" in line
        assert line.endswith("set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN.")
        assert "guessed" not in line
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the admin")
    assert main(command) == 2
    line = one_line(capsys)
    assert "runs/create: HTTP 403: Permission denied; ask for that right" in line
    assert "MLFLOW_EXPERIMENT_NAME" in line
    assert everything(NAME) == before


def test_what_cannot_be_registered_is_kept(
    reader: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient()
    with monkeypatch.context() as patch:
        log_in(patch, ADMIN)
        client.create_registered_model(SUBNET)
    capsys.readouterr()
    assert main(["search", "--target", "rpi4", "--latency-ms", "60", "--evaluations", "500"]) == 2
    line = one_line(capsys)
    assert "registering a model needs the right to change the registered model of its name" in line
    assert f"received {SUBNET}: model-versions/create: HTTP 403: Permission denied; the run is kept" in line
    run = runs_of_the_reader()[0]
    assert run.info.status == "FAILED"
    assert {"front.csv", "report.html", "certificate.json"} <= {f.path for f in client.list_artifacts(run.info.run_id)}
    assert client.search_model_versions(f"name='{SUBNET}'") == []
    # The model has its figures; who has the right can still register it.
    (uri,) = re.findall(r"models:/m-[0-9a-f]{32}", line)
    log_in(monkeypatch, ADMIN)
    figures = {key: value for key, value in run.data.metrics.items() if not key.startswith("predictor/")}
    assert version_metrics(mlflow.register_model(uri, SUBNET)) == figures


def test_rights_are_asked_for_before_training(
    reader: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient()
    with monkeypatch.context() as patch:
        log_in(patch, ADMIN)
        client.create_registered_model("theirs-rpi4")
    capsys.readouterr()
    assert main(["main", "--data", "digits", "--name", "theirs", "--target", "rpi4", "--device", "none"]) == 2
    line = one_line(capsys)
    assert "registering a model needs the right to change the registered model of its name" in line
    assert "received theirs-rpi4: " in line
    assert "HTTP 403: Permission denied; nothing was done; ask for that right" in line
    assert {run.data.tags["foxnas.stage"] for run in runs_of_the_reader()} >= {"main"}
    assert "supernet" not in {run.data.tags["foxnas.stage"] for run in runs_of_the_reader()}


def test_a_model_that_is_gone_is_told_from_one_that_may_not_be_read(
    reader: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server answers 403 to both."""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the admin")
    log_in(monkeypatch, ADMIN)
    client = mlflow.MlflowClient()
    for _ in range(2):
        register_version(tmp_path, name="gone-rpi4")
    assert main(["promote", "--model", "models:/gone-rpi4/1"]) == 0
    client.delete_logged_model(str(model_id_of(client.get_model_version("gone-rpi4", "1"))))
    capsys.readouterr()
    log_in(monkeypatch, READER)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "of the reader")
    assert main(["promote", "--model", "models:/gone-rpi4/1", "--dry-run"]) == 2
    assert "received models:/gone-rpi4/1, whose model m-" in one_line(capsys)
    # One that held a stage keeps nobody out.
    assert main(["promote", "--model", "models:/gone-rpi4/2", "--dry-run"]) == 0


def test_a_measurement_of_what_may_only_be_read_is_kept(
    reader: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(monkeypatch)
    before = everything(NAME)
    capsys.readouterr()
    command = ["benchmark", "--target", "cpu", "--model", f"models:/{NAME}/2", "--runs", "20", "--warmup", "1"]
    assert main(command) == 2
    run = runs_of_the_reader()[0]
    line = one_line(capsys)
    assert "writing a measurement to its model needs the right to change that model" in line
    assert f"HTTP 403: Permission denied; the measurement is kept in run {run.info.run_id}" in line
    assert run.info.status == "FAILED"
    benchmark = json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/benchmark.json"))
    assert run.data.metrics["benchmark/latency_ms_p50"] == benchmark["latency_ms_p50"]
    assert everything(NAME) == before
