"""Work that is shared: calls that are made at once, and workers of which each does one call at a time."""

from __future__ import annotations

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Generic, ParamSpec, TypeVar

T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")

MAX_FAILURES = 2
"""A worker that fails so often in a row is set aside."""

_log = logging.getLogger(__name__)


def as_finished(work: Callable[[T], R], items: Iterable[T], *, n: int) -> Iterator[tuple[T, R]]:
    """Do work on items, `n` at once, and yield each item with its result when it is finished.

    With `n` of 1 it is done here, item by item, as it is asked for. An item is taken when it begins, and no more than
    `n` are in progress or finished without having been asked for: who stops asking stops the work.

    Args:
        work: The work; with `n` above 1 it is called by several threads.
        items: What to do it on; the results' order is that in which they finish.
        n: How many at once.

    Raises:
        BaseException: What `work` raised, once what was begun beside it is finished and yielded.
    """
    if n <= 1:
        for item in items:
            yield item, work(item)
        return
    waiting, taking, stopped, places = iter(items), threading.Lock(), threading.Event(), threading.Semaphore(n)
    finished: queue.SimpleQueue[tuple[T | None, R | None, BaseException | None, bool]] = queue.SimpleQueue()

    def go_on() -> None:
        try:
            while True:
                places.acquire()
                if stopped.is_set():
                    break
                with taking:
                    try:
                        item = next(waiting)
                    except StopIteration:
                        break
                finished.put((item, work(item), None, False))
        except BaseException as error:
            stopped.set()
            places.release(n)
            finished.put((None, None, error, False))
        finished.put((None, None, None, True))

    # What is in progress when this process ends must not hold it up.
    for k in range(n):
        threading.Thread(target=go_on, name=f"foxnas-work-{k}", daemon=True).start()
    failure: BaseException | None = None
    try:
        running = n
        while running:
            done, result, error, ended = finished.get()
            if ended:
                running -= 1
            elif error is not None:
                failure = failure or error
            else:
                yield done, result  # type: ignore[misc]
                places.release()
    finally:
        stopped.set()
        places.release(n)
    if failure is not None:
        raise failure


class Shared(Generic[T, R]):
    """Workers that share calls: a call waits for a free worker, and each does one at a time.

    A worker that is lost in a call goes to the end of the queue, and the call is made again by the next free one;
    lost so in `MAX_FAILURES` calls in a row it is set aside, which is told once.

    Args:
        workers: What each does with a call, by name.
        lost: Errors that are the worker's and not the call's.
        on_aside: Told of each worker that is set aside: its name and its last error.

    Attributes:
        aside: Why workers were set aside, by name.
    """

    def __init__(
        self,
        workers: Mapping[str, Callable[[T], R]],
        *,
        lost: tuple[type[Exception], ...] = (),
        on_aside: Callable[[str, Exception], None] = lambda name, error: None,
    ) -> None:
        self.aside: dict[str, str] = {}
        self._workers, self._lost, self._on_aside = dict(workers), lost, on_aside
        self._free = deque(self._workers)
        self._failures = dict.fromkeys(self._workers, 0)
        self._changed = threading.Condition()
        self._last: Exception | None = None

    def __len__(self) -> int:
        """Workers that are not set aside."""
        return len(self._workers) - len(self.aside)

    def __call__(self, item: T) -> R:
        """Have a call done by a worker.

        Raises:
            Exception: What the worker raised, if it is not one of `lost`; the last one's loss when all are set aside.
        """
        while True:
            name = self._take()
            try:
                result = self._workers[name](item)
            except self._lost as error:
                self._put_back(name, error)
            except BaseException:
                self._put_back(name)
                raise
            else:
                self._put_back(name)
                return result

    def _take(self) -> str:
        with self._changed:
            while not self._free:
                if self._last is not None and len(self) == 0:
                    raise self._last
                self._changed.wait()
            return self._free.popleft()

    def _put_back(self, name: str, error: Exception | None = None) -> None:
        with self._changed:
            self._failures[name] = 0 if error is None else self._failures[name] + 1
            if error is not None and self._failures[name] >= MAX_FAILURES:
                self.aside[name] = str(error)
                self._last = error
            else:
                self._free.append(name)
            self._changed.notify_all()
        if error is not None and name in self.aside:
            self._on_aside(name, error)
        elif error is not None:
            _log.info("%s failed, the work goes to the next that is free: %s", name, error)


def one_at_a_time(work: Callable[P, R]) -> Callable[P, R]:
    """The same work, of which no two calls are in progress at once."""
    lock = threading.Lock()

    def locked(*arguments: P.args, **options: P.kwargs) -> R:
        with lock:
            return work(*arguments, **options)

    return locked
