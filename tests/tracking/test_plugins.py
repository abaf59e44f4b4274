"""The evaluator and the run context, as MLflow calls them."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.classification import class_table, confusion
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.flavor import TfliteModel, log_model
from foxnas_mlflow.tracking.context import FoxnasRunContext
from foxnas_mlflow.tracking.evaluator import FoxnasEvaluator, class_indices, figures
from tests.colour_model import LABELS, encoded, image_of
from tests.measuring import shorten

# MLflow 3.17 handles an evaluation's table in ways that pandas 4 will not take.
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")


@pytest.fixture
def uri(tracking: str, colour_model: TfliteModel) -> str:
    made_for_two_threads = dataclasses.replace(colour_model, details={**colour_model.details, "threads": 2})
    with mlflow.start_run():
        log_model(made_for_two_threads, name="model", registered_model_name="foxnas-cpu", code_paths=[])
    return "models:/foxnas-cpu/1"


def images(n: int = 12) -> tuple[pd.DataFrame, list[str]]:
    """Images, and their labels, of which the first is wrong."""
    labels = [LABELS[k % 3] for k in range(n)]
    column = [encoded(image_of(label, seed=k)) for k, label in enumerate(labels)]
    return pd.DataFrame({"image": column}), ["green", *labels[1:]]


@pytest.mark.server
def test_an_evaluation_with_latency(uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten(monkeypatch)
    table, labels = images()
    config = {"device": "local", "runs": 20, "warmup": 1}
    with mlflow.start_run() as run:
        result = mlflow.models.evaluate(
            uri,
            table.assign(label=[LABELS.index(label) for label in labels]),
            targets="label",
            model_type="tflite",
            evaluators="foxnas",
            evaluator_config=config,
        )
    assert result.metrics["evaluation/top1"] == pytest.approx(100 * 11 / 12)
    assert result.metrics["evaluation/images"] == 12
    assert result.metrics["evaluation/latency_ms_p50"] > 0
    model = mlflow.get_logged_model(mlflow.models.get_model_info(uri).model_id)
    logged = {metric.key: metric.value for metric in model.metrics or []}
    assert logged == pytest.approx(result.metrics)
    assert logged["evaluation/size_bytes"] == model_size(uri)
    names = {Path(file.path).name for file in mlflow.MlflowClient().list_artifacts(run.info.run_id, "evaluation")}
    assert names == {"confusion_matrix.png", "classes.csv", "benchmark.json"}
    # As foxnas benchmark measures: with the threads of the model's target, its output held against this host's.
    measured = mlflow.artifacts.load_dict(f"{run.info.artifact_uri}/evaluation/benchmark.json")
    assert (measured["threads"], measured["output_difference"]) == (2, 0)
    path = mlflow.artifacts.download_artifacts(run_id=run.info.run_id, artifact_path="evaluation/classes.csv")
    rows = pd.read_csv(path).set_index("label")
    assert rows.loc["green", "recall"] == 80
    assert rows.loc["green", "taken_for"] == "red"
    shown = mlflow.load_table("tables/classes.json", run_ids=[run.info.run_id])
    assert shown["recall"].tolist() == rows["recall"].tolist()
    assert result.artifacts["confusion_matrix"].content.size[0] > 300
    data = mlflow.get_run(run.info.run_id).data
    assert data.metrics == pytest.approx(result.metrics)
    assert data.tags["foxnas.device"] == "local"


def model_size(uri: str) -> int:
    from foxnas_mlflow.flavor import load_model

    native = load_model(uri)
    assert isinstance(native, TfliteModel)
    return native.path.stat().st_size


@pytest.mark.server
def test_an_evaluation_joins_by_the_model_type_alone(uri: str) -> None:
    table, labels = images(3)
    data = table.assign(label=[LABELS.index(label) for label in labels])
    # No evaluator is named: MLflow asks all of them.
    result = mlflow.models.evaluate(uri, data, targets="label", model_type="tflite")
    assert set(result.metrics) >= {"evaluation/top1", "evaluation/size_bytes"}
    assert "evaluation/latency_ms_p50" not in result.metrics
    for other in ("classifier", "regressor", "question-answering"):
        assert not FoxnasEvaluator.can_evaluate(model_type=other, evaluator_config={})


@pytest.mark.server
@pytest.mark.parametrize(
    ("labels", "config", "words"),
    [
        ([0, 1, 3], {}, "name of one of the model's classes, or its index; received 3"),
        ([0, 1, 2], {"devices": "local"}, "only the keys"),
        ([0, 1, 2], {"device": "bluetooth://board"}, "a device is local"),
    ],
)
def test_an_evaluation_refuses(uri: str, labels: list[int], config: dict[str, Any], words: str) -> None:
    table, _ = images(3)
    with pytest.raises(MlflowException, match=words):
        mlflow.models.evaluate(
            uri, table.assign(label=labels), targets="label", model_type="tflite", evaluators="foxnas",
            evaluator_config=config,
        )  # fmt: skip


def test_the_figures_of_a_matrix() -> None:
    truth, predicted = np.array([0, 0, 0, 1, 1, 2]), np.array([0, 0, 1, 1, 1, 0])
    counts = confusion(truth, predicted, 4)
    assert counts.tolist() == [[2, 1, 0, 0], [0, 2, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    values = figures(counts, truth, np.eye(4)[predicted])
    assert values["evaluation/top1"] == pytest.approx(100 * 4 / 6)
    # The fourth class has no images and counts for nothing.
    assert values["evaluation/top1_mean_of_classes"] == pytest.approx(100 * (2 / 3 + 1 + 0) / 3)
    rows = class_table(counts, ("a", "b", "c", "d"))
    assert rows[0] == pytest.approx(
        {"label": "a", "images": 3, "recall": 200 / 3, "precision": 200 / 3, "f1": 200 / 3, "taken_for": "b"}
    )
    assert (rows[2]["precision"], rows[2]["taken_for"]) == (None, "a")
    assert (rows[3]["recall"], rows[3]["f1"]) == (None, None)


def test_labels_are_names_before_they_are_indices() -> None:
    assert class_indices(["b", "a"], ("a", "b")).tolist() == [1, 0]
    assert class_indices(np.array([1, 0]), ("a", "b")).tolist() == [1, 0]
    assert class_indices(["3", "5"], ("5", "3")).tolist() == [1, 0]
    with pytest.raises(InvalidInputError, match="a whole number is no label where classes are named by other numbers"):
        class_indices([3], ("5", "3"))
    for wrong in (-1, 2, 0.5, "c", None):
        with pytest.raises(InvalidInputError, match="name of one of the model's classes"):
            class_indices([wrong], ("a", "b"))


def test_the_context_tags_runs(tracking: str) -> None:
    with mlflow.start_run() as run:
        pass
    tags = {k: v for k, v in mlflow.get_run(run.info.run_id).data.tags.items() if not k.startswith("mlflow.")}
    assert tags == FoxnasRunContext().tags()
    assert all(key.startswith(("foxnas.host.", "foxnas.library.")) for key in tags)
    assert tags["foxnas.library.mlflow"] == mlflow.__version__
    assert tags["foxnas.host.cpu"]


def test_the_context_stays_out_of_other_runs() -> None:
    code = (
        "import sys, mlflow\n"
        "import mlflow.models.evaluation\n"
        "from mlflow.tracking.context.registry import _run_context_provider_registry as registry, resolve_tags\n"
        "assert 'FoxnasRunContext' in [type(provider).__name__ for provider in registry]\n"
        "assert not [key for key in resolve_tags() if key.startswith('foxnas.')]\n"
        "assert 'foxnas_mlflow.core' not in sys.modules\n"
        "import foxnas_mlflow.flavor\n"
        "assert [key for key in resolve_tags() if key.startswith('foxnas.')]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
