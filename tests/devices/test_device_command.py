"""``foxnas device``: looking at this host, and calibrating a cost model of it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.calibration import calibrate, choose_checks, choose_probes
from foxnas_mlflow.core.errors import OutOfDomainError
from foxnas_mlflow.core.measurements import Timing, read_measurements
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet, load_predictors, reference_latency
from foxnas_mlflow.core.space import CPU_SPACE, get_space
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import subnet_timing
from foxnas_mlflow.workflows._timers import Timer
from foxnas_mlflow.workflows.device import UNSURE_PERCENT, Table, _calibrated, _next, _pattern, measure_and_fit
from tests.measuring import shorten
from tests.versions import benchmark

from .conftest import TINY_CPU


def test_check(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["device", "check"]) == 0
    out = capsys.readouterr().out
    for word in ("machine", "runtime", "governor", "free disk", "Next: foxnas device calibrate --device local"):
        assert word in out


def test_an_emulated_board_is_not_advised_to_be_calibrated() -> None:
    assert "device calibrate" in _next("local", emulated=False)
    assert "device calibrate" not in _next("ssh://pi@qemu", emulated=True)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["look"], "action must be one of"),
        (["check", "--device", "board"], "a device is local"),
        (["calibrate", "--n-probes", "3"], "n_probes must be 11 or more"),
        (["calibrate", "--out", "no-such-directory/it.yaml"], "a directory that exists"),
        (["calibrate", "--target", "nope"], "target must be one of"),
        (["calibrate", "--target", "edgetpu"], "a processor with LiteRT or a GPU"),
        (["calibrate", "--target", "gpu", "--device", "ssh://pi@board"], "CUDA GPU of this machine"),
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
    Path("boards").mkdir()
    Path("small.yaml").write_text(yaml.safe_dump(TINY_CPU.to_dict()))
    Path("base.yaml").write_text("name: base\nspace: small.yaml\nmachine: Cray-1\n")
    command = ["device", "calibrate", "--target", "base.yaml", "--out", "boards/mine.yaml", "--n-checks", "3"]
    assert main([*command, "--n-probes", "11"]) == 0
    rows = read_measurements("boards/mine-measurements.csv")
    assert len(rows) == 11
    assert {row.latency_source for row in rows} == {"measured"}
    out = capsys.readouterr().out
    assert "error on 3 random networks, each left out" in out
    assert "upper bounds  hold with up to 75 %" in out
    assert "written       boards/mine.yaml, mine-predictors.json, mine-measurements.csv, mine-checks.csv" in out
    # Whether a calibration is good, the check decides.
    sure = "UNSURE" not in out
    assert sure or "what this does not explain is measured once more" in out
    checks = read_measurements("boards/mine-checks.csv")
    assert len(checks) == 3
    assert not {row.architecture for row in checks} & {row.architecture for row in rows}
    target = get_target("boards/mine.yaml")
    assert (target.name, target.device, target.runtime) == ("mine", "local", "litert")
    # Figures count that are of this machine, and no longer those of the target that it was made from.
    assert re.search(target.machine, rows[0].device)
    assert not any(re.search(target.machine, other) for other in ("Cray-1", f"{rows[0].device} 2"))
    assert get_space(target.space) == TINY_CPU
    predictors = load_predictors(target.predictors)
    (latency,) = predictors.latency
    assert latency.metrics["n_samples"] == 14
    assert len(latency.held_out) == 3
    assert sure == (latency.metrics["outside_mape"] <= UNSURE_PERCENT)
    # The space is not that of the packaged accuracies: these must be sampled.
    assert predictors.accuracy == ()
    assert "foxnas sample --target boards/mine.yaml" in out
    # One more: what is measured stays.
    assert main([*command, "--n-probes", "12"]) == 0
    assert read_measurements("boards/mine-checks.csv") == checks
    assert read_measurements("boards/mine-measurements.csv")[:11] == rows
    assert load_predictors(target.predictors).latency[0].metrics["n_samples"] == 15
    # Another machine's rows are not mixed with these.
    text = Path("boards/mine-measurements.csv").read_text()
    Path("boards/mine-measurements.csv").write_text(text.replace(rows[0].device, "Cray-1", 1))
    assert main([*command, "--n-probes", "13"]) == 2
    assert "must hold measurements of" in capsys.readouterr().err
    # Neither are those with other threads.
    Path("boards/mine-measurements.csv").write_text(text)
    Path("base.yaml").write_text("name: base\nspace: small.yaml\nthreads: 2\n")
    assert main([*command, "--n-probes", "12"]) == 2
    assert f"with {rows[0].runtime}, 2 threads alone" in capsys.readouterr().err


@pytest.mark.train
def test_a_gpu_is_calibrated_as_a_board_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a stand-in for a GPU: this machine's processor, called one."""
    torch = pytest.importorskip("torch")
    from foxnas_mlflow import supernet
    from foxnas_mlflow.supernet import _timing

    def time_forward(network: Network, *, batch: int, device: str) -> list[float]:
        assert device == "cuda"
        return _timing.time_forward(network, batch=batch, device="cpu", runs=5, warmup_seconds=0)

    monkeypatch.chdir(tmp_path)
    shorten(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Stand-in")
    monkeypatch.setattr(supernet, "time_forward", time_forward)
    Path("small.yaml").write_text(yaml.safe_dump(TINY_CPU.to_dict()))
    Path("base.yaml").write_text("name: base\nspace: small.yaml\nruntime: torch\nbatch: 2\ndevice: local\n")
    assert main(["device", "calibrate", "--target", "base.yaml", "--out", "mine.yaml", "--n-checks", "3"]) == 0
    rows = [*read_measurements("mine-measurements.csv"), *read_measurements("mine-checks.csv")]
    assert {(row.device, row.runtime) for row in rows} == {("Stand-in, batch 2", f"torch {torch.__version__}")}
    target = get_target("mine.yaml")
    assert (target.runtime, target.batch, target.device) == ("torch", 2, "local")
    assert target.description == f"Stand-in, batch 2, torch {torch.__version__}, fp32"
    (latency,) = load_predictors(target.predictors).latency
    assert latency.metrics["n_samples"] == len(rows)


@pytest.mark.parametrize(
    ("base", "device", "others"),
    [
        ("rpi4", "Raspberry Pi 4 Model B Rev 1.4", {"Raspberry Pi 4 Model B Rev 1.5"}),
        ("rpi4", "Raspberry Pi 5 Model B Rev 1.0", set()),
        ("cpu", "AMD EPYC 9354 (32 cores)", set()),
    ],
)
def test_machines_of_a_calibrated_target(base: str, device: str, others: set[str]) -> None:
    machines = {"Raspberry Pi 4 Model B Rev 1.5", "Raspberry Pi 5 Model B Rev 1.1", "AMD EPYC 9354 (32 cores) 2"}
    found = _pattern(get_target(base).machine, device)
    assert {each for each in {device, *machines} if re.search(found, each)} == {device, *others}


def test_rows_say_with_how_many_threads() -> None:
    once = benchmark({"benchmark/latency_ms_p90": 40.0, "benchmark/valid": 1.0}, b"file", "board", emulated=False)
    for threads, runtime in ((1, "LiteRT"), (4, "LiteRT, 4 threads")):
        assert subnet_timing([dataclasses.replace(once, threads=threads)]).runtime == runtime


class Shared:
    """A machine whose neighbours make it half as fast at times, and whose first two measurements are not steady.

    Args:
        slow_share: Of the measurements; each of these is steady too.
        scatter: Standard deviation of what the cost model does not know of a network, as a share.
    """

    def __init__(self, slow_share: float, scatter: float = 0.0) -> None:
        self.asked: list[Architecture] = []
        self._slow_share, self._scatter = slow_share, scatter
        self._rng = np.random.default_rng(3)
        self._known = reference_latency(get_target("rpi4"), CPU_SPACE).latency[0]

    def alone(self, networks: Sequence[Architecture]) -> NDArray[np.float64]:
        """Latencies in milliseconds without neighbours."""
        digests = [zlib.crc32(network.to_json().encode()) for network in networks]
        return self._known.predict(networks) * [
            1 + self._scatter * np.random.default_rng(d).standard_normal() for d in digests
        ]

    def time(self, architecture: Architecture) -> Timing:
        self.asked.append(architecture)
        slower = 2 if self._rng.random() < self._slow_share else 1
        problems = ("not steady",) if len(self.asked) <= 2 else ()
        ms = slower * float(self.alone([architecture])[0])
        return Timing(ms, "measured", "board", "litert", n_runs=20, problems=problems)


@functools.cache
def chosen() -> tuple[list[Architecture], list[Architecture]]:
    return choose_probes(CPU_SPACE, 12), choose_checks(CPU_SPACE, 20)


def calibrated(board: Shared, tables: Sequence[Table]) -> LinearPredictor:
    for table, wanted in zip(tables, chosen(), strict=True):
        table.ask(wanted)

    def fit() -> PredictorSet:
        probes, checks = (list(table.rows.values()) for table in tables)
        return calibrate(probes, CPU_SPACE, target="board", outside=checks)

    return measure_and_fit(Timer(board.time, "measured", "board"), tables, fit).latency[0]


@pytest.mark.parametrize("slow_share", [0.0, 1 / 3])
def test_what_a_shared_processor_disturbs_is_measured_again(slow_share: float, tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    board = Shared(slow_share)
    tables = [Table(tmp_path / f"{name}.csv", ("board", "litert"), CPU_SPACE) for name in ("probes", "checks")]
    latency = calibrated(board, tables)
    new = choose_checks(CPU_SPACE, 200, seed=7)
    errors = latency.predict(new) / board.alone(new) - 1
    assert 100 * np.abs(errors).mean() < (1 if slow_share else 0.01)
    assert latency.metrics["outside_mape"] <= UNSURE_PERCENT
    # Where nothing disturbs, no network is measured twice; rows are kept as measured.
    n_rows = sum(len(read_measurements(tmp_path / f"{name}.csv")) for name in ("probes", "checks"))
    assert (n_rows == 32) == (slow_share == 0)
    assert len(board.asked) == n_rows + 2
    # A command that goes on knows the least of each, and asks only for what is not explained.
    assert Table(tmp_path / "probes.csv", ("board", "litert"), CPU_SPACE).rows == tables[0].rows
    n_asked = len(board.asked)
    explained = {
        architecture
        for table in tables
        for architecture, row in table.rows.items()
        if row.latency_ms == pytest.approx(latency.predict([architecture])[0], rel=UNSURE_PERCENT / 100)
    }
    assert len(explained) >= 31
    assert calibrated(board, tables).metrics["outside_mape"] <= latency.metrics["outside_mape"]
    assert not explained & set(board.asked[n_asked:])


def test_a_stated_confidence_is_never_more_than_was_seen(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    tables = [Table(tmp_path / f"{name}.csv", ("board", "litert"), CPU_SPACE) for name in ("probes", "checks")]
    latency = calibrated(Shared(0.0), tables)
    for n, percent, refused in ((199, 99, "0.995"), (2, 66, "0.666"), (20, 95, "0.952")):
        known = dataclasses.replace(latency, held_out=tuple(sorted(latency.held_out * 10))[:n])
        rows = [*tables[0].rows.values(), *tables[1].rows.values()]
        text = _calibrated(known, rows, tmp_path / "my board.yaml", ())
        assert f"hold with up to {percent} %" in text
        assert f"Next: foxnas sample --target '{tmp_path}/my board.yaml'" in text
        with pytest.raises(OutOfDomainError, match=f"at most {refused}"):
            known.check_stated(0.999)
        known.check_stated(float(refused))


def test_what_the_formula_misses_is_measured_again_once(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    board = Shared(0.0, scatter=0.3)
    tables = [Table(tmp_path / f"{name}.csv", ("board", "litert"), CPU_SPACE) for name in ("probes", "checks")]
    latency = calibrated(board, tables)
    assert latency.metrics["outside_mape"] > UNSURE_PERCENT
    # And the first two once more, because they were not steady.
    assert collections.Counter(board.asked).most_common(3)[-1][1] == 2
