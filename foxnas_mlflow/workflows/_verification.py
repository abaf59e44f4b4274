"""Verifying a search: the device and the supernet say which of its candidates wins."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.files import cache_directory, json_digest, worked_on, write_atomically
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers import Candidate, Evaluated, SearchOutcome, candidates, verify
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.flavor import SubnetModel
from foxnas_mlflow.tracking.inputs import MEASUREMENTS, TrainedSupernet
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.verification import Verification, log_verification
from foxnas_mlflow.workflows._evaluation import supernet_evaluator
from foxnas_mlflow.workflows._timers import open_device, remembered

if TYPE_CHECKING:
    from foxnas_mlflow.supernet import SubnetEvaluator


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
    inputs = {"predictors": predictors.to_dict(), "target": dataclasses.asdict(target), "request": dict(request)}
    directory = cache_directory("verifications", json_digest(inputs)[:32])
    with worked_on(directory / "lock", "the same search"):
        try:
            yield directory
        except InfeasibleConstraintError:
            # That is an answer too.
            shutil.rmtree(directory)
            raise
        shutil.rmtree(directory)


def verified(
    run: EntryRun,
    outcome: SearchOutcome,
    *,
    target: Target,
    supernet: TrainedSupernet | None,
    device: str,
    compiler_image: str = "",
    n: int,
    tolerance_points: float | None = None,
    known: Sequence[Measurement] = (),
    also: Sequence[Architecture] = (),
    beaten: Sequence[Architecture] = (),
    place: str = "",
    kept: Path,
) -> tuple[SearchOutcome, Verification]:
    """Measure and evaluate the candidates of a search and choose among them.

    Args:
        run: The open run; it has the table of what was looked at, however the verification ends.
        outcome: The search.
        target: The target.
        supernet: Evaluates accuracies; None: the predicted ones count.
        device: Measures latencies; empty: the predicted upper bounds count.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        n: Networks of the front to look at.
        tolerance_points, known, also, beaten: See `foxnas_mlflow.core.searchers.verify`.
        place: Directory of the run that has the table; empty: its root.
        kept: Directory of what device and supernet said, so that a search that was cut off does not ask again.

    Returns:
        The search with the chosen network as its outcome, and the verification.

    Raises:
        InfeasibleConstraintError, DeviceError: As `foxnas_mlflow.core.searchers.verify`.
    """
    space = outcome.objective.space
    evaluator: SubnetEvaluator | None = None
    if supernet is not None:
        evaluator = supernet_evaluator(supernet, image_sizes=outcome.objective.image_sizes)
    looked: list[Candidate] = []
    with contextlib.ExitStack() as stack:
        time = None
        if device:
            timer = stack.enter_context(open_device(target, space, device, compiler_image=compiler_image))
            timer = remembered(timer, kept / MEASUREMENTS)
            if timer.n_boards > 1:
                timer.ahead(candidates(outcome, n, measured=True))
            time = timer.time
        stack.callback(lambda: log_verification(run, looked, place))
        verdict = verify(
            outcome,
            n_candidates=n,
            tolerance_points=tolerance_points,
            known=known,
            also=also,
            beaten=beaten,
            time=time,
            evaluate=None if evaluator is None else _evaluate(evaluator, kept),
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
    model = None
    if supernet is not None and evaluator is not None:
        model = SubnetModel(
            chosen.architecture,
            space,
            weights=evaluator.weights(chosen.architecture),
            preprocessing=supernet.dataset.preprocessing(chosen.architecture.image_size),
            labels=supernet.dataset.labels,
        )
    return outcome, Verification(verdict.candidates, device, supernet, model, verdict.reason, verdict.dominated)


def _evaluate(evaluator: SubnetEvaluator, kept: Path) -> Callable[[Architecture], Evaluated]:
    """The evaluator with its answers kept as they come: no network is evaluated twice, whatever ends the process."""
    directory = kept / "evaluations"
    directory.mkdir(exist_ok=True)

    def evaluate(architecture: Architecture) -> Evaluated:
        path = directory / f"{json_digest(architecture.to_dict())[:32]}.json"
        if not path.exists():
            evaluation = evaluator.evaluate(architecture)
            content = {
                "accuracy": evaluation.top1_percent,
                "standard_error": evaluation.standard_error,
                "n_images": len(evaluation.correct),
                "correct": np.packbits(evaluation.correct).tobytes().hex(),
            }
            write_atomically(path, json.dumps(content))
        known = json.loads(path.read_text(encoding="utf-8"))
        bits = np.frombuffer(bytes.fromhex(known["correct"]), dtype=np.uint8)
        correct = np.unpackbits(bits, count=known["n_images"]).astype(bool)
        return Evaluated(known["accuracy"], known["standard_error"], correct)

    return evaluate
