"""Simulated annealing, the paper's Algorithm 1, over many chains at once.

| symbol (Algorithm 1) | name in code      | meaning                                                  |
|----------------------|-------------------|----------------------------------------------------------|
| T                    | ``temperature``   | most parameters that a move changes, rounded up          |
| k                    | ``boltzmann``     | accuracy points that one unit of temperature forgives    |
| C                    | ``step``          | counter of moves                                         |
| weight               | ``weights``       | probability of choosing each parameter for a change      |

Deviations. The printed rule accepts a worse network when r > exp(-delta / kT), which is false for
every delta < 0; the Metropolis rule it means, r < exp(delta / kT), is used. The sampler's endless
``while lat >= L`` becomes a fixed number of tries a move, each counted as an evaluation; the best try
that meets the constraint is the proposal, and a move without one leaves the chain where it is. T
falls continuously instead of by one every n moves, and is the most parameters that a try changes:
each try draws 1 to T. At regular moments the weakest quarter of the chains goes on from the networks
of the strongest quarter ("go with the winners"): a chain stuck in a bad valley is not worth its share
of the budget. Until half time chains compete within their image size only. A new best network counts
even when its chain leaves it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foxnas_mlflow.core.searchers._base import Genes, GeneSpace, Recorder, Searcher
from foxnas_mlflow.core.searchers._objective import FloatArray


@dataclass(frozen=True)
class SimulatedAnnealing(Searcher):
    """Algorithm 1.

    Attributes:
        guided: Whether the first set of weights comes from the predictors; False keeps the
            weights even throughout, for comparison (figure 8).
        n_chains: Chains run side by side.
        tries: Tries of a move, of which the best that meets the constraint is proposed.
        max_temperature: First temperature; it falls to 0 with the square of what is left.
        min_changes: Most parameters changed by a try once T is below: three are needed to pay for
            one more block with two savings.
        boltzmann: Accuracy points forgiven per unit of temperature.
        rounds: Rounds of the search, between which the weakest quarter of the chains moves to the
            strongest quarter's networks.
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
        genes, accuracy = recorder.feasible_start(rng, n_chains)
        even = np.zeros(space.n_genes)
        even[space.variable] = 1.0
        guided = guided_weights(space, recorder, rng) if self.guided else even
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
            weights = guided if temperature > self.max_temperature - 2 else even
            n_changes = max(int(np.ceil(temperature)), self.min_changes)
            proposals = _move(space, np.tile(genes, (tries, 1)), n_changes, weights, rng)
            values, _ = recorder.evaluate(proposals)
            values = values.reshape(tries, n_chains)
            best = np.argmax(values, axis=0)
            value = values[best, chains]
            with np.errstate(over="ignore"):
                accept = rng.random(n_chains) < np.exp((value - accuracy) / (self.boltzmann * temperature))
            accept &= ~np.isneginf(value)
            chosen = proposals.reshape(tries, n_chains, -1)[best, chains]
            genes = np.where(accept[:, None], chosen, genes)
            accuracy = np.where(accept, value, accuracy)


def guided_weights(space: GeneSpace, recorder: Recorder, rng: np.random.Generator, n: int = 16) -> FloatArray:
    """The first set of weights: accuracy that each parameter moves for each ms that it moves.

    Each parameter of n random networks takes another value; its weight is the mean absolute change
    of the predicted accuracy over that of the latency bound. The (n_genes + 1) * n evaluations
    are counted against the budget.

    Returns:
        Weights (n_genes,), zero for parameters that cannot vary; even ones when the budget is too
        small for the estimate.
    """
    weights = np.zeros(space.n_genes)
    weights[space.variable] = 1.0
    if n * (len(space.variable) + 1) > recorder.left // 4:
        return weights
    base = space.sample(rng, n)
    changed = np.repeat(base[None], len(space.variable), axis=0)
    for row, gene in enumerate(space.variable):
        changed[row, :, gene] = _other(changed[row, :, gene], int(space.choices[gene]), rng)
    accuracy, upper = space.evaluate(np.concatenate([base, changed.reshape(-1, space.n_genes)]))
    recorder.evaluations += len(accuracy)
    moved = [np.mean(np.abs(y[n:].reshape(-1, n) - y[:n]), axis=1) for y in (accuracy, upper)]
    effect = moved[0] / np.maximum(moved[1], 1e-9)
    # A parameter without effect keeps a small chance: it may free latency for others.
    weights[space.variable] = effect / max(effect.max(), 1e-300) + 0.05
    return weights


def _move(space: GeneSpace, genes: Genes, temperature: int, weights: FloatArray, rng: np.random.Generator) -> Genes:
    """Change 1 to `temperature` parameters of every individual, drawn by weight among active ones."""
    n = len(genes)
    cumulative = np.cumsum(weights * space.active(genes), axis=1)
    drawn = rng.random((n, temperature, 1)) * cumulative[:, None, -1:]
    columns = (cumulative[:, None, :] <= drawn).sum(axis=2)
    # A parameter drawn twice is changed once: the move is then one parameter smaller.
    columns = np.where(np.arange(temperature) < rng.integers(1, temperature + 1, size=(n, 1)), columns, columns[:, :1])
    rows = np.arange(n)[:, None]
    moved = genes.copy()
    moved[rows, columns] = _other(genes[rows, columns], space.choices[columns], rng)
    return moved


def _other(values: Genes, choices: Genes | int, rng: np.random.Generator) -> Genes:
    """Another candidate than the present one, uniform."""
    shift = 1 + (rng.random(values.shape) * (np.asarray(choices) - 1)).astype(np.int16)
    changed: Genes = ((values + shift) % choices).astype(np.int16)
    return changed
