"""Samplings that lose a process, a worker, a node or a board in the middle, at random moments.

    python -m tests.kills [--moments 20] [--seed 0] [--kinds process worker board node]

What is evaluated and measured is made up and takes 50 ms, so that a moment takes seconds; executors, boards, rows and
files are the real ones. Of each moment is asked: the table is the undisturbed one, no row that was finished is lost,
and nothing of it is done again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.core.measurements import Timing, read_finished
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.workers import LocalExecutor
from foxnas_mlflow.workflows import _boards

KINDS = ("process", "worker", "board", "node")
PLAN = CPU_SPACE.sample(np.random.default_rng(0), n=40)
SECONDS = 0.05


def made_up(architecture: Architecture, what: str) -> float:
    """A figure that depends on the network alone, between 1 and 2."""
    return 1 + int(hashlib.sha256(f"{what}{architecture.to_json()}".encode()).hexdigest()[:8], 16) / 2**32


@dataclasses.dataclass(frozen=True)
class Evaluating:
    """Makes a worker that notes who it is and what it has done."""

    directory: Path

    def __call__(self) -> Callable[[Architecture], float]:
        (self.directory / f"worker-{os.getpid()}").touch()
        return self._evaluate

    def _evaluate(self, architecture: Architecture) -> float:
        # On a busy machine all would be over before anything is lost.
        while self._n_evaluated() >= int((self.directory / "most").read_text()) and not self._is_lost():
            time.sleep(0.01)
        time.sleep(SECONDS)
        with (self.directory / "evaluated").open("a") as log:
            log.write(f"{architecture.to_json()}\n")
        return 40 * made_up(architecture, "accuracy")

    def _n_evaluated(self) -> int:
        path = self.directory / "evaluated"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def _is_lost(self) -> bool:
        return (self.directory / "lost").exists()


def work(directory: Path, address: str) -> None:
    """A sampling with two workers and two boards, of which the first is lost while there is a file ``dead``."""
    # As alike as they are, boards that wait need no comparing.
    _boards.compare = lambda *arguments: None  # type: ignore[assignment]

    @contextlib.contextmanager
    def open_one(device: str) -> Iterator[Callable[[Architecture], Timing]]:
        def measure(architecture: Architecture) -> Timing:
            time.sleep(SECONDS)
            if device.endswith("0") and (directory / "dead").exists():
                raise ConnectionLostError("a board must answer", received=device)
            return Timing(made_up(architecture, "latency"), "measured", "a board", "none", 1)

        if device.endswith("0") and (directory / "dead").exists():
            raise DeviceError("a board must answer", received=device)
        yield measure

    with contextlib.ExitStack() as stack:
        executor: Any = LocalExecutor()
        if address:
            from foxnas_mlflow.workflows._ray import open_ray

            executor = stack.enter_context(open_ray(address, workers=2))
        shared = stack.enter_context(executor.workers(Evaluating(directory), 2))
        boards = stack.enter_context(_boards.open_boards(open_one, ["ssh://board-0", "ssh://board-1"], CPU_SPACE))
        collect(PLAN, directory / "rows.csv", evaluate=shared, time=boards.time, n_at_once=4)


def start(directory: Path, address: str = "") -> subprocess.Popen[bytes]:
    # Workers read these classes from the module of this name.
    code = "import sys; from pathlib import Path; from tests.kills import work; work(Path(sys.argv[1]), sys.argv[2])"
    with (directory / "said").open("ab") as said:
        return subprocess.Popen(
            [sys.executable, "-c", code, str(directory), address], cwd=Path(__file__).parents[1], stderr=said
        )


def moment(kind: str, rng: random.Random, directory: Path, cluster: Any = None) -> str:
    """One loss at a random moment of a sampling, which then goes on to its end.

    Returns:
        What happened, in a line.

    Raises:
        AssertionError: If a row was lost or done again, or the table is another one.
    """
    address = "" if cluster is None else cluster.address
    node = None
    if kind == "node":
        node = next(iter(cluster.worker_nodes), None) or cluster.add_node(num_cpus=1)
    # After some rows, so that there is something to lose, and before the last ones.
    wanted = rng.randrange(1, len(PLAN) - 8)
    (directory / "most").write_text(str(wanted + 8))
    process = start(directory, address)
    rows_csv = directory / "rows.csv"
    while not (rows_csv.exists() and rows_csv.read_bytes().count(b"\n") > wanted) and process.poll() is None:
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 2 * SECONDS))
    if kind == "process":
        process.kill()
        process.wait()
    elif kind == "worker":
        pid = int(rng.choice(sorted(directory.glob("worker-*"))).name.removeprefix("worker-"))
        os.kill(pid, signal.SIGKILL)
    elif kind == "board":
        (directory / "dead").touch()
    else:
        cluster.remove_node(node, allow_graceful=False)
    (directory / "lost").touch()
    finished = read_finished(rows_csv)
    n_done = len((directory / "evaluated").read_text().splitlines())
    if kind == "process":
        process = start(directory, address)
    assert process.wait(300) == 0, (directory / "said").read_text()
    rows = read_finished(rows_csv)
    assert [row.architecture for row in rows] == PLAN
    assert [row.accuracy for row in rows] == [40 * made_up(a, "accuracy") for a in PLAN]
    assert [row.latency_ms for row in rows] == [made_up(a, "latency") for a in PLAN]
    by_network = {row.architecture: row for row in rows}
    assert all(by_network[row.architecture] == row for row in finished), "a finished row was changed"
    later = set((directory / "evaluated").read_text().splitlines()[n_done:])
    again = later & {row.architecture.to_json() for row in finished}
    assert not again, f"{len(again)} finished rows were evaluated again"
    return f"{kind} lost after {len(finished)} rows of {len(rows)}: none lost, none twice, the same table"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    args = parser.parse_args()
    rng = random.Random(args.seed)
    cluster = None
    if "node" in args.kinds:
        from ray.cluster_utils import Cluster

        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    for i in range(args.moments):
        kind = args.kinds[i % len(args.kinds)]
        with tempfile.TemporaryDirectory() as directory:
            print(f"{i + 1:>3}", moment(kind, rng, Path(directory), cluster if kind == "node" else None), flush=True)
    if cluster is not None:
        cluster.shutdown()


if __name__ == "__main__":
    main()
