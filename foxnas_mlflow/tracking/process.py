"""Which process a run belongs to, so that a run left behind by a killed one is recognised."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
from pathlib import Path

PROCESS_TAG = "foxnas.process"
"""Tag of a run: host, process id and when the process began."""


def process_identity() -> str:
    """Host, process id and start of this process, in a text that no later process has."""
    pid = os.getpid()
    return f"{_host()} {pid} {_start(pid)}"


def is_here(identity: str) -> bool:
    """Whether a process is, or was, one of this host, as this process sees it."""
    # Releases before told the name alone.
    return identity.rsplit(" ", 2)[0] in (_host(), platform.node())


@functools.cache
def _host() -> str:
    """This host's name, and what tells it from others of that name: the machine, and the processes that are seen.

    A container may have its host's name, where its processes have other ids.
    """
    facts = ""
    with contextlib.suppress(OSError):
        facts += os.readlink("/proc/self/ns/pid")
    with contextlib.suppress(OSError):
        facts += Path("/etc/machine-id").read_text(encoding="utf-8")
    return f"{platform.node()} {hashlib.sha256(facts.encode()).hexdigest()[:12]}"


def is_dead(identity: str) -> bool | None:
    """Whether a process has ended; None where nothing here tells: of another host, or hidden."""
    if not is_here(identity):
        return None
    _, pid, start = identity.rsplit(" ", 2)
    now = _start(int(pid))
    return None if now == "?" else now != start


def _start(pid: int) -> str:
    """When a process began: clock ticks since boot on Linux; empty when there is none, ``?`` where nothing tells.

    Other accounts' processes may be hidden in ``/proc`` (its option hidepid), and elsewhere there is no ``/proc``.
    """
    try:
        # The name, in brackets, may hold spaces; the start is the 22nd field.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, PermissionError, ProcessLookupError):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "?"
    # A zombie has ended; only its parent has not looked yet.
    return "" if fields[0] in ("Z", "X") else fields[19]
