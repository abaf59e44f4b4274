"""Registered versions, and a board."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from foxnas_mlflow.core.rejection import Rejection
from foxnas_mlflow.flavor import TfliteModel, log_model
from tests.colour_model import LABELS
from tests.conftest import copy_store, mlflow_at, once_a_run
from tests.deploy.boards import board


@pytest.fixture(scope="session")
def registered(empty_store: Path, colour_model: TfliteModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with two versions; the second one is given its labels in another order."""

    def make(directory: Path) -> None:
        uri = copy_store(empty_store, directory)
        rejection = Rejection(1.5, 0.6, 0.05, "unknown images", 40, 0.05, 0.9, ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0)))
        with mlflow_at(uri):
            for labels in (LABELS, ("rouge", "vert", "bleu")):
                with mlflow.start_run():
                    log_model(
                        dataclasses.replace(colour_model, labels=labels, details={"rejection": rejection.to_dict()}),
                        name="model",
                        registered_model_name="foxnas-rpi4",
                        code_paths=[],
                    )
            mlflow.MlflowClient().set_registered_model_alias("foxnas-rpi4", "production", "1")

    return once_a_run(tmp_path_factory, "registered", make)


@pytest.fixture
def versions(registered: Path, tracking: str, tmp_path: Path) -> tuple[str, str]:
    """The two versions in the test's own store."""
    shutil.copytree(registered / "mlruns", tmp_path / "mlruns")
    copy_store(registered / "mlflow.db", tmp_path)
    return "models:/foxnas-rpi4@production", "models:/foxnas-rpi4/2"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    with board(tmp_path / "board") as uri:
        yield uri
