"""Tweaking a found network by hand (paper section 3.3): single edits, ranked.

For every single-parameter edit: what it does to predicted accuracy and latency, with intervals.
The interval of a difference uses the difference of the two design rows, so what the two networks
share cancels; it is the confidence interval of the expected change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet
from foxnas_mlflow.core.searchers._objective import FloatArray


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
