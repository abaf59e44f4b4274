"""A run is named by what it is, whoever made it, unless somebody named it; steps are beside their pipeline."""

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


@pytest.mark.parametrize("named", [False, True])
def test_steps_are_in_the_experiment_of_their_pipeline(
    tracking: str, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    client = mlflow.MlflowClient()
    experiment = client.create_experiment("boards")
    made = client.create_run(experiment)
    monkeypatch.setenv("MLFLOW_RUN_ID", made.info.run_id)
    if named:
        # As `MLFLOW_EXPERIMENT_NAME=mine mlflow run . --experiment-name boards` does.
        client.create_experiment("mine")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
        monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    with entry_run(stage="main", params={}) as parent, entry_run(stage="fit", params={}) as step:
        assert (parent.experiment_id, step.experiment_id) == (experiment, experiment)


def test_a_pipeline_in_a_run_of_a_program_is_in_its_experiment(tracking: str) -> None:
    experiment = mlflow.create_experiment("boards")
    with mlflow.start_run(experiment_id=experiment), entry_run(stage="main", params={}) as parent:
        assert parent.experiment_id == experiment
