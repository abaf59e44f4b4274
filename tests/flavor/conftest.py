"""Models of every kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.predictors import PredictorSet, reference_predictors
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor import SubnetModel, SupernetModel, TfliteModel


@pytest.fixture(scope="session")
def predictors() -> PredictorSet:
    return reference_predictors("rpi4")


@pytest.fixture(scope="session")
def subnet() -> SubnetModel:
    details = {"predicted_accuracy": 71.5, "predicted_latency_ms": 42.0, "certificate": {"gap": 0.0}}
    return SubnetModel(CPU_SPACE.smallest(192), CPU_SPACE, details)


@pytest.fixture(scope="session")
def supernet() -> SupernetModel:
    rng = np.random.default_rng(0)
    weights = {
        "stem.weight": rng.normal(size=(16, 3, 3, 3)).astype(np.float32),
        "head.bias": np.arange(10, dtype=np.float32),
    }
    return SupernetModel(CPU_SPACE, weights, {"epochs": 2, "strategy": "ofa"}, Preprocessing(224), ("a", "b"))


@pytest.fixture(scope="session")
def models(
    predictors: PredictorSet,
    subnet: SubnetModel,
    supernet: SupernetModel,
    colour_model: TfliteModel,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, object]:
    """One model of each kind; what stands for the compiled file is never opened without an accelerator."""
    compiled = tmp_path_factory.mktemp("compiled") / "compiled.tflite"
    compiled.write_bytes(colour_model.path.read_bytes())
    edgetpu = dataclasses.replace(colour_model, path=compiled, fallback=colour_model.path)
    return {
        "predictors": predictors,
        "subnet": subnet,
        "supernet": supernet,
        "tflite": colour_model,
        "edgetpu": edgetpu,
    }


@pytest.fixture(scope="session")
def saved(models: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each model saved with the defaults; read only."""
    from foxnas_mlflow.flavor import save_model

    paths = {}
    for kind, model in models.items():
        paths[kind] = tmp_path_factory.mktemp(kind) / "model"
        save_model(model, paths[kind])  # type: ignore[arg-type]
    return paths
