"""A run is named by what it is, whoever made it, unless somebody named it."""

from __future__ import annotations

import mlflow
import pytest

from foxnas_mlflow.tracking.run import entry_run


@pytest.mark.parametrize(
    ("given", "expected"),
    [(None, "search rpi4"), ("mine", "mine"), ("my-run-2026", "my-run-2026"), ("big-model-3", "big-model-3")],
)
def test_a_run_that_mlflow_run_made_is_named_too(
    tracking: str, monkeypatch: pytest.MonkeyPatch, given: str | None, expected: str
) -> None:
    client = mlflow.MlflowClient()
    made = client.create_run("0", run_name=given)
    assert given is not None or made.info.run_name != expected
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    with entry_run(stage="search", params={}, target="rpi4") as run:
        assert run.run_id == made.info.run_id
    assert client.get_run(made.info.run_id).info.run_name == expected
