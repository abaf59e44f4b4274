"""What predictions and evaluations say together: closed forms, and simulations of what is claimed."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import pytest
from scipy.stats import kendalltau

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import (
    accuracy_signal,
    combine,
    evaluation_covariance,
    paired_difference,
    prediction_covariance,
    rank_signal,
)
from foxnas_mlflow.core.space import CPU_SPACE


def test_a_paired_difference_is_that_of_the_discordant_images() -> None:
    first = np.array([True] * 70 + [False] * 30)
    second = np.array([True] * 60 + [False] * 10 + [True] * 4 + [False] * 26)
    more, error = paired_difference(first, second)
    assert more == pytest.approx(6.0)
    # Ten images against, four for: variance of the mean of +1, -1 and 0.
    assert error == pytest.approx(100 * math.sqrt((14 - 100 * 0.06**2) / 99 / 100))
    with pytest.raises(InvalidInputError, match="same two or more images"):
        paired_difference(first, second[1:])


def test_paired_errors_are_smaller_than_those_of_two_sets_of_images() -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(359)
    first, second = hard < 0.9 + rng.normal(0, 0.02, 359), hard < 0.9 + rng.normal(0, 0.02, 359)
    covariance = evaluation_covariance([1.6, 1.6], [first, second])
    _, error = paired_difference(first, second)
    assert math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]) == pytest.approx(error)
    apart = evaluation_covariance([1.6, 1.6], [first, None])
    assert error < 0.6 * math.sqrt(apart[0, 0] + apart[1, 1])


def test_two_sources_combine_by_their_variances() -> None:
    # Differences: predicted 2 with variance 2 * 1, evaluated 0 with variance 2 * 3; weights 3 to 1.
    found = combine(np.array([72.0, 70.0]), np.eye(2), np.array([60.0, 60.0]), 3 * np.eye(2))
    difference, error = found.difference(0, 1)
    assert difference == pytest.approx(2 * 3 / 4, rel=1e-6)
    assert error == pytest.approx(math.sqrt(2 * 3 / 4), rel=1e-6)
    # The level is that of the evaluations.
    assert found.mean.mean() == pytest.approx(60, abs=0.3)


def test_combined_figures_are_calibrated_where_the_best_evaluation_is_not() -> None:
    """The evaluation of the winner is too good; the combined one is right, and its error too."""
    rng = np.random.default_rng(1)
    raw, shrunk = [], []
    for _ in range(2000):
        predicted = np.linspace(71, 70, 8)
        truth = predicted + rng.normal(0, 0.3, 8)
        evaluated = truth + rng.normal(0, 0.7, 8)
        found = combine(predicted, 0.09 * np.eye(8), evaluated, 0.49 * np.eye(8))
        raw.append(evaluated.max() - truth[evaluated.argmax()])
        best = int(found.mean.argmax())
        shrunk.append((found.mean[best] - truth[best]) / found.standard_error[best])
    assert np.mean(raw) > 0.5
    assert abs(np.mean(shrunk)) < 0.1
    assert 0.9 < np.std(shrunk) < 1.1


def test_predictions_of_alike_networks_err_alike() -> None:
    packaged = reference_predictors("rpi4")
    predictors = dataclasses.replace(
        packaged, accuracy=tuple(dataclasses.replace(p, metrics={}) for p in packaged.accuracy)
    )
    near = [
        CPU_SPACE.uniform(256, depth=3, expansion=4, kernel=5),
        CPU_SPACE.uniform(256, depth=3, expansion=4, kernel=3),
        CPU_SPACE.uniform(256, depth=2, expansion=2, kernel=3),
    ]
    covariance = prediction_covariance(predictors, near)
    predictor = predictors.of("accuracy", 256)
    np.testing.assert_allclose(
        np.sqrt(np.diag(covariance)),
        [
            predictor._sd(x := predictor.design([a]), x @ predictor.coefficients, np.zeros(1))[0]
            * (78 - predictor.predict([a])[0])
            for a in near
        ],
    )
    sd = np.sqrt(np.diag(covariance))
    correlation = covariance / np.outer(sd, sd)
    assert correlation[0, 1] > correlation[0, 2]
    # A misfit is no smaller near the ceiling than held-out rows say that it is elsewhere.
    rmse = packaged.of("accuracy", 256).metrics["cv_rmse"]
    small = predictor.sigma * (78 - predictor.predict(near)) < rmse
    assert small.any()
    whole = np.diag(prediction_covariance(packaged, near))
    shared = np.diag(covariance) - np.square(predictor.sigma * (78 - predictor.predict(near)))
    np.testing.assert_allclose(whole[small], (shared + rmse**2)[small])
    np.testing.assert_allclose(whole[~small], np.diag(covariance)[~small])
    less = prediction_covariance(predictors, near, evaluation_error=0.1)
    assert (np.diag(less) < np.diag(covariance)).all()
    np.linalg.cholesky(prediction_covariance(predictors, near, evaluation_error=9.0))


@pytest.mark.parametrize("n", [4, 6])
def test_the_variance_of_a_rank_correlation_by_chance(n: int) -> None:
    taus = [kendalltau(range(n), order).statistic for order in itertools.permutations(range(n))]
    assert np.var(taus) == pytest.approx(2 * (2 * n + 5) / (9 * n * (n - 1)))
    assert rank_signal(2 * np.std(taus), n).p_value == pytest.approx(0.0228, abs=1e-4)


def test_predictors_without_a_signal_are_said_to_have_none() -> None:
    assert rank_signal(0.08, 60).absent
    assert "no signal" in str(rank_signal(0.08, 60))
    assert not rank_signal(0.5, 60).absent
    assert rank_signal(1.0, 1).absent
    signal = accuracy_signal(reference_predictors("rpi4"))
    assert signal is not None
    assert not signal.absent
