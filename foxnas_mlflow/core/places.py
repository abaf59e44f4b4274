"""Places of workers and interpreters, some of which are empty; travels to boards."""

from __future__ import annotations

import queue
from typing import Any


class Places(queue.LifoQueue):  # type: ignore[type-arg]  # (Python 3.7 has no LifoQueue[T])
    """Who is idle, last in, first out: a warm one stays busy. None is a place where another one can be opened.

    Empty places are taken last, so that one which cannot be filled keeps nobody from who is idle.
    """

    def _put(self, item: Any) -> None:
        if item is None:
            self.queue.insert(0, None)
        else:
            self.queue.append(item)
