"""The whole ssh path on a virtual Raspberry Pi: another processor, its own runtime, a real network."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices import _measure as measuring
from foxnas_mlflow.devices import check, connect, measure

from .sshd import Server, board_processes, make_key, ssh_server
from .virtual_pi import CORES, ENVIRONMENT, OLD_PYTHON, PYTHON, SMALL, enter

pytest.importorskip("asyncssh")
pytestmark = [pytest.mark.board, pytest.mark.slow]

QUICK = {"runs": 5, "warmup": 1, "min_seconds": 0.01, "max_seconds": 0.5, "attempts": 1}


@pytest.fixture(scope="module")
def root(pi_root: Path) -> Path:
    """The Pi's root file system."""
    return pi_root


@pytest.fixture(scope="module")
def pi(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    public = make_key(home / ".ssh" / "id_ed25519")
    # Who logs in with this key has a full disk for temporary files.
    small = f'environment="TMPDIR={SMALL}" {make_key(home / ".ssh" / "small")}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        keys = f"{public}\n{small}\n"
        with ssh_server(root / "etc" / "pi-ssh", keys, prefix=enter(root), root=root, env=ENVIRONMENT) as running:
            (home / ".ssh" / "known_hosts").write_text(running.known_hosts_line)
            yield running


def address(pi: Server, *, user: str = "root", python: str = PYTHON, **options: str) -> str:
    query = "&".join(f"{key}={value}" for key, value in {"python": python, **options}.items())
    return f"ssh://{user}@127.0.0.1:{pi.port}?{query}"


def test_what_the_board_has_and_lacks(pi: Server) -> None:
    with connect(address(pi)) as connection:
        found = check(connection)
    assert found.ready
    assert found.device == "Raspberry Pi 4 Model B Rev 1.4 (emulated)"
    # Of the board's processors, those that the emulator may use.
    assert (found.machine, found.emulated) == ("aarch64", True)
    assert 1 <= found.cores <= CORES
    assert (found.governor, found.temperature_c) == ("ondemand", 48.312)
    assert found.runtime.startswith("ai-edge-litert")
    assert any("governor is ondemand" in note for note in found.notes)
    assert any("emulated" in note for note in found.notes)
    for python, missing in (("python3", ["runtime"]), ("python3-bare", ["NumPy", "runtime"])):
        with connect(address(pi, python=python)) as connection:
            lacking = check(connection)
        assert [text.split(":")[0] for text in lacking.missing] == missing
        assert all("pip install numpy ai-edge-litert" in text for text in lacking.missing)
    with (
        connect(address(pi, python="/usr/bin/python4")) as connection,
        pytest.raises(DeviceError, match="Python 3"),
    ):
        check(connection)


def test_outputs_are_those_of_this_host(pi: Server, probe: bytes, expected: list[np.ndarray], root: Path) -> None:
    throttled = root / "etc" / "pi-throttled"
    with connect(address(pi)) as connection:
        benchmark = measure(connection, probe, expected=expected, **QUICK)
        assert benchmark.output_difference == 0
        assert benchmark.emulated
        assert benchmark.device.endswith("(emulated)")
        assert benchmark.throttled is False
        assert benchmark.governor == "ondemand"
        assert (benchmark.temperature_c_start, benchmark.temperature_c_end) == (48.312, 48.312)
        # Under-voltage and a capped frequency, now and since boot.
        throttled.write_text("0x50005\n")
        try:
            hot = measure(connection, probe, **QUICK)
        finally:
            throttled.write_text("0x0\n")
        assert not hot.valid
        assert "the machine was throttled" in hot.invalid_reasons
        directory = root / connection.workspace({})[1:]
        assert directory.is_dir()
    assert not directory.exists()


def test_killed_in_the_middle_and_resumed(
    pi: Server, probe: bytes, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "RECONNECT_SECONDS", 20.0)

    def pull_the_plug() -> None:
        deadline = time.monotonic() + 60
        while not board_processes(Path("/tmp")) and time.monotonic() < deadline:
            time.sleep(0.05)
        pi.stop()
        pi.start()

    with connect(address(pi)) as connection:
        first = connection.workspace({})
        puller = threading.Thread(target=pull_the_plug)
        puller.start()
        benchmark = measure(connection, probe, **QUICK)
        puller.join()
        assert benchmark.n_runs >= 5
        assert connection.workspace({}) != first
    deadline = time.monotonic() + 30
    while list((root / "tmp").glob("foxnas-board-*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not list((root / "tmp").glob("foxnas-board-*"))


def test_who_is_refused(pi: Server, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="must accept a key of this user"):
        connect(address(pi, user="pi"))
    (tmp_path / ".ssh").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    for line, message in (
        ("", "must be known"),
        (f"[127.0.0.1]:{pi.port} {make_key(tmp_path / 'other')}\n", "changed"),
    ):
        (tmp_path / ".ssh" / "known_hosts").write_text(line)
        with pytest.raises(DeviceError, match=message):
            connect(address(pi, key=str(tmp_path / "other")))


def test_a_full_disk(pi: Server, probe: bytes, root: Path) -> None:
    key = str(Path(os.environ["HOME"]) / ".ssh" / "small")
    message = "No space left on device; free some space"
    with connect(address(pi, key=key)) as connection, pytest.raises(DeviceError, match=message):
        measure(connection, probe + bytes(2**17), **QUICK)
    with connect(address(pi)) as connection:
        assert connection.run(["ls", SMALL], timeout_s=60).stdout == ""


WELCOME = "'Welcome to your board!'"


@pytest.mark.parametrize(
    ("user", "python", "word"),
    [
        ("noisy", PYTHON, f"prints {WELCOME} before every command"),
        ("fish", PYTHON, ""),
        ("dash", PYTHON, ""),
        ("spaced", "~/bin/python", ""),
    ],
)
def test_shells_and_homes_as_they_are_found(
    pi: Server, user: str, python: str, word: str, probe: bytes, expected: list[np.ndarray], root: Path
) -> None:
    with connect(address(pi, user=user, python=python)) as connection:
        assert measure(connection, probe, expected=expected, **QUICK).output_difference == 0
        if word:
            assert any(word in note for note in check(connection).notes)
    assert not list((root / "tmp").glob("foxnas-board-*"))


def test_tflite_runtime_and_numpy_below_2(pi: Server, probe: bytes, expected: list[np.ndarray]) -> None:
    with connect(address(pi, python=OLD_PYTHON)) as connection:
        found = check(connection)
        assert found.ready
        assert found.runtime == "tflite-runtime 2.14.0"
        benchmark = measure(connection, probe, expected=expected, **QUICK)
    # Kernels of 2023 round otherwise, and random weights carry that through all layers.
    assert benchmark.output_difference is not None
    assert benchmark.output_difference <= max(2.0, expected[0].std())


@pytest.fixture(scope="module")
def strict(root: Path, pi: Server) -> Iterator[dict[str, Server]]:
    """The same Pi with a /tmp that cannot be written, and with one from which nothing can be run."""
    home = Path(os.environ["HOME"])
    public = (home / ".ssh" / "id_ed25519.pub").read_text()
    environment = {**ENVIRONMENT, "TMPDIR": "/var/tmp"}
    with (
        ssh_server(root / "etc" / "ro-ssh", public, prefix=enter(root, tmp="ro"), root=root, env=environment) as first,
        ssh_server(
            root / "etc" / "noexec-ssh", public, prefix=enter(root, tmp="noexec"), root=root, env=ENVIRONMENT
        ) as second,
    ):
        lines = [server.known_hosts_line for server in (pi, first, second)]
        (home / ".ssh" / "known_hosts").write_text("".join(lines))
        (home / ".ssh" / "config").write_text(
            f"Host gate\n  HostName 127.0.0.1\n  Port {pi.port}\n  User root\n"
            f"Host Inner\n  HostName 127.0.0.1\n  Port {first.port}\n  User root\n  ProxyJump gate\n"
        )
        yield {"ro": first, "noexec": second}
        (home / ".ssh" / "config").unlink()


def test_a_read_only_tmp_behind_a_jump_host(
    strict: dict[str, Server], pi: Server, probe: bytes, expected: list[np.ndarray], root: Path
) -> None:
    with connect(f"ssh://Inner?python={PYTHON}") as connection:
        # It came through the other board.
        peer = connection.run(["sh", "-c", 'echo "$SSH_CONNECTION"'], timeout_s=60).stdout.split()
        assert int(peer[3]) == strict["ro"].port
        assert measure(connection, probe, expected=expected, **QUICK).output_difference == 0
        assert connection.workspace({}).startswith("/var/tmp/")
    assert not list((root / "var" / "tmp").glob("foxnas-board-*"))
    pi.stop()
    try:
        with pytest.raises(DeviceError, match=r"must listen at|close the connection|cannot be opened"):
            connect("ssh://Inner")
    finally:
        pi.start()


def test_a_tmp_that_runs_nothing_over_ipv6(strict: dict[str, Server], probe: bytes, expected: list[np.ndarray]) -> None:
    with connect(f"ssh://root@[::1]:{strict['noexec'].port}?python={PYTHON}") as connection:
        assert measure(connection, probe, expected=expected, **QUICK).output_difference == 0
        program = f"{connection.workspace({})}/program"
        connection.put(b"#!/bin/sh\n", program)
        assert connection.run(["chmod", "+x", program], timeout_s=60).status == 0
        assert connection.run(["sh", "-c", program], timeout_s=60).status == 126


def test_a_quota_of_the_board(
    pi: Server, root: Path, probe: bytes, control_group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = (Path(os.environ["HOME"]) / ".ssh" / "id_ed25519.pub").read_text()
    inside = ["sh", "-c", f'echo $$ > {control_group}/cgroup.procs; exec "$@"', "sh", *enter(root)]
    known = Path(os.environ["HOME"]) / ".ssh" / "known_hosts"
    before = known.read_text()
    with ssh_server(root / "etc" / "quota-ssh", public, prefix=inside, root=root, env=ENVIRONMENT) as server:
        known.write_text(before + server.known_hosts_line)
        with connect(address(server)) as connection:
            found = check(connection)
            benchmark = measure(connection, probe, **(QUICK | {"min_seconds": 1.0, "max_seconds": 2.0, "runs": 20}))
    known.write_text(before)
    assert found.ready
    assert (found.quota, found.cores) == (0.5, 1)
    assert any("a quota of 0.5 processors" in note for note in found.notes)
    assert not benchmark.valid
    assert any("a quota of 0.5 processors held it back" in reason for reason in benchmark.invalid_reasons), benchmark
