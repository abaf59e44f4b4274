"""Registered models under MLflow's own commands."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import mlflow
import pytest

from foxnas_mlflow.flavor import TfliteModel, log_model
from tests.colour_model import LABELS, encoded, image_of

pytestmark = pytest.mark.server

RECORDS = [{"image": base64.b64encode(encoded(image_of(colour))).decode()} for colour in LABELS]


@pytest.fixture
def uri(tracking: str, colour_model: TfliteModel) -> str:
    """A version with its code, under alias, as promotion leaves it. By its stage one is served in test_stack.py."""
    with mlflow.start_run():
        log_model(colour_model, name="model", registered_model_name="foxnas-cpu")
    client = mlflow.MlflowClient()
    client.set_registered_model_alias("foxnas-cpu", "production", "1")
    return "models:/foxnas-cpu"


def test_predict_and_dockerfile_by_alias(uri: str, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from mlflow.models.cli import commands

    body, answer = tmp_path / "body.json", tmp_path / "answer.json"
    body.write_text(json.dumps({"dataframe_records": RECORDS}))
    source = ["-m", f"{uri}@production"]
    runner = CliRunner()
    arguments = ["predict", *source, "--env-manager", "local", "-i", str(body), "-o", str(answer)]
    runner.invoke(commands, arguments, catch_exceptions=False)
    assert [row["label"] for row in json.loads(answer.read_text())["predictions"]] == list(LABELS)
    directory = tmp_path / "docker"
    runner.invoke(commands, ["generate-dockerfile", *source, "-d", str(directory)], catch_exceptions=False)
    assert "COPY model_dir" in (directory / "Dockerfile").read_text()
    # What is built from it needs no release of this package.
    assert (directory / "model_dir" / "code" / "foxnas_mlflow.zip").is_file()
