"""Tables and plots of a fitted predictor, as files (contract: ``predictor/{accuracy|latency}/``)."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foxnas_mlflow.core.errors import import_or_raise
from foxnas_mlflow.core.predictors import FitReport, marginal_effects
from foxnas_mlflow.core.searchers import Front, SearchOutcome

_UNITS = {"accuracy": "accuracy (top-1, %)", "latency_ms": "latency (ms)"}
_BLUE, _GREY, _RED = "#1f5fa8", "#8a8f98", "#c0392b"


def write_predictor_files(report: FitReport, paper: FitReport | None, directory: Path) -> None:
    """Write summary.txt, summary.csv, coefficients.json and the plots of one predictor.

    Args:
        report: The chosen formula's fit.
        paper: Equation 2's fit, shown beside it, if there is one.
        directory: An existing directory.
    """
    text = report.summary
    if paper is not None and paper.predictor.formula != report.predictor.formula:
        text += "\n\nFor comparison, equation 2 of the paper:\n\n" + paper.summary
    (directory / "summary.txt").write_text(text, encoding="utf-8")
    with (directory / "summary.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=["formula", *report.table[0]])
        writer.writeheader()
        for which in (report, paper):
            if which is not None:
                writer.writerows({"formula": which.predictor.formula, **row} for row in which.table)
    (directory / "coefficients.json").write_text(json.dumps(report.predictor.to_dict(), indent=1), encoding="utf-8")
    _residuals(report, directory / "residuals.png")
    _qq(report, directory / "qq.png")
    _observed(report, paper, directory / "observed.png")
    _effects(report, directory / "effects.png")


def draw_front(front: Front, found: Sequence[SearchOutcome], path: Path) -> None:
    """Draw the front and the networks found on it as a picture for pages that show one.

    Args:
        front: The front.
        found: The networks, with the limits that they were found under.
        path: PNG file to write.
    """
    figure, axis = _figure(6, 3.5)
    axis.plot(front.latency_ms, front.accuracy, ".", color=_BLUE, markersize=3, label="front, predicted")
    for outcome in found:
        if outcome.latency_limit_ms is not None:
            axis.axvline(outcome.latency_limit_ms, color=_GREY, linestyle="--", linewidth=1)
        axis.plot(outcome.latency_ms, outcome.accuracy, "*", color=_RED, markersize=13)
    axis.set(xlabel="latency (ms)", ylabel="accuracy (top-1, %)")
    figure.savefig(path)


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    import_or_raise("matplotlib", extra="fit", feature="plots of predictors")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns)
    for axis in np.atleast_1d(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _residuals(report: FitReport, path: Path) -> None:
    figure, (left, right) = _figure(10, 4, 2)
    unit = _UNITS.get(report.predictor.quantity, report.predictor.quantity)
    left.scatter(report.fitted, report.residuals, s=12, color=_BLUE, alpha=0.7)
    left.axhline(0, color=_RED, linewidth=1)
    left.set(xlabel=f"fitted {unit}", ylabel="standardised residual", title="Residuals")
    right.scatter(report.leverage, report.residuals, s=12, color=_BLUE, alpha=0.7)
    mean = report.leverage.mean()
    right.axvline(2 * mean, color=_GREY, linestyle="--", linewidth=1, label="twice the mean leverage")
    right.set(xlabel="leverage", ylabel="standardised residual", title="Leverage")
    right.legend(frameon=False)
    figure.savefig(path)


def _qq(report: FitReport, path: Path) -> None:
    from scipy.stats import norm

    figure, axis = _figure(5, 5)
    n = len(report.residuals)
    theory = norm.ppf((np.arange(1, n + 1) - 0.375) / (n + 0.25))
    axis.scatter(theory, np.sort(report.residuals), s=12, color=_BLUE, alpha=0.7)
    ends = np.array([theory[0], theory[-1]])
    axis.plot(ends, ends, color=_RED, linewidth=1)
    axis.set(xlabel="normal quantile", ylabel="standardised residual", title="Normal Q-Q")
    figure.savefig(path)


def _observed(report: FitReport, paper: FitReport | None, path: Path) -> None:
    figure, axis = _figure(5.5, 5)
    unit = _UNITS.get(report.predictor.quantity, report.predictor.quantity)
    shown = [(paper, _GREY)] if paper is not None and paper.predictor.formula != report.predictor.formula else []
    for which, colour in [*shown, (report, _BLUE)]:
        label = f"{which.predictor.formula}: RMSE {which.metrics['cv_rmse']:.3g}"
        axis.scatter(which.cv_predicted, which.observed, s=12, color=colour, alpha=0.7, label=label)
    low, high = report.observed.min(), report.observed.max()
    axis.plot([low, high], [low, high], color=_RED, linewidth=1)
    axis.set(xlabel=f"predicted out of fold, {unit}", ylabel=f"observed {unit}", title="Observed against predicted")
    axis.legend(frameon=False)
    figure.savefig(path)


def _effects(report: FitReport, path: Path) -> None:
    effects = marginal_effects(report.predictor)
    figure, axis = _figure(8, 0.32 * len(effects) + 1.4)
    y = np.arange(len(effects))[::-1]
    axis.errorbar(
        [e.delta for e in effects],
        y,
        xerr=[e.margin for e in effects],
        fmt="o",
        color=_BLUE,
        ecolor=_BLUE,
        markersize=4,
        capsize=2,
    )
    axis.axvline(0, color=_GREY, linewidth=1)
    axis.set_yticks(y, [e.label for e in effects])
    quantity = report.predictor.quantity
    unit = {"accuracy": "points of top-1", "latency_ms": "ms"}.get(quantity, quantity)
    axis.set(xlabel=f"change of the prediction ({unit}), 95 % interval", title="Effects of edits on a middle network")
    figure.savefig(path)
