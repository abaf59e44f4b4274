"""Tweaking a found network by hand (paper section 3.3): single edits, ranked.

For every single-parameter edit: what it does to predicted accuracy and latency, with intervals.
The interval of a difference uses the difference of the two design rows, so what the two networks
share cancels; it is the confidence interval of the expected change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet
from foxnas_mlflow.core.searchers._objective import FloatArray

if TYPE_CHECKING:
    from foxnas_mlflow.core.searchers._search import SearchOutcome


@dataclass(frozen=True)
class Edit:
    """One single-parameter edit of an architecture.

    Attributes:
        description: For people, for example ``stage 80, block 2: kernel 5 -> 3``.
        architecture: The edited architecture.
        delta_accuracy: Change of predicted accuracy in points.
        delta_accuracy_margin: Half width of its 95 % confidence interval, or nan.
        delta_latency_ms: Change of predicted latency in ms.
        delta_latency_margin: Half width of its 95 % confidence interval, or nan.

    Examples:
        >>> from foxnas_mlflow import rank_edits, reference_predictors
        >>> predictors = reference_predictors("rpi4")
        >>> edit = rank_edits(predictors, predictors.space.smallest(256))[0]
        >>> edit.architecture != predictors.space.smallest(256)
        True
    """

    description: str
    architecture: Architecture
    delta_accuracy: float
    delta_accuracy_margin: float
    delta_latency_ms: float
    delta_latency_margin: float

    @property
    def price(self) -> float:
        """Accuracy points lost for each ms saved; infinite for edits that save nothing."""
        if self.delta_latency_ms >= 0:
            return float("inf")
        return self.delta_accuracy / self.delta_latency_ms


def rank_edits(predictors: PredictorSet, architecture: Architecture, *, confidence: float = 0.95) -> list[Edit]:
    """Every edit that keeps the image size, the cheapest saving of latency first.

    Edits that save no latency come last, by the accuracy that they gain.

    Examples:
        >>> from foxnas_mlflow import rank_edits, reference_predictors
        >>> predictors = reference_predictors("rpi4")
        >>> edits = rank_edits(predictors, predictors.space.largest(256))
        >>> edits[0].delta_latency_ms < 0
        True
    """
    neighbours = [n for n in predictors.space.neighbours(architecture) if n.image_size == architecture.image_size]
    accuracy = predictors.of("accuracy", architecture.image_size)
    latency = predictors.of("latency_ms", architecture.image_size)
    d_accuracy, m_accuracy = _differences(accuracy, architecture, neighbours, confidence)
    d_latency, m_latency = _differences(latency, architecture, neighbours, confidence)
    edits = [
        Edit(describe_edit(architecture, n), n, *map(float, row))
        for n, *row in zip(neighbours, d_accuracy, m_accuracy, d_latency, m_latency, strict=True)
    ]
    return sorted(edits, key=lambda e: (e.price, -e.delta_accuracy))


@dataclass(frozen=True)
class ValuedEdit:
    """An edit under all limits of a search.

    Attributes:
        edit: The edit.
        used: How much more of each limited quantity the network then has: of its upper bound where it is predicted.
        worth: Accuracy (points) that it brings less what it uses of the limits at their prices.
        broken: Limits that the network then exceeds.
    """

    edit: Edit
    used: Mapping[str, float]
    worth: float
    broken: tuple[str, ...]


def value_edits(outcome: SearchOutcome) -> list[ValuedEdit]:
    """Every edit of a found network that keeps the image size, that of most worth at the prices of the limits first.

    Examples:
        >>> from foxnas_mlflow import reference_predictors, search
        >>> from foxnas_mlflow.core.searchers import value_edits
        >>> found = search(reference_predictors("rpi4"), 60, limits="int8_size_bytes<=4MB", evaluations=2_000)
        >>> all(valued.broken for valued in value_edits(found) if valued.edit.delta_accuracy > 0)
        True
    """
    prices = {price.limit.quantity: price.per_unit for price in outcome.prices}
    valued = []
    for edit in rank_edits(outcome.objective.predictors, outcome.architecture):
        after = outcome.objective.amounts(edit.architecture)
        used = {limit.quantity: after[limit.quantity] - outcome.amounts[limit.quantity] for limit in outcome.limits}
        worth = edit.delta_accuracy - sum(prices.get(quantity, 0.0) * more for quantity, more in used.items())
        broken = tuple(limit.quantity for limit in outcome.limits if after[limit.quantity] > limit.value)
        valued.append(ValuedEdit(edit, used, worth, broken))
    return sorted(valued, key=lambda v: -v.worth)


def describe_edit(before: Architecture, after: Architecture) -> str:
    """What a single edit changed, in words."""
    if before.image_size != after.image_size:
        return f"image size {before.image_size} -> {after.image_size} px"
    for old, new in zip(before.stages, after.stages, strict=True):
        if old.depth != new.depth:
            return f"stage {old.width}: depth {old.depth} -> {new.depth}"
        for i, (a, b) in enumerate(zip(old.blocks, new.blocks, strict=True), start=1):
            if a.expansion != b.expansion:
                return f"stage {old.width}, block {i}: expansion {a.expansion} -> {b.expansion}"
            if a.kernel != b.kernel:
                return f"stage {old.width}, block {i}: kernel {a.kernel} -> {b.kernel}"
    return "no change"


def _differences(
    predictor: LinearPredictor, before: Architecture, after: Sequence[Architecture], confidence: float
) -> tuple[FloatArray, FloatArray]:
    x = predictor.design([before, *after])
    linear = x @ predictor.coefficients
    value = predictor.from_linear(linear)
    delta = value[1:] - value[0]
    if predictor.covariance is None:
        return delta, np.full_like(delta, np.nan)
    dx = x[1:] - x[0]
    sd = np.sqrt(np.einsum("ij,jk,ik->i", dx, predictor.covariance, dx))
    margin = predictor.t_quantile((1 + confidence) / 2) * sd
    # Under a ceiling, d accuracy = (ceiling - accuracy) dz: the margin is scaled by the slope at the start.
    slope = 1.0 if predictor.ceiling is None else predictor.ceiling - value[0]
    return delta, margin * slope
