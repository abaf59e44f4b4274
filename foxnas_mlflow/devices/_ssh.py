"""``ssh://user@host[:port]``: a board, through asyncssh.

Strict by default: the host's key must be known (``~/.ssh/known_hosts``, or what ``~/.ssh/config``
names); a changed or unknown one is refused. An event loop in a thread of its own keeps the
connection alive, and notices its loss, between two measurements too. Files travel through ``cat``,
because small systems have no SFTP server.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import shlex
import socket
import threading
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, TypeVar

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, import_or_raise
from foxnas_mlflow.devices._base import Completed, Connection, refused, timed_out

CONNECT_SECONDS = 15
KEEPALIVE_SECONDS = 15
KEEPALIVE_MISSES = 3
FILE_SECONDS = 600

T = TypeVar("T")


class SshConnection(Connection):
    """An open ssh connection.

    Args:
        uri: The address, for messages.
        host: Name or address; ``Host`` entries of the SSH configuration apply.
        port: Port, or None: the configuration's, else 22.
        user: User, or None: the configuration's, else this user.
        key: Path of a private key, or None: the agent's and the usual ones.
        python: Python on the machine.

    Raises:
        DeviceError: If the machine cannot be reached, is not the one that is known, or refuses.
        MissingDependencyError: If asyncssh is not installed.
    """

    def __init__(
        self,
        uri: str,
        host: str,
        *,
        port: int | None = None,
        user: str | None = None,
        key: str | None = None,
        python: str | None = None,
    ) -> None:
        super().__init__()
        self.uri = uri.partition("?")[0]
        # Commands start in the home directory.
        self.python = "./" + python[2:] if python is not None and python.startswith("~/") else python or "python3"
        self._host = host
        self._asyncssh: Any = import_or_raise("asyncssh", extra="device", feature="measuring through ssh")
        self._options: dict[str, Any] = {
            "connect_timeout": CONNECT_SECONDS,
            "login_timeout": CONNECT_SECONDS,
            "keepalive_interval": KEEPALIVE_SECONDS,
            "keepalive_count_max": KEEPALIVE_MISSES,
            **({} if port is None else {"port": port}),
            **({} if user is None else {"username": user}),
            **({} if key is None else {"client_keys": [str(Path(key).expanduser())]}),
        }
        self._ssh: Any = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="foxnas-ssh", daemon=True)
        self._thread.start()
        try:
            self._reopen()
        except BaseException:
            self._disconnect()
            raise

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        completed, output = self._execute(argv, None, timeout_s)
        return Completed(completed.status, output.decode(errors="replace"), completed.stderr)

    def put(self, data: bytes, path: str) -> None:
        completed, _ = self._execute(["sh", "-c", 'cat > "$1"', "sh", path], data, FILE_SECONDS)
        if completed.status != 0:
            raise refused("writing a file", completed.stderr, self.uri)

    def get(self, path: str) -> bytes:
        completed, output = self._execute(["cat", path], None, FILE_SECONDS)
        if completed.status != 0:
            raise refused("reading a file", completed.stderr, self.uri)
        return output

    def _execute(self, argv: Sequence[str], data: bytes | None, timeout_s: float) -> tuple[Completed, bytes]:
        try:
            return self._wait(self._run(argv, data, timeout_s))
        except TimeoutError:
            raise timed_out(argv, timeout_s, self.uri) from None
        except (OSError, self._asyncssh.Error) as error:
            raise lost(error, self.uri) from error

    async def _run(self, argv: Sequence[str], data: bytes | None, timeout_s: float) -> tuple[Completed, bytes]:
        if self._ssh is None:
            raise self._asyncssh.ConnectionLost("it could not be opened again")
        process = await self._ssh.create_process(shlex.join(argv), encoding=None)
        try:
            async with asyncio.timeout(timeout_s):
                _, output, errors = await asyncio.gather(
                    _feed(process.stdin, data), process.stdout.read(), process.stderr.read()
                )
                await process.wait_closed()
        finally:
            # Also ends a command whose time is up: its standard input ends.
            process.close()
        status = process.exit_status
        if process.exit_signal is not None:
            names = {"KILL": 9, "SEGV": 11, "TERM": 15, "ABRT": 6, "BUS": 7, "ILL": 4, "FPE": 8}
            status = 128 + names.get(process.exit_signal[0], 1)
        if status is None:
            raise self._asyncssh.ConnectionLost("the connection closed while a command ran")
        return Completed(status, "", errors.decode(errors="replace")), output

    def _reopen(self) -> None:
        if self._ssh is not None:
            self._ssh.abort()
            self._ssh = None
        options = None
        try:
            options = self._asyncssh.SSHClientConnectionOptions(host=self._host, **self._options)
            self._ssh = self._wait(self._asyncssh.connect(self._host, options=options))
        except (OSError, ValueError, self._asyncssh.Error, self._asyncssh.PasswordChangeRequired) as error:
            raise unreachable(error, self.uri, known=options is not None and self._is_known(options)) from error

    def _is_known(self, options: Any) -> bool:
        """Whether known_hosts has a key of this host."""
        with contextlib.suppress(OSError, ValueError):
            name = options.host_key_alias or options.host or self._host
            files = options.known_hosts or str(Path("~/.ssh/known_hosts").expanduser())
            found = self._asyncssh.match_known_hosts(files, name, "", options.port)
            return bool(found[0] or found[1])
        return False

    def _wait(self, work: Coroutine[Any, Any, T] | Any) -> T:
        async def run() -> T:
            result: T = await work
            return result

        future = asyncio.run_coroutine_threadsafe(run(), self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C in this thread must end the work in the other one.
            future.cancel()
            raise

    def _disconnect(self) -> None:
        if self._loop.is_closed():
            return
        ssh, self._ssh = self._ssh, None

        async def close() -> None:
            if ssh is not None:
                ssh.close()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        await ssh.wait_closed()
            await self._loop.shutdown_default_executor()

        with contextlib.suppress(OSError, self._asyncssh.Error):
            self._wait(close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def lost(error: Exception, uri: str) -> DeviceError:
    """The error for an open connection that failed."""
    return ConnectionLostError(
        f"the connection to {uri} was lost",
        received=str(error) or type(error).__name__,
        remedy="check the board's power and network; what was measured before is kept",
    )


def unreachable(error: Exception, uri: str, *, known: bool) -> DeviceError:
    """The error for a connection that could not be opened.

    Args:
        error: What asyncssh, the operating system or the event loop raised.
        uri: The address.
        known: Whether known_hosts has a key of this host.
    """
    name, text = type(error).__name__, str(error) or type(error).__name__
    host = urlhost(uri)
    if name in ("HostKeyNotVerifiable", "KeyExchangeFailed") and known:
        return DeviceError(
            f"the host key of {uri} has changed",
            received=text,
            remedy=f"if the board was installed anew, ssh-keygen -R {host}, then ssh to it once; "
            "otherwise another machine answers at its address",
        )
    if name == "HostKeyNotVerifiable":
        return DeviceError(
            f"the host key of {uri} must be known",
            received=text,
            remedy="connect with ssh once, compare the fingerprint and accept it",
        )
    if name == "ConnectionLost" or isinstance(error, ConnectionResetError | BrokenPipeError):
        return DeviceError(
            f"{uri} must not close the connection before the login",
            received=text,
            remedy="wait if it restarts; if known_hosts has a key of other type than it has now, "
            f"ssh-keygen -R {host}, then ssh to it once",
        )
    if name == "PermissionDenied":
        return DeviceError(
            f"{uri} must accept a key of this user",
            received=text,
            remedy="copy one with ssh-copy-id, start ssh-agent, or add ?key=/path to the address; check the user name",
        )
    if name in ("KeyImportError", "KeyEncryptionError"):
        return DeviceError(
            f"the private key for {uri} must be readable",
            received=text,
            remedy="load an encrypted key with ssh-add, or give another with ?key=/path",
        )
    if name == "ConfigParseError":
        return DeviceError(
            "~/.ssh/config must be valid", received=text, remedy="mend it: ssh -G host shows its mistakes"
        )
    if isinstance(error, socket.gaierror):
        return DeviceError(
            f"the host name of {uri} must be known", received=text, remedy="check its spelling, or give its IP address"
        )
    if isinstance(error, TimeoutError):
        return DeviceError(
            f"{uri} must answer within {CONNECT_SECONDS} s",
            received="no answer",
            remedy="check that the board is on, its address, and that no firewall drops the port",
        )
    if isinstance(error, ConnectionRefusedError):
        return DeviceError(
            f"an ssh server must listen at {uri}", received=text, remedy="start it there (sshd), and check the port"
        )
    if isinstance(error, OSError) and error.errno in (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN):
        return DeviceError(
            f"there must be a route to {uri}", received=text, remedy="check the network, and that the board is on"
        )
    if isinstance(error, FileNotFoundError | PermissionError):
        return DeviceError(
            f"the files that {uri} needs must be readable", received=text, remedy="check ?key=/path and ~/.ssh"
        )
    return DeviceError(
        f"the connection to {uri} cannot be opened", received=f"{name}: {text}", remedy=f"try: ssh -v {host}"
    )


def urlhost(uri: str) -> str:
    """The host as ``ssh`` and ``ssh-keygen`` write it."""
    host = uri.removeprefix("ssh://").rpartition("@")[2].strip("/")
    name, _, port = host.partition(":")
    return f"'[{name}]:{port}'" if port else name


async def _feed(stdin: Any, data: bytes | None) -> None:
    """Write a command's whole input and end it; without data leave it open."""
    if data is None:
        return
    # A command that ends before it read all says why on standard error.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(data)
        await stdin.drain()
        stdin.write_eof()
