"""What is said when no architecture meets the limits: how far each can go, and which two clash."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import combinations

from foxnas_mlflow.core.errors import InfeasibleLimitsError
from foxnas_mlflow.core.searchers._exact import Optimum, least
from foxnas_mlflow.core.searchers._problem import Problem


def infeasible(problem: Problem, solve: Callable[[Problem], Optimum | None]) -> InfeasibleLimitsError:
    """Explain why a problem has no answer.

    Args:
        problem: The problem.
        solve: The optimum of a problem, or None where no network meets its limits.
    """
    asked = {limit.quantity: limit.value for limit in problem.limits}
    smallest = {quantity: least(problem.objective, quantity).amount for quantity in asked}
    alone = [quantity for quantity, value in asked.items() if smallest[quantity] > value]
    clash: tuple[str, ...] = ()
    beside: list[str] = []
    reachable = None
    if not alone:
        free = replace(problem, goal="accuracy", min_accuracy=None if problem.limits else 0.0)
        for pair in combinations(problem.limits, 2):
            if solve(replace(free, limits=pair)) is None:
                clash = (str(pair[0]), str(pair[1]))
                for limit, other in (pair, pair[::-1]):
                    found = solve(replace(free, goal=limit.quantity, limits=(other,), min_accuracy=0.0))
                    if found is not None:
                        beside.append(f"{limit.quantity} of {found.amounts[limit.quantity]:.6g} beside {other}")
                break
        best = None if clash or problem.min_accuracy is None else solve(free)
        reachable = None if best is None else best.accuracy
    return InfeasibleLimitsError(
        [str(limit) for limit in problem.limits],
        smallest=smallest,
        clash=clash,
        beside=beside,
        min_accuracy=problem.min_accuracy,
        reachable_accuracy=reachable,
    )
