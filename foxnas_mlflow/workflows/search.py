"""Search: find, prove, explain, verify and register the best network under limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._addresses import where_measured
from foxnas_mlflow.workflows._executor import WORKING, ExecutorRequest, open_executor
from foxnas_mlflow.workflows._goal import GoalRequest
from foxnas_mlflow.workflows._request import chosen_device, compiler_image, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger

if TYPE_CHECKING:
    from contextlib import AbstractContextManager
    from pathlib import Path

    from foxnas_mlflow.core.architecture import Architecture
    from foxnas_mlflow.core.measurements import Measurement
    from foxnas_mlflow.core.predictors import PredictorSet
    from foxnas_mlflow.core.searchers import Limit, Loop, Problem, SearchOutcome, Solved
    from foxnas_mlflow.core.searchers import SearchResult as SearcherResult
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.core.workers import Executor
    from foxnas_mlflow.tracking.inputs import TrainedSupernet
    from foxnas_mlflow.tracking.run import EntryRun
    from foxnas_mlflow.tracking.search import LoggedNetwork, Searched
    from foxnas_mlflow.tracking.verification import Verification
    from foxnas_mlflow.workflows._verification import Lookers


DEFAULT_LATENCY_MS = 60.0
"""The latency limit of a search that is given neither limits nor another objective."""


@dataclass(frozen=True, kw_only=True)
class SearchRequest(GoalRequest, ExecutorRequest):
    """What to search for; see `run_search`."""

    target: str = parameter("rpi4", "Target: rpi4, edgetpu, cpu, gpu, or the path of a target YAML.")
    latency_ms: tuple[float, ...] = parameter(
        (),
        "Latency limit in milliseconds, or several (10,20,40): a network each; empty: 60 where nothing else is asked.",
        above=0,
    )
    confidence: float = parameter(
        0.95, "Probability in [0.5, 1) that measurements meet all limits together.", at_least=0.5, below=1
    )
    space: str = parameter(
        "", "Search space: cpu, tpu, proxyless, lite or the path of a YAML; empty: that of the predictors."
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
        "",
        "Where to measure: local, ssh://user@host, docker://image, or several boards of one kind, comma separated; "
        "empty or none: the cost model.",
    )
    compiler_image: str = compiler_image()
    verify: int = parameter(5, "Networks of the front to measure and evaluate before one is chosen.", at_least=1)
    rounds: int = parameter(
        1, "Most rounds of searching, looking at networks and refitting; 1: the predictors stay as given.", at_least=1
    )
    measurements: str = parameter(
        "", "Table of measured networks, to draw, and to look again at those that beat the found one: measurements.csv."
    )
    algorithm: Literal["annealing", "annealing-unguided", "evolution", "random", "exact"] = parameter(
        "annealing",
        "Searcher beside the exact method; exact: none, for many limits.",
    )
    evaluations: int = parameter(1000000, "Budget of the searcher in evaluations.", at_least=1)
    seed: int = parameter(0, "Seed of the searcher.", at_least=0)
    name: str = parameter("foxnas", "Prefix of the registered models.")

    def check(self) -> None:
        """Images belong to a supernet; limits and goal are as `GoalRequest` wants them."""
        super().check()
        if self.data and not self.supernet:
            raise InvalidInputError("data is that of a supernet", received=self.data, remedy="give supernet too")
        if self.rounds > 1 and not (self.supernet and self.measurements):
            raise InvalidInputError(
                "rounds learn from networks that a supernet evaluates, and from the rows behind the predictors",
                received=f"rounds={self.rounds}",
                remedy="give supernet and measurements",
            )

    @property
    def latencies_ms(self) -> tuple[float | None, ...]:
        """The latency limits, a network for each; None: no limit on latency beside those of `limits`."""
        if self.latency_ms:
            return self.latency_ms
        return (DEFAULT_LATENCY_MS,) if self.is_open else (None,)


COMPARISON_EVALUATIONS = 100_000
"""Budget under which all searchers are compared in the report."""


@dataclass(frozen=True, kw_only=True)
class SearchResult(Result):
    """Registered networks: one, or one for each of several latencies.

    Attributes:
        model_uri: The registered subnet, the first of several.
        model_uris: All of them, in the order of the latencies.
        predictors_uri: The predictors that they were found with, registered beside them.
        architecture: The first network, as ``architecture.json``.
        architectures: All of them.
        latency_ms: The latency limit that it meets, or None where latency was not limited.
        limits: All limits that it meets, as text.
        confidence: Probability that measurements meet them.
        metrics: ``search/{figure}`` of it, as logged.
    """

    model_uri: str
    model_uris: Sequence[str]
    predictors_uri: str
    architecture: Mapping[str, Any]
    latency_ms: float | None
    limits: str
    confidence: float
    metrics: Mapping[str, float]
    architectures: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, eq=False)
class _Inputs:
    """Everything that a search looks at, opened and held against each other."""

    target: Target
    predictors: PredictorSet
    source: str
    problems: tuple[Problem, ...]
    supernet: TrainedSupernet | None


def run_search(
    request: SearchRequest,
    *,
    tags: Mapping[str, str] | None = None,
    also: Sequence[Architecture] = (),
    beaten: Sequence[Architecture] = (),
) -> SearchResult:
    """Search, prove, verify what was found where there is a supernet or a device, and register it.

    Args:
        request: What to search for.
        tags: Further tags of its run.
        also: Networks to look at beside those of the front.
        beaten: Networks that another one is known to beat on measured figures: they win only where no other can.

    Raises:
        InvalidInputError: If a limit, a goal or an input breaks a rule.
        InfeasibleConstraintError: If no network meets the limits; it names what can be reached.
        OutOfDomainError: If the predictors know nothing of what is asked.
        DeviceError: If the device cannot be reached; finished measurements are kept.

    Examples:
        >>> from foxnas_mlflow import SearchRequest, run_search
        >>> result = run_search(SearchRequest(target="rpi4", latency_ms=60, evaluations=5_000))
        >>> result.model_uri
        'models:/foxnas-subnet-rpi4/1'
    """
    request = request.replace(device=chosen_device(request.device))
    from foxnas_mlflow.core.errors import import_or_raise

    # What can be refused at once is refused before there is a run.
    if request.rounds > 1:
        import_or_raise("statsmodels", extra="fit", feature="learning from what was looked at (rounds)")
    inputs = _open(request)

    from foxnas_mlflow.core.searchers import accuracy_signal, describe_limits
    from foxnas_mlflow.tracking.inputs import open_measurements
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.tracking.search import Searched, log_search

    resolved = request.texts() | {
        "latency_ms": ",".join(str(ms) for ms in request.latencies_ms if ms is not None),
        "objective": request.goal,
        "image_size": ",".join(map(str, inputs.problems[0].objective.image_sizes)),
        "data": "" if inputs.supernet is None else inputs.supernet.dataset.source,
    }
    # The run is open while the search works, so that SIGTERM finds it and ends it as KILLED.
    with (
        open_executor(request) as executor,
        entry_run(
            stage="search",
            params=resolved,
            target=inputs.target.name,
            space=inputs.predictors.space.name,
            latency_source="cost_model",
            tags={"foxnas.predictors": inputs.source, **(tags or {})},
        ) as run,
    ):
        if inputs.supernet is not None:
            from foxnas_mlflow.tracking.supernet import log_dataset

            log_dataset(run, inputs.supernet.dataset, context="evaluation")
        signal = accuracy_signal(inputs.predictors)
        if signal is not None and signal.absent:
            logger.info("Beware: %s.", signal)
        measurements = open_measurements(request.measurements, run.directory)[0] if request.measurements else []
        with _keeping(request, inputs, run) as kept:
            loop = None
            outcomes = _outcomes(request, inputs.problems, executor)
            predictors, found = inputs.predictors, tuple(Searched(o) for o in outcomes)
            if inputs.supernet is not None or request.device:
                looks = _Looks(tuple(measurements), tuple(also), tuple(beaten))
                loop = _loop(request, inputs, run, looks, found, kept, executor)
                predictors, found = loop.predictors, loop.looked
            found = _compared(request, found, executor)
            logged = log_search(
                run,
                found,
                target=inputs.target,
                predictors=predictors,
                predictors_source=inputs.source,
                params=request.values() | resolved,
                name=request.name,
                measurements=measurements if loop is None else loop.rows,
                loop=loop,
            )
        first = found[0].outcome
        return SearchResult(
            run_id=run.run_id,
            model_uri=logged.networks[0].uri,
            model_uris=[network.uri for network in logged.networks],
            predictors_uri=logged.predictors_uri,
            architecture=first.architecture.to_dict(),
            architectures=[one.outcome.architecture.to_dict() for one in found],
            latency_ms=first.latency_limit_ms,
            limits=describe_limits(first.limits) if first.limits else "",
            confidence=request.confidence,
            metrics=logged.networks[0].metrics,
            summary="\n\n".join(
                _summary(inputs, one, network, logged.note, run.run_id, loop)
                for one, network in zip(found, logged.networks, strict=True)
            ),
        )


def _open(request: SearchRequest) -> _Inputs:
    """Open predictors and supernet, and refuse what does not belong together."""
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
    problems = _problems(request, predictors)
    supernet = open_supernet(request.supernet, data=request.data, name=request.name) if request.supernet else None
    if supernet is not None and supernet.space.digest != predictors.space.digest:
        raise InvalidInputError(
            f"the supernet must have the space of the predictors, {predictors.space.name!r}",
            received=f"{supernet.uri} with {supernet.space.name!r}",
            remedy="bring predictors fitted to samples of this supernet: foxnas sample, foxnas fit",
        )
    return _Inputs(target, predictors, source, problems, supernet)


def _problems(request: SearchRequest, predictors: PredictorSet) -> tuple[Problem, ...]:
    """What is searched for under some predictors: a problem for each latency, on one objective."""
    from foxnas_mlflow.core.searchers import pose_each

    return pose_each(
        predictors,
        request.latencies_ms,
        limits=request.limits,
        objective=request.goal,
        min_accuracy=request.min_accuracy,
        confidence=request.confidence,
        image_sizes=list(request.image_size) or None,
    )


def _outcomes(request: SearchRequest, problems: Sequence[Problem], executor: Executor | None) -> list[SearchOutcome]:
    """The searches, with one front."""
    import functools
    import time

    from foxnas_mlflow.core.searchers import front_of, outcome_of
    from foxnas_mlflow.core.workers import Ready, each

    start = time.perf_counter()
    front = front_of(problems[0].objective)
    seconds = time.perf_counter() - start
    solve = functools.partial(_solve, problems[0], request.algorithm, request.evaluations, request.seed)
    solved = each(Ready(solve), [problem.limits for problem in problems], executor=executor, n=request.workers)
    return [outcome_of(p, front, one, front_seconds=seconds) for p, one in zip(problems, solved, strict=True)]


def _compared(request: SearchRequest, found: Sequence[Searched], executor: Executor | None) -> tuple[Searched, ...]:
    """The searches with all searchers under one common budget beside each."""
    import dataclasses
    import functools

    from foxnas_mlflow.core.workers import Ready, each

    if request.algorithm == "exact":
        return tuple(found)
    problems = [one.outcome.problem for one in found]
    compare = functools.partial(_compare, problems[0], min(request.evaluations, COMPARISON_EVALUATIONS), request.seed)
    results = each(Ready(compare), [problem.limits for problem in problems], executor=executor, n=request.workers)
    return tuple(dataclasses.replace(one, comparisons=r) for one, r in zip(found, results, strict=True))


def _solve(problem: Problem, algorithm: str, evaluations: int, seed: int, limits: tuple[Limit, ...]) -> Solved:
    """Solve a problem under other limits."""
    import dataclasses

    from foxnas_mlflow.core.searchers import get_searcher, solve_both

    problem = dataclasses.replace(problem, limits=limits)
    return solve_both(problem, searcher=get_searcher(algorithm), evaluations=evaluations, seed=seed)


def _compare(problem: Problem, evaluations: int, seed: int, limits: tuple[Limit, ...]) -> tuple[SearcherResult, ...]:
    """Have all searchers solve a problem under other limits."""
    import dataclasses

    from foxnas_mlflow.core.searchers import SEARCHERS

    problem = dataclasses.replace(problem, limits=limits)
    return tuple(searcher.search(problem, evaluations=evaluations, seed=seed) for searcher in SEARCHERS.values())


def _loop(
    request: SearchRequest,
    inputs: _Inputs,
    run: EntryRun,
    looks: _Looks,
    first: Sequence[Searched],
    kept: Path,
    executor: Executor | None,
) -> Loop[Searched]:
    """Search and look, round by round; what was looked at is kept, so that a loop that was cut off goes on."""
    from foxnas_mlflow.core.predictors import has_measured_latency, refit_predictors
    from foxnas_mlflow.core.searchers import closed_loop
    from foxnas_mlflow.workflows._verification import open_lookers

    known = inputs.predictors

    def search(predictors: PredictorSet) -> list[SearchOutcome]:
        if predictors is known:
            return [one.outcome for one in first]
        return _outcomes(request, _problems(request, predictors), executor)

    def look(outcome: SearchOutcome, before: Sequence[Architecture]) -> Searched:
        return _verified(request, inputs, run, outcome, looks.after(before), lookers)

    def refit(rows: Sequence[Measurement]) -> PredictorSet:
        logger.info("Fitting again with %d rows.", len(rows))
        return refit_predictors(
            known,
            rows,
            latency=has_measured_latency(looks.known),
            seed=request.seed,
            provenance={"source": f"{request.measurements or inputs.source}, and what a search looked at"},
        )

    with open_lookers(
        inputs.target,
        known.space,
        inputs.problems[0].objective.image_sizes,
        supernet=inputs.supernet,
        device=request.device,
        compiler_image=request.compiler_image,
        executor=executor,
        workers=request.workers,
        kept=kept,
    ) as lookers:
        return closed_loop(known, looks.known, rounds=request.rounds, search=search, look=look, refit=refit)


def _keeping(request: SearchRequest, inputs: _Inputs, run: EntryRun) -> AbstractContextManager[Path]:
    """Where what device and supernet say is kept until the search has its answer."""
    from contextlib import nullcontext

    from foxnas_mlflow.workflows._verification import kept_measurements

    if not request.device and inputs.supernet is None:
        return nullcontext(run.directory)
    weights = {} if inputs.supernet is None else {"supernet_digest": inputs.supernet.digest}
    # Who works, and where, changes no answer.
    asked = {key: value for key, value in request.values().items() if key not in WORKING}
    asked["device"] = where_measured(request.device)
    return kept_measurements(inputs.predictors, inputs.target, asked | weights)


@dataclass(frozen=True, eq=False)
class _Looks:
    """What is known of networks before the search looks at some; see `foxnas_mlflow.core.searchers.verify`."""

    known: tuple[Measurement, ...]
    also: tuple[Architecture, ...]
    beaten: tuple[Architecture, ...]

    def after(self, before: Sequence[Architecture]) -> _Looks:
        """With what earlier rounds looked at."""
        return _Looks(self.known, (*self.also, *before), self.beaten)


def _verified(
    request: SearchRequest, inputs: _Inputs, run: EntryRun, outcome: SearchOutcome, looks: _Looks, lookers: Lookers
) -> Searched:
    from foxnas_mlflow.tracking.search import Searched
    from foxnas_mlflow.workflows._verification import verified

    outcome, verification = verified(
        run,
        outcome,
        lookers,
        n=request.verify,
        tolerance_points=request.tolerance,
        known=looks.known,
        also=looks.also,
        beaten=looks.beaten,
        place=Searched(outcome).place(len(inputs.problems)),
    )
    return Searched(outcome, verification=verification)


def _summary(
    inputs: _Inputs, found: Searched, logged: LoggedNetwork, note: str, run_id: str, loop: Loop[Searched] | None
) -> str:
    from foxnas_mlflow.tracking.search import quantize_command

    outcome, verification, uri = found.outcome, found.verification, logged.uri
    target, problem, optimum = inputs.target.name, found.outcome.problem, found.outcome.optimum
    place = found.place(len(inputs.problems))
    place = f"{place}/" if place else ""
    weights = "none" if verification is None or verification.model is None else "trained"
    if optimum.least is None:
        exact, unit = f"{optimum.accuracy:.4f} %", "points"
    else:
        exact, unit = f"{problem.goal} {optimum.least:.6g}", problem.goal
    lines = [
        f"Found for {target}: {problem}, at confidence {outcome.objective.confidence:g}:",
        f"  {outcome.architecture}",
        f"  predicted accuracy   {outcome.accuracy:.2f} %",
        f"  predicted latency    {outcome.latency_ms:.3g} ms, at most {outcome.latency_upper_ms:.3g} ms (cost model)",
        *_verified_lines(verification),
        *([f"  rounds               {len(loop.rounds)}: {loop.reason}"] if loop is not None else []),
        *(f"  limit                {limit}: {words}" for limit, words in outcome.limit_words()),
        f"  exact optimum        {exact}, proof gap {optimum.proof_gap:.4g} {unit}",
        *([] if outcome.result.algorithm == "exact" else [_searched(outcome, unit)]),
        f"  registered           {uri} (weights={weights})",
        f"  run                  {run_id}: {place}report.html, {place}certificate.json, front.csv",
    ]
    notes = [note, *(told for predictor in inputs.predictors.accuracy for told in predictor.notes)]
    lines += [f"  note                 {told}" for told in dict.fromkeys(notes) if told]
    if weights == "trained":
        lines.append(f"Next: {quantize_command(uri, inputs.target)}")
    else:
        lines.append("Next: mlflow ui, and open report.html of the run.")
    return "\n".join(lines)


def _searched(outcome: SearchOutcome, unit: str) -> str:
    found = outcome.result
    return (
        f"  {found.algorithm:<20} {found.accuracy:.4f} %, gap {outcome.optimality_gap:.4g} {unit}, "
        f"{found.evaluations:,} evaluations in {found.seconds:.2f} s"
    )


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
    lines.append(f"  chosen               {verification.reason} (verification.csv)")
    return lines


WORKFLOW = Workflow(
    "search",
    "Find the best network under limits, with a proof, a report and registered models.",
    SearchRequest,
    run_search,
)
