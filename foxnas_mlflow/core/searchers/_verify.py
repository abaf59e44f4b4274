"""Choosing the winner on measured figures (paper section 3.3, and what it leaves to the reader).

A prediction picks the candidates, a measurement the winner: the best networks of the front near the
constraint are timed on the device and evaluated with the supernet, whichever is there. When none
meets the constraint, the best one is edited, parameter by parameter, the cheapest saving first,
until its measured latency does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, InfeasibleConstraintError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.searchers._search import SearchOutcome
from foxnas_mlflow.core.searchers._tweak import Edit, rank_edits

MAX_EDITS = 40
"""Edits of one network; they can take a large one to the smallest of a stage, not from anywhere to anywhere."""

_REACH = 1.1
"""Measured latencies up to this multiple of the constraint are mended by edits alone."""

Evaluated = tuple[float, float]
"""Accuracy in percent and its standard error in points."""


@dataclass(frozen=True)
class Candidate:
    """A network with what was predicted and what was found.

    Attributes:
        architecture: The network.
        origin: ``found``, ``front``, or the edit that made it.
        predicted_accuracy, predicted_latency_ms, predicted_latency_upper_ms: Of the predictors.
        timing: Measured latency, or None without a device.
        accuracy: Evaluated accuracy in percent, or None without a supernet.
        standard_error: Of that accuracy, in points.
        meets: Whether it meets the constraint: on the measured latency, or without a device on
            the predicted upper bound. A measurement with problems meets nothing.
        chosen: Whether it won.
    """

    architecture: Architecture
    origin: str
    predicted_accuracy: float
    predicted_latency_ms: float
    predicted_latency_upper_ms: float
    timing: Timing | None
    accuracy: float | None
    standard_error: float | None
    meets: bool
    chosen: bool = False

    @property
    def rank(self) -> tuple[float, float]:
        """What winners are chosen by: evaluated accuracy where there is one, and predicted accuracy."""
        first = self.predicted_accuracy if self.accuracy is None else self.accuracy
        return first, self.predicted_accuracy

    def to_row(self) -> dict[str, Any]:
        """A row of ``verification.csv``."""
        timing = self.timing
        return {
            "origin": self.origin,
            "chosen": self.chosen,
            "meets": self.meets,
            "image_size": self.architecture.image_size,
            "predicted_latency_ms": self.predicted_latency_ms,
            "predicted_latency_upper_ms": self.predicted_latency_upper_ms,
            "measured_latency_ms": None if timing is None else timing.latency_ms,
            "problems": "" if timing is None else "; ".join(timing.problems),
            "emulated": None if timing is None else timing.emulated,
            "device": "" if timing is None else timing.device,
            "runtime": "" if timing is None else timing.runtime,
            "n_runs": None if timing is None else timing.n_runs,
            "predicted_accuracy": self.predicted_accuracy,
            "evaluated_accuracy": self.accuracy,
            "standard_error": self.standard_error,
            "architecture": self.architecture.to_json(),
        }


def verify(
    outcome: SearchOutcome,
    latency_ms: float,
    *,
    n_candidates: int = 5,
    time: Callable[[Architecture], Timing] | None = None,
    evaluate: Callable[[Architecture], Evaluated] | None = None,
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> list[Candidate]:
    """Measure the best candidates of a search and choose among them.

    Args:
        outcome: The search.
        latency_ms: The constraint.
        n_candidates: Networks of the front to look at, the found one among them.
        time: Measures a network on the device.
        evaluate: Evaluates a network with the supernet.
        on_candidate: Told of each network that was looked at.

    Returns:
        All networks that were looked at, in order; exactly one is chosen.

    Raises:
        InfeasibleConstraintError: If not even edited networks meet the constraint on the device;
            it names the smallest latency measured.
        DeviceError: If no measurement can be trusted.
    """
    seen: list[Candidate] = []

    def look(architecture: Architecture, origin: str) -> Candidate:
        candidate = _look(outcome, architecture, origin, latency_ms, time, evaluate)
        seen.append(candidate)
        on_candidate(candidate)
        return candidate

    for architecture in candidates(outcome, latency_ms, n_candidates, measured=time is not None):
        look(architecture, "found" if architecture == outcome.architecture else "front")
    if time is not None and not any(c.meets for c in seen):
        _mend(outcome, latency_ms, seen, look)
    meeting = [i for i, candidate in enumerate(seen) if candidate.meets]
    if not meeting:
        raise InfeasibleConstraintError(
            latency_ms,
            min(c.timing.latency_ms for c in seen if c.timing is not None and not c.timing.problems),
            context=f" among {len(seen)} measured on the device",
        )
    winner = max(meeting, key=lambda i: seen[i].rank)
    seen[winner] = dataclasses.replace(seen[winner], chosen=True)
    return seen


def candidates(outcome: SearchOutcome, latency_ms: float, n: int, *, measured: bool) -> list[Architecture]:
    """The found network, and the best others of the front that may meet the constraint.

    With a device the predicted latency must meet it, without one the upper bound.
    """
    front = outcome.front
    chosen = [outcome.architecture]
    for i in reversed(np.flatnonzero(front.latency_ms <= latency_ms)):
        if len(chosen) >= n:
            break
        architecture = front.architecture(int(i))
        if architecture not in chosen and (measured or _upper(outcome, architecture) <= latency_ms):
            chosen.append(architecture)
    return chosen


def _mend(
    outcome: SearchOutcome,
    latency_ms: float,
    seen: list[Candidate],
    look: Callable[[Architecture, str], Candidate],
) -> None:
    """Look for networks that meet the constraint when no candidate does."""
    trusted = [c for c in seen if c.timing is not None and not c.timing.problems]
    if not trusted:
        problems = next(c.timing.problems for c in seen if c.timing is not None)
        raise DeviceError(
            "a network is chosen on latencies that can be trusted",
            received=f"{len(seen)} measurements with problems, the first: {problems[0]}",
            remedy="let the machine do nothing else, and see with: foxnas benchmark",
        )
    best = max(trusted, key=lambda c: c.rank)
    slowness = float(np.median([c.timing.latency_ms / c.predicted_latency_ms for c in trusted if c.timing is not None]))
    if best.timing is not None and best.timing.latency_ms > _REACH * latency_ms:
        # The device is slower than predicted: begin where the front meets the constraint there.
        front = outcome.front
        below = np.flatnonzero(front.latency_ms * slowness <= latency_ms)
        best = look(front.architecture(int(below[-1]) if len(below) else 0), f"front, device {slowness:.2f} x slower")
    architecture = best.architecture
    latency = best.timing.latency_ms if best.timing is not None else latency_ms
    met, edits = best.meets, 0
    while not met and edits < MAX_EDITS:
        # Edits are predicted one by one and measured together once they should be enough.
        names: list[str] = []
        saved = 0.0
        while saved < latency - latency_ms or not names:
            missing = (latency - latency_ms - saved) / slowness
            edit = _cheapest(rank_edits(outcome.objective.predictors, architecture), missing)
            if edit is None or edits >= MAX_EDITS:
                break
            architecture = edit.architecture
            saved -= edit.delta_latency_ms * slowness
            names.append(edit.description)
            edits += 1
        if not names:
            return
        candidate = look(architecture, "edited: " + ", ".join(names))
        met = candidate.meets
        if candidate.timing is not None and not candidate.timing.problems:
            latency = candidate.timing.latency_ms


def _cheapest(edits: Sequence[Edit], missing_ms: float) -> Edit | None:
    """The edit that loses least accuracy for each ms of the missing ones that it saves; more is no use."""
    saving = [edit for edit in edits if edit.delta_latency_ms < 0]
    missing_ms = max(missing_ms, 1e-9)
    return min(saving, key=lambda e: -e.delta_accuracy / min(-e.delta_latency_ms, missing_ms), default=None)


def _look(
    outcome: SearchOutcome,
    architecture: Architecture,
    origin: str,
    latency_ms: float,
    time: Callable[[Architecture], Timing] | None,
    evaluate: Callable[[Architecture], Evaluated] | None,
) -> Candidate:
    predictors = outcome.objective.predictors
    upper = _upper(outcome, architecture)
    timing = None
    if time is not None:
        timing = time(architecture)
        if timing.problems:
            timing = time(architecture)
    accuracy, error = (None, None) if evaluate is None else evaluate(architecture)
    meets = (upper if timing is None else timing.latency_ms) <= latency_ms
    size = architecture.image_size
    return Candidate(
        architecture=architecture,
        origin=origin,
        predicted_accuracy=float(predictors.of("accuracy", size).predict([architecture])[0]),
        predicted_latency_ms=float(predictors.of("latency_ms", size).predict([architecture])[0]),
        predicted_latency_upper_ms=upper,
        timing=timing,
        accuracy=accuracy,
        standard_error=error,
        meets=meets and (timing is None or not timing.problems),
    )


def _upper(outcome: SearchOutcome, architecture: Architecture) -> float:
    """The latency bound that the search constrained."""
    return outcome.objective.predictors.latency_bound_ms(architecture, outcome.objective.confidence)
