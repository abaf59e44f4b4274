"""Stages as numbers: every option of a stage in one table, and architectures as table indices.

Predictors that are sums over stages do not care about the order of a stage's identity blocks, so
an option is the first block and the *multiset* of the others: 12 * (12 + 78 + 364) = 5,448 options
a stage in the CPU space, where the ordered count is 22,608.

| name       | shape          | meaning                                                      |
|------------|----------------|--------------------------------------------------------------|
| ``kinds``  | (m, max_depth) | index into ``space.kinds`` of each block, -1 where there is  |
|            |                | none; identity blocks ascend in the options table            |
| ``index``  | (n, n_stages)  | row of the options table that each stage of n subnets takes  |
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture, Stage
from foxnas_mlflow.core.errors import InvalidSpaceError
from foxnas_mlflow.core.space import SearchSpace

KindArray = NDArray[np.int16]
IndexArray = NDArray[np.int64]

_MAX_CODES = 20_000_000


@dataclass(frozen=True)
class StageOptions:
    """All options of a stage of a space, the same for every stage.

    Attributes:
        kinds: Blocks of each option, shape (m, max_depth), -1 where there is none.
        rows: Row of `kinds` for every code of blocks in any order, -1 where there is no option.
        weights: Weights (max_depth,) that make a code of blocks.
    """

    kinds: KindArray
    rows: IndexArray
    weights: IndexArray

    def lookup(self, kinds: KindArray) -> IndexArray:
        """Rows of the table for blocks whose identity blocks may come in any order.

        Args:
            kinds: Shape (..., max_depth), -1 where there is no block.

        Returns:
            Row indices, shape (...,).
        """
        rows: IndexArray = self.rows[(kinds + 1) @ self.weights]
        return rows


def check_options(space: SearchSpace) -> None:
    """Refuse a space that cannot be searched.

    Raises:
        InvalidSpaceError: If a stage has too many options to enumerate.
    """
    base, longest = len(space.kinds) + 1, space.max_depth
    if base**longest > _MAX_CODES:
        raise InvalidSpaceError(
            f"(block kinds + 1) ^ depth may be at most {_MAX_CODES:,} for the exact search",
            received=f"{base} ^ {longest}",
            remedy="use fewer kernel sizes, expansion ratios or a smaller depth",
        )


@functools.lru_cache(maxsize=16)
def stage_options(space: SearchSpace) -> StageOptions:
    """The options table of a space.

    Raises:
        InvalidSpaceError: If a stage has too many options to enumerate.
    """
    check_options(space)
    base, longest = len(space.kinds) + 1, space.max_depth
    weights = base ** np.arange(longest, dtype=np.int64)
    codes = np.arange(base**longest, dtype=np.int64)
    # Digit 0 is an absent block. Identity blocks in descending order name their multiset.
    digits = (codes[:, None] // weights) % base
    digits[:, 1:] = -np.sort(-digits[:, 1:], axis=1)
    canonical = digits @ weights
    depth = (digits > 0).sum(axis=1)
    options = np.flatnonzero((canonical == codes) & (digits[:, 0] > 0) & np.isin(depth, space.depths))
    rows = np.full(len(codes), -1, dtype=np.int64)
    rows[options] = np.arange(len(options))
    return StageOptions((digits[options] - 1).astype(np.int16), rows[canonical], weights)


def encode(space: SearchSpace, architectures: Sequence[Architecture]) -> KindArray:
    """Architectures as kinds: shape (n, n_stages, max_depth), blocks in their own order."""
    kind_of = {block: i for i, block in enumerate(space.kinds)}
    kinds = np.full((len(architectures), space.n_stages, space.max_depth), -1, dtype=np.int16)
    for n, architecture in enumerate(architectures):
        space.validate(architecture)
        for j, stage in enumerate(architecture.stages):
            kinds[n, j, : stage.depth] = [kind_of[block] for block in stage.blocks]
    return kinds


def decode(space: SearchSpace, image_size: int, kinds: KindArray) -> Architecture:
    """The architecture of one row of kinds, shape (n_stages, max_depth)."""
    # Blocks are shared: a front has thousands of networks.
    table = space.kinds
    stages = tuple(
        Stage(spec.width, tuple(table[k] for k in stage if k >= 0))
        for spec, stage in zip(space.stages, kinds.tolist(), strict=True)
    )
    return space.validate(Architecture(space.name, image_size, stages))
