"""Processors within affinity and quotas, on control groups that are made up."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from foxnas_mlflow.core import processors
from foxnas_mlflow.devices import board


@pytest.mark.parametrize(
    ("files", "quota", "n"),
    [
        ({}, None, 64),
        ({"cpu.max": "max 100000"}, None, 64),
        ({"cpu.max": "50000 100000"}, 0.5, 1),
        ({"cpu.max": "250000 100000"}, 2.5, 2),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None, 64),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3.0, 3),
        ({"cpu.max": "900000 100000", "cpu/cpu.cfs_quota_us": "150000", "cpu/cpu.cfs_period_us": "100000"}, 1.5, 1),
    ],
)
def test_quotas(
    files: dict[str, str], quota: float | None, n: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, read = tmp_path / "own", board._read
    own.write_text("4:cpu,cpuacct:/docker/0123\n0::/docker/0123\n")
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(text + "\n")
    monkeypatch.setattr(processors, "CGROUPS", tmp_path)
    monkeypatch.setattr(processors, "OWN_CGROUPS", own)
    monkeypatch.setattr(board, "CGROUPS", str(tmp_path))
    monkeypatch.setattr(board, "_read", lambda path: read(str(own) if path == "/proc/self/cgroup" else path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    assert processors.quota_processors() == quota
    assert processors.n_processors() == n
    # The board's script, which travels alone, says the same.
    assert (board.quota_processors(), board.n_processors()) == (quota, n)


def test_affinity_counts() -> None:
    assert 1 <= processors.n_processors() <= len(os.sched_getaffinity(0))
