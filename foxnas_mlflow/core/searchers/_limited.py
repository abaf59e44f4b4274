"""The exact optimum under several limits, with its proof.

Notation, at one image size, with the tables shifted and scaled so that every entry is 0 or more:

| symbol | name in code  | shape   | meaning                                                             |
|--------|---------------|---------|---------------------------------------------------------------------|
| v_j    | ``values``    | (m,)    | what each option of stage j adds to the goal                        |
| g_j    | ``loads``     | (m, L)  | what it adds to each of L linear limits                             |
| b      | ``room``      | (L,)    | what the limits leave for the stages                                |
| lambda | ``prices``    | (L,)    | price of each limit                                                 |
| D      | ``bound``     | scalar  | sum_j max(v_j - lambda'g_j) + lambda'b: no network is worth more    |
| r_j    | ``regret``    | (m,)    | what an option falls short of the best one of its stage at lambda   |

D is convex in lambda; cutting planes find its least value. A network that meets the limits and is worth at
least D - delta has regrets that sum to at most delta, so merging stage by stage the options within delta finds
all of them; delta grows until one is found that is worth D - delta. A limit on a maximum removes options. An
upper bound of a predicted quantity is replaced by tangents, which never exceed it; while the best network under
the tangents does not meet the bound itself, one more tangent is taken there, as under one limit (`_exact`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.options import IndexArray
from foxnas_mlflow.core.searchers._exact import Optimum, exact_optimum, optimum_of
from foxnas_mlflow.core.searchers._infeasible import infeasible
from foxnas_mlflow.core.searchers._limits import Limit
from foxnas_mlflow.core.searchers._objective import FloatArray, SizeObjective
from foxnas_mlflow.core.searchers._problem import Problem

_MAX_TANGENTS = 25
_MAX_ROWS = 4_000_000
"""Most partial networks held at once: beyond it the search keeps the best and leaves the proof open."""

_FIRST_DELTA, _GROWTH = 1e-3, 1.6
_MAX_CUTS = 100
_MAX_PRICE = 1e5
_ROUNDING = 1e-12


def solve(problem: Problem) -> Optimum:
    """The best architecture under the limits, proven.

    Raises:
        InfeasibleLimitsError: If no architecture meets them all.
    """
    if problem.only_latency:
        return exact_optimum(problem.objective, problem.limits[0].value)
    found = _best(problem)
    if found is None:
        raise infeasible(problem, _best)
    return found


def _best(problem: Problem) -> Optimum | None:
    """The optimum, or None where no network meets the limits."""
    return _maximum_goal(problem) if _is_maximum(problem) else _linear_goal(problem)


def least_loaded(problem: Problem) -> tuple[int, IndexArray]:
    """Image size (its position) and stage options of a network that meets the limits, far from the best one.

    Of all sums over stages, the one with the smallest sum of shares of the limits; where it misses one of them,
    the fastest as predicted of those that meet them all (the most accurate, where least latency is the goal).

    Raises:
        InfeasibleLimitsError: If no architecture meets them all.
    """
    objective = problem.objective
    for i, size in enumerate(objective.sizes):
        loads = [np.zeros(len(table)) for table in size.accuracy_stages]
        for quantity, most in zip(objective.quantities, problem.room, strict=True):
            tables = size.bounds[quantity].tables(size.bounds[quantity].beta)[1] if quantity in size.bounds else None
            for j, load in enumerate(loads):
                load += (size.counted[quantity].stages[j] if tables is None else tables[j]) / most
        index = np.array([int(np.argmin(load)) for load in loads])
        if problem.min_accuracy is None and (size.evaluate(index[None])[1][0] <= problem.room).all():
            return i, index
    other = "accuracy" if problem.goal == "latency_ms" else "latency_ms"
    found = _linear_goal(replace(problem, goal=other, min_accuracy=problem.min_accuracy or 0.0))
    if found is None:
        raise infeasible(problem, _best)
    return objective.image_sizes.index(found.architecture.image_size), objective.index_of(found.architecture)


def _is_maximum(problem: Problem) -> bool:
    counted = problem.objective.sizes[0].counted
    return problem.goal in counted and counted[problem.goal].maximum


def _linear_goal(problem: Problem) -> Optimum | None:
    """The optimum of a goal that is a sum over stages, or None where no network meets the limits."""
    objective = problem.objective
    best: Optimum | None = None
    bounds: list[float] = []
    tangents = 0
    for i in reversed(range(len(objective.sizes))):
        size = objective.sizes[i]
        floor = -np.inf if best is None else _to_scale(problem, size, best)
        solved = _size_solve(problem, i, floor)
        tangents += solved.tangents
        bounds.append(_from_scale(problem, size, solved.bound))
        if solved.index is not None:
            best = _optimum(problem, i, solved.index)
    if best is None:
        return None
    if problem.goal == "accuracy":
        return replace(best, accuracy_bound=max(*bounds, best.accuracy), tangents=tangents)
    best = replace(best, least_bound=min(-max(bounds), best.least or 0.0), tangents=tangents)
    return best if problem.goal in objective.sizes[0].bounds else _most_accurate_of(problem, best)


def _maximum_goal(problem: Problem) -> Optimum | None:
    """The optimum of a goal that is a maximum over layers: the smallest of its values that can be a limit."""
    tables = [size.counted[problem.goal] for size in problem.objective.sizes]
    values = np.unique(np.concatenate([np.append(np.concatenate(t.stages), t.base) for t in tables]))
    low, high = 0, len(values)
    best: Optimum | None = None
    while low < high:
        middle = (low + high) // 2
        found = _linear_goal(_accuracy_under(problem, float(values[middle])))
        if found is None:
            low = middle + 1
        else:
            best, high = replace(found, least=float(values[middle]), least_bound=float(values[middle])), middle
    return best


def _most_accurate_of(problem: Problem, optimum: Optimum) -> Optimum:
    """Of the networks with the same least count, the most accurate one."""
    if optimum.least is None:
        raise AssertionError("unreachable: the least of a quantity is known")
    found = _linear_goal(_accuracy_under(problem, optimum.least))
    return optimum if found is None else replace(found, least=optimum.least, least_bound=optimum.least_bound)


def _accuracy_under(problem: Problem, value: float) -> Problem:
    """The most accurate network with at most so much of the problem's goal."""
    others = tuple(limit for limit in problem.limits if limit.quantity != problem.goal)
    given = dict.fromkeys(limit.value for limit in problem.limits if limit.quantity == problem.goal)
    return replace(problem, goal="accuracy", limits=(*others, Limit(problem.goal, min([value, *given]))))


def _to_scale(problem: Problem, size: SizeObjective, best: Optimum) -> float:
    """What a network of this size must be worth to beat the best one."""
    if problem.goal != "accuracy":
        return -(best.least or 0.0)
    ceiling = size.accuracy.ceiling
    if ceiling is not None and best.accuracy >= ceiling:
        return np.inf
    return float(size.accuracy.to_linear(np.array([best.accuracy]))[0])


def _from_scale(problem: Problem, size: SizeObjective, bound: float) -> float:
    return float(size.accuracy.from_linear(np.array([bound]))[0]) if problem.goal == "accuracy" else bound


def _optimum(problem: Problem, i: int, index: IndexArray) -> Optimum:
    size = problem.objective.sizes[i]
    optimum = optimum_of(problem.objective, i, index, bound=float(size.evaluate(index[None])[0][0]), tangents=0)
    if problem.goal == "accuracy":
        return optimum
    return replace(optimum, least=float(size.point(problem.goal, index[None])[0]))


@dataclass(frozen=True)
class _Solved:
    """The best network of one size that beats a floor.

    Attributes:
        index: Its stage options, or None where no network beats the floor.
        bound: No network of the size is worth more, or the floor; minus infinity where none meets the limits.
        tangents: Rounds that it took.
    """

    index: IndexArray | None
    bound: float
    tangents: int


def _size_solve(problem: Problem, i: int, floor: float) -> _Solved:
    size = problem.objective.sizes[i]
    room = dict(zip(problem.objective.quantities, map(float, problem.room), strict=True))
    allowed = _allowed(size, room)
    rows = _fixed_rows(problem, size, room)
    if allowed is None or rows is None:
        return _Solved(None, -np.inf, 0)
    base, values = _values(problem, size)
    limited = [q for q in size.bounds if np.isfinite(room[q])]
    weights = {quantity: [size.bounds[quantity].beta] for quantity in limited}

    def relaxation() -> _Relaxation:
        linear = [(*size.bounds[q].tables(g), room[q]) for q in limited for g in weights[q]]
        return _Relaxation(values, [*rows, *((tables, most - part) for part, tables, most in linear)], allowed)

    def touch(index: IndexArray) -> None:
        for q in limited:
            bound = size.bounds[q]
            if bound.spread is not None:
                weights[q].append(bound.tangent(bound.design(index[None])[0]))

    start = relaxation()
    if start.infeasible:
        return _Solved(None, -np.inf, 0)
    touch(start.greedy)
    for q in limited:
        # Predictions alone are below every bound: the first tangent takes their place.
        weights[q] = weights[q][-1:]
    best, best_index, bound = floor - base, None, np.inf
    tangents = 0
    while tangents < _MAX_TANGENTS:
        tangents += 1
        relaxed = relaxation().maximise(best)
        bound = min(bound, relaxed.bound)
        if len(relaxed.index):
            met = _first_that_meets(problem, size, relaxed.index, room)
            if met is not None:
                worth = float(sum(table[o] for table, o in zip(values, relaxed.index[met], strict=True)))
                if worth > best:
                    best, best_index = worth, relaxed.index[met]
        if best >= bound - _ROUNDING * max(abs(bound), 1.0) or not relaxed.proven or not len(relaxed.index):
            break
        touch(relaxed.index[0])
    return _Solved(best_index, max(bound, best) + base if np.isfinite(bound) else bound, tangents)


def _allowed(size: SizeObjective, room: dict[str, float]) -> list[IndexArray] | None:
    """Options of each stage within the limits on maxima, or None where a stage has none."""
    n_stages = len(size.accuracy_stages)
    masks = [np.ones(len(table), dtype=bool) for table in size.accuracy_stages]
    for quantity, amount in size.counted.items():
        if amount.maximum:
            if amount.base > room[quantity]:
                return None
            for j in range(n_stages):
                masks[j] &= amount.stages[j] <= room[quantity]
    return [np.flatnonzero(mask) for mask in masks] if all(mask.any() for mask in masks) else None


_Row = tuple[Sequence[FloatArray], float]
"""Stage tables of a linear limit, and what it leaves for their sum."""


def _fixed_rows(problem: Problem, size: SizeObjective, room: dict[str, float]) -> list[_Row] | None:
    """Limits on counted sums and on accuracy, or None where the accuracy is beyond the ceiling."""
    rows: list[_Row] = [
        (amount.stages, room[quantity] - amount.base)
        for quantity, amount in size.counted.items()
        if not amount.maximum and np.isfinite(room[quantity])
    ]
    if problem.min_accuracy is not None:
        ceiling = size.accuracy.ceiling
        if ceiling is not None and problem.min_accuracy >= ceiling:
            return None
        wanted = float(size.accuracy.to_linear(np.array([problem.min_accuracy]))[0])
        rows.append(([-table for table in size.accuracy_stages], size.accuracy_base - wanted))
    return rows


def _values(problem: Problem, size: SizeObjective) -> tuple[float, Sequence[FloatArray]]:
    """Base and stage tables of the goal."""
    if problem.goal == "accuracy":
        return size.accuracy_base, size.accuracy_stages
    if problem.goal in size.bounds:
        bound = size.bounds[problem.goal]
        base, tables = bound.tables(bound.beta)
    else:
        base, tables = size.counted[problem.goal].base, list(size.counted[problem.goal].stages)
    return -base, [-table for table in tables]


def _first_that_meets(
    problem: Problem, size: SizeObjective, index: IndexArray, room: dict[str, float], *, block: int = 2048
) -> int | None:
    """Position of the first network that meets the limits themselves."""
    most = np.array([room[q] for q in size.quantities])
    for start in range(0, len(index), block):
        z, amounts = size.evaluate(index[start : start + block])
        meets = (amounts <= most).all(axis=1)
        if problem.min_accuracy is not None:
            meets &= size.accuracy.from_linear(z) >= problem.min_accuracy
        if meets.any():
            return start + int(np.argmax(meets))
    return None


@dataclass(frozen=True)
class _Relaxed:
    """Networks that meet linear limits, the most worth first.

    Attributes:
        index: Stage options, shape (n, n_stages).
        bound: No network within the linear limits is worth more, or the floor that was asked for.
        proven: Whether all networks that are worth as much were seen.
    """

    index: IndexArray
    bound: float
    proven: bool


class _Relaxation:
    """The best sums over stages under linear limits.

    Attributes:
        infeasible: Whether it is proven that no network meets them.
        greedy: The best option of each stage at the best prices, shape (n_stages,); it may miss limits.
    """

    def __init__(self, values: Sequence[FloatArray], rows: Sequence[_Row], allowed: Sequence[IndexArray]) -> None:
        self.allowed = allowed
        parts = [table[o] for table, o in zip(values, allowed, strict=True)]
        self.value_base, self.value_span, self.values = _normal(parts)
        loads: list[list[FloatArray]] = []
        room: list[float] = []
        self.infeasible = False
        for tables, most in rows:
            base, span, normal = _normal([table[o] for table, o in zip(tables, allowed, strict=True)])
            if most - base < -_ROUNDING * max(abs(most), abs(base)):
                self.infeasible = True
            elif span > 0:
                loads.append(normal)
                room.append((most - base) / span)
        self.room = np.array(room)
        self.loads = [
            np.stack([row[j] for row in loads], axis=1) if loads else np.zeros((len(table), 0))
            for j, table in enumerate(parts)
        ]
        self.bound, self.prices = (0.0, np.zeros(len(room))) if self.infeasible else self._dual()
        # Every sum is 0 or more in this scale.
        self.infeasible = self.infeasible or self.bound < -1e-9
        self.regrets = [_regrets(v, g, self.prices) for v, g in zip(self.values, self.loads, strict=True)]
        self.greedy = np.array([o[int(np.argmin(r))] for o, r in zip(allowed, self.regrets, strict=True)])

    def _dual(self) -> tuple[float, FloatArray]:
        """The least bound and its prices, by cutting planes (Kelley)."""
        from scipy.optimize import linprog

        n = len(self.room)
        prices, best, best_prices = np.zeros(n), np.inf, np.zeros(n)
        cuts: list[FloatArray] = []
        offsets: list[float] = []
        for _ in range(_MAX_CUTS if n else 1):
            value, slope = float(self.room @ prices), self.room.copy()
            for v, g in zip(self.values, self.loads, strict=True):
                worth = v - g @ prices
                top = int(np.argmax(worth))
                value += float(worth[top])
                slope = slope - g[top]
            if value < best:
                best, best_prices = value, prices
            if best < -1e-9 or not n:
                break
            cuts.append(np.append(slope, -1.0))
            offsets.append(float(slope @ prices) - value)
            plane = linprog(
                np.append(np.zeros(n), 1.0),
                A_ub=np.array(cuts),
                b_ub=np.array(offsets),
                bounds=[(0, _MAX_PRICE)] * n + [(None, None)],
                method="highs",
            )
            if plane.x is None or plane.fun is None or best - plane.fun < 1e-7:
                break
            prices = plane.x[:n]
        return best, best_prices

    def maximise(self, floor: float) -> _Relaxed:
        """The best networks, and at least all others that are worth as much as what the prices leave open.

        Args:
            floor: Networks that are not worth more need not be found.
        """
        none = np.empty((0, len(self.values)), dtype=np.int64)
        if self.infeasible:
            return _Relaxed(none, -np.inf, True)
        scale = self.value_span if self.value_span > 0 else 1.0
        least = (floor - self.value_base) / scale
        widest = float(sum(r.max() for r in self.regrets))
        most = min(self.bound - least, widest)
        if most < 0:
            return _Relaxed(none, floor, True)
        delta, seen = min(_FIRST_DELTA, most), 0.0
        while True:
            value, index, whole = self._within(delta)
            top = float(value[0]) if len(value) else -np.inf
            if not whole:
                return _Relaxed(index, self.value_base + scale * (self.bound - seen), False)
            if top >= self.bound - delta:
                return _Relaxed(index, self.value_base + scale * top, True)
            if delta >= most:
                return _Relaxed(index, max(self.value_base + scale * top, floor), True)
            seen = delta
            delta = min(delta * _GROWTH, most, max(self.bound - top + _ROUNDING, delta * 1.01))

    def _within(self, delta: float) -> tuple[FloatArray, IndexArray, bool]:
        """Networks within the limits whose regrets sum to at most delta, the most worth first."""
        kept = []
        for v, g, r in zip(self.values, self.loads, self.regrets, strict=True):
            near = np.flatnonzero(r <= delta)
            near = near[_undominated(v[near], g[near])]
            kept.append(near[np.argsort(r[near], kind="stable")])
        order = np.argsort([len(k) for k in kept], kind="stable")
        regret, load, value = np.zeros(1), np.zeros((1, len(self.room))), np.zeros(1)
        index = np.zeros((1, len(kept)), dtype=np.int64)
        rest = np.sum([g[k].min(axis=0) for g, k in zip(self.loads, kept, strict=True)], axis=0)
        room = self.room * (1 + _ROUNDING) + _ROUNDING
        whole = True
        for j in order:
            options, r = kept[j], self.regrets[j][kept[j]]
            rest = rest - self.loads[j][options].min(axis=0)
            n = np.searchsorted(r, delta - regret, side="right")
            if n.sum() > _MAX_ROWS:
                # Keep what is best: the parts of least regret, each with as many options as there is room for.
                best = np.argsort(regret, kind="stable")[: _MAX_ROWS // 16]
                regret, load, value, index = regret[best], load[best], value[best], index[best]
                n = np.minimum(n[best], 16)
                whole = False
            part = np.repeat(np.arange(len(regret)), n)
            option = np.arange(len(part)) - np.repeat(np.cumsum(n) - n, n)
            sums = load[part] + self.loads[j][options[option]]
            inside = (sums + rest <= room).all(axis=1)
            part, option, load = part[inside], option[inside], sums[inside]
            regret, value = regret[part] + r[option], value[part] + self.values[j][options[option]]
            index = index[part]
            index[:, j] = self.allowed[j][options[option]]
        best = np.argsort(-value, kind="stable")
        return value[best], index[best], whole


def _normal(tables: Sequence[FloatArray]) -> tuple[float, float, list[FloatArray]]:
    """The least sum, the span of sums, and the tables shifted and scaled so that sums go from 0 to 1."""
    low = [float(table.min()) for table in tables]
    span = float(sum(table.max() - least for table, least in zip(tables, low, strict=True)))
    return sum(low), span, [(table - least) / (span or 1.0) for table, least in zip(tables, low, strict=True)]


def _regrets(values: FloatArray, loads: FloatArray, prices: FloatArray) -> FloatArray:
    worth = values - loads @ prices
    regrets: FloatArray = worth.max() - worth
    return regrets


def _undominated(values: FloatArray, loads: FloatArray, *, block: int = 256) -> NDArray[np.int64]:
    """Positions of options that no other equals or beats in value and in every load."""
    order = np.lexsort((loads.sum(axis=1), -values))
    loads = loads[order]
    kept = np.empty((0, loads.shape[1]))
    positions = []
    for start in range(0, len(order), block):
        part = np.arange(start, min(start + block, len(order)))
        equal_or_better = np.asarray((kept[None] <= loads[part][:, None]).all(axis=2))
        part = part[~equal_or_better.any(axis=1)]
        # Earlier ones are worth as much or more.
        equal_or_better = np.tril(np.asarray((loads[part][None] <= loads[part][:, None]).all(axis=2)), -1)
        part = part[~equal_or_better.any(axis=1)]
        kept = np.vstack([kept, loads[part]])
        positions.append(part)
    found: NDArray[np.int64] = order[np.concatenate(positions)] if positions else order
    return found
