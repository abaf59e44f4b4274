"""Searchers: brute-force oracles and a conformance suite."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InfeasibleConstraintError, InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.predictors import (
    LinearPredictor,
    PredictorSet,
    authors_predictor,
    get_formula,
    reference_predictors,
)
from foxnas_mlflow.core.searchers import (
    SEARCHERS,
    Limit,
    Objective,
    Problem,
    RandomSearch,
    exact_front,
    exact_optimum,
    pose,
    rank_edits,
    search,
    search_each,
    solve,
)
from foxnas_mlflow.core.searchers._annealing import main_effects
from foxnas_mlflow.core.searchers._base import GeneSpace
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace, StageSpec

SMALL = SearchSpace(
    name="small",
    image_sizes=(32, 64),
    kernels=(3, 5),
    expansions=(2, 4),
    depths=(1, 2, 3),
    stages=(StageSpec(16, 2, "mbconv"), StageSpec(24, 2, "mbconv_se")),
)


def every_architecture(space: SearchSpace, sizes: tuple[int, ...]) -> list[Architecture]:
    kinds = [(b.expansion, b.kernel) for b in space.kinds]
    stages = [list(s) for d in space.depths for s in itertools.product(kinds, repeat=d)]
    return [
        space.architecture(size, [list(s) for s in c]) for size in sizes for c in itertools.product(stages, repeat=2)
    ]


ALL_SMALL = every_architecture(SMALL, (32,))


def random_predictors(seed: int, space: SearchSpace, sizes: tuple[int, ...]) -> PredictorSet:
    """Predictors with random coefficients and a random covariance."""
    rng = np.random.default_rng(seed)

    def make(formula: str, quantity: str) -> LinearPredictor:
        columns = get_formula(formula, quantity).columns(space)
        p = len(columns)
        if quantity == "accuracy":
            beta, ceiling = rng.normal(0, 0.2, p), 90.0 if formula == "calibrated" else None
            beta[-1] = -2.5 if formula == "calibrated" else 60.0
        else:
            beta, ceiling = rng.uniform(0.2, 3.0, p), None
            beta[-1] = 40.0
        root = rng.normal(0, 0.1 * np.abs(beta).mean(), (p, p))
        return LinearPredictor(
            formula, quantity, space, sizes, sizes, columns, beta, root @ root.T, 0.05, dof=20, ceiling=ceiling
        )

    formula = ("paper", "calibrated")[seed % 2]
    return PredictorSet("t", space, (make(formula, "accuracy"),), (make(formula, "latency_ms"),))


@pytest.mark.parametrize("seed", range(12))
def test_exact_front_equals_brute_force(seed: int) -> None:
    predictors = random_predictors(seed, SMALL, (32,))
    latency = predictors.latency[0].predict(ALL_SMALL)
    accuracy = predictors.accuracy[0].predict(ALL_SMALL)
    front = exact_front(predictors)
    # Best accuracy within each front point's latency, over all architectures: both ways, up to rounding.
    tolerance = 1e-9
    for ms, percent in zip(front.latency_ms, front.accuracy, strict=True):
        np.testing.assert_allclose(accuracy[latency <= ms + tolerance].max(), percent, rtol=1e-12)
    for ms, percent in zip(latency, accuracy, strict=True):
        reached = front.accuracy[front.latency_ms <= ms + tolerance]
        assert len(reached)
        assert reached[-1] >= percent - tolerance
    assert (np.diff(front.latency_ms) >= 0).all()
    assert (np.diff(front.accuracy) > 0).all()
    for i in range(len(front)):
        a = front.architecture(i)
        np.testing.assert_allclose(predictors.latency[0].predict([a])[0], front.latency_ms[i])


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("seed", range(12))
def test_exact_optimum_equals_brute_force_under_the_bound(seed: int, confidence: float) -> None:
    predictors = random_predictors(seed, SMALL, (32,))
    accuracy = predictors.accuracy[0].predict(ALL_SMALL)
    upper = predictors.latency[0].upper_bound(ALL_SMALL, confidence)
    objective = Objective(predictors, confidence=confidence)
    for quantile in (0.02, 0.2, 0.5, 0.9):
        limit = float(np.quantile(upper, quantile))
        best = accuracy[upper <= limit].max()
        optimum = exact_optimum(objective, limit)
        assert optimum.latency_upper_ms <= limit
        assert optimum.accuracy <= best + 1e-9
        # Exact, or the part that the proof leaves open is stated.
        assert optimum.accuracy_bound >= best - 1e-9
        assert optimum.accuracy >= best - optimum.proof_gap - 1e-9


def test_proofs_close_on_the_reference_predictors() -> None:
    objective = Objective(reference_predictors("rpi4"), confidence=0.95)
    for limit in np.linspace(40, 260, 45):
        assert exact_optimum(objective, float(limit)).proof_gap == 0.0


def test_the_published_optimum_at_192_px(shared_data: Path) -> None:
    data = json.loads((shared_data / "foxnas_rpi4_cpu192_coefficients.json").read_text())
    predictors = PredictorSet(
        "rpi4", CPU_SPACE, (authors_predictor(data, "accuracy"),), (authors_predictor(data, "latency_ms"),)
    )
    outcome = search(predictors, 55.0, confidence=0.5, evaluations=20_000)
    assert round(outcome.accuracy, 3) == 73.701
    with pytest.raises(OutOfDomainError, match="no intervals"):
        search(predictors, 55.0)


def test_the_front_is_never_beaten_by_a_searcher() -> None:
    predictors = reference_predictors("rpi4")
    for limit in (45.0, 75.0, 140.0):
        outcome = search(predictors, limit, evaluations=50_000, seed=3)
        assert outcome.optimality_gap >= 0
        assert outcome.latency_upper_ms <= limit
        assert outcome.latency_ms < outcome.latency_upper_ms
        assert outcome.found_by == "exact"


def under(objective: Objective, latency_ms: float) -> Problem:
    return Problem(objective, (Limit("latency_ms", latency_ms),))


def test_many_limits_have_the_optima_of_one_by_one_whatever_was_asked_before() -> None:
    predictors = reference_predictors("rpi4")
    limits = [float(ms) for ms in np.linspace(45, 140, 12)]
    outcomes = search_each(predictors, limits, algorithm="exact")
    for latency_ms, outcome in zip(limits, outcomes, strict=True):
        # An objective that nothing is remembered of.
        alone = exact_optimum(Objective(predictors, confidence=0.95), latency_ms)
        assert outcome.optimum == alone
        assert outcome.result.architecture == outcome.architecture == alone.architecture
        assert (outcome.optimality_gap, outcome.optimum.proof_gap) == (0.0, 0.0)
        assert outcome.latency_upper_ms <= latency_ms
    top = max(outcomes[0].front.accuracy)
    for outcome in outcomes:
        (price,) = outcome.prices
        assert price.lost == pytest.approx(top - outcome.accuracy)


@pytest.mark.parametrize("name", sorted(SEARCHERS))
class TestConformance:
    """What every searcher must do."""

    def test_meets_the_constraint_within_the_budget(self, name: str) -> None:
        predictors = reference_predictors("rpi4")
        objective = Objective(predictors, confidence=0.95)
        result = SEARCHERS[name].search(under(objective, 70.0), evaluations=3000, seed=1)
        size = result.architecture.image_size
        upper = predictors.of("latency_ms", size).upper_bound([result.architecture], 0.95)[0]
        np.testing.assert_allclose(upper, result.latency_upper_ms)
        assert upper <= 70.0
        np.testing.assert_allclose(predictors.of("accuracy", size).predict([result.architecture])[0], result.accuracy)
        assert result.evaluations <= 3000
        accuracies = [p.best_accuracy for p in result.trace]
        assert accuracies == sorted(set(accuracies))
        assert accuracies[-1] == result.accuracy
        assert all(1 <= p.evaluation <= 3000 for p in result.trace)

    def test_is_reproducible(self, name: str) -> None:
        objective = Objective(reference_predictors("rpi4"), confidence=0.9, image_sizes=[192])
        a, b = (SEARCHERS[name].search(under(objective, 60.0), evaluations=2000, seed=5) for _ in range(2))
        assert a.architecture == b.architecture
        assert a.trace == b.trace

    def test_infeasible_names_the_smallest_latency(self, name: str) -> None:
        objective = Objective(reference_predictors("rpi4"))
        with pytest.raises(InfeasibleConstraintError) as error:
            SEARCHERS[name].search(under(objective, 5.0), evaluations=2000)
        smallest = error.value.smallest_latency_ms
        SEARCHERS[name].search(under(objective, smallest * 1.0001), evaluations=2000)


def test_bad_requests() -> None:
    predictors = reference_predictors("rpi4")
    for kwargs, message in (
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": 0.0}, "confidence"),
        ({"algorithm": "magic"}, "algorithm"),
        ({"evaluations": 0}, "evaluations"),
    ):
        with pytest.raises(InvalidInputError, match=message):
            search(predictors, 60.0, **kwargs)  # type: ignore[arg-type]
    for latency in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidInputError, match="latency_ms"):
            search(predictors, latency)
    with pytest.raises(InvalidInputError, match=r"one number of milliseconds; received \[40, 60\]; .*search_each"):
        search(predictors, [40, 60])  # type: ignore[arg-type]
    with pytest.raises(OutOfDomainError, match="224 px"):
        search(predictors, 60.0, image_sizes=[224])


def test_edits_are_differences_of_predictions() -> None:
    predictors = reference_predictors("rpi4")
    architecture = CPU_SPACE.uniform(256, depth=3, expansion=4, kernel=5)
    edits = rank_edits(predictors, architecture)
    assert len(edits) == 5 * 2 + 15 * 5
    base_accuracy = predictors.of("accuracy", 256).predict([architecture])[0]
    base_latency = predictors.of("latency_ms", 256).predict([architecture])[0]
    for edit in edits:
        np.testing.assert_allclose(
            predictors.of("accuracy", 256).predict([edit.architecture])[0] - base_accuracy, edit.delta_accuracy
        )
        np.testing.assert_allclose(
            predictors.of("latency_ms", 256).predict([edit.architecture])[0] - base_latency, edit.delta_latency_ms
        )
        assert edit.delta_latency_margin > 0
    prices = [edit.price for edit in edits]
    assert prices == sorted(prices)


def test_guided_annealing_is_near_the_optimum_after_a_few_points() -> None:
    """The paper's figure 8: ahead of evolution and of annealing without guidance."""
    objective = Objective(reference_predictors("rpi4"), confidence=0.95)
    counts = (50, 100, 200, 500, 1000, 2000)
    gaps: dict[str, list[list[float]]] = {"annealing": [], "annealing-unguided": [], "evolution": []}
    for seed, limit in enumerate(np.linspace(42.0, 220.0, 9)):
        optimum = exact_optimum(objective, limit).accuracy
        for name, gap in gaps.items():
            trace = SEARCHERS[name].search(under(objective, limit), evaluations=2000, seed=seed).trace
            gap.append([optimum - max(p.best_accuracy for p in trace if p.evaluation <= n) for n in counts])
    guided, unguided, evolution = (np.median(gap, axis=0) for gap in gaps.values())
    assert guided[0] <= 0.5
    assert guided[3] <= 0.1
    assert (guided <= evolution).all()
    assert (guided <= unguided).all()


@pytest.mark.parametrize("searched", [SMALL, CPU_SPACE, TPU_SPACE], ids=lambda space: space.name)
def test_genes_name_the_options_that_their_blocks_name(searched: SearchSpace) -> None:
    space = GeneSpace(pose(random_predictors(1, searched, searched.image_sizes[:2]), 1e9))
    genes = space.sample(np.random.default_rng(0), 500)
    assert (space.index(genes) == space.objective.options.lookup(space.kinds(genes))).all()


@pytest.mark.parametrize("pose_it", ["latency", "limits", "least"])
def test_guidance_needs_no_network_and_helps_under_any_goal(pose_it: str) -> None:
    predictors = reference_predictors("rpi4")
    if pose_it == "latency":
        problem = pose(predictors, 80.0)
    elif pose_it == "limits":
        problem = pose(predictors, 120.0, limits="macs<=250e6, int8_size_bytes<=5e6, peak_activation_bytes<=500e3")
    else:
        problem = pose(predictors, objective="macs", min_accuracy=74.0)
    space = GeneSpace(problem)
    for size in range(len(problem.objective.sizes)):
        gains, uses = main_effects(space, size)
        assert np.isfinite(uses).all()
        # An effect is what changing one parameter brings on average over the others, all by one slope.
        genes = space.sample(np.random.default_rng(0), 2000)
        genes[:, -1] = size
        depths = np.arange(0, space.n_genes - 1, 1 + 2 * space.max_depth)
        genes[:, depths] = space.choices[depths] - 1
        slopes = []
        for gene in (1, 3, 12, space.n_genes - 2):
            linear = []
            for value in (0, space.choices[gene] - 1):
                genes[:, gene] = value
                index = problem.objective.options.lookup(space.kinds(genes))
                linear.append(problem.objective.sizes[size].evaluate(index)[0].mean())
            slopes.append((gains[gene, space.choices[gene] - 1] - gains[gene, 0]) / (linear[1] - linear[0]))
        np.testing.assert_allclose(slopes, slopes[0], rtol=0.03)
    gaps = {}
    optimum = solve(problem)
    for name in ("annealing", "annealing-unguided"):
        result = SEARCHERS[name].search(problem, evaluations=300, seed=1)
        gaps[name] = (
            optimum.accuracy - result.accuracy if optimum.least is None else result.amounts["macs"] - optimum.least
        )
    assert 0 <= gaps["annealing"] + 1e-9 < gaps["annealing-unguided"]


def test_guidance_saves_evaluations() -> None:
    objective = Objective(reference_predictors("rpi4"), confidence=0.95)
    budgets = {"annealing": 2000, "annealing-unguided": 10_000}
    spent: dict[str, list[float]] = {name: [] for name in budgets}
    for seed, limit in enumerate((40.0, 60.0, 80.0, 100.0, 120.0)):
        close = exact_optimum(objective, limit).accuracy - 0.1
        for name, budget in budgets.items():
            trace = SEARCHERS[name].search(under(objective, limit), evaluations=budget, seed=seed).trace
            hits = [point.evaluation for point in trace if point.best_accuracy >= close]
            spent[name].append(hits[0] if hits else np.inf)
    assert 10 * np.median(spent["annealing"]) < np.median(spent["annealing-unguided"])


def test_a_bound_beyond_its_limit_is_told_with_what_overrules_it() -> None:
    outcome = search(reference_predictors("rpi4"), 60.0, algorithm=RandomSearch(), evaluations=1)
    ((limit, words),) = outcome.limit_words()
    assert words.startswith(f"at most {outcome.latency_upper_ms:.6g}; binds")
    slower = dataclasses.replace(outcome, amounts={**outcome.amounts, "latency_ms": 66.0})
    assert slower.amount_words(limit) == "at most 66 predicted, within the limit as measured"
