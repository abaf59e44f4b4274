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
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidSpaceError
from foxnas_mlflow.core.space import SearchSpace

KindArray = NDArray[np.int16]
IndexArray = NDArray[np.int64]

_MAX_OPTIONS = 2_000_000


@dataclass(frozen=True)
class StageOptions:
    """All options of a stage of a space, the same for every stage.

    Attributes:
        kinds: Blocks of each option, shape (m, max_depth), -1 where there is none.
        codes: A number for each option, ascending, that `lookup` finds rows by.
        n_kinds: Number of block kinds of the space.
    """

    kinds: KindArray
    codes: IndexArray
    n_kinds: int

    def lookup(self, kinds: KindArray) -> IndexArray:
        """Rows of the table for blocks in any order of the identity blocks.

        Args:
            kinds: Shape (..., max_depth), -1 where there is no block.

        Returns:
            Row indices, shape (...,).
        """
        ordered = kinds.copy()
        # Descending puts the -1 of absent blocks last.
        ordered[..., 1:] = -np.sort(-ordered[..., 1:], axis=-1)
        return np.searchsorted(self.codes, _codes(ordered, self.n_kinds)).astype(np.int64)


@functools.lru_cache(maxsize=16)
def stage_options(space: SearchSpace) -> StageOptions:
    """The options table of a space.

    Raises:
        InvalidSpaceError: If a stage has too many options to enumerate.
    """
    n_kinds, longest = len(space.kinds), space.max_depth
    count = sum(n_kinds * math.comb(n_kinds + depth - 2, depth - 1) for depth in space.depths)
    if count > _MAX_OPTIONS:
        raise InvalidSpaceError(
            f"a stage may have at most {_MAX_OPTIONS:,} options for the exact search",
            received=f"{count:,}",
            remedy="use fewer kernel sizes, expansion ratios or depths",
        )
    rows = []
    for depth in space.depths:
        # Descending multisets, in the order that `lookup` sorts to.
        rest = np.array(
            list(itertools.combinations_with_replacement(range(n_kinds - 1, -1, -1), depth - 1)), dtype=np.int16
        ).reshape(-1, depth - 1)
        block = np.full((n_kinds * len(rest), longest), -1, dtype=np.int16)
        block[:, 0] = np.repeat(np.arange(n_kinds, dtype=np.int16), len(rest))
        block[:, 1:depth] = np.tile(rest, (n_kinds, 1))
        rows.append(block)
    kinds = np.concatenate(rows)
    codes = _codes(kinds, n_kinds)
    order = np.argsort(codes)
    return StageOptions(kinds[order], codes[order], n_kinds)


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
    table = space.kinds
    blocks = [[(table[k].expansion, table[k].kernel) for k in stage if k >= 0] for stage in kinds]
    return space.architecture(image_size, blocks)


def _codes(kinds: KindArray, n_kinds: int) -> IndexArray:
    weights = (n_kinds + 1) ** np.arange(kinds.shape[-1], dtype=np.int64)
    codes: IndexArray = (kinds.astype(np.int64) + 1) @ weights
    return codes
