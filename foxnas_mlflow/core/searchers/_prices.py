"""What limits cost, and what lies below them: the same problem solved again with one limit changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.searchers._exact import Optimum, least
from foxnas_mlflow.core.searchers._limited import solve
from foxnas_mlflow.core.searchers._limits import Limit
from foxnas_mlflow.core.searchers._problem import Problem

_STEP = 0.05
"""Share of a limit that more of it is tried with."""

_EQUAL = 1e-9


@dataclass(frozen=True, slots=True)
class LimitPrice:
    """What a limit costs.

    Attributes:
        limit: The limit.
        lost: Accuracy (points) that the optimum would gain without it; 0 where it does not bind.
        step: So much more of the quantity was tried.
        gained: Accuracy (points) that the optimum gains with so much more.
    """

    limit: Limit
    lost: float
    step: float
    gained: float

    @property
    def binds(self) -> bool:
        """Whether a better network exists without the limit."""
        return self.lost > _EQUAL

    @property
    def per_unit(self) -> float:
        """Points for each unit more of the quantity."""
        return self.gained / self.step

    def to_dict(self) -> dict[str, Any]:
        """JSON object."""
        return {
            "binds": self.binds,
            "points_lost_to_it": self.lost,
            "price_step": self.step,
            "price_points_gained": self.gained,
            "price_points_per_unit": self.per_unit,
        }

    def __str__(self) -> str:
        if not self.binds:
            return f"{self.limit} does not bind"
        return (
            f"{self.limit} costs {self.lost:.2f} points; {self.step:.3g} more would buy {self.gained:.3f} points "
            f"({self.per_unit:.3g} a unit)"
        )


def limit_prices(problem: Problem, optimum: Optimum) -> tuple[LimitPrice, ...]:
    """The price of each limit in the order of the limits; none where accuracy is not the goal."""
    if problem.goal != "accuracy":
        return ()
    prices = []
    for limit in problem.limits:
        others = tuple(other for other in problem.limits if other is not limit)
        free = replace(problem, limits=others, min_accuracy=problem.min_accuracy or 0.0)
        lost = max(solve(free).accuracy - optimum.accuracy, 0.0)
        step, gained = _STEP * limit.value, 0.0
        if lost > _EQUAL:
            more = Limit(limit.quantity, limit.value + step)
            wider = replace(problem, limits=tuple(more if other is limit else other for other in problem.limits))
            gained = max(solve(wider).accuracy - optimum.accuracy, 0.0)
        prices.append(LimitPrice(limit, lost, step, gained))
    return tuple(prices)


def feasible_points(problem: Problem, optimum: Optimum, n: int) -> list[Optimum]:
    """Networks of the front under all limits: the most accurate one for each of up to n latencies.

    Args:
        problem: A problem whose goal is accuracy.
        optimum: Its optimum, the last point.
        n: Latency bounds, evenly spread in their logarithm from the least that meets the limits.

    Returns:
        The optima by ascending latency bound and accuracy, without repetition.
    """
    others = tuple(limit for limit in problem.limits if limit.quantity != "latency_ms")
    top = optimum.latency_upper_ms
    low = least(problem.objective, "latency_ms").amount
    points = [optimum]
    for latency_ms in np.geomspace(low * (1 + 1e-9), top, n)[-2::-1]:
        if latency_ms >= points[-1].latency_upper_ms:
            continue
        try:
            point = solve(replace(problem, limits=(Limit("latency_ms", float(latency_ms)), *others)))
        except InfeasibleConstraintError:
            break
        if point.accuracy < points[-1].accuracy:
            points.append(point)
    return points[::-1]
