"""Several image sizes at once, and searches at the edge of what is feasible or affordable."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet, get_formula, reference_predictors
from foxnas_mlflow.core.searchers import SEARCHERS, Limit, Objective, Problem, exact_front, exact_optimum
from foxnas_mlflow.core.space import SearchSpace, StageSpec

SIZES = (32, 64)
SMALL = SearchSpace(
    name="small2",
    image_sizes=SIZES,
    kernels=(3, 5),
    expansions=(2, 4),
    depths=(1, 2),
    stages=(StageSpec(16, 2, "mbconv"), StageSpec(24, 2, "mbconv_se")),
)
_KINDS = [(b.expansion, b.kernel) for b in SMALL.kinds]
_STAGES = [list(s) for d in SMALL.depths for s in itertools.product(_KINDS, repeat=d)]
EVERY = {size: [SMALL.architecture(size, list(c)) for c in itertools.product(_STAGES, repeat=2)] for size in SIZES}


def _predictors(seed: int, *, pooled: str = "") -> PredictorSet:
    """One random equation 2 per size and quantity: slower, larger blocks are not assumed.

    With `pooled`, a formula for all sizes together predicts accuracy.
    """
    rng = np.random.default_rng(seed)

    def make(quantity: str, *sizes: int, formula: str = "paper") -> LinearPredictor:
        columns = get_formula(formula, quantity).columns(SMALL)
        p = len(columns)
        beta = rng.normal(0, 0.3, p) if quantity == "accuracy" else rng.normal(0, 2.0, p)
        beta[-1] = 60.0
        root = rng.normal(0, 0.05, (p, p))
        return LinearPredictor(formula, quantity, SMALL, sizes, sizes, columns, beta, root @ root.T, 0.05, dof=20)  # type: ignore[arg-type]

    return PredictorSet(
        "t",
        SMALL,
        (make("accuracy", *SIZES, formula=pooled),) if pooled else tuple(make("accuracy", size) for size in SIZES),
        tuple(make("latency_ms", size) for size in SIZES),
    )


def _under(objective: Objective, latency_ms: float) -> Problem:
    return Problem(objective, (Limit("latency_ms", latency_ms),))


def _table(predictors: PredictorSet, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    parts = [
        (
            predictors.of("accuracy", size).predict(EVERY[size]),
            predictors.of("latency_ms", size).predict(EVERY[size]),
            predictors.of("latency_ms", size).upper_bound(EVERY[size], confidence),
        )
        for size in SIZES
    ]
    accuracy, latency, upper = (np.concatenate(column) for column in zip(*parts, strict=True))
    return accuracy, latency, upper


@pytest.mark.parametrize("pooled", ["", "calibrated-sizes", "capacity-sizes", "means-sizes"])
@pytest.mark.parametrize("seed", range(8))
def test_front_and_optimum_over_two_sizes_equal_brute_force(seed: int, pooled: str) -> None:
    predictors = _predictors(seed, pooled=pooled)
    accuracy, latency, upper = _table(predictors, 0.95)
    front = exact_front(predictors)
    for ms, percent in zip(front.latency_ms, front.accuracy, strict=True):
        np.testing.assert_allclose(accuracy[latency <= ms + 1e-9].max(), percent, rtol=1e-12)
    np.testing.assert_allclose(front.accuracy[-1], accuracy.max(), rtol=1e-12)
    objective = Objective(predictors, confidence=0.95)
    for quantile in (0.01, 0.3, 0.8):
        limit = float(np.quantile(upper, quantile))
        best = accuracy[upper <= limit].max()
        optimum = exact_optimum(objective, limit)
        assert optimum.latency_upper_ms <= limit
        assert best - optimum.proof_gap - 1e-9 <= optimum.accuracy <= best + 1e-9


@pytest.mark.parametrize("name", sorted(SEARCHERS))
@pytest.mark.parametrize("seed", range(4))
def test_a_searcher_never_beats_brute_force(name: str, seed: int) -> None:
    predictors = _predictors(seed)
    accuracy, _, upper = _table(predictors, 0.95)
    limit = float(np.quantile(upper, 0.3))
    result = SEARCHERS[name].search(_under(Objective(predictors, confidence=0.95), limit), evaluations=4000, seed=seed)
    assert result.latency_upper_ms <= limit
    assert result.accuracy <= accuracy[upper <= limit].max() + 1e-9


@pytest.mark.parametrize("name", sorted(SEARCHERS))
@pytest.mark.parametrize("evaluations", [1, 7, 150])
def test_a_tiny_budget_is_kept(name: str, evaluations: int) -> None:
    result = SEARCHERS[name].search(_under(Objective(reference_predictors("rpi4")), 1000.0), evaluations=evaluations)
    assert 1 <= result.evaluations <= evaluations
