"""A search as MLflow sees it: tags, metrics, artifacts, registered models, run states."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
from multiprocessing.synchronize import Barrier
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors import PredictorSet, reference_predictors
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE
from foxnas_mlflow.flavor import load_model, model_id_of
from tests.forked import CONTEXT
from tests.pipelines import Running

pytestmark = pytest.mark.server


def test_search_logs_what_the_contract_names(tracking: str, tmp_path: Path) -> None:
    import mlflow

    assert main(["search", "--latency-ms", "60", "--evaluations", "5000"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.info.status == "FINISHED"
    tags = run.data.tags
    assert tags["foxnas.stage"] == "search"
    assert tags["foxnas.target"] == "rpi4"
    assert tags["foxnas.space"] == "cpu"
    assert tags["foxnas.latency_source"] == "cost_model"
    assert tags["foxnas.predictors"] == "reference"
    assert "2021" in tags["foxnas.latency_note"]
    assert run.data.params["cfg.latency_ms"] == "60.0"
    metrics = run.data.metrics
    assert metrics["search/predicted_latency_upper_ms"] <= 60
    assert metrics["search/predicted_latency_ms"] < metrics["search/predicted_latency_upper_ms"]
    np.testing.assert_allclose(metrics["search/exact_accuracy"], metrics["search/predicted_accuracy"])
    for key in ("optimality_gap", "seconds", "evaluations", "front_size", "front_seconds"):
        assert f"search/{key}" in metrics
    directory = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "a")))
    architecture = Architecture.from_json((directory / "architecture.json").read_text())
    with (directory / "front.csv").open() as file:
        front = list(csv.DictReader(file))
    assert len(front) == metrics["search/front_size"]
    some = front[:: len(front) // 7]
    predictors = reference_predictors("rpi4")
    got = predictors.predict_table([Architecture.from_json(r["architecture"]) for r in some])
    np.testing.assert_allclose(got["latency_ms"], [float(r["latency_ms"]) for r in some])
    np.testing.assert_allclose(got["accuracy"], [float(r["accuracy"]) for r in some])
    with (directory / "trace.csv").open() as file:
        trace = list(csv.DictReader(file))
    assert list(trace[0]) == ["evaluation", "best_accuracy", "latency_ms", "chain"]
    certificate = json.loads((directory / "certificate.json").read_text())
    assert certificate["proof_gap"] == 0

    version = client.get_model_version("foxnas-subnet-rpi4", "1")
    assert version.tags["weights"] == "none"
    # There is no supernet that could give it weights: one is advised to be trained.
    assert "foxnas supernet --name foxnas" in version.description
    assert "models:/foxnas-supernet" not in version.description
    assert "| predicted accuracy, % | " in version.description
    assert "Next:" in version.description
    assert "foxnas_mlflow.load_model('models:/foxnas-subnet-rpi4/1')" in version.description
    assert str(architecture).split(" | ")[0] in version.description
    assert f"![front](get-artifact?path=front.png&run_uuid={run.info.run_id})" in version.description
    assert (directory / "front.png").read_bytes().startswith(b"\x89PNG")
    assert (version.tags["predictors"], version.tags["search_run"]) == ("reference", run.info.run_id)
    shown = mlflow.load_table("tables/front.json", run_ids=[run.info.run_id])
    assert len(shown) == metrics["search/front_size"]
    model = mlflow.pyfunc.load_model("models:/foxnas-predictors-rpi4/1")
    table = model.predict(pd.DataFrame({"architecture": [architecture.to_json()]}), params={"confidence": 0.9})
    np.testing.assert_allclose(table["accuracy"][0], metrics["search/predicted_accuracy"])
    assert table["latency_ms_lower"][0] < table["latency_ms"][0] < table["latency_ms_upper"][0]


def test_a_target_that_was_never_measured_borrows_accuracy_and_says_so(
    tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["search", "--target", "ethos-u55-128", "--latency-ms", "20", "--evaluations", "2000"]) == 0
    said = "".join(capsys.readouterr())
    assert "milliseconds estimated by Arm's compiler Vela; nothing was measured" in said
    assert "does not depend on the board" in said


def test_limits_are_on_the_version_on_the_page_and_in_the_metrics(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    from foxnas_mlflow.core.searchers import search

    limits = "int8_size_bytes<=3.5MB, peak_activation_bytes<=1.2MB"
    assert main(["search", "--latency-ms", "60", "--limits", limits, "--evaluations", "2000"]) == 0
    expected = search(reference_predictors("rpi4"), 60, limits=limits, evaluations=2000)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    prices = {key: v for key, v in run.data.metrics.items() if key.startswith("search/limit_price/")}
    assert prices == {f"search/limit_price/{p.limit.quantity}": p.per_unit for p in expected.prices}
    assert prices["search/limit_price/peak_activation_bytes"] == 0
    binding = expected.prices[1]
    words = f"binds, costs {binding.lost:.2f} points, one more kB buys {1e3 * binding.per_unit:.3g} points"
    version = client.get_model_version("foxnas-subnet-rpi4", "1")
    page = Path(mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/report.html", dst_path=str(tmp_path)))
    for text in (version.description, capsys.readouterr().out):
        assert words in text
        assert "int8_size_bytes <= 3500000" in text
        assert "does not bind" in text
    assert f"one more kB buys {1e3 * binding.per_unit:.3g} points" in page.read_text()
    assert version.tags["limits"] == "latency_ms <= 60, int8_size_bytes <= 3500000, peak_activation_bytes <= 1200000"


def test_several_latencies_register_a_network_each_in_one_run_with_one_front(tracking: str, tmp_path: Path) -> None:
    import mlflow

    from foxnas_mlflow.core.searchers import search_each
    from tests.versions import version_metrics

    assert main(["search", "--latency-ms", "45,90", "--evaluations", "2000"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    directory = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, dst_path=str(tmp_path / "a")))
    names = {"architecture.json", "certificate.json", "trace.csv", "report.html"}
    assert {path.name for path in directory.iterdir() if path.is_file()} == {"front.csv", "front.png", "report.html"}
    expected = search_each(reference_predictors("rpi4"), [45.0, 90.0], evaluations=2000)
    for number, (outcome, limit) in enumerate(zip(expected, (45, 90), strict=True), start=1):
        assert {path.name for path in (directory / f"{limit}ms").iterdir()} == names
        found = Architecture.from_json((directory / f"{limit}ms" / "architecture.json").read_text())
        assert found == outcome.architecture
        version = client.get_model_version("foxnas-subnet-rpi4", str(number))
        assert version.tags["latency_ms"] == str(limit)
        assert version_metrics(version)["search/predicted_accuracy"] == pytest.approx(outcome.accuracy)
    page = (directory / "report.html").read_text()
    for outcome in expected:
        assert f"{outcome.accuracy:.2f}" in page


def test_a_project_searches_the_least_of_a_quantity_and_a_command_the_knee(tracking: str, root: Path) -> None:
    import mlflow

    from foxnas_mlflow.core.searchers import pose, solve

    predictors, client = reference_predictors("rpi4"), mlflow.MlflowClient()
    asked = {"objective": "int8_size_bytes", "min_accuracy": "72", "limits": "latency_ms<=80ms, macs < 300M"}
    submitted = mlflow.projects.run(
        str(root), entry_point="search", parameters={**asked, "evaluations": "2000"}, env_manager="local"
    )
    run = client.get_run(submitted.run_id)
    assert run.info.status == "FINISHED"
    metrics = run.data.metrics
    assert metrics["search/predicted_latency_upper_ms"] <= 80
    problem = pose(predictors, limits="latency_ms<=80, macs<=300e6", objective="int8_size_bytes", min_accuracy=72)
    assert metrics["model/int8_parameter_bytes"] == solve(problem).least
    assert metrics["search/predicted_accuracy"] >= 72
    assert main(["search", "--objective", "knee", "--evaluations", "2000"]) == 0
    knee = solve(pose(predictors, objective="knee"))
    assert client.get_model_version("foxnas-subnet-rpi4", "2").tags["latency_ms"] == f"{knee.latency_upper_ms:g}"


def test_a_changed_model_file_is_refused(tracking: str, tmp_path: Path) -> None:
    import mlflow
    from mlflow.exceptions import MlflowException

    from foxnas_mlflow.flavor import load_model, save_model

    path = tmp_path / "model"
    save_model(reference_predictors("rpi4"), path)
    frame = pd.DataFrame({"architecture": [CPU_SPACE.smallest(192).to_json()]})
    before = mlflow.pyfunc.load_model(str(path)).predict(frame)
    np.testing.assert_allclose(
        before["latency_ms"], load_model(str(path)).predict_table([CPU_SPACE.smallest(192)])["latency_ms"]
    )
    file = path / "data" / "predictors.json"
    file.write_text(file.read_text().replace("rpi4", "rpi5", 1))
    with pytest.raises(MlflowException, match=r"predictors\.json changed"):
        mlflow.pyfunc.load_model(str(path))


def test_fit_makes_predictors_of_every_column(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    networks = CPU_SPACE.sample(np.random.default_rng(0), n=50, image_size=256)
    ms = np.array(reference_predictors("rpi4").predict_table(networks)["latency_ms"])
    noise = np.random.default_rng(1).normal(1, 0.004, (2, len(ms)))
    table = pd.DataFrame(
        {
            "architecture": [a.to_json() for a in networks],
            "latency_ms": ms * noise[0],
            "latency_source": "measured",
            "latency_ms@second": 2 * ms * noise[1],
        }
    )
    path = tmp_path / "m.csv"
    table.to_csv(path, index=False)
    assert main(["fit", "--measurements", str(path)]) == 0
    assert "needs predictors of accuracy too" in capsys.readouterr().out
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    for label in ("latency", "latency_ms-at-second"):
        assert 0 < run.data.metrics[f"predictor/{label}/cv_mape"] < 1
        names = {Path(f.path).name for f in mlflow.MlflowClient().list_artifacts(run.info.run_id, f"predictor/{label}")}
        assert {"summary.txt", "summary.csv", "coefficients.json", "residuals.png", "qq.png", "effects.png"} <= names
    model = mlflow.pyfunc.load_model("models:/foxnas-predictors-rpi4/1")
    predicted = model.predict(pd.DataFrame({"architecture": [networks[0].to_json()]}))
    assert predicted["latency_ms@second_lower"][0] < 2 * ms[0] < predicted["latency_ms@second_upper"][0]
    for column, cells, message in (("energy_mj", 5.0, "energy_mj must vary"), ("note", "fine", "a column 'note'")):
        table.assign(**{column: cells}).to_csv(path, index=False)
        assert main(["fit", "--measurements", str(path)]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if message in line]
        assert "received" in line


def test_fit_registers_predictors_that_search_uses(tracking: str, shared_data: Path, tmp_path: Path) -> None:
    import mlflow

    assert main(["fit", "--measurements", str(shared_data / "foxnas_rpi4_cpu256.csv"), "--ceiling", "78"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    metrics = run.data.metrics
    assert round(metrics["predictor/accuracy/r2_adjusted_paper"], 4) == 0.9391
    assert metrics["predictor/latency/cv_mape"] < metrics["predictor/latency/cv_mape_paper"]
    names = {f.path for f in client.list_artifacts(run.info.run_id, "predictor/accuracy")}
    assert "predictor/accuracy/summary.txt" in names
    (data,) = run.inputs.dataset_inputs
    assert (data.dataset.name, json.loads(data.dataset.profile)["num_rows"]) == ("measurements", 300)
    version = client.get_model_version("foxnas-predictors-rpi4", "1")
    assert "| accuracy, adjusted R2 | " in version.description
    logged = client.get_logged_model(model_id_of(version) or "")
    assert {m.key for m in logged.metrics or []} >= {"predictor/accuracy/r2_adjusted", "predictor/latency/cv_mape"}
    uri = "models:/foxnas-predictors-rpi4/1"
    assert main(["search", "--predictors", uri, "--latency-ms", "90", "--evaluations", "5000"]) == 0
    latest = client.search_runs(["0"], order_by=["attributes.start_time DESC"])[0]
    assert latest.data.tags["foxnas.predictors"] == uri
    # They are registered already, and so they are not registered again.
    versions = client.search_model_versions("name='foxnas-predictors-rpi4'")
    assert [v.version for v in versions] == [version.version]
    # Without its files a version is nothing to use again.
    predictors = load_model(uri)
    assert isinstance(predictors, PredictorSet)
    predictors.save(tmp_path / "predictors.json")
    (description,) = tmp_path.glob(f"mlruns/**/{model_id_of(version)}/artifacts/MLmodel")
    description.unlink()
    command = ["search", "--predictors", str(tmp_path / "predictors.json"), "--latency-ms", "90"]
    assert main([*command, "--evaluations", "5000"]) == 0
    assert len(client.search_model_versions("name='foxnas-predictors-rpi4'")) == 2


def test_the_next_command_names_a_target_of_ones_own_by_its_file(
    tracking: str, shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    path = tmp_path / "my board.yaml"
    path.write_text("name: my-board\n")
    assert main(["fit", "--measurements", str(shared_data / "foxnas_rpi4_cpu256.csv"), "--target", str(path)]) == 0
    *_, following = capsys.readouterr().out.partition("Next: ")
    page = mlflow.MlflowClient().get_model_version("foxnas-predictors-my-board", "1").description
    for command in (following, page.rpartition("Next:")[-1]):
        _, *arguments = shlex.split(command)
        assert arguments[:3] == ["search", "--target", str(path)]
    assert main([*shlex.split(following)[1:], "--evaluations", "1000"]) == 0
    assert "Found for my-board" in capsys.readouterr().out


def test_accuracy_of_ones_own_and_the_boards_cost_model_make_predictors(tracking: str, tmp_path: Path) -> None:
    import mlflow

    from foxnas_mlflow.core.cost import network_cost
    from foxnas_mlflow.core.measurements import Measurement, write_measurements
    from foxnas_mlflow.core.network import build_network

    space = TPU_SPACE.replace(name="mine", image_sizes=(48,), width_mult=0.5, n_classes=10)
    (tmp_path / "space.yaml").write_text(json.dumps(space.to_dict()))
    rng = np.random.default_rng(0)
    rows = [
        Measurement(a, accuracy=70 + 1e-6 * network_cost(build_network(space, a)).params + rng.normal(0, 0.1))
        for a in space.sample(rng, n=50)
    ]
    write_measurements(rows, tmp_path / "measurements.csv")
    arguments = ["--measurements", str(tmp_path / "measurements.csv"), "--space", str(tmp_path / "space.yaml")]
    assert main(["fit", "--target", "edgetpu", *arguments]) == 0
    uri = "models:/foxnas-predictors-edgetpu/1"
    assert (
        main(["search", "--target", "edgetpu", "--predictors", uri, "--latency-ms", "2", "--evaluations", "5000"]) == 0
    )
    search, fit = mlflow.MlflowClient().search_runs(["0"], order_by=["attributes.start_time DESC"])
    assert fit.data.tags["foxnas.latency_source"] == "cost_model"
    assert 3 < fit.data.metrics["predictor/latency/left_out_mape"] < 4
    assert "published figures" in search.data.tags["foxnas.latency_note"]
    assert search.data.metrics["search/predicted_latency_upper_ms"] <= 2


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (
            "http://127.0.0.1:9",
            "the tracking server does not answer as it should: runs/create: Connection refused; check",
        ),
        ("sqlite:////proc/x.db", "the tracking store must be a database file that can be opened"),
    ],
)
def test_an_unreachable_store_is_one_line(uri: str, message: str) -> None:
    running = Running(["search", "--evaluations", "1000"], {"MLFLOW_TRACKING_URI": uri})
    assert running.end(120) == 2
    assert running.lines[-1].startswith(f"foxnas: {message}")
    assert "Traceback" not in "\n".join(running.lines)


def begin(directory: Path, together: Barrier) -> None:
    """What a command begins with, in a directory that says of no store."""
    os.chdir(directory)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    from foxnas_mlflow.tracking.run import entry_run

    together.wait(120)
    with entry_run(stage="search", params={}):
        pass


def test_commands_that_begin_together_in_an_empty_directory_make_one_store(tmp_path: Path) -> None:
    together = CONTEXT.Barrier(3)
    processes = [CONTEXT.Process(target=begin, args=(tmp_path, together)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store:
        assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)] * 3
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".lock"] == []


def test_the_next_command_ends_what_sigkill_left_running(tracking: str) -> None:
    import mlflow

    from foxnas_mlflow.tracking.run import entry_run

    code = (
        "import time\nfrom foxnas_mlflow.tracking.run import entry_run\n"
        "with entry_run(stage='search', params={}) as run:\n    print(run.run_id, flush=True)\n    time.sleep(600)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    killed, alive = (process.stdout.readline().strip() for process in processes if process.stdout is not None)
    client = mlflow.MlflowClient()
    processes[0].kill()
    processes[0].wait()
    assert client.get_run(killed).info.status == "RUNNING"
    with entry_run(stage="fit", params={}):
        assert client.get_run(killed).info.status == "KILLED"
        assert client.get_run(alive).info.status == "RUNNING"
    processes[1].terminate()
    for process in processes:
        process.communicate(timeout=60)
    assert processes[1].returncode == 143
    assert client.get_run(alive).info.status == "KILLED"


def test_an_error_ends_the_run_as_failed(tracking: str) -> None:
    import mlflow

    from foxnas_mlflow.tracking.run import entry_run

    with pytest.raises(RuntimeError, match="no"), entry_run(stage="fit", params={"a": 1}):
        raise RuntimeError("no")
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.info.status == "FAILED"


def test_sigterm_in_the_middle_of_a_search_ends_the_run_as_killed(tracking: str) -> None:
    import mlflow

    client = mlflow.MlflowClient()
    running = Running(["search", "--evaluations", "1000000000"])
    deadline = time.monotonic() + 120
    while not (runs := client.search_runs(["0"])) or "cfg.latency_ms" not in runs[0].data.params:
        assert time.monotonic() < deadline
        assert running.is_alive
        time.sleep(0.2)
    assert running.interrupt(signal.SIGTERM) == 143
    assert client.get_run(runs[0].info.run_id).info.status == "KILLED"


def test_where_all_networks_are_as_accurate_the_fastest_is_registered(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from foxnas_mlflow.core.measurements import Measurement, write_measurements

    networks = CPU_SPACE.sample(np.random.default_rng(0), n=45, image_size=192)
    latencies = reference_predictors("rpi4").predict_table(networks)["latency_ms"]
    rows = [Measurement(a, 100.0, float(ms), "measured") for a, ms in zip(networks, latencies, strict=True)]
    write_measurements(rows, tmp_path / "rows.csv")
    assert main(["fit", "--measurements", str(tmp_path / "rows.csv"), "--target", "rpi4"]) == 0
    told = "all 45 networks that were evaluated are right at 100 % of the images: none is better than the fastest one"
    assert told in capsys.readouterr().out
    uri = "models:/foxnas-predictors-rpi4/1"
    assert main(["search", "--predictors", uri, "--latency-ms", "60", "--evaluations", "2000"]) == 0
    assert told in capsys.readouterr().out
    import mlflow

    run = mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.stage` = 'search'")[0]
    assert run.data.metrics["search/predicted_accuracy"] == pytest.approx(100)
    found = Architecture.from_dict(mlflow.artifacts.load_dict(f"runs:/{run.info.run_id}/architecture.json"))
    assert found == CPU_SPACE.smallest(CPU_SPACE.image_sizes[0])
