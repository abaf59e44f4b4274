"""Simulated annealing, the paper's Algorithm 1, over many chains at once.

| symbol (Algorithm 1) | name in code      | meaning                                                  |
|----------------------|-------------------|----------------------------------------------------------|
| T                    | ``temperature``   | most parameters that a move changes, rounded up          |
| k                    | ``boltzmann``     | accuracy points that one unit of temperature forgives    |
| C                    | ``step``          | counter of moves                                         |
| weight               | ``weights``       | probability of each parameter and value in a change      |
| L as a price         | ``price``         | accuracy points that a millisecond is worth under L      |

Deviations. The printed rule accepts a worse network when r > exp(-delta / kT), which is false for
every delta < 0; the Metropolis rule it means, r < exp(delta / kT), is used. The sampler's endless
``while lat >= L`` becomes a fixed number of tries a move, each counted as an evaluation; the best try
that meets the constraint is the proposal, and a move without one leaves the chain where it is. T
falls continuously instead of by one every n moves, and is the most parameters that a try changes:
each try draws 1 to T. The algorithm is run again and again, each time with several times the
evaluations of the time before and more chains, one of them from the best network so far: a short run
finds the preliminary solution, a long one the global one, and no budget has to be known to be used well.
At regular moments the weakest quarter of the chains goes on from the networks of the strongest quarter
("go with the winners"): a chain stuck in a bad valley is not worth its share of the budget. Until half
time chains compete within their image size only. A new best network counts even when its chain leaves it
again.

The first set of weights is derived from the predictors (the paper does not say how it chose its own): their
coefficients tell the main effect of every value of every parameter on accuracy and on the limited quantities,
without a network being predicted. The limits turn into a price, and a value is worth the accuracy that it
brings less what it uses of the limits at that price. Chains start from values drawn by exp(worth), and so do
the moves of the early stage: the first half of the first few runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.searchers._base import Genes, GeneSpace, Recorder, Searcher
from foxnas_mlflow.core.searchers._objective import FloatArray, SizeObjective
from foxnas_mlflow.core.searchers._problem import POINTS_OF_LOG


@dataclass(frozen=True)
class SimulatedAnnealing(Searcher):
    """Algorithm 1, in runs that grow.

    Attributes:
        guided: Whether starts and the first set of weights come from the predictors; False keeps
            both even throughout, for comparison (figure 8).
        first_run: Evaluations of the first run.
        growth: Evaluations of a run by those of the run before; the last one takes what is left.
        n_chains: Most chains side by side: 4 in the first run, then twice as many a run.
        tries: Most tries of a move, of which the best that meets the limits is proposed: the same.
        max_temperature: First temperature; it falls to 0 with the square of what is left.
        min_changes: Most parameters changed by a try once T is below: three are needed to pay for
            one more block with two savings.
        boltzmann: Accuracy points forgiven per unit of temperature.
        rounds: Parts of a run, between which the weakest quarter of the chains moves to the
            strongest quarter's networks.
        guided_runs: Runs whose early stage moves by the first set of weights.

    Examples:
        >>> from foxnas_mlflow import SimulatedAnnealing, reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), 60, algorithm=SimulatedAnnealing(), evaluations=5_000)
        >>> outcome.latency_upper_ms <= 60
        True
    """

    guided: bool = True
    first_run: int = 400
    growth: int = 4
    n_chains: int = 32
    tries: int = 24
    max_temperature: float = 5.0
    min_changes: int = 3
    boltzmann: float = 0.015
    rounds: int = 16
    guided_runs: int = 3

    @property
    def name(self) -> str:  # type: ignore[override]
        """``annealing``, or ``annealing-unguided``."""
        return "annealing" if self.guided else "annealing-unguided"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        weights = guided_weights(space, recorder, 2 * self.boltzmann) if self.guided else None
        run = 0
        while recorder.left:
            evaluations = self.first_run * self.growth**run
            # What would be left for one more run is better spent in this one.
            if recorder.left < (1 + self.growth) * evaluations:
                evaluations = recorder.left
            self._anneal(space, recorder, rng, weights, run, evaluations)
            if evaluations >= recorder.left:
                break
            run += 1

    def _anneal(
        self,
        space: GeneSpace,
        recorder: Recorder,
        rng: np.random.Generator,
        guidance: FloatArray | None,
        run: int,
        evaluations: int,
    ) -> None:
        """One run: from the first temperature to 0, within a number of evaluations."""
        end = recorder.evaluations + evaluations
        n_chains = max(1, min(self.n_chains, _FIRST_CHAINS << run, evaluations // 8))
        recorder.n_chains = n_chains
        genes = space.sample(rng, n_chains)
        if guidance is not None:
            genes[:, :-1] = _draw(guidance, genes[:, -1:], np.arange(space.n_genes - 1), rng)
        genes, accuracy = recorder.feasible_start(rng, genes)
        left = end - recorder.evaluations
        tries = max(0, min(self.tries, _FIRST_CHAINS << run, left // n_chains))
        n_steps = left // (n_chains * tries) if tries else 0
        chains = np.arange(n_chains)
        round_steps = max(1, n_steps // self.rounds)
        for step in range(n_steps):
            early = step < n_steps // 2
            genes = space.settle(genes)
            if step % round_steps == 0:
                # A larger image pays off late: until half time chains compete within their size only.
                sizes = genes[:, -1] if early else np.zeros(n_chains)
                for size in np.unique(sizes):
                    order = np.flatnonzero(sizes == size)[np.argsort(-accuracy[sizes == size], kind="stable")]
                    quarter = len(order) // 4
                    weak, strong = order[len(order) - quarter :], order[:quarter]
                    genes[weak], accuracy[weak] = genes[strong], accuracy[strong]
            temperature = self.max_temperature * (1 - step / n_steps) ** 2
            n_changes = max(int(np.ceil(temperature)), self.min_changes)
            weights = guidance if early and run < self.guided_runs else None
            proposals = _move(space, genes, tries, n_changes, weights, rng)
            values = recorder.evaluate(proposals).reshape(tries, n_chains)
            best = np.argmax(values, axis=0)
            value = values[best, chains]
            with np.errstate(over="ignore"):
                accept = rng.random(n_chains) < np.exp((value - accuracy) / (self.boltzmann * temperature))
            accept &= ~np.isneginf(value)
            chosen = proposals.reshape(tries, n_chains, -1)[best, chains]
            genes = np.where(accept[:, None], chosen, genes)
            accuracy = np.where(accept, value, accuracy)


_FIRST_CHAINS = 4
"""Chains, and tries of a move, of the first run."""

_PRICE_RANGE = 100.0
"""Highest price of the limits by the lowest one tried, around the price at which what parameters bring and use break
even."""

_PRICE_STEPS = 5
"""Bisections of the price."""

_EVEN_SHARE = 0.1
"""Chance that a guided draw is even: main effects are no certainty."""


def guided_weights(space: GeneSpace, recorder: Recorder, temperature: float) -> FloatArray | None:
    """The first set of weights, from the predictors and the limits.

    The price of the limits is bisected, for every image size: of the networks that take the value of most worth
    everywhere, the best is near the price at which they just meet the limits. These evaluations are counted.

    Args:
        space: The genes.
        recorder: Counts evaluations.
        temperature: Points of worth that make a value e times as probable.

    Returns:
        Cumulative probabilities of the values, shape (n_sizes, n_genes, n_values), or None (even weights)
        when the budget is too small for the estimate. The image size's own row is not used.
    """
    n_sizes = len(space.objective.sizes)
    if _PRICE_STEPS * n_sizes > recorder.left // 2:
        return None
    problem = space.problem
    allowed = np.arange(space.choices.max()) < space.choices[:, None]
    effects = [main_effects(space, i) for i in range(n_sizes)]
    gains, uses = np.stack([e[0] for e in effects]), np.stack([e[1] for e in effects])
    spans = [np.ptp(e, axis=2).sum(axis=1) for e in (gains, uses)]
    middle = spans[0] / np.where(spans[1] > 0, spans[1], np.inf)
    low, high = middle / np.sqrt(_PRICE_RANGE), middle * np.sqrt(_PRICE_RANGE)
    for _ in range(_PRICE_STEPS):
        price = np.sqrt(low * high)
        worth = np.where(allowed, gains - price[:, None, None] * uses, -np.inf)
        greedy = worth.argmax(axis=2).astype(np.int16)
        greedy[:, -1] = np.arange(n_sizes)
        found = recorder.ask(greedy)
        # Accuracy is wanted as long as the limits are met, a small quantity as long as the accuracy is.
        if problem.goal != "accuracy" and problem.min_accuracy is not None:
            cheaper = np.asarray(found.accuracy >= problem.min_accuracy)
        else:
            cheaper = np.asarray((found.amounts > problem.room).any(axis=1))
        low, high = np.where(cheaper, price, low), np.where(cheaper, high, price)
    price = (high if problem.goal == "accuracy" else low)[:, None, None]
    worth = np.where(allowed, gains - price * uses, -np.inf)
    if problem.goal != "accuracy":
        # A share of the quantity in the points of its score.
        worth *= POINTS_OF_LOG / np.maximum(price, 1e-300)
    guided = np.exp((worth - worth.max(axis=2, keepdims=True)) / temperature)
    guided /= guided.sum(axis=2, keepdims=True)
    even = allowed / space.choices[:, None]
    return np.cumsum((1 - _EVEN_SHARE) * guided + _EVEN_SHARE * even, axis=2)


def main_effects(space: GeneSpace, size: int) -> tuple[FloatArray, FloatArray]:
    """What every value of every parameter brings and uses at an image size, as the coefficients tell.

    An effect of a depth is the mean over all choices of blocks of a stage of that depth, an effect of an expansion
    or a kernel that over all choices of the other parameters of a stage of the largest depth.

    Args:
        space: The genes.
        size: Position of the image size.

    Returns:
        In points of accuracy (linearised), and in shares of the limits on sums (with the quantity that is to be least,
        as a share of its mean), each of shape (n_genes, n_values), less the mean over a parameter's values, 0 beyond
        them. Upper bounds count by their tangent at the mean network.
    """
    problem, objective = space.problem, space.objective
    tables = objective.sizes[size]
    gains = [table * _slope(tables) for table in tables.accuracy_stages]
    shares = {limit.quantity: limit.value for limit in problem.limits}
    uses = [np.zeros_like(table) for table in gains]
    for quantity in {*shares, problem.goal} - {"accuracy"}:
        if quantity in tables.bounds:
            bound = tables.bounds[quantity]
            mean = bound.x_base.copy()
            for columns, values in bound.x_stages:
                mean[columns] += values.mean(axis=0)
            base, stages = bound.tables(bound.tangent(mean))
        elif tables.counted[quantity].maximum:
            continue
        else:
            base, stages = tables.counted[quantity].base, list(tables.counted[quantity].stages)
        whole = shares.get(quantity, base + sum(float(stage.mean()) for stage in stages))
        for use, stage in zip(uses, stages, strict=True):
            use += stage / whole
    return _of_genes(space, gains), _of_genes(space, uses)


def _slope(tables: SizeObjective) -> float:
    """Points of accuracy by a unit of its linear scale, at the mean network."""
    ceiling = tables.accuracy.ceiling
    mean = tables.accuracy_base + sum(float(table.mean()) for table in tables.accuracy_stages)
    return 1.0 if ceiling is None else ceiling - float(tables.accuracy.from_linear(np.array([mean]))[0])


def _of_genes(space: GeneSpace, stages: Sequence[FloatArray]) -> FloatArray:
    """Main effects of all genes on a sum of tables over stage options, shape (n_genes, n_values)."""
    searched, longest = space.objective.space, space.max_depth
    # One axis a block, first block first; entry 0 is no block.
    rows = space.objective.options.rows.reshape((len(searched.kinds) + 1,) * longest).T
    effects = np.zeros((space.n_genes, space.choices.max()))
    genes = iter(effects)
    for table in stages:
        depths = [table[rows[(slice(1, None),) * d + (0,) * (longest - d)]].mean() for d in searched.depths]
        next(genes)[: len(depths)] = np.array(depths) - np.mean(depths)
        blocks = table[rows[(slice(1, None),) * longest]].reshape(
            (len(searched.expansions), len(searched.kernels)) * longest
        )
        for axis in range(2 * longest):
            means = blocks.mean(axis=tuple(other for other in range(2 * longest) if other != axis))
            next(genes)[: len(means)] = means - means.mean()
    return effects


def _draw(weights: FloatArray, sizes: Genes, genes: NDArray[np.integer], rng: np.random.Generator) -> Genes:
    """Values of parameters drawn by the weights of individuals' image sizes; the shapes broadcast."""
    cumulative = weights[sizes, genes]
    # Scaled by the last entry, which rounding may leave below 1.
    drawn = rng.random(cumulative.shape[:-1]) * cumulative[..., -1]
    values: Genes = (cumulative <= drawn[..., None]).sum(axis=-1).astype(np.int16)
    return values


def _move(
    space: GeneSpace,
    genes: Genes,
    tries: int,
    temperature: int,
    weights: FloatArray | None,
    rng: np.random.Generator,
) -> Genes:
    """Change 1 to `temperature` parameters of every individual, drawn among active ones, several times.

    With weights the new value is drawn by them (and may be the present one), without it is another, even.
    The image size always changes evenly.

    Returns:
        The first tries of all individuals, then the second ones, shape (tries * n, n_genes).
    """
    n, n_genes = genes.shape
    movable = space.active(genes) & (space.choices > 1)
    # Each individual's movable parameters first, in their order.
    ordered = np.argsort(~movable, axis=1, kind="stable")
    of = np.arange(0, n * n_genes, n_genes)[:, None]
    drawn = (rng.random((tries, n, temperature)) * movable.sum(axis=1)[:, None]).astype(np.int64)
    columns = ordered.take(of + drawn)
    # A parameter drawn twice is changed once: the move is then one parameter smaller.
    n_changes = rng.integers(1, temperature + 1, size=(tries, n, 1))
    columns = np.where(np.arange(temperature) < n_changes, columns, columns[:, :, :1])
    values = _other(genes.take(of + columns), space.choices.take(columns), rng)
    if weights is not None:
        values = np.where(columns < n_genes - 1, _draw(weights, genes[:, -1:], columns, rng), values)
    moved = np.tile(genes, (tries, 1))
    moved.put(np.arange(0, tries * n * n_genes, n_genes).reshape(tries, n, 1) + columns, values)
    return moved


def _other(values: Genes, choices: Genes, rng: np.random.Generator) -> Genes:
    """Another candidate than the present one, uniform."""
    shift = 1 + (rng.random(values.shape) * (choices - 1)).astype(np.int16)
    changed: Genes = ((values + shift) % choices).astype(np.int16)
    return changed
