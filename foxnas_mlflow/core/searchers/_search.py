"""One search: a heuristic searcher as asked for, and the exact optimum that judges it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers._annealing import SimulatedAnnealing
from foxnas_mlflow.core.searchers._base import GeneSpace, Recorder, Searcher, SearchResult, TracePoint
from foxnas_mlflow.core.searchers._evolution import Evolution
from foxnas_mlflow.core.searchers._exact import Front, Optimum, front_of
from foxnas_mlflow.core.searchers._limited import solve
from foxnas_mlflow.core.searchers._limits import Limit, parse_limits
from foxnas_mlflow.core.searchers._objective import Objective
from foxnas_mlflow.core.searchers._prices import LimitPrice, feasible_points, limit_prices, spoken
from foxnas_mlflow.core.searchers._problem import Problem
from foxnas_mlflow.core.searchers._quantities import check_quantity, predicted_quantities
from foxnas_mlflow.core.searchers._random import RandomSearch

SEARCHERS: Mapping[str, Searcher] = {
    searcher.name: searcher
    for searcher in (SimulatedAnnealing(), SimulatedAnnealing(guided=False), Evolution(), RandomSearch())
}
"""Searchers by name."""


class ExactAlone(Searcher):
    """No searcher beside the exact method, whose optimum is the result: what many limits at once are searched with."""

    name = "exact"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        """Nothing is searched for."""

    def search(self, problem: Problem, *, evaluations: int, seed: int = 0) -> SearchResult:
        """The exact optimum, as of one evaluation."""
        start = time.perf_counter()
        optimum = solve(problem)
        return self.result_of(optimum, seconds=time.perf_counter() - start, seed=seed)

    def result_of(self, optimum: Optimum, *, seconds: float, seed: int) -> SearchResult:
        """An optimum as a searcher's result."""
        return SearchResult(
            algorithm=self.name,
            architecture=optimum.architecture,
            accuracy=optimum.accuracy,
            amounts=optimum.amounts,
            evaluations=1,
            seconds=seconds,
            trace=(TracePoint(1, optimum.accuracy, optimum.latency_upper_ms, 0),),
            seed=seed,
        )


DEFAULT_EVALUATIONS = 1_000_000


@dataclass(frozen=True)
class SearchOutcome:
    """Everything that one search found.

    Attributes:
        architecture: The best known architecture that meets the limits.
        found_by: ``exact`` or the searcher's name, whichever is better.
        accuracy: Its predicted accuracy in percent.
        latency_ms: Its predicted latency.
        amounts: Every quantity that was limited, and latency: upper bounds at the confidence, or counts.
        result: What the heuristic searcher found.
        optimum: The exact optimum.
        prices: What each limit costs, in the order of the limits; empty where accuracy was not the goal.
        front: The whole front of predicted latency and accuracy, limits aside.
        front_seconds: Time that the front took.
        problem: What was searched for.

    Examples:
        >>> from foxnas_mlflow import reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), latency_ms=80, evaluations=5_000)
        >>> outcome.optimum.proof_gap < 1e-6
        True
    """

    architecture: Architecture
    found_by: str
    accuracy: float
    latency_ms: float
    amounts: Mapping[str, float]
    result: SearchResult
    optimum: Optimum
    prices: tuple[LimitPrice, ...]
    front: Front
    front_seconds: float
    problem: Problem

    @property
    def objective(self) -> Objective:
        """Accuracy and the quantities."""
        return self.problem.objective

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits that it meets."""
        return self.problem.limits

    @property
    def latency_upper_ms(self) -> float:
        """Its upper latency bound at the confidence."""
        return self.amounts["latency_ms"]

    @property
    def latency_limit_ms(self) -> float | None:
        """The limit on latency, or None where there is none."""
        return next((limit.value for limit in self.limits if limit.quantity == "latency_ms"), None)

    def amount_words(self, limit: Limit) -> str:
        """What the network has of a limited quantity."""
        amount = self.amounts[limit.quantity]
        if limit.quantity not in self.objective.sizes[0].bounds:
            return spoken(amount)
        # A device's word counts more than the predictors' (`verify`).
        return f"at most {spoken(amount)}" + (
            " predicted, within the limit as measured" if amount > limit.value else ""
        )

    def limit_words(self) -> list[tuple[Limit, str]]:
        """Every limit, with what the network has of it, whether it binds, and what more of it would buy."""
        prices = {price.limit: price for price in self.prices}
        words = []
        for limit in self.limits:
            text = self.amount_words(limit)
            if limit in prices:
                price = prices[limit]
                text += f"; binds, costs {price.lost:.2f} points, {price.buys()}" if price.binds else "; does not bind"
            words.append((limit, text))
        return words

    @property
    def optimality_gap(self) -> float:
        """What the heuristic searcher left: points of accuracy, or units of the quantity that was to be least."""
        if self.optimum.least is None:
            return self.optimum.accuracy - self.result.accuracy
        size = self.objective.sizes[self.objective.image_sizes.index(self.result.architecture.image_size)]
        index = self.objective.index_of(self.result.architecture)
        return float(size.point(self.problem.goal, index[None])[0]) - self.optimum.least

    def certificate(self) -> dict[str, Any]:
        """The proof as JSON: what was asked for, every limit with the optimum's value, and what is proven."""
        optimum, problem, objective = self.optimum, self.problem, self.objective
        if optimum.least_bound is None:
            claim = f"is predicted more accurate than {optimum.accuracy_bound:.6f} %"
        else:
            claim = f"is predicted to have {problem.goal} below {optimum.least_bound:.8g}"
        priced = {price.limit.quantity: price for price in self.prices}
        return {
            "statement": (
                f"no architecture of space {objective.space.name!r} at {list(objective.image_sizes)} px "
                f"that meets the constraint ({problem}) at confidence {objective.confidence:g} {claim}"
            ),
            "constraint": str(problem),
            "goal": problem.goal,
            "min_accuracy": problem.min_accuracy,
            "confidence": objective.confidence,
            "confidence_of_each_bound": objective.level,
            "limits": [
                {
                    "quantity": limit.quantity,
                    "limit": limit.value,
                    "value": optimum.amounts[limit.quantity],
                    "predicted": limit.quantity in objective.sizes[0].bounds,
                    **({} if limit.quantity not in priced else priced[limit.quantity].to_dict()),
                }
                for limit in problem.limits
            ],
            "exact_accuracy": optimum.accuracy,
            "accuracy_bound": optimum.accuracy_bound,
            "least": optimum.least,
            "least_bound": optimum.least_bound,
            "proof_gap": optimum.proof_gap,
            "exact_latency_ms": optimum.latency_ms,
            "exact_latency_upper_ms": optimum.latency_upper_ms,
            "tangents": optimum.tangents,
            "searcher": self.result.algorithm,
            "searcher_accuracy": self.result.accuracy,
            "optimality_gap": self.optimality_gap,
            "found_by": self.found_by,
            "front_size": len(self.front),
        }


def get_searcher(name: str) -> Searcher:
    """A searcher by name: those of `SEARCHERS`, or ``exact`` for none beside the exact method.

    Raises:
        InvalidInputError: If there is none.

    Examples:
        >>> from foxnas_mlflow import get_searcher
        >>> type(get_searcher("annealing")).__name__
        'SimulatedAnnealing'
    """
    known = {**SEARCHERS, ExactAlone.name: ExactAlone()}
    if name not in known:
        raise InvalidInputError(f"algorithm must be one of {sorted(known)}", received=name)
    return known[name]


_KNEE_POINTS = 12

KNEE = "knee"
"""Goal: the network of the front after which more latency buys least."""


def pose(
    predictors: PredictorSet,
    latency_ms: float | None = None,
    *,
    limits: str | Mapping[str, float] | Iterable[Limit] = "",
    objective: str = "accuracy",
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    image_sizes: Sequence[int] | None = None,
) -> Problem:
    """Turn what `search` is asked into a problem; the arguments are those of `search`.

    The knee becomes a limit: of the networks within the limits, the one whose accuracy lies farthest above the
    straight line from the fastest to the most accurate one (Satopaa et al., 2011), and its latency bound.

    Raises:
        InvalidInputError: If an argument breaks a rule.
        InfeasibleConstraintError: If the knee is asked for and no network meets the limits.

    Examples:
        >>> from foxnas_mlflow import pose, reference_predictors
        >>> problem = pose(reference_predictors("rpi4"), objective="latency_ms", min_accuracy=74)
        >>> problem.goal, problem.min_accuracy
        ('latency_ms', 74)
    """
    asked = parse_limits(limits, latency_ms=latency_ms)
    if min_accuracy is not None and not 0 < min_accuracy < 100:
        raise InvalidInputError("min_accuracy must lie between 0 and 100 percent", received=min_accuracy)
    goal = "accuracy" if objective == KNEE else objective
    if goal != "accuracy":
        check_quantity(goal, predicted_quantities(predictors))
    quantities = [limit.quantity for limit in asked]
    if goal != "accuracy":
        quantities.append(goal)
    if objective == KNEE or not quantities:
        # The knee becomes a limit too, whose bound counts among those that hold together.
        quantities.append("latency_ms")
    known = Objective(predictors, confidence=confidence, image_sizes=image_sizes, quantities=quantities)
    if objective != KNEE:
        return Problem(known, asked, goal, min_accuracy)
    base = Problem(known, asked, min_accuracy=min_accuracy if asked else min_accuracy or 0.0)
    points = feasible_points(base, solve(base), _KNEE_POINTS)
    x = np.array([point.latency_upper_ms for point in points])
    y = np.array([point.accuracy for point in points])
    line = y[0] + (y[-1] - y[0]) * (x - x[0]) / max(x[-1] - x[0], 1e-300)
    knee = Limit("latency_ms", float(x[int(np.argmax(y - line))]))
    return Problem(
        known, (knee, *(limit for limit in asked if limit.quantity != "latency_ms")), "accuracy", min_accuracy
    )


def pose_each(
    predictors: PredictorSet,
    latencies_ms: Sequence[float | None],
    *,
    limits: str | Mapping[str, float] = "",
    objective: str = "accuracy",
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    image_sizes: Sequence[int] | None = None,
) -> tuple[Problem, ...]:
    """A problem for each of several latencies, on one objective; the arguments are those of `search_each`.

    Raises:
        InvalidInputError: If there are no latencies, one is there twice, or an argument breaks a rule.
        InfeasibleConstraintError: If the knee is asked for and no network meets the limits.
    """
    check_latencies(latencies_ms, objective)
    first = pose(
        predictors,
        latencies_ms[0],
        limits=limits,
        objective=objective,
        min_accuracy=min_accuracy,
        confidence=confidence,
        image_sizes=image_sizes,
    )
    others = (parse_limits(limits, latency_ms=latency_ms) for latency_ms in latencies_ms[1:])
    return (first, *(dataclasses.replace(first, limits=asked) for asked in others))


def check_latencies(latencies_ms: Sequence[float | None], objective: str) -> None:
    """Refuse several latencies that are no different searches.

    Raises:
        InvalidInputError: If there are none, one is there twice, or the knee is asked for more than once.
    """
    if not latencies_ms or len(set(latencies_ms)) < len(latencies_ms):
        raise InvalidInputError("latencies must be given, each of them once", received=list(latencies_ms))
    if objective == KNEE and len(latencies_ms) > 1:
        raise InvalidInputError(
            "a front has one knee", received=f"{len(latencies_ms)} latencies", remedy="give one at most"
        )


def search(
    predictors: PredictorSet,
    latency_ms: float | None = None,
    *,
    limits: str | Mapping[str, float] | Iterable[Limit] = "",
    objective: str = "accuracy",
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    image_sizes: Sequence[int] | None = None,
    algorithm: str | Searcher = "annealing",
    evaluations: int = DEFAULT_EVALUATIONS,
    seed: int = 0,
) -> SearchOutcome:
    """Find the best architecture under limits, and prove it.

    Args:
        predictors: Predictors of the target.
        latency_ms: Latency limit in milliseconds, positive: short for a limit of ``latency_ms``.
        limits: Further limits, for example ``"int8_size_bytes<=2MB, peak_activation_bytes<=400e3"``, or
            quantities with their values. Known: what the predictors know, ``int8_size_bytes``, ``params``,
            ``macs`` and ``peak_activation_bytes``.
        objective: ``accuracy`` (the most accurate network), a quantity (the network predicted to have least of
            it, at `min_accuracy`), or ``knee`` (the knee of the front of latency and accuracy).
        min_accuracy: Least predicted accuracy in percent.
        confidence: Probability with which measurements of the found network meet all limits on predicted
            quantities together, in [0.5, 1); 0.5 constrains the point predictions.
        image_sizes: Image sizes to search (px); all that the predictors know when None.
        algorithm: Heuristic searcher beside the exact method: an object, or a name of `get_searcher`.
        evaluations: Its budget.
        seed: Its seed.

    Returns:
        The outcome; its architecture is the better of the searcher's and the exact one.

    Raises:
        InvalidInputError: If an argument breaks a rule.
        InfeasibleConstraintError: If no architecture meets the limits; it names what can be reached.

    Examples:
        >>> from foxnas_mlflow import reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), latency_ms=60, evaluations=5_000)
        >>> outcome.latency_upper_ms <= 60
        True
        >>> outcome.certificate()["statement"]
        "no architecture of space 'cpu' at [192, 256] px that meets the constraint ..."
    """
    problem = pose(
        predictors,
        latency_ms,
        limits=limits,
        objective=objective,
        min_accuracy=min_accuracy,
        confidence=confidence,
        image_sizes=image_sizes,
    )
    return _search_problems([problem], algorithm, evaluations, seed)[0]


def search_each(
    predictors: PredictorSet,
    latencies_ms: Sequence[float],
    *,
    limits: str | Mapping[str, float] = "",
    objective: str = "accuracy",
    min_accuracy: float | None = None,
    confidence: float = 0.95,
    image_sizes: Sequence[int] | None = None,
    algorithm: str | Searcher = "annealing",
    evaluations: int = DEFAULT_EVALUATIONS,
    seed: int = 0,
) -> list[SearchOutcome]:
    """One search for each of several latencies, with one front.

    Args:
        predictors: Predictors of the target.
        latencies_ms: Latency limits in milliseconds.
        limits: Further limits, the same for all.
        objective: As for `search`, and so are all that follow.
        min_accuracy: Least accuracy in percent.
        confidence: Probability in [0.5, 1) that a network meets its limits together.
        image_sizes: Image sizes in pixels.
        algorithm: Name of a searcher, or one.
        evaluations: Budget of each search.
        seed: Seed of each.

    Raises:
        InvalidInputError: If there are no latencies, one is there twice, or an argument breaks a rule.
        InfeasibleConstraintError: If no architecture meets one of them.

    Examples:
        >>> from foxnas_mlflow import reference_predictors, search_each
        >>> outcomes = search_each(reference_predictors("rpi4"), [60, 80, 110], evaluations=2_000)
        >>> outcomes[0].accuracy < outcomes[1].accuracy < outcomes[2].accuracy
        True
    """
    problems = pose_each(
        predictors,
        latencies_ms,
        limits=limits,
        objective=objective,
        min_accuracy=min_accuracy,
        confidence=confidence,
        image_sizes=image_sizes,
    )
    return _search_problems(problems, algorithm, evaluations, seed)


def _search_problems(
    problems: Sequence[Problem], algorithm: str | Searcher, evaluations: int, seed: int
) -> list[SearchOutcome]:
    """Solve problems of one objective, with one front."""
    if evaluations < 1:
        raise InvalidInputError("evaluations must be a positive integer", received=evaluations)
    searcher = get_searcher(algorithm) if isinstance(algorithm, str) else algorithm
    start = time.perf_counter()
    front = front_of(problems[0].objective)
    seconds = time.perf_counter() - start
    return [
        search_problem(problem, front, front_seconds=seconds, searcher=searcher, evaluations=evaluations, seed=seed)
        for problem in problems
    ]


def search_problem(
    problem: Problem,
    front: Front,
    *,
    front_seconds: float = 0.0,
    searcher: Searcher,
    evaluations: int = DEFAULT_EVALUATIONS,
    seed: int = 0,
) -> SearchOutcome:
    """Solve a problem both ways.

    Args:
        problem: From `pose`.
        front: Of its objective.
        front_seconds: Time that the front took.
        searcher: Heuristic searcher beside the exact method.
        evaluations: Its budget.
        seed: Its seed.

    Raises:
        InfeasibleConstraintError: If no architecture meets the limits; it names what can be reached.
    """
    solved = solve_both(problem, searcher=searcher, evaluations=evaluations, seed=seed)
    return outcome_of(problem, front, solved, front_seconds=front_seconds)


class Solved(NamedTuple):
    """What is found of a problem, apart from its objective and front.

    Attributes:
        optimum: The exact optimum.
        result: What the heuristic searcher found.
        prices: What each limit costs.
    """

    optimum: Optimum
    result: SearchResult
    prices: tuple[LimitPrice, ...]


def solve_both(problem: Problem, *, searcher: Searcher, evaluations: int, seed: int) -> Solved:
    """Solve a problem exactly and with a searcher; the arguments are those of `search_problem`."""
    start = time.perf_counter()
    optimum = solve(problem)
    if isinstance(searcher, ExactAlone):
        result = searcher.result_of(optimum, seconds=time.perf_counter() - start, seed=seed)
    else:
        result = searcher.search(problem, evaluations=evaluations, seed=seed)
    return Solved(optimum, result, limit_prices(problem, optimum))


def outcome_of(problem: Problem, front: Front, solved: Solved, *, front_seconds: float = 0.0) -> SearchOutcome:
    """The outcome of a problem that was solved here or elsewhere; the arguments are those of `search_problem`."""
    optimum, result, prices = solved
    if problem.goal == "accuracy" and result.accuracy > optimum.accuracy:
        # Only possible when the proof is left open (proof_gap > 0).
        architecture, found_by, amounts = result.architecture, result.algorithm, result.amounts
    else:
        architecture, found_by, amounts = optimum.architecture, "exact", optimum.amounts
    predictors, size = problem.objective.predictors, architecture.image_size
    return SearchOutcome(
        architecture=architecture,
        found_by=found_by,
        accuracy=float(predictors.of("accuracy", size).predict([architecture])[0]),
        latency_ms=float(predictors.of("latency_ms", size).predict([architecture])[0]),
        amounts=amounts,
        result=result,
        optimum=optimum,
        prices=prices,
        front=front,
        front_seconds=front_seconds,
        problem=problem,
    )
