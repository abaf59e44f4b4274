"""Fitting predictors from measured subnets with statsmodels (paper section 3.3).

statsmodels and its dependants are imported inside functions: predicting never needs them.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import (
    FitError,
    InvalidMeasurementsError,
    RankDeficientError,
    TooFewSamplesError,
    import_or_raise,
)
from foxnas_mlflow.core.measurements import Measurement, measurements_digest
from foxnas_mlflow.core.options import KindArray, encode
from foxnas_mlflow.core.predictors._formulas import FAMILIES, FloatArray, Formula, applicable_formulas, get_formula
from foxnas_mlflow.core.predictors._linear import LinearPredictor, PredictorSet
from foxnas_mlflow.core.random import Stream, stream
from foxnas_mlflow.core.space import SearchSpace

LAUNCH_GAIN = 0.1
"""Share of the cross-validated error that prices of starts must take off to be taken: less is chance."""

CV_FOLDS, CV_REPEATS = 10, 5


@dataclass(frozen=True)
class FitReport:
    """One fitted formula with everything that judges it.

    Attributes:
        predictor: The fitted predictor.
        summary: statsmodels' summary table as text, with diagnostics below it.
        table: One row a coefficient: column, coefficient, standard error, t, p, interval, VIF.
        metrics: r2, r2_adjusted, cv_r2, cv_rmse, cv_mape, kendall_tau, cv_coverage, n_samples.
        observed: Observed values (n,), in percent or ms.
        fitted: Fitted values (n,), in percent or ms.
        residuals: Standardised residuals (n,) on the linear scale.
        leverage: Diagonal of the hat matrix (n,).
        cv_predicted: Out-of-fold predictions (n,), mean over repeats.

    Examples:
        >>> import numpy as np
        >>> from foxnas_mlflow import Measurement, fit_predictors, get_space, reference_predictors
        >>> known, space = reference_predictors("rpi4"), get_space("cpu")
        >>> networks = space.sample(np.random.default_rng(0), n=60, image_size=256)
        >>> table = known.predict_table(networks, confidence=0.9)
        >>> rows = [Measurement(a, *figures) for a, *figures in zip(networks, table["accuracy"], table["latency_ms"])]
        >>> report = fit_predictors(rows, space, target="my-board").reports["latency_ms"]
        >>> report.metrics["n_samples"], report.predictor.quantity
        (60.0, 'latency_ms')
    """

    predictor: LinearPredictor
    summary: str
    table: list[dict[str, Any]]
    metrics: dict[str, float]
    observed: FloatArray
    fitted: FloatArray
    residuals: FloatArray
    leverage: FloatArray
    cv_predicted: FloatArray


@dataclass(frozen=True)
class FitResult:
    """Fitted predictors of a target.

    Attributes:
        predictors: What `search` uses.
        reports: The chosen formula's report by quantity.
        paper: Equation 2's report by quantity, for comparison, where the rows allow it.
        refused: Why equation 2 could not be fitted, by quantity.

    Examples:
        >>> import numpy as np
        >>> from foxnas_mlflow import Measurement, fit_predictors, get_space, reference_predictors
        >>> known, space = reference_predictors("rpi4"), get_space("cpu")
        >>> networks = space.sample(np.random.default_rng(0), n=60, image_size=256)
        >>> table = known.predict_table(networks, confidence=0.9)
        >>> rows = [Measurement(a, *figures) for a, *figures in zip(networks, table["accuracy"], table["latency_ms"])]
        >>> sorted(fit_predictors(rows, space, target="my-board").reports)
        ['accuracy', 'latency_ms']
    """

    predictors: PredictorSet
    reports: dict[str, FitReport]
    paper: dict[str, FitReport] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)


def fit_predictors(
    measurements: Sequence[Measurement],
    space: SearchSpace,
    *,
    target: str = "custom",
    formula: str = "calibrated",
    ceiling: float | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    latency: PredictorSet | None = None,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> FitResult:
    """Fit predictors of accuracy, latency and every further quantity that the rows have, and equation 2 beside them.

    Args:
        measurements: Measured subnets; rows without an accuracy or a latency are left out of its fit. Estimates
            of a cost model never enter a fit of latency beside measurements. A further quantity is in every row, or in
            every one that has a latency: they are measured together.
        space: Their search space.
        target: Name of the target.
        formula: ``calibrated``, ``paper``, or ``auto``: the better one by cross-validated error. For further
            quantities ``calibrated`` is ``auto`` too: the cost model of latency, if what they are adds up.
        ceiling: Ceiling of the accuracy in percent; found by likelihood when None.
        seed: Seed of the cross-validation folds.
        provenance: What to record of the rows' origin.
        latency: The target's cost model in this space (`reference_latency`), to be taken as it is
            where no row has a measured latency: fitting its own estimates would add nothing.
        progress: Told the formulas tried, all of them, and the quantity, after each.

    Raises:
        InvalidMeasurementsError: If values are missing, not finite, or duplicates disagree.
        TooFewSamplesError: If there are fewer rows than coefficients plus five.
        RankDeficientError: If the rows cannot tell columns apart.
        FitError: If a quantity other than the accuracy does not vary. Where all networks are as accurate, that is
            what is predicted, and a note says so.

    Examples:
        >>> import numpy as np
        >>> from foxnas_mlflow import Measurement, fit_predictors, get_space, reference_predictors
        >>> known, space = reference_predictors("rpi4"), get_space("cpu")
        >>> networks = space.sample(np.random.default_rng(0), n=60, image_size=256)
        >>> table = known.predict_table(networks, confidence=0.9)
        >>> rows = [Measurement(a, *figures) for a, *figures in zip(networks, table["accuracy"], table["latency_ms"])]
        >>> fit = fit_predictors(rows, space, target="my-board")
        >>> fit.reports["latency_ms"].metrics["cv_r2"] > 0.99
        True
    """
    chosen: dict[str, list[FitReport]] = {}
    paper: dict[str, FitReport] = {}
    refused: dict[str, str] = {}
    alike: tuple[LinearPredictor, ...] = ()
    rows_of = {
        quantity: _rows_of(quantity, measurements)
        for quantity in measured_quantities(measurements)
        if quantity != "latency_ms" or latency is None or has_measured_latency(measurements)
    }
    sizes = {quantity: len({row.architecture.image_size for row in rows}) for quantity, rows in rows_of.items()}
    total = sum(len(applicable_formulas(family, q, space, n)) for family in FAMILIES for q, n in sizes.items())
    done = itertools.count(1)
    for quantity, rows in rows_of.items():
        origin = dict(provenance or {}) | _origin(rows)
        if quantity == "accuracy" and len(rows) > 1 and len({row.accuracy for row in rows}) == 1:
            alike = (_alike(rows, space, origin),)
            continue
        fits: dict[str, list[FitReport]] = {}
        errors: dict[str, FitError] = {}
        for family in FAMILIES:
            try:
                fits[family] = fit_family(
                    family,
                    quantity,
                    rows,
                    space,
                    tried=lambda: progress(next(done), total, quantity),  # noqa: B023 (called before the next one)
                    ceiling=ceiling,
                    seed=seed,
                    provenance=origin,
                )
            except FitError as error:
                errors[family] = error
        name = formula
        if formula == "auto" or (formula == "calibrated" and quantity not in ("accuracy", "latency_ms")):
            name = min(fits, key=lambda n: _cv_rmse(fits[n]), default="calibrated")
        if name in errors:
            raise errors[name]
        get_formula(name, quantity)
        chosen[quantity] = fits[name]
        if "paper" in fits:
            paper[quantity] = fits["paper"][0]
        elif "paper" in errors:
            refused[quantity] = str(errors["paper"])
    if not chosen and not alike:
        raise InvalidMeasurementsError(
            "measurements must have something to fit", received="estimates of a cost model alone"
        )
    reports = {quantity: fitted[0] for quantity, fitted in chosen.items()}
    of = {quantity: tuple(r.predictor for r in fitted) for quantity, fitted in chosen.items()}
    known = () if latency is None else latency.latency
    predictors = PredictorSet(target, space, of.pop("accuracy", alike), of.pop("latency_ms", known), of)
    return FitResult(predictors, reports, paper, refused)


def refit_predictors(
    known: PredictorSet,
    rows: Sequence[Measurement],
    *,
    latency: bool,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> PredictorSet:
    """Predictors of the kind of others, fitted to those rows and to what a search looked at since.

    Args:
        known: The others. Their ceiling stays, unless a network came up to it; their predictors of further quantities,
            which no search looks at, stay.
        rows: All rows, those of `known` among them.
        latency: Whether the latencies of `known` were fitted to measured ones. Otherwise its cost model stays: a
            search looks at too few networks to put another in its place.
        seed: Seed of the cross-validation folds.
        provenance: What to record of the rows' origin.

    Raises:
        FitError: As `fit_predictors`.
    """
    model = known.accuracy[-1]
    ceiling = None if model.of_one_value else model.ceiling
    best = max((row.accuracy for row in rows if row.accuracy is not None), default=0.0)
    kept = [dataclasses.replace(row, quantities={}) for row in rows]
    if not latency:
        kept = [dataclasses.replace(row, latency_ms=None, latency_source="") for row in kept]
    fit = fit_predictors(
        kept,
        known.space,
        target=known.target,
        formula="paper" if model.formula == "paper" else "calibrated",
        ceiling=None if ceiling is None or ceiling <= best else ceiling,
        seed=seed,
        provenance=provenance,
        latency=known,
    )
    return dataclasses.replace(fit.predictors, quantities=known.quantities)


def _rows_of(quantity: str, measurements: Sequence[Measurement]) -> list[Measurement]:
    """The rows that a quantity is fitted to; estimates of a cost model only where no latency is measured."""
    rows = [m for m in measurements if m.value(quantity) is not None]
    if quantity == "latency_ms" and has_measured_latency(rows):
        rows = [m for m in rows if m.latency_source != "cost_model"]
    check_rows(rows, quantity)
    return rows


def _alike(rows: Sequence[Measurement], space: SearchSpace, origin: Mapping[str, Any]) -> LinearPredictor:
    """The predictor of an accuracy that all rows have."""
    formula, accuracy = get_formula("calibrated", "accuracy"), rows[0].accuracy or 0.0
    columns = formula.columns(space)
    return LinearPredictor(
        formula=formula.name,
        quantity="accuracy",
        space=space,
        image_sizes=space.image_sizes,
        fitted_sizes=tuple(sorted({row.architecture.image_size for row in rows})),
        columns=columns,
        # On the scale -log(ceiling - accuracy) it is 0.
        coefficients=np.zeros(len(columns)),
        covariance=np.zeros((len(columns), len(columns))),
        sigma=0.0,
        dof=len(rows) - 1,
        ceiling=accuracy + 1.0,
        metrics={"n_samples": float(len(rows))},
        provenance=dict(origin),
        notes=(
            f"all {len(rows)} networks that were evaluated are right at {accuracy:.4g} % of the images: none is better "
            "than the fastest one",
        ),
    )


def _origin(rows: Sequence[Measurement]) -> dict[str, Any]:
    """What a predictor records of the rows that it was fitted to."""
    return {
        "digest": measurements_digest(rows),
        "n_rows": len(rows),
        "latency_sources": sorted({m.latency_source for m in rows if m.latency_source}),
        "devices": sorted({m.device for m in rows if m.device}),
        "fitted_with": f"foxnas-mlflow {__version__}",
        "fitted_on": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def measured_quantities(rows: Sequence[Measurement]) -> list[str]:
    """What rows have measurements of: accuracy and latency first, then further quantities by name.

    Raises:
        InvalidMeasurementsError: If they have none, or a further quantity is missing in some of them that have a
            latency, or in some of all where none has one.
    """
    further = sorted({name for row in rows for name in row.quantities})
    # Not every network that is evaluated need be measured on a device.
    measured = [row for row in rows if row.latency_ms is not None] or rows
    for name in further:
        missing = sum(name not in row.quantities for row in measured)
        if missing:
            raise InvalidMeasurementsError(
                f"a column of measurements must have a value in every row with a latency, {name} too",
                received=f"{missing} of {len(measured)} rows without one",
                remedy="measure them, or remove the column or these rows",
            )
    known = [name for name in ("accuracy", "latency_ms") if any(row.value(name) is not None for row in rows)]
    if not known + further:
        raise InvalidMeasurementsError(
            "measurements must have rows with accuracy, with latency_ms or with a further quantity", received="none"
        )
    return known + further


def fit_family(
    family: str,
    quantity: str,
    rows: Sequence[Measurement],
    space: SearchSpace,
    *,
    tried: Callable[[], None] = lambda: None,
    **options: Any,
) -> list[FitReport]:
    """A family's formula with the least cross-validated error, fitted to the rows.

    Of cost models of amounts the one with most terms that the rows allow is taken: a price that is none comes out
    as 0. Those that count starts of layers must be better by `LAUNCH_GAIN`.

    Args:
        family: A key of `FAMILIES`.
        quantity: ``accuracy``, ``latency_ms`` or a further quantity of the rows.
        rows: Measured subnets.
        space: Their search space.
        tried: Called after each formula.
        options: As `fit_formula`.

    Returns:
        A report for all image sizes together, or one a size.

    Raises:
        TooFewSamplesError: If the rows are too few for any; it names what the smallest one needs.
        FitError: If enough rows are no good for the family's full formula: a smaller one must not hide that.
    """
    fitted: list[list[FitReport]] = []
    too_few: TooFewSamplesError | None = None
    sizes = np.array([row.architecture.image_size for row in rows])
    kinds = encode(space, [row.architecture for row in rows])
    n_sizes = len(np.unique(sizes))
    for recipe in applicable_formulas(family, quantity, space, n_sizes):
        try:
            if recipe.non_negative and bool(fitted) != recipe.launches:
                continue
            fitted.append(
                [
                    fit_formula(
                        recipe, [rows[i] for i in group], space, quantity=quantity, kinds=kinds[group], **options
                    )
                    for group in _groups(recipe, sizes)
                ]
            )
        except TooFewSamplesError as error:
            too_few = error
        except FitError:
            # Single sizes may lack what the rows of all sizes have.
            # And rows that cannot tell what an extension adds are good for the formula that it extends.
            if not fitted and (n_sizes == 1 or recipe.name != "calibrated" or quantity != "accuracy"):
                raise
        finally:
            tried()
    if too_few is not None and not fitted:
        raise too_few
    return min(fitted, key=lambda reports: _cv_rmse(reports) / (1 - LAUNCH_GAIN * reports[0].predictor.recipe.launches))


def rows_needed(quantity: str, space: SearchSpace, image_sizes: Sequence[int]) -> int:
    """Fewest rows that the calibrated family is fitted to.

    Args:
        quantity: ``accuracy`` or ``latency_ms``.
        space: The rows' search space.
        image_sizes: Image sizes in pixels, each of which some of the rows have.
    """
    formulas = [f for f in applicable_formulas("calibrated", quantity, space, len(image_sizes)) if not f.launches]
    possible = [_possible_rows(formula, space, image_sizes) for formula in formulas]
    return min(
        len(_usable_columns(formula, x, space, formula.columns(space), image_sizes)) + formula.spare_rows
        for formula, x in zip(formulas, possible, strict=True)
    )


def _cv_rmse(reports: Sequence[FitReport]) -> float:
    """Cross-validated error over all rows of reports for different image sizes."""
    n = np.array([report.metrics["n_samples"] for report in reports])
    rmse = np.array([report.metrics["cv_rmse"] for report in reports])
    return float(np.sqrt(np.sum(n * rmse**2) / np.sum(n)))


def has_measured_latency(measurements: Sequence[Measurement]) -> bool:
    """Whether any row has a latency that is not an estimate of a cost model."""
    return any(m.latency_ms is not None and m.latency_source != "cost_model" for m in measurements)


def fit_formula(
    formula: Formula,
    rows: Sequence[Measurement],
    space: SearchSpace,
    *,
    quantity: str = "",
    ceiling: float | None = None,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
    spare_rows: int | None = None,
    kinds: KindArray | None = None,
) -> FitReport:
    """Fit one formula to one quantity.

    Args:
        formula: The formula.
        rows: Measured subnets.
        space: Their search space.
        quantity: What to fit it to; empty: the formula's own quantity.
        ceiling: As `fit_predictors`.
        seed: Seed of the cross-validation folds.
        provenance: What to record of the rows' origin.
        spare_rows: Rows beyond the number of coefficients that are needed; None: the formula's.
        kinds: `encode` of the rows' architectures, where it has been done already.

    Raises:
        TooFewSamplesError, RankDeficientError, FitError: As `fit_predictors`.
    """
    least_squares = import_or_raise("statsmodels.regression.linear_model", extra="fit", feature="fitting predictors")
    quantity = quantity or formula.quantity
    row_sizes = np.array([row.architecture.image_size for row in rows])
    if kinds is None:
        kinds = encode(space, [row.architecture for row in rows])
    all_x, all_columns = formula.design_of_kinds(space, kinds, row_sizes), formula.columns(space)
    y = np.array([row.value(quantity) for row in rows], dtype=np.float64)
    sizes = tuple(int(size) for size in np.unique(row_sizes))
    kept = _usable_columns(formula, all_x, space, all_columns, sizes)
    left_out = ~np.isin(np.arange(len(all_columns)), kept) & ~np.isin(all_columns, formula.optional)
    x, columns = all_x[:, kept], tuple(all_columns[i] for i in kept)
    p = len(kept)
    spare_rows = formula.spare_rows if spare_rows is None else spare_rows
    if len(y) < p + spare_rows:
        raise TooFewSamplesError(
            f"the {formula.name} formula of {quantity} needs at least {p + spare_rows} rows "
            f"({p} coefficients and {spare_rows} more)",
            received=f"{len(y)} rows",
            remedy="measure more subnets" + (", or use the calibrated formula" if formula.name == "paper" else ""),
        )
    if np.ptp(y) == 0:
        raise FitError(f"{quantity} must vary over the rows", received=f"{y[0]:g} in all {len(y)}")
    require_full_rank(x, columns)
    top = _ceiling(formula, x, y, ceiling)
    linear = y if top is None else -np.log(top - y)
    weights = 1.0 / y**2 if formula.relative else np.ones_like(y)
    cv = cross_validate(formula, x, y, ceiling=top, seed=seed)
    used = _used(formula, x * np.sqrt(weights)[:, None], linear * np.sqrt(weights))
    kept, x, columns, p = kept[used], x[:, used], tuple(all_columns[i] for i in kept[used]), len(used)
    model = least_squares.WLS(linear, _frame(x, columns), weights=weights)
    fit = model.fit()
    influence = x * np.sqrt(weights)[:, None]
    leverage = np.einsum("ij,ji->i", influence, np.linalg.pinv(influence))
    fitted = np.asarray(x @ np.asarray(fit.params))
    residuals = np.asarray(fit.wresid) / (np.sqrt(fit.scale) * np.sqrt(np.maximum(1 - leverage, 1e-12)))
    back = fitted if top is None else top - np.exp(-fitted)
    metrics = {
        "r2": _r2(y, back),
        "r2_adjusted": 1 - (1 - _r2(y, back)) * (len(y) - 1) / (len(y) - p),
        "n_samples": float(len(y)),
        **cv.metrics,
    }
    predictor = LinearPredictor(
        formula=formula.name,
        quantity=quantity,
        space=space,
        image_sizes=space.image_sizes if formula.any_size else sizes,
        fitted_sizes=sizes,
        columns=all_columns,
        coefficients=_spread_out(np.asarray(fit.params, dtype=np.float64), kept, len(all_columns)),
        covariance=_spread_out(np.asarray(fit.cov_params(), dtype=np.float64), kept, len(all_columns)),
        sigma=float(np.sqrt(fit.scale)),
        dof=int(fit.df_resid),
        ceiling=top,
        metrics=metrics,
        provenance=dict(provenance or {}),
        # In another space what the constant stands for here would cost nothing.
        own_space_only=formula.any_size and bool(all_x[:, left_out].any()),
    )
    return FitReport(
        predictor=predictor,
        summary=_summary_text(fit, residuals, x, columns, formula),
        table=_coefficient_table(fit, x, columns),
        metrics=metrics,
        observed=y,
        fitted=back,
        residuals=residuals,
        leverage=leverage,
        cv_predicted=cv.predicted,
    )


@dataclass(frozen=True)
class CrossValidation:
    """Repeated k-fold cross-validation.

    Attributes:
        metrics: cv_r2, cv_rmse, cv_mape (percent), kendall_tau, cv_coverage (fraction of rows
            inside their 95 % prediction interval).
        predicted: Mean out-of-fold prediction of each row, shape (n,).
    """

    metrics: dict[str, float]
    predicted: FloatArray


def cross_validate(
    formula: Formula,
    x: FloatArray,
    y: FloatArray,
    *,
    ceiling: float | None,
    seed: int = 0,
    folds: int = CV_FOLDS,
    repeats: int = CV_REPEATS,
) -> CrossValidation:
    """Cross-validate a formula on its design matrix; folds are drawn over rows.

    The ceiling is kept as given: it is one number of the whole table, and refitting it in every
    fold changes the errors in the fourth digit.
    """
    from scipy.special import stdtrit
    from scipy.stats import kendalltau

    n, _p = x.shape
    folds = min(folds, n)
    linear = y if ceiling is None else -np.log(ceiling - y)
    root_weights = 1.0 / y if formula.relative else np.ones_like(y)
    predicted, covered, taus = np.zeros((repeats, n)), np.zeros((repeats, n)), []
    for repeat in range(repeats):
        order = stream(seed, Stream.FOLDS, repeat).permutation(n)
        for fold in range(folds):
            test = order[fold::folds]
            train = np.setdiff1d(order, test, assume_unique=True)
            xw, yw = x[train] * root_weights[train, None], linear[train] * root_weights[train]
            used = _used(formula, xw, yw)
            beta, half = _least_squares(xw[:, used], yw)
            x_test = x[np.ix_(test, used)]
            z = x_test @ beta
            predicted[repeat, test] = z if ceiling is None else ceiling - np.exp(-z)
            dof = len(train) - half.shape[1]
            if dof < 1:
                continue
            s2 = float(np.sum((yw - xw[:, used] @ beta) ** 2)) / dof
            scale = np.abs(z) if formula.relative else np.ones_like(z)
            sd = np.sqrt(s2 * (((x_test @ half) ** 2).sum(axis=1) + scale**2))
            covered[repeat, test] = np.abs(linear[test] - z) <= stdtrit(dof, 0.975) * sd
        taus.append(float(kendalltau(predicted[repeat], y).statistic))
    errors = predicted - y
    metrics = {
        "cv_r2": 1 - float(np.mean(np.mean(errors**2, axis=1))) / float(np.var(y)),
        "cv_rmse": float(np.sqrt(np.mean(errors**2))),
        # An accuracy of 0 has no share to be off by.
        "cv_mape": float(np.mean(np.abs(errors[:, y != 0]) / y[y != 0])) * 100,
        "kendall_tau": float(np.mean(taus)),
        "cv_coverage": float(covered.mean()),
    }
    return CrossValidation(metrics, predicted.mean(axis=0))


def _used(formula: Formula, x: FloatArray, y: FloatArray) -> NDArray[np.int64]:
    """Indices of the columns that least squares uses, of x (n, p) and y (n,).

    Prices below 0 are none. Without the columns whose price would be, the others are those of
    ordinary least squares, so that its errors and intervals hold for them.
    """
    if not formula.non_negative:
        return np.arange(x.shape[1], dtype=np.int64)
    from scipy.optimize import nnls

    scale = np.maximum(np.sqrt((x**2).sum(axis=0)), 1e-300)
    # Of the same sums of squares, in p rows in place of n.
    q, r = np.linalg.qr(x / scale)
    return np.flatnonzero(nnls(r, q.T @ y)[0])


def _least_squares(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Coefficients of least norm (p,), and H (p, rank) with ``H H' = (x'x)^+``: the variance of an x is ``|x'H|^2``."""
    left, singular, right = np.linalg.svd(x, full_matrices=False)
    rank = int(np.sum(singular > singular[0] * np.finfo(np.float64).eps * max(x.shape)))
    half: FloatArray = right[:rank].T / singular[:rank]
    return half @ (left[:, :rank].T @ y), half


def check_rows(rows: Sequence[Measurement], quantity: str) -> None:
    """Refuse rows from which a quantity cannot be learned.

    Raises:
        InvalidMeasurementsError: If there are none, or duplicated architectures disagree.
    """
    if not rows:
        raise InvalidMeasurementsError(f"measurements must have rows with {quantity}", received="none")
    seen: dict[Any, float] = {}
    for row in rows:
        value = row.value(quantity)
        if value is None:
            continue
        first = seen.setdefault(row.architecture, value)
        # Repeated measurements scatter; a tenth of the value or a point of accuracy is a mistake.
        tolerance = 1.0 if quantity == "accuracy" else 0.1 * first
        if abs(value - first) > tolerance:
            raise InvalidMeasurementsError(
                f"rows of the same architecture must agree on {quantity}",
                received=f"{first:g} and {value:g} for {row.architecture}",
                remedy="remove the wrong row",
            )


def require_full_rank(x: FloatArray, columns: Sequence[str]) -> None:
    """Refuse a design whose columns are linearly dependent, naming those that add nothing.

    Raises:
        RankDeficientError: With the names of the dependent columns.
    """
    rank, order = _rank(x)
    if rank < x.shape[1]:
        names = sorted(columns[i] for i in order[rank:])
        raise RankDeficientError(
            "the measured subnets must vary every column of the formula independently",
            received=f"no independent variation in {names}",
            remedy="measure subnets that vary in these, or use a formula without them",
        )


def _rank(x: FloatArray) -> tuple[int, NDArray[np.int64]]:
    """Rank, and the columns in an order in which the first ones are independent, the constant before its like."""
    from scipy.linalg import qr

    scaled = x / np.maximum(np.sqrt((x**2).mean(axis=0)), 1e-300)
    scaled[:, -1] *= 2
    _, r, order = qr(scaled, mode="economic", pivoting=True)
    diagonal = np.abs(np.diag(r))
    return int(np.sum(diagonal > diagonal[0] * 1e-10)), order


def _usable_columns(
    formula: Formula, x: FloatArray, space: SearchSpace, columns: Sequence[str], sizes: Sequence[int]
) -> NDArray[np.int64]:
    """Indices of the columns to fit: those that the space tells apart, and the optional ones where rows do.

    The coefficients of the others are 0: a space without squeeze-excite has no price of it, and what is the same
    in all networks, or a sum of other columns in each, is in the constant or in those.
    """
    optional = np.isin(columns, formula.optional)
    required = np.flatnonzero(~optional)
    if _rank(x[:, required])[0] < len(required):
        possible = _possible_rows(formula, space, space.image_sizes if formula.any_size else sizes)
        rank, order = _rank(possible[:, required])
        required = required[order[:rank]]
    kept = np.sort(np.append(required, np.flatnonzero(optional)))
    for name in reversed(formula.optional):
        if _rank(x[:, kept])[0] == len(kept):
            break
        kept = kept[kept != list(columns).index(name)]
    return kept


def _possible_rows(formula: Formula, space: SearchSpace, sizes: Sequence[int]) -> FloatArray:
    """Design rows of random networks of a space, enough to tell all columns apart that it tells apart."""
    rng = stream(0, Stream.POSSIBLE_ROWS)
    n = 50 * len(formula.columns(space))
    kinds = rng.integers(len(space.kinds), size=(n, space.n_stages, space.max_depth), dtype=np.int16)
    absent = np.arange(space.max_depth) >= rng.choice(space.depths, size=(n, space.n_stages, 1))
    kinds[absent] = -1
    return formula.design_of_kinds(space, kinds, rng.choice(sizes, size=n))


def _spread_out(values: FloatArray, kept: NDArray[np.int64], n: int) -> FloatArray:
    """A vector or square matrix of the kept columns as one of all n, with 0 for the others."""
    full = np.zeros((n,) * values.ndim)
    full[np.ix_(*[kept] * values.ndim)] = values
    return full


def _groups(formula: Formula, sizes: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Rows that are fitted together, by the image sizes (n,) of all.

    Formulas that hold for one image size are fitted once a size (the paper's 7 predictors).
    """
    if formula.pooled:
        return [np.arange(len(sizes))]
    return [np.flatnonzero(sizes == size) for size in np.unique(sizes)]


def _ceiling(formula: Formula, x: FloatArray, y: FloatArray, given: float | None) -> float | None:
    """The given ceiling, or the most likely one on a grid between the best row and 100 %.

    The log likelihood of y under z = -log(c - y) normal has the Jacobian sum(z).
    """
    if formula.link == "identity":
        return None
    best = float(y.max())
    if given is not None:
        if given <= best:
            raise FitError(f"ceiling must be above the best measured accuracy, {best:g} %", received=given)
        return given
    room = 100.5 - best
    candidates = best + room * np.geomspace(0.02, 1.0, 40)
    z = -np.log(candidates - y[:, None])
    residual = z - x @ np.linalg.lstsq(x, z, rcond=None)[0]
    scores = -0.5 * len(y) * np.log(np.mean(residual**2, axis=0)) + z.sum(axis=0)
    return round(float(candidates[int(np.argmax(scores))]), 2)


def _r2(y: FloatArray, fitted: FloatArray) -> float:
    return 1 - float(np.sum((y - fitted) ** 2)) / float(np.sum((y - y.mean()) ** 2))


def _frame(x: FloatArray, columns: Sequence[str]) -> Any:
    import pandas as pd

    return pd.DataFrame(x, columns=list(columns))


def _vif(x: FloatArray) -> FloatArray:
    """Variance inflation of each column: the diagonal of the inverse correlation matrix.

    The figures of statsmodels' `variance_inflation_factor`, which fits a regression a column, by one inversion.
    """
    varying = x[:, :-1]
    if not varying.shape[1]:
        return np.array([np.nan])
    inverse = np.linalg.pinv(np.corrcoef(varying, rowvar=False).reshape(varying.shape[1], -1))
    return np.append(np.diag(inverse), np.nan)


def _coefficient_table(fit: Any, x: FloatArray, columns: Sequence[str]) -> list[dict[str, Any]]:
    interval = np.asarray(fit.conf_int(0.05))
    vif = _vif(x)
    return [
        {
            "column": name,
            "coefficient": float(fit.params.iloc[i]),
            "std_error": float(fit.bse.iloc[i]),
            "t": float(fit.tvalues.iloc[i]),
            "p": float(fit.pvalues.iloc[i]),
            "lower_95": float(interval[i, 0]),
            "upper_95": float(interval[i, 1]),
            "vif": float(vif[i]),
        }
        for i, name in enumerate(columns)
    ]


def _summary_text(fit: Any, residuals: FloatArray, x: FloatArray, columns: Sequence[str], formula: Formula) -> str:
    import warnings

    with warnings.catch_warnings():
        # The kurtosis test of the summary warns on small samples; its figure is still printed.
        warnings.simplefilter("ignore", UserWarning)
        text = str(fit.summary(title=f"{formula.name} formula, {formula.quantity} (linear scale)"))
    worst = sorted(zip(_vif(x)[:-1], columns, strict=False), reverse=True)[:5]
    scale = {"identity": formula.quantity, "ceiling": "z = -log(ceiling - accuracy)"}[formula.link]
    lines = [
        text,
        f"Linear scale: {scale}; weights: {'1 / value^2 (relative errors)' if formula.relative else 'equal'}.",
        "Largest variance inflation factors: " + ", ".join(f"{name} {v:.1f}" for v, name in worst) + ".",
        f"Largest standardised residual: {np.abs(residuals).max():.2f}.",
        "Collinear columns make single coefficients unreadable: see effects.png for the effect of real edits.",
    ]
    return "\n".join(lines) + "\n"
