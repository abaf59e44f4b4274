"""Evolution as once-for-all searches (Cai et al., 2019, section 3.4 and its released defaults).

Each generation keeps the best quarter as parents and makes a new population, half by mutating a
parent (every parameter redrawn with probability 0.1), half by crossing two (every parameter from
either). Deviation: children that miss the constraint are redrawn a bounded number of times, each
counted, where the original loops without end.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from foxnas_mlflow.core.searchers._base import Genes, GeneSpace, Recorder, Searcher


@dataclass(frozen=True)
class Evolution(Searcher):
    """Regularity-free genetic search with once-for-all's defaults.

    Attributes:
        population: Individuals a generation.
        parent_ratio: Fraction kept as parents.
        mutation_ratio: Fraction of children made by mutation.
        mutation_probability: Chance of each parameter to be redrawn.

    Examples:
        >>> from foxnas_mlflow import Evolution, reference_predictors, search
        >>> search(reference_predictors("rpi4"), 60, algorithm=Evolution(), evaluations=5_000).latency_upper_ms <= 60
        True
    """

    population: int = 100
    parent_ratio: float = 0.25
    mutation_ratio: float = 0.5
    mutation_probability: float = 0.1

    @property
    def name(self) -> str:  # type: ignore[override]
        """``evolution``."""
        return "evolution"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        size = min(self.population, recorder.budget)
        genes, accuracy = recorder.feasible_start(rng, space.sample(rng, size))
        n_parents = max(2, round(size * self.parent_ratio))
        n_mutants = round(size * self.mutation_ratio)
        while recorder.left > 0:
            best = np.argsort(-accuracy, kind="stable")[:n_parents]
            parents, parents_accuracy = genes[best], accuracy[best]
            children = np.empty((0, space.n_genes), dtype=np.int16)
            values = np.empty(0)
            for count, breed in ((n_mutants, self._mutate), (size - n_mutants, _cross)):
                made = 0
                for _ in range(32):
                    if made >= count or recorder.left < 1:
                        break
                    batch = breed(space, parents, min(count - made, recorder.left), rng)
                    value = recorder.evaluate(batch)
                    meets = ~np.isneginf(value)
                    children, values = np.vstack([children, batch[meets]]), np.append(values, value[meets])
                    made += int(meets.sum())
            genes, accuracy = np.vstack([parents, children]), np.append(parents_accuracy, values)

    def _mutate(self, space: GeneSpace, parents: Genes, n: int, rng: np.random.Generator) -> Genes:
        children = parents[rng.integers(len(parents), size=n)]
        redraw = rng.random(children.shape) < self.mutation_probability
        return np.where(redraw, space.sample(rng, n), children)


def _cross(space: GeneSpace, parents: Genes, n: int, rng: np.random.Generator) -> Genes:
    first, second = (parents[rng.integers(len(parents), size=n)] for _ in range(2))
    return np.where(rng.random(first.shape) < 0.5, first, second)
