"""What every searcher evaluates: accuracy, and the latency bound that the constraint is on.

| symbol | name in code   | shape | meaning                                                       |
|--------|----------------|-------|---------------------------------------------------------------|
| x(a)   | rows of a table | (p,) | design row of the latency predictor; its last entry is 1      |
| beta   | ``beta``       | (p,)  | its coefficients                                              |
| C'     | ``spread``     | (p, p)| covariance with the residual variance folded in               |
| t      | ``t``          | scalar| one-sided quantile of Student's t at the confidence           |
| U(a)   | ``upper``      | scalar| beta'x + t * sqrt(x'C'x), the upper prediction bound in ms    |

Folding: a constant residual variance k^2 is ``k^2 e e'`` with e the constant's unit vector, a
relative one ``k^2 beta beta'``. Either way U is a linear form plus t times a norm of x, so it is
convex and homogeneous in x: its tangent at any x0 underestimates it everywhere. The exact search
stands on that.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.options import IndexArray, KindArray, decode, stage_options
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet

FloatArray = NDArray[np.float64]


class SizeObjective:
    """The objective at one image size, as tables over the stage options.

    Attributes:
        image_size: Image size in pixels.
        accuracy_base, accuracy_stages: The accuracy's linear scale is the base plus one entry of
            each stage's table, shape (m,).
        latency: The latency predictor.
    """

    def __init__(self, predictors: PredictorSet, image_size: int, confidence: float) -> None:
        space = predictors.space
        kinds = stage_options(space).kinds
        self.image_size = image_size
        self.accuracy = predictors.of("accuracy", image_size)
        self.latency = predictors.of("latency_ms", image_size)
        self.accuracy_base, self.accuracy_stages = _contributions(self.accuracy, kinds, image_size)
        recipe = self.latency.recipe
        self.x_base = recipe.constant(space, image_size)
        self.x_stages = [recipe.stage(space, j, kinds, image_size) for j in range(space.n_stages)]
        self.beta = self.latency.coefficients
        self.t = self.latency.t_quantile(confidence)
        self.spread = _spread(self.latency, image_size) if self.t > 0 else None
        self._base_sums, self._stage_sums = self._tables()

    def _tables(self) -> tuple[FloatArray, list[FloatArray]]:
        """What `evaluate` sums over stages: the accuracy's linear scale, beta'x, and R'x with RR' = C'."""
        root = np.zeros((len(self.beta), 0)) if self.spread is None else _root(self.spread)
        weights = np.column_stack([self.beta, root])
        base = np.concatenate([[self.accuracy_base], self.x_base @ weights])
        stages = [
            np.column_stack([z, values @ weights[columns]])
            for z, (columns, values) in zip(self.accuracy_stages, self.x_stages, strict=True)
        ]
        return base, stages

    def latency_tables(self, weights: FloatArray) -> tuple[float, list[FloatArray]]:
        """Base and stage tables of any linear form of the latency's design row."""
        return float(self.x_base @ weights), [values @ weights[columns] for columns, values in self.x_stages]

    def design(self, index: IndexArray) -> FloatArray:
        """Latency design rows (n, p) of subnets given as option indices (n, n_stages)."""
        x = np.tile(self.x_base, (len(index), 1))
        for j, (columns, values) in enumerate(self.x_stages):
            x[:, columns] += values[index[:, j]]
        return x

    def tangent(self, x0: FloatArray) -> FloatArray:
        """Weights g (p,) with ``g'x <= U(x)`` for every x and equality at x0."""
        if self.spread is None:
            return self.beta
        return self.beta + self.t * (self.spread @ x0) / np.sqrt(x0 @ self.spread @ x0)

    def evaluate(self, index: IndexArray) -> tuple[FloatArray, FloatArray]:
        """Accuracy's linear scale and upper latency bound U in ms of option indices (n, n_stages), each (n,)."""
        sums = self._base_sums + self._stage_sums[0].take(index[:, 0], axis=0)
        for j in range(1, len(self._stage_sums)):
            sums += self._stage_sums[j].take(index[:, j], axis=0)
        upper = sums[:, 1]
        if self.spread is not None:
            upper = upper + self.t * np.sqrt(np.square(sums[:, 2:]).sum(axis=1))
        return sums[:, 0], upper


class Objective:
    """The objective over several image sizes.

    Args:
        predictors: Predictors of the target.
        confidence: Probability with which the constraint is to hold, in [0.5, 1).
        image_sizes: Image sizes to search (px); all that the predictors know when None.

    Raises:
        InvalidInputError: If the confidence is outside [0.5, 1).
        OutOfDomainError: If an image size has no predictors.
    """

    def __init__(
        self, predictors: PredictorSet, *, confidence: float = 0.95, image_sizes: Sequence[int] | None = None
    ) -> None:
        if not 0.5 <= confidence < 1:
            raise InvalidInputError(
                "confidence must be at least 0.5 (the point prediction) and below 1", received=confidence
            )
        for quantity, group in (("accuracy", predictors.accuracy), ("latency", predictors.latency)):
            if not group:
                raise OutOfDomainError(
                    f"a search needs predictors of accuracy and of latency; those of target {predictors.target!r} "
                    f"know nothing of {quantity}",
                    remedy="fit them from networks of your own supernet (foxnas supernet, foxnas sample, foxnas fit) "
                    "and give them with predictors=",
                )
        sizes = predictors.image_sizes if not image_sizes else tuple(sorted(set(image_sizes)))
        if not sizes:
            raise OutOfDomainError("predictors must know accuracy and latency at a common image size")
        self.predictors = predictors
        self.space = predictors.space
        self.confidence = confidence
        self.sizes = tuple(SizeObjective(predictors, size, confidence) for size in sizes)
        self.options = stage_options(self.space)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The image sizes searched, in pixels."""
        return tuple(size.image_size for size in self.sizes)

    def evaluate(self, size_index: IndexArray, kinds: KindArray) -> tuple[FloatArray, FloatArray]:
        """Evaluate a population.

        Args:
            size_index: Index into `sizes`, shape (n,).
            kinds: Blocks, shape (n, n_stages, max_depth), -1 where there is none.

        Returns:
            Accuracy in percent and upper latency bound in ms, each of shape (n,).
        """
        index = self.options.lookup(kinds)
        accuracy, upper = np.empty(len(index)), np.empty(len(index))
        for i, size in enumerate(self.sizes):
            rows = np.flatnonzero(size_index == i)
            if len(rows):
                z, upper[rows] = size.evaluate(index[rows])
                accuracy[rows] = size.accuracy.from_linear(z)
        return accuracy, upper

    def architecture(self, size_index: int, index: IndexArray) -> Architecture:
        """The architecture of one row of option indices, shape (n_stages,)."""
        return decode(self.space, self.sizes[size_index].image_size, self.options.kinds[index])


def _contributions(predictor: LinearPredictor, kinds: KindArray, image_size: int) -> tuple[float, list[FloatArray]]:
    recipe, beta = predictor.recipe, predictor.coefficients
    tables = []
    for j in range(predictor.space.n_stages):
        columns, values = recipe.stage(predictor.space, j, kinds, image_size)
        tables.append(values @ beta[columns])
    return float(recipe.constant(predictor.space, image_size) @ beta), tables


def _spread(predictor: LinearPredictor, image_size: int) -> FloatArray:
    if predictor.covariance is None:
        raise OutOfDomainError(
            "a predictor known by its coefficients alone has no intervals",
            received="confidence above 0.5",
            remedy="use confidence 0.5, or fit the predictor from measurements",
        )
    transfer = 0.0 if image_size in predictor.fitted_sizes else predictor.transfer_sigma
    variance = predictor.sigma**2 + transfer**2
    direction = predictor.coefficients if predictor.recipe.relative else np.eye(len(predictor.coefficients))[-1]
    spread: FloatArray = predictor.covariance + variance * np.outer(direction, direction)
    return spread


def _root(spread: FloatArray) -> FloatArray:
    """R with RR' = spread, as many columns as the spread has rank."""
    values, vectors = np.linalg.eigh(spread)
    kept = values > values[-1] * 1e-15
    root: FloatArray = vectors[:, kept] * np.sqrt(values[kept])
    return root
