"""Predicted against real: what is told of a handful of networks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.comparison import (
    Comparison,
    Searched,
    agreement,
    check_found,
    read_comparisons,
    spread_over,
    write_comparisons,
)
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import Objective, front_of
from foxnas_mlflow.core.space import CPU_SPACE


@pytest.fixture
def rows(rng: np.random.Generator) -> list[Comparison]:
    networks = CPU_SPACE.sample(rng, n=4)
    return [
        Comparison(a, "front" if i else "found", 70 + i, 10.0 + i, 11.0 + i, 71.0 + i, 400, 10.5 + i)
        for i, a in enumerate(networks)
    ]


def test_agreement_of_ranks_errors_and_bounds(rows: list[Comparison]) -> None:
    metrics = agreement(rows, latency_ms=10.5)
    assert metrics["latency_kendall_tau"] == metrics["accuracy_kendall_tau"] == 1
    assert metrics["accuracy_mean_error"] == 1
    np.testing.assert_allclose(metrics["latency_mape"], 100 * np.mean([0.5 / (10.5 + i) for i in range(4)]))
    assert (metrics["upper_bound_kept"], metrics["constraint_met"]) == (1, 1)
    worse = [dataclasses.replace(rows[0], latency_ms=12.0), *rows[1:]]
    metrics = agreement(worse, latency_ms=11.0)
    assert (metrics["upper_bound_kept"], metrics["constraint_met"]) == (0.75, 0)
    assert metrics["latency_kendall_tau"] < 1


def test_what_cannot_be_said_is_left_out(rows: list[Comparison]) -> None:
    assert set(agreement(rows[:1], 20)) == {"accuracy_mean_error", "latency_mape", "upper_bound_kept", "constraint_met"}
    assert set(agreement([dataclasses.replace(r, latency_ms=None) for r in rows], 20)) == {
        "accuracy_mean_error",
        "accuracy_kendall_tau",
    }


def test_latencies_that_cannot_be_trusted_do_not_count(rows: list[Comparison]) -> None:
    doubtful = dataclasses.replace(rows[2], latency_ms=99.0, latency_valid=False)
    of_the_others = agreement([*rows[:2], rows[3]], 10.5)
    metrics = agreement([*rows[:2], doubtful, rows[3]], 10.5)
    latencies = ("latency_kendall_tau", "latency_mape", "upper_bound_kept", "constraint_met")
    assert [metrics[key] for key in latencies] == [of_the_others[key] for key in latencies]
    assert "constraint_met" not in agreement([dataclasses.replace(rows[0], latency_valid=False), *rows[1:]], 10.5)


def test_a_network_that_is_faster_and_beyond_noise_more_accurate_beats_the_found_one(rows: list[Comparison]) -> None:
    found = dataclasses.replace(rows[0], accuracy=70.0, latency_ms=10.0)
    # 400 images at 70 %: 2.3 points each, 3.2 of the difference of two that nothing pairs.
    faster = dataclasses.replace(rows[1], accuracy=74.0, latency_ms=9.0)
    check = check_found([found, faster, rows[2]], [True] * 3)
    assert check.checked
    assert check.beaten_by is faster.architecture
    assert "takes 9 ms in place of 10 ms and is 4.00 points (standard error 3.1" in check.sentence
    for other in (
        dataclasses.replace(faster, accuracy=73.0),
        dataclasses.replace(faster, latency_ms=10.5),
        dataclasses.replace(faster, latency_valid=False),
    ):
        assert check_found([found, other, rows[2]], [True] * 3).beaten_by is None
    # It breaks another limit: no answer.
    check = check_found([found, faster, rows[2]], [True, False, True])
    assert check.beaten_by is None
    assert "No network of the 1 compared beats the found one" in check.sentence
    assert "0 are faster." in check.sentence
    assert not check_found([dataclasses.replace(found, latency_ms=None), faster], [True] * 2).checked
    # Where none could take its place, none beats it.
    check = check_found([found, faster, rows[2]], [True, False, False])
    assert check.checked
    assert "No other network compared could have been found in its place" in check.sentence
    # Of a front of one there is nothing that valid latencies could tell more of.
    check = check_found([found], [True])
    assert (check.checked, check.sentence) == (True, "No other network was compared with the found one.")
    assert not check_found([dataclasses.replace(found, latency_valid=False)], [True]).checked


def test_a_network_that_is_faster_and_as_accurate_within_noise_is_better_and_does_not_beat(
    rows: list[Comparison],
) -> None:
    found = dataclasses.replace(rows[0], accuracy=70.0, latency_ms=10.0)
    more, same = (
        dataclasses.replace(row, accuracy=accuracy, latency_ms=ms)
        for row, accuracy, ms in ((rows[1], 71.0, 9.0), (rows[2], 70.0, 6.0))
    )
    check = check_found([found, more, same], [True] * 3)
    assert check.beaten_by is None
    assert check.better is same.architecture, "the fastest of them"
    for other in (
        dataclasses.replace(more, accuracy=69.75),
        dataclasses.replace(more, latency_ms=9.7),
        dataclasses.replace(more, latency_valid=False),
    ):
        assert check_found([found, other, rows[2]], [True, True, False]).better is None
    beating = dataclasses.replace(more, accuracy=76.0)
    assert check_found([found, beating, same], [True] * 3).better is beating.architecture


def test_the_same_images_tell_networks_apart_that_two_accuracies_do_not(rows: list[Comparison]) -> None:
    right = np.arange(400) < 280
    better = np.arange(400) < 288
    found = dataclasses.replace(rows[0], accuracy=70.0, latency_ms=10.0, correct=right)
    faster = dataclasses.replace(rows[1], accuracy=72.0, latency_ms=9.0, correct=better)
    # Eight images of 400, none the other way: the difference of 2 points has an error of 0.7.
    assert check_found([found, faster], [True, True]).beaten_by is faster.architecture
    assert check_found([found, dataclasses.replace(faster, correct=None)], [True, True]).beaten_by is None


def test_each_of_several_found_networks_is_held_against_all_others(rows: list[Comparison]) -> None:
    first = dataclasses.replace(rows[0], accuracy=70.0, latency_ms=10.0)
    second = dataclasses.replace(rows[1], accuracy=70.5, latency_ms=20.0)
    faster = dataclasses.replace(rows[2], accuracy=76.0, latency_ms=15.0)
    checks = [check_found([first, second, faster], [True] * 3, i) for i in range(2)]
    assert [check.beaten_by for check in checks] == [None, faster.architecture]


def test_sampled_networks_are_held_against_what_the_search_measured(rows: list[Comparison]) -> None:
    checked = check_found(rows[:2], [True] * 2)
    searched = Searched(accuracy=90.0, standard_error=1.0, latency_ms=10.0, device="board")

    def sampled(accuracy: float, latency_ms: float, device: str = "board") -> Measurement:
        return Measurement.of(rows[3].architecture, Timing(latency_ms, "measured", device), accuracy)

    # The difference of two evaluations has an error of 1.41 points.
    better = checked.beside(searched, [sampled(91.0, 9.0), sampled(91.5, 9.0)])
    assert better.beaten_by == rows[3].architecture
    assert "BEATEN: a sampled network takes 9 ms in place of 10 ms and was evaluated 1.50 points" in better.sentence
    worse = checked.beside(searched, [sampled(91.0, 9.0), sampled(95.0, 11.0), sampled(95.0, 9.0, "another")])
    assert worse.beaten_by is None
    assert worse.sentence == f"{checked.sentence} Nor does any of the 2 sampled: 1 are faster."
    assert checked.beside(None, [sampled(95.0, 9.0)]) == checked
    alone = check_found(rows[:2], [True, False]).beside(searched, [sampled(91.0, 9.0)])
    assert alone.sentence.endswith("found in its place. None of the 1 sampled beats it: 1 are faster.")


def test_the_table_is_read_back(rows: list[Comparison], tmp_path: Path) -> None:
    rows[1] = dataclasses.replace(rows[1], latency_ms=None, latency_valid=False)
    write_comparisons(rows, tmp_path / "t.csv")
    assert read_comparisons(tmp_path / "t.csv", CPU_SPACE) == rows


def test_networks_are_spread_over_the_front_without_the_found_one() -> None:
    front = front_of(Objective(reference_predictors("rpi4")))
    found = front.architecture(0)
    chosen = spread_over(front, 5, without=[found])
    assert len(set(chosen)) == 5
    assert found not in chosen
    latency = reference_predictors("rpi4").predict_table(chosen)["latency_ms"]
    steps = np.diff(np.log(latency))
    np.testing.assert_allclose(steps, steps.mean(), rtol=0.05)
    assert spread_over(front, 0, without=[found]) == []
