"""A cost model for a new board from about a dozen measured networks."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.design import choose_samples
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import (
    LinearPredictor,
    PredictorSet,
    fit_family,
    fit_formula,
    widest_formula,
    with_packaged_accuracy,
)
from foxnas_mlflow.core.random import Stream, pick, stream
from foxnas_mlflow.core.space import SearchSpace

SPARE_PROBES = 2
"""Probes beyond the number of prices: a design that is chosen needs fewer than rows drawn at random."""

N_DRAWN = 2
"""Random networks among the probes."""


def choose_probes(
    space: SearchSpace,
    n: int,
    *,
    measured: Sequence[Architecture] = (),
    image_sizes: Sequence[int] | None = None,
    seed: int = 0,
) -> list[Architecture]:
    """The networks whose latencies tell the cost model's prices best: D-optimal ones, and `N_DRAWN` random ones.

    A design takes extremes, on which a price is known best if it is one price; the random ones stand for the rest.

    Args:
        space: The search space.
        n: How many in all, those that are measured included.
        measured: Networks that are measured already.
        image_sizes: Image sizes in pixels; None: all of the space.
        seed: Seed of the candidates.

    Raises:
        InvalidInputError: If `n` is less than the cost model needs.
    """
    formula = widest_formula("calibrated", "latency_ms", space, len(image_sizes or space.image_sizes))
    least = len(formula.columns(space)) + SPARE_PROBES
    if n < least:
        raise InvalidInputError(
            f"n_probes must be {least} or more: the cost model's prices, and spare rows", received=n
        )
    missing = max(n - len(measured), 0)
    drawn = [a for a in _drawn(space, N_DRAWN, image_sizes, stream(seed, Stream.PROBES)) if a not in measured][:missing]
    n_designed = missing - len(drawn)
    if not n_designed:
        return drawn
    known = [*measured, *drawn]
    return drawn + choose_samples(space, [formula], n_designed, measured=known, image_sizes=image_sizes, seed=seed)


def choose_checks(
    space: SearchSpace, n: int, *, image_sizes: Sequence[int] | None = None, seed: int = 0
) -> list[Architecture]:
    """Random networks to hold the cost model against: the probes are extremes, which the others cannot tell."""
    return _drawn(space, n, image_sizes, stream(seed, Stream.CHECKS))


def _drawn(
    space: SearchSpace, n: int, image_sizes: Sequence[int] | None, rng: np.random.Generator
) -> list[Architecture]:
    sizes = tuple(image_sizes or space.image_sizes)
    return [space.sample(rng, image_size=pick(rng, sizes)) for _ in range(n)]


def calibrate(
    rows: Sequence[Measurement],
    space: SearchSpace,
    *,
    target: str,
    notes: Sequence[str] = (),
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    outside: Sequence[Measurement] = (),
) -> PredictorSet:
    """Fit the cost model to measured rows, with bounds that networks outside of the design bear out.

    The design's rows are extremes and chosen, so their residuals say little of a network that a search finds: a
    formula's bound at 95 % held for 60 to 78 % of random networks on an x86 host, whose small images take
    longer than the terms say. Therefore `outside` are random networks: each is predicted by a fit to all other
    rows, and the errors, in standard deviations, widen the bounds where they must
    (`LinearPredictor.t_quantile`; leave-one-out conformal prediction, Barber et al. 2021). At image sizes that were not
    measured, and in other spaces, it is further off than on these networks: their root mean square error counts there
    once more (``transfer_sigma``).

    Accuracy does not depend on the board: where predictors of it are packaged for this space, they
    are part of the result, so that it can be searched.

    Args:
        rows: Measured networks.
        space: Their search space.
        target: Name of the new target.
        notes: What to say wherever the predictions are shown.
        seed: Seed of the cross-validation.
        provenance: What to record of the rows' origin.
        outside: Measured networks that were drawn at random, fitted too. Their errors when they are left out become
            ``held_out`` and the metrics ``outside_mape`` (mean absolute, percent), ``outside_bias`` (mean, percent,
            above 0: predicted too slow), ``formula_coverage`` (percent of them within the formula's own upper bound
            at 95 %), ``n_outside`` and ``bound_width`` (mean percent by which their upper bound, at 95 % or the most
            that is stated, lies above the prediction).

    Raises:
        FitError: As `fit_family`.
    """
    (report,) = fit_family(
        "calibrated",
        "latency_ms",
        [*rows, *outside],
        space,
        seed=seed,
        provenance=provenance,
        spare_rows=SPARE_PROBES,
    )
    latency = report.predictor
    if outside:
        latency = _held_against(latency, rows, outside)
    notes = list(notes)
    if latency.fitted_sizes != space.image_sizes:
        sizes = " and ".join(map(str, latency.fitted_sizes))
        notes.append(
            f"At other image sizes than {sizes} px it extrapolates: no measurement bears its bounds out there."
        )
    latency = dataclasses.replace(latency, origin="calibrated", notes=tuple(notes))
    return with_packaged_accuracy(PredictorSet(target, space, (), (latency,)))


def _held_against(
    latency: LinearPredictor, rows: Sequence[Measurement], outside: Sequence[Measurement]
) -> LinearPredictor:
    """The same prices with the errors of networks that were left out, one after the other."""
    shares, scores, kept = [], [], []
    for i, row in enumerate(outside):
        others = [*rows, *outside[:i], *outside[i + 1 :]]
        fitted = fit_formula(latency.recipe, others, latency.space, spare_rows=SPARE_PROBES).predictor
        network, observed = [row.architecture], float(row.latency_ms or 0.0)
        predicted, sd = float(fitted.predict(network)[0]), float(fitted.prediction_sd(network)[0])
        score = (observed - predicted) / sd
        shares.append(predicted / observed - 1)
        scores.append(score)
        kept.append(score <= fitted.t_quantile(0.95))
    checked = {
        "outside_mape": 100 * float(np.mean(np.abs(shares))),
        "outside_bias": 100 * float(np.mean(shares)),
        "formula_coverage": 100 * float(np.mean(kept)),
        "n_outside": float(len(outside)),
    }
    widened = dataclasses.replace(
        latency, held_out=tuple(sorted(scores)), transfer_sigma=float(np.sqrt(np.mean(np.square(shares))))
    )
    networks = [row.architecture for row in outside]
    bounds = widened.upper_bound(networks, min(0.95, widened.stated_confidence))
    checked["bound_width"] = 100 * float(np.mean(bounds / widened.predict(networks) - 1))
    return dataclasses.replace(widened, metrics=dict(latency.metrics) | checked)
