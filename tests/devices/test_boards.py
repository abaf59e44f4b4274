"""Several boards that share the work: real ssh servers on this host, of which one dies or is slow."""

from __future__ import annotations

import dataclasses
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from foxnas_mlflow import devices
from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.core.measurements import Timing, read_measurements
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import Benchmark, Connection
from foxnas_mlflow.devices import _measure as measuring
from foxnas_mlflow.workflows import _boards as boards
from foxnas_mlflow.workflows import _timers
from foxnas_mlflow.workflows._addresses import addresses
from foxnas_mlflow.workflows._timers import Timer, open_device, remembered
from tests.measuring import shorten
from tests.supernets import register_mini_supernet

from .conftest import TINY_CPU
from .sshd import Server, make_key, ssh_server

pytest.importorskip("asyncssh")

needs_sshd = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None or not Path("/usr/sbin/sshd").exists(),
    reason="no OpenSSH server (openssh-server)",
)

NETWORKS = TINY_CPU.sample(np.random.default_rng(0), n=4, image_size=32)


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Server]]:
    """Two boards, with a user who may log in to both."""
    ssh = tmp_path / "home" / ".ssh"
    ssh.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    monkeypatch.setattr(measuring, "RECONNECT_SECONDS", 0.2)
    # This host is one machine, which runs one measurement at a time, beside other tests: boards are compared on one
    # network, and what is disturbed is not measured again at once.
    monkeypatch.setattr(boards, "N_DRAWN", 0)
    monkeypatch.setattr(boards, "MAX_ROUNDS", boards.ROUNDS)
    shorten(monkeypatch)
    public = make_key(ssh / "id_ed25519")
    with ExitStack() as stack:
        running = [stack.enter_context(ssh_server(tmp_path / name, public)) for name in ("a", "b")]
        (ssh / "known_hosts").write_text("".join(server.known_hosts_line for server in running))
        yield running


def address(server: Server, python: str = sys.executable) -> str:
    return f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{server.port}?python={python}"


def slow_python(directory: Path) -> str:
    """A Python whose runtime needs 20 ms more for each run."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import time\n"
        "from ai_edge_litert.interpreter import Interpreter\n"
        "right = Interpreter.invoke\n"
        "Interpreter.invoke = lambda *arguments: (right(*arguments), time.sleep(0.02))[0]\n"
    )
    path = directory / "python"
    path.write_text(f'#!/bin/sh\nPYTHONPATH={directory} exec {sys.executable} "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_a_network_that_is_measured_again_is_made_once() -> None:
    build = _timers._Build(get_target("cpu"), TINY_CPU)()
    first, answer = build(NETWORKS[0])
    assert answer is not None
    build(NETWORKS[1])
    again, same = build(NETWORKS[0])
    assert first is again
    assert answer is same


@needs_sshd
def test_boards_share_the_work_and_one_that_dies_is_set_aside(
    servers: list[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    # How alike this host is to itself is not what is asked here.
    monkeypatch.setattr(boards, "compare", lambda *arguments: None)
    devices = ",".join(map(address, servers))
    at_work = itertools.count(1)

    def evaluate(architecture: Architecture) -> float:
        if next(at_work) == 3:
            servers[0].stop()
        return 70.0

    with open_device(get_target("cpu"), TINY_CPU, devices) as timer:
        assert (timer.n_boards, timer.here) == (2, False)

        def timed(architecture: Architecture) -> Timing:
            # Whether this host was busy is not what is asked either.
            return dataclasses.replace(timer.time(architecture), problems=())

        rows = collect(NETWORKS, tmp_path / "rows.csv", evaluate=evaluate, time=timed, n_at_once=3)
        dead, living = (address(server).partition("?")[0] for server in servers)
        assert [row.architecture for row in rows] == NETWORKS
        assert all(row.latency_ms is not None for row in rows)
        # The rows say which board measured.
        assert {row.device.rpartition(" at ")[2] for row in rows} <= {dead, living}
        assert rows[-1].device.endswith(f" at {living}")
        # It may have been asked once only since then.
        for architecture in NETWORKS:
            if not timer.aside:
                timed(architecture)
        assert list(timer.aside) == [address(servers[0])]
        assert f"{dead} is set aside, the other boards go on" in caplog.text


@needs_sshd
def test_boards_that_are_not_alike_are_refused_before_the_work(servers: list[Server], tmp_path: Path) -> None:
    slow = address(servers[1], slow_python(tmp_path / "slow"))
    with (
        pytest.raises(
            DeviceError, match=r"must be alike; received ssh://\S+ .* slower than ssh://.*boards of one kind"
        ),
        open_device(get_target("cpu"), TINY_CPU, f"{address(servers[0])},{slow}"),
    ):
        pass


@needs_sshd
def test_a_board_that_does_not_answer_at_first_is_set_aside(
    servers: list[Server], caplog: pytest.LogCaptureFixture
) -> None:
    servers[0].stop()
    with open_device(get_target("cpu"), TINY_CPU, ",".join(map(address, servers))) as timer:
        assert timer.n_boards == 1
        assert list(timer.aside) == [address(servers[0])]
        assert timer.time(NETWORKS[0]).latency_ms > 0
    servers[1].stop()
    with (
        pytest.raises(DeviceError, match="must listen"),
        open_device(get_target("cpu"), TINY_CPU, ",".join(map(address, servers))),
    ):
        pass


def test_a_board_is_listed_once(capsys: pytest.CaptureFixture[str], tracking: str) -> None:
    assert addresses(" ssh://pi@a, ssh://pi@b ,") == ("ssh://pi@a", "ssh://pi@b")
    assert addresses("") == ()
    # Ports make machines of a lab behind one address.
    assert len(addresses("ssh://pi@a:22,ssh://pi@a:2222,ssh://pi@[fe80::1],local")) == 4
    for twice in ("ssh://pi@a,ssh://pi@a", "ssh://pi@a,ssh://root@A:22?key=/k", "local,local"):
        for command in ("sample", "search", "main"):
            assert main([command, "--target", "rpi4", "--device", twice]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("foxnas: a board is listed once")


def test_a_password_is_refused_before_anything_is_kept(
    capsys: pytest.CaptureFixture[str], tracking: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = "ssh://pi@a,ssh://pi:s3cr3t@board:22?python=py"
    for run_id in ("", "0123abcd"):
        monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
        for command in (["sample"], ["search"], ["main"], ["benchmark", "--model", "models:/x/1"]):
            assert main([*command, "--target", "rpi4", "--device", device]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("foxnas: an ssh address has no password; received ssh://pi:***@board:22?python=py; ")
            assert line.endswith("of run 0123abcd: change this password." if run_id else "ssh-copy-id user@host.")
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def test_what_differs_by_more_than_noise() -> None:
    rng = np.random.default_rng(0)
    probes = np.log([[1.0], [4.0], [20.0]])
    alike = probes + rng.normal(0, 0.01, size=(3, 3, 2))
    _, _, difference, error = boards.difference_of(alike)
    # The error of a difference of two means of six.
    assert error == pytest.approx(0.01 / np.sqrt(3), rel=0.5)
    assert difference < boards.SIGMAS * error
    slower = alike + np.array([0.0, 0.0, 0.08]).reshape(3, 1, 1)
    _, high, difference, _ = boards.difference_of(slower)
    assert high == 2
    assert difference == pytest.approx(0.08, abs=0.02)


@pytest.mark.parametrize(("slowness", "refused"), [(1.0, False), (1.02, False), (1.06, True)])
def test_boards_are_compared_on_common_networks(slowness: float, refused: bool) -> None:
    asked: dict[str, list[object]] = {"a": [], "b": []}

    def board(name: str, factor: float):  # type: ignore[no-untyped-def]
        def timing(architecture: object) -> Timing:
            asked[name].append(architecture)
            return Timing(factor * (1 + len(asked[name]) % 3) * (1 + 1e-4 * len(asked[name])), "measured")

        return timing

    both = {"a": board("a", 1.0), "b": board("b", slowness)}
    if refused:
        with pytest.raises(DeviceError, match=r"b, 6\.\d % slower than a on 3 common networks"):
            boards.compare(both, TINY_CPU, lambda name, error: None)
    else:
        boards.compare(both, TINY_CPU, lambda name, error: None)
    assert asked["a"] == asked["b"]
    assert len(asked["a"]) == 3 * (boards.MAX_ROUNDS if refused else boards.ROUNDS)


def test_networks_are_timed_ahead_on_all_boards_and_then_remembered(tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=60)
    asked: list[object] = []

    def timing(architecture: object) -> Timing:
        asked.append(architecture)
        together.wait()
        return Timing(1.0, "measured")

    timer = remembered(Timer(timing, "measured", "2 boards", n_boards=2), tmp_path / "rows.csv")
    timer.ahead(NETWORKS[:4])
    assert [timer.time(architecture).latency_ms for architecture in NETWORKS[:4]] == [1.0] * 4
    assert len(asked) == 4
    assert len(read_measurements(tmp_path / "rows.csv")) == 4


def test_the_mean_of_all_measurements_is_remembered(tmp_path: Path) -> None:
    latencies = iter((1.0, 4.0, 9.0))
    network = NETWORKS[0]
    timer = remembered(Timer(lambda a: Timing(next(latencies), "measured", n_runs=5), "measured", "x"), tmp_path / "x")
    assert timer.again is not None
    assert timer.time(network).latency_ms == 1.0
    assert timer.again(network).latency_ms == 4.0
    assert timer.time(network).latency_ms == 2.5
    # Another process goes on from there.
    later = remembered(Timer(lambda a: Timing(next(latencies), "measured", n_runs=5), "measured", "x"), tmp_path / "x")
    assert later.time(network) == Timing(2.5, "measured", n_runs=10)


@needs_sshd
@pytest.mark.slow
@pytest.mark.server
@pytest.mark.train
def test_a_sampling_on_two_boards_of_which_one_dies(
    servers: list[Server],
    tracking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    monkeypatch.setattr(boards, "compare", lambda *arguments: None)
    register_mini_supernet()
    both = ",".join(map(address, servers))
    command = ["sample", "--n-samples", "6", "--image-size", "8", "--target", "cpu", "--device", both]

    dead = address(servers[0]).partition("?")[0]
    measure, asked = devices.measure, list[str]()

    def measure_until_cut(connection: Connection, *arguments: Any, **values: Any) -> Benchmark:
        asked.append(connection.uri)
        if asked.count(dead) == 2:
            servers[0].stop()
        return measure(connection, *arguments, **values)

    monkeypatch.setattr(devices, "measure", measure_until_cut)
    assert main(command) == 0
    said = capsys.readouterr()
    run = mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.stage` = 'sample'")[0]
    assert f"{dead} is set aside" in said.out
    assert dead in run.data.tags["foxnas.boards_set_aside"]
    assert f"set aside   {dead}" in said.out
    path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/measurements.csv", dst_path=str(tmp_path))
    rows = read_measurements(path)
    assert len(rows) == 6
    assert len({row.architecture for row in rows}) == 6
