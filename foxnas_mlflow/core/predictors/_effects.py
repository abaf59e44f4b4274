"""Marginal effects: what a real edit of a middle network does, with its interval.

Single coefficients of collinear columns cannot be read; the effect of an edit can.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors._linear import LinearPredictor


@dataclass(frozen=True)
class Effect:
    """The effect of one edit.

    Attributes:
        label: The edit, for example ``stage 80: one more block``.
        delta: Change of the prediction, in points or ms.
        margin: Half width of its 95 % confidence interval; nan without a covariance.

    Examples:
        >>> from foxnas_mlflow import marginal_effects, reference_predictors
        >>> effect = marginal_effects(reference_predictors("rpi4").of("accuracy", 256))[0]
        >>> f"{effect.label}: {effect.delta:+.2f} points"
        'stage 24: depth 3 -> 4: +0.03 points'
    """

    label: str
    delta: float
    margin: float


def marginal_effects(predictor: LinearPredictor) -> list[Effect]:
    """Effects of one more block, the next expansion ratio and the next kernel size, stage by stage.

    The edits start from the network with the middle choice everywhere at the predictor's largest
    fitted image size, or its largest where none is. Expansion and kernel are raised in all blocks of the stage.

    Examples:
        >>> from foxnas_mlflow import marginal_effects, reference_predictors
        >>> effects = marginal_effects(reference_predictors("rpi4").of("latency_ms", 256))
        >>> effects[0].label, effects[0].delta > 0
        ('stage 24: depth 3 -> 4', True)
    """
    space = predictor.space
    size = predictor.main_size
    candidates = {"depth": space.depths, "expansion": space.expansions, "kernel": space.kernels}
    # The middle choice, but never the last: every parameter that varies must be able to rise.
    middle = {name: values[max(min(len(values) // 2, len(values) - 2), 0)] for name, values in candidates.items()}
    base = [dict(middle) for _ in space.stages]

    def build(stages: list[dict[str, int]]) -> Architecture:
        return space.architecture(size, [[(s["expansion"], s["kernel"])] * s["depth"] for s in stages])

    edits = []
    for j, spec in enumerate(space.stages):
        for name, values in candidates.items():
            if len(values) > 1:
                raised = values[values.index(middle[name]) + 1]
                stages = [s | {name: raised} if i == j else s for i, s in enumerate(base)]
                edits.append((f"stage {spec.width}: {name} {middle[name]} -> {raised}", build(stages)))
    x = predictor.design([build(base), *(a for _, a in edits)])
    linear = x @ predictor.coefficients
    value = predictor.from_linear(linear)
    dx = x[1:] - x[0]
    if predictor.covariance is None:
        margins = np.full(len(edits), np.nan)
    else:
        slope = 1.0 if predictor.ceiling is None else predictor.ceiling - value[0]
        sd = np.sqrt(np.einsum("ij,jk,ik->i", dx, predictor.covariance, dx))
        margins = predictor.t_quantile(0.975) * sd * slope
    return [
        Effect(label, float(delta), float(margin))
        for (label, _), delta, margin in zip(edits, value[1:] - value[0], margins, strict=True)
    ]
