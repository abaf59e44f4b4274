"""The ssh path against a real server on this host."""

from __future__ import annotations

import inspect
import itertools
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow import devices
from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.core.measurements import read_measurements
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import Benchmark, _ssh, check, connect, measure
from foxnas_mlflow.devices import _measure as measuring
from foxnas_mlflow.devices._base import IN_ENGLISH
from foxnas_mlflow.devices._script import run_board
from foxnas_mlflow.devices._ssh import SshPlace, lost, unreachable
from foxnas_mlflow.workflows._timers import open_device
from tests.measuring import SHORT, shorten
from tests.supernets import register_mini_supernet

from .conftest import TINY_CPU
from .sshd import Server, board_processes, make_key, ssh_server

asyncssh = pytest.importorskip("asyncssh")

pytestmark = pytest.mark.skipif(
    shutil.which("ssh-keygen") is None or not Path("/usr/sbin/sshd").exists(),
    reason="no OpenSSH server (openssh-server)",
)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home directory with a key and no known hosts."""
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    make_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    return tmp_path / "home"


@pytest.fixture
def server(home: Path, tmp_path: Path) -> Iterator[Server]:
    public = (home / ".ssh" / "id_ed25519.pub").read_text()
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    with ssh_server(tmp_path / "sshd", public, env={"TMPDIR": str(scratch)}) as running:
        (home / ".ssh" / "known_hosts").write_text(running.known_hosts_line)
        yield running


RELAY = """
import os, socket, sys, threading
file, told, host, port = sys.argv[1:]
open(file, "w").write(told)
board = socket.create_connection((host, int(port)))
def back():
    while data := board.recv(65536):
        os.write(1, data)
threading.Thread(target=back, daemon=True).start()
while data := os.read(0, 65536):
    board.sendall(data)
"""
"""A ProxyCommand in Python: it writes down what it was told, then passes on."""


def host_lines(server: Server, names: str) -> str:
    """Lines of `ssh_config` that call a server by names."""
    return f"Host {names}\n  HostName 127.0.0.1\n  Port {server.port}\n  User {os.environ.get('USER') or 'root'}\n"


def address(server: Server, **options: str) -> str:
    query = "&".join(f"{key}={value}" for key, value in {"python": sys.executable, **options}.items())
    return f"ssh://{os.environ.get('USER') or 'root'}@127.0.0.1:{server.port}?{query}"


def test_measure_through_ssh(server: Server, probe: bytes, expected: list[np.ndarray], tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with connect(address(server)) as connection:
        assert "?" not in connection.uri
        assert check(connection).ready
        benchmark = measure(connection, probe, expected=expected, **SHORT)
        assert benchmark.connection == connection.uri
        assert benchmark.output_difference == 0
        assert not benchmark.emulated
        # What is odd in a shell stays as it is; large files are not cut.
        data = os.urandom(3 * 2**20)
        path = f"{connection.workspace({})}/it's $HOME; a `name`"
        connection.put(data, path)
        assert connection.get(path) == data
        with pytest.raises(DeviceError, match="No such file"):
            connection.get("/does/not/exist")
        with pytest.raises(DeviceError, match="Is a directory"):
            connection.put(b"", str(tmp_path))
        with pytest.raises(DeviceError, match="must end within 1 s; received sleep 60;"):
            connection.run([*IN_ENGLISH, "sleep", "60"], timeout_s=1)
        assert connection.run(["sh", "-c", "kill -SEGV $$"], timeout_s=10).status == 139
        assert connection.run(["echo", "still here"], timeout_s=10).stdout == "still here\n"
    assert not list((tmp_path / "scratch").iterdir())
    assert set(threading.enumerate()) <= before


def test_no_space_on_the_machine(
    home: Path, tmp_path: Path, probe: bytes, tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    large = tmp_path / "large.tflite"
    large.write_bytes(probe + bytes(2**17))
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", _made(tmp_path / "small")]).returncode:
        pytest.skip("a small file system needs the right to mount one")
    try:
        public = (home / ".ssh" / "id_ed25519.pub").read_text()
        with ssh_server(tmp_path / "sshd", public, env={"TMPDIR": str(tmp_path / "small")}) as running:
            (home / ".ssh" / "known_hosts").write_text(running.known_hosts_line)
            with connect(address(running)) as connection:
                with pytest.raises(DeviceError, match="No space left on device; free some space"):
                    measure(connection, large.read_bytes(), runs=1, warmup=1)
                # What was there stays usable.
                assert connection.run(["true"], timeout_s=10).status == 0
            capsys.readouterr()
            assert main(["benchmark", "--model", str(large), "--device", address(running)]) == 2
            (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("foxnas:")]
            assert "No space left on device; free some space" in line
            (run,) = mlflow.MlflowClient().search_runs(["0"])
            assert run.info.status == "FAILED"
            assert not [name for name in run.data.metrics if name.startswith("benchmark/")]
            assert not list((tmp_path / "small").iterdir())
    finally:
        subprocess.run(["umount", str(tmp_path / "small")], check=True)


def test_hosts_and_users_that_are_refused(
    server: Server, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(threading.enumerate())
    known_hosts, config = home / ".ssh" / "known_hosts", home / ".ssh" / "config"
    other = make_key(tmp_path / "other")
    wrong_key = {"python": "python3", "key": str(tmp_path / "other")}
    for prepare, uri, message in (
        (lambda: None, address(server).replace("://", "://nobody-here-"), "must accept a key of this user"),
        (lambda: _hide_keys(home), address(server, **wrong_key), "must accept a key of this user"),
        (lambda: None, address(server, key="/does/not/exist"), "must be readable"),
        (lambda: known_hosts.write_text(f"[127.0.0.1]:{server.port} {other}\n"), address(server), "has changed"),
        (
            lambda: known_hosts.write_text(_rsa_line(server, tmp_path)),
            address(server),
            "has changed|other type",
        ),
        (lambda: known_hosts.write_text(""), address(server), "must be known.*connect with ssh once"),
        (known_hosts.unlink, address(server), "must be known"),
        (
            lambda: config.write_text("Port many\n"),
            address(server),
            r"must be able to read the SSH configuration.*config line 1: Invalid Port",
        ),
        # Asyncssh alone would take any key then.
        (lambda: config.write_text("UserKnownHostsFile none\n"), address(server), "keeps none.*remove that line"),
        (lambda: config.write_text("UserKnownHostsFile /dev/null\n"), address(server), "keeps none.*remove that line"),
        (
            lambda: (known_hosts.write_text(server.known_hosts_line), config.write_text("Ciphers aes128-cbc\n")),
            address(server),
            "must have algorithms in common.*No matching encryption algorithm",
        ),
    ):
        prepare()
        with pytest.raises(DeviceError, match=message):
            connect(uri)
        assert main(["device", "check", "--device", uri]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search(message, line)
    assert set(threading.enumerate()) <= before


def test_ssh_configuration_is_followed(server: Server, home: Path) -> None:
    (home / ".ssh" / "board_hosts").write_text(f"board {server.host_key}\n")
    (home / ".ssh" / "known_hosts").unlink()
    (home / ".ssh" / "id_ed25519").rename(home / ".ssh" / "board_key")
    (home / ".ssh" / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {server.port}\n  User {os.environ.get('USER') or 'root'}\n"
        "  IdentityFile ~/.ssh/board_key\n  HostKeyAlias board\n  UserKnownHostsFile ~/.ssh/board_hosts\n"
    )
    with connect("ssh://board") as connection:
        assert connection.run(["echo", "hello"], timeout_s=10).stdout == "hello\n"


@pytest.fixture
def system(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with this machine's own `ssh_config` and `ssh_known_hosts`, which are written by the test."""
    system = tmp_path / "system"
    system.mkdir()
    monkeypatch.setattr(_ssh, "SYSTEM_CONFIG", str(system / "ssh_config"))
    known_hosts = {**_ssh.KNOWN_HOSTS, "GlobalKnownHostsFile": (str(system / "ssh_known_hosts"), "/does/not/exist")}
    monkeypatch.setattr(_ssh, "KNOWN_HOSTS", known_hosts)
    return system


def says_hello(uri: str) -> bool:
    with connect(uri) as connection:
        return connection.run(["echo", "hello"], timeout_s=10).stdout == "hello\n"


def test_system_wide_files_are_followed(
    server: Server, home: Path, system: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As distributions, NixOS and Ansible write them; a jump host's key is there too."""
    (home / ".ssh" / "known_hosts").rename(system / "ssh_known_hosts")
    (system / "10.conf").write_text(
        host_lines(server, "board jump") + "Host vsock/*\n  ProxyCommand /nothing %h %p\n  ProxyUseFdpass yes\n"
    )
    (system / "ssh_config").write_text(
        f"Include {system}/*.conf\nHost *\n  SendEnv LANG LC_*\n  HashKnownHosts yes\n  GSSAPIAuthentication yes\n"
        "Match final all\n  ForwardX11Trusted yes\n"
    )
    for user_s in ("", "Host board\n  ProxyJump jump\n"):
        (home / ".ssh" / "config").write_text(user_s)
        assert says_hello("ssh://board")
    # A user cannot mend what the system's owner wrote for ssh alone.
    (home / ".ssh" / "config").write_text((system / "10.conf").read_text())
    for content in (b"Match canonical nothing\n", b"# B\xfcro\n"):
        (system / "ssh_config").write_bytes(content)
        caplog.clear()
        assert says_hello("ssh://board")
        assert f"{system / 'ssh_config'} is left out, which asyncssh cannot read" in caplog.text


def test_a_proxy_command_is_expanded_once(server: Server, home: Path, system: Path, tmp_path: Path) -> None:
    """What is %% in it is for the shell, or for a proxy of its own."""
    (system / "ssh_config").write_text("Host *\n  HashKnownHosts yes\n")
    relay = tmp_path / "relay.py"
    relay.write_text(RELAY)
    for said, written in (("date +%s", "date +%%s"), ("nested %h:%p %%", "nested %%h:%%p %%%%")):
        (home / ".ssh" / "config").write_text(
            f"{host_lines(server, 'board')}  ProxyCommand {sys.executable} {relay} {tmp_path}/told '{written}' %h %p\n"
        )
        assert says_hello("ssh://board")
        assert (tmp_path / "told").read_text() == said


def test_jump_hosts_are_opened_like_boards(server: Server, home: Path, system: Path) -> None:
    config, known_hosts = home / ".ssh" / "config", home / ".ssh" / "known_hosts"
    board = f"{host_lines(server, 'board gate other')}Host board\n  ProxyJump other,gate\n"
    (system / "ssh_config").write_text(
        "Host *\n  IdentityFile ~/.ssh/id_rsa\n  IdentityFile ~/.ssh/id_ed25519\n"
        f"  GlobalKnownHostsFile {home}/.ssh/known_hosts /does/not/exist\n"
    )
    config.write_text(board)
    assert says_hello("ssh://board")
    # An address of a gate may be one of ssh's.
    config.write_text(f"{host_lines(server, 'board')}  ProxyJump ssh://127.0.0.1:{server.port}\n")
    assert says_hello("ssh://board")
    for lines, message in (
        (
            "Host gate\n  UserKnownHostsFile none\n  GlobalKnownHostsFile none\n",
            "host key of the jump host gate of ssh",
        ),
        ("Host other\n  Port 1\n", "an ssh server must listen at the jump host other of ssh://board"),
        ("Host *\n  ProxyJump gate\n", "the jump host gate is reached through itself"),
        ("Host board\n  ProxyJump gate:port\n", "cannot be opened.*port"),
    ):
        config.write_text(lines + board)
        with pytest.raises(DeviceError, match=message):
            connect("ssh://board")
    # The board's key is known by another name: the gate is not what has changed.
    config.write_text(f"Host gate\n  HostKeyAlias unheard\n{board}")
    with pytest.raises(DeviceError, match=r"key of the jump host gate of ssh://board must be known.*\(ssh gate"):
        connect("ssh://board")
    known_hosts.unlink()
    config.write_text(board)
    with pytest.raises(DeviceError, match="the host key of the jump host other of ssh://board must be known"):
        connect("ssh://board")


def test_keys_that_the_configuration_names(server: Server, home: Path, tmp_path: Path) -> None:
    config = home / ".ssh" / "config"
    # With none that is there, the usual ones are no substitute for those alone that it names.
    config.write_text("IdentitiesOnly yes\nIdentityFile ~/.ssh/none\n")
    with pytest.raises(DeviceError, match="must accept a key of this user"):
        connect(address(server))
    (home / ".ssh" / "id_ed25519").rename(tmp_path / "key")
    (home / ".ssh" / "id_ed25519.pub").rename(home / ".ssh" / "board.pub")
    config.write_text("IdentitiesOnly yes\nIdentityFile ~/.ssh/board\n")
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
            deadline = time.monotonic() + 30
            while subprocess.run(["ssh-add", "-q", str(tmp_path / "key")]).returncode:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            # The private half is in the agent alone.
            assert says_hello(address(server))
    finally:
        agent.terminate()
        agent.wait()


def test_a_key_of_the_system_s_is_passed_over() -> None:
    """As `IdentityFile /etc/ssh/machine_key` of root for every host is, where another user connects."""
    code = (
        "import os\nfrom types import SimpleNamespace\n"
        "from foxnas_mlflow.devices._ssh import _client_keys\n"
        "if os.getuid() == 0:\n    os.setuid(65534)\n"
        "print(_client_keys(SimpleNamespace(config={'IdentityFile': ['/etc/shadow', '/etc/passwd']}))['client_keys'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['/etc/passwd']\n", done.stderr


def test_known_hosts_that_ssh_reads(
    server: Server, home: Path, system: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    known_hosts, config = home / ".ssh" / "known_hosts", home / ".ssh" / "config"
    lines = known_hosts.read_bytes()
    # A file that others wrote: cut short, of an unknown kind, of another encoding.
    (system / "ssh_known_hosts").write_bytes(b"board\n|1|short ssh-rsa AAAA\n# B\xfcro\n@sealed a b c\n" + lines)
    known_hosts.unlink()
    assert says_hello(address(server))
    assert f"line 1 of {system / 'ssh_known_hosts'} is left out: Invalid known hosts entry: board" in caplog.text
    (system / "ssh_known_hosts").unlink()
    monkeypatch.setenv("STATE", str(home / "state"))
    place = home / "state" / f"{os.getuid()}-{socket.gethostname()}"
    place.parent.mkdir()
    place.write_bytes(lines)
    config.write_text("UserKnownHostsFile ${STATE}/%i-%l\n")
    assert says_hello(address(server))


def test_what_ssh_takes_is_taken_or_named(server: Server, home: Path) -> None:
    config = home / ".ssh" / "config"
    (home / ".ssh" / "known_hosts").rename(home / ".ssh" / "127.0.0.1.hosts")
    config.write_text(
        "UserKnownHostsFile /does/not/exist ~/.ssh/%h.hosts\nRequestTTY force\nIdentityFile ~/.ssh/none\n"
    )
    with connect(address(server)) as connection:
        assert connection.run(["printf", "a\n"], timeout_s=10).stdout == "a\n"
    config.write_text(f"Port {server.port}  # garage\n")
    with pytest.raises(DeviceError, match=r"config line 1: Extra data at end: # garage; .* no comment behind a value"):
        connect("ssh://127.0.0.1")


def test_no_python_on_the_machine(server: Server) -> None:
    message = r"must have Python 3\.7 or newer at /opt/no/python3"
    with connect(address(server, python="/opt/no/python3")) as connection, pytest.raises(DeviceError, match=message):
        check(connection)


def test_probes_are_held_against_this_host(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board whose kernels compute something else teaches nothing: its times are left out."""
    shorten(monkeypatch)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "sitecustomize.py").write_text(
        "from ai_edge_litert.interpreter import Interpreter\n"
        "right = Interpreter.get_tensor\n"
        "Interpreter.get_tensor = lambda *arguments: ~right(*arguments)\n"
    )
    (broken / "python").write_text(f'#!/bin/sh\nPYTHONPATH={broken} exec {sys.executable} "$@"\n')
    (broken / "python").chmod(0o755)
    for python, is_right in ((sys.executable, True), (str(broken / "python"), False)):
        with open_device(get_target("cpu"), TINY_CPU, address(server, python=python)) as timer:
            problems = timer.time(TINY_CPU.smallest(32)).problems
        assert any("differs from the host's" in problem for problem in problems) is not is_right


def test_addresses_that_lead_nowhere(home: Path) -> None:
    from tests.servers import free_port

    for uri, message in (
        (f"ssh://127.0.0.1:{free_port()}", "must listen"),
        ("ssh://board.invalid", "host name of ssh://board.invalid must be known"),
        ("ssh://", "a device is local"),
        ("ssh://board:port", "a device is local"),
        ("ssh://board/path", "a device is local"),
        ("ssh://me:secret@board", r"no password; received ssh://me:\*\*\*@board"),
        ("ssh://board?wait=long", r"wait must be a number of seconds .* received ssh://board\?wait=long"),
        ("ssh://board?wait=0", "wait must be a number of seconds"),
        ("ssh://board?colour=red", "takes only python and key and edgetpu"),
    ):
        with pytest.raises(DeviceError, match=message):
            connect(uri)


def test_an_address_without_a_route() -> None:
    if subprocess.run(["sh", "-c", "unshare --net true"], capture_output=True).returncode:
        pytest.skip("a network of its own needs the right to make one")
    command = [sys.executable, "-m", "foxnas_mlflow", "device", "check", "--device", "ssh://pi@10.1.2.3"]
    done = subprocess.run(["unshare", "--net", *command], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("foxnas: there must be a route to ssh://pi@10.1.2.3")


def test_a_board_that_hangs_is_noticed(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foxnas_mlflow.devices._ssh.KEEPALIVE_SECONDS", 0.2)
    with connect(address(server)) as connection:
        server.freeze()
        with pytest.raises(ConnectionLostError, match=r"was lost.*check the board's power"):
            connection.run(["true"], timeout_s=600)


def test_a_board_measures_on_after_a_command_whose_time_was_up(server: Server, probe: bytes, tmp_path: Path) -> None:
    """The script there takes the end of its input for the end of the host, and removes its directory."""
    with connect(address(server)) as connection:
        measure(connection, probe, **SHORT)
        first = connection.workspace({})
        endless = ["measure", connection.send(probe, "model.tflite"), "--watch-stdin", "--runs", "1000000000"]
        with pytest.raises(DeviceError, match="must end within"):
            run_board(connection, [*endless, "--max-seconds", "600"], timeout_s=3)
        _wait_until_empty(tmp_path / "scratch")
        assert measure(connection, probe, **SHORT).n_runs >= 5
        assert connection.workspace({}) != first
    _wait_until_empty(tmp_path / "scratch")


def test_a_lost_board_comes_back_and_is_measured(
    server: Server, probe: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measuring, "RECONNECT_SECONDS", 20.0)
    with connect(address(server)) as connection:
        puller = _pull_the_plug(server, tmp_path / "scratch", again=True)
        # Too many runs for the moment in which the plug is pulled.
        benchmark = measure(connection, probe, runs=10**6, warmup=1, max_seconds=0.5)
        puller.join()
        assert benchmark.n_runs > 20
    _wait_until_empty(tmp_path / "scratch")


def test_a_board_that_stays_away_is_told(
    server: Server, probe: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(address(server, wait="1.5")) as connection:
        puller = _pull_the_plug(server, tmp_path / "scratch", again=False)
        with pytest.raises(ConnectionLostError, match=r"went away and did not come back.*run the same command again"):
            measure(connection, probe, runs=10**6, warmup=1, max_seconds=30.0)
        puller.join()
    assert "waiting up to 1.5 s for it" in caplog.text
    # The board's process noticed too: nothing runs, nothing is left.
    _wait_until_empty(tmp_path / "scratch")


def test_every_error_of_the_library_is_mapped() -> None:
    classes = [value for value in vars(asyncssh).values() if inspect.isclass(value) and issubclass(value, Exception)]
    classes += [OSError, ConnectionResetError, BrokenPipeError, TimeoutError, ValueError]
    assert len(classes) > 20
    for cls in classes:
        error = cls.__new__(cls)
        place = SshPlace("board")
        for found in (unreachable(error, "ssh://board", place, known=False), lost(error, "ssh://board")):
            assert isinstance(found, DeviceError)
            assert ";" in str(found)
    # What `connect` and `run` catch covers all that asyncssh raises in a client.
    elsewhere = {"BreakReceived", "SignalReceived", "TerminalSizeChanged", "ChannelListenError", "KeyExportError"}
    elsewhere |= {"KeyGenerationError", "PasswordChangeRequired"}
    for cls in classes:
        if cls.__name__ not in elsewhere:
            assert issubclass(cls, OSError | ValueError | asyncssh.Error), cls


def _made(path: Path) -> str:
    path.mkdir()
    return str(path)


def _hide_keys(home: Path) -> None:
    for path in (home / ".ssh").glob("id_*"):
        path.rename(home / path.name)


def _rsa_line(server: Server, directory: Path) -> str:
    key = directory / "rsa"
    subprocess.run(["ssh-keygen", "-q", "-t", "rsa", "-b", "2048", "-N", "", "-f", str(key)], check=True)
    return f"[127.0.0.1]:{server.port} {key.with_suffix('.pub').read_text()}"


def _pull_the_plug(server: Server, directory: Path, *, again: bool) -> threading.Thread:
    """End the server while a measurement runs there, and start it again, or not."""

    def work() -> None:
        deadline = time.monotonic() + 60
        while not board_processes(directory) and time.monotonic() < deadline:
            time.sleep(0.02)
        server.stop()
        if again:
            server.start()

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def _wait_until_empty(directory: Path) -> None:
    deadline = time.monotonic() + 30
    while list(directory.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list(directory.iterdir())


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.train
def test_a_sampling_whose_board_goes_away_goes_on_when_it_is_back(
    server: Server,
    tracking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(measuring, "RECONNECT_SECONDS", 0.4)
    shorten(monkeypatch)
    register_mini_supernet()
    command = ["sample", "--n-samples", "6", "--image-size", "8", "--target", "cpu", "--device", address(server)]

    def rows_on_disk() -> list[Path]:
        return [
            p
            for p in tmp_path.glob("cache/foxnas_mlflow/samples/*/measurements.csv")
            if p.read_bytes().count(b"\n") > 2
        ]

    measure, asked = devices.measure, itertools.count(1)

    def measure_until_cut(*arguments: Any, **values: Any) -> Benchmark:
        if next(asked) == 4:
            deadline = time.monotonic() + 120
            while not rows_on_disk() and time.monotonic() < deadline:
                time.sleep(0.02)
            server.stop()
        return measure(*arguments, **values)

    with monkeypatch.context() as patch:
        patch.setattr(devices, "measure", measure_until_cut)
        assert main(command) == 2
    assert "went away and did not come back" in capsys.readouterr().err
    client = mlflow.MlflowClient()
    (failed,) = client.search_runs(["0"], "tags.`foxnas.stage` = 'sample'")
    assert failed.info.status == "FAILED"
    kept = read_measurements(rows_on_disk()[0])
    assert 2 <= len(kept) < 6
    # Others can go on from them too.
    uploaded = mlflow.artifacts.download_artifacts(
        f"runs:/{failed.info.run_id}/measurements.csv", dst_path=str(tmp_path)
    )
    assert read_measurements(uploaded) == kept

    server.start()
    assert main(command) == 0
    finished = client.search_runs(["0"], "tags.`foxnas.stage` = 'sample'", order_by=["start_time DESC"])[0]
    final = mlflow.artifacts.download_artifacts(
        f"runs:/{finished.info.run_id}/measurements.csv", dst_path=str(tmp_path / "final")
    )
    rows = read_measurements(final)
    # What is there is not evaluated or measured again; a latency that was disturbed is made up for.
    assert [(row.architecture, row.accuracy) for row in rows[: len(kept)]] == [
        (row.architecture, row.accuracy) for row in kept
    ]
    assert all(new == old for new, old in zip(rows, kept, strict=False) if old.latency_ms is not None)
    assert len(rows) == 6
    # A busy machine may leave some latencies out.
    assert {row.latency_source for row in rows if row.latency_ms is not None} == {"measured"}


def test_the_next_command_keeps_the_whole_address(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    device = address(server, python=sys.executable)
    assert "?python=" in device
    assert main(["device", "check", "--device", device]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Next: "))
    # Quoted: some shells look for files at a question mark.
    assert device in shlex.split(line)
    assert f"'{device}'" in line
