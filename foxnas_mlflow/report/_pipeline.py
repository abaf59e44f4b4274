"""The page of a pipeline: from images to a promoted model, predicted beside real."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.classification import held_out
from foxnas_mlflow.core.comparison import Comparison
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.rejection import confidence_words
from foxnas_mlflow.core.searchers import Front
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.report._benchmark import facts, single_runs, under_load
from foxnas_mlflow.report._page import BLUE, GREEN, RED, axes_layout, fill, link, plot, scatter, table, write_page
from foxnas_mlflow.report._search import network_drawing

_GREY = "#b9bec7"
_SERIES = {"eval/top1_max": "largest subnet", "eval/top1_random": "random subnets", "eval/top1_min": "smallest subnet"}
_MOST_CLASSES = 20
"""Classes that the page lists."""

_METRICS = (
    ("r2_adjusted", "adjusted R2"),
    ("cv_rmse", "cross-validated RMSE"),
    ("cv_mape", "MAPE, %"),
    ("kendall_tau", "Kendall tau"),
    ("cv_coverage", "rows in their 95 % interval"),
    ("n_samples", "rows"),
)


@dataclass(frozen=True)
class PipelinePage:
    """What the page tells.

    Attributes:
        request: What was asked, with everything resolved.
        latency_ms: The limit on latency, or None.
        target: The target.
        model_uri: The registered int8 model.
        steps: Of each step: name, run_id, url, reused, seconds.
        data: What is known of the images, by name.
        training: (step, percent) by metric of the supernet's evaluation.
        measurements: The samples.
        predictors: Fitted to them.
        front: Of the predictors.
        architecture: The found network.
        quantization: Metrics of the quantization.
        classes: Of each class of the int8 file: label, images, recall, precision, f1, taken_for.
        finetuning: ``inherited_top1`` and ``finetuned_top1`` in percent, or None when it was not asked for.
        benchmark: Content of ``benchmark.json``, or None when nothing was measured.
        comparisons: Networks predicted and real, the found ones first.
        checks: For each found network whether one of these beats it on both measured figures, in a sentence.
        networks: Of each found network: limit_ms, model_uri, int8_top1, quantization_drop, size_bytes, latency_ms.
        agreement: How well these agree, by name.
        gates: Of each gate: gate, passed, text.
        stage: The stage asked for, or empty.
        refusal: Why promotion was refused, or empty.
        warnings: What a reader should know of the images.
    """

    request: Mapping[str, Any]
    latency_ms: float | None
    target: Target
    model_uri: str
    steps: Sequence[Mapping[str, Any]]
    data: Mapping[str, str]
    training: Mapping[str, Sequence[tuple[int, float]]]
    measurements: Sequence[Measurement]
    predictors: PredictorSet
    front: Front
    architecture: Architecture
    quantization: Mapping[str, float]
    finetuning: Mapping[str, Any] | None
    benchmark: Mapping[str, Any] | None
    comparisons: Sequence[Comparison]
    checks: Sequence[str]
    networks: Sequence[Mapping[str, Any]]
    agreement: Mapping[str, float]
    gates: Sequence[Mapping[str, Any]]
    stage: str
    refusal: str
    classes: Sequence[Mapping[str, Any]] = ()
    warnings: Sequence[str] = ()


def write_pipeline_report(path: Path, page: PipelinePage) -> None:
    """Write a self-contained page.

    Args:
        path: File to write.
        page: What it tells.
    """
    sections = [
        *([("A network for each latency", _networks(page))] if len(page.networks) > 1 else []),
        ("Predicted against real", _comparison(page)),
        ("Front, samples and the found network", plot("front", _front_figure(page))),
        ("The network", network_drawing(page.predictors, page.architecture)),
        ("Quantization", _quantization(page.quantization) + _classes(page.classes) + _finetuning(page.finetuning)),
        ("Latency on the device", _latency(page)),
        ("Gates", _gates(page)),
        ("Predictors", _predictors(page.predictors)),
        ("Data and supernet", _training(page)),
        ("Steps", _steps(page.steps)),
        (
            "What was asked",
            table(("parameter", "value"), [(k, str(v)) for k, v in page.request.items() if v not in ("", None, [])]),
        ),
    ]
    write_page(path, title=f"FOX-NAS pipeline for {page.target.name}", lead=_lead(page), sections=sections)


def _lead(page: PipelinePage) -> Markup:
    found, limit = page.comparisons[0], page.latency_ms
    sentence = fill(
        "From {images} images of <b>{source}</b> to <b>{model}</b>: <b>{found.accuracy:.2f} %</b> ± "
        "{found.standard_error:.2f} top-1 of the int8 file on {found.n_images:,} validation images",
        images=page.data["training images"],
        source=page.data["source"],
        model=page.model_uri,
        found=found,
    )
    latency = None if page.benchmark is None else float(page.benchmark["latency_ms_p50"])
    if latency is None or page.benchmark is None:
        sentence += fill(
            ", predicted to take at most <b>{:.4g} ms</b>; nothing was measured. ", found.predicted_latency_upper_ms
        )
    else:
        sentence += fill(" and <b>{:.4g} ms</b> median on {}", latency, page.benchmark["device"])
        if limit is not None:
            kept = "within" if latency <= limit else Markup("<b>above</b>")
            sentence += fill(", {} the limit of {:.4g} ms", kept, limit)
        sentence += ". "
    if len(page.networks) > 1:
        sentence += f"It is the first of {len(page.networks)} networks, one for each latency. "
    if page.refusal and all(gate["passed"] for gate in page.gates):
        return sentence + f"It was not promoted: {page.refusal}"
    if page.refusal:
        return sentence + fill("The gates refused <b>{}</b>.", page.stage)
    return sentence + (fill("It holds the stage <b>{}</b>.", page.stage) if page.stage else "It was not promoted.")


def _networks(page: PipelinePage) -> Markup:
    """The networks of several latencies side by side."""
    rows = []
    for network in page.networks:
        limit, latency = network["limit_ms"], network["latency_ms"]
        kept = "" if latency is None else "within" if latency <= limit else "above"
        rows.append(
            (
                f"{limit:.4g}",
                str(network["model_uri"]),
                f"{network['int8_top1']:.2f}",
                f"{network['quantization_drop']:.2f}",
                "not measured"
                if latency is None
                else f"{latency:.4g}, {kept}" + ("" if network["valid"] else " (not to be trusted)"),
                f"{network['size_bytes'] / 1024:,.1f}",
            )
        )
    header = ("at most, ms", "int8 model", "top-1, %", "lost by int8, points", "measured median, ms", "file, KiB")
    return table(header, rows) + Markup("<p>What follows tells of the first one where it tells of one.</p>")


def _comparison(page: PipelinePage) -> Markup:
    rows, n_found = page.comparisons, len(page.networks)
    roles = [row.role for row in rows]
    if n_found > 1:
        roles[:n_found] = [f"found, {network['limit_ms']:.4g} ms" for network in page.networks]
    cells = [
        (
            role,
            f"{row.architecture.image_size}",
            f"{row.predicted_accuracy:.2f}",
            f"{row.accuracy:.2f} ± {row.standard_error:.2f}",
            f"{row.accuracy - row.predicted_accuracy:+.2f}",
            f"{row.predicted_latency_ms:.4g} (at most {row.predicted_latency_upper_ms:.4g})",
            "not measured"
            if row.latency_ms is None
            else f"{row.latency_ms:.4g}" + ("" if row.latency_valid else " (not to be trusted)"),
            "" if row.latency_ms is None else f"{100 * (row.predicted_latency_ms / row.latency_ms - 1):+.1f} %",
        )
        for role, row in zip(roles, rows, strict=True)
    ]
    header = ("network", "px", "predicted %", "int8 %", "points", "predicted ms", "measured ms", "predicted is off by")
    plots = plot(
        "accuracies", _identity([(r.predicted_accuracy, r.accuracy) for r in rows], n_found, "accuracy (top-1, %)"), 320
    )
    timed = [(r.predicted_latency_ms, r.latency_ms) for r in rows if r.latency_ms is not None]
    if timed:
        plots = plot("latencies", _identity(timed, n_found, "latency (ms)"), 320) + plots
    checks = [
        check if len(page.checks) == 1 else f"At most {network['limit_ms']:.4g} ms: {check}"
        for network, check in zip(page.networks, page.checks, strict=True)
    ]
    told = fill("<p><b>{}</b></p><p>{}</p>", Markup("<br>").join(checks), _agreement(page))
    return told + table(header, cells) + fill('<div class="pair">{}</div>', plots)


def _agreement(page: PipelinePage) -> str:
    values, n = page.agreement, len(page.comparisons)
    parts = []
    for name, unit, error in (("latency", "%", "latency_mape"), ("accuracy", "points", "accuracy_mean_error")):
        if error not in values:
            continue
        tau = values.get(f"{name}_kendall_tau")
        ranks = "ranks cannot be compared" if tau is None else f"Kendall's tau {tau:.2f}"
        parts.append(f"{name}: {ranks}, mean error {values[error]:.3g} {unit}")
    if "upper_bound_kept" in values:
        n_timed = sum(row.trusted_latency_ms is not None for row in page.comparisons)
        kept = round(values["upper_bound_kept"] * n_timed)
        confidence = float(page.request["confidence"])
        parts.append(f"{kept} of {n_timed} networks stay within their upper latency bound (confidence {confidence:g})")
    if "constraint_met" in values:
        met = "meets" if values["constraint_met"] else "misses"
        parts.append(f"the found network {met} the constraint")
    caution = (
        "Predicted accuracy is that of the float subnet with shared weights; networks of a front differ by less than "
        "the standard errors of few validation images can tell apart."
    )
    return f"{n} networks: " + "; ".join(parts) + f". {caution}"


def _identity(pairs: Sequence[tuple[float, float]], n_found: int, what: str) -> dict[str, Any]:
    """Real against predicted, the found ones first, with the line on which they are equal."""
    values = np.array(pairs)
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low or abs(high) or 1.0)
    ends = [low - margin, high + margin]
    data = [
        {"x": ends, "y": ends, "mode": "lines", "name": "equal", "line": {"color": _GREY, "dash": "dash", "width": 1}},
        scatter(values[n_found:, 0], values[n_found:, 1], "front", BLUE, 8),
        scatter(values[:n_found, 0], values[:n_found, 1], "found", RED, 11),
    ]
    return {"data": data, "layout": axes_layout(f"predicted {what}", f"real {what}")}


def _front_figure(page: PipelinePage) -> dict[str, Any]:
    rows = [m for m in page.measurements if m.latency_ms is not None and m.accuracy is not None]
    front, n_found = page.front, len(page.networks)
    real = [(c.latency_ms or c.predicted_latency_ms, c.accuracy) for c in page.comparisons]
    accuracies = [*front.accuracy, *(m.accuracy for m in rows if m.accuracy is not None), *(a for _, a in real)]
    data = [
        scatter([m.latency_ms for m in rows], [m.accuracy for m in rows], "samples", _GREY, 5),
        scatter(front.latency_ms, front.accuracy, "front, predicted", BLUE, 4),
        scatter([x for x, _ in real[n_found:]], [y for _, y in real[n_found:]], "front, real", GREEN, 9),
        scatter([x for x, _ in real[:n_found]], [y for _, y in real[:n_found]], "found, real", RED, 13),
    ]
    limits = [network["limit_ms"] for network in page.networks if network["limit_ms"] is not None]
    for limit in limits:
        data.append(
            {
                "x": [limit, limit],
                "y": [float(min(accuracies)), float(max(accuracies))],
                "mode": "lines",
                "name": f"limit {limit:.4g} ms",
                "line": {"color": RED, "dash": "dash", "width": 1},
            }
        )
    data[3]["marker"]["symbol"] = "star"
    layout = axes_layout("latency (ms)", "top-1 (%)")
    latencies = [*front.latency_ms, *(m.latency_ms for m in rows if m.latency_ms is not None), *(x for x, _ in real)]
    if max(latencies) > 10 * min(latencies):
        # The front is at the fast end, which a few slow samples would press to a line.
        layout["xaxis"] |= {"type": "log", "dtick": "D2"}
    return {"data": data, "layout": layout}


def _quantization(metrics: Mapping[str, float]) -> Markup:
    rows = [
        ("float top-1", f"{metrics['accuracy/float_top1']:.2f} %"),
        ("int8 top-1", f"{metrics['accuracy/int8_top1']:.2f} %"),
        *held_out(metrics),
        *_by_class(metrics),
        *_rejection(metrics),
        ("drop", f"{metrics['accuracy/quantization_drop']:.2f} points"),
        ("file", f"{metrics['model/size_bytes'] / 1024:,.1f} KiB"),
        ("parameters", f"{metrics['model/params']:,.0f}"),
        ("multiply-accumulates", f"{metrics['model/macs']:,.0f}"),
    ]
    return table(("int8 file", ""), rows)


def _rejection(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """When the file answers none of its classes; none of runs of earlier releases."""
    if "rejection/threshold" not in metrics:
        return []
    threshold, n = metrics["rejection/threshold"], metrics["rejection/n_negatives"]
    if not n:
        return [("none of these", "nothing is rejected: no image was answered wrongly")]
    return [
        (
            "none of these",
            f"below {confidence_words(threshold)} confidence, temperature {metrics['rejection/temperature']:.2f}",
        ),
        ("of right answers pass", f"{100 * metrics['rejection/accepted']:.1f} %"),
        ("of what should be rejected pass", f"{100 * metrics['rejection/false_accept']:.1f} % of {n:.0f}"),
    ]


def _by_class(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Figures that a frequent class cannot make look good; none of runs of earlier releases."""
    if "eval/balanced_accuracy_int8" not in metrics:
        return []
    majority, top1 = metrics["eval/majority_share"], metrics["accuracy/int8_top1"]
    said = ": the int8 file is no better" if top1 <= majority else ""
    return [
        ("int8, mean of the classes", f"{metrics['eval/balanced_accuracy_int8']:.2f} %"),
        ("always the most frequent class", f"{majority:.2f} % top-1{said}"),
    ]


def _classes(rows: Sequence[Mapping[str, Any]]) -> Markup:
    """The classes of the int8 file, the worst first."""
    if not rows:
        return Markup()
    shown = sorted(rows, key=lambda row: (row["recall"] is None, row["recall"] or 0.0))[:_MOST_CLASSES]
    cells = [
        (
            str(row["label"]),
            str(row["images"]),
            *("" if row[figure] is None else f"{row[figure]:.1f}" for figure in ("recall", "precision", "f1")),
            str(row["taken_for"]),
        )
        for row in shown
    ]
    more = fill("<p>and {} better ones.</p>", len(rows) - len(shown)) if len(rows) > len(shown) else ""
    return table(("class", "images", "recall, %", "precision, %", "F1, %", "most often taken for"), cells) + more


def _finetuning(alone: Mapping[str, Any] | None) -> Markup:
    if alone is None:
        return Markup()
    before, after = float(alone["inherited_top1"]), float(alone["finetuned_top1"])
    used = "Its own weights" if after > before else "The shared weights"
    return fill(
        "<p>Trained alone from its shared weights the float network reaches {after:.2f} % in place of {before:.2f} %: "
        "{more:+.2f} points. {used} were quantized; predictions are of shared weights.</p>",
        after=after,
        before=before,
        more=after - before,
        used=used,
    )


def _latency(page: PipelinePage) -> Markup:
    if page.benchmark is None:
        return Markup("<p>Nothing was measured: no device was given. Latencies are those of the cost model.</p>")
    limit = "none" if page.latency_ms is None else f"at most {page.latency_ms:.4g} ms"
    drawn = facts(page.benchmark, {"limit": limit}) + single_runs(page.benchmark)
    return drawn + (fill("<h3>Under load</h3>{}", under_load(page.benchmark)) if page.benchmark.get("windows") else "")


def _gates(page: PipelinePage) -> Markup:
    refused = fill("<p><b>Refused.</b> {}</p>", page.refusal) if page.refusal else Markup()
    if not page.gates:
        return refused or Markup("<p>No gate was asked: promotion needs a measured latency and a stage.</p>")
    rows = [(str(g["gate"]), "pass" if g["passed"] else "FAIL", str(g["text"])) for g in page.gates]
    return refused + table(("gate", "", "what it saw"), rows)


def _predictors(predictors: PredictorSet) -> Markup:
    rows = []
    for name, group in (("accuracy", predictors.accuracy), ("latency", predictors.latency)):
        for predictor in group:
            sizes = ", ".join(map(str, predictor.fitted_sizes))
            values = [f"{predictor.metrics[k]:.4g}" if k in predictor.metrics else "" for k, _ in _METRICS]
            rows.append((name, predictor.formula, sizes, *values))
    return table(("predictor", "formula", "px", *(label for _, label in _METRICS)), rows)


def _images(data: Mapping[str, str], warnings: Sequence[str]) -> Markup:
    facts = table(("images", ""), list(data.items()))
    if not warnings:
        return facts
    return facts + fill("<ul>{}</ul>", Markup().join(fill("<li>{}</li>", warning) for warning in warnings))


def _training(page: PipelinePage) -> Markup:
    facts = _images(page.data, page.warnings)
    if not page.training:
        return facts + Markup("<p>The supernet was given; its own run tells of its training.</p>")
    data = [
        {
            "x": [step for step, _ in page.training[key]],
            "y": [round(value, 3) for _, value in page.training[key]],
            "mode": "lines+markers",
            "name": name,
        }
        for key, name in _SERIES.items()
    ]
    return facts + plot("training", {"data": data, "layout": axes_layout("training step", "top-1 (%)")}, 320)


def _steps(steps: Sequence[Mapping[str, Any]]) -> Markup:
    rows = [
        (
            str(step["name"]),
            "found from before" if step["reused"] else f"{step['seconds']:.0f} s",
            link(str(step["url"]), str(step["run_id"])),
        )
        for step in steps
    ]
    return table(("step", "time", "run"), rows)
