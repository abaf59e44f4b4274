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

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        latency_upper_ms: Its upper latency bound at the confidence.
        accuracy_bound: No architecture that meets the constraint is predicted above this.
        tangents: Rounds that the proof took.
    """

    architecture: Architecture
    accuracy: float
    latency_ms: float
    latency_upper_ms: float
    accuracy_bound: float
    tangents: int

    @property
    def proof_gap(self) -> float:
        """Accuracy (points) that the proof leaves open: 0 when the optimum is proven."""
        return max(self.accuracy_bound - self.accuracy, 0.0)


def exact_front(predictors: PredictorSet, *, image_sizes: Sequence[int] | None = None) -> Front:
    """The whole front of predicted latency against predicted accuracy.

    Args:
        predictors: Predictors that are sums over stages.
        image_sizes: Image sizes to include (px); all that the predictors know when None.
    """
    return front_of(Objective(predictors, confidence=0.5, image_sizes=image_sizes))


def front_of(objective: Objective) -> Front:
    """The front of an objective's predicted latency (its confidence plays no part)."""
    parts = []
    for size in objective.sizes:
        latency, z, index = _size_front(size, size.beta)
        parts.append((latency, size.accuracy.from_linear(z), np.full(len(z), size.image_size), index))
    latency, accuracy, image_size, index = (np.concatenate(column) for column in zip(*parts, strict=True))
    keep = _pareto(latency, accuracy)
    return Front(latency[keep], accuracy[keep], image_size[keep], index[keep], objective)


@dataclass(frozen=True)
class Fastest:
    """The fastest architecture.

    Attributes:
        size: Its index into the objective's sizes.
        index: Its stage options, shape (n_stages,).
        latency_upper_ms: Its upper latency bound.
    """

    size: int
    index: IndexArray
    latency_upper_ms: float


def fastest(objective: Objective) -> Fastest:
    """The architecture with the smallest upper latency bound."""
    found = [_size_fastest(objective, i) for i in range(len(objective.sizes))]
    return min(found, key=lambda f: f.latency_upper_ms)


def exact_optimum(objective: Objective, latency_ms: float) -> Optimum:
    """The most accurate architecture whose upper latency bound is at most `latency_ms`.

    Raises:
        InfeasibleConstraintError: If no architecture meets the constraint.
    """
    found = [_size_optimum(objective, i, latency_ms) for i in range(len(objective.sizes))]
    feasible = [optimum for optimum, _ in found if optimum is not None]
    if not feasible:
        raise InfeasibleConstraintError(latency_ms, fastest(objective).latency_upper_ms)
    best = max(feasible, key=lambda optimum: optimum.accuracy)
    # A size where nothing was found still counts with what its proof leaves possible.
    bounds = [size.accuracy.from_linear(np.array([z]))[0] for size, (_, z) in zip(objective.sizes, found, strict=True)]
    tangents = sum(optimum.tangents for optimum in feasible)
    return replace(best, accuracy_bound=max(*map(float, bounds), best.accuracy), tangents=tangents)


def _size_fastest(objective: Objective, i: int) -> Fastest:
    """The fastest architecture of one size.

    The network of each stage's cheapest option under a tangent is tried until it does not improve;
    one that is cheapest under its own tangent is the fastest of all.
    """
    size = objective.sizes[i]
    weights, best = size.beta, None
    for _ in range(_MAX_TANGENTS):
        _, tables = size.latency_tables(weights)
        index = np.array([int(np.argmin(table)) for table in tables])
        upper = float(size.evaluate(index[None])[1][0])
        if best is not None and upper >= best.latency_upper_ms:
            break
        best, weights = Fastest(i, index, upper), size.tangent(size.design(index[None])[0])
    if best is None:
        raise AssertionError("unreachable: there is at least one tangent")
    return best


def _size_optimum(objective: Objective, i: int, limit: float) -> tuple[Optimum | None, float]:
    """The best architecture of one size, and a bound of the accuracy's linear scale under the limit."""
    size = objective.sizes[i]
    start = _size_fastest(objective, i)
    best_z, best_index, bound = -np.inf, None, np.inf
    if start.latency_upper_ms <= limit:
        best_z, best_index = float(size.evaluate(start.index[None])[0][0]), start.index
    weights = size.beta
    tangents = 0
    while tangents < _MAX_TANGENTS:
        tangents += 1
        # The limit's margin is for the rounding of sums in another order than `evaluate` takes.
        _, z, index = _size_front(size, weights, limit=limit * (1 + 1e-12))
        if not len(z):
            # The weights underestimate every bound: nothing can meet the constraint.
            return None, -np.inf
        bound = min(bound, float(z[-1]))
        z, upper = size.evaluate(index)
        meets = np.flatnonzero(upper <= limit)
        if len(meets) and z[meets[-1]] > best_z:
            best_z, best_index = float(z[meets[-1]]), index[meets[-1]]
        if best_z >= bound - 1e-12 * abs(bound):
            bound = best_z
            break
        weights = size.tangent(size.design(index[-1:])[0])
    if best_index is None:
        return None, bound
    return _optimum(objective, i, best_index, bound, tangents), bound


def _optimum(objective: Objective, i: int, index: IndexArray, bound: float, tangents: int) -> Optimum:
    size = objective.sizes[i]
    z, upper = size.evaluate(index[None])
    accuracy, accuracy_bound = size.accuracy.from_linear(np.array([z[0], bound]))
    return Optimum(
        architecture=objective.architecture(i, index),
        accuracy=float(accuracy),
        latency_ms=float(size.design(index[None])[0] @ size.beta),
        latency_upper_ms=float(upper[0]),
        accuracy_bound=float(accuracy_bound),
        tangents=tangents,
    )


def _size_front(
    size: SizeObjective, weights: FloatArray, *, limit: float = np.inf
) -> tuple[FloatArray, FloatArray, IndexArray]:
    """Front of a linear form of the latency against the accuracy's linear scale, up to a limit."""
    base, tables = size.latency_tables(weights)
    fronts = []
    for latency, z in zip(tables, size.accuracy_stages, strict=True):
        keep = _pareto(latency, z)
        fronts.append((latency[keep], z[keep], keep[:, None]))
    # What the stages not yet merged cost at least: a part that leaves no room for them is dropped.
    least = [front[0][0] for front in fronts]
    merged = fronts[0]
    for j in range(1, len(fronts)):
        room = limit - base - sum(least[j + 1 :])
        merged = _merge(merged, fronts[j], room)
    latency, z, index = merged
    inside = latency + base <= limit
    return latency[inside] + base, z[inside] + size.accuracy_base, index[inside]


_Part = tuple[FloatArray, FloatArray, IndexArray]


def _merge(a: _Part, b: _Part, room: float) -> _Part:
    """Pareto set of all sums of two Pareto sets."""
    latency = (a[0][:, None] + b[0][None, :]).ravel()
    z = (a[1][:, None] + b[1][None, :]).ravel()
    inside = np.flatnonzero(latency <= room) if room < np.inf else np.arange(len(latency))
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
