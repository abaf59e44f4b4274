"""A measurement as MLflow sees it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from mlflow.entities.model_registry import ModelVersion

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.data.preprocess import Normalization, Preprocessing
from foxnas_mlflow.tflite import write_probe
from foxnas_mlflow.tracking.benchmark import MeasuredModel, next_command
from foxnas_mlflow.workflows import BenchmarkRequest, BenchmarkResult, run_benchmark
from foxnas_mlflow.workflows._addresses import where_measured, without_key
from foxnas_mlflow.workflows.benchmark import _summary
from tests.measuring import shorten
from tests.versions import benchmark as made_up

pytestmark = pytest.mark.server

QUICK = ["--runs", "20", "--warmup", "1"]
SPACE = CPU_SPACE.replace(image_sizes=(32,), width_mult=0.5, n_classes=10)
LABELS = tuple("0123456789")


@pytest.fixture
def model_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    path = tmp_path / "probe.tflite"
    path.write_bytes(write_probe(build_network(SPACE, SPACE.smallest())))
    return path


def test_a_registered_model_gets_its_figures(
    tracking: str, model_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    from foxnas_mlflow.devices import Benchmark
    from foxnas_mlflow.flavor import TfliteModel, log_model
    from foxnas_mlflow.tracking.registry import describe_version

    preprocessing = Preprocessing(32, 3, normalization=Normalization((0.5,) * 3, (0.25,) * 3))
    with mlflow.start_run():
        info = log_model(
            TfliteModel(model_path, LABELS, preprocessing),
            name="tflite",
            kind="tflite",
            registered_model_name="mine-cpu",
        )
    described = {"facts": {"file, bytes": "1,234", "latency median, ms": 1e9}, "command": "foxnas benchmark"}
    describe_version("mine-cpu", "1", "tflite", **described)
    asked = [*QUICK, "--sustained-seconds", "0.2"]
    status = main(["benchmark", "--name", "mine", *asked])
    out = capsys.readouterr().out
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"], "tags.`foxnas.stage` = 'benchmark'")
    assert run.info.status == "FINISHED"
    # A busy machine's figures are kept, and the command says by its status that they are not to be trusted.
    assert status == (0 if run.data.metrics["benchmark/valid"] else 3)
    tags = run.data.tags
    assert tags["foxnas.latency_source"] == "measured"
    assert tags["foxnas.target"] == "cpu"
    assert tags["foxnas.emulated"] == "false"
    assert tags["foxnas.device"] == "local"
    assert run.data.params["cfg.threads"] == "1"
    version = client.get_model_version("mine-cpu", "1")
    assert version.tags["emulated"] == "false"
    assert version.tags["benchmark_device"] == tags["foxnas.board"]
    # Its page has what was said before, and what was measured.
    assert "| file, bytes | 1,234 |" in version.description
    median = run.data.metrics["benchmark/latency_ms_p50"]
    assert version.description.count(f"| latency median, ms | {median:.4g} |") == 1
    assert version.description.count("latency median") == 1
    following = "promote --stage staging --model models:/mine-cpu/1"
    if status == 3:
        following = f"benchmark --model models:/mine-cpu/1 --target cpu --device local {' '.join(asked)}"
    assert version.description.endswith(f"foxnas {following}")
    assert out.endswith(f"Next: foxnas {following}\n")
    # What it did under load is on a page of its own.
    under_load = run.data.metrics["benchmark/sustained_p90_ms"]
    assert f"| latency p90 under load, ms | {under_load:.4g} at the end of 0 s |" in version.description
    assert f"{run.info.run_id}: benchmark.json, report.html" in out
    assert f"<b>{under_load:.4g} ms</b>" in mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/report.html")
    figures = {metric.key: metric.value for metric in mlflow.get_logged_model(info.model_id).metrics}
    names = ("latency_ms_p50", "latency_ms_p90", "latency_ms_p99", "latency_ms_mean", "latency_ms_std")
    names += ("throughput_per_s", "peak_memory_bytes", "valid")
    for name in names:
        assert figures[f"benchmark/{name}"] == run.data.metrics[f"benchmark/{name}"]
    # Found by its figures and its board in one call.
    fast = f"model_type = 'tflite' AND metrics.`benchmark/latency_ms_p90` <= {figures['benchmark/latency_ms_p90']}"
    for board, found in ((tags["foxnas.board"], [info.model_id]), ("another board", [])):
        query = f"{fast} AND tags.`foxnas.board` = '{board}'"
        assert [m.model_id for m in mlflow.search_logged_models(filter_string=query, output_format="list")] == found
    benchmark = Benchmark.from_dict(json.loads(mlflow.artifacts.load_text(f"runs:/{run.info.run_id}/benchmark.json")))
    assert benchmark.latency_ms_p50 == figures["benchmark/latency_ms_p50"]
    assert benchmark.output_difference == 0
    assert ("INVALID" in out) == (not benchmark.valid)
    assert run.info.run_id in out
    assert "models:/mine-cpu/1" in out


def test_a_file_is_measured_too(tracking: str, model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow

    shorten(monkeypatch)
    result = run_benchmark(BenchmarkRequest(model=str(model_path), runs=20, warmup=1))
    run = mlflow.get_run(result.run_id)
    assert run.data.metrics["benchmark/latency_ms_p50"] == result.latency_ms
    assert run.data.params["cfg.model"] == str(model_path)


@pytest.mark.parametrize(
    ("valid", "emulated", "version", "command"),
    [
        (True, False, "1", "foxnas promote --stage staging --model 'models:/my net/1'"),
        (True, False, "", "mlflow ui, and compare the run."),
        (False, False, "1", "foxnas benchmark --model 'models:/my net/1' --target rpi4 --device 'ssh://a?python=b'"),
        (False, False, "", "foxnas benchmark --model 'models:/my net/1' --target rpi4 --device 'ssh://a?python=b'"),
        (True, True, "1", "foxnas benchmark --model 'models:/my net/1' --target rpi4 --device ssh://user@board"),
    ],
)
def test_a_promotion_is_advised_where_it_may_pass(valid: bool, emulated: bool, version: str, command: str) -> None:
    figures = {"benchmark/latency_ms_p90": 1.0, "benchmark/valid": float(valid)}
    registered = ModelVersion("my net", version, 0) if version else None
    model = MeasuredModel("models:/my net/1", Path("file"), version=registered)
    found = next_command(made_up(figures, b"", "board", emulated), model, get_target("rpi4"), "ssh://a?python=b")
    assert found == command


def test_temperature_and_clock_are_told_of_every_measurement() -> None:
    model = MeasuredModel("m.tflite", Path("m.tflite"))
    hot = {
        "temperature_c_start": 48.3,
        "temperature_c_end": 61.0,
        "frequency_mhz_start": 600,
        "frequency_mhz_end": 1800,
    }
    for facts, told in (
        (hot, ("48.3 C before the runs, 61.0 C after them", "600 MHz before the runs, 1800 MHz after them")),
        (dict.fromkeys(hot), ("unknown: the machine does not tell",) * 2),
    ):
        once = made_up({"benchmark/latency_ms_p90": 1.0, "benchmark/valid": 1.0}, b"", "board", False)
        measured = dataclasses.replace(once, **facts)
        lines = _summary(measured, model, get_target("cpu"), "run", "next").splitlines()
        assert tuple(line[16:] for line in lines if line.startswith(("  temperature", "  clock"))) == told


def test_a_measurement_is_repeated_as_it_was_made() -> None:
    # A file that a path names may be compiled for the Edge TPU that it was just measured on.
    model = MeasuredModel("m_edgetpu.tflite", Path("m_edgetpu.tflite"))
    figures = {"benchmark/latency_ms_p90": 1.0, "benchmark/valid": 0.0}
    request = BenchmarkRequest(model="m_edgetpu.tflite", threads=4, energy="my meter", signing_key="k.pem")
    options = request.options("threads", "energy")
    command = next_command(made_up(figures, b"", "board", False), model, get_target("edgetpu"), "local", options)
    assert command == (
        "foxnas benchmark --model m_edgetpu.tflite --target edgetpu --device local --threads 4 --energy 'my meter'"
    )
    assert without_key("ssh://a?python=b&key=/home/me/k&edgetpu=usb:1") == "ssh://a?python=b&edgetpu=usb:1"
    assert without_key("ssh://a?key=/home/me/k") == "ssh://a"


def test_how_long_a_board_is_waited_for_makes_no_other_measurement() -> None:
    for device in ("", "local", "ssh://a?python=b&key=c", "ssh://a, ssh://b?python=c"):
        assert where_measured(device) == device
        assert where_measured(f"{device}{'&' if '?' in device else '?'}wait=600") == device
    assert where_measured("ssh://a?wait=5&python=c,ssh://b?wait=6") == "ssh://a?python=c,ssh://b"


def test_a_version_that_serves_is_asked_whether_it_still_may() -> None:
    figures = {"benchmark/latency_ms_p90": 1.0, "benchmark/valid": 1.0}
    version = ModelVersion("net", "1", 0, aliases=["production"])
    model = MeasuredModel("models:/net/1", Path("file"), version=version)
    command = next_command(made_up(figures, b"", "board", False), model, get_target("rpi4"), "local")
    assert command == "foxnas promote --stage production --model models:/net/1"


@pytest.mark.parametrize(("valid", "status"), [(True, 0), (False, 3)])
def test_the_status_tells_whether_figures_can_be_trusted(valid: bool, status: int) -> None:
    assert BenchmarkResult(run_id="a", latency_ms=1, valid=valid, emulated=False, metrics={}).exit_status == status


def test_what_cannot_be_measured_is_one_line_and_no_run(
    tracking: str, model_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    from foxnas_mlflow.flavor import SubnetModel, log_model

    text = tmp_path / "text.tflite"
    text.write_text("not a model")
    with mlflow.start_run():
        log_model(SubnetModel(SPACE.smallest(), SPACE), name="subnet", registered_model_name="mine-subnet-cpu")
    runs = len(mlflow.MlflowClient().search_runs(["0"]))
    capsys.readouterr()
    for argv, message in (
        ([], "no version of foxnas-cpu is registered"),
        (["--model", str(text)], "TensorFlow Lite"),
        (["--model", "/does/not/exist.tflite"], "can be read"),
        (["--model", "models:/mine-subnet-cpu/1"], "only a model of kind tflite"),
        (["--model", str(model_path), "--target", "rpi4"], "none of its own"),
        (["--model", str(model_path), "--device", "none"], "a benchmark is made on a device; received none"),
        (["--model", str(model_path), "--target", "gpu"], "TensorFlow Lite"),
        (["--model", str(model_path), "--runs", "0"], "runs must be positive"),
        (["--model", str(model_path), "--device", "board"], "a device is local"),
    ):
        assert main(["benchmark", *argv]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert message in lines[0]
    assert len(mlflow.MlflowClient().search_runs(["0"])) == runs
