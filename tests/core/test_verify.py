"""Winners are chosen on what was measured, whatever was predicted."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, InfeasibleConstraintError
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import (
    Candidate,
    Evaluated,
    SearchOutcome,
    candidates,
    choose,
    paired_difference,
    search,
    verify,
)
from foxnas_mlflow.core.searchers._verify import SPACING

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
    (only,) = verify(outcome, n_candidates=1, time=board(outcome, 0.9)).candidates
    assert only.chosen
    assert only.meets
    assert only.architecture == outcome.architecture


def test_measured_latency_decides_not_the_predicted_one(outcome: SearchOutcome) -> None:
    time = board(outcome, 1.0)
    seen = verify(outcome, n_candidates=12, time=time).candidates
    assert len(seen) == 12
    assert len({c.architecture for c in seen}) == 12
    for c in seen:
        assert c.timing == time(c.architecture)
        assert c.meets == (c.timing.latency_ms <= LIMIT_MS)
    (winner,) = [c for c in seen if c.chosen]
    assert winner.predicted_accuracy == max(c.predicted_accuracy for c in seen if c.meets)
    # The most accurate candidate is predicted just under the limit and measured above it.
    assert not all(c.meets for c in seen)


def test_candidates_lie_as_far_apart_as_the_predictors_can_tell(outcome: SearchOutcome) -> None:
    seen = candidates(outcome, 6, measured=True)
    assert len(seen) == 6
    assert seen[0] == outcome.architecture
    predictors = outcome.objective.predictors

    def gaps(networks: list[Architecture]) -> tuple[float, float]:
        """The smallest difference of predicted accuracies, and the least misfit of two networks."""
        of = [predictors.of("accuracy", a.image_size) for a in networks]
        predicted = [float(p.predict([a])[0]) for p, a in zip(of, networks, strict=True)]
        # The ceiling of the packaged accuracies is 78 %.
        sigma = min(p.sigma * (78 - value) for p, value in zip(of, predicted, strict=True))
        return float(np.diff(sorted(predicted)).min()), 2**0.5 * sigma

    # A difference of two networks errs by the misfit of both at least.
    nearest, misfit = gaps(seen)
    assert nearest > 0.99 * SPACING * misfit
    # Later rounds look at the found network, and at nothing that is near one that was looked at.
    again = candidates(outcome, 6, measured=True, seen=seen[:3])
    assert again[0] == outcome.architecture
    assert not set(again[1:]) & set(seen[:3])
    nearest, misfit = gaps([*seen[:3], *again[1:]])
    assert nearest > 0.99 * SPACING * misfit


def evaluations(outcome: SearchOutcome, accuracies: list[float], error: float) -> Callable[[Architecture], Evaluated]:
    """A supernet that gives these accuracies in the order in which it is asked."""
    seen: list[Architecture] = []

    def evaluate(architecture: Architecture) -> Evaluated:
        seen.append(architecture)
        return Evaluated(accuracies[len(seen) - 1], error)

    return evaluate


def test_an_evaluation_beyond_noise_decides(outcome: SearchOutcome) -> None:
    verdict = verify(
        outcome,
        n_candidates=4,
        time=board(outcome, 0.9),
        evaluate=evaluations(outcome, [70.0, 71.0, 72.0, 75.0], 1e-3),
    )
    assert verdict.chosen is verdict.candidates[3]
    assert verdict.chosen.to_row()["evaluated_accuracy"] == 75.0
    assert verdict.chosen.combined_accuracy == pytest.approx(75.0, abs=0.01)
    # Without a board the predicted upper bound is the constraint.
    for c in verify(outcome, n_candidates=4, evaluate=evaluations(outcome, [70.0] * 4, 0.4)).candidates:
        assert c.timing is None
        assert c.predicted_latency_upper_ms <= LIMIT_MS


def test_a_lucky_evaluation_is_drawn_towards_its_prediction(outcome: SearchOutcome) -> None:
    verdict = verify(
        outcome,
        n_candidates=4,
        tolerance_points=0,
        time=board(outcome, 0.9),
        evaluate=evaluations(outcome, [72.0, 72.0, 72.0, 73.0], 2.0),
    )
    lucky = verdict.candidates[3]
    assert lucky.combined_accuracy is not None
    assert lucky.combined_accuracy < 72.6
    # Half a point of luck under two points of noise does not outweigh what is predicted.
    assert verdict.chosen.predicted_accuracy == max(c.predicted_accuracy for c in verdict.candidates)


def test_the_fastest_of_those_that_the_evidence_cannot_tell_apart_wins(outcome: SearchOutcome) -> None:
    looked = verify(outcome, n_candidates=4, time=board(outcome, 0.9)).candidates
    slowest = max(looked, key=lambda c: c.speed_ms)
    alike = [
        dataclasses.replace(
            c, chosen=False, predicted_accuracy=72.0, evaluated=Evaluated(72.1 if c is slowest else 72.0, 0.3)
        )
        for c in looked
    ]
    verdicts = {tolerance: choose(outcome, alike, tolerance_points=tolerance) for tolerance in (None, 0.0, 50.0)}
    speeds = {tolerance: verdict.chosen.speed_ms for tolerance, verdict in verdicts.items()}
    assert speeds[50.0] == min(c.speed_ms for c in verdicts[50.0].candidates)
    best = max(verdicts[0.0].candidates, key=lambda c: c.rank)
    assert verdicts[0.0].chosen is best
    assert speeds[None] < speeds[0.0]
    assert "would have bought" in verdicts[None].reason
    assert "most accurate" in verdicts[0.0].reason


def test_networks_whose_latencies_are_a_tie_are_measured_again(outcome: SearchOutcome) -> None:
    """The first measurement is kind to one of two networks of the same latency."""
    fast, slow = candidates(outcome, 2, measured=True)
    first, truth = {fast: 50.2, slow: 50.0}, {fast: 49.9, slow: 50.3}
    asked: list[Architecture] = []

    def time(architecture: Architecture) -> Timing:
        asked.append(architecture)
        return Timing((truth if architecture in asked[:-1] else first)[architecture], "measured", "board", n_runs=100)

    verdict = verify(outcome, n_candidates=2, time=time, evaluate=by_name({}, 72.0), tolerance_points=50.0)
    assert verdict.chosen.architecture == fast
    for candidate in verdict.candidates:
        assert candidate.timing is not None
        network = candidate.architecture
        assert candidate.timing.latency_ms == pytest.approx((first[network] + 2 * truth[network]) / 3)
        assert candidate.timing.n_runs == 300
    assert asked[2:] == [fast, slow] * 2
    # Where the latencies are no tie, or do not decide, once is enough.
    for latencies, tolerance in (({fast: 50.0, slow: 52.0}, 50.0), (first, 0.0)):
        asked.clear()
        first = latencies
        verify(outcome, n_candidates=2, time=time, evaluate=by_name({slow: 80.0}, 72.0), tolerance_points=tolerance)
        assert len(asked) == 2


def test_where_no_tied_network_meets_the_limit_once_it_was_measured_again_an_edited_one_wins(
    outcome: SearchOutcome,
) -> None:
    pair = candidates(outcome, 2, measured=True)
    asked: list[Architecture] = []

    def time(architecture: Architecture) -> Timing:
        asked.append(architecture)
        if architecture not in pair:
            return board(outcome, 1.0)(architecture)
        again = architecture in asked[:-1]
        return Timing(LIMIT_MS * (1.01 if again else 0.999), "measured", "board")

    verdict = verify(outcome, n_candidates=2, time=time, tolerance_points=50.0)
    assert verdict.chosen.architecture not in pair
    assert verdict.chosen.meets
    assert not any(c.meets for c in verdict.candidates if c.architecture in pair)


def test_a_network_that_is_beaten_on_both_measured_figures_never_wins(outcome: SearchOutcome) -> None:
    """Whatever is predicted, whatever the tolerance."""
    rng = np.random.default_rng(0)
    seen = verify(outcome, n_candidates=6, time=board(outcome, 0.9)).candidates
    for _ in range(60):
        correct = rng.random((len(seen), 300)) < rng.uniform(0.4, 0.95, (len(seen), 1))
        looked: list[Candidate] = [
            dataclasses.replace(c, chosen=False, evaluated=Evaluated(100 * answers.mean(), 2.0, answers))
            for c, answers in zip(seen, correct, strict=True)
        ]
        for tolerance in (None, 0.0, 30.0):
            verdict = choose(outcome, looked, tolerance_points=tolerance)
            assert not verdict.dominated
            chosen = verdict.chosen.evaluated
            assert chosen is not None
            assert chosen.correct is not None
            for other, answers in zip(looked, correct, strict=True):
                if other.speed_ms < verdict.chosen.speed_ms:
                    more, error = paired_difference(answers, chosen.correct)
                    assert more <= error


def known_row(outcome: SearchOutcome, index: int, accuracy: float, device: str = "board") -> Measurement:
    """A network of the fast end of the front, measured and evaluated before."""
    architecture = outcome.front.architecture(index)
    timing = dataclasses.replace(board(outcome, 0.9)(architecture), device=device)
    return Measurement.of(architecture, timing, accuracy)


def by_name(accuracies: dict[Architecture, float], otherwise: float) -> Callable[[Architecture], Evaluated]:
    return lambda architecture: Evaluated(accuracies.get(architecture, otherwise), 0.3)


def test_a_network_that_was_measured_before_and_beats_the_winner_is_looked_at_again_and_wins(
    outcome: SearchOutcome,
) -> None:
    row = known_row(outcome, 3, 74.0)
    evaluate = by_name({row.architecture: 74.0}, 72.0)
    verdict = verify(outcome, time=board(outcome, 0.9), evaluate=evaluate, known=[row])
    assert verdict.chosen.architecture == row.architecture
    assert verdict.chosen.origin == "measured before"
    assert not verdict.dominated
    # Looked at again it is no better: the new figures count.
    verdict = verify(outcome, time=board(outcome, 0.9), evaluate=by_name({}, 72.0), known=[row])
    assert row.architecture in [c.architecture for c in verdict.candidates]
    assert not verdict.dominated
    # What was measured on another board, is within noise, slower or breaks another limit says nothing.
    slower = Measurement(row.architecture, 74.0, 70.0, "measured", "board")
    for other in (known_row(outcome, 3, 74.0, "elsewhere"), known_row(outcome, 3, 72.4), slower):
        verdict = verify(outcome, time=board(outcome, 0.9), evaluate=evaluate, known=[other], tolerance_points=0)
        assert row.architecture not in [c.architecture for c in verdict.candidates]


def test_a_winner_that_is_beaten_says_by_which_network(outcome: SearchOutcome) -> None:
    row = known_row(outcome, 3, 74.0)
    looked = verify(outcome, time=board(outcome, 0.9), evaluate=by_name({}, 72.0)).candidates
    verdict = choose(outcome, looked, known=[row])
    assert verdict.dominated
    assert verdict.beaten_by == row.architecture


def test_a_network_that_is_known_to_be_beaten_wins_only_alone(outcome: SearchOutcome) -> None:
    fast = outcome.front.architecture(3)
    time, evaluate = board(outcome, 0.9), by_name({}, 72.0)
    first = verify(outcome, time=time, evaluate=evaluate, tolerance_points=0).chosen.architecture
    verdict = verify(outcome, time=time, evaluate=evaluate, tolerance_points=0, also=[fast], beaten=[first])
    assert verdict.chosen.architecture != first
    assert fast in [c.architecture for c in verdict.candidates]
    alone = verify(outcome, n_candidates=1, time=time, evaluate=evaluate, beaten=[outcome.architecture])
    assert alone.chosen.architecture == outcome.architecture


def test_other_limits_hold_for_every_candidate() -> None:
    outcome = search(reference_predictors("rpi4"), 70.0, limits="int8_size_bytes<=3.6MB", evaluations=300)
    verdict = verify(outcome, n_candidates=4, time=board(outcome, 1.04))
    assert len(verdict.candidates) >= 4
    for candidate in verdict.candidates:
        assert candidate.amounts["int8_size_bytes"] <= 3.6e6
        assert candidate.to_row()["limited_int8_size_bytes"] == candidate.amounts["int8_size_bytes"]
    assert verdict.chosen.speed_ms <= 70.0


def test_the_least_of_a_quantity_is_chosen_among_those_evaluated_as_accurate_as_asked() -> None:
    outcome = search(
        reference_predictors("rpi4"), objective="latency_ms", min_accuracy=73.0, confidence=0.5, evaluations=300
    )
    verdict = verify(outcome, n_candidates=3, evaluate=evaluations(outcome, [71.0, 73.5, 74.0], 1e-3))
    assert verdict.chosen is verdict.candidates[1]
    assert verdict.candidates[1].predicted_latency_ms < verdict.candidates[2].predicted_latency_ms


def test_a_larger_network_does_not_beat_the_smallest_by_being_faster_and_more_accurate() -> None:
    outcome = search(reference_predictors("rpi4"), objective="int8_size_bytes", min_accuracy=73.0, evaluations=300)

    def time(architecture: Architecture) -> Timing:
        return Timing(60.0 if architecture == outcome.architecture else 30.0, "measured", "board")

    verdict = verify(outcome, n_candidates=3, time=time, evaluate=evaluations(outcome, [73.5, 75.0, 76.0], 1e-3))
    sizes = [candidate.amounts["int8_size_bytes"] for candidate in verdict.candidates]
    assert len(sizes) == 3
    assert verdict.chosen.amounts["int8_size_bytes"] == min(sizes)
    assert not verdict.dominated
    # One that was measured before counts as little; a smaller one would.
    larger = verdict.candidates[2].architecture
    row = Measurement(larger, 76.0, 30.0, "measured", "board")
    for known, beaten_by in (
        ([row], None),
        ([dataclasses.replace(row, architecture=smaller(outcome))], smaller(outcome)),
    ):
        assert choose(outcome, verdict.candidates[:1], known=known).beaten_by == beaten_by


def smaller(outcome: SearchOutcome) -> Architecture:
    """A network with less of what is to be least."""
    return outcome.objective.predictors.space.smallest(outcome.architecture.image_size)


@pytest.mark.parametrize("slowness", [1.08, 1.4])
def test_a_slower_board_gets_a_network_edited_until_it_meets(outcome: SearchOutcome, slowness: float) -> None:
    seen = verify(outcome, time=board(outcome, slowness)).candidates
    assert not seen[0].meets
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
        verify(outcome, time=board(outcome, 20.0))
    assert caught.value.smallest_latency_ms > 20 * 30


def test_measurements_with_problems_choose_nothing(outcome: SearchOutcome) -> None:
    time = board(outcome, 0.5)

    def throttled(architecture: Architecture) -> Timing:
        return Timing(time(architecture).latency_ms, "measured", "board", problems=("the machine was throttled",))

    with pytest.raises(DeviceError, match="throttled"):
        verify(outcome, time=throttled)


def test_measurements_with_problems_choose_nothing_where_latency_has_no_limit() -> None:
    for asked in ({"objective": "latency_ms", "min_accuracy": 73.0}, {"limits": "int8_size_bytes<=3.6MB"}):
        outcome = search(reference_predictors("rpi4"), evaluations=300, **asked)  # type: ignore[arg-type]
        with pytest.raises(DeviceError, match="throttled"):
            verify(outcome, time=lambda a: Timing(9.0, "measured", "board", problems=("the machine was throttled",)))


def test_a_slower_board_gets_a_network_within_the_other_limits() -> None:
    """The most accurate network of that latency is too large, and so are all that one edit makes of it."""
    outcome = search(reference_predictors("rpi4"), 80.0, limits="int8_size_bytes<=3.4MB", evaluations=300)
    verdict = verify(outcome, n_candidates=1, time=board(outcome, 1.5))
    assert verdict.chosen.speed_ms <= 80.0
    assert verdict.chosen.amounts["int8_size_bytes"] <= 3.4e6
    assert verdict.chosen.predicted_accuracy > outcome.accuracy - 1
