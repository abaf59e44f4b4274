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
each try draws 1 to T. At regular moments the weakest quarter of the chains goes on from the networks
of the strongest quarter ("go with the winners"): a chain stuck in a bad valley is not worth its share
of the budget. Until half time chains compete within their image size only. A new best network counts
even when its chain leaves it again.

The first set of weights is derived from the predictors (the paper does not say how it chose its own). The
main effects of every value of every parameter on accuracy and on the latency bound are estimated from a few
random networks; the constraint turns into a price, and a value is worth the accuracy that it brings less
the milliseconds that it costs at that price. Chains start from values drawn by exp(worth), and so do the
moves of the early stage.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.searchers._base import Genes, GeneSpace, Recorder, Searcher
from foxnas_mlflow.core.searchers._objective import FloatArray


@dataclass(frozen=True)
class SimulatedAnnealing(Searcher):
    """Algorithm 1.

    Attributes:
        guided: Whether starts and the first set of weights come from the predictors; False keeps
            both even throughout, for comparison (figure 8).
        n_chains: Chains run side by side.
        tries: Tries of a move, of which the best that meets the constraint is proposed.
        max_temperature: First temperature; it falls to 0 with the square of what is left.
        min_changes: Most parameters changed by a try once T is below: three are needed to pay for
            one more block with two savings.
        boltzmann: Accuracy points forgiven per unit of temperature.
        rounds: Rounds of the search, between which the weakest quarter of the chains moves to the
            strongest quarter's networks.

    Examples:
        >>> from foxnas_mlflow import SimulatedAnnealing, reference_predictors, search
        >>> outcome = search(reference_predictors("rpi4"), 60, algorithm=SimulatedAnnealing(), evaluations=5_000)
        >>> outcome.latency_upper_ms <= 60
        True
    """

    guided: bool = True
    n_chains: int = 32
    tries: int = 16
    max_temperature: float = 5.0
    min_changes: int = 3
    boltzmann: float = 0.015
    rounds: int = 32

    @property
    def name(self) -> str:  # type: ignore[override]
        """``annealing``, or ``annealing-unguided``."""
        return "annealing" if self.guided else "annealing-unguided"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        n_chains = max(1, min(self.n_chains, recorder.budget // 8))
        recorder.n_chains = n_chains
        weights = guided_weights(space, recorder, rng, self.boltzmann) if self.guided else None
        genes = space.sample(rng, n_chains)
        if weights is not None:
            genes[:, :-1] = _draw(weights, genes[:, -1:], np.arange(space.n_genes - 1), rng)
        genes, accuracy = recorder.feasible_start(rng, genes)
        tries = min(self.tries, recorder.left // n_chains)
        n_steps = recorder.left // (n_chains * tries) if tries else 0
        chains = np.arange(n_chains)
        round_steps = max(1, n_steps // self.rounds)
        for step in range(n_steps):
            genes = space.settle(genes)
            if step % round_steps == 0:
                # A larger image pays off late: until half time chains compete within their size only.
                sizes = genes[:, -1] if step < n_steps // 2 else np.zeros(n_chains)
                for size in np.unique(sizes):
                    order = np.flatnonzero(sizes == size)[np.argsort(-accuracy[sizes == size], kind="stable")]
                    quarter = len(order) // 4
                    weak, strong = order[len(order) - quarter :], order[:quarter]
                    genes[weak], accuracy[weak] = genes[strong], accuracy[strong]
            temperature = self.max_temperature * (1 - step / n_steps) ** 2
            # The paper changes to the even weights at C == 2n, after two decreases of T.
            if temperature <= self.max_temperature - 2:
                weights = None
            n_changes = max(int(np.ceil(temperature)), self.min_changes)
            proposals = _move(space, np.tile(genes, (tries, 1)), n_changes, weights, rng)
            values = recorder.evaluate(proposals).reshape(tries, n_chains)
            best = np.argmax(values, axis=0)
            value = values[best, chains]
            with np.errstate(over="ignore"):
                accept = rng.random(n_chains) < np.exp((value - accuracy) / (self.boltzmann * temperature))
            accept &= ~np.isneginf(value)
            chosen = proposals.reshape(tries, n_chains, -1)[best, chains]
            genes = np.where(accept[:, None], chosen, genes)
            accuracy = np.where(accept, value, accuracy)


_PRICES = np.geomspace(3, 1e-3, 48)
"""Candidate prices in accuracy points a millisecond."""

_EVEN_SHARE = 0.3
"""Chance that a guided draw is even: main effects are estimates."""


def guided_weights(
    space: GeneSpace, recorder: Recorder, rng: np.random.Generator, boltzmann: float, n: int = 4
) -> FloatArray | None:
    """The first set of weights, from the predictors and the constraint.

    For every image size, each value of each parameter replaces that of n random networks; the means
    are its main effects. Of the networks that take the value of most worth everywhere, at prices from high
    to low, the last one that meets the constraint sets the price. All evaluations are counted.

    Returns:
        Cumulative probabilities of the values, shape (n_sizes, n_genes, n_values), or None (even weights)
        when the budget is too small for the estimate. The image size's own row is not used.
    """
    n_sizes = len(space.objective.sizes)
    allowed = np.arange(space.choices.max()) < space.choices[:, None]
    gene, value = np.nonzero(allowed[:-1])
    if n_sizes * (n * len(gene) + len(_PRICES)) > recorder.left // 4:
        return None
    weights = np.empty((n_sizes, *allowed.shape))
    for size in range(n_sizes):
        changed = np.repeat(space.sample(rng, n)[None], len(gene), axis=0)
        changed[:, :, -1] = size
        changed[np.arange(len(gene)), :, gene] = value[:, None]
        effects = np.zeros((2, *allowed.shape))
        found = space.evaluate(changed.reshape(-1, space.n_genes))
        for effect, y in zip(effects, (found.score, found.amounts[:, 0]), strict=True):
            effect[gene, value] = y.reshape(-1, n).mean(axis=1)
        recorder.evaluations += n * len(gene)
        worth = np.where(allowed, effects[0] - _PRICES[:, None, None] * effects[1], -np.inf)
        greedy = worth.argmax(axis=2).astype(np.int16)
        greedy[:, -1] = size
        met = np.flatnonzero(~np.isneginf(recorder.evaluate(greedy)))
        chosen = worth[met[-1] if len(met) else 0]
        guided = np.exp((chosen - chosen.max(axis=1, keepdims=True)) / (2 * boltzmann))
        guided /= guided.sum(axis=1, keepdims=True)
        share = (1 - _EVEN_SHARE) * guided + _EVEN_SHARE * allowed / space.choices[:, None]
        weights[size] = np.cumsum(share, axis=1)
    return weights


def _draw(weights: FloatArray, sizes: Genes, genes: NDArray[np.integer], rng: np.random.Generator) -> Genes:
    """Values of parameters drawn by the weights of individuals' image sizes; the shapes broadcast."""
    cumulative = weights[sizes, genes]
    # Scaled by the last entry, which rounding may leave below 1.
    drawn = rng.random(cumulative.shape[:-1]) * cumulative[..., -1]
    values: Genes = (cumulative <= drawn[..., None]).sum(axis=-1).astype(np.int16)
    return values


def _move(
    space: GeneSpace, genes: Genes, temperature: int, weights: FloatArray | None, rng: np.random.Generator
) -> Genes:
    """Change 1 to `temperature` parameters of every individual, drawn among active ones.

    With weights the new value is drawn by them (and may be the present one), without it is another, even.
    The image size always changes evenly.
    """
    n = len(genes)
    cumulative = np.cumsum(space.active(genes) & (space.choices > 1), axis=1)
    drawn = rng.random((n, temperature, 1)) * cumulative[:, None, -1:]
    columns = (cumulative[:, None, :] <= drawn).sum(axis=2)
    # A parameter drawn twice is changed once: the move is then one parameter smaller.
    columns = np.where(np.arange(temperature) < rng.integers(1, temperature + 1, size=(n, 1)), columns, columns[:, :1])
    rows = np.arange(n)[:, None]
    values = _other(genes[rows, columns], space.choices[columns], rng)
    if weights is not None:
        values = np.where(columns < space.n_genes - 1, _draw(weights, genes[:, -1:], columns, rng), values)
    moved = genes.copy()
    moved[rows, columns] = values
    return moved


def _other(values: Genes, choices: Genes, rng: np.random.Generator) -> Genes:
    """Another candidate than the present one, uniform."""
    shift = 1 + (rng.random(values.shape) * (choices - 1)).astype(np.int16)
    changed: Genes = ((values + shift) % choices).astype(np.int16)
    return changed
