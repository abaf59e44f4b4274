"""Measurements that take a moment, and are taken as a busy machine gives them.

For tests that do not ask how good figures are: a measurement has 20 runs, and is made once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from foxnas_mlflow.devices import _benchmark, _measure

SHORT: dict[str, Any] = {"runs": 20, "warmup": 1, "min_seconds": 0.05, "max_seconds": 0.1, "attempts": 1}

SITECUSTOMIZE = f"""
import sys

if any(word in " ".join(sys.orig_argv) for word in ("foxnas_mlflow", "ipykernel", "forkserver", "/ray/")):
    from foxnas_mlflow import devices
    from foxnas_mlflow.devices import _benchmark, _measure
    from foxnas_mlflow.workflows import device

    device.REPEATED = 0
    _benchmark.MAX_HALVES_DIFFERENCE, _benchmark.MIN_CPU_SHARE = float("inf"), 0.0
    devices.measure = lambda *arguments, **values: _measure.measure(*arguments, **{{**values, **{SHORT}}})
"""
"""A module that shortens the measurements of commands that are started with it on their module path."""


def shorten_started(patch: pytest.MonkeyPatch, directory: Path) -> None:
    """Shorten the measurements of commands that are started.

    Args:
        patch: Puts the environment back.
        directory: Where to write what they import.
    """
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE)
    patch.setenv("PYTHONPATH", str(directory), prepend=os.pathsep)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Shorten the measurements of commands in this process."""

    def measure(*arguments: Any, **values: Any) -> _benchmark.Benchmark:
        return _measure.measure(*arguments, **{**values, **SHORT})

    patch.setattr("foxnas_mlflow.devices.measure", measure)
    # Beside other tests a calibration is seldom sure, and would go on.
    patch.setattr("foxnas_mlflow.workflows.device.REPEATED", 0)
    patch.setattr(_benchmark, "MAX_HALVES_DIFFERENCE", float("inf"))
    patch.setattr(_benchmark, "MIN_CPU_SHARE", 0.0)
