"""Collecting rows: what is disturbed is measured again, what is there is not."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import TooFewSamplesError
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_measurements
from foxnas_mlflow.core.predictors import fit_predictors, reference_predictors, rows_needed
from foxnas_mlflow.core.sampling import collect, unexplained
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace

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


def test_further_quantities_stay_where_a_latency_is_measured(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    energies = [{"energy_mj": 3.5 + i} for i in range(2)]
    lacking = Measurement(PLAN[0], 70.0, quantities=energies[0])
    slow = Measurement(PLAN[1], 71.0, 9.0, "measured", quantities=energies[1])
    for row in (lacking, slow):
        append_measurement(row, path)
    rows = collect(PLAN[:2], path, evaluate=accuracy, time=BusyBoard(0).time, doubt=lambda rows: [PLAN[1]])
    assert [row.latency_ms for row in rows] == [1.0, 2.0]
    assert [row.quantities for row in rows] == energies


def test_the_last_row_of_a_subnet_counts(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    append_measurement(Measurement.of(PLAN[0], None, 70.0), path)
    append_measurement(Measurement.of(PLAN[0], Timing(1.0, "measured"), 70.0), path)
    board = BusyBoard(0)
    (row,) = collect(PLAN[:1], path, evaluate=accuracy, time=board.time)
    assert (row.latency_ms, board.asked) == (1.0, [])


def test_of_a_doubted_latency_the_least_counts(tmp_path: Path) -> None:
    taken = iter([3.0, 2.0, 9.0, 5.0, 7.0])
    asked: list[Architecture] = []

    def time(architecture: Architecture) -> Timing:
        asked.append(architecture)
        return Timing(next(taken), "measured")

    path = tmp_path / "rows.csv"
    rows = collect(PLAN[:3], path, evaluate=accuracy, time=time, doubt=lambda rows: [PLAN[2], PLAN[5]])
    assert asked == [*PLAN[:3], PLAN[2]]
    assert [row.latency_ms for row in rows] == [3.0, 2.0, 5.0]
    assert [row.accuracy for row in rows] == [70.0, 71.0, 72.0]
    assert read_measurements(path) == rows
    assert collect(PLAN[:3], path, evaluate=accuracy, time=time, doubt=lambda rows: [PLAN[2]]) == rows
    assert asked[4:] == [PLAN[2]]


def test_what_a_shared_processor_did_to_latencies_is_found_and_measured_again(tmp_path: Path) -> None:
    known = reference_predictors("rpi4")
    plan = list(dict.fromkeys(CPU_SPACE.sample(np.random.default_rng(1), n=60)))
    truth = dict(zip(plan, map(float, known.latency[0].predict(plan)), strict=True))
    slow = set(plan[::4])

    def time(architecture: Architecture) -> Timing:
        disturbed = architecture in slow
        slow.discard(architecture)
        return Timing(truth[architecture] * (1.6 if disturbed else 1.0), "measured")

    def doubt(rows: Sequence[Measurement]) -> list[Architecture]:
        return unexplained(rows, CPU_SPACE)

    rows = collect(plan, tmp_path / "rows.csv", evaluate=lambda a: 70.0, time=time, doubt=doubt)
    assert not slow
    assert {row.architecture: row.latency_ms for row in rows} == pytest.approx(truth)
    assert unexplained(rows, CPU_SPACE) == []
    assert unexplained(rows[:5], CPU_SPACE) == []


@pytest.mark.parametrize("quantity", ["accuracy", "latency_ms"])
@pytest.mark.parametrize("sizes", [(128,), (128, 160, 224)])
@pytest.mark.parametrize("space", [CPU_SPACE, TPU_SPACE], ids=["cpu", "tpu"])
def test_as_many_rows_as_are_needed_are_fitted_and_one_less_is_refused(
    space: SearchSpace, sizes: tuple[int, ...], quantity: str
) -> None:
    n = rows_needed(quantity, space, sizes)
    rng = np.random.default_rng(0)
    networks = [a for i in range(n) for a in space.sample(rng, n=1, image_size=sizes[i % len(sizes)])]
    values = 40 + rng.random(n)
    rows = [Measurement(a, **{quantity: float(value)}) for a, value in zip(networks, values, strict=True)]
    assert fit_predictors(rows, space).reports[quantity].metrics["n_samples"] == n
    with pytest.raises(TooFewSamplesError):
        fit_predictors(rows[:-1], space)


def test_a_small_space_is_sampled_whole() -> None:
    from foxnas_mlflow.workflows.sample import SampleRequest, _plan

    space = CPU_SPACE.replace(depths=(1,), kernels=(3,), image_sizes=(128, 160), stages=CPU_SPACE.stages[:1])
    assert space.n_architectures == 8
    plan = _plan(SampleRequest(n_samples=55), space, [128, 160], [])
    assert len(set(plan)) == 8
    # Rows of another size are none of those that are left.
    given = [Measurement(a, 70.0, None) for a in plan if a.image_size == 128]
    assert len(_plan(SampleRequest(n_samples=55), space, [160], given)) == 8
    assert len(_plan(SampleRequest(n_samples=6), space, [160], given)) == 6


def test_an_emulated_board_is_named_so_once() -> None:
    """Boards that are emulated say so in their name already."""
    timing = Timing(5.0, "measured", device="Raspberry Pi 4 (emulated)")
    assert (timing.device, timing.emulated) == ("Raspberry Pi 4", True)
    row = Measurement.of(PLAN[0], timing)
    assert row.device == "Raspberry Pi 4 (emulated)"
    assert row.timing == timing
    assert Measurement.of(PLAN[0], Timing(5.0, "measured", device="Raspberry Pi 4", emulated=True)) == row


def test_without_what_fits_them_latencies_explain_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = CPU_SPACE.sample(np.random.default_rng(1), n=40)
    latency = reference_predictors("rpi4").latency[0].predict(plan)
    rows = [
        Measurement(a, 70.0, float(ms) * (1 + (i == 0)), "measured")
        for i, (a, ms) in enumerate(zip(plan, latency, strict=True))
    ]
    assert unexplained(rows, CPU_SPACE) == [plan[0]]
    monkeypatch.setitem(sys.modules, "statsmodels.regression.linear_model", None)
    assert unexplained(rows, CPU_SPACE) == []
