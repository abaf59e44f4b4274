"""Boards as they are found: their shells, keys, file systems, quotas and libraries."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.deploy._board import split_target
from foxnas_mlflow.devices import Completed, Connection, LocalConnection, board, check, connect, host_answer, measure
from foxnas_mlflow.devices._check import _clock, _software, _throttling
from foxnas_mlflow.devices._script import read_answer, runtime_packages
from foxnas_mlflow.devices._ssh import SshPlace, known_name, wrapped
from foxnas_mlflow.tflite import require_compiler
from tests.measuring import SHORT

from .sshd import Server, make_key, ssh_server

needs_sshd = pytest.mark.skipif(not Path("/usr/sbin/sshd").exists(), reason="no OpenSSH server (openssh-server)")
USER = os.environ.get("USER") or "root"
BOARD = Path(board.__file__)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("asyncssh")
    (tmp_path / "home" / ".ssh").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)
    make_key(tmp_path / "home" / ".ssh" / "id_ed25519")
    return tmp_path / "home"


@pytest.fixture
def server(home: Path, tmp_path: Path) -> Iterator[Server]:
    public = (home / ".ssh" / "id_ed25519.pub").read_text()
    with ssh_server(tmp_path / "sshd", public) as running:
        (home / ".ssh" / "known_hosts").write_text(running.known_hosts_line)
        yield running


@needs_sshd
def test_a_host_in_upper_case_is_found_as_ssh_finds_it(server: Server, home: Path) -> None:
    (home / ".ssh" / "config").write_text(f"Host MyPi\n  HostName LocalHost\n  Port {server.port}\n  User {USER}\n")
    (home / ".ssh" / "known_hosts").write_text(f"[localhost]:{server.port} {server.host_key}\n")
    for device in ("ssh://MyPi", split_target("edge://MyPi")[0]):
        with connect(device) as connection:
            assert connection.run(["echo", "hello"], timeout_s=10).stdout == "hello\n"
    with pytest.raises(DeviceError, match="host name of ssh://mypi must be known"):
        connect("ssh://mypi")


@needs_sshd
def test_a_shell_that_prints_is_named_and_worked_around(
    home: Path, tmp_path: Path, probe: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    if Path(os.path.expanduser(f"~{USER}")).exists() and "bash" not in _login_shell():
        pytest.skip("the login shell here reads no BASH_ENV")
    (tmp_path / "welcome").write_text("echo 'Welcome to your board!'; printf 'no newline'\n")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {"BASH_ENV": str(tmp_path / "welcome"), "TMPDIR": str(scratch)}
    with ssh_server(tmp_path / "sshd", (home / ".ssh" / "id_ed25519.pub").read_text(), env=environment) as server:
        (home / ".ssh" / "known_hosts").write_text(server.known_hosts_line)
        with connect(f"ssh://{USER}@127.0.0.1:{server.port}?python={sys.executable}") as connection:
            found = check(connection)
            data = os.urandom(10_000)
            connection.put(data, f"{connection.workspace({})}/data")
            assert connection.get(f"{connection.workspace({})}/data") == data
            assert found.ready
            assert any("prints 'Welcome to your board!' before every command" in note for note in found.notes)
            assert measure(connection, probe, **SHORT).n_runs >= 5
    assert not list(scratch.iterdir())


@needs_sshd
def test_a_full_disk_is_told_whatever_language_the_board_speaks(home: Path, tmp_path: Path) -> None:
    """By stand-ins: few machines have German installed."""
    for program in ("mktemp", "cat"):
        (tmp_path / "german").mkdir(exist_ok=True)
        (tmp_path / "german" / program).write_text(
            f'#!/bin/sh\necho "{program}: Hinweis" >&2\ncase "$LC_ALL" in C) why="No space left on device";; '
            f'*) why="Auf dem Gerät ist kein Speicherplatz mehr verfügbar";; esac\necho "{program}: $why" >&2\nexit 1\n'
        )
        (tmp_path / "german" / program).chmod(0o755)
    environment = {"PATH": f"{tmp_path / 'german'}:{os.environ['PATH']}", "LC_ALL": "de_DE.UTF-8"}
    with ssh_server(tmp_path / "sshd", (home / ".ssh" / "id_ed25519.pub").read_text(), env=environment) as server:
        (home / ".ssh" / "known_hosts").write_text(server.known_hosts_line)
        message = "was refused; received {}: No space left on device; free some space there"
        with connect(f"ssh://{USER}@127.0.0.1:{server.port}") as connection:
            with pytest.raises(DeviceError, match=message.format("mktemp")):
                connection.workspace({})
            with pytest.raises(DeviceError, match=message.format("cat")):
                connection.put(b"data", str(tmp_path / "data"))


def _login_shell() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_shell


@pytest.mark.parametrize("shell", ["sh", "bash", "dash", "fish", "zsh", "tcsh", "busybox"])
def test_every_shell_runs_the_same_command(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"no {shell} here")
    argv = ["printf", "[%s]", "it's $HOME; a `name`\n\\'x\\\\", "é!!", "", "*", "a\n"]
    command = [shell, *(["sh"] if shell == "busybox" else []), "-c", wrapped(argv, "MARK")]
    done = subprocess.run(command, capture_output=True, check=True)
    assert done.stdout == b"MARK\n" + subprocess.run(argv, capture_output=True, check=True).stdout


@needs_sshd
def test_a_login_that_runs_no_commands_is_told(home: Path, tmp_path: Path) -> None:
    public = (home / ".ssh" / "id_ed25519.pub").read_text()
    forced = f'command="echo This account is currently not available." {public}'
    with ssh_server(tmp_path / "sshd", forced) as server:
        (home / ".ssh" / "known_hosts").write_text(server.known_hosts_line)
        with (
            connect(f"ssh://{USER}@127.0.0.1:{server.port}") as connection,
            pytest.raises(DeviceError, match="must run commands; received This account is currently not available"),
        ):
            check(connection)


@needs_sshd
def test_an_encrypted_key_is_left_to_the_agent(
    server: Server, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = tmp_path / "encrypted"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", str(key)], check=True)
    authorized = tmp_path / "sshd" / "authorized_keys"
    authorized.write_text(key.with_suffix(".pub").read_text())
    address = f"ssh://{USER}@127.0.0.1:{server.port}?key={key}"
    with pytest.raises(DeviceError, match="load an encrypted key into ssh-agent with ssh-add"):
        connect(address)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(tmp_path / "agent")], stdout=subprocess.DEVNULL)
    try:
        monkeypatch.setenv("SSH_AUTH_SOCK", str(tmp_path / "agent"))
        (tmp_path / "ask").write_text("#!/bin/sh\necho secret\n")
        (tmp_path / "ask").chmod(0o755)
        ask = {**os.environ, "SSH_ASKPASS": str(tmp_path / "ask"), "SSH_ASKPASS_REQUIRE": "force", "DISPLAY": "x"}
        deadline = time.monotonic() + 60
        while not (tmp_path / "agent").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        subprocess.run(["ssh-add", str(key)], env=ask, check=True, capture_output=True, stdin=subprocess.DEVNULL)
        with connect(address) as connection:
            assert connection.run(["true"], timeout_s=10).status == 0
    finally:
        agent.terminate()
        agent.wait()


@pytest.mark.parametrize(("host", "port"), [("::1", 2403), ("::1", 22), ("board.lan", 2222), ("board.lan", 22)])
def test_the_remedy_for_a_changed_key_works_when_pasted(host: str, port: int, tmp_path: Path) -> None:
    known_hosts = tmp_path / "known hosts"
    key = make_key(tmp_path / "key")
    known_hosts.write_text(f"{known_name(host, port)} {key}\nother {key}\n")
    place = SshPlace(host, port, "pi", known_as=known_name(host, port), known_hosts=str(known_hosts))
    subprocess.run(["sh", "-c", place.forget], check=True, capture_output=True)
    assert known_hosts.read_text() == f"other {key}\n"
    assert place.ssh == f"ssh -p {port} pi@{host}"
    if shutil.which("ssh"):
        asked = subprocess.run([*shlex.split(place.ssh), "-G"], capture_output=True, text=True, check=True).stdout
        assert f"hostname {host}\n" in asked
        assert f"port {port}\n" in asked


@needs_sshd
def test_ipv6_and_options_of_an_address(home: Path) -> None:
    from tests.servers import free_port

    port = free_port()
    with pytest.raises(DeviceError, match=rf"must listen at ssh://pi@\[::1\]:{port}|no route|route to"):
        connect(f"ssh://pi@[::1]:{port}")
    with connect("local?edgetpu=usb:1") as connection:
        assert connection.edgetpu == "usb:1"
    for wrong in ("local?python=x", "docker://image?cpus=none", "docker://image?cpus=0", "ssh://"):
        with pytest.raises(DeviceError):
            connect(wrong)


def test_the_lock_is_made_where_it_can_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "LOCKS", ("/proc/none/foxnas-measurement.lock",))
    monkeypatch.setattr(board.tempfile, "tempdir", str(tmp_path))
    assert board.lock_path() == str(tmp_path / "foxnas-measurement.lock")
    monkeypatch.setattr(board.tempfile, "tempdir", "/proc/none")
    with pytest.raises(board.BoardError, match="No such file"):
        board.lock_path()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may measure as another account")
def test_the_lock_that_one_user_made_is_every_users() -> None:
    """Whatever that one lets others read of its files; a closed one of an earlier release is told with its owner."""
    # The tests' own is where another account may not look.
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip(f"no {python}, which every account may start")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        Path(place).chmod(0o755)
        path, script = Path(place, "lock"), Path(place, "board.py")
        text = BOARD.read_text(encoding="utf-8")
        script.write_text(re.sub(r"(?m)^LOCKS = .*", f"LOCKS = ({str(path)!r},)", text))
        script.chmod(0o644)

        def look(user: int, umask: int) -> dict[str, Any]:
            argv = [python, str(script), "check"]
            done = subprocess.run(argv, capture_output=True, check=True, user=user, umask=umask, cwd="/")
            return cast("dict[str, Any]", json.loads(done.stdout))

        assert look(0, 0o077)["lock"] == ""
        assert look(65534, 0o022)["lock"] == ""
        path.chmod(0o700)
        found = look(65534, 0o022)
        # Its owner mends it by measuring.
        assert look(0, 0o077)["lock"] == look(65534, 0o022)["lock"] == ""
        assert (found["lock"], found["lock_error"]) == ("closed_lock", f"{path} of root: Permission denied")
    (lock,) = (each for each in _software(found, LocalConnection()) if each.name == "lock")
    assert lock.needed
    assert f"{path} of root" in str(lock)
    assert "chmod 755" in str(lock)


@pytest.mark.skipif(Path(sys.prefix).is_relative_to("/tmp"), reason="this Python is in the /tmp to be covered")
def test_a_read_only_tmp_with_another_directory(tmp_path: Path, probe: bytes) -> None:
    place = Path("/var/tmp") / tmp_path.name
    place.mkdir()
    try:
        (place / "model.tflite").write_bytes(probe)
        shutil.copy(BOARD, place / "board.py")
        script = (
            "mount -t tmpfs -o ro tmpfs /tmp && mount -t tmpfs -o ro tmpfs /dev/shm && "
            'export TMPDIR="$1"; exec "$2" "$1/board.py" measure "$1/model.tflite" --runs 3 --max-seconds 0.1'
        )
        command = ["unshare", "--mount", "sh", "-c", script, "sh", str(place), sys.executable]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "not permitted" in done.stderr or "ermission denied" in done.stderr:
            pytest.skip("a file system of its own needs the right to mount one")
        assert '"samples_ms"' in done.stdout, done.stderr
    finally:
        shutil.rmtree(place)


@pytest.mark.parametrize(
    ("cgroup", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000"}, 1.5),
        ("0::/\n", {"cpu.max": "50000 100000"}, 0.5),
        ("0::/\n", {"cpu.max": "max 100000"}, None),
        (
            "4:cpu,cpuacct:/docker/x\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000", "cpu,cpuacct/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        (
            "1:cpu:/x\n0::/\n",
            {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"},
            None,
        ),
        ("", {}, None),
    ],
)
def test_quotas_of_both_versions_of_control_groups(
    cgroup: str, files: dict[str, str], quota: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_control_groups(cgroup, files, tmp_path, monkeypatch)
    assert board.quota_processors() == quota
    expected = len(os.sched_getaffinity(0)) if quota is None else max(1, min(len(os.sched_getaffinity(0)), int(quota)))
    assert board.n_processors() == expected


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/a\n", {"a/memory.max": "1000", "a/memory.current": "900"}, 100),
        (
            "0::/a\n",
            {"a/memory.max": "1000", "a/memory.current": "900", "a/memory.stat": "anon 100\ninactive_file 700\nslab 1"},
            800,
        ),
        (
            "4:memory:/x\n",
            {
                "memory/x/memory.limit_in_bytes": "1000",
                "memory/x/memory.usage_in_bytes": "900",
                "memory/x/memory.stat": "inactive_file 1\ntotal_inactive_file 600",
            },
            700,
        ),
    ],
)
def test_files_kept_in_memory_are_free_memory(
    cgroup: str, files: dict[str, str], free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_control_groups(cgroup, files, tmp_path, monkeypatch)
    assert board.free_memory_bytes() == free


def in_control_groups(cgroup: str, files: dict[str, str], root: Path, patch: pytest.MonkeyPatch) -> None:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    read = board._read
    patch.setattr(board, "CGROUPS", str(root))
    patch.setattr(board, "_read", lambda path: cgroup if path == "/proc/self/cgroup" else read(path))


@pytest.mark.parametrize(
    ("machine", "bits", "python"),
    [
        ("aarch64", 64, "aarch64"),
        ("aarch64", 32, "armv7l"),
        ("armv8l", 32, "armv7l"),
        ("armv6l", 32, "armv6l"),
        ("x86_64", 32, "i686"),
    ],
)
def test_a_32_bit_system_on_a_64_bit_kernel(machine: str, bits: int, python: str) -> None:
    assert board.instruction_set(machine, bits) == python


def test_the_clock_is_that_of_the_processor_that_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processors of other kinds, or with clocks of their own, stand beside each other."""
    allowed = os.sched_getaffinity(0)
    monkeypatch.setattr(board, "PROCESSORS", str(tmp_path))
    # Of those which this process may not use nothing is told.
    for number in {*allowed, max(allowed) + 1, 0}:
        (tmp_path / f"cpu{number}" / "cpufreq").mkdir(parents=True)
        (tmp_path / f"cpu{number}" / "cpufreq" / "scaling_cur_freq").write_text(f"{1000 * (number + 7)}\n")
        word = "performance" if number in allowed else "powersave"
        (tmp_path / f"cpu{number}" / "cpufreq" / "scaling_governor").write_text(f"{word}\n")
    assert board.governor() == "performance"
    try:
        for number in allowed:
            os.sched_setaffinity(0, {number})
            assert board._clock_state()["frequency_mhz"] == number + 7
    finally:
        os.sched_setaffinity(0, allowed)
    (tmp_path / f"cpu{min(allowed)}" / "cpufreq" / "scaling_governor").write_text("ondemand\n")
    assert board.governor() == ("mixed" if len(allowed) > 1 else "ondemand")


def test_a_clock_that_is_capped_is_not_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A vendor's image, or a tool that saves power, holds a processor below what it can."""
    monkeypatch.setattr(board, "PROCESSORS", str(tmp_path))
    assert board.clock_limits() == (None, None)
    for n, number in enumerate(sorted(os.sched_getaffinity(0))):
        directory = tmp_path / f"cpu{number}" / "cpufreq"
        directory.mkdir(parents=True)
        (directory / "cpuinfo_max_freq").write_text(f"{'1400000' if n else '1800000'}\n")
        (directory / "scaling_max_freq").write_text("1400000\n" if n else "1200000\n")
    assert board.clock_limits() == (1200, 1800)
    found = _clock(600, *board.clock_limits(), hot=False)
    assert (found.verdict, found.text) == ("not fine", "600 MHz now, capped at 1200 of 1800 MHz")
    assert _clock(None, 1200, 1800, hot=True).text == "capped at 1200 of 1800 MHz"
    assert _clock(None, 1200, 1800, hot=True).remedy == found.remedy.replace("lift", "cool it first, then lift", 1)
    assert (_clock(600, 1800, 1800, hot=True).verdict, _clock(None, None, None, hot=False).verdict) == (
        "fine",
        "unknown",
    )
    # Fast processors are lifted above slow ones, which keep what they can.
    command = found.remedy.partition(": ")[2].replace("/sys/devices/system/cpu", str(tmp_path)).replace("sudo ", "")
    subprocess.run(["sh", "-c", command], check=True, stdout=subprocess.DEVNULL)
    for path in tmp_path.glob("cpu*/cpufreq"):
        assert (path / "scaling_max_freq").read_text() == (path / "cpuinfo_max_freq").read_text()


@pytest.mark.parametrize("name", ["cpu-thermal", "CPU-therm", "TCPU", "x86_pkg_temp"])
def test_the_processors_temperature_is_found_by_any_spelling(name: str, tmp_path: Path) -> None:
    for zone, kind, temperature in ((0, "acpitz", 20_000), (1, name, 60_000)):
        (tmp_path / "class" / "thermal" / f"thermal_zone{zone}").mkdir(parents=True)
        (tmp_path / "class" / "thermal" / f"thermal_zone{zone}" / "type").write_text(f"{kind}\n")
        (tmp_path / "class" / "thermal" / f"thermal_zone{zone}" / "temp").write_text(f"{temperature}\n")
    assert board.temperature_c(str(tmp_path)) == 60.0


@pytest.mark.parametrize(
    ("sensors", "temperature"),
    [
        ({}, None),
        ({"hwmon0/name": "nvme", "hwmon0/temp1_input": "40000"}, None),
        (
            {
                "hwmon0/name": "nvme",
                "hwmon0/temp1_input": "40000",
                "hwmon1/name": "k10temp",
                "hwmon1/temp1_input": "61500",
            },
            61.5,
        ),
    ],
)
def test_a_place_on_the_board_is_not_the_processor(
    sensors: dict[str, str], temperature: float | None, tmp_path: Path
) -> None:
    """An AMD machine's only zone, which always says 16.8 C."""
    files = {"thermal/thermal_zone0/type": "acpitz", "thermal/thermal_zone0/temp": "16800"}
    files |= {f"hwmon/{path}": text for path, text in sensors.items()}
    for path, text in files.items():
        (tmp_path / "class" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "class" / path).write_text(text + "\n")
    assert board.temperature_c(str(tmp_path)) == temperature


def test_a_quota_is_named_for_what_it_takes(probe: bytes, control_group: Path) -> None:
    class Held(LocalConnection):
        """This machine's Python in a control group that others cannot hold back."""

        def run(self, argv: list[str], *, timeout_s: float):  # type: ignore[no-untyped-def, override]
            script = f'echo $$ > {control_group}/cgroup.procs; exec "$@"'
            return super().run(["sh", "-c", script, "sh", *argv], timeout_s=timeout_s)

    with Held() as connection:
        found = check(connection)
        benchmark = measure(connection, probe, runs=20, warmup=1, min_seconds=1.0, attempts=1)
    assert (found.quota, found.cores) == (0.5, 1)
    assert any("a quota of 0.5 processors" in note for note in found.notes)
    assert not benchmark.valid
    assert any("a quota of 0.5 processors held it back" in reason for reason in benchmark.invalid_reasons), benchmark
    assert not any("other processes" in reason for reason in benchmark.invalid_reasons)


@pytest.mark.parametrize("package", ["numpy", "ai_edge_litert", "pycoral"])
def test_a_package_that_crashes_is_named_on_its_own_line(package: str, tmp_path: Path, probe: bytes) -> None:
    """A build for another processor: NumPy on a Jetson, a wheel with AVX on an old Atom."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")

    class Other(LocalConnection):
        """This machine with a package for another processor."""

        def run(self, argv: list[str], *, timeout_s: float):  # type: ignore[no-untyped-def, override]
            argv = ["env", f"PYTHONPATH={tmp_path}", *argv] if argv[0] == self.python else argv
            return super().run(argv, timeout_s=timeout_s)

    with Other() as connection:
        found = check(connection)
        assert found.ready == (package == "pycoral")
        if package == "pycoral":
            return
        (missing,) = found.missing
        assert missing.startswith("NumPy: it cannot" if package == "numpy" else "runtime: it cannot")
        assert "signal 4; its build is for another processor" in missing
        with pytest.raises(DeviceError, match="must be built for its processor; received signal 4; run foxnas device"):
            measure(connection, probe)


def test_edge_tpus_are_named_as_pycoral_names_them(
    tmp_path: Path, edgetpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pycoral" / "utils").mkdir(parents=True)
    (tmp_path / "pycoral" / "utils" / "edgetpu.py").write_text(
        "def list_edge_tpus():\n    return [{'type': 'usb', 'path': '/sys/bus/usb/devices/2-1'}]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with connect("local") as connection:
        (line,) = (each for each in check(connection).findings if each.name == "Edge TPU")
    assert (line.verdict, line.text.partition(" answers")[0]) == ("fine", "usb /sys/bus/usb/devices/2-1")


def test_a_library_that_is_no_delegate_is_named(
    tmp_path: Path, probe: bytes, monkeypatch: pytest.MonkeyPatch, edgetpu: None
) -> None:
    compiled = require_compiler().compile(probe)
    (tmp_path / "empty.c").write_text("int nothing(void) { return 0; }\n")
    library = tmp_path / "libedgetpu.so.1"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(library), str(tmp_path / "empty.c")], check=True)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    message = rf"one of TensorFlow Lite; received {library} is a library without tflite_plugin_create_delegate"
    with connect("local") as connection:
        assert not check(connection).edgetpu
        with pytest.raises(DeviceError, match=message):
            measure(connection, compiled, edgetpu=True)
    assert host_answer(probe) is not None


@pytest.mark.parametrize(
    ("state", "verdict"),
    [("", "unknown"), ("0x0", "fine"), ("0x50000", "unknown"), ("0x50005", "not fine"), ("12", "fine")],
)
def test_throttling_that_cannot_be_known_is_not_called_fine(state: str, verdict: str) -> None:
    assert _throttling(state).verdict == verdict


@pytest.mark.parametrize(
    ("machine", "python", "packages"),
    [
        ("aarch64", "3.11.2", "numpy ai-edge-litert"),
        ("aarch64", "3.9.2", "'numpy<2' tflite-runtime"),
        ("armv7l", "3.11.2", "'numpy<2' tflite-runtime"),
        ("armv7l", "3.13.1", ""),
        ("armv6l", "3.11.2", ""),
    ],
)
def test_a_remedy_names_what_installs_there(machine: str, python: str, packages: str) -> None:
    assert runtime_packages(machine, python) == packages


@pytest.mark.parametrize(
    ("machine", "python", "glibc", "remedy"),
    [
        ("armv7l", "3.11.2", True, "pip install 'numpy<2' tflite-runtime,"),
        ("aarch64", "3.12.1", True, "pip install numpy ai-edge-litert,"),
        ("aarch64", "3.12.1", False, r"no runtime's wheel fits its C library \(musl"),
        ("i686", "3.11.2", True, "fits i686 with Python 3.11.2: give a Python 3.7 to 3.11 of 64-bit ARM or x86, or of"),
    ],
)
@pytest.mark.parametrize("error", ["no_numpy", "no_runtime"])
def test_a_measurement_names_what_installs_there(
    error: str, machine: str, python: str, glibc: bool, remedy: str
) -> None:
    facts = {"error": error, "message": "none", "machine": machine, "python": python, "glibc": glibc, "managed": False}
    connection = LocalConnection()
    connection.install = Connection.install
    with pytest.raises(DeviceError, match=remedy):
        read_answer(Completed(3, json.dumps(facts), ""), connection)


def test_the_c_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    # As glibc and musl answer.
    for answer in ("glibc 2.36", None):
        monkeypatch.setattr(os, "confstr", lambda name, answer=answer: answer)
        assert board.fitting()["glibc"] is bool(answer)


OLD_PYTHON = next(iter(sorted(Path(os.path.expanduser("~root/.pyenv/versions")).glob("3.9.*/bin/python3.9"))), None)


def _installed(directory: Path, package: str) -> bool:
    """Whether a wheel for Python 3.9 could be unpacked to a directory."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", "3.9", "--implementation", "cp", "--target", str(directory), package]
    return subprocess.run(command).returncode == 0


@pytest.fixture(scope="module")
def old_python() -> str:
    found = shutil.which("python3.9") if OLD_PYTHON is None else str(OLD_PYTHON)
    if found is None:
        pytest.skip("no Python 3.9 here")
    return found


@pytest.fixture(scope="module")
def tflite_runtime(old_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tflite") / "runtime"
    if not _installed(directory, "tflite-runtime==2.14.0"):
        pytest.skip("the wheels cannot be downloaded")
    return directory


@pytest.mark.slow
@pytest.mark.board
@pytest.mark.parametrize(
    ("numpy", "works"), [("numpy==1.26.4", True), ("numpy==1.19.5", False), ("numpy==2.0.2", False)]
)
def test_a_board_that_has_tflite_runtime_only(
    numpy: str, works: bool, tmp_path: Path, probe: bytes, old_python: str, tflite_runtime: Path
) -> None:
    if not _installed(tmp_path / numpy, numpy):
        pytest.skip("the wheels cannot be downloaded")
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nPYTHONPATH={tflite_runtime}:{tmp_path / numpy} exec {old_python} -s "$@"\n'
    )
    (tmp_path / "python").chmod(0o755)

    class Old(LocalConnection):
        """This machine with an old Python."""

        python = str(tmp_path / "python")

    with Old() as connection:
        found = check(connection)
        assert found.runtime == "tflite-runtime 2.14.0"
        assert found.ready == works, found.missing
        if works:
            expected = host_answer(probe)
            benchmark = measure(connection, probe, expected=expected, **SHORT)
            # Kernels of 2023: random weights carry what they round differently through all layers.
            assert benchmark.output_difference is not None
            assert expected is not None
            # tflite-runtime 2.14 differs from LiteRT 2.3 by 2 levels on random weights.
            assert benchmark.output_difference <= max(2.0, expected[0].std())
        else:
            assert "numpy<2" in found.missing[0]
            with pytest.raises(DeviceError, match="NumPy"):
                measure(connection, probe, runs=1, warmup=1)
