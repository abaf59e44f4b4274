"""Executors: the same results wherever the work is done, and none lost with a worker."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from foxnas_mlflow.core.errors import InvalidInputError, WorkerLostError
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.workers import LocalExecutor, each


@dataclasses.dataclass(frozen=True)
class Squares:
    """Squares numbers; 13 ends the process of the first worker that is asked, 99 is refused, 666 ends all.

    Attributes:
        directory: Notes who was made, and whether somebody ended.
    """

    directory: Path

    def __call__(self) -> Callable[[int], tuple[int, int]]:
        (self.directory / f"made-{os.getpid()}").touch()
        return self._square

    def _square(self, number: int) -> tuple[int, int]:
        print("what libraries print")
        if number == 99:
            raise InvalidInputError("a number must not be 99", received=number)
        if number == 666 or (number == 13 and not (self.directory / "ended").exists()):
            (self.directory / "ended").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return number * number, os.getpid()


def test_workers_share_the_items(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LocalExecutor().workers(Squares(tmp_path), 2) as shared:
        # Each is asked for an item before any gets a second one.
        results = dict(as_finished(shared, range(12), n=2))
        assert {number: square for number, (square, _) in results.items()} == {x: x * x for x in range(12)}
        pids = {pid for _, pid in results.values()}
        assert os.getpid() not in pids
        # Each made its work once.
        assert {path.name for path in tmp_path.iterdir()} == {f"made-{pid}" for pid in pids}
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert capfd.readouterr().out == ""


def test_a_lost_workers_item_is_done_again(tmp_path: Path) -> None:
    with LocalExecutor().workers(Squares(tmp_path), 2) as shared:
        results = dict(as_finished(shared, range(20), n=2))
    assert {number: square for number, (square, _) in results.items()} == {x: x * x for x in range(20)}
    assert (tmp_path / "ended").exists()


def test_one_worker_is_started_again(tmp_path: Path) -> None:
    with LocalExecutor().workers(Squares(tmp_path), 1) as shared:
        assert [shared(x)[0] for x in (12, 13, 14)] == [144, 169, 196]


def test_what_the_work_raises_is_raised_here_and_an_item_that_ends_all_ends_the_work(tmp_path: Path) -> None:
    with LocalExecutor().workers(Squares(tmp_path), 1) as shared:
        with pytest.raises(InvalidInputError, match=r"must not be 99; received 99"):
            shared(99)
        assert shared(3)[0] == 9
        with pytest.raises(WorkerLostError, match=r"must not end before its work; received signal 9; .*fewer workers"):
            shared(666)


def test_each_gives_the_results_in_the_items_order_wherever_it_is_done(tmp_path: Path) -> None:
    told: dict[int, int] = {}
    numbers = [5, 13, 2, 8]
    squares = each(
        Squares(tmp_path),
        numbers,
        executor=LocalExecutor(),
        n=2,
        on_result=lambda number, result: told.update({number: result[0]}),
    )
    assert [square for square, _ in squares] == [25, 169, 4, 64]
    assert told == {number: number * number for number in numbers}
    assert os.getpid() not in {pid for _, pid in squares}
    # Without an executor, and for a single item, nobody is started; 13 has ended a process by now.
    assert each(Squares(tmp_path), numbers, executor=None) == [(n * n, os.getpid()) for n in numbers]
    assert each(Squares(tmp_path), [3], executor=LocalExecutor(), n=2) == [(9, os.getpid())]
    assert each(Squares(tmp_path), [], executor=LocalExecutor(), n=2) == []


def test_workers_end_with_the_process_that_started_them(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from foxnas_mlflow.core.workers import LocalExecutor\n"
        "from tests.core.test_workers import Squares\n"
        "with LocalExecutor().workers(Squares(Path(sys.argv[1])), 1) as shared:\n"
        "    print(shared(2)[1], flush=True)\n"
        "    time.sleep(600)\n"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 60
    while Path(f"/proc/{pid}/fd/0").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}/fd/0").exists()
