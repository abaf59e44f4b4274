"""What limits can be on: quantities that are counted from an architecture, and those that are predicted.

A counted quantity is a sum over layers (parameters, bytes, multiply-accumulates) or a maximum (activations
alive at once). Both are known exactly for each stage option; a maximum limits each option by itself.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.cost import NetworkCost, network_cost
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.network import Network, Unit, stage_unit, stem_units, tail_units
from foxnas_mlflow.core.options import stage_options
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.space import SearchSpace

FloatArray = NDArray[np.float64]

SUMS = ("int8_size_bytes", "params", "macs")
"""Counted quantities that are sums over layers."""

MAXIMA = ("peak_activation_bytes",)
"""Counted quantities that are maxima over layers."""


@dataclass(frozen=True)
class Counted:
    """One counted quantity at one image size.

    Attributes:
        base: Of everything outside the stages.
        stages: Of each stage's options, shape (m,) each.
        maximum: Whether a network has the largest of these, not their sum.
    """

    base: float
    stages: tuple[FloatArray, ...]
    maximum: bool


def predicted_quantities(predictors: PredictorSet) -> tuple[str, ...]:
    """Quantities other than accuracy that predictors know, latency first."""
    return tuple(quantity for quantity in predictors.groups if quantity != "accuracy")


def check_quantity(
    quantity: str,
    predicted: Sequence[str],
    *,
    remedy: str = "measure it as a column of measurements.csv and fit predictors with it, or choose one of these",
) -> None:
    """Refuse a quantity that is neither counted nor predicted.

    Args:
        quantity: What a limit or a goal is on.
        predicted: The quantities that there are, or will be, predictors of.
        remedy: What to do about another one.

    Raises:
        InvalidInputError: It names the known quantities.
    """
    known = [*predicted, *SUMS, *MAXIMA]
    if quantity == "accuracy":
        raise InvalidInputError("a limit is the most of a cost", received=quantity, remedy="set min_accuracy instead")
    if quantity not in known:
        raise InvalidInputError(
            f"the quantities that these predictors know, and those that are counted, are {known}",
            received=quantity,
            remedy=remedy,
        )


@functools.lru_cache(maxsize=64)
def counted(space: SearchSpace, image_size: int, quantity: str) -> Counted:
    """A counted quantity of a space's stage options at an image size (px)."""
    options = stage_options(space).kinds
    present = options >= 0
    kinds = np.where(present, options, 0)
    maximum = quantity in MAXIMA
    stages = []
    for blocks in _block_costs(space, image_size):
        table = np.array([[getattr(cost, quantity) for cost in row] for row in blocks], dtype=np.float64)
        values = np.where(present, table[1][kinds], 0.0)
        values[:, 0] = table[0][kinds[:, 0]]
        stages.append(values.max(axis=1) if maximum else values.sum(axis=1))
    fixed = _cost(space, image_size, (*stem_units(space, image_size), *tail_units(space, image_size)))
    return Counted(float(getattr(fixed, quantity)), tuple(stages), maximum)


@functools.lru_cache(maxsize=16)
def _block_costs(space: SearchSpace, image_size: int) -> list[list[list[NetworkCost]]]:
    """Costs of every block kind: a list of stages, each of two rows, the first block and an identity block."""
    sizes = space.stage_input_sizes(image_size)
    return [
        [
            [_cost(space, image_size, (stage_unit(space, j, position, block, sizes),)) for block in space.kinds]
            for position in (0, 1)
        ]
        for j in range(space.n_stages)
    ]


def _cost(space: SearchSpace, image_size: int, units: tuple[Unit, ...]) -> NetworkCost:
    return network_cost(Network(image_size, space.in_channels, space.n_classes, units))
