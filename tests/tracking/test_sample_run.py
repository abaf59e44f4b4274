"""Sampling as MLflow sees it, samplings that are killed and go on, and fits of what was sampled."""

from __future__ import annotations

import dataclasses
import re
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.core.measurements import Measurement, Timing, read_measurements, write_measurements
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.space import get_space
from foxnas_mlflow.testing import FakeBoard
from foxnas_mlflow.workflows import SampleRequest
from foxnas_mlflow.workflows.sample import _check_latencies
from tests.measuring import shorten
from tests.pipelines import Running, waiting
from tests.supernets import MINI_SPACE, register_mini_supernet

pytestmark = [pytest.mark.server, pytest.mark.train]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _rows(tmp_path: Path, run_id: str) -> list[Measurement]:
    import mlflow

    path = mlflow.artifacts.download_artifacts(f"runs:/{run_id}/measurements.csv", dst_path=str(tmp_path / run_id))
    return read_measurements(path)


def _runs(stage: str) -> list[str]:
    import mlflow

    runs = mlflow.MlflowClient().search_runs(["0"], f"tags.`foxnas.stage` = '{stage}'", order_by=["start_time"])
    return [run.info.run_id for run in runs]


def test_rows_are_accuracies_of_the_evaluator_and_estimates_of_the_cost_model(tracking: str, tmp_path: Path) -> None:
    import mlflow

    from foxnas_mlflow.data import load_dataset
    from foxnas_mlflow.flavor import load_model
    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet

    uri = register_mini_supernet()
    assert main(["sample", "--n-samples", "5", "--image-size", "8,16", "--seed", "2", "--device", "none"]) == 0
    (run_id,) = _runs("sample")
    run = mlflow.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags["foxnas.latency_source"] == "cost_model"
    assert run.data.tags["foxnas.space"] == "cpu-mini"
    assert run.data.params["cfg.supernet"] == uri
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.name == "digits"
    rows = _rows(tmp_path, run_id)
    assert len({row.architecture for row in rows}) == 5
    assert {row.architecture.image_size for row in rows} == {8, 16}
    model = load_model(uri)
    evaluator = SubnetEvaluator(
        Supernet.from_weights(MINI_SPACE, model.weights), load_dataset("digits", seed=3, max_train=400), seed=2
    )
    for row in rows:
        MINI_SPACE.validate(row.architecture)
        assert row.latency_source == "cost_model"
        assert row.latency_ms > 0
    evaluations = [evaluator.evaluate(row.architecture) for row in rows]
    np.testing.assert_allclose([row.accuracy for row in rows], [e.top1_percent for e in evaluations])
    floor = np.sqrt(np.mean([e.standard_error**2 for e in evaluations]))
    np.testing.assert_allclose(run.data.metrics["sample/noise_floor"], floor)
    shown = mlflow.load_table("tables/measurements.json", run_ids=[run_id])
    np.testing.assert_allclose(shown["accuracy"], [row.accuracy for row in rows])
    history = mlflow.MlflowClient().get_metric_history(run_id, "sample/accuracy")
    assert [m.value for m in sorted(history, key=lambda m: m.step)] == [row.accuracy for row in rows]


def test_validation_images_that_memory_does_not_hold_are_told(
    tracking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from foxnas_mlflow.tracking.inputs import open_supernet
    from foxnas_mlflow.workflows import _evaluation

    trained = open_supernet(register_mini_supernet())
    monkeypatch.setattr(_evaluation, "_CACHED_BYTES", 90 * (8 * 8 + 16 * 16))
    for asked in (0, 10_000, 300, 90):
        with _evaluation.supernet_evaluators(trained, image_sizes=(8, 16), validation_images=asked) as evaluators:
            assert evaluators.n_images == 90
    told = [message.split(":")[0] for message in caplog.messages]
    assert told == [f"accuracies are of 90 validation images, not of {n}" for n in (359, 359, 300)]


def test_a_sampling_killed_in_the_middle_goes_on_by_the_same_command(
    tracking: str, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_mini_supernet()
    command = ["sample", "--n-samples", "24", "--n-measurements", "18", "--image-size", "8"]
    sixth = waiting(tmp_path / "waiting", "foxnas_mlflow.supernet:SubnetEvaluator.evaluate", 6)
    running = Running(command, env=sixth)
    deadline = time.monotonic() + 180
    while not (files := list(cache.glob("foxnas_mlflow/samples/*/measurements.csv"))) or _lines(files[0]) < 5:
        assert time.monotonic() < deadline
        assert running.is_alive
        time.sleep(0.005)
    assert running.kill(after_seconds=0)
    kept = files[0].read_bytes()
    n_kept = kept.count(b"\n") - 1
    assert 4 <= n_kept < 24
    # A torn last row, as a power cut leaves it.
    files[0].write_bytes(kept + kept.splitlines()[1][:40])

    assert main(command) == 0
    assert not list(cache.glob("foxnas_mlflow/samples/*"))
    _, resumed = _runs("sample")
    rows = _rows(tmp_path, resumed)
    (tmp_path / "kept.csv").write_bytes(kept)
    assert rows[:n_kept] == read_measurements(tmp_path / "kept.csv")
    assert len({row.architecture for row in rows}) == len(rows) == 24
    assert [row.latency_ms is None for row in rows] == [i >= 18 for i in range(24)]

    # An uninterrupted sampling finds the same rows; its first ones are those of a shorter sampling.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    assert main([*command[:1], "--n-samples", "8", *command[3:]]) == 0
    assert _rows(tmp_path, _runs("sample")[2]) == rows[:8]


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n")


def test_rows_of_another_run_are_gone_on_from_and_not_repeated(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_mini_supernet()
    assert main(["sample", "--n-samples", "4", "--image-size", "8", "--design", "random"]) == 0
    (first,) = _runs("sample")
    assert main(["sample", "--n-samples", "7", "--image-size", "8", "--seed", "5", "--resume", first]) == 0
    rows = _rows(tmp_path, _runs("sample")[1])
    assert rows[:4] == _rows(tmp_path, first)
    assert len({row.architecture for row in rows}) == 7
    # Of another supernet or target they say nothing.
    register_mini_supernet()
    command = ["sample", "--n-samples", "7", "--image-size", "8", "--resume", first]
    for other in (["--target", "edgetpu"], ["--supernet", "models:/foxnas-supernet/2"]):
        assert main(["sample", "--supernet", "models:/foxnas-supernet/1", *command[1:], *other]) == 2
        assert "the rows to go on from must be of the same" in capsys.readouterr().err
    # A table of one's own, of whose rows some have what was measured besides.
    given = [rows[0], dataclasses.replace(rows[1], quantities={"energy_mj": 3.5})]
    write_measurements(given, tmp_path / "own.csv")
    assert main(["sample", "--n-samples", "3", "--image-size", "8", "--resume", str(tmp_path / "own.csv")]) == 0
    assert _rows(tmp_path, _runs("sample")[-1])[:2] == given


def test_two_processes_do_not_mix_their_rows(tracking: str, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.files import worked_on

    cache.mkdir()
    for _ in range(2):
        with (
            worked_on(cache / "lock", "the rows"),
            pytest.raises(InvalidInputError, match="one process at a time works on the rows"),
            worked_on(cache / "lock", "the rows"),
        ):
            pass


def test_what_was_sampled_is_fitted_and_searched(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    uri = register_mini_supernet()
    # Random weights are right about once in ten: their accuracies are soon known to 60 points.
    assert main(["sample", "--n-samples", "40", "--image-size", "8,12", "--stop-width", "60"]) == 0
    (run_id,) = _runs("sample")
    run = mlflow.get_run(run_id)
    assert run.data.tags["foxnas.stopped_early"] == "true"
    assert run.data.metrics["sample/front_width"] <= 60
    assert run.data.metrics["sample/n_samples"] == len(_rows(tmp_path, run_id)) < 40
    assert "stopped: accuracies along it are known to" in capsys.readouterr().out

    # Neither the space nor the images are named again.
    assert main(["fit", "--measurements", f"runs:/{run_id}/measurements.csv"]) == 0
    (fit_id,) = _runs("fit")
    fit = mlflow.get_run(fit_id)
    assert fit.data.tags["foxnas.space"] == "cpu-mini"
    assert fit.data.metrics["predictor/accuracy/noise_floor"] == run.data.metrics["sample/noise_floor"]
    out = capsys.readouterr().out
    assert "noise floor" in out
    # The search gives its network the weights of the supernet that was sampled.
    assert f"--predictors models:/foxnas-predictors-rpi4/1 --supernet {uri} --latency-ms" in out
    predictors = "models:/foxnas-predictors-rpi4/1"
    command = ["search", "--predictors", predictors, "--supernet", uri, "--latency-ms", "60", "--evaluations", "1000"]
    assert main([*command, "--verify", "2", "--measurements", predictors]) == 0
    (search_id,) = _runs("search")
    search = mlflow.get_run(search_id)
    assert set(search.data.params["cfg.image_size"].split(",")) <= {"8", "12"}
    # The cost model is the authors' board's, and said to be; the accuracies are the user's.
    assert "2021" in search.data.tags["foxnas.latency_note"]
    page = mlflow.artifacts.download_artifacts(f"runs:/{search_id}/report.html", dst_path=str(tmp_path / "page"))
    text = re.sub("<script>.*?</script>", "", Path(page).read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "extrapolates" in text
    assert "ImageNet" not in text


def test_latencies_are_measured_on_this_machine(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    shorten(monkeypatch)
    register_mini_supernet()
    assert main(["sample", "--target", "cpu", "--device", "local", "--n-samples", "2", "--image-size", "8"]) == 0
    (run_id,) = _runs("sample")
    assert mlflow.get_run(run_id).data.tags["foxnas.latency_source"] == "measured"
    rows = _rows(tmp_path, run_id)
    assert len(rows) == 2
    for row in rows:
        assert row.latency_ms is not None
        assert row.latency_source == "measured"
        assert row.device
        assert row.runtime.startswith("ai-edge-litert")
        assert row.n_runs >= 20

    # An address may lead to another board than before: its rows are not mixed with these.
    own = tmp_path / "own.csv"
    command = ["sample", "--target", "cpu", "--device", "local", "--n-samples", "3", "--image-size", "8"]
    for row, device, status in ((rows[0], "Raspberry Pi 5", 2), (rows[1], f"{rows[1].device} at ssh://pi@a", 0)):
        write_measurements([dataclasses.replace(row, device=device)], own)
        assert main([*command, "--resume", str(own)]) == status
    assert "the rows of a sampling are measured on one machine" in capsys.readouterr().err


def test_energy_is_measured_fitted_and_limited(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A board with a meter, of which only some of the networks were asked for."""
    import mlflow

    def board(*_: object, **__: object) -> FakeBoard:
        # A start, and what each byte of weights costs.
        return FakeBoard(lambda model: 1 + len(model) / 1e5, energy_mj=lambda model: 2 + len(model) / 1e4)

    monkeypatch.setattr("foxnas_mlflow.devices.connect", board)
    # Whose answers are this machine's own: nothing to compare.
    monkeypatch.setattr("foxnas_mlflow.devices.host_answer", lambda model: None)
    uri = register_mini_supernet()
    command = ["sample", "--target", "cpu", "--device", "ssh://pi@board", "--image-size", "8,12", "--n-samples", "36"]
    command += ["--n-measurements", "34", "--energy", "auto"]
    assert main(command) == 0
    assert re.search(r"energy_mj   \S+ to \S+, 34 subnets", capsys.readouterr().out)
    (run_id,) = _runs("sample")
    rows = _rows(tmp_path, run_id)
    assert [set(row.quantities) for row in rows] == [{"energy_mj"}] * 34 + [set()] * 2
    assert main(["fit", "--measurements", f"runs:/{run_id}/measurements.csv", "--target", "cpu"]) == 0
    assert "--limits 'energy_mj<=...'" in capsys.readouterr().out
    limit = float(np.median([row.quantities["energy_mj"] for row in rows[:34]]))
    search = ["search", "--predictors", "models:/foxnas-predictors-cpu/1", "--supernet", uri, "--target", "cpu"]
    search += ["--limits", f"energy_mj<={limit}", "--evaluations", "500", "--verify", "1", "--device", "none"]
    assert main(search) == 0
    assert "energy_mj" in mlflow.get_run(_runs("search")[0]).data.params["cfg.limits"]
    # Rows without it teach none, and a cost model has none.
    write_measurements([dataclasses.replace(rows[0], quantities={})], tmp_path / "own.csv")
    capsys.readouterr()
    assert main([*command, "--resume", str(tmp_path / "own.csv")]) == 2
    assert "rows to go on from must have the energy" in capsys.readouterr().err
    # Nor are those with it of use beside networks that are measured without.
    write_measurements(rows[:1], tmp_path / "own.csv")
    assert main([*command[:-2], "--resume", str(tmp_path / "own.csv")]) == 2
    assert "with the column energy_mj; give --energy too, or remove the column" in capsys.readouterr().err
    assert main(["sample", "--n-samples", "2", "--device", "none", "--energy", "auto"]) == 2
    assert "energy is measured on a device; received energy=auto with the cost model" in capsys.readouterr().err


class DisturbedLater:
    """A timer whose second network is disturbed always, and whose first one when it is measured once more."""

    source, where, aside, predictors = "measured", "a board", {}, None

    def __init__(self, networks: list[Architecture]) -> None:
        self._networks, self._n = networks, 0

    def time(self, architecture: Architecture) -> Timing:
        self._n += 1
        disturbed = architecture == self._networks[1] or self._n > 2
        return Timing(5.0, "measured", problems=(f"shared {self._n}",) if disturbed else ())


def test_what_was_disturbed_the_second_time_keeps_its_latency_and_is_not_left_out(
    tracking: str, tmp_path: Path
) -> None:
    import mlflow

    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.workflows._samples import SampleLog, log_samples

    networks = MINI_SPACE.sample(np.random.default_rng(0), n=2)
    supernet = SimpleNamespace(uri="models:/s/1", dataset=SimpleNamespace(source="digits"))
    path = tmp_path / "measurements.csv"
    with entry_run(stage="sample", params={}) as run:
        log = SampleLog(run, path, DisturbedLater(networks), n_images=100, before=[])
        rows = collect(networks, path, evaluate=lambda a: 70.0, time=log.time, doubt=lambda rows: networks[:1])
        _, said = log_samples(run, rows, log, supernet=supernet, target=get_target("cpu"))
    assert [row.latency_ms for row in rows] == [5.0, None]
    assert "left out    1 latencies that cannot be trusted, the last: shared 3" in said
    assert mlflow.get_run(run.run_id).data.tags["foxnas.invalid_measurements"] == "1"


def test_a_sample_without_enough_latencies_is_not_done() -> None:
    """Thirteen of sixteen unusable: the next step could do nothing with it, so the same command goes on from it."""
    space = get_space("cpu")
    networks = space.sample(np.random.default_rng(0), n=16, image_size=192)
    rows = [Measurement(a, 70.0, 40.0, "measured") if i < 13 else Measurement(a, 70.0) for i, a in enumerate(networks)]
    few = [Measurement(row.architecture, row.accuracy) if i > 2 else row for i, row in enumerate(rows)]
    with pytest.raises(DeviceError, match=r"received 3 of 16; quiet and cool .* run the same command again: what is"):
        _check_latencies(few, space, SampleRequest(device="local"), [])
    # No quieter hour changes what a machine computes.
    differs = "the output differs from the host's by 7 levels"
    with pytest.raises(DeviceError, match=rf"received 3 of 16 \({differs}\); update the machine's runtime"):
        _check_latencies(few, space, SampleRequest(device="local"), ["the machine was throttled", differs])
    _check_latencies(rows, space, SampleRequest(device="local"), [])
    # Without a device there is nothing to wait for, and few that were asked for are what was asked for.
    _check_latencies(few, space, SampleRequest(), [])
    _check_latencies(few, space, SampleRequest(device="local", n_measurements=3), [])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--supernet", "models:/nothing/1"], "nothing"),
        (["--name", "other"], "train one with: foxnas supernet"),
        (["--data", "fashion-mnist-that-is-not-there"], "data must be"),
        (["--image-size", "24"], "image_size must be among those of the supernet"),
        (["--n-samples", "0"], "n_samples must be positive"),
        (["--stop-width", "-1"], "stop_width must be 0 or more"),
        (["--target", "gpu"], "CUDA GPU of this machine"),
        (["--target", "gpu", "--device", "ssh://pi@board"], "CUDA GPU of this machine"),
        (["--resume", "0" * 32], "0" * 32),
        (["--device", "ssh://nobody@127.0.0.1:9"], "127.0.0.1"),
    ],
)
def test_bad_input(tracking: str, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    register_mini_supernet()
    capsys.readouterr()
    assert main(["sample", "--n-samples", "2", *argv]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert message in line


def test_two_workers_make_the_rows_of_one(tracking: str, tmp_path: Path) -> None:
    register_mini_supernet()
    command = ["sample", "--n-samples", "8", "--image-size", "8", "--device", "none"]
    for workers in ("1", "2"):
        assert main([*command, "--workers", workers]) == 0
    one, two = (_rows(tmp_path, run_id) for run_id in _runs("sample"))
    assert one == two
    assert len({row.accuracy for row in one}) > 1
