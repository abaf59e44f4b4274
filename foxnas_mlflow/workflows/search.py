"""Search: find, prove, explain, verify and register the best network under a latency."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, chosen_device, compiler_image, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from foxnas_mlflow.core.predictors import PredictorSet
    from foxnas_mlflow.core.searchers import Objective, SearchOutcome
    from foxnas_mlflow.core.searchers import SearchResult as FoundBySearcher
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.tracking.inputs import TrainedSupernet
    from foxnas_mlflow.tracking.run import EntryRun
    from foxnas_mlflow.tracking.search import LoggedSearch
    from foxnas_mlflow.tracking.verification import Verification


@dataclass(frozen=True, kw_only=True)
class SearchRequest(Request):
    """What to search for; see `run_search`."""

    target: str = parameter("rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML.")
    latency_ms: float = parameter(60.0, "Latency constraint in milliseconds.", above=0)
    confidence: float = parameter(
        0.95, "Probability in [0.5, 1) that a measurement meets the constraint.", at_least=0.5, below=1
    )
    space: str = parameter(
        "", "Search space: cpu, tpu, proxyless or the path of a YAML; empty: that of the predictors."
    )
    image_size: tuple[int, ...] = parameter(
        (), "Image sizes in px, comma separated; empty: all that the predictors know."
    )
    predictors: str = parameter("", "Predictors: a JSON file or a model URI; empty: the target's reference predictors.")
    supernet: str = parameter(
        "", "Model URI of a trained supernet, to evaluate networks and give the found one weights."
    )
    data: str = parameter("", "The images that it was trained on, where they are now; empty: where they were.")
    device: str = parameter(
        "", "Where to measure: local, ssh://user@host, docker://image; empty or none: the cost model."
    )
    compiler_image: str = compiler_image()
    verify: int = parameter(5, "Networks of the front to measure and evaluate before one is chosen.", at_least=1)
    measurements: str = parameter("", "Table of measured networks to draw in the report: measurements.csv.")
    algorithm: Literal["annealing", "annealing-unguided", "evolution", "random"] = parameter(
        "annealing",
        "Searcher beside the exact method.",
    )
    evaluations: int = parameter(1000000, "Budget of the searcher in evaluations.", at_least=1)
    seed: int = parameter(0, "Seed of the searcher.", at_least=0)
    name: str = parameter("foxnas", "Prefix of the registered models.")

    def check(self) -> None:
        """Images belong to a supernet."""
        if self.data and not self.supernet:
            raise InvalidInputError("data is that of a supernet", received=self.data, remedy="give supernet too")


COMPARISON_EVALUATIONS = 100_000
"""Budget under which all searchers are compared in the report."""


@dataclass(frozen=True, kw_only=True)
class SearchResult(Result):
    """A registered network.

    Attributes:
        model_uri: The registered subnet.
        predictors_uri: The predictors that it was found with, registered beside it.
        architecture: The network, as ``architecture.json``.
        latency_ms: The constraint that it meets.
        confidence: Probability that a measurement meets it.
        metrics: ``search/{figure}`` as logged.
    """

    model_uri: str
    predictors_uri: str
    architecture: Mapping[str, Any]
    latency_ms: float
    confidence: float
    metrics: Mapping[str, float]


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Everything that a search looks at, opened and held against each other."""

    target: Target
    predictors: PredictorSet
    source: str
    objective: Objective
    supernet: TrainedSupernet | None


def run_search(request: SearchRequest, *, tags: Mapping[str, str] | None = None) -> SearchResult:
    """Search, prove, verify what was found where there is a supernet or a device, and register it.

    Args:
        request: What to search for.
        tags: Further tags of its run.

    Raises:
        InfeasibleConstraintError: If no network meets the constraint.
        OutOfDomainError: If the predictors know nothing of what is asked.
        DeviceError: If the device cannot be reached; finished measurements are kept.
    """
    request = request.replace(device=chosen_device(request.device))
    # What can be refused at once is refused before there is a run.
    inputs = _open(request)

    from foxnas_mlflow.tracking.inputs import open_measurements
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.search import log_search

    resolved = request.texts() | {
        "image_size": ",".join(map(str, inputs.objective.image_sizes)),
        "data": "" if inputs.supernet is None else inputs.supernet.dataset.source,
    }
    # The run is open while the search works, so that SIGTERM finds it and ends it as KILLED.
    with entry_run(
        stage="search",
        params=resolved,
        target=inputs.target.name,
        space=inputs.predictors.space.name,
        latency_source="cost_model",
        tags={"foxnas.predictors": inputs.source, **(tags or {})},
    ) as run:
        if inputs.supernet is not None:
            from foxnas_mlflow.tracking.supernet import log_dataset

            log_dataset(run, inputs.supernet.dataset, context="evaluation")
        measurements = open_measurements(request.measurements, run.directory)[0] if request.measurements else []
        outcome, comparisons = _searched(request, inputs)
        with _keeping(request, inputs, run) as kept:
            verification = None
            if inputs.supernet is not None or request.device:
                outcome, verification = _verified(request, inputs, run, outcome, kept)
            logged = log_search(
                run,
                outcome,
                comparisons,
                target=inputs.target,
                predictors=inputs.predictors,
                predictors_source=inputs.source,
                params=request.values() | resolved,
                latency_ms=request.latency_ms,
                name=request.name,
                measurements=measurements,
                verification=verification,
            )
        return SearchResult(
            run_id=run.run_id,
            model_uri=logged.subnet_uri,
            predictors_uri=logged.predictors_uri,
            architecture=outcome.architecture.to_dict(),
            latency_ms=request.latency_ms,
            confidence=request.confidence,
            metrics=logged.metrics,
            summary=_summary(request, inputs, outcome, verification, logged, run.run_id),
        )


def _open(request: SearchRequest) -> _Inputs:
    """Open predictors and supernet, and refuse what does not belong together."""
    from foxnas_mlflow.core.searchers import Objective
    from foxnas_mlflow.core.space import get_space
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.tracking.inputs import open_predictors, open_supernet

    target = get_target(request.target)
    predictors, source = open_predictors(request.predictors or target.predictors, target.name)
    if request.space and get_space(request.space).digest != predictors.space.digest:
        raise InvalidInputError(
            f"space must be that of the predictors, {predictors.space.name!r}",
            received=request.space,
            remedy="leave space empty, or bring predictors fitted in that space",
        )
    objective = Objective(predictors, confidence=request.confidence, image_sizes=list(request.image_size) or None)
    supernet = open_supernet(request.supernet, data=request.data, name=request.name) if request.supernet else None
    if supernet is not None and supernet.space.digest != predictors.space.digest:
        raise InvalidInputError(
            f"the supernet must have the space of the predictors, {predictors.space.name!r}",
            received=f"{supernet.uri} with {supernet.space.name!r}",
            remedy="bring predictors fitted to samples of this supernet: foxnas sample, foxnas fit",
        )
    return _Inputs(target, predictors, source, objective, supernet)


def _searched(request: SearchRequest, inputs: _Inputs) -> tuple[SearchOutcome, list[FoundBySearcher]]:
    """The search, and all searchers under one common budget beside it."""
    from foxnas_mlflow.core.searchers import SEARCHERS, search

    outcome = search(
        inputs.predictors,
        request.latency_ms,
        confidence=request.confidence,
        image_sizes=list(request.image_size) or None,
        algorithm=request.algorithm,
        evaluations=request.evaluations,
        seed=request.seed,
    )
    budget = min(request.evaluations, COMPARISON_EVALUATIONS)
    comparisons = [
        searcher.search(outcome.problem, evaluations=budget, seed=request.seed) for searcher in SEARCHERS.values()
    ]
    return outcome, comparisons


def _keeping(request: SearchRequest, inputs: _Inputs, run: EntryRun) -> AbstractContextManager[Path]:
    """Where what the device says is kept until the search has its answer."""
    from contextlib import nullcontext

    from foxnas_mlflow.workflows._verification import kept_measurements

    if not request.device:
        return nullcontext(run.directory)
    return kept_measurements(inputs.predictors, inputs.target, request.values())


def _verified(
    request: SearchRequest, inputs: _Inputs, run: EntryRun, outcome: SearchOutcome, kept: Path
) -> tuple[SearchOutcome, Verification]:
    from foxnas_mlflow.workflows._verification import verified

    return verified(
        run,
        outcome,
        target=inputs.target,
        supernet=inputs.supernet,
        device=request.device,
        compiler_image=request.compiler_image,
        n=request.verify,
        kept=kept,
    )


def _summary(
    request: SearchRequest,
    inputs: _Inputs,
    outcome: SearchOutcome,
    verification: Verification | None,
    logged: LoggedSearch,
    run_id: str,
) -> str:
    target, uri = inputs.target.name, logged.subnet_uri
    weights = "none" if verification is None or verification.model is None else "trained"
    lines = [
        f"Found for {target} within {request.latency_ms:g} ms at confidence {request.confidence:g}:",
        f"  {outcome.architecture}",
        f"  predicted accuracy   {outcome.accuracy:.2f} %",
        f"  predicted latency    {outcome.latency_ms:.3g} ms, at most {outcome.latency_upper_ms:.3g} ms (cost model)",
        *_verified_lines(verification),
        f"  exact optimum        {outcome.optimum.accuracy:.4f} %, proof gap {outcome.optimum.proof_gap:.4f} points",
        f"  {outcome.result.algorithm:<20} {outcome.result.accuracy:.4f} %, gap {outcome.optimality_gap:.4f} points, "
        f"{outcome.result.evaluations:,} evaluations in {outcome.result.seconds:.2f} s",
        f"  registered           {uri} (weights={weights})",
        f"  run                  {run_id}: report.html, front.csv, certificate.json",
    ]
    if logged.note:
        lines.append(f"  note                 {logged.note}")
    if weights == "trained":
        lines.append(f"Next: foxnas quantize --subnet {uri} --target {target}")
    else:
        lines.append("Next: mlflow ui, and open report.html of the run.")
    return "\n".join(lines)


def _verified_lines(verification: Verification | None) -> list[str]:
    if verification is None:
        return []
    lines = []
    chosen = verification.chosen
    if chosen.accuracy is not None:
        lines.append(f"  evaluated accuracy   {chosen.accuracy:.2f} % +- {chosen.standard_error:.2f}")
    if chosen.timing is not None:
        word = " (emulated: no real time)" if verification.emulated else ""
        lines.append(f"  measured latency     {chosen.timing.latency_ms:.3g} ms on {chosen.timing.device}{word}")
    lines.append(f"  chosen among         {len(verification.candidates)} networks: verification.csv")
    return lines


WORKFLOW = Workflow(
    "search",
    "Find the most accurate network under a latency, with a proof, a report and registered models.",
    SearchRequest,
    run_search,
)
