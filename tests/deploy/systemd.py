"""A real systemd of one user, in a mount namespace of its own: nothing of it is left when it has ended.

No machine is booted with it: what says so (/run/systemd/system) and the directories that it reads and writes are the
namespace's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

SYSTEMD = Path("/lib/systemd/systemd")

_START = """
mount -t tmpfs tmpfs /run/systemd && mkdir /run/systemd/system
mkdir -p /run/user && mount -t tmpfs tmpfs /run/user
mkdir -m 700 "/run/user/$UID_" && chown "$UID_" "/run/user/$UID_"
mount --bind "$UNITS" /etc/systemd/system
for group in /sys/fs/cgroup/systemd /sys/fs/cgroup/unified /sys/fs/cgroup; do
  if test -f "$group/cgroup.procs"; then
    mkdir -p "$group/$GROUP" && chown -R "$UID_" "$group/$GROUP" && echo $$ > "$group/$GROUP/cgroup.procs"
  fi
done
exec setpriv --reuid "$UID_" --regid "$UID_" --clear-groups env XDG_RUNTIME_DIR="/run/user/$UID_" "$SYSTEMD" --user
"""


class UnavailableError(Exception):
    """Why there is no systemd here."""


class Manager:
    """A systemd that starts the units of a directory, as the system's does of /etc/systemd/system, or of a user.

    Root's takes the place of the system's: a ``systemctl`` without options, first on the path, speaks with it.

    Args:
        directory: For its home, its units and its log; the account can enter it.
        uid: The account.
    """

    def __init__(self, directory: Path, uid: int) -> None:
        self.uid = uid
        self.home, self.units, tools = (directory / name for name in ("home", "units", "tools"))
        self._log = directory / "log"
        for path in (self.home, self.units, tools):
            path.mkdir()
        os.chown(self.home, uid, uid)
        # What a system starts when it boots is what a user's systemd starts first.
        (self.units / "multi-user.target").write_text("[Unit]\nDescription=boot\n")
        (self.units / "default.target").symlink_to("multi-user.target")
        self._environment = {**os.environ, "HOME": str(self.home)}
        self._environment.pop("XDG_RUNTIME_DIR", None)
        self._environment.pop("XDG_CONFIG_HOME", None)
        # Whatever this machine has: who is not in cron.allow is refused.
        scripts = {"crontab": "exit 1"}
        if uid == 0:
            scripts["systemctl"] = f'XDG_RUNTIME_DIR=/run/user/0 exec {shutil.which("systemctl")} --user "$@"'
        for name, script in scripts.items():
            (tools / name).write_text(f"#!/bin/sh\n{script}\n")
            (tools / name).chmod(0o755)
        self.path(tools)
        if uid == 0:
            self._environment["SYSTEMD_UNIT_PATH"] = "/etc/systemd/system:"
        self._process: subprocess.Popen[bytes] | None = None

    def path(self, tools: Path) -> None:
        """Let what is run there find other programs first."""
        self._environment["PATH"] = f"{tools}:{self._environment['PATH']}"

    def start(self) -> None:
        """As the board boots."""
        group = f"foxnas-test-{os.getpid()}"
        given = {"UID_": str(self.uid), "UNITS": str(self.units), "GROUP": group, "SYSTEMD": str(SYSTEMD)}
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                ["unshare", "--mount", "sh", "-euc", _START],
                env=self._environment | given,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
            )
        deadline = time.monotonic() + 120
        while self.systemctl("is-system-running").stdout.strip() not in ("running", "degraded"):
            ended = self._process.poll() is not None
            if ended or time.monotonic() > deadline:
                said = self._log.read_text(errors="replace").strip().splitlines()[-1:]
                self.stop()
                # One that goes on and does not answer is no reason to skip.
                raise (UnavailableError if ended else TimeoutError)(f"systemd does not start here: {' '.join(said)}")
            time.sleep(0.05)

    def stop(self) -> None:
        """As the board is switched off, its services told."""
        if self._process is None:
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.systemctl("exit")
            self._process.wait(60)
        self._process.kill()
        self._process.wait()
        self._process = None
        for group in Path("/sys/fs/cgroup").glob(f"**/foxnas-test-{os.getpid()}"):
            for path in sorted(group.glob("**/"), reverse=True):
                with contextlib.suppress(OSError):
                    path.rmdir()

    def inside(self, command: Sequence[str]) -> list[str]:
        """The command that runs another one where this systemd is, as its account."""
        assert self._process is not None
        account = ["setpriv", "--reuid", str(self.uid), "--regid", str(self.uid), "--clear-groups"]
        names = ("HOME", "PATH", "SYSTEMD_UNIT_PATH")
        kept = [f"{name}={self._environment[name]}" for name in names if name in self._environment]
        enter = ["nsenter", "--mount", "--target", str(self._process.pid), f"--wd={self.home}"]
        return [*enter, *account, "env", "-u", "XDG_RUNTIME_DIR", *kept, *command]

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a command there to its end."""
        return subprocess.run(self.inside(command), capture_output=True, text=True, check=False, timeout=120)

    def systemctl(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Ask this systemd."""
        return self._with_runtime("systemctl", *([] if self.uid == 0 else ["--user"]), *arguments)

    def verify(self, unit: str) -> str:
        """What systemd-analyze finds wrong with a unit; empty: nothing."""
        done = self._with_runtime("systemd-analyze", "--user", "verify", unit)
        return done.stderr or ("" if done.returncode == 0 else f"exit status {done.returncode}")

    def _with_runtime(self, *command: str) -> subprocess.CompletedProcess[str]:
        return self.run("env", f"XDG_RUNTIME_DIR=/run/user/{self.uid}", *command)
