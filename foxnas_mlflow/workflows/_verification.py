"""Verifying a search: the device and the supernet say which of its candidates wins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.files import cache_directory, json_digest, worked_on, write_atomically
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers import Candidate, Evaluated, SearchOutcome, candidates, verify
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data import packed, unpacked
from foxnas_mlflow.flavor import SubnetModel
from foxnas_mlflow.tracking.inputs import MEASUREMENTS, TrainedSupernet
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.verification import Verification, log_verification
from foxnas_mlflow.workflows._evaluation import Evaluators, supernet_evaluators
from foxnas_mlflow.workflows._timers import open_device, remembered

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from foxnas_mlflow.core.workers import Executor


@contextlib.contextmanager
def kept_measurements(predictors: PredictorSet, target: Target, request: Mapping[str, Any]) -> Iterator[Path]:
    """A directory that the same search finds again until it has its answer, whatever ends the process before.

    Args:
        predictors: What is searched on.
        target: The target.
        request: Parameters of the search, JSON values.

    Raises:
        InvalidInputError: If another process works on the same search.
    """
    inputs = {"predictors": predictors.to_dict(), "target": target.to_dict(), "request": dict(request)}
    directory = cache_directory("verifications", json_digest(inputs)[:32])
    with worked_on(directory / "lock", "the same search"):
        try:
            yield directory
        except InfeasibleConstraintError:
            # That is an answer too.
            shutil.rmtree(directory)
            raise
        shutil.rmtree(directory)


@dataclasses.dataclass(frozen=True)
class Lookers:
    """Who says of networks how fast and how accurate they are.

    Attributes:
        supernet: Evaluates accuracies; None: the predicted ones count.
        device: Measures latencies; empty: the predicted upper bounds count.
        evaluate: The supernet's answer, or None.
        time: The device's, or None.
        again: The device's once more: `time` remembers.
        weights: A network's inherited weights, or None.
        ahead: Has networks looked at, several at once where there are several boards or workers, so that who asks
            for one later has the answer at once.
    """

    supernet: TrainedSupernet | None
    device: str
    evaluate: Callable[[Architecture], Evaluated] | None
    time: Callable[[Architecture], Timing] | None
    again: Callable[[Architecture], Timing] | None
    weights: Callable[[Architecture], Mapping[str, NDArray[Any]]] | None
    ahead: Callable[[Sequence[Architecture]], None]


@contextlib.contextmanager
def open_lookers(
    target: Target,
    space: SearchSpace,
    image_sizes: Sequence[int],
    *,
    supernet: TrainedSupernet | None,
    device: str,
    compiler_image: str = "",
    executor: Executor | None = None,
    workers: int = 1,
    kept: Path,
) -> Iterator[Lookers]:
    """Open what there is of supernet and device.

    Args:
        target: The target.
        space: The space of the networks.
        image_sizes: Image sizes in pixels that may be asked for.
        supernet, device: As of `Lookers`.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        executor, workers: Where networks are evaluated and made, and by how many at once; None: here, one by one.
        kept: Directory of what device and supernet said, so that a search that was cut off does not ask again.

    Raises:
        DeviceError: If the device cannot be reached.
    """
    with contextlib.ExitStack() as stack:
        evaluators = timer = None
        if supernet is not None:
            evaluators = stack.enter_context(
                supernet_evaluators(supernet, image_sizes=image_sizes, n=workers, executor=executor)
            )
        if device:
            opened = open_device(
                target, space, device, compiler_image=compiler_image, executor=executor, workers=workers
            )
            timer = remembered(stack.enter_context(opened), kept / MEASUREMENTS)
        evaluate = None if evaluators is None else _evaluate(evaluators, kept)

        def ahead(architectures: Sequence[Architecture]) -> None:
            # One after the other: evaluating here would disturb what is measured here.
            if evaluate is not None and evaluators is not None and evaluators.n > 1:
                for _ in as_finished(evaluate, architectures, n=evaluators.n):
                    pass
            if timer is not None and timer.n_boards > 1:
                timer.ahead(architectures)

        yield Lookers(
            supernet,
            device,
            evaluate,
            None if timer is None else timer.time,
            None if timer is None else timer.again,
            None if evaluators is None else evaluators.weights,
            ahead,
        )


def verified(
    run: EntryRun,
    outcome: SearchOutcome,
    lookers: Lookers,
    *,
    n: int,
    tolerance_points: float | None = None,
    known: Sequence[Measurement] = (),
    also: Sequence[Architecture] = (),
    beaten: Sequence[Architecture] = (),
    place: str = "",
) -> tuple[SearchOutcome, Verification]:
    """Measure and evaluate the candidates of a search and choose among them.

    Args:
        run: The open run; it has the table of what was looked at, however the verification ends.
        outcome: The search.
        lookers: What device and supernet say.
        n: Networks of the front to look at.
        tolerance_points, known, also, beaten: See `foxnas_mlflow.core.searchers.verify`.
        place: Directory of the run that has the table; empty: its root.

    Returns:
        The search with the chosen network as its outcome, and the verification.

    Raises:
        InfeasibleConstraintError, DeviceError: As `foxnas_mlflow.core.searchers.verify`.
    """
    looked: list[Candidate] = []
    lookers.ahead(candidates(outcome, n, measured=lookers.time is not None, seen=also))
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: log_verification(run, looked, place))
        verdict = verify(
            outcome,
            n_candidates=n,
            tolerance_points=tolerance_points,
            known=known,
            also=also,
            beaten=beaten,
            time=lookers.time,
            again=lookers.again,
            evaluate=lookers.evaluate,
            on_candidate=looked.append,
        )
        looked[:] = verdict.candidates
    chosen = verdict.chosen
    if chosen.architecture != outcome.architecture:
        outcome = dataclasses.replace(
            outcome,
            architecture=chosen.architecture,
            found_by="verification",
            accuracy=chosen.predicted_accuracy,
            latency_ms=chosen.predicted_latency_ms,
            amounts=chosen.amounts,
        )
    model, supernet = None, lookers.supernet
    if supernet is not None and lookers.weights is not None:
        model = SubnetModel(
            chosen.architecture,
            outcome.objective.space,
            weights=lookers.weights(chosen.architecture),
            preprocessing=supernet.dataset.preprocessing(chosen.architecture.image_size),
            labels=supernet.dataset.labels,
        )
    return outcome, Verification(verdict.candidates, lookers.device, supernet, model, verdict.reason, verdict.dominated)


def _evaluate(evaluators: Evaluators, kept: Path) -> Callable[[Architecture], Evaluated]:
    """The evaluators with their answers kept as they come: no network is evaluated twice, whatever ends the process."""
    directory = kept / "evaluations"
    directory.mkdir(exist_ok=True)

    def evaluate(architecture: Architecture) -> Evaluated:
        path = directory / f"{json_digest(architecture.to_dict())[:32]}.json"
        if not path.exists():
            evaluation = evaluators.evaluate(architecture)
            content = {
                "accuracy": evaluation.top1_percent,
                "standard_error": evaluation.standard_error,
                "n_images": len(evaluation.correct),
                "correct": packed(evaluation.correct),
            }
            write_atomically(path, json.dumps(content))
        known = json.loads(path.read_text(encoding="utf-8"))
        return Evaluated(known["accuracy"], known["standard_error"], unpacked(known["correct"], known["n_images"]))

    return evaluate
