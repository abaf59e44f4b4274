"""Predicted against real: networks of a front with what was measured of them."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.files import write_csv
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.searchers import Front, paired_difference
from foxnas_mlflow.core.space import SearchSpace

_TIED = 0.95
"""Share of a latency above which another one may be the same: both were measured once."""


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
        correct: Whether each of the images was answered right, shape (n_images,), the same images for every network;
            None where that is not known.
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
    correct: NDArray[np.bool_] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def standard_error(self) -> float:
        """Of the accuracy, in percentage points."""
        share = self.accuracy / 100
        return 100 * math.sqrt(share * (1 - share) / self.n_images)

    @property
    def trusted_latency_ms(self) -> float | None:
        """The latency where there is one that can be trusted."""
        return self.latency_ms if self.latency_valid else None


def spread_over(front: Front, n: int, *, without: Sequence[Architecture]) -> list[Architecture]:
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
            if architecture not in without and architecture not in chosen:
                chosen.append(architecture)
                break
    return chosen


def agreement(rows: Sequence[Comparison], latency_ms: float | None) -> dict[str, float]:
    """How well predictions agree with what was measured.

    Args:
        rows: The networks; the found one first.
        latency_ms: The limit, or None.

    Returns:
        ``accuracy_kendall_tau``, ``accuracy_mean_error`` (points) and, of latencies that can be trusted,
        ``latency_kendall_tau``, ``latency_mape`` (percent), ``upper_bound_kept`` (share of the
        networks within their predicted upper bound) and ``constraint_met`` (0 or 1, of the found
        one). A rank correlation is left out for fewer than three networks, or where all are equal.
    """
    metrics = {"accuracy_mean_error": float(np.mean([abs(r.accuracy - r.predicted_accuracy) for r in rows]))}
    metrics |= _tau("accuracy_kendall_tau", [(r.predicted_accuracy, r.accuracy) for r in rows])
    timed = [(r, r.trusted_latency_ms) for r in rows if r.trusted_latency_ms is not None]
    if timed:
        metrics |= _tau("latency_kendall_tau", [(r.predicted_latency_ms, real) for r, real in timed])
        metrics |= {
            "latency_mape": 100 * float(np.mean([abs(r.predicted_latency_ms / real - 1) for r, real in timed])),
            "upper_bound_kept": float(np.mean([real <= r.predicted_latency_upper_ms for r, real in timed])),
        }
    found_ms = rows[0].trusted_latency_ms
    if found_ms is not None and latency_ms is not None:
        metrics["constraint_met"] = float(found_ms <= latency_ms)
    return metrics


@dataclass(frozen=True, slots=True)
class Searched:
    """What a search measured of the network that it found.

    Attributes:
        accuracy, standard_error: As the supernet evaluated it, in percent and points.
        latency_ms: As measured there.
        device: Where that was.
    """

    accuracy: float
    standard_error: float
    latency_ms: float
    device: str


@dataclass(frozen=True, slots=True)
class Check:
    """Whether a found network is beaten by one that it was compared with.

    Attributes:
        beaten_by: The network that beats it on measured latency and, beyond noise, on accuracy, or None.
        sentence: What was checked, and what came out.
        checked: Whether the latencies that were needed were measured: without them nothing is known.
        better: A network that is faster and no less accurate as measured, be it by chance: of networks that noise
            cannot tell apart the fastest is wanted. None where there is none.
        n_others: How many of those that it was compared with could have been found in its place.
    """

    beaten_by: Architecture | None
    sentence: str
    checked: bool
    better: Architecture | None = None
    n_others: int = 0

    def beside(self, searched: Searched | None, sampled: Sequence[Measurement]) -> Check:
        """This check with the networks that were sampled before, by what was measured of the found one beside them.

        Args:
            searched: What the search measured of the found network; None: nothing.
            sampled: Networks that are within all limits but that on latency, as they were sampled.
        """
        if not self.checked or self.beaten_by is not None or searched is None:
            return self
        timed = [
            (row.timing.latency_ms, row.accuracy - searched.accuracy, row.architecture)
            for row in sampled
            if row.accuracy is not None and row.timing is not None and row.timing.device == searched.device
        ]
        if not timed:
            return self
        faster = [row for row in timed if row[0] < searched.latency_ms]
        # Evaluations of other days err by as much as its own.
        error = math.sqrt(2) * searched.standard_error
        ms, more, architecture = max(faster, key=lambda row: row[1], default=(0.0, -math.inf, None))
        if architecture is not None and more > error:
            return Check(
                architecture,
                f"BEATEN: a sampled network takes {ms:.4g} ms in place of {searched.latency_ms:.4g} ms and was "
                f"evaluated {more:.2f} points (standard error {error:.2f}) above the found one.",
                True,
                architecture,
                self.n_others,
            )
        words = f"Nor does any of the {len(timed)} sampled"
        if not self.n_others:
            words = f"None of the {len(timed)} sampled beats it"
        return dataclasses.replace(self, sentence=f"{self.sentence} {words}: {len(faster)} are faster.")


def check_found(rows: Sequence[Comparison], answers: Sequence[bool], i: int = 0) -> Check:
    """Hold a found network against the others.

    Args:
        rows: The networks.
        answers: Whether each of them could have been found in place of this one, as `Problem.stands_in` tells.
        i: The found network.
    """
    found, found_ms = rows[i], rows[i].trusted_latency_ms
    if found_ms is not None and len(rows) == 1:
        return Check(None, "No other network was compared with the found one.", True)
    valid = [
        (row, row.trusted_latency_ms, answer)
        for j, (row, answer) in enumerate(zip(rows, answers, strict=True))
        if j != i and row.trusted_latency_ms is not None
    ]
    timed = [(row, ms) for row, ms, answer in valid if answer]
    if found_ms is None or not valid:
        return Check(None, "Whether another network beats the found one is not known: it needs valid latencies.", False)
    if not timed:
        return Check(None, "No other network compared could have been found in its place.", True)
    faster = [(row, ms, *_more(row, found)) for row, ms in timed if ms < found_ms]
    beating = [(row, ms, more, error) for row, ms, more, error in faster if more > error]
    if beating:
        row, ms, more, error = max(beating, key=lambda b: b[2])
        return Check(
            row.architecture,
            f"BEATEN: another network takes {ms:.4g} ms in place of {found_ms:.4g} ms and is {more:.2f} points "
            f"(standard error {error:.2f}) more accurate than the found one.",
            True,
            row.architecture,
            len(timed),
        )
    best = ""
    if faster:
        _, _, more, error = max(faster, key=lambda f: f[2])
        best = f"{more:+.2f} points (standard error {error:.2f})"
    as_accurate = [(row, ms) for row, ms, more, _ in faster if more >= 0 and ms < _TIED * found_ms]
    return Check(
        None,
        f"No network of the {len(timed)} compared beats the found one on measured latency and, beyond noise, on int8 "
        f"accuracy: {len(faster)} are faster" + (f", the most accurate of them by {best}." if best else "."),
        True,
        min(as_accurate, key=lambda each: each[1])[0].architecture if as_accurate else None,
        len(timed),
    )


def _more(row: Comparison, found: Comparison) -> tuple[float, float]:
    """How much more accurate a network is than the found one, and the standard error of that, in points."""
    if row.correct is not None and found.correct is not None and row.correct.shape == found.correct.shape:
        return paired_difference(row.correct, found.correct)
    return row.accuracy - found.accuracy, math.hypot(row.standard_error, found.standard_error)


def write_comparisons(rows: Sequence[Comparison], path: Path) -> None:
    """Write ``predicted_vs_real.csv``, the found network first."""
    kept_out = ("architecture", "correct")
    names = [field.name for field in dataclasses.fields(Comparison) if field.name not in kept_out]
    cells = (
        [*(getattr(row, name) for name in names), row.architecture.image_size, row.architecture.to_json()]
        for row in rows
    )
    write_csv(path, [*names, "image_size", "architecture"], cells)


def read_comparisons(path: Path, space: SearchSpace) -> list[Comparison]:
    """Read what `write_comparisons` wrote."""
    rows = []
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            rows.append(
                Comparison(
                    architecture=Architecture.from_json(row["architecture"]),
                    role=row["role"],
                    predicted_accuracy=float(row["predicted_accuracy"]),
                    predicted_latency_ms=float(row["predicted_latency_ms"]),
                    predicted_latency_upper_ms=float(row["predicted_latency_upper_ms"]),
                    accuracy=float(row["accuracy"]),
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
