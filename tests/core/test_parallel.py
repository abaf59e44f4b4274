"""Work that is shared: what is begun is finished, what is lost is done by another, and who fails twice is set aside."""

from __future__ import annotations

import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.core.measurements import Measurement, Timing, read_finished, read_measurements
from foxnas_mlflow.core.parallel import Shared, as_finished
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.space import CPU_SPACE

PLAN = list(dict.fromkeys(CPU_SPACE.sample(np.random.default_rng(0), n=30)))


@pytest.mark.parametrize("n", [1, 3])
def test_each_item_is_done_once(n: int) -> None:
    assert sorted(as_finished(lambda x: x * x, range(20), n=n)) == [(x, x * x) for x in range(20)]


def test_n_are_in_progress_at_once() -> None:
    # Passes only when all three have come.
    meeting = threading.Barrier(3, timeout=60)
    assert len(list(as_finished(lambda _: meeting.wait(), range(6), n=3))) == 6


def test_what_was_begun_is_yielded_before_a_failure_is_raised() -> None:
    other_failed = threading.Event()

    def work(x: int) -> int:
        if x == 1:
            other_failed.set()
            raise ValueError("one")
        assert other_failed.wait(60)
        return x

    finishing = as_finished(work, iter([0, 1, 2, 3, 4]), n=2)
    assert next(finishing) == (0, 0)
    with pytest.raises(ValueError, match="one"):
        next(finishing)


def test_who_stops_asking_stops_the_work() -> None:
    asked: list[int] = []
    for _ in as_finished(lambda x: asked.append(x), range(1000), n=2):
        break
    assert len(asked) < 1000


def test_a_worker_does_one_call_at_a_time() -> None:
    at_once, most, lock = Counter[str](), Counter[str](), threading.Lock()

    def worker(name: str):  # type: ignore[no-untyped-def]
        def work(item: int) -> str:
            with lock:
                at_once[name] += 1
                most[name] = max(most[name], at_once[name])
            with lock:
                at_once[name] -= 1
            return name

        return work

    shared = Shared({name: worker(name) for name in "ab"})
    names = [name for _, name in as_finished(shared, range(200), n=5)]
    assert set(names) == {"a", "b"}
    assert most == {"a": 1, "b": 1}


def test_a_worker_that_fails_twice_in_a_row_is_set_aside_and_its_calls_are_made_again() -> None:
    told: list[str] = []
    calls = Counter[str]()

    def steady(item: int) -> int:
        return item

    def dies_at_the_third(item: int) -> int:
        calls["dies"] += 1
        if calls["dies"] >= 3:
            raise DeviceError("it must answer")
        return item

    shared = Shared(
        {"steady": steady, "dies": dies_at_the_third},
        lost=(DeviceError,),
        on_aside=lambda name, error: told.append(f"{name}: {error}"),
    )
    assert [shared(item) for item in range(20)] == list(range(20))
    assert calls["dies"] == 4
    assert told == ["dies: it must answer."]
    assert len(shared) == 1


def test_one_failure_between_successes_is_forgiven() -> None:
    calls = Counter[str]()

    def sometimes(item: int) -> int:
        calls["sometimes"] += 1
        if calls["sometimes"] % 2:
            raise DeviceError("it must answer")
        return item

    shared = Shared({"sometimes": sometimes, "steady": lambda item: item}, lost=(DeviceError,))
    assert [shared(item) for item in range(40)] == list(range(40))
    assert len(shared) == 2


def test_the_last_workers_loss_is_everybodys() -> None:
    def dead(item: int) -> int:
        raise DeviceError("it must answer")

    shared = Shared({"a": dead, "b": dead}, lost=(DeviceError,))
    with pytest.raises(DeviceError, match="it must answer"):
        list(as_finished(shared, range(10), n=4))
    with pytest.raises(ZeroDivisionError):
        Shared({"a": lambda item: item // 0}, lost=(DeviceError,))(1)


def accuracy(architecture: Architecture) -> float:
    return 70.0 + PLAN.index(architecture) / 10


def time(architecture: Architecture) -> Timing:
    return Timing(1.0 + PLAN.index(architecture), "measured")


@pytest.mark.parametrize("apart", [False, True])
def test_rows_do_not_depend_on_how_many_are_in_progress(tmp_path: Path, apart: bool) -> None:
    def stop(rows: list[Measurement]) -> bool:
        return len(rows) == 17

    tables = []
    for n in (1, 4):
        path = tmp_path / f"rows-{n}.csv"
        rows = collect(PLAN, path, evaluate=accuracy, time=time, stop=stop, n_at_once=n, apart=apart and n > 1)
        assert read_measurements(path) == rows
        tables.append(rows)
    assert tables[0] == tables[1]
    assert [row.architecture for row in tables[0]] == PLAN[:17]
    assert [row.latency_ms for row in tables[0]] == [1.0 + i for i in range(17)]


def test_nothing_is_evaluated_any_more_when_latencies_are_measured_apart(tmp_path: Path) -> None:
    begun, ended = list[Architecture](), list[Architecture]()

    def evaluate(architecture: Architecture) -> float:
        begun.append(architecture)
        # The others are in progress when the first row is enough.
        threading.Event().wait(0.0 if architecture == PLAN[0] else 0.3)
        ended.append(architecture)
        return accuracy(architecture)

    def timed(architecture: Architecture) -> Timing:
        assert sorted(map(PLAN.index, begun)) == sorted(map(PLAN.index, ended))
        return time(architecture)

    path = tmp_path / "rows.csv"
    (row,) = collect(PLAN, path, evaluate=evaluate, time=timed, stop=lambda rows: True, n_at_once=4, apart=True)
    assert (row.architecture, row.latency_ms) == (PLAN[0], 1.0)
    assert len(begun) < len(PLAN)


def test_nobody_minds_what_failed_when_there_was_enough(tmp_path: Path) -> None:
    begun = threading.Barrier(4)

    def evaluate(architecture: Architecture) -> float:
        if architecture in PLAN[:4]:
            begun.wait(60)
        if architecture != PLAN[0]:
            threading.Event().wait(0.3)
            raise DeviceError("the board is gone")
        return accuracy(architecture)

    (row,) = collect(PLAN, tmp_path / "rows.csv", evaluate=evaluate, stop=lambda rows: True, n_at_once=4)
    assert row.architecture == PLAN[0]
    with pytest.raises(DeviceError, match="gone"):
        collect(PLAN, tmp_path / "others.csv", evaluate=evaluate, stop=lambda rows: False, n_at_once=4)


def test_a_collection_that_was_cut_off_ends_with_the_same_table(tmp_path: Path) -> None:
    whole = collect(PLAN, tmp_path / "whole.csv", evaluate=accuracy, time=time)
    path, done = tmp_path / "rows.csv", Counter[Architecture]()

    def counted(architecture: Architecture) -> Timing:
        done[architecture] += 1
        return time(architecture)

    for n_before in (3, 11, 20):

        def dies(architecture: Architecture, n: int = n_before) -> float:
            if len(read_finished(path)) >= n:
                raise DeviceError("cut off")
            return accuracy(architecture)

        with pytest.raises(DeviceError):
            collect(PLAN, path, evaluate=dies, time=counted, n_at_once=3)
    assert collect(PLAN, path, evaluate=accuracy, time=counted, n_at_once=3) == whole
    # What was finished was not measured again.
    assert set(done.values()) == {1}
