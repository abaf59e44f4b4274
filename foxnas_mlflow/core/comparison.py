"""Predicted against real: networks of a front with what was measured of them."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.searchers import Front
from foxnas_mlflow.core.space import SearchSpace


@dataclass(frozen=True, slots=True)
class Comparison:
    """One network, predicted and real.

    Attributes:
        architecture: The network.
        role: ``found`` or ``front``.
        predicted_accuracy: Top-1 in percent.
        predicted_latency_ms: Latency in ms.
        predicted_latency_upper_ms: Its upper bound at the confidence of the search.
        accuracy: Top-1 of the int8 file on validation images, in percent.
        n_images: Number of those images.
        latency_ms: Median on the device, or None when it was not measured there.
        latency_valid: Whether nothing spoke against that measurement.
    """

    architecture: Architecture
    role: str
    predicted_accuracy: float
    predicted_latency_ms: float
    predicted_latency_upper_ms: float
    accuracy: float
    n_images: int
    latency_ms: float | None = None
    latency_valid: bool = True

    @property
    def standard_error(self) -> float:
        """Of the accuracy, in percentage points."""
        share = self.accuracy / 100
        return 100 * math.sqrt(share * (1 - share) / self.n_images)


def spread_over(front: Front, n: int, *, without: Architecture) -> list[Architecture]:
    """Networks of a front, evenly spread over the logarithm of their predicted latency.

    Args:
        front: The front.
        n: How many; fewer where the front has fewer.
        without: Left out.
    """
    latency = np.log(front.latency_ms)
    chosen: list[Architecture] = []
    for wanted in np.linspace(latency[0], latency[-1], n):
        for i in np.argsort(np.abs(latency - wanted)):
            architecture = front.architecture(int(i))
            if architecture != without and architecture not in chosen:
                chosen.append(architecture)
                break
    return chosen


def agreement(rows: Sequence[Comparison], latency_ms: float | None) -> dict[str, float]:
    """How well predictions agree with what was measured.

    Args:
        rows: The networks; the found one first.
        latency_ms: The limit, or None.

    Returns:
        ``accuracy_kendall_tau``, ``accuracy_mean_error`` (points) and, where latencies were measured,
        ``latency_kendall_tau``, ``latency_mape`` (percent), ``upper_bound_kept`` (share of the
        networks within their predicted upper bound) and ``constraint_met`` (0 or 1, of the found
        one). A rank correlation is left out for fewer than three networks, or where all are equal.
    """
    metrics = {"accuracy_mean_error": float(np.mean([abs(r.accuracy - r.predicted_accuracy) for r in rows]))}
    metrics |= _tau("accuracy_kendall_tau", [(r.predicted_accuracy, r.accuracy) for r in rows])
    timed = [(r, r.latency_ms) for r in rows if r.latency_ms is not None]
    if timed:
        metrics |= _tau("latency_kendall_tau", [(r.predicted_latency_ms, real) for r, real in timed])
        metrics |= {
            "latency_mape": 100 * float(np.mean([abs(r.predicted_latency_ms / real - 1) for r, real in timed])),
            "upper_bound_kept": float(np.mean([real <= r.predicted_latency_upper_ms for r, real in timed])),
        }
    if rows[0].latency_ms is not None and latency_ms is not None:
        metrics["constraint_met"] = float(rows[0].latency_ms <= latency_ms)
    return metrics


def write_comparisons(rows: Sequence[Comparison], path: Path) -> None:
    """Write ``predicted_vs_real.csv``, the found network first."""
    names = [field.name for field in dataclasses.fields(Comparison) if field.name != "architecture"]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*names, "image_size", "architecture"])
        for row in rows:
            values = [getattr(row, name) for name in names]
            cells = ["" if value is None else value for value in values]
            writer.writerow([*cells, row.architecture.image_size, row.architecture.to_json()])


def read_comparisons(path: Path, space: SearchSpace) -> list[Comparison]:
    """Read what `write_comparisons` wrote."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            numbers = ("predicted_accuracy", "predicted_latency_ms", "predicted_latency_upper_ms", "accuracy")
            rows.append(
                Comparison(
                    architecture=Architecture.from_json(row["architecture"]),
                    role=row["role"],
                    **{name: float(row[name]) for name in numbers},
                    n_images=int(row["n_images"]),
                    latency_ms=float(row["latency_ms"]) if row["latency_ms"] else None,
                    latency_valid=row["latency_valid"] == "True",
                )
            )
            space.validate(rows[-1].architecture)
    return rows


def _tau(name: str, pairs: Sequence[tuple[float, float]]) -> dict[str, float]:
    from scipy.stats import kendalltau

    predicted, real = zip(*pairs, strict=True)
    # Of two networks the ranks agree or not: that is no correlation.
    if len(pairs) < 3 or len(set(predicted)) < 2 or len(set(real)) < 2:
        return {}
    return {name: float(kendalltau(predicted, real).statistic)}
