"""Compare: predictions held against int8 files of the found networks and of others on the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.workflows._executor import ExecutorRequest, open_executor
from foxnas_mlflow.workflows._request import compiler_image, parameter
from foxnas_mlflow.workflows._workflow import Result, progress_bar

if TYPE_CHECKING:
    from foxnas_mlflow.core.comparison import Comparison
    from foxnas_mlflow.core.measurements import Measurement


@dataclass(frozen=True, kw_only=True)
class CompareRequest(ExecutorRequest):
    """What to hold against what; see `run_compare`. A step of `main`, no entry point of its own."""

    models: tuple[str, ...] = parameter((), "Model URIs of the int8 files of the found networks.")
    subnets: tuple[str, ...] = parameter((), "Model URIs of these networks, as the search registered them.")
    predictors: str = parameter("", "Model URI of the predictors that they were found with.")
    measurements: str = parameter("", "Table of the networks that were sampled: measurements.csv.")
    supernet: str = parameter("", "Model URI of the supernet, which gives the other networks their weights.")
    data: str = parameter("", "The images that it was trained on, where they are now.")
    latency_ms: float | None = parameter(None, "Latency limit of the first one in milliseconds; empty: none.", above=0)
    limits: str = parameter("", "All limits of the first one, as text; of the others only that on latency differs.")
    objective: str = parameter("accuracy", "What was to be best: accuracy, the least of a quantity, or the knee.")
    min_accuracy: float | None = parameter(None, "Least predicted accuracy in percent; empty: none.")
    confidence: float = parameter(0.95, "Confidence of the search.", at_least=0.5, below=1)
    n_compare: int = parameter(5, "Networks of the front beside the found ones.", at_least=0)
    target: str = parameter("cpu", "Target: rpi4, edgetpu, cpu, or the path of a target YAML.")
    device: str = parameter("", "Where to measure; empty: nowhere.")
    compiler_image: str = compiler_image()
    seed: int = parameter(0, "Seed of the choice of calibration images.", at_least=0)
    name: str = parameter("foxnas", "Prefix of the registered models.")


@dataclass(frozen=True, kw_only=True)
class CompareResult(Result):
    """How well predictions agree.

    Attributes:
        metrics: Rank correlations and errors, without their prefix ``pipeline/``.
        checks: For each found network whether another one beats it on both measured figures, in a sentence.
        beaten_by: For each of them that network, as ``architecture.json``, or None.
        better: For each of them a network that is faster and, if by chance, no less accurate, or None.
    """

    metrics: Mapping[str, float]
    checks: Sequence[str]
    beaten_by: Sequence[Mapping[str, Any] | None]
    better: Sequence[Mapping[str, Any] | None] = ()


def run_compare(request: CompareRequest, *, directory: Path, tags: Mapping[str, str] | None = None) -> CompareResult:
    """Convert, evaluate and measure networks, and log predicted against real.

    Args:
        request: What to compare.
        directory: Where finished networks are kept; a comparison that was cut off goes on from them.
        tags: Further tags of its run.

    Raises:
        ConversionError, DeviceError: If a network cannot be converted or measured.
    """
    from foxnas_mlflow.core.comparison import check_found, spread_over
    from foxnas_mlflow.core.files import worked_on
    from foxnas_mlflow.core.searchers import KNEE, Objective, Problem, front_of, parse_limits
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.comparison import log_comparison
    from foxnas_mlflow.tracking.inputs import open_measurements, open_predictors, open_supernet
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.workflows._comparing import compare, find_found, find_searched

    target = get_target(request.target)
    params = {
        "model": ",".join(request.models),
        **{key: getattr(request, key) for key in ("predictors", "supernet", "latency_ms")},
    }
    with (
        open_executor(request) as executor,
        entry_run(stage="compare", params=params, target=target.name, tags=tags) as run,
        worked_on(directory / "lock", "the same comparison"),
        progress_bar("compare", "network") as show,
    ):
        supernet = open_supernet(request.supernet, data=request.data, name=request.name)
        predictors, _ = open_predictors(request.predictors, target.name)
        found = [find_found(model, run.directory / f"found{i}") for i, model in enumerate(request.models)]
        limits = parse_limits(request.limits)
        goal = "accuracy" if request.objective == KNEE else request.objective
        quantities = [limit.quantity for limit in limits] + ([] if goal == "accuracy" else [goal])
        objective = Objective(predictors, confidence=request.confidence, quantities=quantities or ["latency_ms"])
        problem = Problem(objective, limits, goal, request.min_accuracy)

        rows = compare(
            found,
            spread_over(front_of(objective), request.n_compare, without=[f.architecture for f in found]),
            supernet=supernet,
            predictors=predictors,
            confidence=request.confidence,
            target=target,
            device=request.device,
            compiler_image=request.compiler_image,
            executor=executor,
            workers=request.workers,
            seed=request.seed,
            directory=directory,
            on_row=lambda done, total: show(done, total, ""),
        )
        sampled: list[Measurement] = []
        if request.measurements:
            sampled = open_measurements(request.measurements, run.directory)[0]
        checks = []
        for i, subnet in enumerate(request.subnets):
            found_one = rows[i].architecture
            answers = [problem.stands_in(row.architecture, found_one) for row in rows]
            beside = [row for row in sampled if problem.stands_in(row.architecture, found_one)]
            searched = find_searched(subnet, run.directory / f"subnet{i}")
            checks.append(check_found(rows, answers, i).beside(searched, beside))
        metrics = log_comparison(run, rows, request.latency_ms, checks)
        return CompareResult(
            run_id=run.run_id,
            metrics=metrics,
            checks=[check.sentence for check in checks],
            beaten_by=[None if check.beaten_by is None else check.beaten_by.to_dict() for check in checks],
            better=[None if check.better is None else check.better.to_dict() for check in checks],
            summary="\n".join([_summary(rows), *dict.fromkeys(check.sentence for check in checks)]),
        )


def _summary(rows: Sequence[Comparison]) -> str:
    lines = [f"{'':<8}{'px':>4}{'predicted %':>13}{'int8 %':>9}{'predicted ms':>14}{'at most':>9}{'measured ms':>13}"]
    for row in rows:
        real = "" if row.latency_ms is None else f"{row.latency_ms:.4g}{'' if row.latency_valid else ' ?'}"
        lines.append(
            f"{row.role:<8}{row.architecture.image_size:>4}{row.predicted_accuracy:>13.2f}{row.accuracy:>9.2f}"
            f"{row.predicted_latency_ms:>14.4g}{row.predicted_latency_upper_ms:>9.4g}{real:>13}"
        )
    if any(not row.latency_valid for row in rows):
        lines.append("?: the measurement cannot be trusted; measure again on a quiet machine.")
    return "\n".join(lines)
