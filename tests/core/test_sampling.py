"""Collecting rows: what is disturbed is measured again, what is there is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_measurements
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.space import CPU_SPACE

PLAN = list(dict.fromkeys(CPU_SPACE.sample(np.random.default_rng(0), n=6)))


class BusyBoard:
    """A board on which the first measurements of each network are disturbed."""

    def __init__(self, n_disturbed: int) -> None:
        self.n_disturbed = n_disturbed
        self.asked: list[Architecture] = []

    def time(self, architecture: Architecture) -> Timing:
        self.asked.append(architecture)
        quiet = self.asked.count(architecture) > self.n_disturbed
        return Timing(1.0 + PLAN.index(architecture), "measured", problems=() if quiet else ("shared",))


def accuracy(architecture: Architecture) -> float:
    return 70.0 + PLAN.index(architecture)


def test_a_disturbed_latency_is_measured_again_after_the_others(tmp_path: Path) -> None:
    board = BusyBoard(1)
    rows = collect(PLAN, tmp_path / "rows.csv", evaluate=accuracy, time=board.time, n_timed=4)
    assert board.asked == PLAN[:4] * 2
    assert [row.latency_ms for row in rows] == [1.0, 2.0, 3.0, 4.0, None, None]
    assert read_measurements(tmp_path / "rows.csv") == rows


def test_nothing_is_measured_again_where_that_brought_nothing(tmp_path: Path) -> None:
    board = BusyBoard(100)
    rows = collect(PLAN, tmp_path / "rows.csv", evaluate=accuracy, time=board.time)
    assert board.asked == PLAN * 2
    assert all(row.latency_ms is None for row in rows)


def test_a_latency_that_an_earlier_call_lacks_is_measured_without_another_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    collect(PLAN[:3], path, evaluate=accuracy, time=BusyBoard(100).time)
    evaluated: list[Architecture] = []

    def evaluate(architecture: Architecture) -> float:
        evaluated.append(architecture)
        return accuracy(architecture)

    quiet = BusyBoard(0)
    rows = collect(PLAN, path, evaluate=evaluate, time=quiet.time)
    assert evaluated == PLAN[3:]
    assert sorted(map(PLAN.index, quiet.asked)) == list(range(6))
    assert [row.architecture for row in rows] == PLAN
    assert [row.latency_ms for row in rows] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]


def test_the_last_row_of_a_subnet_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_measurement(Measurement.of(PLAN[0], None, 70.0), path)
    append_measurement(Measurement.of(PLAN[0], Timing(1.0, "measured"), 70.0), path)
    board = BusyBoard(0)
    (row,) = collect(PLAN[:1], path, evaluate=accuracy, time=board.time)
    assert (row.latency_ms, board.asked) == (1.0, [])


def test_a_sampling_asks_for_as_many_latencies_as_the_fit() -> None:
    from foxnas_mlflow.core.predictors import Formula, get_formula
    from foxnas_mlflow.workflows.sample import MIN_LATENCIES

    assert len(get_formula("calibrated", "latency_ms").columns(CPU_SPACE)) + Formula.spare_rows == MIN_LATENCIES


def test_an_emulated_board_is_named_so_once() -> None:
    """Boards that are emulated say so in their name already."""
    timing = Timing(5.0, "measured", device="Raspberry Pi 4 (emulated)")
    assert (timing.device, timing.emulated) == ("Raspberry Pi 4", True)
    row = Measurement.of(PLAN[0], timing)
    assert row.device == "Raspberry Pi 4 (emulated)"
    assert row.timing == timing
    assert Measurement.of(PLAN[0], Timing(5.0, "measured", device="Raspberry Pi 4", emulated=True)) == row
