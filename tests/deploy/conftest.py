"""Registered versions, and a board."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest

from foxnas_mlflow.core.rejection import Rejection
from foxnas_mlflow.flavor import TfliteModel, log_model
from tests.colour_model import LABELS
from tests.deploy.boards import board


@pytest.fixture
def versions(tracking: str, colour_model: TfliteModel, tmp_path: Path) -> tuple[str, str]:
    """Two registered versions; the second one is given its labels in another order."""
    rejection = Rejection(1.5, 0.6, 0.05, "unknown images", 40, 0.05, 0.9, ((0.0, 1.0, 1.0), (1.0, 0.0, 0.0)))
    for labels in (LABELS, ("rouge", "vert", "bleu")):
        with mlflow.start_run():
            log_model(
                dataclasses.replace(colour_model, labels=labels, details={"rejection": rejection.to_dict()}),
                name="model",
                registered_model_name="foxnas-rpi4",
                code_paths=[],
            )
    mlflow.MlflowClient().set_registered_model_alias("foxnas-rpi4", "production", "1")
    return "models:/foxnas-rpi4@production", "models:/foxnas-rpi4/2"


@pytest.fixture
def target(tmp_path: Path) -> Iterator[str]:
    with board(tmp_path / "board") as uri:
        yield uri
