"""Fitted predictors: coefficients with their covariance, as JSON, without statsmodels.

| symbol | name in code   | shape  | meaning                                                        |
|--------|----------------|--------|----------------------------------------------------------------|
| x      | design row     | (p,)   | `Formula.design`                                               |
| beta   | ``coefficients`` | (p,) | estimated coefficients                                         |
| C      | ``covariance`` | (p, p) | their covariance                                               |
| s      | ``sigma``      | scalar | residual standard deviation on the linear scale, or its        |
|        |                |        | fraction of the value when errors are relative                 |
| tau    | ``transfer_sigma`` | scalar | the same for what the fit's residuals cannot show: error   |
|        |                |        | of carrying it to image sizes that were not fitted             |

On the linear scale a new observation has the variance ``x'Cx + (s^2 + tau^2) * scale^2`` with
scale = 1, or the predicted value when errors are relative, and Student's t with ``dof``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.files import sought, write_atomically
from foxnas_mlflow.core.predictors._formulas import FloatArray, Formula, get_formula
from foxnas_mlflow.core.space import SearchSpace

PREDICTORS_FORMAT = 2
"""Format 2 has notes and origin with each predictor, bounds from held-out errors, and further quantities."""

Origin = Literal["fitted", "calibrated", "packaged"]


@dataclass(frozen=True)
class Prediction:
    """Predicted values with a two-sided interval, each of shape (n,).

    Attributes:
        value: Point prediction, in percent or milliseconds.
        lower, upper: Ends of the interval.
    """

    value: FloatArray
    lower: FloatArray
    upper: FloatArray


@dataclass(frozen=True, eq=False)
class LinearPredictor:
    """One fitted formula.

    Attributes:
        formula: Name of the formula.
        quantity: ``accuracy`` (percent), ``latency_ms``, or another measured quantity with its unit in the name.
        space: The space it was fitted in.
        image_sizes: Image sizes (px) that it may be asked for.
        fitted_sizes: Image sizes (px) of the rows it was fitted from.
        columns: Names of the p columns.
        coefficients: Shape (p,).
        covariance: Shape (p, p), or None when only coefficients were published: then there are
            no intervals.
        sigma: Residual standard deviation on the linear scale (a fraction if the formula's
            errors are relative).
        transfer_sigma: Further standard deviation at image sizes outside `fitted_sizes`.
        dof: Degrees of freedom of the residuals.
        ceiling: Ceiling of the accuracy in percent, for formulas with that link.
        metrics: Figures of the fit and its cross-validation.
        provenance: Where the rows came from, with their digest.
        origin: ``fitted`` to the user's own rows, ``calibrated`` on the user's device, or ``packaged``.
        notes: Sentences that must be shown wherever the predictions are.
        own_space_only: Whether a cost model must not be carried to a space of other stages.
        held_out: Ascending errors of m networks, each left out of a fit to all others and divided by the standard
            deviation predicted for it, shape (m,); empty where none were kept.

    Examples:
        >>> from foxnas_mlflow import reference_predictors
        >>> latency = reference_predictors("rpi4").of("latency_ms", 256)
        >>> network = latency.space.largest(256)
        >>> bool(latency.upper_bound([network], 0.95)[0] > latency.predict([network])[0])
        True
    """

    formula: str
    quantity: str
    space: SearchSpace
    image_sizes: tuple[int, ...]
    fitted_sizes: tuple[int, ...]
    columns: tuple[str, ...]
    coefficients: FloatArray
    covariance: FloatArray | None
    sigma: float
    dof: int
    ceiling: float | None = None
    transfer_sigma: float = 0.0
    metrics: Mapping[str, float] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = "fitted"
    notes: tuple[str, ...] = ()
    own_space_only: bool = False
    held_out: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        expected = self.recipe.columns(self.space)
        if tuple(self.columns) != expected or self.coefficients.shape != (len(expected),):
            raise InvalidFormatError(
                f"the {self.formula} predictor of {self.quantity} has the columns {list(expected)}",
                received=list(self.columns),
            )
        if self.covariance is not None and self.covariance.shape != (len(expected),) * 2:
            raise InvalidFormatError("a covariance must be square in the columns", received=self.covariance.shape)

    @property
    def recipe(self) -> Formula:
        """The formula itself."""
        return get_formula(self.formula, self.quantity)

    @property
    def of_one_value(self) -> bool:
        """Whether all rows had the same value, which is predicted for every network; its ceiling is none."""
        return self.sigma == 0 and bool(self.notes) and not self.coefficients.any()

    @property
    def main_size(self) -> int:
        """Largest fitted image size (px); the largest one covered, where the rows were of no size of the space."""
        return (self.fitted_sizes or self.image_sizes)[-1]

    # -- predicting ----------------------------------------------------------------------------

    def design(self, architectures: Sequence[Architecture]) -> FloatArray:
        """Design matrix (n, p) of architectures that the predictor covers.

        Raises:
            OutOfDomainError: If an image size is outside `image_sizes`.
        """
        for architecture in architectures:
            if architecture.image_size not in self.image_sizes:
                raise OutOfDomainError(
                    f"this predictor of {self.quantity} covers the image sizes {list(self.image_sizes)} px",
                    received=architecture.image_size,
                    remedy="fit predictors from measurements at that size",
                )
        return self.recipe.design(self.space, architectures)

    def predict(self, architectures: Sequence[Architecture]) -> FloatArray:
        """Point predictions, shape (n,)."""
        return self.from_linear(self.design(architectures) @ self.coefficients)

    def interval(
        self,
        architectures: Sequence[Architecture],
        *,
        confidence: float = 0.95,
        kind: Literal["prediction", "confidence"] = "prediction",
    ) -> Prediction:
        """Predictions with two-sided intervals.

        Args:
            architectures: The n subnets.
            confidence: Probability that the interval holds, in (0, 1).
            kind: ``prediction`` for a new observation, ``confidence`` for its expectation.
        """
        check_confidence(confidence)
        x = self.design(architectures)
        linear = x @ self.coefficients
        sd = self._sd(x, linear, self._extra_sigma([a.image_size for a in architectures]), kind=kind)
        half = self.t_quantile((1 + confidence) / 2) * sd
        return Prediction(self.from_linear(linear), self.from_linear(linear - half), self.from_linear(linear + half))

    def upper_bound(self, architectures: Sequence[Architecture], confidence: float) -> FloatArray:
        """One-sided upper prediction bound, shape (n,); at confidence 0.5 the prediction itself.

        Raises:
            OutOfDomainError: If held-out networks do not bear the confidence out.
        """
        check_confidence(confidence)
        self.check_stated(confidence)
        x = self.design(architectures)
        linear = x @ self.coefficients
        sd = self._sd(x, linear, self._extra_sigma([a.image_size for a in architectures]))
        return self.from_linear(linear + self.t_quantile(confidence) * sd)

    def prediction_sd(self, architectures: Sequence[Architecture]) -> FloatArray:
        """Standard deviation of new observations on the linear scale, shape (n,).

        Raises:
            OutOfDomainError: If the predictor has no covariance.
        """
        x = self.design(architectures)
        return self._sd(x, x @ self.coefficients, self._extra_sigma([a.image_size for a in architectures]))

    def t_quantile(self, probability: float) -> float:
        """Standard deviations between a prediction and its bound.

        The quantile of Student's t with the fit's degrees of freedom, or that of the held-out errors where it is
        larger: the k-th smallest of m errors with ``k = ceil((m + 1) * probability)``, as in conformal prediction
        (Vovk et al. 2005). Those are errors of leaving one out, so that a new network of their kind meets it about
        so often, and no guarantee is given. With k > m the largest error counts: see `stated_confidence`.
        """
        from scipy.special import stdtrit

        if probability == 0.5:
            return 0.0
        student = float(stdtrit(self.dof, probability))
        if not self.held_out or probability < 0.5:
            return student
        rank = min(math.ceil((len(self.held_out) + 1) * probability - 1e-9), len(self.held_out))
        return max(student, self.held_out[rank - 1])

    @property
    def stated_confidence(self) -> float:
        """The highest confidence of an upper bound that held-out networks bear out; 1 where none were kept."""
        m = len(self.held_out)
        return m / (m + 1) if m else 1.0

    def check_stated(self, confidence: float) -> None:
        """Refuse an upper bound at a confidence that held-out networks do not bear out.

        Raises:
            OutOfDomainError: If it is above `stated_confidence`.
        """
        if confidence > self.stated_confidence:
            needed = math.ceil(confidence / (1 - confidence) - 1e-9)
            stated = math.floor(1000 * self.stated_confidence) / 1000  # one that is not refused in turn
            raise OutOfDomainError(
                f"an upper bound of {self.quantity} must have a confidence of at most {stated:.3f}: "
                f"{len(self.held_out)} networks outside of the calibration bear out no more",
                received=confidence,
                remedy=f"ask for less confidence, or calibrate again with --n-checks {needed} or more",
            )

    def spread(self, image_size: int) -> FloatArray:
        """C' of shape (p, p): a new observation at an image size has the variance ``x'C'x`` on the linear scale.

        Raises:
            OutOfDomainError: If the predictor has no covariance.
        """
        if self.covariance is None:
            raise self._no_intervals()
        variance = self.sigma**2 + float(self._extra_sigma([image_size])[0]) ** 2
        direction = self.coefficients if self.recipe.relative else np.eye(len(self.coefficients))[-1]
        spread: FloatArray = self.covariance + variance * np.outer(direction, direction)
        return spread

    def from_linear(self, linear: FloatArray) -> FloatArray:
        """Map the linear scale to the quantity's unit; monotone increasing, an accuracy never above 100 %."""
        value = linear if self.ceiling is None else self.ceiling - np.exp(-linear)
        return np.minimum(value, 100.0) if self.quantity == "accuracy" else value

    def to_linear(self, value: FloatArray) -> FloatArray:
        """Inverse of `from_linear`."""
        return value if self.ceiling is None else -np.log(self.ceiling - value)

    @staticmethod
    def _no_intervals() -> OutOfDomainError:
        return OutOfDomainError(
            "a predictor known by its coefficients alone has no intervals",
            remedy="use confidence 0.5, or fit the predictor from measurements",
        )

    def _extra_sigma(self, image_sizes: Sequence[int]) -> FloatArray:
        fitted = np.isin(np.asarray(image_sizes), self.fitted_sizes)
        return np.where(fitted, 0.0, self.transfer_sigma)

    def _sd(self, x: FloatArray, linear: FloatArray, extra: FloatArray, *, kind: str = "prediction") -> FloatArray:
        if self.covariance is None:
            raise self._no_intervals()
        scale = np.abs(linear) if self.recipe.relative else np.ones_like(linear)
        variance = np.einsum("ij,jk,ik->i", x, self.covariance, x) + (extra * scale) ** 2
        if kind == "prediction":
            variance = variance + (self.sigma * scale) ** 2
        sd: FloatArray = np.sqrt(variance)
        return sd

    # -- files ---------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON object; the space is stored once, by the `PredictorSet`."""
        return {
            "formula": self.formula,
            "quantity": self.quantity,
            "image_sizes": list(self.image_sizes),
            "fitted_sizes": list(self.fitted_sizes),
            "ceiling": self.ceiling,
            "sigma": self.sigma,
            "transfer_sigma": self.transfer_sigma,
            "dof": self.dof,
            "columns": list(self.columns),
            "coefficients": self.coefficients.tolist(),
            "covariance": None if self.covariance is None else self.covariance.tolist(),
            "metrics": dict(self.metrics),
            "provenance": dict(self.provenance),
            "origin": self.origin,
            "notes": list(self.notes),
            "own_space_only": self.own_space_only,
            "held_out": list(self.held_out),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], space: SearchSpace) -> LinearPredictor:
        """Read what `to_dict` wrote.

        Raises:
            InvalidFormatError: If keys are missing or unknown, or shapes disagree.
        """
        keys = {
            "formula", "quantity", "image_sizes", "fitted_sizes", "ceiling", "sigma", "transfer_sigma",
            "dof", "columns", "coefficients", "covariance", "metrics", "provenance", "origin", "notes",
            "own_space_only", "held_out",
        }  # fmt: skip
        check_keys("a predictor", data, keys)
        values = dict(data)
        try:
            values["coefficients"] = np.asarray(data["coefficients"], dtype=np.float64)
            if data["covariance"] is not None:
                values["covariance"] = np.asarray(data["covariance"], dtype=np.float64)
            for key in ("image_sizes", "fitted_sizes", "columns", "notes", "held_out"):
                values[key] = tuple(data[key])
            if not np.isfinite(values["coefficients"]).all() or not math.isfinite(float(data["sigma"])):
                raise ValueError("not finite")
        except (TypeError, ValueError) as error:
            raise InvalidFormatError("a predictor's numbers must be finite numbers", received=str(error)) from error
        return cls(space=space, **values)


@dataclass(frozen=True, eq=False)
class PredictorSet:
    """The predictors of a target: accuracy and latency, each for one or more image sizes.

    Attributes:
        target: Name of the target.
        space: The search space.
        accuracy: Predictors of accuracy; no two cover the same image size.
        latency: Predictors of latency; no two cover the same image size.
        quantities: Predictors of further measured quantities (``energy_mj``, ``latency_ms@second-board``) by name.

    Examples:
        >>> from foxnas_mlflow import reference_predictors
        >>> predictors = reference_predictors("rpi4")
        >>> table = predictors.predict_table([predictors.space.smallest(256)], confidence=0.9)
        >>> bool(table["latency_ms_lower"][0] < table["latency_ms"][0] < table["latency_ms_upper"][0])
        True
    """

    target: str
    space: SearchSpace
    accuracy: tuple[LinearPredictor, ...]
    latency: tuple[LinearPredictor, ...]
    quantities: Mapping[str, tuple[LinearPredictor, ...]] = field(default_factory=dict)

    @property
    def groups(self) -> dict[str, tuple[LinearPredictor, ...]]:
        """The predictors of every quantity that is known, by its name: accuracy and latency first."""
        known = {"accuracy": self.accuracy, "latency_ms": self.latency, **self.quantities}
        return {quantity: group for quantity, group in known.items() if group}

    def figures(self, quantity: str) -> dict[str, float]:
        """Figures of a quantity's fits over all image sizes.

        Of several fits: rows in all, errors as the root of the mean square, others as the mean, both by rows.
        """
        each = [predictor.metrics for predictor in self.groups[quantity]]
        if len(each) == 1:
            return dict(each[0])
        rows = np.array([metrics.get("n_samples", 1.0) for metrics in each])
        found: dict[str, float] = {}
        for key in set(each[0]).intersection(*each):
            values = np.array([metrics[key] for metrics in each], dtype=np.float64)
            if key == "n_samples":
                found[key] = float(rows.sum())
            elif "rmse" in key:
                found[key] = float(np.sqrt(np.average(values**2, weights=rows)))
            else:
                found[key] = float(np.average(values, weights=rows))
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """What must be said wherever the predictions are shown, latency first, nothing twice."""
        groups = (self.latency, self.accuracy, *self.quantities.values())
        return tuple(dict.fromkeys(note for group in groups for p in group for note in p.notes))

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """Image sizes (px) for which both accuracy and latency can be predicted."""
        covered = [{s for p in group for s in p.image_sizes} for group in (self.accuracy, self.latency)]
        return tuple(sorted(covered[0] & covered[1]))

    def of(self, quantity: str, image_size: int) -> LinearPredictor:
        """The predictor of a quantity at an image size.

        Raises:
            OutOfDomainError: If none covers it.
        """
        group = self.groups.get(quantity, ())
        for predictor in group:
            if image_size in predictor.image_sizes:
                return predictor
        covered = sorted({s for p in group for s in p.image_sizes})
        raise OutOfDomainError(
            f"the predictors of target {self.target!r} know {quantity} at the image sizes {covered} px only",
            received=f"{image_size} px",
            remedy="choose one of those sizes, or bring predictors fitted at that size with predictors=",
        )

    def bound(self, quantity: str, architecture: Architecture, confidence: float) -> float:
        """What a search at this confidence limits: the upper bound of a quantity, at 0.5 the prediction."""
        predictor = self.of(quantity, architecture.image_size)
        if confidence == 0.5:
            return float(predictor.predict([architecture])[0])
        return float(predictor.upper_bound([architecture], confidence)[0])

    def latency_bound_ms(self, architecture: Architecture, confidence: float) -> float:
        """`bound` of the latency."""
        return self.bound("latency_ms", architecture, confidence)

    def predict_table(self, architectures: Sequence[Architecture], confidence: float = 0.95) -> dict[str, list[float]]:
        """A column of every known quantity and its interval's ends, one row an architecture."""
        names = [f"{q}{end}" for q in self.groups for end in ("", "_lower", "_upper")]
        table: dict[str, list[float]] = {name: [math.nan] * len(architectures) for name in names}
        for quantity in self.groups:
            for size in sorted({a.image_size for a in architectures}):
                rows = [i for i, a in enumerate(architectures) if a.image_size == size]
                subset = [architectures[i] for i in rows]
                predictor = self.of(quantity, size)
                if predictor.covariance is None:
                    columns = {"": predictor.predict(subset)}
                else:
                    p = predictor.interval(subset, confidence=confidence)
                    columns = {"": p.value, "_lower": p.lower, "_upper": p.upper}
                for end, values in columns.items():
                    for i, value in zip(rows, values, strict=True):
                        table[quantity + end][i] = float(value)
        return table

    def to_dict(self) -> dict[str, Any]:
        """The versioned JSON object."""
        return {
            "format": PREDICTORS_FORMAT,
            "target": self.target,
            "space": self.space.to_dict(),
            "accuracy": [p.to_dict() for p in self.accuracy],
            "latency": [p.to_dict() for p in self.latency],
            "quantities": {name: [p.to_dict() for p in group] for name, group in self.quantities.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> PredictorSet:
        """Read what `to_dict` wrote.

        Raises:
            InvalidFormatError: If the format is unknown or newer, or keys are wrong.
        """
        version = data.get("format") if isinstance(data, Mapping) else None
        if version == 1:
            data = _from_format_1(data)
        elif version != PREDICTORS_FORMAT:
            raise InvalidFormatError(
                f"predictors must have format {PREDICTORS_FORMAT} or 1",
                received=version,
                remedy="read them with the release of foxnas-mlflow that wrote them, or a later one",
            )
        check_keys("predictors", data, {"format", "target", "space", "accuracy", "latency", "quantities"})
        space = SearchSpace.from_dict(data["space"])

        def group(predictors: Any) -> tuple[LinearPredictor, ...]:
            return tuple(LinearPredictor.from_dict(p, space) for p in predictors)

        return cls(
            target=data["target"],
            space=space,
            accuracy=group(data["accuracy"]),
            latency=group(data["latency"]),
            quantities={name: group(predictors) for name, predictors in data["quantities"].items()},
        )

    def save(self, path: str | Path) -> None:
        """Write JSON in one step."""
        write_atomically(path, json.dumps(self.to_dict(), indent=1))


def load_predictors(path: str | Path) -> PredictorSet:
    """Read predictors from a JSON file, or from a directory that holds ``predictors.json``.

    Raises:
        InvalidFormatError: If the file cannot be read or is not predictors of a known format.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from foxnas_mlflow import load_predictors, reference_predictors
        >>> path = Path(tempfile.mkdtemp(), "rpi4.json")
        >>> reference_predictors("rpi4").save(path)
        >>> load_predictors(path).target
        'rpi4'
    """
    path = Path(path)
    if path.is_dir():
        path = path / "predictors.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidFormatError("a predictors file must be readable", received=sought(path, error)) from error
    except ValueError as error:
        raise InvalidFormatError("a predictors file must be JSON", received=str(path)) from error
    return PredictorSet.from_dict(data)


def _from_format_1(data: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1 had notes for all predictors together, those of accuracy began with its name; a user's fit had none."""
    check_keys("predictors", data, {"format", "target", "space", "accuracy", "latency", "notes"})
    notes = list(data["notes"])
    of_accuracy = [note for note in notes if note.startswith("Accuracy ")]
    shared: dict[str, Any] = {"origin": "packaged" if notes else "fitted", "held_out": []}

    def upgraded(predictor: Any, own_notes: list[str]) -> Any:
        if not isinstance(predictor, Mapping):
            return predictor
        provenance = predictor.get("provenance")
        own_space = isinstance(provenance, Mapping) and bool(provenance.get("own_space_only"))
        kept = {key: value for key, value in predictor.items() if key != "unit"}
        return kept | shared | {"notes": own_notes, "own_space_only": own_space}

    return {
        "format": PREDICTORS_FORMAT,
        "target": data["target"],
        "space": data["space"],
        "accuracy": [upgraded(p, of_accuracy) for p in data["accuracy"]],
        "latency": [upgraded(p, [note for note in notes if note not in of_accuracy]) for p in data["latency"]],
        "quantities": {},
    }


def check_confidence(confidence: float) -> None:
    """Refuse a confidence outside (0, 1)."""
    if not 0 < confidence < 1:
        raise InvalidInputError("confidence must lie between 0 and 1, both excluded", received=confidence)


def check_keys(what: str, data: object, keys: set[str]) -> None:
    """Refuse missing and unknown keys."""
    if not isinstance(data, Mapping):
        raise InvalidFormatError(f"{what} must be a JSON object", received=data)
    if set(data) != keys:
        raise InvalidFormatError(
            f"{what} must have exactly the keys {sorted(keys)}",
            received=f"missing {sorted(keys - set(data))}, unknown {sorted(set(data) - keys)}",
        )
