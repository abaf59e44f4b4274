"""The exact latency/accuracy front, and the exact optimum under a latency bound.

Accuracy (on its linear scale) and predicted latency are sums over stages, so the front of a
network of two stages is found among sums of the stages' own Pareto options, and so on: prune each
stage, merge stage by stage, prune after each merge. Nothing that is dropped can be part of a front
point, because replacing a dominated part improves the whole.

Under a confidence above 0.5 the bound U is not a sum over stages, but convex (see `_objective`):
its tangent at x0 is a sum over stages and never above U. The best network under the tangent is an
upper bound of what is possible; if it meets the true bound it is the optimum, and if not, the next
tangent is taken at it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.options import IndexArray
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers._objective import FloatArray, Objective, SizeObjective

_MAX_TANGENTS = 25


@dataclass(frozen=True)
class Front:
    """Every architecture that no other beats on both predicted latency and predicted accuracy.

    Attributes:
        latency_ms: Predicted latency, ascending, shape (n,).
        accuracy: Predicted accuracy in percent, ascending, shape (n,).
        image_size: Image size in pixels, shape (n,).
        index: Stage options, shape (n, n_stages).
        objective: What the indices refer to.

    Examples:
        >>> from foxnas_mlflow import exact_front, reference_predictors
        >>> front = exact_front(reference_predictors("rpi4"))
        >>> len(front) == len(front.latency_ms) == len(front.accuracy)
        True
    """

    latency_ms: FloatArray
    accuracy: FloatArray
    image_size: NDArray[np.int64]
    index: IndexArray
    objective: Objective

    def __len__(self) -> int:
        return len(self.latency_ms)

    def architecture(self, i: int) -> Architecture:
        """The architecture of point i."""
        size = self.objective.image_sizes.index(int(self.image_size[i]))
        return self.objective.architecture(size, self.index[i])


@dataclass(frozen=True)
class Optimum:
    """The exact optimum under a constraint, with its certificate.

    Attributes:
        architecture: The optimal architecture.
        accuracy: Its predicted accuracy in percent.
        latency_ms: Its predicted latency.
        amounts: Every quantity of the objective: upper bounds of predicted ones, counts of the others.
        accuracy_bound: No architecture that meets the constraint is predicted above this. Where least of a
            quantity was asked for: its own accuracy.
        tangents: Rounds that the proof took.
        least, least_bound: The least predicted value of the quantity that was asked for, and the bound that no
            architecture is below; None where accuracy was asked for.

    Examples:
        >>> from foxnas_mlflow import Objective, exact_optimum, reference_predictors
        >>> optimum = exact_optimum(Objective(reference_predictors("rpi4"), confidence=0.5), 60)
        >>> f"{optimum.accuracy:.1f} %, nothing above {optimum.accuracy + optimum.proof_gap:.1f} %"
        '73.3 %, nothing above 73.3 %'
    """

    architecture: Architecture
    accuracy: float
    latency_ms: float
    amounts: Mapping[str, float]
    accuracy_bound: float
    tangents: int
    least: float | None = None
    least_bound: float | None = None

    @property
    def latency_upper_ms(self) -> float:
        """Its upper latency bound at the confidence."""
        return self.amounts["latency_ms"]

    @property
    def proof_gap(self) -> float:
        """What the proof leaves open, in points or in the quantity's unit: 0 when the optimum is proven."""
        if self.least is not None and self.least_bound is not None:
            return max(self.least - self.least_bound, 0.0)
        return max(self.accuracy_bound - self.accuracy, 0.0)


def exact_front(predictors: PredictorSet, *, image_sizes: Sequence[int] | None = None) -> Front:
    """The whole front of predicted latency against predicted accuracy.

    Args:
        predictors: Predictors that are sums over stages.
        image_sizes: Image sizes to include (px); all that the predictors know when None.

    Examples:
        >>> from foxnas_mlflow import exact_front, reference_predictors
        >>> front = exact_front(reference_predictors("rpi4"))
        >>> bool((front.accuracy[1:] > front.accuracy[:-1]).all())
        True
    """
    return front_of(Objective(predictors, confidence=0.5, image_sizes=image_sizes))


def front_of(objective: Objective) -> Front:
    """The front of an objective's predicted latency (its confidence plays no part)."""
    parts = []
    for size in objective.sizes:
        latency, z, index = _whole_front(size)
        parts.append((latency, size.accuracy.from_linear(z), np.full(len(z), size.image_size), index))
    latency, accuracy, image_size, index = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = _pareto(latency, accuracy)
    return Front(latency[keep], accuracy[keep], image_size[keep], index[keep], objective)


_Part = tuple[FloatArray, FloatArray, IndexArray]
"""Points of a front by ascending latency: latency, linear scale of accuracy, and stage options (n, n_stages)."""


@dataclass(frozen=True)
class Least:
    """The architecture with least of a quantity.

    Attributes:
        size: Its index into the objective's sizes.
        index: Its stage options, shape (n_stages,).
        amount: Its amount of the quantity that it has least of.
    """

    size: int
    index: IndexArray
    amount: float

    @property
    def latency_upper_ms(self) -> float:
        """Its upper latency bound, where latency is what it has least of."""
        return self.amount


def fastest(objective: Objective) -> Least:
    """The architecture with the smallest upper latency bound.

    Examples:
        >>> from foxnas_mlflow import Objective, fastest, reference_predictors
        >>> f"{fastest(Objective(reference_predictors('rpi4'), confidence=0.95)).latency_upper_ms:.0f} ms"
        '37 ms'
    """
    return least(objective, "latency_ms")


def least(objective: Objective, quantity: str) -> Least:
    """The architecture with least of a quantity of the objective: of its upper bound where it is predicted."""
    found = [_size_least(objective, i, quantity) for i in range(len(objective.sizes))]
    return min(found, key=lambda f: f.amount)


def exact_optimum(objective: Objective, latency_ms: float) -> Optimum:
    """The most accurate architecture whose upper latency bound is at most `latency_ms`.

    Raises:
        InfeasibleConstraintError: If no architecture meets the constraint.

    Examples:
        >>> from foxnas_mlflow import Objective, exact_optimum, reference_predictors
        >>> optimum = exact_optimum(Objective(reference_predictors("rpi4"), confidence=0.95), 60)
        >>> optimum.latency_upper_ms <= 60
        True
    """
    # The prediction itself underestimates its upper bound: what it allows bounds the accuracy of each size.
    bounds = [_accuracy(size, _points_within(size, latency_ms)[0]) for size in objective.sizes]
    best: Optimum | None = None
    tangents = 0
    for i in sorted(range(len(bounds)), key=lambda i: -bounds[i]):
        if best is not None and bounds[i] <= best.accuracy:
            continue
        optimum, z = _size_optimum(objective, i, latency_ms)
        # A size where nothing was found still counts with what its proof leaves possible.
        bounds[i] = _accuracy(objective.sizes[i], np.array([z]))
        if optimum is not None:
            tangents += optimum.tangents
            if best is None or optimum.accuracy > best.accuracy:
                best = optimum
    if best is None:
        raise InfeasibleConstraintError(latency_ms, fastest(objective).latency_upper_ms)
    return replace(best, accuracy_bound=max(*bounds, best.accuracy), tangents=tangents)


def most_accurate_percent(objective: Objective) -> float:
    """The predicted accuracy of the most accurate network: each stage's best."""
    tops = [size.accuracy_base + sum(float(z.max()) for z in size.accuracy_stages) for size in objective.sizes]
    return max(_accuracy(size, np.array([z])) for size, z in zip(objective.sizes, tops, strict=True))


def _accuracy(size: SizeObjective, z: FloatArray) -> float:
    """The accuracy in percent of the last of ascending points on its linear scale; without any -inf."""
    return float(size.accuracy.from_linear(z[-1:])[0]) if len(z) and z[-1] > -np.inf else -np.inf


def _size_least(objective: Objective, i: int, quantity: str) -> Least:
    """The architecture of one size with least of a quantity.

    The network of each stage's cheapest option under a tangent is tried until it does not improve;
    one that is cheapest under its own tangent is the cheapest of all.
    """
    size = objective.sizes[i]
    column = size.quantities.index(quantity)
    if quantity not in size.bounds:
        index = np.array([int(np.argmin(table)) for table in size.counted[quantity].stages])
        return Least(i, index, float(size.evaluate(index[None])[1][0, column]))
    bound = size.bounds[quantity]
    weights, best = bound.beta, None
    for _ in range(_MAX_TANGENTS):
        _, tables = bound.tables(weights)
        index = np.array([int(np.argmin(table)) for table in tables])
        amount = float(size.evaluate(index[None])[1][0, column])
        if best is not None and amount >= best.amount:
            break
        best, weights = Least(i, index, amount), bound.tangent(bound.design(index[None])[0])
    if best is None:
        raise AssertionError("unreachable: there is at least one tangent")
    return best


def _size_optimum(objective: Objective, i: int, limit: float) -> tuple[Optimum | None, float]:
    """The best architecture of one size, and a bound of the accuracy's linear scale under the limit."""
    size = objective.sizes[i]
    start = _size_least(objective, i, "latency_ms")
    best_z, best_index, bound = -np.inf, None, np.inf
    if start.amount <= limit:
        best_z, best_index = float(size.evaluate(start.index[None])[0][0]), start.index
    z, index = _points_within(size, limit)
    tangents = 0
    while tangents < _MAX_TANGENTS:
        tangents += 1
        if not len(z):
            # The weights underestimate every bound: nothing can meet the constraint, or nothing better than the best.
            return (
                (None, -np.inf)
                if best_index is None
                else (optimum_of(objective, i, best_index, bound=best_z, tangents=tangents), best_z)
            )
        bound = min(bound, float(z[-1]))
        z, values = size.evaluate(index)
        meets = np.flatnonzero(values[:, 0] <= limit)
        if len(meets) and z[meets[-1]] > best_z:
            best_z, best_index = float(z[meets[-1]]), index[meets[-1]]
        if best_z >= bound - 1e-12 * abs(bound):
            bound = best_z
            break
        weights = size.latency.tangent(size.latency.design(index[-1:])[0])
        _, z, index = _size_front(size, weights, limit=limit * _MARGIN, floor=best_z)
    if best_index is None:
        return None, bound
    return optimum_of(objective, i, best_index, bound=bound, tangents=tangents), bound


def optimum_of(objective: Objective, i: int, index: IndexArray, *, bound: float, tangents: int) -> Optimum:
    """A network of stage options with a bound of the accuracy's linear scale."""
    size = objective.sizes[i]
    z, values = size.evaluate(index[None])
    accuracy, accuracy_bound = size.accuracy.from_linear(np.array([z[0], bound]))
    return Optimum(
        architecture=objective.architecture(i, index),
        accuracy=float(accuracy),
        latency_ms=float(size.latency.design(index[None])[0] @ size.latency.beta),
        amounts=dict(zip(objective.quantities, map(float, values[0]), strict=True)),
        accuracy_bound=float(accuracy_bound),
        tangents=tangents,
    )


_MARGIN = 1 + 1e-12
"""For the rounding of sums in another order than `SizeObjective.evaluate` takes."""

_fronts: WeakKeyDictionary[SizeObjective, _Part] = WeakKeyDictionary()


def _whole_front(size: SizeObjective) -> _Part:
    """The front of predicted latency, which all limits have in common."""
    if size not in _fronts:
        _fronts[size] = _size_front(size, size.latency.beta)
    return _fronts[size]


def _points_within(size: SizeObjective, limit: float) -> tuple[FloatArray, IndexArray]:
    """The points of the front whose predicted latency is within a limit: linear scale of accuracy, and options."""
    latency, z, index = _whole_front(size)
    n = int(np.searchsorted(latency, limit * _MARGIN, side="right"))
    return z[:n], index[:n]


def _size_front(size: SizeObjective, weights: FloatArray, *, limit: float = np.inf, floor: float = -np.inf) -> _Part:
    """Front of a linear form of the latency against the accuracy's linear scale, up to a limit and from a floor."""
    base, tables = size.latency.tables(weights)
    # What each stage can add at most.
    most = [float(z.max()) for z in size.accuracy_stages]
    floor -= size.accuracy_base + 1e-12 * abs(floor) if floor > -np.inf else 0.0
    fronts = []
    for j, (latency, z) in enumerate(zip(tables, size.accuracy_stages, strict=True)):
        enough = np.flatnonzero(z >= floor - (sum(most) - most[j]))
        keep = enough[_pareto(latency[enough], z[enough])]
        if not len(keep):
            return np.empty(0), np.empty(0), np.empty((0, len(tables)), dtype=np.int64)
        fronts.append((latency[keep], z[keep], keep[:, None]))
    # What the stages not yet merged cost at least: a part that leaves no room for them is dropped.
    least = [front[0][0] for front in fronts]
    merged = fronts[0]
    for j in range(1, len(fronts)):
        room = limit - base - sum(least[j + 1 :])
        merged = _merge(merged, fronts[j], room, floor - sum(most[j + 1 :]))
    latency, z, index = merged
    inside = latency + base <= limit
    return latency[inside] + base, z[inside] + size.accuracy_base, index[inside]


def _merge(a: _Part, b: _Part, room: float, floor: float) -> _Part:
    """Pareto set of all sums of two Pareto sets with a latency of at most `room` and a value of `floor` at least."""
    latency = (a[0][:, None] + b[0][None, :]).ravel()
    z = (a[1][:, None] + b[1][None, :]).ravel()
    inside = np.arange(len(latency))
    if room < np.inf or floor > -np.inf:
        inside = np.flatnonzero((latency <= room) & (z >= floor))
    if not len(inside):
        return latency[:0], z[:0], np.empty((0, a[2].shape[1] + b[2].shape[1]), dtype=np.int64)
    keep = inside[_pareto(latency[inside], z[inside])]
    i, j = np.divmod(keep, len(b[0]))
    return latency[keep], z[keep], np.hstack([a[2][i], b[2][j]])


_BINS = 2048


def _pareto(latency: FloatArray, value: FloatArray) -> IndexArray:
    """Indices of the points that no other point beats or equals, by ascending latency.

    Most points are dropped in linear time first: a point below the best value of any cheaper
    bin of latency is dominated. Only the rest is sorted.
    """
    candidates = np.arange(len(latency))
    if len(latency) > 4 * _BINS:
        low, high = latency.min(), latency.max()
        bins = ((latency - low) * ((_BINS - 1) / max(high - low, 1e-300))).astype(np.int64)
        best = np.full(_BINS, -np.inf)
        np.maximum.at(best, bins, value)
        before = np.concatenate([[-np.inf], np.maximum.accumulate(best)[:-1]])
        candidates = np.flatnonzero(value > before[bins])
        latency, value = latency[candidates], value[candidates]
    order = np.lexsort((-value, latency))
    value = value[order]
    running = np.maximum.accumulate(value)
    first = np.concatenate([[True], value[1:] > running[:-1]])
    kept: IndexArray = candidates[order[first]]
    return kept
