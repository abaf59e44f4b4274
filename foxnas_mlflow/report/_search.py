"""The page of a search: what was asked, what was found, why, and how sure that is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.options import encode
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet, marginal_effects
from foxnas_mlflow.core.searchers import (
    Candidate,
    Front,
    Round,
    SearchOutcome,
    SearchResult,
    accuracy_signal,
    describe_limits,
    rank_edits,
    spoken,
    spoken_unit,
    value_edits,
)
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.report._page import BLUE, GREEN, ORANGE, RED, axes_layout, fill, plot, scatter, table, write_page

_TERM_NAMES = {
    "pw": "dense convolutions",
    "array": "dense layers on the array",
    "depthwise": "depthwise convolutions: arithmetic",
    "depthwise_out": "depthwise convolutions: writing",
    "link": "image, scores and weights over the link",
    "dw": "depthwise convolutions: arithmetic",
    "dw_in": "depthwise convolutions: reading",
    "dw_wide": "depthwise convolutions: kernels too wide for the fast code",
    "act": "writing activations",
    "se": "squeeze-excite gates: scaling",
    "se_fc": "squeeze-excite gates: inner layers",
    "res": "residual adds",
    "layers": "starts of layers",
    "gates": "starts of squeeze-excite gates",
    "const": "fixed overhead",
}
_SIZE_COLOURS = (BLUE, GREEN, "#7b5ea7", ORANGE, "#8a8f98")
_COLOURS = {"annealing": BLUE, "annealing-unguided": "#7fb0e0", "evolution": ORANGE, "random": "#8a8f98"}


def write_search_report(
    path: Path,
    *,
    outcome: SearchOutcome,
    comparisons: Sequence[SearchResult],
    request: Mapping[str, Any],
    target: Target,
    measurements: Sequence[Measurement] = (),
    candidates: Sequence[Candidate] = (),
    reason: str = "",
    rounds: Sequence[tuple[Round, Candidate]] = (),
    ended: str = "",
) -> None:
    """Write a self-contained interactive page.

    Args:
        path: File to write.
        outcome: The search.
        comparisons: All searchers under one common budget.
        request: What was asked: confidence, seed, predictors and the rest.
        target: The target.
        measurements: Measured rows to draw beside the front.
        candidates: Networks that a device or a supernet looked at; one of them is chosen.
        reason: Why it was chosen, in one sentence.
        rounds: The rounds of the search, each with the network that it chose.
        ended: Why there was no further round.
    """
    predictors = outcome.objective.predictors
    latency = predictors.of("latency_ms", outcome.architecture.image_size)
    accuracy = predictors.of("accuracy", outcome.architecture.image_size)
    sections = [
        (
            "Latency against accuracy",
            _front_note(outcome) + plot("front", _front_figure(outcome, measurements, candidates)),
        ),
        ("Limits", _limits_table(outcome)),
        *([("Predicted and measured", _candidates_table(candidates))] if candidates else []),
        *([("Rounds", _rounds_table(rounds, ended))] if len(rounds) > 1 else []),
        *_searching(outcome, comparisons),
        ("The network", network_drawing(predictors, outcome.architecture)),
    ]
    if latency.recipe.any_size:
        shares = latency_shares(latency, outcome.architecture)
        sections.append(("Where the milliseconds go", plot("shares", _shares_figure(shares), height=320)))
    sections += [
        ("What an edit does to this network", _edits_table(outcome)),
        ("Effects on a middle network", _effects_table(accuracy, "points") + _effects_table(latency, "ms")),
        ("Predictors", _regression(accuracy) + _regression(latency)),
        ("Provenance and limits", _provenance(outcome, request, target, candidates)),
    ]
    write_page(
        path,
        title=f"FOX-NAS search for {target.name}",
        lead=_sentence(outcome, target, candidates, reason),
        sections=sections,
    )


def latency_shares(latency: LinearPredictor, architecture: Architecture) -> dict[str, float]:
    """Predicted milliseconds of each cost term and the constant; they sum to the prediction."""
    x = latency.design([architecture])[0]
    return {name: float(v) for name, v in zip(latency.columns, x * latency.coefficients, strict=True)}


def stage_latencies(latency: LinearPredictor, architecture: Architecture) -> tuple[float, list[float]]:
    """Predicted milliseconds of stem, tail and constant together, and of each stage; they sum to the prediction."""
    space, size = latency.space, architecture.image_size
    constant = float(latency.recipe.constant(space, size) @ latency.coefficients)
    stages = []
    for j, kinds in enumerate(encode(space, [architecture])[0]):
        columns, values = latency.recipe.stage(space, j, kinds[None], size)
        stages.append(float(values[0] @ latency.coefficients[columns]))
    return constant, stages


def write_searches_report(
    path: Path,
    *,
    outcomes: Sequence[SearchOutcome],
    chosen: Sequence[Candidate | None],
    request: Mapping[str, Any],
    target: Target,
) -> None:
    """Write the page of several networks of one front, found under one latency each.

    Args:
        path: File to write.
        outcomes: The searches.
        chosen: What a device or a supernet said of each network, or None.
        request: What was asked.
        target: The target.
    """
    rows = []
    for outcome, candidate in zip(outcomes, chosen, strict=True):
        timing = None if candidate is None else candidate.timing
        known = None if candidate is None else candidate.accuracy
        rows.append(
            (
                describe_limits(outcome.limits),
                f"{outcome.architecture.image_size}",
                f"{_ms(outcome.latency_ms)} (at most {_ms(outcome.latency_upper_ms)})",
                "" if timing is None else _ms(timing.latency_ms),
                f"{outcome.accuracy:.2f}",
                "" if known is None or candidate is None else f"{known:.2f} ± {candidate.standard_error:.2f}",
                f"{outcome.latency_limit_ms:g}ms/report.html",
            )
        )
    header = ("asked for", "px", "predicted ms", "measured ms", "predicted %", "evaluated %", "its page")
    # Columns of what was not looked at are left out.
    kept = [i for i in range(len(header)) if any(row[i] for row in rows)]
    networks = table([header[i] for i in kept], [[row[i] for i in kept] for row in rows])
    front = outcomes[0].front
    stars = scatter([o.latency_ms for o in outcomes], [o.accuracy for o in outcomes], "found", RED, 13)
    stars["marker"]["symbol"] = "star"
    data = [*_front_lines(front), stars]
    figure = {"data": data, "layout": axes_layout("predicted latency (ms)", "predicted accuracy (top-1, %)")}
    parameters = [(str(k), str(v)) for k, v in request.items() if v not in ("", None, [])]
    write_page(
        path,
        title=f"FOX-NAS searches for {target.name}",
        lead=fill(
            "{}{} networks for <b>{}</b>, one for each latency that was asked for. The page of each is in a directory "
            "beside this one.",
            _warning(outcomes[0]),
            len(outcomes),
            target.name,
        ),
        sections=[
            ("The networks", networks),
            ("Latency against accuracy", plot("front", figure)),
            ("What was asked", table(("parameter", "value"), parameters)),
        ],
    )


def _sentence(outcome: SearchOutcome, target: Target, candidates: Sequence[Candidate], reason: str) -> Markup:
    optimum, problem = outcome.optimum, outcome.problem
    sizes = ", ".join(map(str, outcome.objective.image_sizes))
    best = "better within these limits"
    if optimum.least is not None:
        best = f"to have less {problem.goal} at {problem.min_accuracy:g} %"
        best += " within the limits" if problem.limits else ""
    what = f"{optimum.accuracy:.2f} %" if optimum.least is None else f"{optimum.least:.4g} {problem.goal}"
    if optimum.proof_gap > 0:
        unit = "points" if optimum.least is None else problem.goal
        proof = f"The proof leaves {optimum.proof_gap:.4g} {unit} open."
    elif not candidates or outcome.architecture == optimum.architecture:
        proof = f"No network of the space at {sizes} px is predicted {best}: the optimum is proven."
    else:
        # What was evaluated or measured decided; the proof is of the predictions.
        proof = (
            f"Another network is predicted best, of {what}, and none of the space at {sizes} px is predicted {best}: "
            "that is proven. What was looked at decided between them."
        )
    return fill(
        "{warning}Asked for: <b>{problem}</b> on <b>{target}</b> at confidence {confidence:g}. Found: a network of "
        "<b>{accuracy:.2f} %</b> predicted top-1 and <b>{latency} ms</b> predicted latency (at most {upper} ms) at "
        "{size} px. {proof} {found_out}",
        warning=_warning(outcome),
        problem=problem,
        target=target.name,
        confidence=outcome.objective.confidence,
        accuracy=outcome.accuracy,
        latency=_ms(outcome.latency_ms),
        upper=_ms(outcome.latency_upper_ms),
        size=outcome.architecture.image_size,
        proof=proof,
        found_out=_found_out(candidates, reason),
    )


def _warning(outcome: SearchOutcome) -> Markup:
    """What is said before anything else: that accuracy predictors know nothing, where they do not."""
    signal = accuracy_signal(outcome.objective.predictors)
    return Markup() if signal is None or not signal.absent else fill("<b>Beware: {}.</b> ", signal)


def _found_out(candidates: Sequence[Candidate], reason: str) -> Markup:
    """What of a search is not prediction."""
    if not candidates:
        return Markup("All figures are predictions; nothing here was measured.")
    chosen = next(c for c in candidates if c.chosen)
    parts = []
    if chosen.timing is not None:
        emulated = " (emulated: no real time)" if chosen.timing.emulated else ""
        parts.append(
            fill("<b>{} ms</b> measured on {}{}", _ms(chosen.timing.latency_ms), chosen.timing.device, emulated)
        )
    if chosen.accuracy is not None:
        parts.append(
            fill("<b>{:.2f} %</b> ± {:.2f} evaluated with the supernet", chosen.accuracy, chosen.standard_error)
        )
    return fill(
        "It was chosen among {} networks that were looked at: {}.{}",
        len(candidates),
        Markup(" and ").join(parts),
        f" Why this one: {reason}." if reason else "",
    )


def _limits_table(outcome: SearchOutcome) -> Markup:
    """Every limit with the network's amount, what it costs, and what more of it would buy."""
    prices = {price.limit: price for price in outcome.prices}
    rows = []
    for limit in outcome.limits:
        price = prices.get(limit)
        binding = ""
        if price is not None:
            binding = f"binds, costs {price.lost:.2f} points" if price.binds else "does not bind"
        rows.append(
            (
                limit.quantity,
                spoken(limit.value),
                f"{outcome.amount_words(limit)} ({100 * outcome.amounts[limit.quantity] / limit.value:.0f} %)",
                binding,
                price.buys() if price is not None and price.binds else "",
            )
        )
    if outcome.problem.min_accuracy is not None:
        accuracy = f"at least {outcome.problem.min_accuracy:g} %"
        rows.append(("accuracy", accuracy, f"{outcome.accuracy:.2f} % predicted", "", ""))
    header = ("quantity", "limit", "this network", "at the optimum", "more of it")
    level = outcome.objective.level
    text = ""
    binding_prices = sorted((price for price in outcome.prices if price.binds), key=lambda price: -price.lost)
    if len(binding_prices) > 1:
        text = f" {binding_prices[0].limit.quantity} costs most."
    if level != outcome.objective.confidence:
        text += f" Each predicted bound is taken at {level:.4g}, so that they hold together."
    told = "Prices are those of the exact optimum: what it would gain without the limit, and with a little more of it."
    return fill("<p>{}{}</p>", told, text) + table(header, rows)


def _rounds_table(rounds: Sequence[tuple[Round, Candidate]], ended: str) -> Markup:
    """What each round learnt from, looked at and chose."""
    rows = [
        (
            f"{number}",
            f"{done.n_rows}",
            "" if done.kendall_tau is None else f"{done.kendall_tau:.2f}",
            f"{done.n_new}",
            f"{chosen.predicted_accuracy:.2f}",
            "" if chosen.accuracy is None else f"{chosen.accuracy:.2f} ± {chosen.standard_error:.2f}",
            _ms(chosen.predicted_latency_ms),
            "" if chosen.timing is None else _ms(chosen.timing.latency_ms),
        )
        for number, (done, chosen) in enumerate(rounds, start=1)
    ]
    header = (
        "round",
        "rows learnt from",
        "tau (accuracy)",
        "new networks looked at",
        "chosen: predicted %",
        "evaluated %",
        "predicted ms",
        "measured ms",
    )
    return fill("<p>The last round was the last because {}.</p>", ended) + table(header, rows)


def _candidates_table(candidates: Sequence[Candidate]) -> Markup:
    rows = []
    for c in sorted(candidates, key=lambda c: (not c.chosen, not c.meets, [-r for r in c.rank])):
        measured, ratio = "", ""
        if c.timing is not None:
            measured = _ms(c.timing.latency_ms) + (" (not to be trusted)" if c.timing.problems else "")
            ratio = f"{100 * (c.timing.latency_ms / c.predicted_latency_ms - 1):+.1f} %"
        evaluated, gap = "", ""
        if c.accuracy is not None:
            evaluated = f"{c.accuracy:.2f} ± {c.standard_error:.2f}"
            gap = f"{c.accuracy - c.predicted_accuracy:+.2f}"
        state = "chosen" if c.chosen else "meets" if c.meets else "misses"
        rows.append(
            (
                state,
                c.origin,
                f"{c.architecture.image_size}",
                f"{_ms(c.predicted_latency_ms)} (at most {_ms(c.predicted_latency_upper_ms)})",
                measured,
                ratio,
                f"{c.predicted_accuracy:.2f}",
                evaluated,
                gap,
            )
        )
    header = (
        "constraint",
        "where from",
        "px",
        "predicted ms",
        "measured ms",
        "difference",
        "predicted %",
        "evaluated %",
        "points",
    )
    return table(header, rows)


def _front_lines(front: Front) -> list[dict[str, Any]]:
    """The exact front, a colour for each image size."""
    return [
        scatter(front.latency_ms[on], front.accuracy[on], f"exact front, {size} px", colour, 4)
        for size, colour in zip(
            sorted({int(s) for s in front.image_size}), itertools.cycle(_SIZE_COLOURS), strict=False
        )
        if (on := front.image_size == size).any()
    ]


def _front_note(outcome: SearchOutcome) -> Markup:
    """Why a network lies below the front, where other limits than latency keep it there."""
    others = [limit for limit in outcome.limits if limit.quantity != "latency_ms"]
    if not others:
        return Markup()
    return fill("<p>The front is that of latency and accuracy alone; it does not know {}.</p>", describe_limits(others))


def _front_figure(
    outcome: SearchOutcome,
    measurements: Sequence[Measurement],
    candidates: Sequence[Candidate],
) -> dict[str, Any]:
    front = outcome.front
    data: list[dict[str, Any]] = []
    rows = [m for m in measurements if m.latency_ms is not None and m.accuracy is not None]
    if rows:
        data.append(
            scatter([m.latency_ms for m in rows], [m.accuracy for m in rows], "measured networks", "#b9bec7", 5)
        )
    data += _front_lines(front)
    looked = [c for c in candidates if c.timing is not None or c.accuracy is not None]
    if looked:
        data.append(
            scatter(
                [c.predicted_latency_ms if c.timing is None else c.timing.latency_ms for c in looked],
                [c.predicted_accuracy if c.accuracy is None else c.accuracy for c in looked],
                "measured or evaluated",
                "#1d2430",
                8,
            )
        )
    low = float(front.accuracy.min())
    high = float(front.accuracy.max())
    data.append(
        {
            "x": [outcome.latency_ms],
            "y": [outcome.accuracy],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": [outcome.latency_upper_ms - outcome.latency_ms],
                "arrayminus": [0],
            },
            "mode": "markers",
            "name": "found",
            "marker": {"size": 13, "symbol": "star", "color": RED},
        }
    )
    limit = outcome.latency_limit_ms
    if limit is not None:
        data.append(
            {
                "x": [limit, limit],
                "y": [low, high],
                "mode": "lines",
                "name": f"limit {limit:g} ms",
                "line": {"color": RED, "dash": "dash", "width": 1},
            }
        )
    return {"data": data, "layout": axes_layout("predicted latency (ms)", "predicted accuracy (top-1, %)")}


def _searching(outcome: SearchOutcome, comparisons: Sequence[SearchResult]) -> list[tuple[str, str]]:
    """The chart of the searchers, if any; traces are of accuracy: none where something else was to be best."""
    if outcome.problem.goal != "accuracy" or not comparisons:
        return []
    return [("Searching: best so far against evaluations", plot("trace", _trace_figure(outcome, comparisons)))]


def _trace_figure(outcome: SearchOutcome, comparisons: Sequence[SearchResult]) -> dict[str, Any]:
    data: list[dict[str, Any]] = []
    for result in comparisons:
        x = [p.evaluation for p in result.trace] + [result.evaluations]
        y = [p.best_accuracy for p in result.trace] + [result.accuracy]
        data.append(
            {
                "x": x,
                "y": y,
                "mode": "lines",
                "name": result.algorithm,
                "line": {"shape": "hv", "color": _COLOURS.get(result.algorithm, "#444")},
            }
        )
    top = outcome.optimum.accuracy
    span = [1, max(r.evaluations for r in comparisons)]
    data.append(
        {
            "x": span,
            "y": [top, top],
            "mode": "lines",
            "name": "exact optimum",
            "line": {"color": RED, "dash": "dash", "width": 1},
        }
    )
    layout = axes_layout("evaluations of the predictors", "best predicted accuracy (%)")
    layout["xaxis"]["type"] = "log"
    start = min((r.trace[0].best_accuracy for r in comparisons if r.trace), default=top - 1)
    layout["yaxis"]["range"] = [max(start, top - 4), top + 0.2]
    return {"data": data, "layout": layout}


def _shares_figure(shares: Mapping[str, float]) -> dict[str, Any]:
    items = sorted(shares.items(), key=lambda item: item[1])
    data = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [value for _, value in items],
            "y": [_TERM_NAMES[name] for name, _ in items],
            "text": [f"{_ms(value)} ms" for _, value in items],
            "marker": {"color": BLUE},
        }
    ]
    layout = axes_layout("predicted milliseconds", "")
    layout["yaxis"]["automargin"] = True
    return {"data": data, "layout": layout}


def network_drawing(predictors: PredictorSet, architecture: Architecture) -> Markup:
    """Blocks as boxes: height shows the expansion ratio, width the kernel size."""
    space = predictors.space
    network = build_network(space, architecture)
    latency = predictors.of("latency_ms", architecture.image_size)
    constant, stage_ms = stage_latencies(latency, architecture)
    rows = []
    for j, (spec, stage) in enumerate(zip(space.stages, architecture.stages, strict=True), start=1):
        units = [u for u in network.units if u.stage == j]
        boxes = []
        x = 0
        for block in stage.blocks:
            width, height = 14 + 8 * block.kernel, 14 + 7 * block.expansion
            boxes.append(
                fill(
                    '<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="4"/>'
                    '<text x="{middle}" y="88">e{block.expansion} k{block.kernel}</text>',
                    x=x,
                    y=72 - height,
                    width=width,
                    height=height,
                    middle=x + width / 2,
                    block=block,
                )
            )
            x += width + 10
        rows.append(
            fill(
                '<div class="stage"><div><b>stage {width}</b> {block}, {depth} blocks, {first} &rarr; {last} px, {ms} '
                'ms</div><svg viewBox="0 0 {x} 94" width="{x}" height="94" role="img" aria-label="stage {width}">'
                "{boxes}</svg></div>",
                width=spec.width,
                block=spec.block.replace("_", "+"),
                depth=stage.depth,
                first=units[0].in_size,
                last=units[-1].out_size,
                ms=_ms(stage_ms[j - 1]),
                x=x,
                boxes=Markup().join(boxes),
            )
        )
    cost = network_cost(network)
    counts = (
        f"{cost.params / 1e6:.3g} M parameters, {cost.macs / 1e6:.3g} M multiply-accumulates, int8 parameters of "
        f"{cost.int8_size_bytes / 2**20:.2f} MiB, at most {cost.peak_activation_bytes / 2**10:.0f} KiB of int8 "
        "activations at once. Milliseconds are predicted; stem, head and fixed overhead take the other "
        f"{_ms(constant)}."
    )
    legend = "Height of a box: expansion ratio e. Width: kernel size k."
    return fill('<p>{}</p><p>{}</p><div class="stages">{}</div>', counts, legend, Markup().join(rows))


def _edits_table(outcome: SearchOutcome) -> Markup:
    digits = _digits(outcome.latency_ms)
    if outcome.problem.goal == "accuracy" and {limit.quantity for limit in outcome.limits} != {"latency_ms"}:
        return _edits_under_limits(outcome, digits)
    edits = rank_edits(outcome.objective.predictors, outcome.architecture)
    savings = [e for e in edits if e.delta_latency_ms < 0][:10]
    # A gain that costs no time ranks first.
    gains = sorted(
        (e for e in edits if e.delta_accuracy > 0), key=lambda e: -e.delta_accuracy / max(e.delta_latency_ms, 1e-9)
    )[:5]
    rows = [
        (
            e.description,
            _change(e.delta_accuracy, e.delta_accuracy_margin, 3),
            _change(e.delta_latency_ms, e.delta_latency_margin, digits),
            f"{e.delta_accuracy / e.delta_latency_ms:.4f}" if e.delta_latency_ms else "",
        )
        for e in (*savings, *gains)
    ]
    header = ("edit", "accuracy (points)", "latency (ms)", "points per ms")
    return Markup("<p>The ten cheapest savings, then the five best gains; 95 % intervals.</p>") + table(header, rows)


def _edits_under_limits(outcome: SearchOutcome, digits: int) -> Markup:
    """Edits by what they are worth: the accuracy that they bring less what they use of the limits at their prices."""
    known = value_edits(outcome)
    savings = [valued for valued in known if valued.edit.delta_accuracy <= 0][:10]
    gains = [valued for valued in known if valued.edit.delta_accuracy > 0][:5]
    others = [limit.quantity for limit in outcome.limits if limit.quantity != "latency_ms"]
    rows = [
        (
            valued.edit.description,
            _change(valued.edit.delta_accuracy, valued.edit.delta_accuracy_margin, 3),
            _change(valued.edit.delta_latency_ms, valued.edit.delta_latency_margin, digits),
            *(f"{valued.used[quantity] / spoken_unit(quantity)[0]:+,.4g}" for quantity in others),
            f"{valued.worth:+.3f}",
            "breaks " + ", ".join(valued.broken) if valued.broken else "all met",
        )
        for valued in (*savings, *gains)
    ]
    amounts = [f"{quantity.split('_bytes')[0]} ({spoken_unit(quantity)[1]})" for quantity in others]
    header = ("edit", "accuracy (points)", "latency (ms)", *amounts, "worth (points)", "limits")
    told = (
        "The ten savings and the five gains that are worth most: the accuracy that they bring less what they use of "
        "the limits at the prices above; 95 % intervals."
    )
    return fill("<p>{}</p>", told) + table(header, rows)


def _effects_table(predictor: LinearPredictor, unit: str) -> Markup:
    rows = [(e.label, _change(e.delta, e.margin, 3)) for e in marginal_effects(predictor)]
    return table((f"edit of all blocks of a stage, {predictor.main_size} px", unit), rows)


def _regression(predictor: LinearPredictor) -> Markup:
    from scipy.special import stdtr

    metrics = ", ".join(f"{k} {v:.4g}" for k, v in predictor.metrics.items())
    sizes = ", ".join(map(str, predictor.fitted_sizes))
    rows_of = f"fitted at {sizes} px" if sizes else "fitted to networks of another space"
    heading = f"{predictor.quantity}, {predictor.formula} formula, {rows_of}"
    if predictor.covariance is None:
        rows = [(c, f"{b:.5g}", "", "", "") for c, b in zip(predictor.columns, predictor.coefficients, strict=True)]
    else:
        errors = np.sqrt(np.diag(predictor.covariance))
        # Columns that the fit left out have a coefficient of exactly 0.
        t = predictor.coefficients / np.where(errors > 0, errors, np.inf)
        p = 2 * stdtr(predictor.dof, -np.abs(t))
        rows = [
            (c, f"{b:.5g}", f"{s:.2g}", f"{tt:.2f}", f"{pp:.2g}")
            for c, b, s, tt, pp in zip(predictor.columns, predictor.coefficients, errors, t, p, strict=True)
        ]
    scale = Markup()
    if predictor.ceiling is not None:
        scale = fill("<p>Linear scale z = -log({:g} - accuracy).</p>", predictor.ceiling)
    return fill(
        "<h3>{}</h3><p>{}</p>{}<details><summary>Coefficients</summary>{}</details>",
        heading,
        metrics,
        scale,
        table(("column", "coefficient", "standard error", "t", "p"), rows),
    )


def _provenance(
    outcome: SearchOutcome, request: Mapping[str, Any], target: Target, candidates: Sequence[Candidate]
) -> Markup:
    predictors = outcome.objective.predictors
    # The target's own note is of its cost model: predictors that a user fitted carry no notes.
    notes = [*predictors.notes]
    if not any(c.timing is not None for c in candidates):
        notes.append("Latency here is an estimate, not a measurement of this network: give device to measure it.")
    if not any(c.accuracy is not None for c in candidates):
        notes.append("The network has no weights yet: give supernet to extract and evaluate them.")
    origin = predictors.latency[0].provenance.get("source", "")
    rows = [(str(k), str(v)) for k, v in request.items() if v not in ("", None, [])]
    rows += [("measurements", str(origin)), ("found by", outcome.found_by)]
    certificate = outcome.certificate()["statement"]
    items = Markup().join(fill("<li>{}</li>", note) for note in notes)
    told = fill("<ul>{}</ul><p><b>Certificate.</b> {}.</p>", items, certificate)
    return told + table(("parameter", "value"), rows)


def _digits(latency_ms: float) -> int:
    """Decimals that show a thousandth of a latency, two at least."""
    return max(2, 2 - math.floor(math.log10(max(latency_ms, 1e-6))))


def _ms(latency_ms: float) -> str:
    return f"{latency_ms:.{_digits(abs(latency_ms))}f}"


def _change(delta: float, margin: float, digits: int) -> str:
    sure = "" if np.isnan(margin) else f" ± {margin:.{digits}f}"
    return f"{delta:+.{digits}f}{sure}"
