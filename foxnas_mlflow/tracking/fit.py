"""Logging fitted predictors: metrics of both formulas, tables, plots, and the registered model."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pandas as pd

from foxnas_mlflow.core.measurements import Measurement, write_measurements
from foxnas_mlflow.core.predictors import FitResult
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.flavor import log_model
from foxnas_mlflow.report import write_predictor_files
from foxnas_mlflow.tracking.inputs import MEASUREMENTS, SPACE
from foxnas_mlflow.tracking.registry import register, registered_name
from foxnas_mlflow.tracking.run import EntryRun

_LABELS = {"accuracy": "accuracy", "latency_ms": "latency"}
_SHOWN = {"r2_adjusted": "adjusted R2", "cv_rmse": "cross-validated RMSE", "kendall_tau": "Kendall tau"}


def log_fit(
    run: EntryRun,
    fit: FitResult,
    rows: Sequence[Measurement],
    *,
    target: Target,
    source: str,
    name: str,
    noise_floor: float | None = None,
) -> dict[str, str]:
    """Log a fit to its run and register its predictors.

    Args:
        run: The open run.
        fit: The fit.
        rows: What it was fitted on, logged as ``measurements.csv``.
        target: The target.
        source: Where the rows came from.
        name: Prefix of the registered model.
        noise_floor: Standard error (points) of the rows' accuracies, where it is known.

    Returns:
        run_id, and model_uri of the registered predictors.
    """
    write_measurements(rows, run.directory / MEASUREMENTS)
    metrics: dict[str, float] = {}
    for quantity, report in fit.reports.items():
        label = _LABELS[quantity]
        paper = fit.paper.get(quantity)
        metrics |= {f"predictor/{label}/{key}": value for key, value in report.metrics.items()}
        if paper is not None:
            metrics |= {f"predictor/{label}/{key}_paper": value for key, value in paper.metrics.items()}
        directory = run.directory / "predictor" / label
        directory.mkdir(parents=True)
        write_predictor_files(report, paper, directory)
    if "latency_ms" not in fit.reports:
        model = fit.predictors.latency[0]
        metrics |= {f"predictor/latency/{key}": value for key, value in model.metrics.items()}
        run.log_json(model.to_dict(), "predictor/latency/coefficients.json")
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
        tags={"source": source},
        facts={
            "target": target.name,
            "fitted on": f"{len(rows)} networks of {source}",
            **{
                f"{_LABELS[quantity]}, {words}": report.metrics[key]
                for quantity, report in fit.reports.items()
                for key, words in _SHOWN.items()
                if key in report.metrics
            },
        },
        command=lambda uri: f"foxnas search --target {target.name} --predictors {uri}",
    )
    print(_summary(fit, uri, run.run_id, target, rows, noise_floor))
    return {"run_id": run.run_id, "model_uri": uri}


def _summary(
    fit: FitResult,
    uri: str,
    run_id: str,
    target: Target,
    rows: Sequence[Measurement],
    noise_floor: float | None,
) -> str:
    lines = [f"{'':<22}{'formula':<12}{'n':>5}{'adj. R2':>10}{'CV RMSE':>10}{'CV MAPE %':>11}{'tau':>8}"]
    for quantity, report in fit.reports.items():
        for which in (report, fit.paper.get(quantity)):
            if which is None or (which is not report and which.predictor.formula == report.predictor.formula):
                continue
            m = which.metrics
            lines.append(
                f"{quantity:<22}{which.predictor.formula:<12}{m['n_samples']:>5.0f}{m['r2_adjusted']:>10.4f}"
                f"{m['cv_rmse']:>10.4f}{m['cv_mape']:>11.3f}{m['kendall_tau']:>8.3f}"
            )
    if noise_floor is not None:
        lines.append(f"  noise floor of the accuracies: {noise_floor:.2f} points, the standard error of an evaluation")
    if "latency_ms" not in fit.reports:
        lines.append(f"{'latency_ms':<22}cost model of {target.name}: no row has a measured latency")
        lines += [f"  note: {note}" for note in fit.predictors.notes]
    lines += [f"  equation 2 of {quantity} not fitted: {why}" for quantity, why in fit.refused.items()]
    lines.append(f"Registered {uri}; run {run_id}.")
    middle = statistics.median([m.latency_ms for m in rows if m.latency_ms is not None] or [60.0])
    lines.append(f"Next: foxnas search --target {target.name} --predictors {uri} --latency-ms {middle:.3g}")
    return "\n".join(lines)
