"""Logging fitted predictors: metrics of both formulas, tables, plots, and the registered model."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence

import pandas as pd

from foxnas_mlflow.core.files import json_digest
from foxnas_mlflow.core.measurements import Measurement, write_measurements
from foxnas_mlflow.core.predictors import FitResult
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.flavor import log_model
from foxnas_mlflow.report import write_predictor_files
from foxnas_mlflow.tracking.inputs import MEASUREMENTS, SPACE
from foxnas_mlflow.tracking.registry import PREDICTORS_DIGEST, register, registered_name
from foxnas_mlflow.tracking.run import EntryRun


def _label(quantity: str) -> str:
    """A quantity in names of metrics and artifacts, which have no ``@``."""
    return {"latency_ms": "latency"}.get(quantity, quantity.replace("@", "-at-"))


_SHOWN = {"r2_adjusted": "adjusted R2", "cv_rmse": "cross-validated RMSE", "kendall_tau": "Kendall tau"}


def log_fit(
    run: EntryRun,
    fit: FitResult,
    rows: Sequence[Measurement],
    *,
    target: Target,
    source: str,
    origin: Mapping[str, str],
    name: str,
    noise_floor: float | None = None,
) -> tuple[str, dict[str, float]]:
    """Log a fit to its run and register its predictors.

    Args:
        run: The open run.
        fit: The fit.
        rows: What it was fitted on, logged as ``measurements.csv``.
        target: The target.
        source: Where the rows came from.
        origin: What is known of the run that they were sampled in, from `origin_of`.
        name: Prefix of the registered model.
        noise_floor: Standard error (points) of the rows' accuracies, where it is known.

    Returns:
        URI of the registered predictors, and the figures logged.
    """
    write_measurements(rows, run.directory / MEASUREMENTS)
    metrics: dict[str, float] = {}
    for quantity, report in fit.reports.items():
        label = _label(quantity)
        paper = fit.paper.get(quantity)
        metrics |= {f"predictor/{label}/{key}": value for key, value in fit.predictors.figures(quantity).items()}
        if paper is not None:
            metrics |= {f"predictor/{label}/{key}_paper": value for key, value in paper.metrics.items()}
        directory = run.directory / "predictor" / label
        directory.mkdir(parents=True)
        write_predictor_files(report, paper, directory)
    for quantity, group in fit.predictors.groups.items():
        if quantity not in fit.reports and group:
            # The target's cost model of latency, or an accuracy that all networks share.
            metrics |= {f"predictor/{_label(quantity)}/{key}": value for key, value in group[0].metrics.items()}
            run.log_json(group[0].to_dict(), f"predictor/{_label(quantity)}/coefficients.json")
    if noise_floor is not None:
        metrics["predictor/accuracy/noise_floor"] = noise_floor
    run.log_artifacts(run.directory)
    run.log_table(pd.read_csv(run.directory / MEASUREMENTS), "tables/measurements.json", dataset="measurements")
    run.log_json(fit.predictors.space.to_dict(), SPACE)
    registered = registered_name(name, "predictors", target.name)
    info = log_model(fit.predictors, name="predictors")
    run.log_metrics(metrics, model_id=info.model_id)
    uri = register(
        info.model_uri,
        registered,
        "predictors",
        tags={
            "source": source,
            PREDICTORS_DIGEST: json_digest(fit.predictors.to_dict()),
            **{key: value for key, value in origin.items() if key != "target"},
        },
        facts={
            "target": target.name,
            "fitted on": f"{len(rows)} networks of {source}",
            **{
                f"{label}, {words}": metrics[f"predictor/{label}/{key}"]
                for label in map(_label, fit.reports)
                for key, words in _SHOWN.items()
                if f"predictor/{label}/{key}" in metrics
            },
        },
        command=lambda uri: search_command(uri, target, origin.get("supernet")),
    )
    return uri, metrics


def search_command(uri: str, target: Target, supernet: str | None) -> str:
    """What to type after a fit: with the supernet that the rows are of, where it is known, networks have weights."""
    command = f"foxnas search --target {target.argument} --predictors {shlex.quote(uri)}"
    return command if supernet is None else f"{command} --supernet {shlex.quote(supernet)}"
