"""Choosing the winner on measured figures (paper section 3.3, and what it leaves to the reader).

A prediction picks the candidates, along the whole front within the limits and as far apart as the predictors can
tell networks apart; measurements and evaluations pick the winner. Predicted and evaluated accuracies are combined by
their variances (`_evidence`). Of the networks that this evidence cannot tell from the best one, the fastest wins; one
that another beats on measured latency and, beyond noise, on evaluated accuracy never does. When the found one misses
its latency, the best one is edited, parameter by parameter, the cheapest saving first, until its measured latency does.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, InfeasibleConstraintError, InvalidInputError
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.searchers._evidence import (
    BoolArray,
    Combined,
    FloatArray,
    combine,
    dominated,
    evaluation_covariance,
    paired_difference,
    prediction_covariance,
)
from foxnas_mlflow.core.searchers._limited import solve
from foxnas_mlflow.core.searchers._limits import Limit
from foxnas_mlflow.core.searchers._prices import feasible_points
from foxnas_mlflow.core.searchers._search import SearchOutcome
from foxnas_mlflow.core.searchers._tweak import Edit, rank_edits

MAX_EDITS = 40
"""Edits of one network; they can take a large one to the smallest of a stage, not from anywhere to anywhere."""

_REACH = 1.1
"""Measured latencies up to this multiple of the constraint are mended by edits alone."""

_AGAIN = 10
"""Most networks that were measured before and are looked at again because they beat the winner."""

SPACING = 1.5
"""Standard deviations of a predicted difference between networks of a front that are looked at. The closer they are,
the more often a faster one that was looked at is truly better than the chosen one (``benchmarks/verification.py``)."""

_TIE, _TIED_AGAIN = 0.01, 2
"""Measured latencies closer than this share are a tie: each of the tied networks is measured so many times more.
Otherwise the winner among equals would be the one with a lucky measurement."""

_FRONT_POINTS = 400
"""Most points of a front among which candidates are chosen."""


class Evaluated(NamedTuple):
    """What a supernet says of a network.

    Attributes:
        accuracy: In percent.
        standard_error: In points.
        correct: Whether each image was answered right, shape (n_images,), the same images for every network; None
            where that is not known, and comparisons are then not paired.
    """

    accuracy: float
    standard_error: float
    correct: BoolArray | None = None


@dataclass(frozen=True)
class Candidate:
    """A network with what was predicted and what was found.

    Attributes:
        architecture: The network.
        origin: ``found``, ``front``, or the edit that made it.
        predicted_accuracy, predicted_latency_ms: Of the predictors.
        amounts: Every quantity of the objective: upper bounds of predicted ones, counts of the others.
        timing: Measured latency, or None without a device.
        evaluated: What the supernet says, or None without one.
        meets: Whether it meets the limits: on the measured latency, or without a device on
            the predicted upper bound. A measurement with problems meets nothing.
        combined_accuracy, combined_standard_error: Of prediction and evaluation together, in percent and
            points; None until all candidates were looked at.
        chosen: Whether it won.
    """

    architecture: Architecture
    origin: str
    predicted_accuracy: float
    predicted_latency_ms: float
    amounts: Mapping[str, float]
    timing: Timing | None
    evaluated: Evaluated | None
    meets: bool
    combined_accuracy: float | None = None
    combined_standard_error: float | None = None
    chosen: bool = False

    @property
    def predicted_latency_upper_ms(self) -> float:
        """The latency bound that the search limited."""
        return self.amounts["latency_ms"]

    @property
    def accuracy(self) -> float | None:
        """Evaluated accuracy in percent, or None without a supernet."""
        return None if self.evaluated is None else self.evaluated.accuracy

    @property
    def standard_error(self) -> float | None:
        """Of the evaluated accuracy, in points."""
        return None if self.evaluated is None else self.evaluated.standard_error

    @property
    def speed_ms(self) -> float:
        """The latency that it is judged by: the measured one, or without a device the predicted one."""
        return self.predicted_latency_ms if self.timing is None else self.timing.latency_ms

    @property
    def rank(self) -> tuple[float, float]:
        """What networks are ordered by: combined or evaluated accuracy where there is one, and the predicted one."""
        known = self.combined_accuracy if self.combined_accuracy is not None else self.accuracy
        return self.predicted_accuracy if known is None else known, self.predicted_accuracy

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
            "combined_accuracy": self.combined_accuracy,
            "combined_standard_error": self.combined_standard_error,
            **{f"limited_{quantity}": value for quantity, value in self.amounts.items() if quantity != "latency_ms"},
            "architecture": self.architecture.to_json(),
        }


@dataclass(frozen=True)
class Verdict:
    """The winner, and why.

    Attributes:
        candidates: All networks that were looked at, in order; exactly one is chosen.
        reason: One sentence: what the winner was chosen by, and what slower networks would have bought.
        beaten_by: The network that beats the winner on measured latency and, beyond noise, on evaluated accuracy, of
            all that were looked at now or before; None where no network does.
        tied: Candidates among which the measured latency decided, and too little of it; fewer than two: none did.
    """

    candidates: tuple[Candidate, ...]
    reason: str
    beaten_by: Architecture | None = None
    tied: tuple[Candidate, ...] = ()

    @property
    def dominated(self) -> bool:
        """Whether a network that was looked at beats the winner on both measured figures."""
        return self.beaten_by is not None

    @property
    def chosen(self) -> Candidate:
        """The winner."""
        return next(candidate for candidate in self.candidates if candidate.chosen)


def verify(
    outcome: SearchOutcome,
    *,
    n_candidates: int = 5,
    tolerance_points: float | None = None,
    time: Callable[[Architecture], Timing] | None = None,
    again: Callable[[Architecture], Timing] | None = None,
    evaluate: Callable[[Architecture], Evaluated] | None = None,
    known: Sequence[Measurement] = (),
    also: Sequence[Architecture] = (),
    beaten: Sequence[Architecture] = (),
    on_candidate: Callable[[Candidate], None] = lambda candidate: None,
) -> Verdict:
    """Measure the best candidates of a search and choose among them.

    A network of `known` whose figures beat the winner's is looked at again, and networks among which the choice is one
    of latencies that lie too close are measured again; the choice is then made anew.

    Args:
        outcome: The search; its limits are what the winner meets.
        n_candidates: Networks of the front to look at, the found one among them.
        tolerance_points: The fastest network that is at most so much less accurate than the best one wins; None: one
            standard error of the difference of the two; 0: the best one itself.
        time: Measures a network on the device.
        again: Measures a network once more, where `time` remembers what it measured; None: `time` does.
        evaluate: Evaluates a network with the supernet.
        known: Networks that were measured and evaluated before; those of the device that `time` measures on count.
        also: Networks to look at beside those of the front.
        beaten: Networks that another one is known to beat; they win only where no other meets the limits.
        on_candidate: Told of each network that was looked at.

    Raises:
        InvalidInputError: If the tolerance is negative.
        InfeasibleConstraintError: If not even edited networks meet the constraint on the device;
            it names the smallest latency measured.
        DeviceError: If no measurement can be trusted.
    """
    if tolerance_points is not None and tolerance_points < 0:
        raise InvalidInputError("tolerance_points must be 0 or more, or auto", received=tolerance_points)
    seen: list[Candidate] = []

    def look(architecture: Architecture, origin: str) -> Candidate:
        candidate = _look(outcome, architecture, origin, time, evaluate)
        seen.append(candidate)
        on_candidate(candidate)
        return candidate

    for architecture in candidates(outcome, n_candidates, measured=time is not None, seen=also):
        look(architecture, "found" if architecture == outcome.architecture else "front")
    for architecture in also:
        if all(c.architecture != architecture for c in seen):
            look(architecture, "compared before")

    def mend() -> None:
        if time is not None and not seen[0].meets:
            trusted = _trusted(seen)
            if np.isfinite(outcome.problem.room[0]):
                # Slower than predicted: what the limit still allows lies between the networks that were looked at.
                _mend(outcome, float(outcome.problem.room[0]), trusted, look)
        if not any(c.meets for c in seen):
            raise InfeasibleConstraintError(
                float(outcome.problem.room[0]),
                min(c.timing.latency_ms for c in seen if c.timing is not None and not c.timing.problems),
                context=f" among {len(seen)} measured on the device",
            )

    mend()
    most, settled = len(seen) + _AGAIN, set[Architecture]()
    while True:
        verdict = choose(outcome, seen, tolerance_points=tolerance_points, known=known, beaten=beaten)
        better = verdict.beaten_by
        tied = [c.architecture for c in verdict.tied if c.architecture not in settled]
        if better is not None and len(seen) < most and all(c.architecture != better for c in seen):
            look(better, "measured before")
        elif time is not None and tied:
            # In turn, so that what changes on the device meanwhile is the same for all.
            more = [[(again or time)(architecture) for architecture in tied] for _ in range(_TIED_AGAIN)]
            others = dict(zip(tied, zip(*more, strict=True), strict=True))
            for i, candidate in enumerate(seen):
                if candidate.architecture in others and candidate.timing is not None:
                    seen[i] = _timed(outcome, candidate, candidate.timing.with_others(others[candidate.architecture]))
            settled.update(tied)
            if not any(c.meets for c in seen):
                mend()
        else:
            return verdict


def choose(
    outcome: SearchOutcome,
    seen: Sequence[Candidate],
    *,
    tolerance_points: float | None = None,
    known: Sequence[Measurement] = (),
    beaten: Sequence[Architecture] = (),
) -> Verdict:
    """Choose among networks that were looked at, one of which meets the limits at least, as `verify` does."""
    problem, evidence = outcome.problem, _combined(outcome, seen)
    meeting = [i for i, candidate in enumerate(seen) if candidate.meets]
    latencies = [None if (timing := seen[i].timing) is None else timing.latency_ms for i in meeting]

    def evaluated_more(j: int, i: int) -> tuple[float, float] | None:
        """Of j than i, where j could stand in its place."""
        return (
            _evaluated_more(seen[j], seen[i]) if problem.stands_in(seen[j].architecture, seen[i].architecture) else None
        )

    standing = [
        i for k, i in enumerate(meeting) if not dominated(latencies, [evaluated_more(j, i) for j in meeting], k)
    ]
    standing = [i for i in standing if seen[i].architecture not in beaten] or standing
    tied: list[int] = []
    accuracy = [seen[i].predicted_accuracy if evidence is None else float(evidence.mean[i]) for i in range(len(seen))]
    if problem.goal != "accuracy" and problem.min_accuracy is not None:
        enough = [i for i in standing if accuracy[i] >= problem.min_accuracy]
        # Where no network is as accurate as asked once it was evaluated, the most accurate one is nearest to it.
        winner = min(
            enough, key=lambda i: _goal(seen[i], problem.goal), default=max(standing, key=lambda i: accuracy[i])
        )
        reason = f"of {len(seen)} networks it has least {problem.goal} at an accuracy of {problem.min_accuracy:g} %"
        if not enough:
            reason = (
                f"no network of {len(seen)} was evaluated at {problem.min_accuracy:g} %: this is the most accurate one"
            )
    else:
        best = max(standing, key=lambda i: (accuracy[i], seen[i].predicted_accuracy))
        winner, reason, tied = _fastest_alike(seen, standing, best, evidence, tolerance_points)
    chosen = [
        dataclasses.replace(
            candidate,
            chosen=i == winner,
            combined_accuracy=None if evidence is None else float(evidence.mean[i]),
            combined_standard_error=None if evidence is None else float(evidence.standard_error[i]),
        )
        for i, candidate in enumerate(seen)
    ]
    beaten_by = _beaten_by(outcome, seen, seen[winner], known)
    return Verdict(tuple(chosen), reason, beaten_by, tuple(chosen[i] for i in tied))


def _beaten_by(
    outcome: SearchOutcome, seen: Sequence[Candidate], winner: Candidate, known: Sequence[Measurement]
) -> Architecture | None:
    """The network, looked at now or before, that beats the winner on both measured figures; the most accurate of them.

    It must be an answer itself: within all other limits, with no more of what is to be least, and measured without
    problems. What was looked at again counts with its newest figures. Earlier evaluations err by as much as the
    winner's.
    """
    problem, timing, own = outcome.problem, winner.timing, winner.evaluated
    if timing is None or own is None:
        return None
    better: list[tuple[float, Architecture]] = []
    for c in seen:
        more = _evaluated_more(c, winner)
        if (
            c.timing is not None
            and not c.timing.problems
            and c.timing.latency_ms < timing.latency_ms
            and more is not None
            and more[0] > more[1]
            and problem.stands_in(c.architecture, winner.architecture)
        ):
            better.append((more[0], c.architecture))
    looked = {c.architecture for c in seen}
    for row in known:
        if (
            row.architecture not in looked
            and row.accuracy is not None
            and row.timing is not None
            and (row.timing.device, row.timing.source) == (timing.device, timing.source)
            and row.timing.latency_ms < timing.latency_ms
            and row.accuracy - own.accuracy > np.sqrt(2) * own.standard_error
            and problem.stands_in(row.architecture, winner.architecture)
        ):
            better.append((row.accuracy - own.accuracy, row.architecture))
    return max(better, key=lambda pair: pair[0], default=(0.0, None))[1]


def _fastest_alike(
    seen: Sequence[Candidate], standing: Sequence[int], best: int, evidence: Combined | None, tolerance: float | None
) -> tuple[int, str, list[int]]:
    """The fastest network that cannot be told from the best one, the sentence that says so, and what it ties with."""
    if evidence is None:
        gaps = {i: (seen[best].predicted_accuracy - seen[i].predicted_accuracy, 0.0) for i in standing}
    else:
        gaps = {i: evidence.difference(best, i) for i in standing}
    alike = [i for i in standing if i == best or gaps[i][0] <= (gaps[i][1] if tolerance is None else tolerance)]
    winner = min(alike, key=lambda i: (seen[i].speed_ms, -seen[i].predicted_accuracy))
    tied = [i for i in alike if seen[i].timing is not None and seen[i].speed_ms <= (1 + _TIE) * seen[winner].speed_ms]
    tied = tied if len(tied) > 1 else []
    if winner == best:
        return winner, f"of {len(seen)} networks it is the most accurate that meets the limits", tied
    gap, error = gaps[winner]
    width = "one standard error" if tolerance is None else f"{tolerance:g} points"
    reason = (
        f"the fastest within {width} of the most accurate of {len(seen)} networks, which would have bought "
        f"{gap:.2f} points (standard error {error:.2f}) for {seen[best].speed_ms - seen[winner].speed_ms:.3g} ms more"
    )
    return winner, reason, tied


def _combined(outcome: SearchOutcome, seen: Sequence[Candidate]) -> Combined | None:
    """What predictions and evaluations say together, where all were evaluated."""
    evaluated = [c.evaluated for c in seen if c.evaluated is not None]
    if len(evaluated) < len(seen):
        return None
    errors = [e.standard_error for e in evaluated]
    predicted = np.array([c.predicted_accuracy for c in seen])
    return combine(
        predicted,
        prediction_covariance(
            outcome.objective.predictors, [c.architecture for c in seen], evaluation_error=float(np.median(errors))
        ),
        np.array([e.accuracy for e in evaluated]),
        evaluation_covariance(errors, [e.correct for e in evaluated]),
    )


def _evaluated_more(first: Candidate, second: Candidate) -> tuple[float, float] | None:
    """How much more accurate the first was evaluated than the second, with the standard error of the difference."""
    a, b = first.evaluated, second.evaluated
    if a is None or b is None:
        return None
    if a.correct is not None and b.correct is not None and a.correct.shape == b.correct.shape:
        return paired_difference(a.correct, b.correct)
    return a.accuracy - b.accuracy, float(np.hypot(a.standard_error, b.standard_error))


def _goal(candidate: Candidate, goal: str) -> float:
    return candidate.speed_ms if goal == "latency_ms" else candidate.amounts[goal]


def candidates(
    outcome: SearchOutcome, n: int, *, measured: bool, seen: Sequence[Architecture] = ()
) -> list[Architecture]:
    """The found network, and others of the front within the limits, as far apart as predictors can tell them.

    From the most accurate one down, a network is taken that is predicted `SPACING` standard deviations of the
    difference from every other one that is looked at. Where the front ends sooner, its end and what lies between
    are added, unless networks were looked at before. With a device the predicted latency must meet its limit, without
    one the upper bound. Where least of a quantity was asked for, they are its optima at accuracies higher by steps.

    Args:
        outcome: The search.
        n: How many, the found one among them.
        measured: Whether a device measures them.
        seen: Networks that were looked at before.
    """
    if outcome.problem.goal != "accuracy":
        return _ladder(outcome, n)
    found = outcome.architecture
    looked = [found, *(a for a in dict.fromkeys(seen) if a != found)]
    points = [*looked, *(a for a in _front_within(outcome, n, measured=measured) if a not in looked)]
    accuracy = _accuracies(outcome, points)
    covariance = prediction_covariance(outcome.objective.predictors, points)
    sd = np.sqrt(np.maximum(np.diag(covariance)[:, None] + np.diag(covariance) - 2 * covariance, 0.0))
    order = np.argsort(-accuracy, kind="stable")
    chosen, taken = [0], list(range(len(looked)))
    for i in map(int, order):
        if len(chosen) >= n:
            break
        if i not in taken and (np.abs(accuracy[i] - accuracy[taken]) >= SPACING * sd[i, taken]).all():
            chosen.append(i)
            taken.append(i)
    if len(looked) == 1:
        rank = np.argsort(order)
        while len(chosen) < min(n, len(points)):
            # The front is spent: its end first, then the middle of the widest stretch without a candidate.
            free = [i for i in map(int, order) if i not in chosen]
            distance = [min(abs(int(rank[i] - rank[j])) for j in chosen) for i in free]
            chosen.append(free[int(np.argmax(distance))])
    return [points[i] for i in chosen[:n]]


def _front_within(outcome: SearchOutcome, n: int, *, measured: bool) -> list[Architecture]:
    """Networks of the front that may meet the limits."""
    problem = outcome.problem
    if not problem.only_latency:
        return [point.architecture for point in feasible_points(problem, outcome.optimum, 2 * n)]
    front, limit = outcome.front, problem.limits[0].value
    inside = np.flatnonzero(front.latency_ms <= limit)
    inside = inside[np.unique(np.linspace(0, len(inside) - 1, _FRONT_POINTS).astype(int))] if len(inside) else inside
    # The neighbours just under the limit are all kept: which of them meets it only the device knows.
    architectures = [front.architecture(int(i)) for i in inside]
    return [a for a in architectures if measured or outcome.objective.amounts(a)["latency_ms"] <= limit]


def _ladder(outcome: SearchOutcome, n: int) -> list[Architecture]:
    """Optima of the goal at accuracies that rise by what the predictors can tell apart."""
    problem, chosen = outcome.problem, [outcome.architecture]
    step = float(np.sqrt(2 * prediction_covariance(outcome.objective.predictors, chosen)[0, 0]))
    for k in range(1, n):
        try:
            higher = solve(dataclasses.replace(problem, min_accuracy=(problem.min_accuracy or 0.0) + k * step))
        except InfeasibleConstraintError:
            break
        if higher.architecture not in chosen:
            chosen.append(higher.architecture)
    return chosen


def _mend(
    outcome: SearchOutcome,
    latency_ms: float,
    trusted: Sequence[Candidate],
    look: Callable[[Architecture, str], Candidate],
) -> None:
    """Look for networks that meet the constraint when the found one does not."""
    best = max(trusted, key=lambda c: c.predicted_accuracy)
    slowness = float(np.median([c.timing.latency_ms / c.predicted_latency_ms for c in trusted if c.timing is not None]))
    if best.timing is not None and best.timing.latency_ms > _REACH * latency_ms:
        # The device is slower than predicted: begin where the constraint is met there.
        best = look(_within(outcome, latency_ms / slowness), f"front, device {slowness:.2f} x slower")
    architecture = best.architecture
    latency = best.timing.latency_ms if best.timing is not None else latency_ms
    met, edits = best.meets, 0
    while not met and edits < MAX_EDITS:
        # Edits are predicted one by one and measured together once they should be enough.
        names: list[str] = []
        saved = 0.0
        while saved < latency - latency_ms or not names:
            missing = (latency - latency_ms - saved) / slowness
            edits_here = rank_edits(outcome.objective.predictors, architecture)
            edit = _cheapest([e for e in edits_here if outcome.problem.allows(e.architecture)], missing)
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


def _trusted(seen: Sequence[Candidate]) -> list[Candidate]:
    """Those whose latency can be trusted.

    Raises:
        DeviceError: If there is none.
    """
    timings = [c.timing for c in seen if c.timing is not None]
    trusted = [c for c in seen if c.timing is not None and not c.timing.problems]
    if timings and not trusted:
        raise DeviceError(
            "a network is chosen on latencies that can be trusted",
            received=f"{len(timings)} measurements with problems, the first: {timings[0].problems[0]}",
            remedy="let the machine do nothing else, and see with: foxnas benchmark",
        )
    return trusted


def _within(outcome: SearchOutcome, latency_ms: float) -> Architecture:
    """The most accurate network of a predicted latency within the other limits; the fastest where there is none."""
    problem, front = outcome.problem, outcome.front
    if not problem.only_latency:
        limits = (Limit("latency_ms", latency_ms), *(x for x in problem.limits if x.quantity != "latency_ms"))
        with contextlib.suppress(InfeasibleConstraintError):
            return solve(dataclasses.replace(problem, limits=limits)).architecture
    below = np.flatnonzero(front.latency_ms <= latency_ms)
    return front.architecture(int(below[-1]) if len(below) else 0)


def _cheapest(edits: Sequence[Edit], missing_ms: float) -> Edit | None:
    """The edit that loses least accuracy for each ms of the missing ones that it saves; more is no use."""
    saving = [edit for edit in edits if edit.delta_latency_ms < 0]
    missing_ms = max(missing_ms, 1e-9)
    return min(saving, key=lambda e: -e.delta_accuracy / min(-e.delta_latency_ms, missing_ms), default=None)


def _look(
    outcome: SearchOutcome,
    architecture: Architecture,
    origin: str,
    time: Callable[[Architecture], Timing] | None,
    evaluate: Callable[[Architecture], Evaluated] | None,
) -> Candidate:
    predictors, size = outcome.objective.predictors, architecture.image_size
    timing = None
    if time is not None:
        timing = time(architecture)
        if timing.problems:
            timing = time(architecture)
    candidate = Candidate(
        architecture=architecture,
        origin=origin,
        predicted_accuracy=_accuracy(outcome, architecture),
        predicted_latency_ms=float(predictors.of("latency_ms", size).predict([architecture])[0]),
        amounts=outcome.objective.amounts(architecture),
        timing=None,
        evaluated=None if evaluate is None else evaluate(architecture),
        meets=False,
    )
    return _timed(outcome, candidate, timing)


def _timed(outcome: SearchOutcome, candidate: Candidate, timing: Timing | None) -> Candidate:
    """The candidate with a latency, and whether it meets the limits with it."""
    judged = candidate.amounts if timing is None else {**candidate.amounts, "latency_ms": timing.latency_ms}
    meets = all(judged[limit.quantity] <= limit.value for limit in outcome.limits)
    return dataclasses.replace(candidate, timing=timing, meets=meets and (timing is None or not timing.problems))


def _accuracy(outcome: SearchOutcome, architecture: Architecture) -> float:
    return float(_accuracies(outcome, [architecture])[0])


def _accuracies(outcome: SearchOutcome, architectures: Sequence[Architecture]) -> FloatArray:
    """Predicted accuracies in percent, shape (k,)."""
    sizes = np.array([a.image_size for a in architectures])
    accuracy = np.empty(len(sizes))
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        predictor = outcome.objective.predictors.of("accuracy", int(size))
        accuracy[rows] = predictor.predict([architectures[int(i)] for i in rows])
    return accuracy
