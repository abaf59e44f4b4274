"""Logging a search: every tag, metric and artifact of the contract, and the registered models."""

from __future__ import annotations

import csv
import dataclasses
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
from foxnas_mlflow.tracking.registry import register, registered_name
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.verification import Verification


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
    verification: Verification | None = None,
) -> dict[str, str]:
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
        verification: What a device or a supernet said of its candidates.

    Returns:
        run_id, and model_uri of the registered subnet.
    """
    space = predictors.space
    network = network_cost(build_network(space, outcome.architecture))
    note = latency_note(predictors, target)
    facts = _facts(verification)
    tags = _tags(verification)
    run.set_tags(
        {
            "foxnas.found_by": outcome.found_by,
            "foxnas.latency_source": tags["latency_source"],
            **({"foxnas.latency_note": note} if note else {}),
            **({"foxnas.emulated": tags["emulated"]} if "emulated" in tags else {}),
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
            candidates=() if verification is None else verification.candidates,
        )
    run.log_artifacts(files)
    front = outcome.front
    run.log_table(
        {"image_size": front.image_size, "latency_ms": front.latency_ms, "accuracy": front.accuracy},
        "tables/front.json",
    )
    details = {
        "predicted_accuracy": outcome.accuracy,
        "predicted_latency_ms": outcome.latency_ms,
        "predicted_latency_upper_ms": outcome.latency_upper_ms,
        "confidence": outcome.objective.confidence,
        "latency_ms": params["latency_ms"],
        "latency_note": note,
        "found_by": outcome.found_by,
        "certificate": outcome.certificate(),
        **tags,
        **facts,
    }
    found = SubnetModel(outcome.architecture, space)
    if verification is not None and verification.model is not None:
        found = verification.model
    fitted = log_model(predictors, name="predictors")
    subnet = log_model(dataclasses.replace(found, details=details), name="subnet")
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
            **{f"search/{key}": value for key, value in facts.items() if isinstance(value, float)},
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
    tags |= {
        "found_by": outcome.found_by,
        "confidence": f"{outcome.objective.confidence:g}",
        "latency_ms": f"{params['latency_ms']:g}",
    }
    trained = tags["weights"] == "trained"
    uri = register(
        subnet.model_uri,
        registered_name(name, "subnet", target.name),
        "subnet",
        tags=tags,
        facts={
            "target": f"{target.name}, at most {params['latency_ms']:g} ms",
            "predicted accuracy, %": outcome.accuracy,
            "predicted latency, ms": outcome.latency_ms,
            f"upper bound at {outcome.objective.confidence:g}, ms": outcome.latency_upper_ms,
            **{key.replace("_", " "): value for key, value in facts.items() if isinstance(value, float)},
            "weights": tags["weights"],
            "parameters": f"{network.params:,}",
            **({"note": note} if note else {}),
        },
        command=lambda uri: (
            f"foxnas quantize --subnet {uri} --target {target.name}"
            if trained
            else f"foxnas search --supernet models:/{name}-supernet/1 --target {target.name}"
        ),
    )
    register(
        fitted.model_uri,
        registered_name(name, "predictors", target.name),
        "predictors",
        tags={"source": predictors_source},
        facts={"target": target.name, "source": predictors_source, **fit_metrics},
        command=lambda uri: f"foxnas search --target {target.name} --predictors {uri}",
    )
    print(_summary(outcome, target, params, uri, run.run_id, note, verification))
    return {"run_id": run.run_id, "model_uri": uri}


def latency_note(predictors: PredictorSet, target: Target) -> str:
    """What must be said of predicted milliseconds: a target's note is of its cost model, not of a user's own fit."""
    return target.latency_note if predictors.notes else ""


def _tags(verification: Verification | None) -> dict[str, str]:
    """What a version's figures rest on."""
    tags = {"weights": "none", "latency_source": "cost_model"}
    if verification is None:
        return tags
    if verification.model is not None:
        tags["weights"] = "trained"
    if verification.device:
        tags |= {"latency_source": "measured", "emulated": str(verification.emulated).lower()}
    return tags


def _facts(verification: Verification | None) -> dict[str, float | str]:
    """What was found out about the chosen network, for its details; the numbers are metrics too."""
    if verification is None:
        return {}
    facts: dict[str, float | str] = {}
    chosen = verification.chosen
    if chosen.timing is not None:
        facts |= {
            "measured_latency_ms": chosen.timing.latency_ms,
            "device": chosen.timing.device,
            "runtime": chosen.timing.runtime,
        }
    if verification.supernet is not None and chosen.accuracy is not None and chosen.standard_error is not None:
        facts |= {
            "evaluated_accuracy": chosen.accuracy,
            "evaluated_accuracy_standard_error": chosen.standard_error,
            "supernet": verification.supernet.uri,
            "data": verification.supernet.dataset.source,
            "data_digest": verification.supernet.dataset.digest,
            "data_seed": str(verification.supernet.model.config["seed"]),
        }
    return facts


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
    outcome: SearchOutcome,
    target: Target,
    params: Mapping[str, Any],
    uri: str,
    run_id: str,
    note: str,
    verification: Verification | None,
) -> str:
    weights = "none" if verification is None or verification.model is None else "trained"
    lines = [
        f"Found for {target.name} within {params['latency_ms']:g} ms at confidence {params['confidence']:g}:",
        f"  {outcome.architecture}",
        f"  predicted accuracy   {outcome.accuracy:.2f} %",
        f"  predicted latency    {outcome.latency_ms:.3g} ms, at most {outcome.latency_upper_ms:.3g} ms (cost model)",
        *_verified_lines(verification),
        f"  exact optimum        {outcome.optimum.accuracy:.4f} %, proof gap {outcome.optimum.proof_gap:.4f} points",
        f"  {outcome.result.algorithm:<20} {outcome.result.accuracy:.4f} %, gap {outcome.optimality_gap:.4f} points, "
        f"{outcome.result.evaluations:,} evaluations in {outcome.result.seconds:.2f} s",
        f"  registered           {uri} (weights={weights})",
        f"  run                  {run_id}: report.html, front.csv, certificate.json",
    ]
    if note:
        lines.append(f"  note                 {note}")
    if weights == "trained":
        lines.append(f"Next: foxnas quantize --subnet {uri} --target {target.name}")
    else:
        lines.append("Next: mlflow ui, and open report.html of the run.")
    return "\n".join(lines)


def _verified_lines(verification: Verification | None) -> list[str]:
    if verification is None:
        return []
    lines = []
    chosen = verification.chosen
    if chosen.accuracy is not None:
        lines.append(f"  evaluated accuracy   {chosen.accuracy:.2f} % +- {chosen.standard_error:.2f}")
    if chosen.timing is not None:
        word = " (emulated: no real time)" if verification.emulated else ""
        lines.append(f"  measured latency     {chosen.timing.latency_ms:.3g} ms on {chosen.timing.device}{word}")
    lines.append(f"  chosen among         {len(verification.candidates)} networks: verification.csv")
    return lines
