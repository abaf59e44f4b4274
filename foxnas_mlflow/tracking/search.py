"""Logging a search: every tag, metric and artifact of the contract, and the registered models."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.models.model import ModelInfo

from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.files import json_digest, write_csv
from foxnas_mlflow.core.measurements import Measurement, write_measurements
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers import Candidate, Front, Loop, SearchOutcome, SearchResult, describe_limits
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.flavor import SubnetModel, log_model
from foxnas_mlflow.tracking.inputs import MEASUREMENTS
from foxnas_mlflow.tracking.registry import (
    PICTURE,
    PREDICTORS_DIGEST,
    has_files,
    list_versions,
    newest,
    picture_of,
    register,
    registered_name,
    shortened,
    version_uri,
)
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.verification import Verification


@dataclass(frozen=True)
class Searched:
    """One network that was searched for, with everything measured and evaluated of it.

    Attributes:
        outcome: The search.
        comparisons: All searchers under one common budget, for the report.
        verification: What a device or a supernet said of its candidates, or None.
    """

    outcome: SearchOutcome
    comparisons: tuple[SearchResult, ...] = ()
    verification: Verification | None = None

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        """All networks that were looked at."""
        return () if self.verification is None else self.verification.candidates

    @property
    def chosen(self) -> Candidate:
        """The one of them that was chosen."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    def place(self, n: int) -> str:
        """Directory of its files in a run that searches n networks: its latency; the root where it is the only one."""
        return "" if n == 1 else f"{self.outcome.latency_limit_ms:g}ms"


@dataclass(frozen=True)
class LoggedNetwork:
    """A registered network.

    Attributes:
        uri: Its registered version.
        metrics: Figures of it, as logged.
    """

    uri: str
    metrics: Mapping[str, float]


FRONT_PICTURE = "front.png"
"""Artifact of a search: its front and what was found on it."""


@dataclass(frozen=True)
class LoggedSearch:
    """A search in MLflow.

    Attributes:
        networks: The registered networks, in the order of what was searched for.
        predictors_uri: The registered predictors that they were found with.
        note: What must be said of predicted milliseconds, or empty.
    """

    networks: tuple[LoggedNetwork, ...]
    predictors_uri: str
    note: str


def log_search(
    run: EntryRun,
    searched: Sequence[Searched],
    *,
    target: Target,
    predictors: PredictorSet,
    predictors_source: str,
    params: Mapping[str, Any],
    name: str,
    measurements: Sequence[Measurement] = (),
    loop: Loop[Searched] | None = None,
) -> LoggedSearch:
    """Log a finished search to its run and register predictors and networks.

    Args:
        run: The open run.
        searched: A network for each of several latencies, with one front, or one network.
        target: The target.
        predictors: What was searched on.
        predictors_source: Registry URI, path or ``reference``.
        params: Resolved parameters of the entry point, for the report.
        name: Prefix of the registered models.
        measurements: Measured networks to draw in the report.
        loop: The rounds in which it was searched, where networks were looked at.
    """
    n_rounds = 1 if loop is None else len(loop.rounds)
    fitted_to = predictors_source
    if loop is not None and n_rounds > 1:
        write_measurements(loop.rows, run.directory / MEASUREMENTS)
        fitted_to = f"{predictors_source}, refitted in round {n_rounds}"
    note = latency_note(predictors, target)
    run.set_tags(
        {
            "foxnas.found_by": ",".join(dict.fromkeys(one.outcome.found_by for one in searched)),
            "foxnas.latency_source": _tags(searched[0].verification)["latency_source"],
            **({"foxnas.latency_note": note} if note else {}),
            **{f"foxnas.{key}": v for key, v in _tags(searched[0].verification).items() if key == "emulated"},
        }
    )
    front = searched[0].outcome.front
    write_front(front, run.directory / "front.csv")
    if importlib.util.find_spec("matplotlib") is not None:
        from foxnas_mlflow.report import draw_front

        draw_front(front, [one.outcome for one in searched], run.directory / FRONT_PICTURE)
    for one in searched:
        _write_files(one.outcome, run.directory / one.place(len(searched)))
    if importlib.util.find_spec("plotly") is not None:
        _write_pages(run, searched, {**params, "predictors": fitted_to}, target, measurements, loop)
    run.log_artifacts(run.directory)
    run.log_table(
        {"image_size": front.image_size, "latency_ms": front.latency_ms, "accuracy": front.accuracy},
        "tables/front.json",
    )
    for one in searched:
        if one.candidates:
            place = one.place(len(searched))
            name_of_table = f"verification-{place}" if place else "verification"
            run.log_table([candidate.to_row() for candidate in one.candidates], f"tables/{name_of_table}.json")
    fitted = log_model(predictors, name="predictors")
    networks = tuple(
        _log_network(
            run,
            one,
            step,
            target=target,
            predictors=predictors,
            source=predictors_source,
            name=name,
            note=note,
            n_rounds=n_rounds,
        )
        for step, one in enumerate(searched)
    )
    predictors_uri = _register_predictors(run, fitted, predictors, fitted_to, target, name)
    return LoggedSearch(networks, predictors_uri, note)


def _log_network(
    run: EntryRun,
    one: Searched,
    step: int,
    *,
    target: Target,
    predictors: PredictorSet,
    source: str,
    name: str,
    note: str,
    n_rounds: int,
) -> LoggedNetwork:
    """Log one network with its figures, and register it."""
    outcome, verification = one.outcome, one.verification
    facts, tags = _facts(verification), _tags(verification)
    # What leads back to its origin, and forward to what came of that.
    origin = {"predictors": source, "search_run": run.run_id}
    origin |= {key: str(facts[key]) for key in ("supernet", "data", "data_digest") if key in facts}
    metrics = _metrics(outcome, facts) | {"search/rounds": float(n_rounds)}
    if verification is not None and verification.chosen.timing is not None and verification.chosen.evaluated:
        metrics["search/true_dominated"] = float(verification.dominated)
    details = {
        "predicted_accuracy": outcome.accuracy,
        "predicted_latency_ms": outcome.latency_ms,
        "predicted_latency_upper_ms": outcome.latency_upper_ms,
        "confidence": outcome.objective.confidence,
        "latency_ms": outcome.latency_limit_ms,
        "limits": describe_limits(outcome.limits),
        "latency_note": note,
        "found_by": outcome.found_by,
        "certificate": outcome.certificate(),
        **origin,
        **tags,
        **facts,
        **_training(verification),
    }
    found = SubnetModel(outcome.architecture, predictors.space)
    if verification is not None and verification.model is not None:
        found = verification.model
    subnet = log_model(dataclasses.replace(found, details=details), name="subnet")
    evaluated = {key: value for key, value in metrics.items() if key.startswith("search/evaluated_accuracy")}
    run.log_metrics(
        {key: value for key, value in metrics.items() if key not in evaluated}, step=step, model_id=subnet.model_id
    )
    if evaluated:
        run.log_metrics(evaluated, step=step, model_id=subnet.model_id, dataset=run.dataset)
    confidence, limit = outcome.objective.confidence, outcome.latency_limit_ms
    reason = "" if verification is None else verification.reason
    picture = picture_of(run.run_id, FRONT_PICTURE) if (run.directory / FRONT_PICTURE).exists() else ""
    uri = register(
        subnet.model_uri,
        registered_name(name, "subnet", target.name),
        "subnet",
        tags={
            **tags,
            **origin,
            "found_by": outcome.found_by,
            "confidence": f"{confidence:g}",
            "limits": describe_limits(outcome.limits),
            **({} if limit is None else {"latency_ms": f"{limit:g}"}),
        },
        facts={
            "target": target.name if limit is None else f"{target.name}, at most {limit:g} ms",
            "searched for": str(outcome.problem),
            "predicted accuracy, %": outcome.accuracy,
            "predicted latency, ms": outcome.latency_ms,
            f"upper bound at {confidence:g}, ms": outcome.latency_upper_ms,
            **{f"limit {limit}": words for limit, words in outcome.limit_words()},
            **{key.replace("_", " "): value for key, value in facts.items() if isinstance(value, float)},
            **({"chosen": reason} if reason else {}),
            "weights": tags["weights"],
            "parameters": f"{metrics['model/params']:,.0f}",
            **({"note": note} if note else {}),
            "architecture": str(outcome.architecture),
            **({"labels": shortened(found.labels)} if found.labels else {}),
            **({PICTURE: picture} if picture else {}),
        },
        command=lambda uri: _with_weights(name, target) if tags["weights"] == "none" else quantize_command(uri, target),
    )
    return LoggedNetwork(uri, metrics)


def _write_files(outcome: SearchOutcome, directory: Path) -> None:
    """The files of the contract that each network has."""
    directory.mkdir(exist_ok=True)
    (directory / "architecture.json").write_text(outcome.architecture.to_json(indent=2), encoding="utf-8")
    (directory / "certificate.json").write_text(json.dumps(outcome.certificate(), indent=2), encoding="utf-8")
    write_trace(outcome.result, directory / "trace.csv")


def _write_pages(
    run: EntryRun,
    searched: Sequence[Searched],
    request: Mapping[str, Any],
    target: Target,
    measurements: Sequence[Measurement],
    loop: Loop[Searched] | None,
) -> None:
    """A page for each network, and for several one beside them that has them all."""
    from foxnas_mlflow.report import write_search_report, write_searches_report

    for number, one in enumerate(searched):
        rounds = () if loop is None else tuple((r, r.chosen[number]) for r in loop.rounds)
        write_search_report(
            run.directory / one.place(len(searched)) / "report.html",
            outcome=one.outcome,
            comparisons=one.comparisons,
            request=request,
            target=target,
            measurements=measurements,
            candidates=one.candidates,
            rounds=rounds,
            ended="" if loop is None else loop.reason,
            reason="" if one.verification is None else one.verification.reason,
        )
    if len(searched) > 1:
        write_searches_report(
            run.directory / "report.html",
            outcomes=[one.outcome for one in searched],
            chosen=[one.chosen if one.candidates else None for one in searched],
            request=request,
            target=target,
        )


def _metrics(outcome: SearchOutcome, facts: Mapping[str, float | str]) -> dict[str, float]:
    """The figures of the found network."""
    network = network_cost(build_network(outcome.objective.space, outcome.architecture))
    return {
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
        # MLflow's names of metrics have no "@".
        **{f"search/limit_price/{p.limit.quantity.replace('@', '.')}": p.per_unit for p in outcome.prices},
        **{f"search/{key}": value for key, value in facts.items() if isinstance(value, float)},
    }


def quantize_command(uri: str, target: Target | None) -> str:
    """What to type after a network got its weights."""
    return f"foxnas quantize --subnet {shlex.quote(uri)}" + (f" --target {target.argument}" if target else "")


def _with_weights(name: str, target: Target) -> str:
    """What gives a network its weights: a search by predictors of a supernet, which is sampled or trained first."""
    supernet = registered_name(name, "supernet")
    version = newest(list_versions(supernet))
    if version is None:
        return f"foxnas supernet --name {shlex.quote(name)}"
    return f"foxnas sample --supernet {shlex.quote(version_uri(supernet, version))} --target {target.argument}"


def _register_predictors(
    run: EntryRun, logged: ModelInfo, predictors: PredictorSet, source: str, target: Target, name: str
) -> str:
    """The registered version of the predictors: one that has the same content, or a new one."""
    metrics = {
        f"predictor/{label}/{key}": value
        for quantity, label in (("accuracy", "accuracy"), ("latency_ms", "latency"))
        for key, value in predictors.figures(quantity).items()
    }
    if metrics:
        run.log_metrics(metrics, model_id=logged.model_id)
    registered = registered_name(name, "predictors", target.name)
    digest = json_digest(predictors.to_dict())
    for version in list_versions(registered):
        uri = version_uri(registered, version.version)
        if version.tags.get(PREDICTORS_DIGEST) == digest and has_files(MlflowClient(), uri):
            return uri
    return register(
        logged.model_uri,
        registered,
        "predictors",
        tags={"source": source, PREDICTORS_DIGEST: digest},
        facts={"target": target.name, "source": source, **metrics},
        command=lambda uri: f"foxnas search --target {target.argument} --predictors {shlex.quote(uri)}",
    )


def latency_note(predictors: PredictorSet, target: Target) -> str:
    """What must be said of predicted milliseconds: a target's note is of its cost model, not of a user's own fit."""
    own = all(predictor.origin == "fitted" for predictor in predictors.latency)
    return "" if own else target.latency_note


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
    """What is known of the chosen network, for its details; the numbers are metrics too."""
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


def _training(verification: Verification | None) -> dict[str, Any]:
    """How many images the supernet drew, how, and how it weighed its classes, for what trains the network further."""
    if verification is None or verification.supernet is None:
        return {}
    config = verification.supernet.model.config
    keys = ("max_train", "flip", "sampling", "class_weights")
    return {"training": {key: config[key] for key in keys if key in config}}


def write_front(front: Front, path: Path) -> None:
    """Write ``front.csv``: image_size, latency_ms, accuracy, architecture."""
    rows = (
        (
            int(front.image_size[i]),
            float(front.latency_ms[i]),
            float(front.accuracy[i]),
            front.architecture(i).to_json(),
        )
        for i in range(len(front))
    )
    write_csv(path, ("image_size", "latency_ms", "accuracy", "architecture"), rows)


def write_trace(result: SearchResult, path: Path) -> None:
    """Write ``trace.csv``: evaluation, best_accuracy, latency_ms, chain."""
    rows = ((point.evaluation, point.best_accuracy, point.latency_ms, point.chain) for point in result.trace)
    write_csv(path, ("evaluation", "best_accuracy", "latency_ms", "chain"), rows)
