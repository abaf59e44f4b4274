"""The closed loop on simulated truth: what it learns from, when it ends, and that it goes on from what is known."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import PredictorSet, fit_predictors, reference_predictors
from foxnas_mlflow.core.searchers import (
    Evaluated,
    Loop,
    SearchOutcome,
    Verdict,
    closed_loop,
    promises_more,
    search,
    verify,
)
from foxnas_mlflow.core.searchers._rounds import LEAST_GAIN
from foxnas_mlflow.core.space import CPU_SPACE

LIMIT_MS = 60.0
KNOWN = reference_predictors("rpi4")


def truth(architecture: Architecture, misfit: float) -> tuple[float, float]:
    """Accuracy and latency: those of the packaged predictors, with a misfit of each network's own."""
    rng = np.random.default_rng(zlib.crc32(architecture.to_json().encode()))
    accuracy = float(KNOWN.of("accuracy", 256).predict([architecture])[0]) + misfit * rng.normal()
    return accuracy, float(KNOWN.of("latency_ms", 256).predict([architecture])[0]) * (1 + 0.005 * rng.normal())


def sampled(n: int, misfit: float, seed: int = 0) -> list[Measurement]:
    networks = CPU_SPACE.sample(np.random.default_rng(seed), n=n, image_size=256)
    return [Measurement(a, *truth(a, misfit), "measured", "board") for a in networks]


def fit(rows: Sequence[Measurement]) -> PredictorSet:
    return fit_predictors(rows, CPU_SPACE, ceiling=78.0).predictors


def loop_on(rows: Sequence[Measurement], misfit: float, rounds: int, asked: list[Architecture]) -> Loop[Verdict]:
    def time(architecture: Architecture) -> Timing:
        return Timing(truth(architecture, misfit)[1], "measured", "board")

    def evaluate(architecture: Architecture) -> Evaluated:
        asked.append(architecture)
        return Evaluated(truth(architecture, misfit)[0], 0.05)

    def look(outcome: SearchOutcome, before: Sequence[Architecture]) -> Verdict:
        return verify(outcome, time=time, evaluate=evaluate, also=before)

    def outcomes(predictors: PredictorSet) -> list[SearchOutcome]:
        return [search(predictors, LIMIT_MS, evaluations=200)]

    return closed_loop(fit(rows), rows, rounds=rounds, search=outcomes, look=look, refit=fit)


@pytest.fixture(scope="module")
def rows() -> list[Measurement]:
    return sampled(55, 0.3)


@pytest.fixture(scope="module")
def found(rows: list[Measurement]) -> Loop[Verdict]:
    return loop_on(rows, 0.3, 4, [])


def test_every_round_learns_from_what_the_one_before_looked_at(rows: list[Measurement], found: Loop[Verdict]) -> None:
    assert len(found.rounds) > 1
    n_rows = len(rows)
    for done in found.rounds:
        assert done.n_rows == n_rows
        n_rows += done.n_new
    assert len(found.rows) == n_rows
    assert {row.architecture for row in found.rows} >= {c.architecture for c in found.looked[0].candidates}
    for row in found.rows[len(rows) :]:
        assert (row.accuracy, row.latency_ms) == truth(row.architecture, 0.3)
    # The last predictors are those fitted to all rows but the ones of the last round.
    last = fit(found.rows[: found.rounds[-1].n_rows])
    np.testing.assert_array_equal(last.accuracy[0].coefficients, found.predictors.accuracy[0].coefficients)


def test_the_last_choice_is_among_all_that_was_looked_at(found: Loop[Verdict]) -> None:
    candidates = found.looked[0].candidates
    assert len(candidates) == sum(done.n_new for done in found.rounds)
    chosen = found.rounds[-1].chosen[0]
    assert chosen == found.looked[0].chosen
    assert chosen.timing is not None
    assert chosen.timing.latency_ms <= LIMIT_MS
    first = found.rounds[0].chosen[0]
    assert chosen.accuracy is not None
    assert first.accuracy is not None
    assert chosen.accuracy >= first.accuracy - 0.1


def test_it_ends_where_nothing_is_left_to_learn() -> None:
    found = loop_on(sampled(60, 0.0), 0.0, 6, [])
    assert len(found.rounds) <= 3
    assert found.reason != "the rounds are spent"


def test_rounds_end_with_the_budget(rows: list[Measurement]) -> None:
    asked: list[Architecture] = []
    found = loop_on(rows, 0.3, 1, asked)
    assert len(found.rounds) == 1
    assert found.reason == "the rounds are spent"
    assert len(asked) == 5
    with pytest.raises(InvalidInputError, match="rounds must be positive"):
        loop_on(rows, 0.3, 0, [])


def test_predictors_promise_more_than_any_network_but_the_one_that_they_find() -> None:
    outcome = search(KNOWN, LIMIT_MS, evaluations=200)
    front = outcome.front
    near = front.architecture(int(np.flatnonzero(front.accuracy >= outcome.accuracy - 0.3)[0]))
    verdict = verify(outcome, n_candidates=1, evaluate=lambda a: Evaluated(70.0, 0.35), also=[near])
    assert promises_more(outcome, next(c for c in verdict.candidates if c.architecture == near))
    assert not promises_more(outcome, verdict.candidates[0])
    # Where an evaluation is wrong by points, a third of one is not worth another round.
    noisy = verify(outcome, n_candidates=1, evaluate=lambda a: Evaluated(70.0, 0.31 / LEAST_GAIN), also=[near])
    assert not any(promises_more(outcome, c) for c in noisy.candidates)
