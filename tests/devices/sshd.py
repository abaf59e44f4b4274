"""A real ssh server on loopback, with keys made for it."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.servers import free_port


@dataclass
class Server:
    """A running server.

    Attributes:
        port: Where it listens, on 127.0.0.1 and ::1.
        process: The server.
        host_key: Its public host key.
        start: Starts it again after `stop`.
    """

    port: int
    host_key: str
    start: Callable[[], None]
    process: subprocess.Popen[bytes] | None = None

    @property
    def known_hosts_line(self) -> str:
        return f"[127.0.0.1]:{self.port},[::1]:{self.port} {self.host_key}\n"

    def stop(self) -> None:
        """End it and every connection; the commands that they run go on, as after a cut cable."""
        if self.process is not None:
            self._signal(signal.SIGKILL)
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """Let it answer nothing any more while its connections stay open, as a board that hangs."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: int) -> None:
        assert self.process is not None
        pids = [pid for pid in _below(self.process.pid) if "sshd" in _command(pid)]
        for pid in (self.process.pid, *pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def ssh_server(
    directory: Path,
    authorized_key: str,
    *,
    prefix: Sequence[str] = (),
    root: Path = Path("/"),
    env: Mapping[str, str] | None = None,
) -> Iterator[Server]:
    """Run sshd on loopback until the block ends.

    Args:
        directory: For keys, configuration and log; below `root`.
        authorized_key: Public key of the user that may log in (the user of this process).
        prefix: Command in front of sshd, for a server in another root directory.
        root: That directory.
        env: Environment of the sessions.
    """
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    inside = Path("/") / directory.relative_to(root)
    key = directory / "host_key"
    key.unlink(missing_ok=True)
    make_key(key)
    (directory / "authorized_keys").write_text(authorized_key)
    port = free_port()
    lines = [
        f"Port {port}",
        "ListenAddress 127.0.0.1",
        *(["ListenAddress ::1"] if socket.has_ipv6 else []),
        f"HostKey {inside / 'host_key'}",
        f"AuthorizedKeysFile {inside / 'authorized_keys'}",
        "StrictModes no",
        "UsePAM no",
        "PidFile none",
        "PasswordAuthentication no",
        "PermitRootLogin prohibit-password",
        "PermitUserEnvironment yes",
    ]
    # From 9.8 on a server keeps addresses out for a while that connect and do not log in, as tests do.
    said = subprocess.run([*prefix, "/usr/sbin/sshd", "-V"], capture_output=True, text=True).stderr
    version = re.search(r"OpenSSH_(\d+)\.(\d+)", said)
    lines += ["PerSourcePenalties no"] if version is not None and tuple(map(int, version.groups())) >= (9, 8) else []
    # Only one SetEnv line counts.
    lines += ["SetEnv " + " ".join(f"{name}={value}" for name, value in env.items())] if env else []
    (directory / "sshd_config").write_text("\n".join(lines) + "\n")
    log = directory / "sshd.log"
    command = [*prefix, "/usr/sbin/sshd", "-D", "-e", "-f", str(inside / "sshd_config")]
    if not prefix and os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)

    def start() -> None:
        with log.open("ab") as output:
            server.process = subprocess.Popen(command, stdout=output, stderr=output, start_new_session=True)
        deadline = time.monotonic() + 60
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
                return
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"sshd did not start:\n{log.read_text(errors='replace')[-2000:]}")
            time.sleep(0.05)

    server = Server(port, key.with_suffix(".pub").read_text().strip(), start)
    server.start()
    try:
        yield server
    finally:
        server.stop()


def make_key(path: Path) -> str:
    """Make a key pair and return the public key."""
    subprocess.run(
        [shutil.which("ssh-keygen") or "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True
    )
    return path.with_suffix(".pub").read_text().strip()


def board_processes(directory: Path) -> list[int]:
    """Board scripts that run from a working directory below a directory."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    commands = {pid: _command(pid) for pid in pids}
    # Not the shells that become them.
    wanted = (f"{directory}/foxnas-board-", "board.py measure")
    return [pid for pid, line in commands.items() if all(word in line for word in wanted) and " -c " not in line]


def _below(pid: int) -> list[int]:
    """All processes below a process: sshd gives each session a group of its own."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found: list[int] = []
    waiting = [pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
