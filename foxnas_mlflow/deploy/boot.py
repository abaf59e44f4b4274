"""Starts services on a board, and again after it restarts; travels in ``runner.pyz``.

- systemd, as root: a system unit. Otherwise a unit of the user, where lingering lets it run without a login.
- cron elsewhere, also where a user's systemd may not linger: a line that starts the service every minute unless it
  runs, so also after a crash.
- nothing of these: the service runs until the board restarts, and the deployment says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pwd
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from foxnas_mlflow.deploy.layout import DEFAULT_ROOT, RunnerError

COMMAND_SECONDS = 60.0
NO_ANSWER = 127
"""Taken for the status of a command that does not end in time."""
MAX_LOG_BYTES = 2**20
CRON_DAEMONS = ("cron", "crond", "fcron", "anacron")

UNIT = """\
[Unit]
Description=foxnas deployment {name}
After=network.target

[Service]
ExecStart={command}
Restart=always
RestartSec=2
KillMode=mixed
OOMPolicy=continue
TimeoutStopSec=30

[Install]
WantedBy={target}
"""
"""The unit: `mixed`, because the workers end when the service has answered what it accepted; `continue`, because it
replaces one that was killed for memory."""


def install(root: Path, name: str) -> str:
    """Let the service of a deployment start now and whenever the board does.

    Returns:
        By what: ``systemd``, ``systemd --user``, ``cron`` or ``nothing``.

    Raises:
        RunnerError: If the unit is refused; nothing is left of it then.
    """
    manager = _manager()
    if "--user" in manager:
        _run(["loginctl", "enable-linger", _user()])
        # Without lingering it ends with the last login.
        if not _lingers() and _cron_runs() and _edit_crontab(root, name, add=True):
            start_detached(root, name)
            return "cron"
    if manager:
        _install_unit(root, name, manager)
        return " ".join(["systemd", *manager[1:]])
    with_cron = _edit_crontab(root, name, add=True)
    start_detached(root, name)
    return "cron" if with_cron else "nothing"


def remove(root: Path, name: str) -> None:
    """Take back what `install` did; what is not there is no error."""
    manager = _manager()
    unit = unit_path(root, name)
    # A link to /dev/null is somebody's mask, which stays.
    if manager and unit.exists() and not unit.is_symlink():
        _run([*manager, "disable", "--now", unit.name])
        unit.unlink()
        _run([*manager, "daemon-reload"])
        _run([*manager, "reset-failed", unit.name])
    if shutil.which("crontab") is not None:
        _edit_crontab(root, name, add=False)


def refresh(root: Path, name: str) -> None:
    """Let the next start use this Python: the service that runs is left alone.

    Raises:
        RunnerError: If the unit cannot be written.
    """
    manager = _manager()
    unit = unit_path(root, name)
    if manager and unit.exists():
        text = _unit_text(root, name, manager)
        if unit.read_text(encoding="utf-8") != text:
            _write(unit, text)
            _run([*manager, "daemon-reload"])
    elif shutil.which("crontab") is not None:
        _edit_crontab(root, name, add=True)


def unit_path(root: Path, name: str) -> Path:
    """The unit's file; one of another root than the usual one has a name of its own."""
    usual = root == Path(DEFAULT_ROOT).expanduser()
    suffix = "" if usual else f"-{hashlib.sha256(str(root).encode()).hexdigest()[:8]}"
    file = f"foxnas-{name}{suffix}.service"
    if os.geteuid() == 0:
        return Path("/etc/systemd/system", file)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config", "systemd", "user", file)


def start_command(root: Path, name: str) -> list[str]:
    """What runs the service: the deployment's own runner, since an older version's may not know this layout."""
    own = root / name / "runner.pyz"
    runner = own if own.exists() else root / name / "current" / "runner.pyz"
    return [sys.executable, str(runner), "serve", str(root), name]


def start_detached(root: Path, name: str) -> None:
    """Run the service in a session of its own, with a log beside it."""
    log = root / name / "run" / "log"
    if log.exists() and log.stat().st_size > MAX_LOG_BYTES:
        os.replace(str(log), str(log.with_name("log.1")))
    with os.fdopen(os.open(str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o644), "ab") as output:
        subprocess.Popen(  # noqa: S603
            start_command(root, name),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            cwd=str(root),
        )


def note(kind: str, root: Path, name: str) -> str:
    """What there is to say about a start by `kind`; empty: nothing."""
    if kind == "nothing":
        command = _joined(start_command(root, name))
        return f"no systemd and no cron here: let this start it when the board starts: {command}"
    if kind == "systemd --user" and not _lingers():
        return f"it starts at a login only, and ends with it: sudo loginctl enable-linger {_user()}"
    if kind == "cron" and not _cron_runs():
        command = _joined(start_command(root, name))
        return f"no cron runs here: start it, or let this start the service when the board starts: {command}"
    return ""


def _manager() -> list[str]:
    """The command of the systemd that this user may use; empty: none."""
    if not Path("/run/systemd/system").is_dir() or shutil.which("systemctl") is None:
        return []
    if os.geteuid() == 0:
        return ["systemctl"]
    # A login through ssh does not always say where it is.
    runtime = Path(os.environ.setdefault("XDG_RUNTIME_DIR", f"/run/user/{os.geteuid()}"))
    return ["systemctl", "--user"] if (runtime / "systemd").is_dir() else []


def _install_unit(root: Path, name: str, manager: list[str]) -> None:
    unit = unit_path(root, name)
    before = unit.read_text(encoding="utf-8") if unit.exists() else None
    _write(unit, _unit_text(root, name, manager))
    for arguments in (["daemon-reload"], ["enable", unit.name], ["restart", unit.name]):
        status, said = _run([*manager, *arguments])
        if status != 0:
            _run([*manager, "disable", "--now", unit.name])
            if before is None:
                unit.unlink()
            else:
                _write(unit, before)
            _run([*manager, "daemon-reload"])
            kind = "busy" if status == NO_ANSWER else "unit"
            raise RunnerError(kind, f"systemctl {' '.join(arguments)}: {said}")


def _unit_text(root: Path, name: str, manager: list[str]) -> str:
    # In a unit a percent sign begins a specifier, and a dollar sign a variable.
    command = _joined(start_command(root, name)).replace("%", "%%").replace("$", "$$")
    return UNIT.format(
        name=name, command=command, target="default.target" if "--user" in manager else "multi-user.target"
    )


def _write(unit: Path, text: str) -> None:
    # What somebody linked elsewhere, to /dev/null to mask it, stays a link.
    fresh = unit if unit.is_symlink() else unit.with_name(f".{unit.name}.next")
    try:
        unit.parent.mkdir(parents=True, exist_ok=True)
        fresh.write_text(text, encoding="utf-8")
        if fresh != unit:
            os.replace(str(fresh), str(unit))
    except OSError as error:
        raise RunnerError("unit", f"{error.strerror}: {error.filename}") from error


def _edit_crontab(root: Path, name: str, *, add: bool) -> bool:
    """Add the line of a deployment, or take it away; whether cron took it."""
    mark = f"# foxnas {root / name}"
    table = _crontab()
    if table is None:
        return False
    # By newlines alone, as cron reads it: the other lines are the user's, and stay as they are.
    lines = table.split("\n")[:-1] if table.endswith("\n") else table.split("\n") if table else []
    kept = [line for line in lines if not line.endswith(mark)]
    if add:
        # In a crontab a percent sign is a newline.
        command = _joined(start_command(root, name)).replace("%", "\\%")
        log = shlex.quote(str(root / name / "run" / "log")).replace("%", "\\%")
        kept.append(f"* * * * * {command} >>{log} 2>&1 {mark}")
    if kept == lines:
        return True
    given = "".join(f"{line}\n" for line in kept).encode(errors="surrogateescape")
    done = _completed(["crontab", "-"], given)
    return done is not None and done.returncode == 0


def _crontab() -> str | None:
    """The user's table of cron; None if it cannot be read."""
    done = _completed(["crontab", "-l"])
    if done is None or done.returncode == 0:
        return None if done is None else done.stdout.decode(errors="surrogateescape")
    # Busybox's says that there is no such file.
    said = done.stderr.decode(errors="replace").lower()
    return "" if "no crontab" in said or "no such file" in said else None


def _cron_runs() -> bool:
    """Whether a daemon of cron runs; also where other users' processes are hidden."""
    names = set()
    for file in Path("/proc").glob("[0-9]*/comm"):
        with contextlib.suppress(OSError):
            names.add((file.parent.name == "1", file.read_text().strip()))
    return not any(first for first, _ in names) or any(name in CRON_DAEMONS for _, name in names)


def _lingers() -> bool:
    return Path("/var/lib/systemd/linger", _user()).exists()


def _user() -> str:
    return pwd.getpwuid(os.geteuid()).pw_name


def _joined(command: list[str]) -> str:
    return " ".join(shlex.quote(word) for word in command)


def _run(command: list[str]) -> tuple[int, str]:
    """Status of a command, and the last line that it said."""
    done = _completed(command)
    if done is None:
        return NO_ANSWER, f"{command[0]} does not answer"
    said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return done.returncode, said[-1] if said else f"exit status {done.returncode}"


def _completed(command: list[str], given: bytes = b"") -> subprocess.CompletedProcess[bytes] | None:
    """What a command said in English; None: it is not there, or does not end."""
    environment = {**os.environ, "LC_ALL": "C"}
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(  # noqa: S603
            command, input=given, capture_output=True, timeout=COMMAND_SECONDS, check=False, env=environment
        )
    return None
