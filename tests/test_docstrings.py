"""The examples in the docstrings of the public face run, and give what they show."""

from __future__ import annotations

import doctest
import inspect
from pathlib import Path
from typing import Any

import pytest

import foxnas_mlflow
from foxnas_mlflow.testing import FakeBoard

PUBLIC = {name: getattr(foxnas_mlflow, name) for name in foxnas_mlflow.__all__ if name != "__version__"}

# What a step is asked and what it answers, explained at the step; errors are shown by the first of them.
EXPLAINED = tuple(
    name for name in PUBLIC if name.endswith(("Request", "Result", "StepResult")) and name != "FitResult"
) + tuple(name for name in PUBLIC if name.endswith("Error") and name != "FoxNasError")

# They need images, a board or a registered model: the README, the notebooks and their own tests run them.
NEED_MORE = {f"run_{step}" for step in ("benchmark", "compare", "device", "doctor", "estimate", "finetune", "fit")} | {
    f"run_{step}" for step in ("lineage", "main", "promote", "quantize", "sample", "sign", "supernet", "watch")
}


def examples() -> list[Any]:
    finder = doctest.DocTestFinder(recurse=False)
    found = [finder.find(thing, name) for name, thing in (PUBLIC | {"FakeBoard": FakeBoard}).items()]
    return [test for tests in found for test in tests if test.examples]


def test_every_public_name_has_an_example_or_a_reason_to_have_none() -> None:
    shown = {test.name for test in examples()} - {"FakeBoard"}
    assert set(PUBLIC) - shown == {*EXPLAINED, *NEED_MORE}
    assert all(inspect.getdoc(thing) for thing in PUBLIC.values())


@pytest.mark.usefixtures("tracking")
def test_examples_give_what_they_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in examples():
        runner.run(test)
    assert runner.summarize(verbose=False).failed == 0
