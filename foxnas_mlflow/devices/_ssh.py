"""``ssh://user@host[:port]``: a board, through asyncssh.

Strict by default: the host's key must be known (to ``~/.ssh/known_hosts`` or ``/etc/ssh/ssh_known_hosts``, or what the
configuration names); a changed or unknown one is refused. An event loop in a thread of its own keeps the
connection alive, and notices its loss, between two measurements too. Files travel through ``cat``,
because small systems have no SFTP server.

sshd hands every command to the user's login shell, whichever that is (bash, dash, fish, csh), and what its
start-up files print comes first. So the login shell is given one word that all shells read alike, in which a
POSIX shell finds the command; a marker says where the command's own output begins.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import errno
import getpass
import logging
import os
import re
import secrets
import shlex
import socket
import threading
from collections.abc import Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, import_or_raise
from foxnas_mlflow.devices._base import IN_ENGLISH, Completed, Connection, refused, timed_out

PORT = 22
CONNECT_SECONDS = 15
KEEPALIVE_SECONDS = 15
KEEPALIVE_MISSES = 3
FILE_SECONDS = 600

USER_CONFIG, SYSTEM_CONFIG = "~/.ssh/config", "/etc/ssh/ssh_config"
KNOWN_HOSTS = {
    "UserKnownHostsFile": ("~/.ssh/known_hosts", "~/.ssh/known_hosts2"),
    "GlobalKnownHostsFile": ("/etc/ssh/ssh_known_hosts", "/etc/ssh/ssh_known_hosts2"),
}
"""Where OpenSSH looks for host keys, by the option that names other files."""

EXPANDED = ("CertificateFile", "ForwardAgent", "IdentityAgent", "IdentityFile", "ProxyCommand", "RemoteCommand")
"""Options whose tokens (``%h``) asyncssh expands."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


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
            **({} if port is None else {"port": port}),
            **({} if user is None else {"username": user}),
            # An encrypted key is left to the agent, which is asked first.
            **({} if key is None else {"client_keys": [str(Path(key).expanduser())], "ignore_encrypted": True}),
        }
        self._marker = secrets.token_hex(16)
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
        completed, _ = self._execute([*IN_ENGLISH, "sh", "-c", 'cat > "$1"', "sh", path], data, FILE_SECONDS)
        if completed.status != 0:
            raise refused("writing a file", completed.stderr, self.uri)

    def get(self, path: str) -> bytes:
        completed, output = self._execute([*IN_ENGLISH, "cat", path], None, FILE_SECONDS)
        if completed.status != 0:
            raise refused("reading a file", completed.stderr, self.uri)
        return output

    def _execute(self, argv: Sequence[str], data: bytes | None, timeout_s: float) -> tuple[Completed, bytes]:
        try:
            result: tuple[Completed, bytes] = self._wait(self._run(argv, data, timeout_s))
        except TimeoutError:
            raise timed_out(argv, timeout_s, self.uri) from None
        except (OSError, self._asyncssh.Error) as error:
            raise lost(error, self.uri) from error
        completed, output = result
        words, marker, own = output.partition(f"{self._marker}\n".encode())
        if not marker:
            said = (output.decode(errors="replace") + completed.stderr).strip().splitlines()
            raise DeviceError(
                f"the login shell of {self.uri} must run commands",
                received=said[-1] if said else f"exit status {completed.status}",
                remedy="give that user a shell (chsh), and no forced command for this key",
            )
        self.login_words = words.decode(errors="replace").strip()
        return completed, own

    async def _run(self, argv: Sequence[str], data: bytes | None, timeout_s: float) -> tuple[Completed, bytes]:
        if self._ssh is None:
            raise self._asyncssh.ConnectionLost("it could not be opened again")
        # A terminal, which `RequestTTY` may ask for, changes what passes.
        process = await self._ssh.create_process(wrapped(argv, self._marker), encoding=None, request_pty=False)
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
        place = SshPlace(self._host, self._options.get("port"), self._options.get("username"))
        self._ssh = self._wait(self._open(place, self.uri, **self._options))

    async def _open(self, place: SshPlace, called: str, tunnel: Any = (), way: Sequence[str] = (), **own: Any) -> Any:
        """Open a connection to a machine, through its jump hosts.

        Args:
            place: The machine.
            called: What messages call it.
            tunnel: An open connection through which it is reached; without one its ``ProxyJump`` counts.
            way: Jump hosts that are being opened.
            own: asyncssh's options for it alone.
        """
        known, opened = False, None
        try:
            config, options = self._configured(place.host, own)
            alias = options.host_key_alias
            # `Host` lines know upper case, known_hosts does not: ssh looks a name up in lower case.
            name = alias or options.host.lower()
            files = self._known_hosts(options, name)
            port = None if options.port == PORT else options.port
            holding = [file for file, lines in files.items() if any(self._keys(lines).match(name, "", port)[:2])]
            known = bool(holding)
            # As in ssh: an alias stands without a port.
            known_as = alias or known_name(name, options.port)
            place = dataclasses.replace(place, known_as=known_as, known_hosts=next(iter([*holding, *files]), ""))
            if not tunnel and isinstance(options.tunnel, str):
                tunnel = await self._through(options.tunnel, way)
            opened = await self._asyncssh.connect(
                place.host,
                config=config,
                tunnel=tunnel,
                host_key_alias=alias if name == options.host else name,
                known_hosts=self._keys([line for lines in files.values() for line in lines]),
                **({} if "client_keys" in own else _client_keys(options)),
                connect_timeout=CONNECT_SECONDS,
                login_timeout=CONNECT_SECONDS,
                keepalive_interval=KEEPALIVE_SECONDS,
                keepalive_count_max=KEEPALIVE_MISSES,
                **own,
            )
            if tunnel:
                opened.set_tunnel(tunnel)
            return opened
        except (OSError, ValueError, self._asyncssh.Error, self._asyncssh.PasswordChangeRequired) as error:
            raise unreachable(error, called, place, known=known) from error
        finally:
            if tunnel and opened is None:
                tunnel.abort()

    async def _through(self, hops: str, way: Sequence[str]) -> Any:
        """Open the jump hosts of a ``ProxyJump``, each through the one before; the connection to the last one."""
        tunnel: Any = ()
        for hop in hops.split(","):
            if hop in way:
                raise ValueError(f"the jump host {hop} is reached through itself")
            user, host, port = address_parts(hop if "://" in hop else f"ssh://{hop}")
            own = {**({} if port is None else {"port": port}), **({} if user is None else {"username": user})}
            called = f"the jump host {hop} of {self.uri}"
            tunnel = await self._open(SshPlace(host, port, user), called, tunnel, (*way, hop), **own)
        return tunnel

    def _configured(self, host: str, own: Mapping[str, Any]) -> tuple[list[str], Any]:
        """The files of the configuration that count for a host, and what they say."""
        # Keys are read when it is opened.
        read = partial(self._asyncssh.SSHClientConnectionOptions, **{**own, "host": host, "client_keys": None})
        user, system = (_readable([str(Path(file).expanduser())]) for file in (USER_CONFIG, SYSTEM_CONFIG))
        options = read(config=user)
        # asyncssh expands these after each file again, also what stood as %% in the one before.
        if not system or any("%" in str(options.config.get(option, "")) for option in EXPANDED):
            return user, options
        try:
            return [*user, *system], read(config=[*user, *system])
        # Also one that is not UTF-8.
        except ValueError as error:
            _log.warning("%s is left out, which asyncssh cannot read: %s", SYSTEM_CONFIG, error)
            return user, options

    def _known_hosts(self, options: Any, name: str) -> dict[str, list[str]]:
        """The lines of the files of known hosts that can be read; as in ssh, one that is damaged is passed over."""
        user_s, system_s = (options.config.get(option, files) for option, files in KNOWN_HOSTS.items())
        # `UserKnownHostsFile none` is an empty list.
        paths = [_expanded(str(file), options, name) for file in (*(user_s or [os.devnull]), *system_s)]
        found: dict[str, list[str]] = {}
        for path in _readable(paths):
            found[path] = []
            for number, line in enumerate(Path(path).read_text(errors="replace").splitlines(), 1):
                try:
                    self._keys([line])
                    found[path].append(line)
                except ValueError as error:
                    _log.warning("line %d of %s is left out: %s", number, path, error)
        return found

    def _keys(self, lines: Iterable[str]) -> Any:
        """Known hosts in asyncssh's form."""
        return self._asyncssh.import_known_hosts("\n".join(lines))

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


def address_parts(uri: str) -> tuple[str | None, str, int | None]:
    """User, host and port of ``ssh://user@host[:port]``; the host as it was written: `Host` lines know upper case.

    Raises:
        ValueError: If it has no host, a port that is no number, or more.
    """
    parts = urlsplit(uri)
    _, _, place = parts.netloc.rpartition("@")
    host = place[1:].partition("]")[0] if place.startswith("[") else place.partition(":")[0]
    if not host or parts.path not in ("", "/") or parts.fragment:
        raise ValueError(f"no ssh://user@host[:port]: {uri}")
    return parts.username, host, parts.port


def _readable(files: Iterable[str]) -> list[str]:
    return [file for file in files if os.access(file, os.R_OK)]


def _client_keys(options: Any) -> dict[str, Any]:
    """asyncssh's options for the keys that the configuration names, but for those that cannot be read, as in ssh."""
    files = [str(Path(file).expanduser()) for file in options.config.get("IdentityFile", ())]
    if not files:
        return {}
    only = options.config.get("IdentitiesOnly")
    # Of these alone the agent is asked, by their public halves.
    keys = _readable([*files, *(f"{file}.pub" for file in files)] if only else files)
    # An empty list means the usual ones, and all of the agent's.
    return {"client_keys": keys or (None if only else []), "ignore_encrypted": True}


def _expanded(file: str, options: Any, name: str) -> str:
    """A known hosts file's path, with its variables and tokens as ssh_config(5) has them, but for %C and %j."""
    local = socket.gethostname()
    tokens = {"h": options.host, "k": name, "n": options.orig_host, "p": str(options.port), "r": options.username}
    tokens |= {"d": str(Path.home()), "u": getpass.getuser(), "i": str(os.getuid()), "%": "%"}
    tokens |= {"l": local, "L": local.partition(".")[0]}
    path = os.path.expandvars(Path(file).expanduser())
    return re.sub("%(.)", lambda found: tokens.get(found[1], found[0]), path)


def wrapped(argv: Sequence[str], marker: str) -> str:
    """The line for the login shell: it prints the marker, then becomes the program.

    The command is one quoted word without backslashes before quotes, newlines or exclamation marks, which fish and
    csh read otherwise than a POSIX shell; `printf` there turns its octal numbers into characters.
    """
    plain = re.compile(rb"[A-Za-z0-9 _/.,:=+@%-]")
    command = shlex.join(argv).encode()
    octal = "".join(chr(byte) if plain.match(bytes([byte])) else f"\\0{byte:03o}" for byte in command)
    script = f'printf "%s\\n" {marker}; eval "exec $(printf %b "$1")"'
    return f"exec sh -c '{script}' sh '{octal}'"


def lost(error: Exception, uri: str) -> DeviceError:
    """The error for an open connection that failed."""
    return ConnectionLostError(
        f"the connection to {uri} was lost",
        received=str(error) or type(error).__name__,
        remedy="check the board's power and network; what was measured before is kept",
    )


@dataclass(frozen=True, slots=True)
class SshPlace:
    """A machine in the words of OpenSSH's programs.

    Attributes:
        host: As it was written in the address.
        port, user: Of the address, or None.
        known_as: Its name in known_hosts.
        known_hosts: The file that has its keys; empty: the usual one; /dev/null: none is kept.
    """

    host: str
    port: int | None = None
    user: str | None = None
    known_as: str = ""
    known_hosts: str = ""

    @property
    def ssh(self) -> str:
        """The command that logs in there."""
        return self._command("ssh", "-p")

    @property
    def ssh_copy_id(self) -> str:
        """The command that copies a key there."""
        return self._command("ssh-copy-id", "-p")

    @property
    def forget(self) -> str:
        """The command that removes its keys from known_hosts."""
        file = (
            [] if self.known_hosts in ("", str(Path("~/.ssh/known_hosts").expanduser())) else ["-f", self.known_hosts]
        )
        return shlex.join(["ssh-keygen", *file, "-R", self.known_as or known_name(self.host, self.port or PORT)])

    def _command(self, program: str, port_option: str) -> str:
        port = [] if self.port is None else [port_option, str(self.port)]
        return shlex.join([program, *port, self.host if self.user is None else f"{self.user}@{self.host}"])


def known_name(host: str, port: int) -> str:
    """A host as known_hosts writes it."""
    return host if port == PORT else f"[{host}]:{port}"


_UNREACHABLE: Mapping[str, tuple[str, str]] = {
    "HostKeyChanged": (
        "the host key of {uri} has changed",
        "if the board was installed anew, {forget}, then {ssh} once; otherwise another machine answers at its address",
    ),
    "HostKeyNotVerifiable": (
        "the host key of {uri} must be known",
        "connect with ssh once ({ssh}), compare the fingerprint and accept it",
    ),
    "NoKeyIsKept": (
        "the host key of {uri} must be known",
        "~/.ssh/config keeps none (UserKnownHostsFile none or /dev/null): remove that line for it, then connect with "
        "ssh once ({ssh}), compare the fingerprint and accept it",
    ),
    "KeyExchangeFailed": (
        "{uri} and this machine must have algorithms in common",
        "update the ssh server there, or allow its algorithms in ~/.ssh/config (KexAlgorithms, Ciphers, MACs, "
        "HostKeyAlgorithms): {ssh} -v shows both sides'",
    ),
    "ConnectionLost": (
        "{uri} must not close the connection before the login",
        "wait if it restarts; if known_hosts has a key of other type than it has now, {forget}, then {ssh} once",
    ),
    "PermissionDenied": (
        "{uri} must accept a key of this user",
        "copy one with {ssh_copy_id}; load an encrypted key into ssh-agent with ssh-add; or add ?key=/path to the "
        "address; check the user name",
    ),
    "KeyImportError": (
        "the private key for {uri} must be readable",
        "load an encrypted key with ssh-add, or give another with ?key=/path",
    ),
    "ConfigParseError": (
        "asyncssh must be able to read the SSH configuration for {uri}",
        "mend that line; where ssh takes it: asyncssh knows no comment behind a value, and no Match canonical, "
        "localnetwork or other rare condition",
    ),
    "gaierror": ("the host name of {uri} must be known", "check its spelling, or give its IP address"),
    "TimeoutError": (
        f"{{uri}} must answer within {CONNECT_SECONDS} s",
        "check that the board is on, its address, and that no firewall drops the port",
    ),
    "ConnectionRefusedError": ("an ssh server must listen at {uri}", "start it there (sshd), and check the port"),
    "EHOSTUNREACH": ("there must be a route to {uri}", "check the network, and that the board is on"),
    "FileNotFoundError": ("the files that {uri} needs must be readable", "check ?key=/path and ~/.ssh"),
    "Exception": ("the connection to {uri} cannot be opened", "try: {ssh} -v"),
}
"""Rule and remedy of what asyncssh, the operating system and the event loop raise when a connection is opened.

Keys are names of errors and of their bases.
"""

_SAME = {
    "KeyEncryptionError": "KeyImportError",
    "ConnectionResetError": "ConnectionLost",
    "BrokenPipeError": "ConnectionLost",
    "PermissionError": "FileNotFoundError",
    "ENETUNREACH": "EHOSTUNREACH",
    "EHOSTDOWN": "EHOSTUNREACH",
}


def unreachable(error: Exception, uri: str, place: SshPlace, *, known: bool) -> DeviceError:
    """The error for a connection that could not be opened.

    Args:
        error: What asyncssh, the operating system or the event loop raised.
        uri: The address.
        place: The machine, for commands to type.
        known: Whether known_hosts has a key of this host.
    """
    name = type(error).__name__
    text = str(error) or ("no answer" if isinstance(error, TimeoutError) else name)
    names = [each.__name__ for each in type(error).__mro__]
    if known and (name == "HostKeyNotVerifiable" or (name == "KeyExchangeFailed" and "host key" in text)):
        names.insert(0, "HostKeyChanged")
    elif name == "HostKeyNotVerifiable" and place.known_hosts == os.devnull:
        names.insert(0, "NoKeyIsKept")
    number = error.errno if isinstance(error, OSError) else None
    if number is not None and not isinstance(error, socket.gaierror):
        names.insert(0, errno.errorcode.get(number, ""))
    row = next(row for row in (_UNREACHABLE.get(_SAME.get(each, each)) for each in names) if row is not None)
    words = {
        "uri": uri,
        "host": place.host,
        "ssh": place.ssh,
        "ssh_copy_id": place.ssh_copy_id,
        "forget": place.forget,
    }
    return DeviceError(row[0].format(**words), received=text, remedy=row[1].format(**words))


async def _feed(stdin: Any, data: bytes | None) -> None:
    """Write a command's whole input and end it; without data leave it open."""
    if data is None:
        return
    # A command that ends before it read all says why on standard error.
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        stdin.write(data)
        await stdin.drain()
        stdin.write_eof()
