"""What a connection to a machine must do: run a command, move files, go away."""

from __future__ import annotations

import contextlib
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices.board import DIRECTORY

IN_ENGLISH = ("env", "LC_ALL=C")
"""In front of a command whose complaints are read: boards speak other languages too."""


@dataclass(frozen=True, slots=True)
class Completed:
    """A command that ended.

    Attributes:
        status: Exit status; 128 + n after signal n.
        stdout: What it wrote to standard output.
        stderr: What it wrote to standard error.
    """

    status: int
    stdout: str
    stderr: str


class Connection(ABC):
    """An open connection to a machine.

    A context manager: leaving it closes the connection and removes the working directory there.

    Attributes:
        uri: What it was opened with, for tags and messages.
        python: The machine's Python.
        edgetpu: Which of several Edge TPUs there, in the words of its library (``usb:1``); empty: the first.
        reconnect_seconds: How long it is waited for when it was lost; None: the usual time.
        login_words: What the machine's login shell prints before a command's own output; empty: nothing.
    """

    uri: str
    python: str
    edgetpu: str = ""
    reconnect_seconds: float | None = None
    login_words: str = ""
    install = (
        "install it there: python3 -m venv ~/foxnas && ~/foxnas/bin/pip install {packages}, "
        "and add ?python=~/foxnas/bin/python to the address"
    )
    """How its Python gets packages. Debian's own takes none (PEP 668); a virtual environment does everywhere."""
    keeps_stdin = True
    """Whether a command's standard input ends when this side goes away, so that it can end too."""

    def __init__(self) -> None:
        self._directory: str | None = None
        self._sent: dict[str, str] = {}

    @abstractmethod
    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """Run a command to its end.

        Args:
            argv: Program and arguments; no shell interprets them.
            timeout_s: After so many seconds the command is ended.

        Raises:
            DeviceError: If it does not end in time.
            ConnectionLostError: If the machine went away.
        """

    @abstractmethod
    def put(self, data: bytes, path: str) -> None:
        """Write a file.

        Raises:
            DeviceError: If the machine refuses (a full disk, missing rights).
            ConnectionLostError: If the machine went away.
        """

    @abstractmethod
    def get(self, path: str) -> bytes:
        """Read a file.

        Raises:
            DeviceError: If the machine refuses.
            ConnectionLostError: If the machine went away.
        """

    @abstractmethod
    def _disconnect(self) -> None:
        """Close the connection itself; must not raise."""

    def _reopen(self) -> None:  # noqa: B027 - most of what cannot be lost has nothing to do
        """Open the connection itself anew."""

    def reconnect(self) -> None:
        """Open the connection anew after it was lost; the working directory will be a new one.

        Raises:
            DeviceError: If the machine cannot be reached.
        """
        self._reopen()
        self.leave_workspace()

    def leave_workspace(self) -> None:
        """Remove the working directory; the next one that is asked for is new."""
        stale, self._directory = self._directory, None
        self._sent.clear()
        if stale is not None:
            self._remove(stale)

    def workspace(self, files: Mapping[str, bytes]) -> str:
        """The directory of this connection on the machine, made with `files` in it when first asked for.

        Raises:
            DeviceError: If it cannot be made or filled.
            ConnectionLostError: If the machine went away.
        """
        if self._directory is None:
            made = self.run([*IN_ENGLISH, "mktemp", "-d", "-t", f"{DIRECTORY}XXXXXXXXXX"], timeout_s=60)
            if made.status != 0:
                raise refused("making a directory", made.stderr, self.uri)
            directory = made.stdout.strip()
            try:
                for name, data in files.items():
                    self.put(data, f"{directory}/{name}")
            except BaseException:
                self._remove(directory)
                raise
            self._directory = directory
        return self._directory

    def send(self, data: bytes, name: str) -> str:
        """Write a file of the working directory, unless it is what was sent there last.

        Returns:
            Its path.

        Raises:
            DeviceError: If the machine refuses.
            ConnectionLostError: If the machine went away.
        """
        path, digest = f"{self.workspace({})}/{name}", hashlib.sha256(data).hexdigest()
        if self._sent.pop(name, None) != digest:
            self.put(data, path)
        self._sent[name] = digest
        return path

    def close(self) -> None:
        """Remove the working directory and close the connection; a machine that is gone is no error."""
        self.leave_workspace()
        self._disconnect()

    def _remove(self, directory: str) -> None:
        with contextlib.suppress(DeviceError):
            self.run(["rm", "-rf", directory], timeout_s=30)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def refused(action: str, reason: str, uri: str) -> DeviceError:
    """The error for something that a machine's operating system refused."""
    # The last line: a login shell may have complained of other things before.
    reason = (reason.strip().splitlines() or ["no reason given"])[-1]
    remedy = "check rights and the path on the machine"
    if "no space" in reason.lower() or "quota" in reason.lower():
        remedy = "free some space there (df -h), or set TMPDIR for that user to a directory with space"
    elif "read-only" in reason.lower():
        remedy = "remount its file system for writing, or set TMPDIR for that user to a writable directory"
    return DeviceError(f"{action} on {uri} was refused", received=reason, remedy=remedy)


def timed_out(argv: Sequence[str], timeout_s: float, uri: str) -> DeviceError:
    """The error for a command that did not end in time."""
    argv = argv[len(IN_ENGLISH) :] if tuple(argv[: len(IN_ENGLISH)]) == IN_ENGLISH else argv
    return DeviceError(
        f"a command on {uri} must end within {timeout_s:g} s",
        received=" ".join(argv[:3]),
        remedy="look for load on the machine, and whether another program holds its accelerator",
    )
