"""What predictions and evaluations together say of networks, and what they cannot tell apart.

| symbol | name in code      | shape  | meaning                                                            |
|--------|-------------------|--------|--------------------------------------------------------------------|
| p      | ``predicted``     | (k,)   | predicted accuracies of k networks, percent                        |
| P      | ``prediction_covariance`` | (k, k) | of their errors: what the coefficients share, misfit of each one |
| e      | ``evaluated``     | (k,)   | evaluated accuracies, percent                                      |
| E      | ``evaluation_covariance`` | (k, k) | of their errors: the same images make them err alike         |
| m, V   | ``Combined``      |        | mean and covariance of the accuracies given both                   |

Accuracies are Gaussian around p with covariance P, and around them the evaluations with E. How far all predictions
lie too high or too low together is left open (`_LEVEL_SD`), so that evaluations set the level and both set the
differences. The largest of several noisy figures is too large; m is drawn towards p by just as much as e is noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors import PredictorSet

FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

_LEVEL_SD = 10.0
"""Standard deviation (points) of an error that all predictions share."""

_SIGNAL_P = 0.05
"""A rank correlation that chance alone reaches more often than this is no signal."""


@dataclass(frozen=True)
class Combined:
    """Accuracies of k networks given predictions and evaluations.

    Attributes:
        mean: In percent, shape (k,).
        covariance: In square points, shape (k, k).
    """

    mean: FloatArray
    covariance: FloatArray

    @property
    def standard_error(self) -> FloatArray:
        """Of each accuracy, in points, shape (k,)."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 0.0))

    def difference(self, i: int, j: int) -> tuple[float, float]:
        """How much more accurate network i is than j, and the standard error of that, in points."""
        v = self.covariance
        return float(self.mean[i] - self.mean[j]), math.sqrt(max(float(v[i, i] + v[j, j] - 2 * v[i, j]), 0.0))


def paired_difference(first: BoolArray, second: BoolArray) -> tuple[float, float]:
    """Difference of two accuracies on the same images, and its standard error, in points.

    Args:
        first, second: Whether each image was answered right, shape (n_images,).

    Raises:
        InvalidInputError: If the images are not the same number, or fewer than two.
    """
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise InvalidInputError(
            "a paired comparison needs the same two or more images twice", received=(first.shape, second.shape)
        )
    difference = first.astype(np.float64) - second
    return 100 * float(difference.mean()), 100 * float(difference.std(ddof=1)) / math.sqrt(len(difference))


def evaluation_covariance(standard_errors: Sequence[float], correct: Sequence[BoolArray | None]) -> FloatArray:
    """Covariance of evaluated accuracies in square points, shape (k, k).

    Args:
        standard_errors: Of each evaluation, in points.
        correct: Right answers image by image, the same images for all; without them evaluations err apart.
    """
    answers = [c for c in correct if c is not None]
    if len(answers) < len(correct) or len({c.shape for c in answers}) > 1:
        return np.diag(np.square(np.asarray(standard_errors, dtype=np.float64)))
    covariance: FloatArray = 1e4 * np.atleast_2d(np.cov(np.stack(answers).astype(np.float64))) / answers[0].size
    return covariance


def prediction_covariance(
    predictors: PredictorSet, architectures: Sequence[Architecture], *, evaluation_error: float = 0.0
) -> FloatArray:
    """Covariance of the errors of predicted accuracies in square points, shape (k, k).

    Networks share the error of the coefficients; each has a misfit of its own. The residuals that the misfit is known
    from hold the noise of the evaluations that were fitted to. It is taken off where it is given, up to half of the
    residual variance: how much of that was noise is not known.

    Args:
        predictors: The predictors.
        architectures: The k networks.
        evaluation_error: Standard error (points) of the evaluations behind the fit, where they were like these.
    """
    k = len(architectures)
    covariance = np.zeros((k, k))
    groups: dict[int, list[int]] = {}
    by_id = {}
    for i, architecture in enumerate(architectures):
        predictor = predictors.of("accuracy", architecture.image_size)
        by_id[id(predictor)] = predictor
        groups.setdefault(id(predictor), []).append(i)
    for key, rows in groups.items():
        predictor = by_id[key]
        x = predictor.design([architectures[i] for i in rows])
        # Under a ceiling, d accuracy = (ceiling - accuracy) dz.
        value = predictor.from_linear(x @ predictor.coefficients)
        slope = np.ones(len(rows)) if predictor.ceiling is None else predictor.ceiling - value
        shared = np.zeros((len(rows), len(rows)))
        if predictor.covariance is not None:
            shared = x @ predictor.covariance @ x.T * np.outer(slope, slope)
        # Near a ceiling the scale shrinks the residuals; networks there miss their predictions as others do.
        residual = np.square(np.maximum(predictor.sigma * slope, predictor.metrics.get("cv_rmse", 0.0)))
        misfit = np.maximum(residual - evaluation_error**2, 0.5 * residual)
        covariance[np.ix_(rows, rows)] = shared + np.diag(misfit)
    return covariance


def combine(
    predicted: FloatArray,
    prediction_covariance: FloatArray,
    evaluated: FloatArray,
    evaluation_covariance: FloatArray,
) -> Combined:
    """Combine predictions and evaluations by their variances."""
    prior = prediction_covariance + _LEVEL_SD**2
    # A little of its own keeps identical answers of two networks solvable.
    total = prior + evaluation_covariance + 1e-9 * np.eye(len(predicted))
    gain = np.linalg.solve(total, prior).T
    mean = predicted + gain @ (evaluated - predicted)
    covariance = prior - gain @ prior
    return Combined(mean, (covariance + covariance.T) / 2)


def dominated(latency_ms: Sequence[float | None], correct: Sequence[tuple[float, float] | None], i: int) -> bool:
    """Whether another network beats network i on measured latency and, beyond noise, on evaluated accuracy.

    Args:
        latency_ms: Measured latencies, None where there is none.
        correct: For each network how much more accurate it was evaluated than i, and the standard error of that
            difference (points), None where it was not evaluated.
        i: The network.
    """
    own = latency_ms[i]
    return own is not None and any(
        j != i and ms is not None and ms < own and more is not None and more[0] > more[1]
        for j, (ms, more) in enumerate(zip(latency_ms, correct, strict=True))
    )


@dataclass(frozen=True, slots=True)
class Signal:
    """Whether accuracy predictors know anything of the order of networks.

    Attributes:
        kendall_tau: Rank correlation of cross-validated predictions with evaluations.
        n_samples: Networks behind it.
        p_value: Chance of as much without any signal (one-sided).
        alike: What there is instead, in words, where all networks are as accurate; else empty.
    """

    kendall_tau: float
    n_samples: int
    p_value: float
    alike: str = ""

    @property
    def absent(self) -> bool:
        """Whether the correlation cannot be told from none."""
        return self.p_value > _SIGNAL_P

    def __str__(self) -> str:
        if self.alike:
            return self.alike
        if not self.absent:
            return f"accuracy predictors rank networks with tau {self.kendall_tau:.2f} ({self.n_samples} samples)"
        return (
            f"the accuracy predictors have no signal: tau {self.kendall_tau:.2f} of {self.n_samples} samples cannot be "
            f"told from chance (p = {self.p_value:.2f}); the order of networks that follows is not to be relied on"
        )


def rank_signal(kendall_tau: float, n_samples: int) -> Signal:
    """Test a rank correlation against none, by its normal limit: variance 2 (2n + 5) / (9 n (n - 1))."""
    from scipy.special import ndtr

    if n_samples < 2:
        return Signal(kendall_tau, n_samples, 1.0)
    sd = math.sqrt(2 * (2 * n_samples + 5) / (9 * n_samples * (n_samples - 1)))
    return Signal(kendall_tau, n_samples, float(ndtr(-kendall_tau / sd)))


def accuracy_signal(predictors: PredictorSet) -> Signal | None:
    """What the cross-validation of the accuracy predictors says of their ranking (the weakest one's), if known."""
    for p in predictors.accuracy:
        if p.of_one_value:
            return Signal(0.0, int(p.metrics["n_samples"]), 1.0, p.notes[0])
    signals = [
        rank_signal(p.metrics["kendall_tau"], int(p.metrics["n_samples"]))
        for p in predictors.accuracy
        if "kendall_tau" in p.metrics and "n_samples" in p.metrics
    ]
    return max(signals, key=lambda s: s.p_value, default=None)
