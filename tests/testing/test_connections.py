"""The suites of connections and timers: the project's own pass them, seeded faults fail them."""

from __future__ import annotations

import dataclasses
import getpass
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import ConnectionLostError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import Connection, LocalConnection, connect, host_answer, measure, subnet_timing
from foxnas_mlflow.testing import ConnectionSuite, FakeBoard, TimerSuite
from foxnas_mlflow.tflite import write_probe
from foxnas_mlflow.workflows._timers import open_timer
from tests.devices.sshd import Server, make_key, ssh_server


class TestLocal(ConnectionSuite):
    def connection(self) -> Connection:
        return LocalConnection()


@pytest.mark.skipif(
    shutil.which("ssh-keygen") is None or not Path("/usr/sbin/sshd").exists(),
    reason="no OpenSSH server (openssh-server)",
)
class TestSsh(ConnectionSuite):
    @pytest.fixture(autouse=True)
    def _server(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        pytest.importorskip("asyncssh")
        home = tmp_path / "home"
        (home / ".ssh").mkdir(parents=True)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
        public = make_key(home / ".ssh" / "id_ed25519")
        with ssh_server(tmp_path / "sshd", public) as running:
            (home / ".ssh" / "known_hosts").write_text(running.known_hosts_line)
            self.server: Server = running
            yield

    def connection(self) -> Connection:
        return connect(f"ssh://{getpass.getuser()}@127.0.0.1:{self.server.port}")


class TestCostModel(TimerSuite):
    def space(self) -> SearchSpace:
        return CPU_SPACE

    def timer(self) -> Callable[[Architecture], Timing]:
        with open_timer(get_target("rpi4"), CPU_SPACE) as timer:
            return timer.time


class TestFakeBoardConnection(ConnectionSuite):
    def connection(self) -> Connection:
        return FakeBoard(lambda model: 5.0)


class TestMeasured(TimerSuite):
    """What is measured, by the protocol of real boards on one whose latencies are made up."""

    def space(self) -> SearchSpace:
        return CPU_SPACE

    def timer(self) -> Callable[[Architecture], Timing]:
        def time(architecture: Architecture) -> Timing:
            with FakeBoard(lambda model: len(model) / 1e6) as board:
                return subnet_timing([measure(board, write_probe(build_network(CPU_SPACE, architecture)))])

        return time


def test_a_fake_board_measures_what_it_is_told_and_says_that_it_is_nobodys() -> None:
    probe = write_probe(build_network(CPU_SPACE, CPU_SPACE.smallest(192)))
    with FakeBoard(lambda model: 7.0 if model == probe else 1.0, seed=3) as board:
        benchmark = measure(board, probe, runs=400, expected=host_answer(probe))
    assert benchmark.latency_ms_p50 == pytest.approx(7.0, rel=0.002)
    assert (benchmark.emulated, subnet_timing([benchmark]).emulated, benchmark.valid) == (True, True, True)
    assert benchmark.output_difference == 0
    assert benchmark.n_runs == 400


def test_a_fake_board_goes_away_when_it_is_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foxnas_mlflow.devices._measure.RECONNECT_SECONDS", 0.2)
    probe = write_probe(build_network(CPU_SPACE, CPU_SPACE.smallest(192)))
    with FakeBoard(lambda model: 7.0, measurements=2) as board:
        assert [measure(board, probe).latency_ms_p50 for _ in range(2)] == pytest.approx([7.0, 7.0], rel=0.01)
        with pytest.raises(ConnectionLostError, match="fake board"):
            measure(board, probe)


class LosesAByte(LocalConnection):
    """The last byte of a large file."""

    def put(self, data: bytes, path: str) -> None:
        super().put(data[:-1] if len(data) > 1000 else data, path)


class TranslatesLines(LocalConnection):
    def get(self, path: str) -> bytes:
        return super().get(path).replace(b"\r\n", b"\n")


class AsksAShell(LocalConnection):
    def run(self, argv: Sequence[str], *, timeout_s: float) -> Any:
        return super().run(["sh", "-c", " ".join(argv)], timeout_s=timeout_s)


class MixesOutputs(LocalConnection):
    def run(self, argv: Sequence[str], *, timeout_s: float) -> Any:
        done = super().run(argv, timeout_s=timeout_s)
        return dataclasses.replace(done, stdout=done.stdout + done.stderr)


class LeavesItsDirectory(LocalConnection):
    def _remove(self, directory: str) -> None:
        pass


@pytest.mark.parametrize(
    ("faulty", "test"),
    [
        (LosesAByte, "test_files_come_back_byte_by_byte"),
        (TranslatesLines, "test_files_come_back_byte_by_byte"),
        (AsksAShell, "test_no_shell_interprets_arguments"),
        (MixesOutputs, "test_status_and_both_outputs_are_told_apart"),
        (LeavesItsDirectory, "test_nothing_is_left_behind"),
    ],
)
def test_a_faulty_connection_fails(
    faulty: type[Connection], test: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # What a fault leaves behind goes with the test.
    suite = ConnectionSuite()
    suite.connection = faulty  # type: ignore[method-assign, assignment]
    with pytest.raises(AssertionError):
        getattr(suite, test)()


@pytest.mark.parametrize(
    ("timing", "test"),
    [
        (Timing(5.0, "measured"), "test_latencies_are_positive_and_say_what_they_are"),
        (Timing(float("inf"), "cost_model"), "test_latencies_are_positive_and_say_what_they_are"),
        (Timing(5.0, "cost_model", "Raspberry Pi 4"), "test_latencies_are_positive_and_say_what_they_are"),
    ],
    ids=["nameless", "infinite", "an estimate that claims a device"],
)
def test_a_timer_that_does_not_say_what_it_gives_fails(timing: Timing, test: str) -> None:
    suite = TestCostModel()
    suite.timer = lambda: lambda architecture: timing  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        getattr(suite, test)()


def test_an_estimate_with_noise_fails() -> None:
    drift = iter(range(1, 100))
    suite = TestCostModel()
    suite.timer = lambda: lambda architecture: Timing(float(next(drift)), "cost_model")  # type: ignore[method-assign]
    with pytest.raises(AssertionError):
        suite.test_an_estimate_is_the_same_again()
