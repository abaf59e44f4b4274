"""The closed loop: search, look at networks along the front, learn from them, and search again.

Predictors know least where it matters most: at the front, which few of the sampled networks lie on. What was looked
at there is learnt from like any other row; networks are looked at for what is predicted of them, never for what was
evaluated, so that luck does not select the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import PredictorSet
from foxnas_mlflow.core.searchers._search import SearchOutcome
from foxnas_mlflow.core.searchers._verify import Candidate

LEAST_GAIN = 0.1
"""Least gain that another round is done for, in standard errors of an evaluation (``benchmarks/verification.py``)."""


class Looked(Protocol):
    """Networks that were looked at; one of them is chosen."""

    @property
    def candidates(self) -> tuple[Candidate, ...]: ...
    @property
    def chosen(self) -> Candidate: ...


L = TypeVar("L", bound=Looked)


@dataclass(frozen=True)
class Round:
    """One round of the loop.

    Attributes:
        n_rows: Rows that its predictors were fitted to; for the first round those that were given.
        n_new: Networks that it looked at for the first time.
        chosen: The network that it chose, for each search.
        kendall_tau: Cross-validated rank correlation of its accuracy predictor, or None where it is not known.
    """

    n_rows: int
    n_new: int
    chosen: tuple[Candidate, ...]
    kendall_tau: float | None


@dataclass(frozen=True)
class Loop(Generic[L]):
    """What a closed loop found.

    Attributes:
        predictors: Those of the round that chose.
        looked: What was looked at, for each search: all networks of all rounds.
        rounds: All rounds, in order.
        rows: All rows that are known now: those given, and the networks looked at with their newest figures.
        reason: Why it ended, in words.
    """

    predictors: PredictorSet
    looked: tuple[L, ...]
    rounds: tuple[Round, ...]
    rows: tuple[Measurement, ...]
    reason: str


def closed_loop(
    predictors: PredictorSet,
    rows: Sequence[Measurement],
    *,
    rounds: int,
    search: Callable[[PredictorSet], Sequence[SearchOutcome]],
    look: Callable[[SearchOutcome, Sequence[Architecture]], L],
    refit: Callable[[Sequence[Measurement]], PredictorSet],
) -> Loop[L]:
    """Search and learn until the found networks stay, nothing is left to gain, or the rounds are spent.

    A gain that one evaluation could not tell from noise is no reason to end: networks differ from their predictions by
    more than that, and every further one that is looked at may be the better one. One of less than a tenth of that
    noise is: it brings another network of the same latency, of which the better one is found by chance (docs/METHOD.md,
    section 4).

    Args:
        predictors: Those of the first round.
        rows: What they were fitted to.
        rounds: Most rounds.
        search: The searches under some predictors: the same number each time.
        look: Measures and evaluates networks along the front of a search, and chooses among them and those given,
            which earlier rounds looked at.
        refit: Predictors of rows.

    Raises:
        InvalidInputError: If rounds is not positive.
    """
    if rounds < 1:
        raise InvalidInputError("rounds must be positive", received=rounds)
    table = {row.architecture: row for row in rows}
    seen: list[Architecture] = []
    done: list[Round] = []
    outcomes, looked = tuple(search(predictors)), tuple[L, ...]()
    used, reason = predictors, "the rounds are spent"
    for number in range(rounds):
        if number:
            predictors = refit(list(table.values()))
            found = tuple(search(predictors))
            if all(not promises_more(o, v.chosen) for o, v in zip(found, looked, strict=True)):
                reason = "refitted predictors promise no gain worth another round"
                break
            outcomes, used = found, predictors
        before = [verdict.chosen.architecture for verdict in looked]
        n_rows, n_seen, verdicts = len(table), len(seen), []
        for outcome in outcomes:
            verdicts.append(look(outcome, tuple(seen)))
            for candidate in verdicts[-1].candidates:
                if candidate.architecture not in seen:
                    seen.append(candidate.architecture)
                table[candidate.architecture] = _learnt(candidate, table.get(candidate.architecture))
        looked = tuple(verdicts)
        chosen = tuple(verdict.chosen for verdict in looked)
        tau = used.accuracy[-1].metrics.get("kendall_tau") if used.accuracy else None
        done.append(Round(n_rows, len(seen) - n_seen, chosen, tau))
        if before == [candidate.architecture for candidate in chosen]:
            reason = "the found network stays"
            break
    return Loop(used, looked, tuple(done), tuple(table.values()), reason)


def _learnt(candidate: Candidate, before: Measurement | None) -> Measurement:
    """The row of a network that was looked at; a latency that cannot be trusted does not replace an earlier one."""
    row = Measurement.of(candidate.architecture, candidate.timing, candidate.accuracy)
    if before is None or row.latency_ms is not None:
        return row
    return replace(before, accuracy=before.accuracy if row.accuracy is None else row.accuracy)


def promises_more(outcome: SearchOutcome, chosen: Candidate) -> bool:
    """Whether predictors expect a network to be more accurate than the chosen one, by `LEAST_GAIN` at least.

    Args:
        outcome: A search under the predictors; for a goal other than accuracy the answer is yes.
        chosen: A network that was chosen before.
    """
    if outcome.problem.goal != "accuracy":
        return True
    predictor = outcome.objective.predictors.of("accuracy", chosen.architecture.image_size)
    gain = outcome.optimum.accuracy - float(predictor.predict([chosen.architecture])[0])
    # The same network is predicted once by sums over stages and once as a whole.
    return gain > max(LEAST_GAIN * (chosen.standard_error or 0.0), 1e-9)
