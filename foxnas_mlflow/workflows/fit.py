"""Fit: predictors of accuracy, latency and further quantities from a table of measured networks."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foxnas_mlflow.workflows._request import Request, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, progress_bar

if TYPE_CHECKING:
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.predictors import FitResult
    from foxnas_mlflow.core.space import SearchSpace
    from foxnas_mlflow.core.targets import Target


@dataclass(frozen=True, kw_only=True)
class FitRequest(Request):
    """What to fit; see `run_fit`."""

    measurements: str = parameter(
        "", "Path or URI of measurements.csv (runs:/RUN/measurements.csv), or the authors' table."
    )
    formula: Literal["calibrated", "paper", "auto"] = parameter("calibrated", "Formula to use.")
    name: str = parameter("foxnas", "Prefix of the registered model.")
    target: str = parameter("rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML.")
    space: str = parameter(
        "", "Search space of the rows: cpu, tpu or a YAML; empty: that logged with them, or the target's."
    )
    ceiling: float = parameter(0.0, "Ceiling of the accuracy in percent; 0: the most likely one.", at_least=0)
    seed: int = parameter(0, "Seed of the cross-validation.", at_least=0)

    def check(self) -> None:
        """A table must be named."""
        from foxnas_mlflow.core.errors import InvalidInputError

        if not self.measurements:
            raise InvalidInputError("measurements must be the path of a CSV file", remedy="give --measurements")


_CHECKED_ROWS = 25
_SECONDS = (200.0, 5000.0)
"""Milliseconds that a cost model predicts for one of what is given: between these it is taken for seconds."""


@dataclass(frozen=True, kw_only=True)
class FitStepResult(Result):
    """Registered predictors.

    Attributes:
        model_uri: The registered predictors.
        metrics: ``predictor/{quantity}/{figure}`` as logged.
    """

    model_uri: str
    metrics: Mapping[str, float]


def run_fit(request: FitRequest, *, tags: Mapping[str, str] | None = None) -> FitStepResult:
    """Fit, log and register the predictors of a target.

    Args:
        request: What to fit.
        tags: Further tags of its run.

    Raises:
        InvalidMeasurementsError: If there is no such table or it cannot be used.
        FitError: If its rows do not determine the predictors.
    """
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.core.predictors import fit_predictors, has_measured_latency, reference_latency
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.fit import log_fit, search_command
    from foxnas_mlflow.tracking.inputs import noise_floor, open_measurements, origin_of
    from foxnas_mlflow.tracking.run import entry_run

    target = get_target(request.target)
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
        rows, logged = open_measurements(request.measurements, Path(directory))
    space = get_space(request.space) if request.space else logged or get_space(target.space)
    # Without a measured latency there is nothing to fit: the target's cost model predicts it.
    measured = has_measured_latency(rows)
    latency = None if measured else reference_latency(target, space)
    if measured:
        _check_latencies(rows, target, space)
    with entry_run(
        stage="fit",
        params=request.texts() | {"space": request.space or space.name},
        target=target.name,
        space=space.name,
        latency_source="measured" if measured else "cost_model",
        tags=tags,
    ) as run:
        with progress_bar("fit", "formula") as show:
            fit = fit_predictors(
                rows,
                space,
                target=target.name,
                formula=request.formula,
                ceiling=request.ceiling or None,
                seed=request.seed,
                provenance={"source": request.measurements},
                latency=latency,
                progress=show,
            )
        floor = noise_floor(request.measurements)
        origin = origin_of(request.measurements)
        uri, metrics = log_fit(
            run,
            fit,
            rows,
            target=target,
            source=request.measurements,
            origin=origin,
            name=request.name,
            noise_floor=floor,
        )
        following = search_command(uri, target, origin.get("supernet"))
        summary = _summary(fit, uri, run.run_id, target, following, floor, _middle_ms(rows))
        return FitStepResult(run_id=run.run_id, model_uri=uri, metrics=metrics, summary=summary)


def _check_latencies(rows: Sequence[Measurement], target: Target, space: SearchSpace) -> None:
    """Refuse latencies that are a thousandth of what the target's cost model says: those of seconds."""
    from foxnas_mlflow.core.errors import InvalidMeasurementsError, OutOfDomainError
    from foxnas_mlflow.core.predictors import reference_latency

    timed = [row for row in rows if row.latency_ms is not None][:_CHECKED_ROWS]
    try:
        predicted = reference_latency(target, space).predict_table([row.architecture for row in timed])["latency_ms"]
    except OutOfDomainError:
        return
    ratio = statistics.median(float(p) / (row.latency_ms or 1.0) for p, row in zip(predicted, timed, strict=True))
    if _SECONDS[0] < ratio < _SECONDS[1]:
        raise InvalidMeasurementsError(
            "the column 'latency_ms' must be in milliseconds",
            received=f"values near {statistics.median(row.latency_ms or 0.0 for row in timed):.3g}, a {ratio:.0f}th of "
            f"what the cost model of {target.name} says, which look like seconds",
            remedy="call the column latency_s, or multiply it by 1000",
        )


def _summary(
    fit: FitResult, uri: str, run_id: str, target: Target, following: str, noise_floor: float | None, middle_ms: float
) -> str:
    """A table of both formulas, and the search to type next."""
    lines = [f"{'':<22}{'formula':<16}{'n':>7}{'adj. R2':>10}{'CV RMSE':>10}{'CV MAPE %':>11}{'tau':>8}"]
    for quantity in fit.reports:
        group = fit.predictors.groups[quantity]
        paper = fit.paper.get(quantity)
        beside = [] if paper is None or paper.predictor.formula in {one.formula for one in group} else [paper.predictor]
        for one in (*group, *beside):
            m, px = one.metrics, ",".join(map(str, one.fitted_sizes))
            what = quantity if len(group) == 1 else f"{quantity}, {px} px"
            lines.append(
                f"{what:<22}{one.formula:<16}{m['n_samples']:>7.0f}{m['r2_adjusted']:>10.4f}"
                f"{m['cv_rmse']:>10.4f}{m['cv_mape']:>11.3f}{m['kendall_tau']:>8.3f}"
            )
    if noise_floor is not None:
        lines.append(f"  noise floor of the accuracies: {noise_floor:.2f} points, the standard error of an evaluation")
    if "latency_ms" not in fit.reports and fit.predictors.latency:
        lines.append(f"{'latency_ms':<22}cost model of {target.name}: no row has a measured latency")
    lines += [f"  note: {note}" for note in fit.predictors.notes]
    lines += [f"  equation 2 of {quantity} not fitted: {why}" for quantity, why in fit.refused.items()]
    lines.append(f"Registered {uri}; run {run_id}.")
    if fit.predictors.accuracy and fit.predictors.latency:
        lines.append(f"Next: {following} --latency-ms {middle_ms:.3g}")
        lines += [f"Limits may be on {name} too: --limits '{name}<=...'" for name in fit.predictors.quantities]
    else:
        missing = "latency" if fit.predictors.accuracy else "accuracy"
        lines.append(f"A search needs predictors of {missing} too: fit a table that has both.")
    return "\n".join(lines)


def _middle_ms(rows: Sequence[Measurement]) -> float:
    """A latency to search under first: the median of those measured."""
    return statistics.median([row.latency_ms for row in rows if row.latency_ms is not None] or [60.0])


WORKFLOW = Workflow(
    "fit",
    "Fit predictors of accuracy, latency and every further column of measured networks, judge them, and register them.",
    FitRequest,
    run_fit,
)
