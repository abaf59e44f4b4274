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
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import Connection, LocalConnection, connect
from foxnas_mlflow.testing import ConnectionSuite, TimerSuite
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
