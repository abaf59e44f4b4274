"""Several limits at once, against brute force over every architecture of small spaces."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.special import stdtrit

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.errors import InfeasibleConstraintError, InfeasibleLimitsError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet, get_formula, reference_predictors
from foxnas_mlflow.core.searchers import (
    SEARCHERS,
    Limit,
    Objective,
    Optimum,
    Problem,
    SimulatedAnnealing,
    describe_limits,
    exact_optimum,
    feasible_points,
    least,
    parse_limits,
    pose,
    rank_edits,
    search,
    search_each,
    solve,
    value_edits,
)
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace, StageSpec

SIZES = (32, 48)
SMALL = SearchSpace(
    name="small3",
    image_sizes=SIZES,
    kernels=(3, 5),
    expansions=(2, 4),
    depths=(1, 2),
    stages=(StageSpec(16, 2, "mbconv"), StageSpec(24, 1, "mbconv_se")),
)
KINDS = [(b.expansion, b.kernel) for b in SMALL.kinds]
STAGES = [list(s) for d in SMALL.depths for s in itertools.product(KINDS, repeat=d)]
EVERY = [SMALL.architecture(size, list(c)) for size in SIZES for c in itertools.product(STAGES, repeat=2)]
COUNTED = ("int8_size_bytes", "params", "macs", "peak_activation_bytes")
COSTS = [network_cost(build_network(SMALL, a)) for a in EVERY]
COUNTS = {quantity: np.array([float(getattr(cost, quantity)) for cost in COSTS]) for quantity in COUNTED}


@functools.cache
def predictors_of(seed: int) -> PredictorSet:
    """Random equation 2 for both quantities, so that larger is neither slower nor better by rule."""
    rng = np.random.default_rng(seed)

    def make(quantity: str, formula: str) -> LinearPredictor:
        columns = get_formula(formula, quantity).columns(SMALL)
        p = len(columns)
        beta = rng.normal(0, 0.3, p) if quantity == "accuracy" else rng.normal(0, 2.0, p)
        ceiling = None
        if formula == "calibrated":
            beta, ceiling = rng.normal(0, 0.2, p), 90.0
        beta[-1] = -2.5 if formula == "calibrated" else 60.0
        root = rng.normal(0, 0.05, (p, p))
        return LinearPredictor(
            formula, quantity, SMALL, SIZES, SIZES, columns, beta, root @ root.T, 0.05, dof=20, ceiling=ceiling
        )  # type: ignore[arg-type]

    accuracy = make("accuracy", ("paper", "calibrated")[seed % 2])
    return PredictorSet("t", SMALL, (accuracy,), (make("latency_ms", "paper"),))


@functools.cache
def design_of(formula: str, quantity: str) -> NDArray[np.float64]:
    """Design rows of every architecture, once for all predictors."""
    return get_formula(formula, quantity).design(SMALL, EVERY)


@functools.cache
def accuracies(seed: int) -> NDArray[np.float64]:
    predictor = predictors_of(seed).accuracy[0]
    return predictor.from_linear(design_of(predictor.formula, "accuracy") @ predictor.coefficients)


@functools.cache
def predicted_ms(seed: int) -> NDArray[np.float64]:
    return design_of("paper", "latency_ms") @ predictors_of(seed).latency[0].coefficients


@functools.cache
def amounts(seed: int, confidence: float) -> Mapping[str, NDArray[np.float64]]:
    latency, x = predictors_of(seed).latency[0], design_of("paper", "latency_ms")
    assert latency.covariance is not None
    sd = np.sqrt(np.einsum("ij,jk,ik->i", x, latency.covariance, x) + latency.sigma**2)
    return {"latency_ms": predicted_ms(seed) + stdtrit(latency.dof, confidence) * sd, **COUNTS}


def random_limits(rng: np.random.Generator, known: Mapping[str, NDArray[np.float64]], n: int) -> tuple[Limit, ...]:
    chosen = rng.choice(sorted(known), size=n, replace=False)
    return tuple(Limit(str(q), float(np.quantile(known[str(q)], rng.uniform(0.2, 0.9)))) for q in chosen)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
@pytest.mark.parametrize("n_limits", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(8))
def test_the_optimum_under_limits_equals_brute_force(seed: int, n_limits: int, confidence: float) -> None:
    predictors = predictors_of(seed)
    known, accuracy = amounts(seed, confidence), accuracies(seed)
    rng = np.random.default_rng([seed, n_limits, int(100 * confidence)])
    for _ in range(2):
        limits = random_limits(rng, known, n_limits)
        problem = pose(predictors, limits=limits, confidence=confidence)
        meets = np.all([known[limit.quantity] <= limit.value for limit in limits], axis=0)
        if not meets.any():
            with pytest.raises(InfeasibleConstraintError):
                solve(problem)
            continue
        optimum = solve(problem)
        found = EVERY.index(optimum.architecture)
        assert meets[found]
        np.testing.assert_allclose(accuracy[found], optimum.accuracy, rtol=1e-12)
        np.testing.assert_allclose(optimum.accuracy, accuracy[meets].max(), rtol=1e-12)
        assert optimum.proof_gap <= 1e-9
        for quantity, amount in optimum.amounts.items():
            np.testing.assert_allclose(known[quantity][found], amount, rtol=1e-12)


@pytest.mark.parametrize("goal", ["latency_ms", *COUNTED])
@pytest.mark.parametrize("seed", range(4))
def test_the_least_of_a_quantity_at_an_accuracy_equals_brute_force(seed: int, goal: str) -> None:
    predictors = predictors_of(seed)
    known, accuracy = amounts(seed, 0.9), accuracies(seed)
    worth = predicted_ms(seed) if goal == "latency_ms" else known[goal]
    rng = np.random.default_rng(seed)
    for n_limits in (0, 1, 2):
        limits = random_limits(rng, {q: v for q, v in known.items() if q != goal}, n_limits)
        wanted = float(np.quantile(accuracy, 0.6))
        meets = np.all([accuracy >= wanted, *(known[x.quantity] <= x.value for x in limits)], axis=0)
        problem = pose(predictors, limits=limits, objective=goal, min_accuracy=wanted, confidence=0.9)
        if not meets.any():
            with pytest.raises(InfeasibleConstraintError):
                solve(problem)
            continue
        optimum = solve(problem)
        found = EVERY.index(optimum.architecture)
        assert meets[found]
        np.testing.assert_allclose(optimum.least, worth[meets].min(), rtol=1e-12)
        np.testing.assert_allclose(worth[found], optimum.least, rtol=1e-12)
        if goal != "latency_ms":
            # Of networks with the same count the most accurate one is taken.
            np.testing.assert_allclose(accuracy[found], accuracy[meets & (worth <= optimum.least)].max())


def test_counts_are_those_of_whole_networks() -> None:
    objective = Objective(predictors_of(0), quantities=COUNTED)
    for i, size in enumerate(SIZES):
        part = [a for a in EVERY if a.image_size == size]
        index = np.array([objective.index_of(a) for a in part])
        values = objective.sizes[i].evaluate(index)[1]
        rows = [EVERY.index(a) for a in part]
        for column, quantity in enumerate(objective.quantities[1:], start=1):
            np.testing.assert_array_equal(values[:, column], COUNTS[quantity][rows])


def test_one_latency_limit_goes_the_old_way_and_agrees_with_the_new_one() -> None:
    predictors = reference_predictors("rpi4")
    for latency_ms in (45.0, 80.0, 150.0):
        old = exact_optimum(Objective(predictors), latency_ms)
        # A limit that nothing meets too little of changes nothing but the way.
        new = solve(pose(predictors, latency_ms, limits="macs<=1e12"))
        assert new.architecture == old.architecture
        assert new.accuracy == old.accuracy
        assert old.proof_gap == 0
        assert new.proof_gap < 1e-9


def test_bounds_of_several_predicted_quantities_hold_together() -> None:
    predictors = reference_predictors("rpi4")
    one = Objective(predictors, confidence=0.9, quantities=["latency_ms", "macs"])
    assert one.level == 0.9
    from foxnas_mlflow.core.searchers._objective import joint_level

    assert joint_level(0.9, 2) == pytest.approx(0.95)
    assert joint_level(0.5, 3) == 0.5


@functools.cache
def four_limits(goal: str) -> tuple[Problem, Optimum]:
    problem = pose(
        reference_predictors("rpi4"),
        limits="latency_ms<=90, int8_size_bytes<=4.5MB, peak_activation_bytes<=800e3, macs<=300M",
        objective=goal,
        min_accuracy=None if goal == "accuracy" else 72.0,
    )
    return problem, solve(problem)


@pytest.mark.parametrize("goal", ["accuracy", "int8_size_bytes", "latency_ms"])
@pytest.mark.parametrize("name", sorted(SEARCHERS))
def test_searchers_solve_the_same_problem(name: str, goal: str) -> None:
    problem, optimum = four_limits(goal)
    result = SEARCHERS[name].search(problem, evaluations=3000, seed=1)
    for limit in problem.limits:
        assert result.amounts[limit.quantity] <= limit.value
    assert result.evaluations <= 3000
    if goal == "accuracy":
        assert result.accuracy <= optimum.accuracy
    else:
        assert result.accuracy >= 72.0
        assert optimum.least is not None
        assert result.amounts[goal] >= optimum.least


def test_the_certificate_names_every_limit_and_which_bind() -> None:
    outcome = search(
        reference_predictors("rpi4"), 90.0, limits="int8_size_bytes<=4MB, peak_activation_bytes<=1e7", evaluations=500
    )
    certificate = outcome.certificate()
    assert "latency_ms <= 90" in certificate["constraint"]
    assert "int8_size_bytes <= 4000000" in certificate["statement"]
    limits = {entry["quantity"]: entry for entry in certificate["limits"]}
    assert list(limits) == ["latency_ms", "int8_size_bytes", "peak_activation_bytes"]
    assert all(entry["value"] <= entry["limit"] for entry in limits.values())
    assert [entry["binds"] for entry in limits.values()] == [True, True, False]
    assert limits["latency_ms"]["predicted"]
    assert not limits["int8_size_bytes"]["predicted"]
    # The price is what a search with a twentieth more finds.
    wider = pose(reference_predictors("rpi4"), 90.0, limits="int8_size_bytes<=4.2MB, peak_activation_bytes<=1e7")
    gained = solve(wider).accuracy - outcome.optimum.accuracy
    assert gained > 0
    assert limits["int8_size_bytes"]["price_points_per_unit"] == pytest.approx(gained / 0.2e6)
    assert outcome.prices[2].per_unit == 0


def test_infeasible_limits_name_what_each_can_reach_and_the_pair_that_clashes() -> None:
    predictors = reference_predictors("rpi4")
    with pytest.raises(InfeasibleLimitsError, match="smallest that each can reach alone") as error:
        solve(pose(predictors, 60.0, limits="int8_size_bytes<=1e6"))
    smallest = error.value.smallest
    assert smallest["int8_size_bytes"] > 1e6
    objective = Objective(predictors, quantities=["latency_ms", "int8_size_bytes"])
    assert smallest["latency_ms"] == least(objective, "latency_ms").amount
    solve(pose(predictors, limits={"int8_size_bytes": smallest["int8_size_bytes"]}))
    # Each can be met, and with macs too, but small macs at 256 px leave nothing for a late, large stage.
    predictors = predictors_of(0)
    known = amounts(0, 0.95)
    for a, b in itertools.permutations(known, 2):
        low = float(np.quantile(known[a], 0.05))
        other = float(known[b][known[a] <= low].min())
        if known[b].min() < other:
            pair = {a: low, b: (other + float(known[b].min())) / 2, "params": 1e9}
            with pytest.raises(InfeasibleLimitsError, match="cannot be met together") as error:
                solve(pose(predictors, limits=pair))
            assert {text.split()[0] for text in error.value.clash} == {a, b}
            # What is possible beside the other limit is what brute force finds there.
            least_a = float(COUNTS[a][known[b] <= pair[b]].min()) if a in COUNTS else None
            if least_a is not None:
                assert f"{a} of {least_a:.6g} beside {b} <= " in str(error.value)
            return
    pytest.fail("no two quantities of this space clash")


def test_edits_are_worth_what_they_bring_less_what_they_use_of_the_limits() -> None:
    found = search(reference_predictors("rpi4"), 80.0, limits="int8_size_bytes<=4.2MB, macs<=1e12", evaluations=500)
    prices = {price.limit.quantity: price for price in found.prices}
    assert [prices[q].binds for q in ("latency_ms", "int8_size_bytes", "macs")] == [True, True, False]
    valued = value_edits(found)
    assert len(valued) == len(rank_edits(found.objective.predictors, found.architecture))
    assert [v.worth for v in valued] == sorted((v.worth for v in valued), reverse=True)
    for v in valued:
        cost = network_cost(build_network(CPU_SPACE, v.edit.architecture))
        assert found.amounts["int8_size_bytes"] + v.used["int8_size_bytes"] == cost.int8_size_bytes
        use = sum(prices[q].per_unit * v.used[q] for q in ("latency_ms", "int8_size_bytes"))
        np.testing.assert_allclose(v.worth, v.edit.delta_accuracy - use)
        # The optimum cannot be edited into a better network that meets the limits.
        assert v.broken or v.edit.delta_accuracy <= 0


def test_an_accuracy_beyond_reach_names_the_one_within() -> None:
    predictors = reference_predictors("rpi4")
    best = solve(pose(predictors, 60.0)).accuracy
    for objective in ("accuracy", "int8_size_bytes"):
        with pytest.raises(InfeasibleLimitsError, match=f"predicted {best:.4f} %"):
            solve(pose(predictors, 60.0, objective=objective, min_accuracy=best + 0.1))
    assert solve(pose(predictors, 60.0, objective="int8_size_bytes", min_accuracy=best)).accuracy == best
    # With no other limit the most accurate network of all is what can be had.
    with pytest.raises(InfeasibleLimitsError, match="most accurate network is predicted 76"):
        solve(pose(predictors, objective="macs", min_accuracy=95))


def test_the_knee_lies_on_the_front_within_the_limits() -> None:
    size = float(np.quantile(COUNTS["int8_size_bytes"], 0.5))
    problem = pose(predictors_of(3), objective="knee", limits={"int8_size_bytes": size})
    base = pose(predictors_of(3), limits={"int8_size_bytes": size})
    points = feasible_points(base, solve(base), 12)
    knee = solve(problem)
    assert knee.architecture in [point.architecture for point in points[1:-1]]
    x = np.array([p.latency_upper_ms for p in points])
    y = np.array([p.accuracy for p in points])
    above = y - np.interp(x, x[[0, -1]], y[[0, -1]])
    assert knee.accuracy == pytest.approx(y[above.argmax()])


def test_points_below_an_optimum_are_optima_of_their_latencies() -> None:
    predictors = predictors_of(3)
    known, accuracy = amounts(3, 0.95), accuracies(3)
    size = float(np.quantile(known["int8_size_bytes"], 0.5))
    problem = pose(predictors, float(np.quantile(known["latency_ms"], 0.7)), limits={"int8_size_bytes": size})
    points = feasible_points(problem, solve(problem), 8)
    assert len(points) > 2
    for point in points:
        meets = (known["latency_ms"] <= point.latency_upper_ms) & (known["int8_size_bytes"] <= size)
        np.testing.assert_allclose(accuracy[meets].max(), point.accuracy)
    assert np.all(np.diff([p.accuracy for p in points]) > 0)


def test_each_of_several_latencies_has_its_own_network_and_one_front() -> None:
    predictors = reference_predictors("rpi4")
    outcomes = search_each(predictors, [45.0, 90.0], evaluations=300)
    assert [o.limits for o in outcomes] == [(Limit("latency_ms", 45.0),), (Limit("latency_ms", 90.0),)]
    assert outcomes[0].front is outcomes[1].front
    for outcome, latency_ms in zip(outcomes, (45.0, 90.0), strict=True):
        alone = search(predictors, latency_ms, evaluations=300)
        assert outcome.architecture == alone.architecture
        assert outcome.result.trace == alone.result.trace
    with pytest.raises(InvalidInputError, match="search_each"):
        search(predictors, [45.0, 90.0])  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="each of them once"):
        search_each(predictors, [45.0, 45.0])
    with pytest.raises(InvalidInputError, match="one knee; received 2 latencies"):
        search_each(predictors, [45.0, 90.0], objective="knee")


def test_a_searcher_is_taken_as_an_object_too() -> None:
    predictors = reference_predictors("rpi4")
    by_name = search(predictors, 60.0, algorithm="annealing", evaluations=2000, seed=4)
    assert search(predictors, 60.0, algorithm=SimulatedAnnealing(), evaluations=2000, seed=4).result.trace == (
        by_name.result.trace
    )
    assert search(predictors, 60.0, algorithm=SimulatedAnnealing(n_chains=2), evaluations=500).result.evaluations <= 500


def test_limits_are_read_from_text() -> None:
    text = "latency_ms<=20, int8_size_bytes<=2MB, peak_activation_bytes <= 400 kB, macs<=100M, energy_mj<=1.5J"
    limits = parse_limits(text)
    assert [(x.quantity, x.value) for x in limits] == [
        ("latency_ms", 20.0),
        ("int8_size_bytes", 2e6),
        ("peak_activation_bytes", 400e3),
        ("macs", 100e6),
        ("energy_mj", 1500.0),
    ]
    assert parse_limits(describe_limits(limits)) == limits
    assert parse_limits("latency_ms@second-board<=0.5s") == (Limit("latency_ms@second-board", 500.0),)
    assert parse_limits({"macs": 1e8}, latency_ms=3) == (Limit("latency_ms", 3.0), Limit("macs", 1e8))
    assert parse_limits("") == ()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ("latency<=20", "known|quantities that these predictors know"),
        ("latency_ms<=20, latency_ms<=30", "one limit"),
        ("latency_ms<=20MB", "units"),
        ("macs<=20ms", "units"),
        ("macs>=20", "quantity<=value"),
        ("macs<=", "quantity<=value"),
        ("macs<=0", "positive"),
        ("macs<=1.2.3", "number"),
        ("accuracy<=70", "min_accuracy"),
    ],
)
def test_bad_limits(limits: str, message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        pose(reference_predictors("rpi4"), limits=limits)


def test_bad_goals() -> None:
    predictors = reference_predictors("rpi4")
    with pytest.raises(InvalidInputError, match="needs a limit"):
        search(predictors)
    with pytest.raises(InvalidInputError, match="min_accuracy"):
        search(predictors, 60.0, objective="macs")
    with pytest.raises(InvalidInputError, match="quantities"):
        search(predictors, 60.0, objective="beauty", min_accuracy=70)
    with pytest.raises(InvalidInputError, match="between 0 and 100"):
        search(predictors, 60.0, objective="macs", min_accuracy=0.7e3)
    with pytest.raises(InvalidInputError, match="one limit"):
        search(predictors, 60.0, limits="latency_ms<=20")
    with pytest.raises(InvalidInputError, match="quantities of its objective"):
        Problem(Objective(predictors), (Limit("macs", 1e9),))


def test_every_network_is_reachable_by_its_indices() -> None:
    objective = Objective(predictors_of(1))
    architecture = Architecture.from_json(EVERY[-1].to_json())
    found = objective.architecture(1, objective.index_of(architecture))
    assert found.image_size == SIZES[1]
    np.testing.assert_array_equal(objective.index_of(found), objective.index_of(architecture))


def test_the_knee_s_own_limit_counts_among_those_that_hold_together() -> None:
    predictors = reference_predictors("rpi4")
    both = dataclasses.replace(predictors, quantities={"energy_mj": predictors.latency})
    problem = pose(both, objective="knee", limits="energy_mj<=80", confidence=0.95)
    assert [limit.quantity for limit in problem.limits] == ["latency_ms", "energy_mj"]
    assert problem.objective.level == pytest.approx(0.975)
