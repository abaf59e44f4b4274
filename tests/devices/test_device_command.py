"""``foxnas device``: looking at this host, and calibrating a cost model of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.measurements import read_measurements
from foxnas_mlflow.core.predictors import load_predictors
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.workflows.device import UNSURE_PERCENT
from tests.measuring import shorten

from .conftest import TINY_CPU


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "check"]) == 0
    out = capsys.readouterr().out
    for word in ("machine", "runtime", "governor", "free disk", "Next: foxnas device calibrate --device local"):
        assert word in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["look"], "action must be one of"),
        (["check", "--device", "board"], "a device is local"),
        (["calibrate", "--n-probes", "3"], "n_probes must be 11 or more"),
        (["calibrate", "--out", "no-such-directory/it.yaml"], "a directory that exists"),
        (["calibrate", "--target", "nope"], "target must be one of"),
        (["calibrate", "--target", "edgetpu"], "a processor with LiteRT"),
    ],
)
def test_bad_input_is_one_line(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["device", *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_calibrate_this_host_and_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("statsmodels")
    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch)
    Path("small.yaml").write_text(yaml.safe_dump(TINY_CPU.to_dict()))
    Path("base.yaml").write_text("name: base\nspace: small.yaml\n")
    command = ["device", "calibrate", "--target", "base.yaml", "--out", "mine.yaml", "--n-checks", "3"]
    assert main([*command, "--n-probes", "11"]) == 0
    rows = read_measurements("mine-measurements.csv")
    assert len(rows) == 11
    assert {row.latency_source for row in rows} == {"measured"}
    out = capsys.readouterr().out
    assert "error on 3 random networks, each left out" in out
    assert "upper bounds  hold with up to 75 %" in out
    assert "written       mine.yaml, mine-predictors.json, mine-measurements.csv, mine-checks.csv" in out
    # Whether a calibration is good, the check decides; both tables make place for a new one.
    sure = "UNSURE" not in out
    assert sure or "without mine-measurements.csv and mine-checks.csv" in out
    checks = read_measurements("mine-checks.csv")
    assert len(checks) == 3
    assert not {row.architecture for row in checks} & {row.architecture for row in rows}
    target = get_target("mine.yaml")
    assert (target.name, target.device, target.runtime) == ("mine", "local", "litert")
    predictors = load_predictors(target.predictors)
    (latency,) = predictors.latency
    assert latency.metrics["n_samples"] == 14
    assert len(latency.held_out) == 3
    assert sure == (latency.metrics["outside_mape"] <= UNSURE_PERCENT)
    # The space is not that of the packaged accuracies: these must be sampled.
    assert predictors.accuracy == ()
    assert "foxnas sample --target mine.yaml" in out
    # One more: what is measured stays.
    assert main([*command, "--n-probes", "12"]) == 0
    assert read_measurements("mine-checks.csv") == checks
    assert read_measurements("mine-measurements.csv")[:11] == rows
    assert load_predictors(target.predictors).latency[0].metrics["n_samples"] == 15
    # Another machine's rows are not mixed with these.
    text = Path("mine-measurements.csv").read_text()
    Path("mine-measurements.csv").write_text(text.replace(rows[0].device, "Cray-1", 1))
    assert main([*command, "--n-probes", "13"]) == 2
    assert "must hold measurements of" in capsys.readouterr().err
