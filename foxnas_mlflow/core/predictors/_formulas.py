"""Formulas: which columns describe an architecture to a linear model.

Every formula is a sum over stages, ``x(a) = constant(image_size) + sum_j stage_j(blocks of j)``:
a column depends on one stage's own blocks or adds up the same quantity over all stages. That is
what makes the exact search possible (docs/METHOD.md).

| symbol (paper eq. 2) | column                  | meaning                                        |
|----------------------|-------------------------|------------------------------------------------|
| D_j                  | ``D_{w}``               | depth of the stage of width w                  |
| E_j^avg, K_j^avg     | ``E_avg_{w}``, ``K_avg_{w}`` | means over the identity blocks            |
| E_{j,j+1}, K_{j,j+1} | ``E_first_{w}``, ``K_first_{w}`` | the stage's first block               |
| E_j^total            | ``E_total_{w}``         | sum of expansion ratios over identity blocks   |
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import COST_TERMS, FAST_TAPS, cost_terms, wide_depthwise_macs
from foxnas_mlflow.core.edgetpu import CACHE_BYTES, EDGETPU_TERMS, edgetpu_terms
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import Layer, build_network, stage_unit, stem_units, tail_units
from foxnas_mlflow.core.options import KindArray, encode
from foxnas_mlflow.core.space import SearchSpace

FloatArray = NDArray[np.float64]
Quantity = Literal["accuracy", "latency_ms"]


class Formula(ABC):
    """A recipe of columns.

    Attributes:
        name: ``paper``, ``calibrated`` or ``edgetpu``.
        quantity: What it predicts.
        link: ``identity``, or ``ceiling``: the linear scale is z = -log(ceiling - y).
        relative: Whether errors are proportional to the value, so that rows are weighted 1 / y^2.
        any_size: Whether one fit holds for image sizes that it has not seen.
        pooled: Whether one fit takes rows of several image sizes together.
        non_negative: Whether coefficients are prices, which are 0 or more.
        optional: Columns to leave out where the rows cannot tell them from others.
    """

    name: str
    quantity: Quantity
    link: Literal["identity", "ceiling"] = "identity"
    relative: bool = False
    any_size: bool = False
    pooled: bool = False
    non_negative: bool = False
    optional: tuple[str, ...] = ()

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        """Whether it says more than the other formulas of its family, for rows of `n_sizes` image sizes."""
        return True

    @abstractmethod
    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        """Names of the p columns; the constant is the last."""

    @abstractmethod
    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        """One stage's contribution.

        Args:
            space: The search space.
            stage: Index of the stage from 0.
            kinds: Blocks of n options, shape (n, max_depth), -1 where there is none.
            image_size: Image size in pixels.

        Returns:
            The q columns that the stage adds to, and the values, shape (n, q).
        """

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        """The contribution of everything outside the stages, shape (p,)."""
        values = np.zeros(len(self.columns(space)))
        values[-1] = 1.0
        return values

    def design(self, space: SearchSpace, architectures: Sequence[Architecture]) -> FloatArray:
        """The design matrix of architectures, shape (n, p)."""
        kinds = encode(space, architectures)
        sizes = np.array([a.image_size for a in architectures])
        x = np.zeros((len(architectures), len(self.columns(space))))
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            x[rows] += self.constant(space, int(size))
            for j in range(space.n_stages):
                columns, values = self.stage(space, j, kinds[rows, j], int(size))
                x[np.ix_(rows, np.array(columns))] += values
        return x


def _blocks(space: SearchSpace, kinds: KindArray) -> tuple[FloatArray, FloatArray, NDArray[np.bool_]]:
    """Expansion, kernel and presence of blocks, each of the shape of `kinds`."""
    present = kinds >= 0
    table = np.array([(block.expansion, block.kernel) for block in space.kinds], dtype=np.float64)
    values = table[np.where(present, kinds, 0)]
    return values[..., 0], values[..., 1], present


class _Paper(Formula):
    """Equation 2 of the paper: depth, averages, first block, totals and interactions, per stage."""

    name = "paper"
    per_stage: tuple[str, ...]

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return (*(f"{term}_{s.width}" for s in space.stages for term in self.per_stage), "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        e, k, present = _blocks(space, kinds)
        rest = present[:, 1:]
        n_rest = np.maximum(rest.sum(axis=1), 1)
        depth = present.sum(axis=1).astype(np.float64)
        e_total = (e[:, 1:] * rest).sum(axis=1)
        e_avg, k_avg = e_total / n_rest, (k[:, 1:] * rest).sum(axis=1) / n_rest
        values = {
            "D": depth,
            "E_avg": e_avg,
            "K_avg": k_avg,
            "E_first": e[:, 0],
            "K_first": k[:, 0],
            "E_total": e_total,
            "E_total:D": e_total * depth,
            "E_avg:D": e_avg * depth,
            "K_avg:D": k_avg * depth,
        }
        q = len(self.per_stage)
        return list(range(stage * q, (stage + 1) * q)), np.stack([values[t] for t in self.per_stage], axis=1)


class PaperAccuracy(_Paper):
    """Equation 2 for accuracy: 8 terms a stage and a constant (41 coefficients for m = 5)."""

    quantity: Quantity = "accuracy"
    per_stage = ("D", "E_avg", "K_avg", "E_first", "K_first", "E_total", "E_total:D", "K_avg:D")


class PaperLatency(_Paper):
    """Equation 2 for latency as the authors published it: E_avg * D in place of the two totals.

    E_total = E_avg * (D - 1), so E_total and E_total * D of equation 2 add nothing linear beside
    E_avg and E_avg * D except curvature, which latency lacks (36 coefficients for m = 5).
    """

    quantity: Quantity = "latency_ms"
    per_stage = ("D", "E_avg", "K_avg", "E_first", "K_first", "E_avg:D", "K_avg:D")


class _CostModel(Formula):
    """Latency as a sum over terms of a price times an amount, and a constant.

    The amounts are sums over all layers, so one fit predicts any network made of the same layers.
    """

    quantity: Quantity = "latency_ms"
    relative = True
    any_size = True
    pooled = True
    non_negative = True
    terms: tuple[str, ...]

    @abstractmethod
    def amounts(self, layers: Iterable[Layer]) -> FloatArray:
        """The layers' sums of `terms`, shape (n_terms,)."""

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return (*self.terms, "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        table = _block_amounts(self, space, stage, image_size)
        present = kinds >= 0
        safe = np.where(present, kinds, 0)
        values = table[0, safe[:, 0]] * present[:, :1]
        for i in range(1, kinds.shape[1]):
            values += table[1, safe[:, i]] * present[:, i : i + 1]
        return list(range(len(self.terms))), values

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        fixed = [unit for units in (stem_units, tail_units) for unit in units(space, image_size)]
        return np.append(self.amounts(layer for unit in fixed for layer in unit.layers), 1.0)


class CalibratedLatency(_CostModel):
    """A CPU's cost model: milliseconds = sum over `COST_TERMS` of a price times an amount, and a constant.

    Deviation from the paper: physical amounts of the whole network in place of 35 architecture
    parameters, fitted by least squares on relative errors. It predicts any network made of the
    same layers at any image size. Amounts are in millions, so prices read as ms per million.
    """

    name = "calibrated"
    terms = COST_TERMS

    def amounts(self, layers: Iterable[Layer]) -> FloatArray:
        return cost_terms(layers) / 1e6


class WideCalibratedLatency(CalibratedLatency):
    """The CPU's cost model with a price of its own for depthwise kernels beyond `FAST_TAPS` taps.

    A runtime without a fast kernel for them (LiteRT 2.3 on x86 takes 50 times as long for 7x7 as for
    5x5) cannot be priced by one `dw`. The authors' runtime of 2021 could.
    """

    name = "calibrated-wide"
    terms = (*COST_TERMS, "dw_wide")
    optional = ("dw_wide",)

    def amounts(self, layers: Iterable[Layer]) -> FloatArray:
        layers = list(layers)
        return np.append(super().amounts(layers), wide_depthwise_macs(layers) / 1e6)

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return space.kernels[-1] ** 2 > FAST_TAPS


class EdgeTpuLatency(_CostModel):
    """The Edge TPU's cost model: array, depthwise convolutions, link and a constant (`core.edgetpu`).

    The weights beyond the on-chip memory, ``s(P) = max(0, P - cache)`` with P a sum over stages, are
    not a sum over stages. s is convex, so on the space's range [P_min, P_max] it lies under its
    chord, which is linear in P: the chord takes its place. It is exact where no network of the
    space exceeds the memory (both built-in spaces) or all do, and an upper bound between: no
    network is promised faster than it is.
    """

    name = "edgetpu"
    terms = EDGETPU_TERMS

    def amounts(self, layers: Iterable[Layer]) -> FloatArray:
        return edgetpu_terms(layers)

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        columns, values = super().stage(space, stage, kinds, image_size)
        values[:, _LINK] *= _streamed_chord(space)[0]
        return columns, values

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        slope, offset = _streamed_chord(space)
        values = super().constant(space, image_size)
        values[_LINK] = slope * values[_LINK] + offset + (space.in_channels * image_size**2 + space.n_classes) / 1e6
        return values


_LINK = EDGETPU_TERMS.index("link")


@functools.lru_cache(maxsize=64)
def _streamed_chord(space: SearchSpace) -> tuple[float, float]:
    """Slope and offset (MB) of the chord of ``max(0, P - cache)`` over the space's weights P in MB.

    Weights grow with depth, expansion ratio and kernel size and do not depend on the image size.
    """
    size = space.image_sizes[0]
    least, most = (
        float(edgetpu_terms(build_network(space, a).layers)[_LINK]) for a in (space.smallest(size), space.largest(size))
    )
    cache = CACHE_BYTES / 1e6
    if most <= cache:
        return 0.0, 0.0
    start, end = max(0.0, least - cache), most - cache
    slope = (end - start) / (most - least) if most > least else 0.0
    return slope, start - slope * least


class CalibratedAccuracy(Formula):
    """A capacity model with saturation: linear in logarithms, under a ceiling.

    Deviation from the paper: z = -log(ceiling - accuracy) is linear in, for each stage, the depth,
    the sum of log e over identity blocks, log e of the first block and the log of the identity
    blocks' total expansion; and, the same in every stage, in the number of stages at full depth,
    the sum of log k over identity blocks and over first blocks. 24 coefficients in the CPU space.
    """

    name = "calibrated"
    quantity: Quantity = "accuracy"
    link = "ceiling"

    def _terms(self, space: SearchSpace) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Terms with one coefficient a stage, and terms with one for all; none that cannot vary."""
        own: tuple[str, ...] = ("D",) if len(space.depths) > 1 else ()
        own += ("sum_log_E", "log_E_first", "log_E_total") if len(space.expansions) > 1 else ()
        shared: tuple[str, ...] = ("full_depth",) if len(space.depths) > 2 else ()
        shared += ("sum_log_K", "log_K_first") if len(space.kernels) > 1 else ()
        return own, shared

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        own, shared = self._terms(space)
        return (*(f"{term}_{s.width}" for s in space.stages for term in own), *shared, "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        e, k, present = _blocks(space, kinds)
        rest = present[:, 1:]
        depth = present.sum(axis=1)
        log_e, log_k = np.log(e), np.log(k)
        values = {
            "D": depth.astype(np.float64),
            "sum_log_E": (log_e[:, 1:] * rest).sum(axis=1),
            "log_E_first": log_e[:, 0],
            "log_E_total": np.log(np.maximum((e[:, 1:] * rest).sum(axis=1), 1.0)),
            "full_depth": np.where(depth == space.max_depth, 1.0, 0.0),
            "sum_log_K": (log_k[:, 1:] * rest).sum(axis=1),
            "log_K_first": log_k[:, 0],
            "all_log_E": (log_e * present).sum(axis=1),
            "all_log_K": (log_k * present).sum(axis=1),
        }
        own, shared = self._terms(space)
        q, start = len(own), space.n_stages * len(own)
        indices = [*range(stage * q, (stage + 1) * q), *range(start, start + len(shared))]
        return indices, np.stack([values[term] for term in (*own, *shared)], axis=1)


class PooledAccuracy(CalibratedAccuracy):
    """The calibrated formula for rows of several image sizes together: the size shifts z.

    Deviation from the paper, which fits a predictor a size: there a size needs as many rows as it
    has coefficients, here two more coefficients serve all sizes.
    """

    name = "calibrated-sizes"
    pooled = True
    optional: tuple[str, ...] = ("log_size_squared",)

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return n_sizes > 1

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return (*super().columns(space)[:-1], "log_size", "log_size_squared", "const")

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        values = super().constant(space, image_size)
        log_size = _log_size(space, image_size)
        values[-3:-1] = log_size, log_size**2
        return values


class CompactAccuracy(PooledAccuracy):
    """The same with expansion ratios that count alike in every stage, for few rows.

    12 coefficients in the CPU space, one of them optional.
    """

    name = "compact"
    optional = ("log_size", "log_size_squared")

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return True

    def _terms(self, space: SearchSpace) -> tuple[tuple[str, ...], tuple[str, ...]]:
        own: tuple[str, ...] = ("D",) if len(space.depths) > 1 else ()
        shared: tuple[str, ...] = ("sum_log_E", "log_E_first") if len(space.expansions) > 1 else ()
        shared += ("sum_log_K", "log_K_first") if len(space.kernels) > 1 else ()
        return own, shared


class CapacityAccuracy(CompactAccuracy):
    """The network's blocks, their expansion ratios and kernel sizes, wherever they are: for the fewest rows.

    What noise leaves of a small sample, or of a supernet whose subnets hardly differ. 6 coefficients.
    """

    name = "capacity"

    def _terms(self, space: SearchSpace) -> tuple[tuple[str, ...], tuple[str, ...]]:
        shared: tuple[str, ...] = ("D",) if len(space.depths) > 1 else ()
        shared += ("all_log_E",) if len(space.expansions) > 1 else ()
        shared += ("all_log_K",) if len(space.kernels) > 1 else ()
        return (), shared


class CapacityOfSizes(CapacityAccuracy):
    """The same with prices of capacity that change with the image size: large images have more to show.

    9 coefficients, and a tenth for a size's own part where the rows have four sizes.
    """

    name = "capacity-sizes"
    optional = ("log_size_squared", "log_size_cubed")

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return n_sizes > 1 and len(self._terms(space)[1]) > 0

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        terms = self._terms(space)[1]
        sizes = ("log_size", "log_size_squared", "log_size_cubed")
        return (*terms, *(f"{term}:log_size" for term in terms), *sizes, "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        columns, values = super().stage(space, stage, kinds, image_size)
        shifted = [len(columns) + column for column in columns]
        return columns + shifted, np.concatenate([values, values * _log_size(space, image_size)], axis=1)

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        values = Formula.constant(self, space, image_size)
        values[-4:-1] = _log_size(space, image_size) ** np.arange(1, 4)
        return values


def _log_size(space: SearchSpace, image_size: int) -> float:
    """0 at the largest size, so that other coefficients are that size's."""
    return float(np.log(image_size / space.image_sizes[-1]))


FORMULAS: Mapping[tuple[str, str], Formula] = {
    (formula.name, formula.quantity): formula
    for formula in (
        PaperAccuracy(),
        PaperLatency(),
        CalibratedAccuracy(),
        PooledAccuracy(),
        CompactAccuracy(),
        CapacityAccuracy(),
        CapacityOfSizes(),
        CalibratedLatency(),
        WideCalibratedLatency(),
        EdgeTpuLatency(),
    )
}

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "calibrated": ("calibrated-wide", "calibrated", "calibrated-sizes", "compact", "capacity-sizes", "capacity"),
    "paper": ("paper",),
}
"""What a user names, and the formulas that it tries."""


def get_formula(name: str, quantity: str) -> Formula:
    """A formula by name and quantity; further measured quantities have the formulas of latency.

    Raises:
        InvalidInputError: If there is none.
    """
    try:
        return FORMULAS[name, "accuracy" if quantity == "accuracy" else "latency_ms"]
    except KeyError:
        names = sorted({n for n, _ in FORMULAS})
        raise InvalidInputError(f"formula must be one of {names}", received=name) from None


@functools.lru_cache(maxsize=256)
def _block_amounts(model: _CostModel, space: SearchSpace, stage: int, image_size: int) -> FloatArray:
    """A cost model's amounts of every block kind of a stage: shape (2, n_kinds, n_terms).

    Row 0 is the stage's first block, row 1 an identity block.
    """
    sizes = space.stage_input_sizes(image_size)
    return np.array(
        [
            [model.amounts(stage_unit(space, stage, position, block, sizes).layers) for block in space.kinds]
            for position in (0, 1)
        ]
    )


def widest_formula(family: str, quantity: str, space: SearchSpace, n_sizes: int) -> Formula:
    """The formula of a family with most columns among those that apply: what a design must tell apart."""
    return max(applicable_formulas(family, quantity, space, n_sizes), key=lambda f: len(f.columns(space)))


def applicable_formulas(family: str, quantity: str, space: SearchSpace, n_sizes: int) -> list[Formula]:
    """The formulas of a family that say something of their own in a space, for rows of `n_sizes` image sizes."""
    kind = "accuracy" if quantity == "accuracy" else "latency_ms"
    known = [FORMULAS[name, kind] for name in FAMILIES[family] if (name, kind) in FORMULAS]
    return [formula for formula in known if formula.applies(space, n_sizes)]
