"""Where a deployment keeps what on a board; travels in ``runner.pyz``.

ROOT/.lock                           held while something changes
ROOT/NAME/.incoming-BOOT-SECONDS-*   a copy that is under way, or that was interrupted
ROOT/NAME/versions/N/                model.tflite, runner.pyz, smoke.npz, deployment.json, state.json
ROOT/NAME/current -> versions/N      the active version; replaced in one step, or not at all
ROOT/NAME/runner.pyz                 what serves it, of the release that deployed last; none: current/runner.pyz does
ROOT/NAME/service.json               how it is served; none: it is not
ROOT/NAME/run/                       lock and log of the service, and links to its sockets
ROOT/NAME/run/own/                   what the account that serves may write: http.sock, control.sock, failed.json
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pwd
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STALE_SECONDS = 3600.0
"""A copy that began so long ago was interrupted: the limits of its steps add up to less."""

DEFAULT_ROOT = "~/.foxnas/deployments"

DEFAULT_SETTINGS = {"host": "127.0.0.1", "port": 0, "workers": 1, "account": ""}

SCARCE = (errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Of a machine that has no memory, process or descriptor left at the moment."""


class RunnerError(Exception):
    """Something that a deployment needs and that is not so."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def kind_of(error: BaseException) -> str:
    """What an error is called, see `RunnerError`."""
    if isinstance(error, RunnerError):
        return error.kind
    # The second one where no thread can be started.
    if isinstance(error, (MemoryError, RuntimeError)):
        return "busy"
    if isinstance(error, OSError):
        return "busy" if error.errno in SCARCE else "system"
    return "service"


def log(words: object) -> None:
    """Write a line to the log; where its disk is full, or it is gone, nothing is lost but the line."""
    with contextlib.suppress(OSError, ValueError):
        print(words, file=sys.stderr, flush=True)


def current(root: Path, name: str) -> Path:
    """Directory of the active version."""
    pointer = root / name / "current"
    if not pointer.exists():
        raise RunnerError("no_deployment", name)
    return pointer.resolve()


def point_to(root: Path, name: str, version: Path) -> None:
    """Replace the pointer to the active version: readers see the old or the new one."""
    pointer = root / name / ".next"
    with contextlib.suppress(FileNotFoundError):
        pointer.unlink()
    pointer.symlink_to(Path("versions", version.name))
    os.replace(str(pointer), str(root / name / "current"))
    os.sync()


def entry_of(account: str) -> pwd.struct_passwd:
    """An account's entry.

    Raises:
        RunnerError: If there is no such account.
    """
    try:
        return pwd.getpwnam(account)
    except KeyError:
        raise RunnerError("account", f"{account}: there is none of that name") from None


def make_run(root: Path, name: str, account: str) -> Path:
    """Make the directories of a service; the one that its account may write. Empty: the account that makes them.

    The account is not trusted where root deploys: a link that it could put in place of the lock or the log would lead
    root astray.
    """
    run, uid, gid = root / name / "run", os.geteuid(), os.getegid()
    if account:
        entry = entry_of(account)
        uid, gid = entry.pw_uid, entry.pw_gid
    run.mkdir(exist_ok=True)
    if run.stat().st_uid != os.geteuid():
        # Of an earlier release, where the account had all of it. Its service may run: the sockets stay.
        os.chown(str(run), os.geteuid(), os.getegid())
        for path in run.iterdir():
            status = path.lstat()
            if status.st_uid != os.geteuid() and not stat.S_ISSOCK(status.st_mode):
                shutil.rmtree(str(path)) if stat.S_ISDIR(status.st_mode) else path.unlink()
    own = run / "own"
    own.mkdir(exist_ok=True)
    if own.stat().st_uid != uid:
        os.chown(str(own), uid, gid)
    for directory in (run, own):
        let_in(directory)
    return own


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time change what is deployed."""
    descriptor = os.open(str(root / ".lock"), os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_incoming(place: Path) -> str:
    """A directory for a copy, named after the moment that it is made."""
    boot, seconds = moment()
    return tempfile.mkdtemp(prefix=f".incoming-{boot}-{seconds:.0f}-", dir=str(place))


def remove_stale(root: Path) -> None:
    """Remove what interrupted copies and deletions left.

    Age is counted since the machine started, in a clock that nobody sets: a board without a battery begins in
    the past, and jumps when it finds the time. What another start of the machine left was interrupted by it.
    """
    boot, seconds = moment()
    for path in root.glob("*/.incoming-*"):
        began = path.name.split("-")[1:3]
        if not (len(began) == 2 and began[0] == boot and seconds - float(began[1]) <= STALE_SECONDS):
            shutil.rmtree(str(path), ignore_errors=True)
    for path in root.glob(".deleted-*"):
        shutil.rmtree(str(path), ignore_errors=True)


def moment() -> tuple[str, float]:
    """Which start of the machine this is, and the seconds since then."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip().replace("-", "")
        return boot, time.clock_gettime(time.CLOCK_BOOTTIME)
    except (OSError, AttributeError):
        return "unknown", time.monotonic()


def let_in(directory: Path) -> None:
    """Let other accounts enter and list a directory; one that they may is left alone, it may be another account's."""
    mode = directory.stat().st_mode
    if mode & 0o055 != 0o055:
        directory.chmod(mode | 0o055)


def open_to_read(directory: Path) -> None:
    """Let other accounts read a version: the service may run as one of them."""
    for path in (*directory.iterdir(), directory):
        path.chmod(0o755 if path.is_dir() else 0o644)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; empty if there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def check_files(version: Path, *, tried: bool = True) -> dict[str, Any]:
    """The description of a version, whose files are compared with it.

    Args:
        version: Its directory.
        tried: Whether its answers are compared too; the images for that do not matter otherwise.

    Raises:
        RunnerError: If one is not as it was sent.
    """
    deployment = read_json(version / "deployment.json")
    for file, expected in deployment["files"].items():
        if (tried or file != "smoke.npz") and digest(version / file) != expected:
            raise RunnerError("damaged", f"{file} is damaged or was changed")
    return deployment


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        RunnerError: If it is none.
    """
    try:
        value: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunnerError("damaged", f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise RunnerError("damaged", f"{path}: it must be an object")
    return value


def read_settings(root: Path, name: str) -> dict[str, Any]:
    """How a deployment is served, with everything that `DEFAULT_SETTINGS` has.

    Raises:
        RunnerError: If its file is damaged.
        FileNotFoundError: If it is not served.
    """
    file = root / name / "service.json"
    try:
        settings = read_json(file)
    except RunnerError as error:
        raise RunnerError("settings", str(error)) from error
    missing = [key for key in DEFAULT_SETTINGS if key not in settings]
    if missing:
        raise RunnerError("settings", f"{file} without {', '.join(missing)}")
    return settings


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object in one step."""
    fresh = path.with_name(f".{path.name}.next")
    with contextlib.suppress(FileNotFoundError):
        fresh.unlink()
    with fresh.open("x", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=1) + "\n")
        os.fchmod(file.fileno(), 0o644)
        file.flush()
        # A board that loses its power now must find a whole one.
        os.fsync(file.fileno())
    os.replace(str(fresh), str(path))
