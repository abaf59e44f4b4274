"""What every formula must be: columns of an architecture that add up over stages."""

from __future__ import annotations

import itertools

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors import Formula, LinearPredictor, PredictorSet, get_formula
from foxnas_mlflow.core.searchers import exact_front
from foxnas_mlflow.core.space import SearchSpace, StageSpec

SMALL = SearchSpace(
    name="small",
    image_sizes=(32, 64),
    kernels=(3, 5),
    expansions=(2, 4),
    depths=(1, 2),
    stages=(StageSpec(16, 2, "mbconv"), StageSpec(24, 2, "mbconv_se")),
)
"""A space small enough to look at every network: 400 a size."""

_Stages = list[list[tuple[int, int]]]


class FormulaSuite:
    """Tests of a `Formula`; a subclass says which."""

    space = SMALL

    def formula(self) -> Formula:
        """The formula.

        Raises:
            NotImplementedError: If the subclass does not say which.
        """
        raise NotImplementedError

    def design(self, architectures: list[Architecture]) -> NDArray[np.float64]:
        """Its design matrix."""
        return self.formula().design(self.space, architectures)

    def test_names_its_columns(self) -> None:
        """Names are unique, and the constant is the last."""
        columns = self.formula().columns(self.space)
        assert len(set(columns)) == len(columns)
        assert columns[-1] == "const"

    def test_describes_every_network_with_finite_numbers(self) -> None:
        """One row a network, one number a column, the constant 1."""
        architectures = self._every(self.space.image_sizes[0])
        design = self.design(architectures)
        assert design.shape == (len(architectures), len(self.formula().columns(self.space)))
        assert np.isfinite(design).all()
        np.testing.assert_array_equal(design[:, -1], 1.0)

    def test_is_a_sum_over_stages(self) -> None:
        """What an edit of one stage changes does not depend on the others: the exact search stands on that."""
        rng = np.random.default_rng(0)
        options = self._stage_options()
        for size in self.space.image_sizes:
            for _ in range(20):
                first, other = (
                    [options[i] for i in rng.integers(len(options), size=self.space.n_stages)] for _ in range(2)
                )
                changed = int(rng.integers(self.space.n_stages))
                differences = []
                for stages in (first, other):
                    before, after = list(stages), list(stages)
                    before[changed], after[changed] = options[0], options[-1]
                    rows = self.design([self.space.architecture(size, s) for s in (before, after)])
                    differences.append(rows[1] - rows[0])
                np.testing.assert_allclose(differences[0], differences[1], rtol=1e-9, atol=1e-9)

    def test_does_not_depend_on_its_neighbours_in_the_batch(self) -> None:
        """A network's row is the same alone and among others."""
        architectures = self._every(self.space.image_sizes[-1])[::37]
        together = self.design(architectures)
        alone = np.vstack([self.design([architecture]) for architecture in architectures])
        np.testing.assert_allclose(together, alone, rtol=1e-12)

    def test_the_exact_front_on_it_is_that_of_brute_force(self) -> None:
        """Predictors made of it are searched exactly."""
        size = self.space.image_sizes[0]
        architectures = self._every(size)
        predictors = self._predictors(size)
        latency = predictors.latency[0].predict(architectures)
        accuracy = predictors.accuracy[0].predict(architectures)
        front = exact_front(predictors)
        for ms, percent in zip(front.latency_ms, front.accuracy, strict=True):
            np.testing.assert_allclose(accuracy[latency <= ms + 1e-9].max(), percent, rtol=1e-9)
        for i in range(len(front)):
            architecture = front.architecture(i)
            np.testing.assert_allclose(predictors.latency[0].predict([architecture])[0], front.latency_ms[i])
            np.testing.assert_allclose(predictors.accuracy[0].predict([architecture])[0], front.accuracy[i])

    def _stage_options(self) -> _Stages:
        kinds = [(block.expansion, block.kernel) for block in self.space.kinds]
        return [list(s) for depth in self.space.depths for s in itertools.product(kinds, repeat=depth)]

    def _every(self, size: int) -> list[Architecture]:
        choices = itertools.product(self._stage_options(), repeat=self.space.n_stages)
        return [self.space.architecture(size, list(choice)) for choice in choices]

    def _predictors(self, size: int) -> PredictorSet:
        """Random coefficients on this formula, and on a packaged one for the other quantity."""
        formula = self.formula()
        other = "latency_ms" if formula.quantity == "accuracy" else "accuracy"
        made = {f.quantity: self._random(f, size) for f in (formula, get_formula("calibrated", other))}
        return PredictorSet("conformance", self.space, (made["accuracy"],), (made["latency_ms"],))

    def _random(self, formula: Formula, size: int) -> LinearPredictor:
        rng = np.random.default_rng(1)
        columns = formula.columns(self.space)
        scale = np.abs(formula.design(self.space, self._every(size)[::11])).max(axis=0)
        beta = rng.uniform(0.1, 1.0, len(columns)) / np.maximum(scale, 1e-12)
        ceiling = 90.0 if formula.link == "ceiling" else None
        beta[-1] = -2.5 if ceiling else 40.0
        return LinearPredictor(
            formula.name,
            formula.quantity,
            self.space,
            (size,),
            (size,),
            columns,
            beta,
            np.zeros((len(columns), len(columns))),
            0.0,
            dof=20,
            ceiling=ceiling,
        )
