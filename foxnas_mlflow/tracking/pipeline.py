"""The end of a pipeline: its figures, its page and its table, gathered from the runs of its steps."""

from __future__ import annotations

import importlib.util
import json
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.classification import TEST_ACCURACY, TEST_IMAGES, held_out
from foxnas_mlflow.core.comparison import read_comparisons
from foxnas_mlflow.core.searchers import Objective, front_of
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data import ImageDataset
from foxnas_mlflow.tracking.benchmark import BENCHMARK_FILE
from foxnas_mlflow.tracking.comparison import COMPARISON
from foxnas_mlflow.tracking.inputs import open_measurements, open_predictors
from foxnas_mlflow.tracking.lineage import draw, page_of_run, trace
from foxnas_mlflow.tracking.promotion import PROMOTION_FILE
from foxnas_mlflow.tracking.registry import holds_stage, name_and_number
from foxnas_mlflow.tracking.run import EntryRun, best_effort, download_artifact
from foxnas_mlflow.tracking.steps import StepResult, has_artifact

_SERIES = ("eval/top1_max", "eval/top1_random", "eval/top1_min")


@dataclass(frozen=True)
class PipelineNetwork:
    """One of the networks of a pipeline.

    Attributes:
        place: What the names of its steps end with; empty for the first.
        latency_ms: The limit on its latency, or None.
        model_uri: Its int8 model that runs on the target.
    """

    place: str
    latency_ms: float | None
    model_uri: str


def conclude(
    run: EntryRun,
    done: Mapping[str, StepResult],
    *,
    request: Mapping[str, Any],
    latency_ms: float | None,
    limits: str,
    confidence: float,
    networks: Sequence[PipelineNetwork],
    target: Target,
    dataset: ImageDataset,
    refusal: str,
    seconds: float,
) -> tuple[dict[str, float], str]:
    """Log the figures of a finished pipeline to its run, and write its page.

    Args:
        run: The pipeline's run.
        done: What its steps made.
        request: What was asked, with everything resolved, for the page.
        latency_ms: The limit on latency of the first network, or None.
        limits: All its limits, as text.
        confidence: Of the search.
        networks: A network for each of several latencies; the first is the one that goes on to promotion.
        target: The target.
        dataset: The images.
        refusal: Why the gates refused promotion, or empty.
        seconds: Time that it took in this process.

    Returns:
        The figures, and the lines that a person reads.
    """
    client, model_uri = MlflowClient(), networks[0].model_uri
    runs = {name: client.get_run(result.run_id) for name, result in done.items()}
    gates_run = _refused(client, run) if refusal else runs.get("promote")
    quantized = runs["quantize"].data.metrics
    benchmark = _artifact(runs.get("benchmark"), BENCHMARK_FILE)
    gates = _artifact(gates_run, PROMOTION_FILE)
    metrics = {key: value for key, value in runs["compare"].data.metrics.items() if key.startswith("pipeline/")}
    shown = ("accuracy/int8_top1", "accuracy/quantization_drop", TEST_ACCURACY, TEST_IMAGES)
    metrics |= {key: quantized[key] for key in shown if key in quantized}
    if benchmark is not None:
        metrics["benchmark/latency_ms_p50"] = benchmark["latency_ms_p50"]
    alone = done["finetune"].outputs if "finetune" in done else None
    if alone is not None:
        metrics["pipeline/shared_weights_cost"] = alone["finetuned_top1"] - alone["inherited_top1"]
    metrics |= {
        "pipeline/seconds": seconds,
        "pipeline/steps_reused": float(sum(result.reused for result in done.values())),
        "pipeline/promoted": float(bool(gates) and not refusal),
    }
    run.log_metrics(metrics)
    run.log_params({"chosen_latency_ms": "" if latency_ms is None else latency_ms, "chosen_limits": limits})
    run.set_tags({"foxnas.model": model_uri, **{f"foxnas.step.{name}": r.run_id for name, r in done.items()}})
    run.log_json({"format": 1, "steps": [result.to_dict() for result in done.values()]}, "pipeline.json")
    predictors, _ = open_predictors(str(done["search"].outputs["predictors_uri"]), target.name)
    compared = download_artifact(done["compare"].run_id, COMPARISON, run.directory)
    run.log_artifact(compared)
    comparisons = read_comparisons(compared, predictors.space)
    checks = [str(check) for check in done["compare"].outputs["checks"]]
    found = [_figures(network, runs, check) for network, check in zip(networks, checks, strict=True)]
    if len(found) > 1:
        run.log_table(found, "tables/networks.json")
    if importlib.util.find_spec("plotly") is not None:
        from foxnas_mlflow.report import PipelinePage, write_pipeline_report

        rows, _ = open_measurements(str(done["sample"].outputs["measurements"]), run.directory)
        supernet = runs.get("supernet")
        page = PipelinePage(
            request=request,
            latency_ms=latency_ms,
            target=target,
            model_uri=model_uri,
            steps=tuple(result.to_dict() | {"url": page_of_run(runs[name])} for name, result in done.items()),
            data={
                "source": dataset.source,
                "training images": f"{len(dataset.train):,}",
                "validation images": f"{len(dataset.val):,}",
                "classes": ", ".join(dataset.labels[:12]) + (", ..." if dataset.n_classes > 12 else ""),
                "digest": dataset.digest[:16],
            },
            warnings=(*dataset.warnings(), *_broken_meanwhile(runs)),
            training={} if supernet is None else {key: _series(client, supernet, key) for key in _SERIES},
            measurements=tuple(rows),
            predictors=predictors,
            front=front_of(Objective(predictors, confidence=confidence)),
            architecture=Architecture.from_dict(done["search"].outputs["architecture"]),
            quantization=quantized,
            classes=done["quantize"].outputs.get("classes", ()),
            finetuning=alone,
            benchmark=benchmark,
            comparisons=tuple(comparisons),
            checks=checks,
            networks=found,
            agreement={key.removeprefix("pipeline/"): value for key, value in metrics.items()},
            gates=tuple((gates or {}).get("verdicts", ())),
            stage="" if gates is None else str(gates["stage"]),
            refusal=refusal,
        )
        path = run.directory / "report.html"
        write_pipeline_report(path, page)
        run.log_artifact(path)
    best_effort(lambda: draw(trace(model_uri)))()
    measured = bool(request["device"])
    lines = _summary(metrics, latency_ms, checks[0], measured, dataset, model_uri, gates, refusal, run.run_id)
    beaten = [other is not None for other in done["compare"].outputs["beaten_by"]]
    return metrics, "\n".join([*lines[:-1], *map(_network_line, found[1:], beaten[1:]), lines[-1]])


def _figures(network: PipelineNetwork, runs: Mapping[str, Run], check: str) -> dict[str, Any]:
    """What is known of a network, as a row."""
    quantized = runs[f"quantize{network.place}"].data.metrics
    benchmark = _artifact(runs.get(f"benchmark{network.place}"), BENCHMARK_FILE)
    return {
        "limit_ms": network.latency_ms,
        "model_uri": network.model_uri,
        "int8_top1": quantized["accuracy/int8_top1"],
        "quantization_drop": quantized["accuracy/quantization_drop"],
        "size_bytes": quantized["model/size_bytes"],
        "latency_ms": None if benchmark is None else benchmark["latency_ms_p50"],
        "valid": None if benchmark is None else bool(benchmark["valid"]),
        "check": check,
    }


def _network_line(row: Mapping[str, Any], is_beaten: bool) -> str:
    """A further network, for the summary."""
    limit, latency = row["limit_ms"], row["latency_ms"]
    took = "not measured" if latency is None else f"{latency:.4g} ms, {'within' if latency <= limit else 'ABOVE'} it"
    beaten = "; beaten" if is_beaten else ""
    return f"  at most {limit:.4g} ms".ljust(23) + f"{row['model_uri']}: {row['int8_top1']:.2f} %, {took}{beaten}"


def _refused(client: MlflowClient, run: EntryRun) -> Run | None:
    """The newest promotion of this pipeline: the one that was refused."""
    found = client.search_runs(
        [run.experiment_id],
        f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{run.run_id}' and tags.`foxnas.stage` = 'promote'",
        order_by=["attributes.start_time DESC"],
        max_results=1,
    )
    return found[0] if found else None


def _broken_meanwhile(runs: Mapping[str, Run]) -> Iterator[str]:
    """What the steps skipped because it could not be read any more."""
    for name, run in runs.items():
        if n := run.data.metrics.get("data/skipped"):
            yield f"{n:.0f} files broke before {name} read them and were skipped: see skipped.txt of its run"


def _artifact(run: Run | None, path: str) -> dict[str, Any] | None:
    """A JSON artifact; None where there is no run, or it ended before it wrote it."""
    if run is None or not has_artifact(run.info.run_id, path):
        return None
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        content: dict[str, Any] = json.loads(download_artifact(run.info.run_id, path, directory).read_bytes())
    return content


def _series(client: MlflowClient, run: Run, key: str) -> list[tuple[int, float]]:
    return sorted((metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, key))


def _summary(
    metrics: Mapping[str, float],
    limit: float | None,
    check: str,
    measured: bool,
    dataset: ImageDataset,
    model_uri: str,
    gates: Mapping[str, Any] | None,
    refusal: str,
    run_id: str,
) -> list[str]:
    lines = [
        f"\nFrom {len(dataset.train):,} images of {dataset.source} to {model_uri} in "
        f"{metrics['pipeline/seconds'] / 60:.1f} minutes:",
        f"  int8 top-1           {metrics['accuracy/int8_top1']:.2f} %, "
        f"{metrics['accuracy/quantization_drop']:.2f} points less than float",
    ]
    lines += [f"  {'held-out test':<20} {text}" for _, text in held_out(metrics)]
    if "benchmark/latency_ms_p50" in metrics:
        latency = metrics["benchmark/latency_ms_p50"]
        kept = "" if limit is None else f", {'within' if latency <= limit else 'ABOVE'} {limit:.4g} ms"
        lines.append(f"  latency              {latency:.4g} ms median{kept}")
    else:
        bound = "" if limit is None else f"; at most {limit:.4g} ms by the cost model"
        lines.append(f"  latency              not measured{bound}")
    taus = [
        f"{name} {metrics[f'pipeline/{name}_kendall_tau']:.2f}"
        for name in ("latency", "accuracy")
        if f"pipeline/{name}_kendall_tau" in metrics
    ]
    lines.append(f"  rank correlation     {', '.join(taus) or 'not known'} (Kendall tau, predicted against real)")
    lines.append(f"  check                {check}")
    alias = ""
    if refusal:
        lines.append("  promotion            refused")
    elif gates is None:
        lines.append("  promotion            not asked for" if measured else "  promotion            needs a device")
    else:
        name = name_and_number(model_uri)[0]
        # Somebody may have moved it on since the gates let it through.
        stage = "Production" if holds_stage(model_uri, "Production") else str(gates["stage"])
        alias = f"models:/{name}@{stage.lower()}"
        lines.append(f"  promotion            {stage}, {alias}")
    lines.append(f"  run                  {run_id}: report.html, {COMPARISON}, pipeline.json")
    lines.append(
        f"Next: mlflow models serve -m {shlex.quote(alias)} --env-manager local"
        if alias
        else "Next: mlflow ui, and open report.html of the run."
    )
    return lines
