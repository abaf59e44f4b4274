"""Winners are chosen on what was measured, whatever was predicted."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, InfeasibleConstraintError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import SearchOutcome, search, verify

LIMIT_MS = 60.0


@pytest.fixture(scope="module")
def outcome() -> SearchOutcome:
    return search(reference_predictors("rpi4"), LIMIT_MS, evaluations=2000)


def board(outcome: SearchOutcome, slowness: float) -> Callable[[Architecture], Timing]:
    """A board that is slower than predicted by a factor, and by up to 1 % for each network."""

    def time(architecture: Architecture) -> Timing:
        predictor = outcome.objective.predictors.of("latency_ms", architecture.image_size)
        own = np.random.default_rng(zlib.crc32(architecture.to_json().encode())).uniform(0, 0.01)
        return Timing(float(predictor.predict([architecture])[0]) * (slowness + own), "measured", "board")

    return time


def test_the_found_network_wins_where_it_meets_the_constraint_and_is_best(outcome: SearchOutcome) -> None:
    seen = verify(outcome, LIMIT_MS, n_candidates=1, time=board(outcome, 0.9))
    (only,) = seen
    assert only.chosen
    assert only.meets
    assert only.architecture == outcome.architecture


def test_measured_latency_decides_not_the_predicted_one(outcome: SearchOutcome) -> None:
    time = board(outcome, 1.0)
    seen = verify(outcome, LIMIT_MS, n_candidates=12, time=time)
    assert len(seen) == 12
    assert len({c.architecture for c in seen}) == 12
    for c in seen:
        assert c.timing == time(c.architecture)
        assert c.meets == (c.timing.latency_ms <= LIMIT_MS)
    (winner,) = [c for c in seen if c.chosen]
    assert winner.predicted_accuracy == max(c.predicted_accuracy for c in seen if c.meets)
    # The most accurate candidates are predicted just under the limit and measured above it.
    assert not all(c.meets for c in seen)


def test_evaluated_accuracy_decides_among_those_that_meet(outcome: SearchOutcome) -> None:
    evaluated: dict[Architecture, float] = {}

    def evaluate(architecture: Architecture) -> tuple[float, float]:
        evaluated[architecture] = 70.0 + len(evaluated)
        return evaluated[architecture], 0.4

    seen = verify(outcome, LIMIT_MS, n_candidates=4, time=board(outcome, 0.9), evaluate=evaluate)
    (winner,) = [c for c in seen if c.chosen]
    assert winner.architecture == max(evaluated, key=lambda a: evaluated[a])
    assert winner.to_row()["evaluated_accuracy"] == 73.0
    # Without a board the predicted upper bound is the constraint.
    for c in verify(outcome, LIMIT_MS, n_candidates=4, evaluate=evaluate):
        assert c.timing is None
        assert c.predicted_latency_upper_ms <= LIMIT_MS


@pytest.mark.parametrize("slowness", [1.08, 1.4])
def test_a_slower_board_gets_a_network_edited_until_it_meets(outcome: SearchOutcome, slowness: float) -> None:
    seen = verify(outcome, LIMIT_MS, time=board(outcome, slowness))
    assert not any(c.meets for c in seen[:5])
    (winner,) = [c for c in seen if c.chosen]
    assert winner.timing is not None
    assert winner.timing.latency_ms <= LIMIT_MS
    assert winner.timing.latency_ms > 0.97 * LIMIT_MS
    assert len(seen) <= 12
    if slowness < 1.1:
        assert winner.origin.startswith("edited: ")
        # What the exact front promises at this board's speed is not given away.
        front = outcome.front
        best = front.accuracy[front.latency_ms * (slowness + 0.01) <= LIMIT_MS].max()
        assert winner.predicted_accuracy > best - 0.35


def test_a_board_that_is_far_too_slow_names_the_smallest_measured_latency(outcome: SearchOutcome) -> None:
    with pytest.raises(InfeasibleConstraintError, match="measured on the device") as caught:
        verify(outcome, LIMIT_MS, time=board(outcome, 20.0))
    assert caught.value.smallest_latency_ms > 20 * 30


def test_measurements_with_problems_choose_nothing(outcome: SearchOutcome) -> None:
    time = board(outcome, 0.5)

    def throttled(architecture: Architecture) -> Timing:
        return Timing(time(architecture).latency_ms, "measured", "board", problems=("the machine was throttled",))

    with pytest.raises(DeviceError, match="throttled"):
        verify(outcome, LIMIT_MS, time=throttled)
