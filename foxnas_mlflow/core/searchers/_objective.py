"""What every searcher evaluates: accuracy, and the quantities that limits are on.

| symbol | name in code   | shape | meaning                                                       |
|--------|----------------|-------|---------------------------------------------------------------|
| x(a)   | rows of a table | (p,) | design row of a quantity's predictor; its last entry is 1     |
| beta   | ``beta``       | (p,)  | its coefficients                                              |
| C'     | ``spread``     | (p, p)| covariance with the residual variance folded in               |
| t      | ``t``          | scalar| one-sided quantile of Student's t at the confidence           |
| U(a)   | ``upper``      | scalar| beta'x + t * sqrt(x'C'x), the upper prediction bound          |

Folding: a constant residual variance k^2 is ``k^2 e e'`` with e the constant's unit vector, a
relative one ``k^2 beta beta'``. Either way U is a linear form plus t times a norm of x, so it is
convex and homogeneous in x: its tangent at any x0 underestimates it everywhere. The exact search
stands on that.

Several predicted quantities under limits hold jointly with the asked confidence: each of the k bounds is
taken at 1 - (1 - confidence) / k (Bonferroni), which needs nothing of how their errors depend on each other.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.options import IndexArray, KindArray, decode, encode, stage_options
from foxnas_mlflow.core.predictors import LinearPredictor, PredictorSet
from foxnas_mlflow.core.searchers._quantities import check_quantity, counted, predicted_quantities

FloatArray = NDArray[np.float64]


class Bound:
    """The upper prediction bound of one quantity at one image size.

    Attributes:
        beta: The predictor's coefficients.
        x_base, x_stages: Its design row is the base plus, in some columns, one row of each stage's table.
        spread: C', or None where the bound is the prediction.
        root: R with RR' = C'.
    """

    def __init__(self, predictor: LinearPredictor, kinds: KindArray, image_size: int, confidence: float) -> None:
        recipe, space = predictor.recipe, predictor.space
        if predictor.ceiling is not None:
            raise OutOfDomainError("a limit is on a quantity that is predicted as a sum", received=predictor.quantity)
        self.x_base = recipe.constant(space, image_size)
        self.x_stages = [recipe.stage(space, j, kinds, image_size) for j in range(space.n_stages)]
        self.beta = predictor.coefficients
        predictor.check_stated(confidence)
        self.t = predictor.t_quantile(confidence)
        self.spread = predictor.spread(image_size) if self.t > 0 else None
        self.root = np.zeros((len(self.beta), 0)) if self.spread is None else _root(self.spread)

    def tables(self, weights: FloatArray) -> tuple[float, list[FloatArray]]:
        """Base and stage tables of any linear form of the design row."""
        return float(self.x_base @ weights), [values @ weights[columns] for columns, values in self.x_stages]

    def design(self, index: IndexArray) -> FloatArray:
        """Design rows (n, p) of subnets given as option indices (n, n_stages)."""
        x = np.tile(self.x_base, (len(index), 1))
        for j, (columns, values) in enumerate(self.x_stages):
            x[:, columns] += values[index[:, j]]
        return x

    def tangent(self, x0: FloatArray) -> FloatArray:
        """Weights g (p,) with ``g'x <= U(x)`` for every x and equality at x0."""
        if self.spread is None:
            return self.beta
        return self.beta + self.t * (self.spread @ x0) / np.sqrt(x0 @ self.spread @ x0)


class SizeObjective:
    """The objective at one image size, as tables over the stage options.

    Attributes:
        image_size: Image size in pixels.
        accuracy_base, accuracy_stages: The accuracy's linear scale is the base plus one entry of
            each stage's table, shape (m,).
        bounds: Bounds of the predicted quantities by name.
        counted: Counted quantities by name.
        latency: The bound of latency.
    """

    def __init__(self, predictors: PredictorSet, image_size: int, quantities: Sequence[str], confidence: float) -> None:
        space = predictors.space
        kinds = stage_options(space).kinds
        self.image_size = image_size
        self.accuracy = predictors.of("accuracy", image_size)
        self.accuracy_base, self.accuracy_stages = _contributions(self.accuracy, kinds, image_size)
        known = predicted_quantities(predictors)
        self.quantities = tuple(quantities)
        self.bounds = {
            q: Bound(predictors.of(q, image_size), kinds, image_size, confidence) for q in quantities if q in known
        }
        self.counted = {q: counted(space, image_size, q) for q in quantities if q not in known}
        self.latency = self.bounds["latency_ms"]
        self._columns: dict[str, slice] = {}
        self._base_sums, self._stage_sums = self._tables()

    def _tables(self) -> tuple[FloatArray, list[FloatArray]]:
        """What `sums` adds up: the accuracy's linear scale, beta'x and R'x of each bound, and counted sums."""
        base, stages, width = [np.array([self.accuracy_base])], [[z] for z in self.accuracy_stages], 1
        for quantity, bound in self.bounds.items():
            weights = np.column_stack([bound.beta, bound.root])
            base.append(bound.x_base @ weights)
            for parts, (columns, values) in zip(stages, bound.x_stages, strict=True):
                parts.append(values @ weights[columns])
            self._columns[quantity] = slice(width, width + weights.shape[1])
            width += weights.shape[1]
        for quantity, amount in self.counted.items():
            if not amount.maximum:
                base.append(np.array([amount.base]))
                for parts, table in zip(stages, amount.stages, strict=True):
                    parts.append(table)
                self._columns[quantity] = slice(width, width + 1)
                width += 1
        return np.concatenate(base), [np.column_stack(parts) for parts in stages]

    def evaluate(self, index: IndexArray) -> tuple[FloatArray, FloatArray]:
        """Evaluate option indices (n, n_stages).

        Returns:
            The accuracy's linear scale, shape (n,), and the quantities, shape (n, n_quantities): upper
            bounds of predicted ones, counts of the others.
        """
        sums = self._base_sums + self._stage_sums[0].take(index[:, 0], axis=0)
        for j in range(1, len(self._stage_sums)):
            sums += self._stage_sums[j].take(index[:, j], axis=0)
        values = np.empty((len(index), len(self.quantities)))
        for i, quantity in enumerate(self.quantities):
            if quantity in self._columns:
                columns = self._columns[quantity]
                values[:, i] = sums[:, columns.start]
                if columns.stop - columns.start > 1:
                    roots = sums[:, columns.start + 1 : columns.stop]
                    values[:, i] += self.bounds[quantity].t * np.sqrt(np.square(roots).sum(axis=1))
            else:
                amount = self.counted[quantity]
                parts = [table.take(index[:, j]) for j, table in enumerate(amount.stages)]
                values[:, i] = np.maximum(amount.base, np.max(parts, axis=0))
        return sums[:, 0], values

    def point(self, quantity: str, index: IndexArray) -> FloatArray:
        """The prediction (or count) of a quantity, shape (n,)."""
        if quantity in self.bounds:
            bound = self.bounds[quantity]
            return bound.design(index) @ bound.beta
        values: FloatArray = self.evaluate(index)[1][:, self.quantities.index(quantity)]
        return values


class Objective:
    """The objective over several image sizes.

    Args:
        predictors: Predictors of the target.
        confidence: Probability with which the constraint is to hold, in [0.5, 1).
        image_sizes: Image sizes to search (px); all that the predictors know when None.
        quantities: Quantities that limits will be on; latency is evaluated beside them.

    Attributes:
        quantities: Those evaluated, latency first.
        level: Confidence of each predicted quantity's own bound.

    Raises:
        InvalidInputError: If the confidence is outside [0.5, 1), or a quantity is unknown.
        OutOfDomainError: If an image size has no predictors.

    Examples:
        >>> from foxnas_mlflow import Objective, fastest, reference_predictors
        >>> cautious, bold = (Objective(reference_predictors("rpi4"), confidence=c) for c in (0.99, 0.5))
        >>> fastest(cautious).latency_upper_ms > fastest(bold).latency_upper_ms
        True
    """

    def __init__(
        self,
        predictors: PredictorSet,
        *,
        confidence: float = 0.95,
        image_sizes: Sequence[int] | None = None,
        quantities: Sequence[str] = ("latency_ms",),
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
        known = predicted_quantities(predictors)
        for quantity in quantities:
            check_quantity(quantity, known)
        self.quantities = ("latency_ms", *(q for q in dict.fromkeys(quantities) if q != "latency_ms"))
        self.level = joint_level(confidence, len(set(quantities) & set(known)))
        self.sizes = tuple(SizeObjective(predictors, size, self.quantities, self.level) for size in sizes)
        self.options = stage_options(self.space)

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The image sizes searched, in pixels."""
        return tuple(size.image_size for size in self.sizes)

    def index_of(self, architecture: Architecture) -> IndexArray:
        """Stage options of an architecture, shape (n_stages,)."""
        index: IndexArray = self.options.lookup(encode(self.space, [architecture]))[0]
        return index

    def amounts(self, architecture: Architecture) -> dict[str, float]:
        """Every quantity of an architecture, as limits are on it: upper bounds of predicted ones, counts of the others.

        The architecture's image size must be one of those searched.
        """
        size = self.sizes[self.image_sizes.index(architecture.image_size)]
        values = size.evaluate(self.index_of(architecture)[None])[1][0]
        return dict(zip(self.quantities, map(float, values), strict=True))

    def architecture(self, size_index: int, index: IndexArray) -> Architecture:
        """The architecture of one row of option indices, shape (n_stages,)."""
        return decode(self.space, self.sizes[size_index].image_size, self.options.kinds[index])


def joint_level(confidence: float, n_bounds: int) -> float:
    """Confidence of each of n upper bounds that hold together with `confidence`; 0.5 asks for predictions alone."""
    return confidence if confidence == 0.5 or n_bounds < 2 else 1 - (1 - confidence) / n_bounds


def _contributions(predictor: LinearPredictor, kinds: KindArray, image_size: int) -> tuple[float, list[FloatArray]]:
    recipe, beta = predictor.recipe, predictor.coefficients
    tables = []
    for j in range(predictor.space.n_stages):
        columns, values = recipe.stage(predictor.space, j, kinds, image_size)
        tables.append(values @ beta[columns])
    return float(recipe.constant(predictor.space, image_size) @ beta), tables


def _root(spread: FloatArray) -> FloatArray:
    """R with RR' = spread, as many columns as the spread has rank."""
    values, vectors = np.linalg.eigh(spread)
    kept = values > values[-1] * 1e-15
    root: FloatArray = vectors[:, kept] * np.sqrt(values[kept])
    return root
