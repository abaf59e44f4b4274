"""Collecting what is known of sampled subnets, row by row, so that an end in the middle loses none."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import FitError, FoxNasError, InvalidMeasurementsError, MissingDependencyError
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_finished, write_measurements
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet, fit_predictors
from foxnas_mlflow.core.searchers import exact_front
from foxnas_mlflow.core.space import SearchSpace

_FRONT_POINTS = 50

_TIMING_ROUNDS = 3
"""How often latencies that were disturbed are measured again."""

_DOUBTED_PERCENT = 10.0
"""By how much slower than a fit to all says a network was, to be measured again."""


def collect(
    plan: Sequence[Architecture],
    path: Path,
    *,
    evaluate: Callable[[Architecture], float],
    time: Callable[[Architecture], Timing] | None = None,
    n_timed: int | None = None,
    on_row: Callable[[Measurement, int], None] = lambda row, n: None,
    stop: Callable[[Sequence[Measurement]], bool] | None = None,
    doubt: Callable[[Sequence[Measurement]], Sequence[Architecture]] = lambda rows: (),
    n_at_once: int = 1,
    apart: bool = False,
) -> list[Measurement]:
    """Evaluate and time subnets; each row is on disk when it is finished.

    A latency that was disturbed is measured again after the others, as long as that brings any.

    Args:
        plan: The subnets in order.
        path: ``measurements.csv`` to append to; what its rows have is not done again, a latency that one lacks
            is measured. In the end it has one row a subnet.
        evaluate: Accuracy of a subnet in percent.
        time: Latency of a subnet; one with problems is not written.
        n_timed: Time only so many of the plan's first subnets; all when None.
        on_row: Told of each new row and of the number of rows.
        stop: Asked whether the rows up to a new one are enough, in the plan's order; those beyond are left out then.
        doubt: Which of the rows' networks are to be timed once more because their latencies may not be theirs alone; of
            each the least counts.
        n_at_once: Rows in progress at once; above 1 `evaluate` and `time` are called by several threads.
        apart: Time only when all are evaluated, because evaluating disturbs what is timed.

    Returns:
        The rows: those of an earlier call that the plan lacks, then the plan's in its order.
    """
    # The last row of a subnet is the one that has most.
    rows = {row.architecture: row for row in read_finished(path)}
    before, planned = set(rows), set(plan)
    timed = set() if time is None else set(plan if n_timed is None else plan[:n_timed])

    def collected(n_planned: int | None = None) -> list[Measurement]:
        others = [row for architecture, row in rows.items() if architecture not in planned]
        return others + [rows[architecture] for architecture in plan[:n_planned] if architecture in rows]

    def keep(row: Measurement) -> None:
        append_measurement(row, path)
        rows[row.architecture] = row

    def timed_anew(row: Measurement, timing: Timing) -> Measurement:
        new = Measurement.of(row.architecture, timing, row.accuracy)
        return dataclasses.replace(new, quantities={**row.quantities, **new.quantities})

    def work(architecture: Architecture) -> Measurement:
        accuracy = evaluate(architecture)
        timing = time(architecture) if time is not None and architecture in timed and not apart else None
        return Measurement.of(architecture, timing, accuracy)

    n_settled, enough = 0, False
    missing = itertools.takewhile(lambda _: not enough, [a for a in plan if a not in rows])
    try:
        for _, row in as_finished(work, missing, n=n_at_once):
            if enough:
                # What was in progress ends before anything is timed again.
                continue
            keep(row)
            on_row(row, len(rows))
            while stop is not None and n_settled < len(plan) and plan[n_settled] in rows and not enough:
                n_settled += 1
                # Rows are asked about in the plan's order, so that it does not matter which of them finished first.
                enough = plan[n_settled - 1] not in before and stop(collected(n_settled))
            if enough:
                rows = {row.architecture: row for row in collected(n_settled)}
    except FoxNasError:
        # Nobody asks for the rows that were in progress then.
        if not enough:
            raise
    for _ in range(_TIMING_ROUNDS + apart):
        disturbed = [row for row in collected() if row.latency_ms is None and row.architecture in timed]
        if time is None or not disturbed:
            break
        for architecture, timing in as_finished(time, [row.architecture for row in disturbed], n=n_at_once):
            if not timing.problems:
                keep(timed_anew(rows[architecture], timing))
        if all(rows[row.architecture].latency_ms is None for row in disturbed):
            break
    if time is not None:
        doubted = [architecture for architecture in doubt(collected()) if architecture in timed]
        for architecture, timing in as_finished(time, doubted, n=n_at_once):
            row = rows[architecture]
            if not timing.problems and row.latency_ms is not None and timing.latency_ms < row.latency_ms:
                keep(timed_anew(row, timing))
    write_measurements(collected(), path)
    return collected()


def doubtful(latency: LinearPredictor, rows: Iterable[Measurement], percent: float) -> list[Architecture]:
    """Networks that were slower than a fit to all says, by more than so many percent.

    A machine that shares its processor with others is at times half as fast for seconds: each measurement is steady,
    and together they tell nothing. It makes no network faster than it is.
    """
    timed = {row.architecture: row.latency_ms for row in rows if row.latency_ms is not None}
    predicted = latency.predict(list(timed))
    return [
        architecture
        for (architecture, ms), expected in zip(timed.items(), predicted, strict=True)
        if expected / ms < 1 - percent / 100
    ]


def unexplained(rows: Sequence[Measurement], space: SearchSpace, *, seed: int = 0) -> list[Architecture]:
    """Networks of a sampling that were slower than the others explain.

    None while the rows are too few to fit, or where what fits them is not installed: a sampling needs it for no more.

    Args:
        rows: The rows.
        space: Their search space.
        seed: Seed of the cross-validation.
    """
    latencies = [
        dataclasses.replace(row, accuracy=None, quantities={}) for row in rows if row.latency_source == "measured"
    ]
    try:
        (latency,) = fit_predictors(latencies, space, seed=seed).predictors.latency
    except (FitError, InvalidMeasurementsError, MissingDependencyError):
        return []
    return doubtful(latency, latencies, _DOUBTED_PERCENT)


def front_width(
    rows: Sequence[Measurement], space: SearchSpace, *, latency: PredictorSet | None = None, seed: int = 0
) -> float | None:
    """How surely predictors fitted to rows know the accuracies along their own front.

    Args:
        rows: The rows.
        space: Their search space.
        latency: The target's cost model, for rows without a measured latency.
        seed: Seed of the cross-validation.

    Returns:
        The widest 95 % prediction interval of accuracy (points) among points spread evenly over
        the front; None while the rows are too few to fit.
    """
    try:
        predictors = fit_predictors(rows, space, latency=latency, seed=seed).predictors
    except (FitError, InvalidMeasurementsError):
        return None
    if not (predictors.accuracy and predictors.latency):
        return None
    front = exact_front(predictors)
    points = np.unique(np.linspace(0, len(front) - 1, _FRONT_POINTS).astype(int))
    table = predictors.predict_table([front.architecture(int(i)) for i in points])
    return float(np.max(np.subtract(table["accuracy_upper"], table["accuracy_lower"])))
