"""The pipeline from images to a promoted model, killed at random moments and gone on with."""

from __future__ import annotations

import csv
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import InvalidMeasurementsError
from foxnas_mlflow.core.measurements import Measurement, read_measurements
from tests.pipelines import N_SAMPLES, SPACE, STEPS, Running, options

pytestmark = [pytest.mark.slow, pytest.mark.server, pytest.mark.train, pytest.mark.tflite]

KILLS = int(os.environ.get("FOXNAS_KILLS", "2"))
"""How often the pipeline is killed; 20 takes a quarter of an hour. Losses within a sampling: tests/kills.py."""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "foxnas_mlflow"


@pytest.mark.usefixtures("undisturbed")
def test_killed_pipelines_lose_no_measurement_and_end_with_the_same_result(
    tracking: str, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    rng = np.random.default_rng(int(os.environ.get("FOXNAS_KILL_SEED", "0")))
    argv = options(cache.parents[1])
    rows: list[Measurement] = []
    compared: list[dict[str, Any]] = []
    killed = 0
    for i in range(KILLS):
        running = Running(["main", *argv])
        # Every step is met by some kill, however fast the machine is.
        assert running.begins(STEPS[i * len(STEPS) // KILLS], seconds=900), "\n".join(running.lines[-20:])
        killed += running.kill(after_seconds=float(rng.uniform(0, 8)))
        rows += _finished_rows(cache)
        compared += [json.loads(path.read_text()) for path in cache.glob("comparisons/*/*.json")]
    capsys.readouterr()
    status = main(["main", *argv])
    assert status == 0, "".join(capsys.readouterr())

    client = mlflow.MlflowClient()
    parents = client.search_runs(["0"], "tags.`foxnas.stage` = 'main'", order_by=["attributes.start_time DESC"])
    assert len(parents) == KILLS + 1
    assert [run.info.status for run in parents[1:]].count("KILLED") == killed
    parent = parents[0]
    steps = {s["name"]: s for s in json.loads(_text(parent.info.run_id, "pipeline.json"))["steps"]}
    assert set(steps) >= set(STEPS)
    for name, step in steps.items():
        run = client.get_run(step["run_id"])
        assert run.info.status == "FINISHED"
        if killed == KILLS:
            # A step of a killed pipeline is shown below the one that went on.
            assert run.data.tags["mlflow.parentRunId"] == parent.info.run_id, name
        # Nothing that was finished was done again.
        same = client.search_runs(["0"], f"tags.`foxnas.step_digest` = '{run.data.tags['foxnas.step_digest']}'")
        assert [r.info.status for r in same].count("FINISHED") == 1, name

    final = _rows(steps["sample"]["outputs"]["measurements"], cache.parents[1] / "final")
    assert set(rows) <= set(final)
    assert len({row.architecture for row in final}) == len(final) == N_SAMPLES
    table = list(csv.DictReader(_text(parent.info.run_id, "predicted_vs_real.csv").splitlines()))
    latencies = [float(row["latency_ms"]) for row in table]
    assert {row["latency_ms"] for row in compared} <= set(latencies)
    for name in ("report.html", "predicted_vs_real.csv", "pipeline.json"):
        assert name in {file.path for file in client.list_artifacts(parent.info.run_id)}
    valid = [row["latency_valid"] == "True" for row in table]
    told = {"accuracy_mean_error": True, "constraint_met": valid[0], "latency_mape": any(valid), "seconds": True}
    assert {key: f"pipeline/{key}" in parent.data.metrics for key in told} == told

    # Two latencies in place of one: only what depends on them is done, and each has its network.
    ms = float(parent.data.params["cfg.chosen_latency_ms"])
    assert main(["main", *argv, "--stage", "none", "--latency-ms", f"{ms},{2 * ms}"]) == 0
    parent = client.search_runs(["0"], "tags.`foxnas.stage` = 'main'", order_by=["attributes.start_time DESC"])[0]
    changed = {s["name"]: s for s in json.loads(_text(parent.info.run_id, "pipeline.json"))["steps"]}
    done = [name for name, step in changed.items() if not step["reused"]]
    assert done == ["search", "quantize", "benchmark", "quantize.2", "benchmark.2", "compare"]
    networks = mlflow.load_table("tables/networks.json", run_ids=[parent.info.run_id])
    # Pandas reads the last digit of a JSON number as it likes.
    assert list(networks["limit_ms"]) == pytest.approx([ms, 2 * ms])
    assert list(networks["model_uri"]) == [changed[name]["outputs"]["model_uri"] for name in ("quantize", "quantize.2")]
    assert networks["model_uri"].nunique() == 2
    assert list(networks["check"]) == changed["compare"]["outputs"]["checks"]
    table = list(csv.DictReader(_text(parent.info.run_id, "predicted_vs_real.csv").splitlines()))
    assert [row["role"] for row in table] == ["found", "found", "front"]
    page = _text(parent.info.run_id, "report.html")
    assert all(uri in page for uri in networks["model_uri"])

    # Without interruption, from the same weights: the same networks and accuracies.
    shutil.rmtree(cache)
    weights = steps["supernet"]["outputs"]["model_uri"]
    command = ["sample", "--supernet", weights, "--target", "cpu", "--n-samples", str(N_SAMPLES), "--device", "none"]
    assert main(command) == 0
    whole = client.search_runs(["0"], "tags.`foxnas.stage` = 'sample'", order_by=["attributes.start_time DESC"])[0]
    assert whole.info.run_id != steps["sample"]["run_id"]
    undisturbed = _rows(f"runs:/{whole.info.run_id}/measurements.csv", cache.parents[1] / "undisturbed")
    assert [(r.architecture, r.accuracy) for r in undisturbed] == [(r.architecture, r.accuracy) for r in final]


@pytest.mark.usefixtures("edgetpu", "shortened")
def test_on_an_edge_tpu_the_compiled_file_is_measured_and_promoted(tracking: str, cache: Path) -> None:
    import mlflow

    asked = ["--target", "edgetpu", "--device", "local", "--max-accuracy-drop", "99"]
    argv = ["main", *options(cache.parents[1]), *asked]
    status = main(argv)
    assert status in (0, 2)
    client = mlflow.MlflowClient()
    (parent,) = client.search_runs(["0"], "tags.`foxnas.stage` = 'main'")
    steps = {s["name"]: s for s in json.loads(_text(parent.info.run_id, "pipeline.json"))["steps"]}
    compiled = steps["quantize"]["outputs"]["edgetpu_model_uri"]
    number = compiled.removeprefix("models:/foxnas-edgetpu-edgetpu/")
    assert number.isdigit()
    assert parent.data.tags["foxnas.model"] == compiled
    rows = _rows(steps["sample"]["outputs"]["measurements"], cache.parents[1] / "rows")
    assert {row.latency_source for row in rows} == {"measured"}
    for name in ("sample", "search", "benchmark"):
        assert client.get_run(steps[name]["run_id"]).data.tags["foxnas.latency_source"] == "measured", name
    measured = json.loads(_text(steps["benchmark"]["run_id"], "benchmark.json"))
    assert measured["edgetpu"]
    assert measured["output_difference"] == 0
    table = list(csv.DictReader(_text(parent.info.run_id, "predicted_vs_real.csv").splitlines()))
    assert all(float(row["latency_ms"]) > 0 for row in table)
    # A limit that nobody asked for is no gate's.
    for run in client.search_runs(["0"], "tags.`foxnas.stage` = 'promote'"):
        verdicts = {v["gate"]: v for v in json.loads(_text(run.info.run_id, "promotion.json"))["verdicts"]}
        assert verdicts["latency"]["limit"] is None
    # The gates may refuse on a busy machine; where they do not, the compiled file is what is served.
    if status == 0:
        staged = client.get_model_version_by_alias("foxnas-edgetpu-edgetpu", "staging")
        assert int(staged.version) == int(number)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--latency-ms", "-1"], "positive number"),
        (["--confidence", "1"], "confidence must be"),
        (["--target", "gpu"], "runtime must be litert or edgetpu"),
        (["--data", "/does/not/exist"], "path of a folder"),
        (["--unknown", "/does/not/exist"], "unknown must be a folder of pictures"),
        (["--device", "ftp://x"], "a device is local"),
        (["--name", "a/b"], "registered model's name"),
        (["--seed", "-1"], "seed must be 0 or more"),
        (["--n-samples", "12"], "the space cpu-tiny need at least 13 networks; received n_samples 12; give 13 or more"),
        (["--n-samples", "10", "--device", "none"], "need at least 11 networks; received n_samples 10"),
        (["--stage", "Best"], "stage must be"),
        (["--target", "rpi4", "--energy", "auto"], "energy and a load that lasts are measured on a device"),
        (["--energy", "/does/not/exist"], "No such file or directory: '/does/not/exist'"),
    ],
)
def test_bad_input_is_told_before_anything_is_done(
    tracking: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    assert main(["main", *argv]) == 2
    assert message in capsys.readouterr().err
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def test_a_space_that_cannot_be_searched_is_refused_before_anything_is_done(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    path = tmp_path / "deep.yaml"
    path.write_text(SPACE.replace("depths: [2, 3]", "depths: [2, 11]"), encoding="utf-8")
    assert main(["main", "--data", "digits", "--space", str(path)]) == 2
    assert "may be at most 20,000,000 for the exact search; received 5 ^ 11" in capsys.readouterr().err
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def _finished_rows(cache: Path) -> list[Measurement]:
    """Rows on disk; a last one that the kill tore was not finished."""
    rows = []
    for path in cache.glob("samples/*/measurements.csv"):
        content = path.read_bytes()
        whole = path.with_name("whole.csv")
        whole.write_bytes(content[: content.rfind(b"\n") + 1])
        try:
            rows += read_measurements(whole)
        except InvalidMeasurementsError:
            assert content.count(b"\n") <= 1
        whole.unlink()
    return rows


def _rows(uri: str, directory: Path) -> list[Measurement]:
    import mlflow

    return read_measurements(mlflow.artifacts.download_artifacts(uri, dst_path=str(directory)))


def _text(run_id: str, path: str) -> str:
    import mlflow

    return mlflow.artifacts.load_text(f"runs:/{run_id}/{path}")


def test_a_latency_that_nobody_asked_for_is_no_gate_s(monkeypatch: pytest.MonkeyPatch) -> None:
    from foxnas_mlflow import MainRequest
    from foxnas_mlflow.workflows.main import _Pipeline

    given: list[float] = []

    def step(self: _Pipeline, name: str, kind: type, inputs: dict[str, Any], *rest: Any, **more: Any) -> None:
        given.append(inputs["max_latency_ms"])

    monkeypatch.setattr(_Pipeline, "_step", step)
    for asked in (
        MainRequest(),
        MainRequest(objective="knee"),
        MainRequest(objective="knee", limits="latency_ms<=60, int8_size_bytes<=4MB"),
        MainRequest(latency_ms=(40, 60)),
    ):
        _Pipeline(asked, *[None] * 5)._promote("models:/foxnas-rpi4/1")  # type: ignore[arg-type]
    assert given == [0, 0, 60, 40]


def test_what_a_busy_machine_spoiled_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from foxnas_mlflow import MainRequest, SearchResult
    from foxnas_mlflow.workflows.main import _Pipeline

    def holds(outputs: dict[str, Any], device: str = "local") -> list[bool]:
        told: list[bool] = []
        step = lambda *_, holds, **more: told.append(holds(outputs))  # noqa: E731
        monkeypatch.setattr(_Pipeline, "_step", step)
        pipeline = _Pipeline(MainRequest(), None, None, device, None, {})  # type: ignore[arg-type]
        found = SearchResult(
            run_id="", model_uri="", model_uris=["models:/s/1"], predictors_uri="", architecture={}, latency_ms=9.0,
            limits="", confidence=0.95, metrics={},
        )  # fmt: skip
        pipeline._benchmark("models:/foxnas-cpu/1", "")
        pipeline._compare("models:/s/1", "", ["models:/foxnas-cpu/1"], found)
        return told

    assert holds({"valid": True, "metrics": {"found_dominated": 0.0}}) == [True, True]
    assert holds({"valid": False, "metrics": {"accuracy_mean_error": 1.0}}) == [False, False]
    # Without a device no measurement could tell more.
    assert holds({"valid": True, "metrics": {}}, device="") == [True, True]
