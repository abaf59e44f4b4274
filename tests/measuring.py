"""Commands whose measurements take a moment, and are taken as a busy machine gives them.

    python -m tests.measuring search ...    # as `foxnas search ...`

For tests that do not ask how good figures are: a measurement has 20 runs, and is made once.
"""

from __future__ import annotations

import sys
from typing import Any

import pytest

from foxnas_mlflow.devices import _benchmark, _measure

SHORT: dict[str, Any] = {"runs": 20, "warmup": 1, "min_seconds": 0.05, "max_seconds": 0.1, "attempts": 1}


def count_disturbed(patch: pytest.MonkeyPatch) -> None:
    """Let measurements count that something disturbs, in this process."""
    patch.setattr(_benchmark, "MAX_HALVES_DIFFERENCE", float("inf"))
    patch.setattr(_benchmark, "MIN_CPU_SHARE", 0.0)


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Shorten the measurements of commands in this process."""

    def measure(*arguments: Any, **values: Any) -> _benchmark.Benchmark:
        return _measure.measure(*arguments, **{**values, **SHORT})

    patch.setattr("foxnas_mlflow.devices.measure", measure)
    count_disturbed(patch)


if __name__ == "__main__":
    from foxnas_mlflow.cli.main import main

    with pytest.MonkeyPatch.context() as patched:
        shorten(patched)
        sys.exit(main(sys.argv[1:]))
