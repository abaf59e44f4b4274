"""Which subnets to measure so that a predictor's coefficients are known best.

Random subnets (the paper) bunch in the middle of the space: a subnet's depth and totals are sums of
many draws. A D-optimal design takes those that make the determinant of X'X largest, X being the
predictor's design matrix, and with it the volume of the coefficients' confidence region smallest.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors._formulas import Formula
from foxnas_mlflow.core.random import Stream, pick, stream
from foxnas_mlflow.core.space import SearchSpace

FloatArray = NDArray[np.float64]

_RIDGE = 1e-6
"""Makes the determinant positive before there are as many rows as columns."""


def d_optimal(x: FloatArray, n: int, *, chosen: Sequence[int] = ()) -> list[int]:
    """Add rows one by one, each the one that raises det(X'X) most.

    With M = X'X of the rows so far, a row v multiplies the determinant by 1 + v' M^-1 v.

    Args:
        x: Candidate rows, shape (n_candidates, p).
        n: Rows to add.
        chosen: Indices of rows that are taken already.

    Returns:
        Indices of the added rows in the order of their choice; none twice, none of `chosen`.

    Raises:
        InvalidInputError: If there are fewer candidates than rows to add.
    """
    if n > len(x) - len(set(chosen)):
        raise InvalidInputError("a design needs more candidates than samples", received=f"{n} of {len(x)}")
    # Every column counts the same, whatever its unit.
    scaled = x / np.maximum(np.sqrt(np.mean(x**2, axis=0)), 1e-300)
    information = _RIDGE * np.eye(x.shape[1]) + scaled[list(chosen)].T @ scaled[list(chosen)]
    inverse = np.linalg.inv(information)
    gain = np.einsum("ij,jk,ik->i", scaled, inverse, scaled)
    gain[list(chosen)] = -np.inf
    added: list[int] = []
    for _ in range(n):
        best = int(np.argmax(gain))
        added.append(best)
        # Sherman and Morrison: the inverse with one more row, and every candidate's gain with it.
        direction = inverse @ scaled[best]
        norm = 1.0 + scaled[best] @ direction
        inverse -= np.outer(direction, direction) / norm
        gain -= (scaled @ direction) ** 2 / norm
        gain[best] = -np.inf
    return added


def choose_samples(
    space: SearchSpace,
    formulas: Sequence[Formula],
    n: int,
    *,
    method: str = "design",
    measured: Sequence[Architecture] = (),
    image_sizes: Sequence[int] | None = None,
    n_candidates: int = 4000,
    seed: int = 0,
) -> list[Architecture]:
    """Subnets to measure next.

    Args:
        space: The search space.
        formulas: Formulas that will be fitted; the design serves their columns together.
        n: How many.
        method: ``design`` (D-optimal among random candidates) or ``random`` (the paper).
        measured: Subnets that are measured already; they count for the design and do not come again.
        image_sizes: Image sizes in pixels; None: all of the space.
        n_candidates: Random subnets to choose among, at least; there are a quarter more than are chosen.
        seed: Seed of the candidates.

    Raises:
        InvalidInputError: If a value breaks a rule.
    """
    if n < 1:
        raise InvalidInputError("n_samples must be positive", received=n)
    if method not in ("design", "random"):
        raise InvalidInputError("design must be 'design' or 'random'", received=method)
    sizes = tuple(image_sizes or space.image_sizes)
    rng = stream(seed, Stream.DESIGN_CANDIDATES)
    # As numbers: of a small space most that is drawn is known, and an architecture takes longer to make than to draw.
    known = {
        (a.image_size, tuple(tuple((block.expansion, block.kernel) for block in stage.blocks) for stage in a.stages))
        for a in measured
    }
    candidates: list[Architecture] = []
    parts: dict[tuple[tuple[int, ...], ...], SearchSpace] = {}
    n_candidates = max(n_candidates, n + n // 4)
    # A tiny space may have fewer subnets than are asked for: stop when draws bring nothing new.
    last_new = 0
    for draw in range(20 * max(n_candidates, n)):
        if len(candidates) >= (n_candidates if method == "design" else n) or draw - last_new > 1000 + 100 * len(known):
            break
        # Every other candidate is of a part of the space, or nearly all would mix all of its kernels and ratios.
        source = _part(space, rng, parts) if method == "design" and len(candidates) % 2 else space
        drawn = pick(rng, sizes), source.draw_blocks(rng)
        if drawn not in known:
            last_new = draw
            known.add(drawn)
            candidates.append(space.architecture(*drawn))
    if len(candidates) < n:
        raise InvalidInputError("the space must have as many subnets as are sampled", received=f"{n} samples")
    if method == "random":
        return candidates
    pool = [*candidates, *measured]
    x = np.concatenate([_information_rows(formula, space, pool) for formula in formulas], axis=1)
    chosen = d_optimal(x, n, chosen=range(len(candidates), len(pool)))
    return [candidates[i] for i in chosen]


def _part(
    space: SearchSpace, rng: np.random.Generator, made: dict[tuple[tuple[int, ...], ...], SearchSpace]
) -> SearchSpace:
    """The space with a random choice of its kernel sizes, expansion ratios and depths; each is made once."""

    def some(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(v for v in values if rng.random() < 0.5) or (pick(rng, values),)

    key = kernels, expansions, depths = some(space.kernels), some(space.expansions), some(space.depths)
    if key not in made:
        made[key] = space.replace(kernels=kernels, expansions=expansions, depths=depths)
    return made[key]


def _information_rows(formula: Formula, space: SearchSpace, architectures: Sequence[Architecture]) -> FloatArray:
    """A formula's design rows, each divided by the size of its error.

    Errors in proportion to the value are weighed by a guess of it: every amount costs as much as any other, on average.
    """
    x = formula.design(space, architectures)
    if not formula.relative:
        return x
    guess: FloatArray = (x / np.maximum(x.mean(axis=0), 1e-300)).sum(axis=1, keepdims=True)
    return x / guess
