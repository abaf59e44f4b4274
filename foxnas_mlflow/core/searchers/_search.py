"""One search: a heuristic searcher as asked for, and the exact optimum that judges it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers._annealing import SimulatedAnnealing
from foxnas_mlflow.core.searchers._base import Searcher, SearchResult
from foxnas_mlflow.core.searchers._evolution import Evolution
from foxnas_mlflow.core.searchers._exact import Front, Optimum, exact_optimum, front_of
from foxnas_mlflow.core.searchers._objective import Objective
from foxnas_mlflow.core.searchers._random import RandomSearch

SEARCHERS: Mapping[str, Searcher] = {
    searcher.name: searcher
    for searcher in (SimulatedAnnealing(), SimulatedAnnealing(guided=False), Evolution(), RandomSearch())
}
"""Searchers by name."""

DEFAULT_EVALUATIONS = 1_000_000


@dataclass(frozen=True)
class SearchOutcome:
    """Everything that one search found.

    Attributes:
        architecture: The best known architecture that meets the constraint.
        found_by: ``exact`` or the searcher's name, whichever is better.
        accuracy: Its predicted accuracy in percent.
        latency_ms: Its predicted latency.
        latency_upper_ms: Its upper latency bound at the confidence.
        result: What the heuristic searcher found.
        optimum: The exact optimum.
        front: The whole front of predicted latency and accuracy.
        front_seconds: Time that the front took.
        objective: What was searched.
    """

    architecture: Architecture
    found_by: str
    accuracy: float
    latency_ms: float
    latency_upper_ms: float
    result: SearchResult
    optimum: Optimum
    front: Front
    front_seconds: float
    objective: Objective

    @property
    def optimality_gap(self) -> float:
        """Accuracy points between the exact optimum and what the heuristic searcher found."""
        return self.optimum.accuracy - self.result.accuracy

    def certificate(self) -> dict[str, Any]:
        """The proof as JSON."""
        optimum = self.optimum
        return {
            "statement": (
                f"no architecture of space {self.objective.space.name!r} at {list(self.objective.image_sizes)} px "
                f"whose latency stays within the constraint at confidence {self.objective.confidence:g} "
                f"is predicted more accurate than {optimum.accuracy_bound:.6f} %"
            ),
            "exact_accuracy": optimum.accuracy,
            "accuracy_bound": optimum.accuracy_bound,
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
    """A searcher by name.

    Raises:
        InvalidInputError: If there is none.
    """
    try:
        return SEARCHERS[name]
    except KeyError:
        raise InvalidInputError(f"algorithm must be one of {sorted(SEARCHERS)}", received=name) from None


def check_budget(latency_ms: float, evaluations: int) -> None:
    """Check what a search may cost and what it must meet.

    Raises:
        InvalidInputError: If latency_ms or evaluations is not positive.
    """
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise InvalidInputError("latency_ms must be a positive number of milliseconds", received=latency_ms)
    if evaluations < 1:
        raise InvalidInputError("evaluations must be a positive integer", received=evaluations)


def search(
    predictors: PredictorSet,
    latency_ms: float,
    *,
    confidence: float = 0.95,
    image_sizes: Sequence[int] | None = None,
    algorithm: str = "annealing",
    evaluations: int = DEFAULT_EVALUATIONS,
    seed: int = 0,
) -> SearchOutcome:
    """Find the most accurate architecture under a latency, and prove it.

    Args:
        predictors: Predictors of the target.
        latency_ms: Latency constraint in milliseconds, positive.
        confidence: Probability with which a measurement of the found network meets the constraint,
            in [0.5, 1); 0.5 constrains the point prediction.
        image_sizes: Image sizes to search (px); all that the predictors know when None.
        algorithm: Heuristic searcher beside the exact method: see `SEARCHERS`.
        evaluations: Its budget.
        seed: Its seed.

    Returns:
        The outcome; its architecture is the better of the searcher's and the exact one.

    Raises:
        InvalidInputError: If an argument breaks a rule.
        InfeasibleConstraintError: If no architecture meets the constraint; it names the smallest
            reachable latency.
    """
    check_budget(latency_ms, evaluations)
    searcher = get_searcher(algorithm)
    objective = Objective(predictors, confidence=confidence, image_sizes=image_sizes)
    optimum = exact_optimum(objective, latency_ms)
    start = time.perf_counter()
    front = front_of(objective)
    front_seconds = time.perf_counter() - start
    result = searcher.search(objective, latency_ms, evaluations=evaluations, seed=seed)
    if result.accuracy > optimum.accuracy:
        # Only possible when the proof is left open (proof_gap > 0).
        architecture, found_by = result.architecture, result.algorithm
    else:
        architecture, found_by = optimum.architecture, "exact"
    accuracy = predictors.of("accuracy", architecture.image_size).predict([architecture])[0]
    latency = predictors.of("latency_ms", architecture.image_size)
    point = latency.predict([architecture])[0]
    upper = point if confidence == 0.5 else latency.upper_bound([architecture], confidence)[0]
    return SearchOutcome(
        architecture=architecture,
        found_by=found_by,
        accuracy=float(accuracy),
        latency_ms=float(point),
        latency_upper_ms=float(upper),
        result=result,
        optimum=optimum,
        front=front,
        front_seconds=front_seconds,
        objective=objective,
    )
