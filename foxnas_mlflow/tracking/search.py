"""Logging a search: every tag, metric and artifact of the contract, and the registered models."""

from __future__ import annotations

import csv
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers import Front, SearchOutcome, SearchResult
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.flavor import SubnetModel, log_model
from foxnas_mlflow.tracking.registry import tag_version
from foxnas_mlflow.tracking.run import EntryRun


def log_search(
    run: EntryRun,
    outcome: SearchOutcome,
    comparisons: Sequence[SearchResult],
    *,
    target: Target,
    predictors: PredictorSet,
    predictors_source: str,
    params: Mapping[str, Any],
    name: str,
    measurements: Sequence[Measurement] = (),
) -> None:
    """Log a finished search to its run and register predictors and subnet.

    Args:
        run: The open run.
        outcome: The search.
        comparisons: All searchers under one common budget, for the report.
        target: The target.
        predictors: What was searched on.
        predictors_source: Registry URI, path or ``reference``.
        params: Resolved parameters of the entry point.
        name: Prefix of the registered models.
        measurements: Measured networks to draw in the report.
    """
    space = predictors.space
    network = network_cost(build_network(space, outcome.architecture))
    run.set_tags(
        {
            "foxnas.found_by": outcome.found_by,
            **({"foxnas.latency_note": target.latency_note} if target.latency_note else {}),
        }
    )
    files = run.directory
    (files / "architecture.json").write_text(outcome.architecture.to_json(indent=2), encoding="utf-8")
    (files / "certificate.json").write_text(json.dumps(outcome.certificate(), indent=2), encoding="utf-8")
    write_front(outcome.front, files / "front.csv")
    write_trace(outcome.result, files / "trace.csv")
    if importlib.util.find_spec("plotly") is not None:
        from foxnas_mlflow.report import write_search_report

        write_search_report(
            files / "report.html",
            outcome=outcome,
            comparisons=comparisons,
            request={**params, "predictors": predictors_source},
            target=target,
            measurements=measurements,
        )
    run.log_artifacts(files)
    details = {
        "predicted_accuracy": outcome.accuracy,
        "predicted_latency_ms": outcome.latency_ms,
        "predicted_latency_upper_ms": outcome.latency_upper_ms,
        "confidence": outcome.objective.confidence,
        "latency_ms": params["latency_ms"],
        "latency_source": "cost_model",
        "latency_note": target.latency_note,
        "found_by": outcome.found_by,
        "weights": "none",
        "certificate": outcome.certificate(),
    }
    fitted = log_model(
        predictors,
        name="predictors",
        registered_model_name=f"{name}-predictors-{target.name}",
    )
    subnet = log_model(
        SubnetModel(outcome.architecture, space, details),
        name="subnet",
        registered_model_name=f"{name}-subnet-{target.name}",
    )
    run.log_metrics(
        {
            "search/predicted_accuracy": outcome.accuracy,
            "search/predicted_latency_ms": outcome.latency_ms,
            "search/predicted_latency_upper_ms": outcome.latency_upper_ms,
            "search/exact_accuracy": outcome.optimum.accuracy,
            "search/optimality_gap": outcome.optimality_gap,
            "search/seconds": outcome.result.seconds,
            "search/evaluations": outcome.result.evaluations,
            "search/front_size": len(outcome.front),
            "search/front_seconds": outcome.front_seconds,
            "model/params": network.params,
            "model/macs": network.macs,
            "model/int8_parameter_bytes": network.int8_size_bytes,
            "model/peak_activation_bytes": network.peak_activation_bytes,
        },
        model_id=subnet.model_id,
    )
    fit_metrics = {
        f"predictor/{label}/{key}": value
        for label, group in (("accuracy", predictors.accuracy), ("latency", predictors.latency))
        for key, value in group[-1].metrics.items()
    }
    if fit_metrics:
        run.log_metrics(fit_metrics, model_id=fitted.model_id)
    tags = {
        "weights": "none",
        "found_by": outcome.found_by,
        "latency_source": "cost_model",
        "confidence": f"{outcome.objective.confidence:g}",
        "latency_ms": f"{params['latency_ms']:g}",
    }
    tag_version(f"{name}-subnet-{target.name}", subnet.registered_model_version, tags)
    tag_version(f"{name}-predictors-{target.name}", fitted.registered_model_version, {"source": predictors_source})
    print(_summary(outcome, target, params, name, subnet.registered_model_version, run.run_id))


def write_front(front: Front, path: Path) -> None:
    """Write ``front.csv``: image_size, latency_ms, accuracy, architecture."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("image_size", "latency_ms", "accuracy", "architecture"))
        for i in range(len(front)):
            writer.writerow(
                (
                    int(front.image_size[i]),
                    repr(float(front.latency_ms[i])),
                    repr(float(front.accuracy[i])),
                    front.architecture(i).to_json(),
                )
            )


def write_trace(result: SearchResult, path: Path) -> None:
    """Write ``trace.csv``: evaluation, best_accuracy, latency_ms, chain."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("evaluation", "best_accuracy", "latency_ms", "chain"))
        for point in result.trace:
            writer.writerow((point.evaluation, repr(point.best_accuracy), repr(point.latency_ms), point.chain))


def _summary(
    outcome: SearchOutcome, target: Target, params: Mapping[str, Any], name: str, version: Any, run_id: str
) -> str:
    lines = [
        f"Found for {target.name} within {params['latency_ms']:g} ms at confidence {params['confidence']:g}:",
        f"  {outcome.architecture}",
        f"  predicted accuracy   {outcome.accuracy:.2f} %",
        f"  predicted latency    {outcome.latency_ms:.2f} ms, at most {outcome.latency_upper_ms:.2f} ms (cost model)",
        f"  exact optimum        {outcome.optimum.accuracy:.4f} %, proof gap {outcome.optimum.proof_gap:.4f} points",
        f"  {outcome.result.algorithm:<20} {outcome.result.accuracy:.4f} %, gap {outcome.optimality_gap:.4f} points, "
        f"{outcome.result.evaluations:,} evaluations in {outcome.result.seconds:.2f} s",
        f"  registered           {name}-subnet-{target.name} version {version} (weights=none)",
        f"  run                  {run_id}: report.html, front.csv, certificate.json",
    ]
    if target.latency_note:
        lines.append(f"  note                 {target.latency_note}")
    lines.append("Next: mlflow ui, and open report.html of the run.")
    return "\n".join(lines)
