"""Messages: the rule, the received value, the remedy, on one line."""

from __future__ import annotations

import pickle

import pytest

from foxnas_mlflow.core.errors import (
    FoxNasError,
    InfeasibleConstraintError,
    InfeasibleLimitsError,
    InvalidInputError,
    MissingDependencyError,
    import_or_raise,
)


def test_a_message_is_one_line_of_rule_value_and_remedy() -> None:
    assert str(FoxNasError("x must be 1.")) == "x must be 1."
    assert str(FoxNasError("x must be 1", received=2, remedy="give 1.")) == "x must be 1; received 2; give 1."
    text = str(FoxNasError("x must be short", received="a\nb " + "c" * 500))
    assert "\n" not in text
    assert len(text) < 250
    assert text.endswith("....")


def test_infeasible_keeps_both_latencies() -> None:
    error = InfeasibleConstraintError(5.0, 21.5)
    assert (error.latency_ms, error.smallest_latency_ms) == (5.0, 21.5)
    assert "latency_ms=5" in str(error)
    assert "21.5 ms" in str(error)


@pytest.mark.parametrize(
    "error",
    [
        InvalidInputError("x must be 1", received=2, remedy="give 1"),
        InfeasibleConstraintError(5.0, 21.5),
        InfeasibleLimitsError(["macs <= 1"], smallest={"macs": 3.0}),
    ],
)
def test_errors_reach_who_asked_a_worker_as_they_were(error: FoxNasError) -> None:
    read = pickle.loads(pickle.dumps(error))
    assert (type(read), str(read), read.__dict__.keys()) == (type(error), str(error), error.__dict__.keys())


def test_a_missing_package_names_its_extra() -> None:
    with pytest.raises(MissingDependencyError, match=r"foxnas-mlflow\[train\]"):
        import_or_raise("foxnas_no_such_package.sub", extra="train", feature="training")


def test_an_error_inside_an_installed_package_is_not_hidden(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "foxnas_broken_package.py").write_text("import foxnas_no_such_dependency\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ModuleNotFoundError, match="foxnas_no_such_dependency"):
        import_or_raise("foxnas_broken_package", extra="train", feature="training")
