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

import dataclasses
import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import COST_TERMS, FAST_TAPS, LAUNCH_TERMS, cost_terms, launch_terms, wide_depthwise_macs
from foxnas_mlflow.core.edgetpu import CHIP_BYTES, EDGETPU_TERMS, edgetpu_terms
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
        spare_rows: Rows beyond the number of columns that a fit needs: with fewer, s is noise.
        launches: Whether it counts what a device starts, for devices whose time that is.
    """

    name: str
    quantity: Quantity
    link: Literal["identity", "ceiling"] = "identity"
    relative: bool = False
    any_size: bool = False
    pooled: bool = False
    non_negative: bool = False
    optional: tuple[str, ...] = ()
    spare_rows: int = 5
    launches: bool = False

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
        sizes = np.array([a.image_size for a in architectures])
        return self.design_of_kinds(space, encode(space, architectures), sizes)

    def design_of_kinds(self, space: SearchSpace, kinds: KindArray, sizes: NDArray[np.int64]) -> FloatArray:
        """`design` of encoded architectures, kinds (n, n_stages, max_depth), of the image sizes (n,)."""
        x = np.zeros((len(kinds), len(self.columns(space))))
        for size in np.unique(sizes):
            rows = np.flatnonzero(sizes == size)
            x[rows] += self.constant(space, int(size))
            for j in range(space.n_stages):
                columns, values = self.stage(space, j, kinds[rows, j], int(size))
                x[np.ix_(rows, np.array(columns, dtype=np.int64))] += values
        return x


class _Blocks:
    """The blocks of n options of a stage: what terms are made of, each computed once."""

    def __init__(self, space: SearchSpace, kinds: KindArray) -> None:
        self.present = kinds >= 0
        table = np.array([(block.expansion, block.kernel) for block in space.kinds], dtype=np.float64)
        values = table[np.where(self.present, kinds, 0)]
        self.e, self.k = values[..., 0], values[..., 1]
        self.log_e, self.log_k = np.log(self.e), np.log(self.k)
        self.rest = self.present[:, 1:]
        self.n_rest = np.maximum(self.rest.sum(axis=1), 1)
        self.depth = self.present.sum(axis=1).astype(np.float64)
        self.full = self.depth == space.max_depth

    def identity_sum(self, values: FloatArray) -> FloatArray:
        """Sum over the identity blocks, which come after the first."""
        total: FloatArray = (values[:, 1:] * self.rest).sum(axis=1)
        return total

    def identity_mean(self, values: FloatArray) -> FloatArray:
        """Mean over the identity blocks; 0 where there are none."""
        mean: FloatArray = self.identity_sum(values) / self.n_rest
        return mean

    def sum(self, values: FloatArray) -> FloatArray:
        """Sum over all blocks."""
        total: FloatArray = (values * self.present).sum(axis=1)
        return total

    def mean(self, values: FloatArray) -> FloatArray:
        """Mean over all blocks."""
        mean: FloatArray = self.sum(values) / self.depth
        return mean


_TERMS: Mapping[str, Callable[[_Blocks], FloatArray]] = {
    "D": lambda b: b.depth,
    "E_avg": lambda b: b.identity_mean(b.e),
    "K_avg": lambda b: b.identity_mean(b.k),
    "E_first": lambda b: b.e[:, 0],
    "K_first": lambda b: b.k[:, 0],
    "E_total": lambda b: b.identity_sum(b.e),
    "E_total:D": lambda b: b.identity_sum(b.e) * b.depth,
    "E_avg:D": lambda b: b.identity_mean(b.e) * b.depth,
    "K_avg:D": lambda b: b.identity_mean(b.k) * b.depth,
    "sum_log_E": lambda b: b.identity_sum(b.log_e),
    "log_E_first": lambda b: b.log_e[:, 0],
    "log_E_total": lambda b: np.log(np.maximum(b.identity_sum(b.e), 1.0)),
    "full_depth": lambda b: np.where(b.full, 1.0, 0.0),
    "sum_log_K": lambda b: b.identity_sum(b.log_k),
    "log_K_first": lambda b: b.log_k[:, 0],
    "all_log_E": lambda b: b.sum(b.log_e),
    "all_log_K": lambda b: b.sum(b.log_k),
    "mean_log_E": lambda b: b.mean(b.log_e),
    "mean_log_K": lambda b: b.mean(b.log_k),
    "mean_log_K_squared": lambda b: b.mean(b.log_k) ** 2,
    "mean_log_E:mean_log_K": lambda b: b.mean(b.log_e) * b.mean(b.log_k),
}
"""What a stage's blocks can be described by: n options to n numbers."""

_SIZE_TERMS = ("log_size", "log_size_squared", "log_size_cubed")


def _varies(term: str, space: SearchSpace) -> bool:
    """Whether a term has more than one value in a space."""
    if "E" in term or "K" in term:
        return ("E" not in term or len(space.expansions) > 1) and ("K" not in term or len(space.kernels) > 1)
    # With two depths the one is the other plus a constant.
    return len(space.depths) > (2 if term == "full_depth" else 1)


@dataclass(frozen=True)
class BlockFormula(Formula):
    """A formula of terms of a stage's blocks: keys of `_TERMS`.

    Attributes:
        own: Terms with one coefficient a stage.
        shared: Terms with one coefficient for all stages.
        everywhere: Whether terms stay that do not vary in a space; a fit leaves them out.
        size_powers: Powers of the log of the image size that shift the linear scale.
        by_size: Terms of `shared` whose coefficients change with the log of the image size.
        several_sizes: Whether it needs rows of several image sizes.
    """

    name: str
    quantity: Quantity
    own: tuple[str, ...] = ()
    shared: tuple[str, ...] = ()
    link: Literal["identity", "ceiling"] = "identity"
    pooled: bool = False
    optional: tuple[str, ...] = ()
    everywhere: bool = False
    size_powers: int = 0
    by_size: tuple[str, ...] = ()
    several_sizes: bool = False

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return (n_sizes > 1 or not self.several_sizes) and (bool(self._by_size(space)) or not self.by_size)

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        own, shared = self._kept(space)
        by_size = tuple(f"{term}:log_size" for term in self._by_size(space))
        of_stages = (f"{term}_{s.width}" for s in space.stages for term in own)
        return (*of_stages, *shared, *by_size, *_SIZE_TERMS[: self.size_powers], "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        own, shared = self._kept(space)
        blocks = _Blocks(space, kinds)
        q, start = len(own), space.n_stages * len(own)
        columns = [*range(stage * q, (stage + 1) * q), *range(start, start + len(shared))]
        values = np.empty((len(kinds), len(columns)))
        for i, term in enumerate((*own, *shared)):
            values[:, i] = _TERMS[term](blocks)
        by_size = self._by_size(space)
        columns += range(start + len(shared), start + len(shared) + len(by_size))
        chosen = [q + shared.index(term) for term in by_size]
        return columns, np.concatenate([values, values[:, chosen] * _log_size(space, image_size)], axis=1)

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        log_size = _log_size(space, image_size)
        outside = [*(log_size**power for power in range(1, self.size_powers + 1)), 1.0]
        of_blocks = len(self.columns(space)) - len(outside)
        return np.concatenate([np.zeros(of_blocks), outside])

    def _kept(self, space: SearchSpace) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The terms of `own` and of `shared` that a space has."""
        own, shared = (
            tuple(t for t in terms if self.everywhere or _varies(t, space)) for terms in (self.own, self.shared)
        )
        return own, shared

    def _by_size(self, space: SearchSpace) -> tuple[str, ...]:
        """The terms of `by_size` that a space has."""
        return tuple(term for term in self._kept(space)[1] if term in self.by_size)


def _log_size(space: SearchSpace, image_size: int) -> float:
    """0 at the largest size, so that other coefficients are that size's."""
    return float(np.log(image_size / space.image_sizes[-1]))


@dataclass(frozen=True)
class CostFormula(Formula):
    """Latency as a sum over terms of a price times an amount, and a constant.

    The amounts are sums over all layers, so one fit predicts any network made of the same layers.

    Attributes:
        terms: Names of the amounts.
        amounts: Layers to the sums of `terms` over them, shape (n_terms,).
        fast_taps: The formula applies to spaces with larger depthwise kernels (taps) alone.
        streamed: Index of a term that only counts beyond the on-chip memory (`_streamed_chord`), or None.
    """

    name: str
    terms: tuple[str, ...]
    amounts: Callable[[Sequence[Layer]], FloatArray]
    optional: tuple[str, ...] = ()
    fast_taps: int = 0
    streamed: int | None = None
    spare_rows: int = 5
    launches: bool = False

    # No fields: every cost formula is fitted so.
    quantity = "latency_ms"
    relative = True
    any_size = True
    pooled = True
    non_negative = True

    def applies(self, space: SearchSpace, n_sizes: int) -> bool:
        return space.kernels[-1] ** 2 > self.fast_taps

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return (*self.terms, "const")

    def stage(self, space: SearchSpace, stage: int, kinds: KindArray, image_size: int) -> tuple[list[int], FloatArray]:
        table = _block_amounts(self, space, stage, image_size)
        present = kinds >= 0
        safe = np.where(present, kinds, 0)
        values = table[0, safe[:, 0]] * present[:, :1]
        for i in range(1, kinds.shape[1]):
            values += table[1, safe[:, i]] * present[:, i : i + 1]
        if self.streamed is not None:
            values[:, self.streamed] *= _streamed_chord(space)[0]
        return list(range(len(self.terms))), values

    def constant(self, space: SearchSpace, image_size: int) -> FloatArray:
        fixed = [unit for units in (stem_units, tail_units) for unit in units(space, image_size)]
        values = np.append(self.amounts([layer for unit in fixed for layer in unit.layers]), 1.0)
        if self.streamed is not None:
            slope, offset = _streamed_chord(space)
            image = (space.in_channels * image_size**2 + space.n_classes) / 1e6
            values[self.streamed] = slope * values[self.streamed] + offset + image
        return values


_LINK = EDGETPU_TERMS.index("link")


@functools.lru_cache(maxsize=64)
def _streamed_chord(space: SearchSpace) -> tuple[float, float]:
    """Slope and offset (MB) of the chord of ``max(0, P - cache)`` over the space's weights P in MB.

    The weights beyond the on-chip memory, ``s(P) = max(0, P - cache)`` with P a sum over stages, are
    not a sum over stages. s is convex, so on the space's range [P_min, P_max] it lies under its
    chord, which is linear in P: the chord takes its place. It is exact where no network of the
    space exceeds the memory (both built-in spaces) or all do, and an upper bound between. The memory
    is the whole chip's: what the compiler leaves of it to weights (`edgetpu.CACHE_BYTES`) lies
    between the spaces' ends, where the chord would charge what every network keeps on the chip.

    Weights grow with depth, expansion ratio and kernel size and do not depend on the image size.
    """
    size = space.image_sizes[0]
    least, most = (
        float(edgetpu_terms(build_network(space, a).layers)[_LINK]) for a in (space.smallest(size), space.largest(size))
    )
    cache = CHIP_BYTES / 1e6
    if most <= cache:
        return 0.0, 0.0
    start, end = max(0.0, least - cache), most - cache
    slope = (end - start) / (most - least) if most > least else 0.0
    return slope, start - slope * least


@functools.lru_cache(maxsize=256)
def _block_amounts(model: CostFormula, space: SearchSpace, stage: int, image_size: int) -> FloatArray:
    """A cost formula's amounts of every block kind of a stage: shape (2, n_kinds, n_terms).

    Row 0 is the stage's first block, row 1 an identity block.
    """
    sizes = space.stage_input_sizes(image_size)
    return np.array(
        [
            [model.amounts(stage_unit(space, stage, position, block, sizes).layers) for block in space.kinds]
            for position in (0, 1)
        ]
    )


def _cpu_amounts(layers: Sequence[Layer]) -> FloatArray:
    return cost_terms(layers) / 1e6


def _cpu_amounts_wide(layers: Sequence[Layer]) -> FloatArray:
    return np.append(_cpu_amounts(layers), wide_depthwise_macs(layers) / 1e6)


def _cpu_amounts_and_launches(layers: Sequence[Layer]) -> FloatArray:
    return np.append(_cpu_amounts(layers), launch_terms(layers))


_EARLIER_EDGETPU_TERMS = ("array", "depthwise", "link")


def _earlier_edgetpu_terms(layers: Sequence[Layer]) -> FloatArray:
    return edgetpu_terms(layers)[[EDGETPU_TERMS.index(term) for term in _EARLIER_EDGETPU_TERMS]]


_ACCURACY_OF_SIZES = BlockFormula(
    "calibrated-sizes",
    "accuracy",
    own=("D", "sum_log_E", "log_E_first", "log_E_total"),
    shared=("full_depth", "sum_log_K", "log_K_first"),
    link="ceiling",
    pooled=True,
    optional=("log_size_squared",),
    size_powers=2,
    several_sizes=True,
)

_CAPACITY_OF_SIZES = dataclasses.replace(
    _ACCURACY_OF_SIZES,
    name="capacity-sizes",
    own=(),
    shared=("D", "all_log_E", "all_log_K"),
    optional=("log_size_squared", "log_size_cubed"),
    size_powers=3,
    by_size=("D", "all_log_E", "all_log_K"),
)

_FORMULAS: tuple[Formula, ...] = (
    # Equation 2 for accuracy: 8 terms a stage and a constant (41 coefficients for m = 5).
    BlockFormula(
        "paper",
        "accuracy",
        own=("D", "E_avg", "K_avg", "E_first", "K_first", "E_total", "E_total:D", "K_avg:D"),
        everywhere=True,
    ),
    # Equation 2 for latency as the authors published it: E_avg * D in place of the two totals.
    # E_total = E_avg * (D - 1), so E_total and E_total * D of equation 2 add nothing linear beside
    # E_avg and E_avg * D except curvature, which latency lacks (36 coefficients for m = 5).
    BlockFormula(
        "paper",
        "latency_ms",
        own=("D", "E_avg", "K_avg", "E_first", "K_first", "E_avg:D", "K_avg:D"),
        everywhere=True,
    ),
    # A capacity model with saturation: linear in logarithms, under a ceiling. Deviation from the
    # paper: z = -log(ceiling - accuracy) is linear in, for each stage, the depth, the sum of log e
    # over identity blocks, log e of the first block and the log of the identity blocks' total
    # expansion; and, the same in every stage, in the number of stages at full depth, the sum of
    # log k over identity blocks and over first blocks. 24 coefficients in the CPU space.
    dataclasses.replace(
        _ACCURACY_OF_SIZES, name="calibrated", pooled=False, optional=(), size_powers=0, several_sizes=False
    ),
    # The same for rows of several image sizes together: the size shifts z. Deviation from the paper,
    # which fits a predictor a size: there a size needs as many rows as it has coefficients, here two
    # more coefficients serve all sizes.
    _ACCURACY_OF_SIZES,
    # The same with expansion ratios that count alike in every stage, for few rows: 12 coefficients
    # in the CPU space, one of them optional.
    dataclasses.replace(
        _ACCURACY_OF_SIZES,
        name="compact",
        own=("D",),
        shared=("sum_log_E", "log_E_first", "sum_log_K", "log_K_first"),
        optional=("log_size", "log_size_squared"),
        several_sizes=False,
    ),
    # The network's blocks, their expansion ratios and kernel sizes, wherever they are: for the fewest
    # rows. What noise leaves of a small sample, or of a supernet whose subnets hardly differ. 6 coefficients.
    dataclasses.replace(
        _ACCURACY_OF_SIZES,
        name="capacity",
        own=(),
        shared=("D", "all_log_E", "all_log_K"),
        optional=("log_size", "log_size_squared"),
        several_sizes=False,
    ),
    # The same with prices of capacity that change with the image size: large images have more to show.
    # 9 coefficients, and a tenth for a size's own part where the rows have four sizes.
    _CAPACITY_OF_SIZES,
    # An earlier formula in place of the next one, for predictors that were fitted with it.
    dataclasses.replace(
        _CAPACITY_OF_SIZES,
        name="kernels-sizes",
        shared=("D", "all_log_E", "mean_log_K"),
        by_size=("mean_log_K",),
    ),
    # What a stage's blocks are on average, however many there are, and its first block, which every subnet has. A
    # kernel suits images of its size, neither the smallest nor the largest need be best, and wide blocks gain most
    # from large ones: the subnets at both ends of a space are trained in every step of a sandwich, and those that are
    # like them share what they learn. 11 coefficients, one of them optional, and a twelfth.
    dataclasses.replace(
        _CAPACITY_OF_SIZES,
        name="means-sizes",
        shared=(
            "D",
            "mean_log_E",
            "mean_log_K",
            "mean_log_K_squared",
            "mean_log_E:mean_log_K",
            "log_E_first",
            "log_K_first",
        ),
        by_size=("mean_log_K",),
    ),
    # A CPU's cost model: milliseconds = sum over `COST_TERMS` of a price times an amount, and a
    # constant. Deviation from the paper: physical amounts of the whole network in place of 35
    # architecture parameters, fitted by least squares on relative errors. It predicts any network made
    # of the same layers at any image size. Amounts are in millions, so prices read as ms per million.
    CostFormula("calibrated", COST_TERMS, _cpu_amounts),
    # The same with a price of its own for depthwise kernels beyond `FAST_TAPS` taps. A runtime without
    # a fast kernel for them (LiteRT 2.3 on x86 takes 50 times as long for 7x7 as for 5x5) cannot be
    # priced by one `dw`. The authors' runtime of 2021 could.
    CostFormula(
        "calibrated-wide",
        (*COST_TERMS, "dw_wide"),
        _cpu_amounts_wide,
        optional=("dw_wide",),
        fast_taps=FAST_TAPS,
    ),
    # The CPU's with a price of a layer and one of a squeeze-excite gate, whatever their sizes. A GPU at batch 1
    # waits for starts of kernels: on a V100 prices of amounts alone are 10 % off, with these two less than 5 %
    # (docs/METHOD.md). Prices that come out as 0 leave more rows to spare.
    CostFormula(
        "calibrated-launch",
        (*COST_TERMS, *LAUNCH_TERMS),
        _cpu_amounts_and_launches,
        optional=LAUNCH_TERMS,
        spare_rows=3,
        launches=True,
    ),
    # These two alone, for few rows of a device that waits for starts.
    CostFormula("launches", LAUNCH_TERMS, launch_terms, optional=LAUNCH_TERMS, launches=True),
    # The Edge TPU's cost model: array, depthwise convolutions, link and a constant (`core.edgetpu`).
    CostFormula("edgetpu-outputs", EDGETPU_TERMS, edgetpu_terms, streamed=_LINK),
    # An earlier formula in its place, for predictors that were fitted with it.
    CostFormula("edgetpu", _EARLIER_EDGETPU_TERMS, _earlier_edgetpu_terms, streamed=len(_EARLIER_EDGETPU_TERMS) - 1),
)

FORMULAS: Mapping[tuple[str, str], Formula] = {(formula.name, formula.quantity): formula for formula in _FORMULAS}

FAMILIES: Mapping[str, tuple[str, ...]] = {
    "calibrated": (
        "calibrated-wide",
        "calibrated",
        "calibrated-launch",
        "launches",
        "calibrated-sizes",
        "compact",
        "capacity-sizes",
        "means-sizes",
        "capacity",
    ),
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


def widest_formula(family: str, quantity: str, space: SearchSpace, n_sizes: int) -> Formula:
    """The formula of a family with most columns among those that apply: what a design must tell apart.

    Starts of layers are not part of it: networks of all depths tell them anyway.
    """
    formulas = [f for f in applicable_formulas(family, quantity, space, n_sizes) if not f.launches]
    return max(formulas, key=lambda f: len(f.columns(space)))


def applicable_formulas(family: str, quantity: str, space: SearchSpace, n_sizes: int) -> list[Formula]:
    """The formulas of a family that say something of their own in a space, for rows of `n_sizes` image sizes."""
    kind = "accuracy" if quantity == "accuracy" else "latency_ms"
    known = [FORMULAS[name, kind] for name in FAMILIES[family] if (name, kind) in FORMULAS]
    return [formula for formula in known if formula.applies(space, n_sizes)]
