"""Timing int8 models side by side in one process, so that whatever disturbs the machine disturbs all."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.runtime import open_interpreter

TURN = 3


def side_by_side(files: Sequence[bytes], *, threads: int = 1, rounds: int = 60) -> NDArray[np.float64]:
    """Milliseconds of each file in each round, shape (rounds, n_files).

    Every round gives each file a turn: one inference to fill the caches, and the median of three
    timed ones. The order of the files alternates. Ratios are best taken round by round.
    """
    interpreters = []
    for data in files:
        interpreter = open_interpreter(data, threads=threads)
        tensor = interpreter.get_input_details()[0]
        rng = np.random.default_rng(1)
        interpreter.set_tensor(tensor["index"], rng.integers(-128, 128, tensor["shape"], dtype=np.int8))
        for _ in range(5):
            interpreter.invoke()
        interpreters.append(interpreter)
    milliseconds = np.empty((rounds, len(files)))
    for turn in range(rounds):
        order = range(len(files)) if turn % 2 == 0 else reversed(range(len(files)))
        for i in order:
            interpreters[i].invoke()
            samples = []
            for _ in range(TURN):
                start = time.perf_counter_ns()
                interpreters[i].invoke()
                samples.append((time.perf_counter_ns() - start) / 1e6)
            milliseconds[turn, i] = np.median(samples)
    return milliseconds
