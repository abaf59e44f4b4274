"""A search that a supernet and a device have the last word in, as MLflow sees it."""

from __future__ import annotations

import csv
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement, read_finished, read_measurements, write_measurements
from foxnas_mlflow.core.predictors import fit_predictors, reference_latency
from foxnas_mlflow.core.targets import get_target
from tests.measuring import shorten
from tests.pipelines import Running, waiting
from tests.supernets import MINI_SPACE, TRAINING, register_mini_supernet
from tests.versions import version_metrics

pytestmark = [pytest.mark.server, pytest.mark.train]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def predictors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's own: fitted to rows whose larger networks are better, and slower."""
    rng = np.random.default_rng(0)
    rows = []
    estimate = reference_latency(get_target("rpi4"), MINI_SPACE).latency[0]
    for architecture in MINI_SPACE.sample(rng, n=60, image_size=8):
        blocks = [b for s in architecture.stages for b in s.blocks]
        accuracy = 95 - 30 * np.exp(-sum(b.expansion + b.kernel for b in blocks) / 60) + rng.normal(0, 0.2)
        latency = float(estimate.predict([architecture])[0]) / 10
        rows.append(Measurement(architecture, accuracy, latency * rng.normal(1, 0.01), "measured", "a board"))
    path = tmp_path_factory.mktemp("predictors") / "predictors.json"
    write_measurements(rows, path.with_name("measurements.csv"))
    fit_predictors(rows, MINI_SPACE, target="cpu").predictors.save(path)
    return path


def _runs() -> list[Any]:
    import mlflow

    return mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.stage` = 'search'")


def _only_run() -> Any:
    (run,) = _runs()
    return run


def _table(run_id: str, directory: Path, place: str = ".") -> list[dict[str, str]]:
    import mlflow

    path = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/{place}/verification.csv", dst_path=str(directory))
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_found_network_has_weights_whose_accuracy_is_the_evaluators(
    tracking: str, predictors: Path, tmp_path: Path
) -> None:
    import mlflow

    from foxnas_mlflow.core.network import build_network
    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.data.preprocess import resize
    from foxnas_mlflow.flavor import SubnetModel, load_model
    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet
    from foxnas_mlflow.tflite import fold_weights, lower, reference_forward

    uri = register_mini_supernet()
    command = ["search", "--target", "cpu", "--predictors", str(predictors), "--latency-ms", "0.7", "--verify", "3"]
    assert main([*command, "--supernet", uri, "--evaluations", "2000"]) == 0
    run = _only_run()
    (chosen,) = [row for row in _table(run.info.run_id, tmp_path) if row["chosen"] == "True"]
    shown = mlflow.load_table("tables/verification.json", run_ids=[run.info.run_id])
    assert shown["architecture"][shown["chosen"]].tolist() == [chosen["architecture"]]
    assert [given.dataset.name for given in mlflow.get_run(run.info.run_id).inputs.dataset_inputs] == ["digits"]
    client = mlflow.MlflowClient()
    version = client.get_model_version("foxnas-subnet-cpu", "1")
    assert version.tags["weights"] == "trained"
    assert version.tags["latency_source"] == run.data.tags["foxnas.latency_source"] == "cost_model"
    # The predictors are the user's own: no note of the authors' board or of ImageNet.
    assert "foxnas.latency_note" not in run.data.tags
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/report.html", dst_path=str(tmp_path)))
    text = re.sub("<script>.*?</script>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "evaluated with the supernet" in text
    assert not any(word in text for word in ("ImageNet", "of 2021", "no weights yet"))

    model = load_model("models:/foxnas-subnet-cpu/1")
    assert isinstance(model, SubnetModel)
    assert model.architecture == Architecture.from_json(chosen["architecture"])
    assert model.labels == tuple("0123456789")
    assert model.details["training"] == {"max_train": 400} | TRAINING
    assert model.preprocessing is not None
    assert model.preprocessing.image_size == model.architecture.image_size
    dataset = load_dataset("digits", seed=3, max_train=400)
    supernet = Supernet.from_weights(MINI_SPACE, load_model(uri).weights)
    evaluation = SubnetEvaluator(supernet, dataset).evaluate(model.architecture)
    assert float(chosen["evaluated_accuracy"]) == pytest.approx(evaluation.top1_percent)
    assert run.data.metrics["search/evaluated_accuracy"] == pytest.approx(evaluation.top1_percent)
    assert run.data.metrics["search/evaluated_accuracy_standard_error"] == pytest.approx(evaluation.standard_error)
    assert {"search/evaluated_accuracy", "search/predicted_latency_ms", "model/params"} <= set(version_metrics(version))

    # The registered weights as they are, in another implementation of the same network.
    operators = lower(build_network(MINI_SPACE, model.architecture))
    images = np.stack([resize(dataset.val[i], model.architecture.image_size) for i in range(len(dataset.val))])
    assert model.weights is not None
    normalized = model.preprocessing.normalization(images)
    logits = reference_forward(operators, fold_weights(operators, model.weights), normalized)[operators[-1].name]
    right = 100 * np.mean(logits.argmax(1) == dataset.val.targets)
    assert right == pytest.approx(evaluation.top1_percent, abs=0.6)


def test_several_workers_search_and_evaluate_with_the_answers_of_one(
    tracking: str, predictors: Path, tmp_path: Path
) -> None:
    import mlflow

    uri = register_mini_supernet()
    command = [
        "search",
        "--target",
        "cpu",
        "--predictors",
        str(predictors),
        "--latency-ms",
        "0.65,0.7",
        "--verify",
        "3",
    ]
    for workers in ("1", "2"):
        assert main([*command, "--supernet", uri, "--evaluations", "2000", "--workers", workers]) == 0
    several, one = sorted(_runs(), key=lambda run: run.data.params["cfg.workers"], reverse=True)
    assert several.data.params["cfg.workers"] == "2"
    for place in ("0.65ms", "0.7ms"):
        tables = [_table(run.info.run_id, tmp_path / run.info.run_id, place) for run in (one, several)]
        assert tables[0] == tables[1]
        assert all(row["evaluated_accuracy"] for row in tables[0])
        found = [
            mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/{place}/architecture.json") for run in (one, several)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("latency_ms", ["0.01", "0.7,0.01"])
def test_what_no_network_meets_is_told_by_a_worker_as_here(
    tracking: str, predictors: Path, latency_ms: str, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["search", "--target", "cpu", "--predictors", str(predictors), "--evaluations", "2000", "--workers", "2"]
    assert main([*command, "--latency-ms", latency_ms]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        "foxnas: no architecture meets the latency constraint; received latency_ms=0.01; the smallest"
    )


def test_a_device_has_the_last_word(
    tracking: str, predictors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    shorten(monkeypatch)
    command = ["search", "--target", "cpu", "--predictors", str(predictors), "--latency-ms", "9999", "--verify", "2"]
    assert main([*command, "--device", "local", "--evaluations", "2000"]) == 0
    run = _only_run()
    rows = _table(run.info.run_id, tmp_path)
    assert [row["origin"] for row in rows] == ["found", "front"]
    (chosen,) = [row for row in rows if row["chosen"] == "True"]
    assert 0 < float(chosen["measured_latency_ms"]) <= 9999
    assert chosen["runtime"].startswith("ai-edge-litert")
    assert run.data.tags["foxnas.latency_source"] == "measured"
    assert run.data.tags["foxnas.emulated"] == "false"
    assert run.data.metrics["search/measured_latency_ms"] == float(chosen["measured_latency_ms"])
    tags = mlflow.MlflowClient().get_model_version("foxnas-subnet-cpu", "1").tags
    assert tags["latency_source"] == "measured"
    assert tags["weights"] == "none"


def test_rounds_learn_from_what_was_looked_at_and_go_on_where_they_were_cut_off(
    tracking: str, predictors: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    from foxnas_mlflow.supernet import SubnetEvaluator

    uri, table = register_mini_supernet(), predictors.with_name("measurements.csv")
    command = ["search", "--target", "cpu", "--predictors", str(predictors), "--latency-ms", "0.7", "--verify", "2"]
    command += ["--evaluations", "1000", "--supernet", uri, "--rounds", "2"]
    assert main(command) == 2
    command += ["--measurements", str(table)]
    asked: list[Architecture] = []
    evaluate = SubnetEvaluator.evaluate

    def cut_off_after_one(self: SubnetEvaluator, architecture: Architecture) -> Any:
        if len(asked) == 1:
            raise KeyboardInterrupt
        asked.append(architecture)
        return evaluate(self, architecture)

    def whole(self: SubnetEvaluator, architecture: Architecture) -> Any:
        asked.append(architecture)
        return evaluate(self, architecture)

    monkeypatch.setattr(SubnetEvaluator, "evaluate", cut_off_after_one)
    assert main(command) == 130
    monkeypatch.setattr(SubnetEvaluator, "evaluate", whole)
    assert main(command) == 0
    # No network was evaluated twice, by the two processes or by the two rounds.
    assert len(asked) == len(set(asked)) >= 3
    run = _runs()[0]
    assert run.data.metrics["search/rounds"] == 2
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/measurements.csv", dst_path=str(tmp_path))
    rows = read_measurements(path)
    assert {row.architecture for row in rows} == {row.architecture for row in read_measurements(table)} | set(asked)
    chosen = [row["architecture"] for row in _table(run.info.run_id, tmp_path)]
    assert set(map(Architecture.from_json, chosen)) == set(asked)
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/report.html", dst_path=str(tmp_path)))
    assert "The last round was the last because" in page.read_text(encoding="utf-8")
    fitted = mlflow.MlflowClient().get_model_version("foxnas-predictors-cpu", "1")
    assert fitted.tags["source"] == f"{predictors}, refitted in round 2"


@pytest.mark.usefixtures("undisturbed")
def test_a_killed_search_asks_the_device_about_no_network_twice(
    tracking: str, cache: Path, predictors: Path, tmp_path: Path
) -> None:
    command = ["search", "--target", "cpu", "--predictors", str(predictors), "--latency-ms", "9999", "--verify", "6"]
    command += ["--device", "local", "--evaluations", "2000"]
    running = Running(command, env=waiting(tmp_path / "waiting", "foxnas_mlflow.devices:measure", 4))
    deadline = time.monotonic() + 180
    # The header and one row: the file is there before what is written to it.
    while sum(file.read_bytes().count(b"\n") for file in cache.glob("foxnas_mlflow/verifications/*/*.csv")) < 2:
        assert time.monotonic() < deadline
        assert running.is_alive
        time.sleep(0.01)
    assert running.kill(after_seconds=0)
    (file,) = cache.glob("foxnas_mlflow/verifications/*/measurements.csv")
    kept = {row.architecture.to_json(): row.latency_ms for row in read_finished(file)}
    assert 1 <= len(kept) < 6
    assert main(command) == 0
    assert not list(cache.glob("foxnas_mlflow/verifications/*"))
    run = max(_runs(), key=lambda run: run.info.start_time)
    table = {row["architecture"]: float(row["measured_latency_ms"]) for row in _table(run.info.run_id, tmp_path)}
    assert len(table) == 6
    assert {architecture: table[architecture] for architecture in kept} == kept


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--supernet", "{uri}"], "the supernet must have the space of the predictors"),
        (["--data", "digits"], "data is that of a supernet"),
        (["--verify", "0"], "verify must be positive"),
        (["--device", "teapot://here"], "teapot"),
    ],
)
def test_bad_input(tracking: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    uri = register_mini_supernet()
    capsys.readouterr()
    assert main(["search", "--evaluations", "1000", *[part.format(uri=uri) for part in argv]]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert message in line
