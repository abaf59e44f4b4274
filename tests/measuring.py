"""Measurements that take a moment, or none, for tests that do not ask how good figures are.

`shorten`: each is of 20 runs, is made once, and counts although other tests disturb it. `make_up`: nothing runs; the
latency is a matter of the file's size, so that what is chosen by it is the same however busy the machine is.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.devices import Connection, _benchmark, _measure

SHORT: dict[str, Any] = {"runs": 20, "warmup": 1, "min_seconds": 0.05, "max_seconds": 0.1, "attempts": 1}

ROOT = Path(__file__).resolve().parents[1]

SITECUSTOMIZE = """
import sys

if any(word in " ".join(sys.orig_argv) for word in ("foxnas_mlflow", "ipykernel", "forkserver", "/ray/")):
    sys.path.insert(0, {root!r})
    import pytest
    from tests import measuring

    measuring.{change}(pytest.MonkeyPatch())
"""
"""A module that changes the measurements of commands that are started with it on their module path."""


def started(patch: pytest.MonkeyPatch, directory: Path, change: Callable[[pytest.MonkeyPatch], None]) -> None:
    """Change the measurements of commands that are started.

    Args:
        patch: Puts the environment back.
        directory: Where to write what they import.
        change: `shorten` or `make_up`.
    """
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(SITECUSTOMIZE.format(root=str(ROOT), change=change.__name__))
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


def make_up(patch: pytest.MonkeyPatch) -> None:
    """Make up the measurements of commands in this process, as of hardware; what is answered there is not compared."""
    from foxnas_mlflow.testing import FakeBoard

    def measure(
        connection: Connection, model: str | Path | bytes, *, expected: _measure.Outputs | None = None, **values: Any
    ) -> _benchmark.Benchmark:
        # One a measurement: the runs of a file are the same in every process.
        with FakeBoard(lambda content: len(content) / 1e5) as board:
            made = _measure.measure(board, model, **values)
        return dataclasses.replace(
            made,
            connection=connection.uri,
            device="a made-up board",
            emulated=False,
            output_difference=None if expected is None else 0.0,
        )

    patch.setattr("foxnas_mlflow.devices.measure", measure)
    patch.setattr("foxnas_mlflow.devices.host_answer", lambda model: [np.zeros(1)])
    patch.setattr("foxnas_mlflow.workflows.device.REPEATED", 0)
