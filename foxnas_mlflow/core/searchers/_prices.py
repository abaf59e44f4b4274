"""What limits cost, and what lies below them: the same problem solved again with one limit changed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.searchers._exact import Optimum, least, most_accurate_percent
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

    Examples:
        >>> from foxnas_mlflow import limit_prices, reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), 60, evaluations=2_000)
        >>> (price,) = limit_prices(outcome.problem, outcome.optimum)
        >>> price.per_unit > 0  # points for each further millisecond
        True
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

    def buys(self) -> str:
        """What one more ms, kB, mJ or so would buy, as text."""
        amount, unit = spoken_unit(self.limit.quantity)
        return f"one more {unit} buys {amount * self.per_unit:.3g} points"

    def __str__(self) -> str:
        if not self.binds:
            return f"{self.limit} does not bind"
        return f"{self.limit} binds and costs {self.lost:.2f} points: {self.buys()}"


_SPOKEN = (
    ("_ms", 1.0, "ms"),
    ("_bytes", 1e3, "kB"),
    ("_mj", 1.0, "mJ"),
    ("params", 1e3, "thousand parameters"),
    ("macs", 1e6, "million multiply-accumulates"),
)


def spoken_unit(quantity: str) -> tuple[float, str]:
    """How much of a quantity people count in, and its name: 1000 and kB for a quantity in bytes."""
    base = quantity.split("@")[0]
    return next(((amount, unit) for ending, amount, unit in _SPOKEN if base.endswith(ending)), (1.0, "unit"))


def spoken(amount: float) -> str:
    """An amount as people read it: thousands apart, six digits."""
    return f"{amount:,.0f}" if amount >= 1e5 else f"{amount:,.6g}"


def limit_prices(problem: Problem, optimum: Optimum) -> tuple[LimitPrice, ...]:
    """The price of each limit in the order of the limits; none where accuracy is not the goal.

    Examples:
        >>> from foxnas_mlflow import limit_prices, reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), 60, limits="macs<=1e12", evaluations=2_000)
        >>> [(price.limit.quantity, price.binds) for price in limit_prices(outcome.problem, outcome.optimum)]
        [('latency_ms', True), ('macs', False)]
    """
    if problem.goal != "accuracy":
        return ()
    prices = []
    for limit in problem.limits:
        others = tuple(other for other in problem.limits if other is not limit)
        free = most_accurate_percent(problem.objective)
        if others:
            free = solve(replace(problem, limits=others, min_accuracy=problem.min_accuracy or 0.0)).accuracy
        lost = max(free - optimum.accuracy, 0.0)
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
