"""A worker process: ``python -m foxnas_mlflow.core._worker FD`` makes its work once and then does it item by item.

What it reads and writes are pickles of the process that started it, through a socket that only these two have. It ends
when that process does, whatever ended it.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any


def serve(connection: Connection) -> None:
    """Answer until the other side is gone."""
    sys.path[:] = pickle.loads(connection.recv_bytes())  # noqa: S301 - of the process that started this one
    work: Any = None
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            received = connection.recv_bytes()
            try:
                value = pickle.loads(received)  # noqa: S301 - the same
                if work is None:
                    work, answer = value(), None
                else:
                    answer = work(value)
                reply = pickle.dumps((True, answer))
            except Exception as error:
                reply = _pickled(error)
            connection.send_bytes(reply)


def _pickled(error: Exception) -> bytes:
    """An error that the other side can raise: itself, or its traceback where it cannot be made anew."""
    with contextlib.suppress(Exception):
        reply = pickle.dumps((False, error))
        pickle.loads(reply)  # noqa: S301 - just made
        return reply
    return pickle.dumps((False, RuntimeError("".join(traceback.format_exception(error)))))


if __name__ == "__main__":
    # Ctrl-C is for the process that started this one, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What libraries print is nothing that a reader of the command's output waits for.
    os.dup2(2, 1)
    serve(Connection(int(sys.argv[1])))
