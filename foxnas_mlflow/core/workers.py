"""Where work is done: the interface of executors, and the default one, processes of this machine.

An executor starts workers. A worker makes its work once (loads weights, reads images, opens a board) and then does it
item by item; several share the items through `foxnas_mlflow.core.parallel.Shared`, which also says what happens when
one is lost. Nothing else knows which executor runs.
"""

from __future__ import annotations

import contextlib
import logging
import pickle
import socket
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from foxnas_mlflow.core.errors import WorkerLostError
from foxnas_mlflow.core.parallel import Shared, as_finished
from foxnas_mlflow.core.processors import n_processors

T = TypeVar("T")
R = TypeVar("R")

Make = Callable[[], Callable[[T], R]]
"""Makes the work of a worker, there; it can be pickled."""

_log = logging.getLogger("foxnas_mlflow")

_END_SECONDS = 5.0


@dataclass(frozen=True)
class Ready(Generic[T, R]):
    """Makes work that needs nothing made.

    Attributes:
        work: A function that can be pickled.
    """

    work: Callable[[T], R]

    def __call__(self) -> Callable[[T], R]:
        """The work."""
        return self.work


class Worker(ABC, Generic[T, R]):
    """Does one item at a time, elsewhere."""

    @abstractmethod
    def __call__(self, item: T) -> R:
        """Do an item. The first call, and one after a loss, makes the work anew.

        Raises:
            WorkerLostError: If the worker ended before it answered.
            Exception: What the work raised.
        """

    @abstractmethod
    def close(self) -> None:
        """End it, also in the middle of an item; must not raise."""


class Executor(ABC):
    """Where workers live."""

    @abstractmethod
    def start(self, make: Make[T, R], *, resource: str = "") -> Worker[T, R]:
        """A worker that is not yet started; its first call does it.

        Args:
            make: Makes its work.
            resource: What it needs beside a processor, of which the executor `has` some; empty: nothing.
        """

    @abstractmethod
    def threads(self, n: int) -> int:
        """Threads that each of `n` workers may use."""

    def has(self, resource: str) -> bool:
        """Whether workers can be given a resource, such as the node that reaches a board."""
        return False

    @contextlib.contextmanager
    def workers(self, make: Make[T, R], n: int) -> Iterator[Shared[T, R]]:
        """Workers that share items; a lost one's item is done by another, or by itself once it is started again.

        Args:
            make: Makes the work of each.
            n: How many.

        Raises:
            WorkerLostError: From a call, if all workers were lost twice in a row.
        """
        started = {f"worker {k + 1}": self.start(make) for k in range(n)}
        try:
            yield Shared(started, lost=(WorkerLostError,), on_aside=_tell)
        finally:
            for worker in started.values():
                worker.close()


def each(
    make: Make[T, R],
    items: Sequence[T],
    *,
    executor: Executor | None,
    n: int = 1,
    on_result: Callable[[T, R], None] = lambda item, result: None,
) -> list[R]:
    """Do all items and wait for them: here, or by several workers at once.

    Args:
        make: Makes the work.
        items: What to do it on.
        executor: Starts the workers; None, or a single item: it is done here, item by item.
        n: How many, at most.
        on_result: Told here of each result as it comes.

    Returns:
        The results, in the items' order.

    Raises:
        WorkerLostError: If all workers were lost twice in a row.
        Exception: What the work raised.
    """
    n = min(n, len(items))
    with contextlib.ExitStack() as stack:
        work: Callable[[T], R]
        if executor is None or len(items) < 2:
            n, work = 1, make()
        else:
            work = stack.enter_context(executor.workers(make, n))
        done: dict[int, R] = {}
        for i, result in as_finished(lambda i: work(items[i]), range(len(items)), n=n):
            on_result(items[i], result)
            done[i] = result
    return [done[i] for i in range(len(items))]


def _tell(name: str, error: Exception) -> None:
    _log.warning("%s is set aside, the others go on: %s", name, error)


class LocalExecutor(Executor):
    """Processes of this machine, which end with this one."""

    def start(self, make: Make[T, R], *, resource: str = "") -> Worker[T, R]:
        """A process, started by its first call."""
        return _Process(make)

    def threads(self, n: int) -> int:
        """Its share of this machine's processors."""
        return max(n_processors() // n, 1)


class _Process(Worker[T, R]):
    def __init__(self, make: Make[T, R]) -> None:
        self._make = make
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def __call__(self, item: T) -> R:
        if self._connection is None:
            self._start()
            self._ask(self._make)
        result: R = self._ask(item)
        return result

    def close(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._connection is not None:
            self._connection.close()
        self._process = self._connection = None

    def _start(self) -> None:
        here, there = socket.socketpair()
        command = [sys.executable, "-m", "foxnas_mlflow.core._worker", str(there.fileno())]
        with there:
            self._process = subprocess.Popen(  # noqa: S603
                command, stdin=subprocess.DEVNULL, pass_fds=[there.fileno()]
            )
        self._connection = Connection(here.detach())
        self._connection.send_bytes(pickle.dumps(sys.path))

    def _ask(self, question: Any) -> Any:
        assert self._connection is not None
        try:
            self._connection.send_bytes(pickle.dumps(question))
            is_answer, value = pickle.loads(self._connection.recv_bytes())  # noqa: S301 - of a process that is ours
        except (EOFError, OSError) as error:
            raise self._lost() from error
        if not is_answer:
            raise value
        return value

    def _lost(self) -> WorkerLostError:
        status = None
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = self._process.wait(_END_SECONDS)
        self.close()
        return WorkerLostError(
            "a worker process must not end before its work",
            received="no answer" if status is None else f"signal {-status}" if status < 0 else f"exit status {status}",
            remedy="see its message above; where memory is short, give fewer workers",
        )
