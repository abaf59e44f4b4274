"""Signals that wait for the end of a training's step."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def held_signals() -> Iterator[list[signal.Signals]]:
    """Collect SIGTERM and SIGINT in the list, so that a step is never cut in the middle."""
    arrived: list[signal.Signals] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        arrived.append(signal.Signals(signum))

    # What is ignored stays ignored: a shell starts its background jobs so, for Ctrl-C to reach others.
    held = [s for s in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(s) != signal.SIG_IGN]
    previous = {s: signal.signal(s, handler) for s in held}
    try:
        yield arrived
    finally:
        for signum, before in previous.items():
            signal.signal(signum, before)
