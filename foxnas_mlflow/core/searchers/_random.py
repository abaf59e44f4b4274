"""Random search: the baseline that every searcher must beat."""

from __future__ import annotations

import numpy as np

from foxnas_mlflow.core.searchers._base import GeneSpace, Recorder, Searcher


class RandomSearch(Searcher):
    """Draws networks uniformly and keeps the best that meets the constraint.

    Examples:
        >>> from foxnas_mlflow import RandomSearch, reference_predictors, search
        >>> search(reference_predictors("rpi4"), 60, algorithm=RandomSearch(), evaluations=5_000).latency_upper_ms <= 60
        True
    """

    name = "random"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        recorder.feasible_start(rng, space.sample(rng, min(32, recorder.budget)))
        while recorder.left > 0:
            recorder.evaluate(space.sample(rng, min(1024, recorder.left)))
