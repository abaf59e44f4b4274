"""Processors that this process really has: its affinity, within the quota of its container; and their name."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUPS = Path("/proc/self/cgroup")


def n_processors() -> int:
    """Processors that this process may use, at least 1.

    A container with a quota of half a processor on a machine of 64 has one: as many processes or threads as the
    machine has would wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = quota_processors()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def quota_processors() -> float | None:
    """Processors' worth of time that the control groups leave this process, or None without a quota."""
    quotas = []
    for directory in _groups():
        words = _words(directory / "cpu.max") or [
            *_words(directory / "cpu.cfs_quota_us"),
            *_words(directory / "cpu.cfs_period_us"),
        ]
        # "max" and -1 are no quota.
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[0]) and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def processor_name() -> str:
    """The processor's name where the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":") for line in lines]
    names = [value.strip() for key, _, value in named if key.strip() in ("model name", "Model")]
    return names[0] if names else platform.processor() or platform.machine()


def _groups() -> Iterator[Path]:
    """Directories of the control groups of this process, innermost first, of version 2 and of `cpu` of 1."""
    try:
        lines = OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0":
            roots = [CGROUPS]
        elif "cpu" in names.split(","):
            roots = [CGROUPS / names, CGROUPS / "cpu"]
        else:
            continue
        # In a container the path may be that of the host, of which only the root is seen.
        inside = Path(path.lstrip("/"))
        for root in roots:
            yield from (root / part for part in (inside, *inside.parents))


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []
