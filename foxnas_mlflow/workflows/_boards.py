"""Several boards of one kind as one source of latencies: they share the work, and each measures one network at a time.

Before the work they are compared on common networks. With x[b, p, r] the logarithm of the latency of probe p on board
b in round r, a board's speed is the mean of x over p and r; two boards differ by more than noise when the difference
of their speeds is above `MAX_DIFFERENCE` and above `SIGMAS` of its standard errors, which come from the rounds.

| symbol | here         | shape                    | unit       |
|--------|--------------|--------------------------|------------|
| x      | `logs`       | (boards, probes, rounds) | log of ms  |
| sigma  | `noise`      | ()                       | log of ms  |
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.calibration import choose_checks
from foxnas_mlflow.core.errors import DeviceError, FoxNasError, WorkerLostError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.parallel import Shared, as_finished
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.workflows._addresses import shown

MAX_DIFFERENCE = 0.03
"""Relative difference of two boards' speeds that may be, whatever the noise: cost models are no better."""

SIGMAS = 3.0
N_DRAWN = 2
"""Random networks that boards are compared on, beside the smallest one."""

ROUNDS = 2
MAX_ROUNDS = 6
"""Boards that seem to differ are measured again so often, before they are refused."""

LOST = (DeviceError, WorkerLostError)
"""What is the board's fault, or that of the node that reaches it, and not the network's."""

_log = logging.getLogger("foxnas_mlflow")


@dataclasses.dataclass(frozen=True)
class Boards:
    """Boards that are alike.

    Attributes:
        time: Measures a network on the next free board; the timing's device says which.
        devices: Addresses of those that answered.
        aside: Why boards were set aside, by address; it grows while the work goes on.
    """

    time: Callable[[Architecture], Timing]
    devices: tuple[str, ...]
    aside: Mapping[str, str]


@contextlib.contextmanager
def open_boards(
    open_one: Callable[[str], AbstractContextManager[Callable[[Architecture], Timing]]],
    devices: Sequence[str],
    space: SearchSpace,
) -> Iterator[Boards]:
    """Open several boards, and compare them.

    Args:
        open_one: Opens a board: its measurements.
        devices: Addresses; one that does not answer is set aside.
        space: The space whose networks they are compared on.

    Raises:
        DeviceError: If none answers, or two differ by more than noise.
    """
    aside: dict[str, str] = {}

    def set_aside(device: str, error: Exception) -> None:
        aside[device] = str(error)
        _log.warning("%s is set aside, the other boards go on: %s", shown(device), error)

    with contextlib.ExitStack() as stack:
        opened: dict[str, Callable[[Architecture], Timing]] = {}
        for device in devices:
            try:
                opened[device] = _named(stack.enter_context(open_one(device)), device)
            except LOST as error:
                if len(aside) == len(devices) - 1:
                    raise
                set_aside(device, error)
        compare(opened, space, set_aside)
        yield Boards(Shared(opened, lost=LOST, on_aside=set_aside), tuple(opened), aside)


def _named(time: Callable[[Architecture], Timing], device: str) -> Callable[[Architecture], Timing]:
    """The same measurements, whose device says which board it was."""

    def named(architecture: Architecture) -> Timing:
        timing = time(architecture)
        return dataclasses.replace(timing, device=f"{timing.device} at {shown(device)}")

    return named


def compare(
    boards: dict[str, Callable[[Architecture], Timing]],
    space: SearchSpace,
    set_aside: Callable[[str, Exception], None],
) -> None:
    """Measure common networks on all boards at once, and refuse boards that are not alike.

    Args:
        boards: Measurements by address; a board that fails is taken out.
        space: The space of the networks.
        set_aside: Told of a board that fails.

    Raises:
        DeviceError: If two differ by more than noise, or the last one fails.
    """
    probes = [space.smallest(), *choose_checks(space, N_DRAWN)]
    latencies: dict[str, list[list[float]]] = {device: [] for device in boards}

    def measured(device: str) -> list[float] | FoxNasError:
        try:
            # One that was disturbed counts: that is noise.
            return [boards[device](probe).latency_ms for probe in probes]
        except LOST as error:
            return error

    for n_rounds in range(1, MAX_ROUNDS + 1):
        if len(boards) < 2:
            return
        for device, round_ in as_finished(measured, list(boards), n=len(boards)):
            if not isinstance(round_, FoxNasError):
                latencies[device].append(round_)
                continue
            if len(boards) == 1:
                raise round_
            set_aside(device, round_)
            del boards[device], latencies[device]
        if n_rounds < ROUNDS or len(boards) < 2:
            continue
        # Shape (boards, probes, rounds).
        logs = np.log(np.array(list(latencies.values()))).transpose(0, 2, 1)
        low, high, difference, error = difference_of(logs)
        if difference <= max(np.log1p(MAX_DIFFERENCE), SIGMAS * error):
            return
    names = [shown(device) for device in latencies]
    raise DeviceError(
        "boards that share work must be alike",
        received=f"{names[high]}, {100 * np.expm1(difference):.1f} % slower than {names[low]} on {len(probes)} common "
        f"networks (noise {100 * error:.1f} %)",
        remedy="give boards of one kind, with one runtime, governor and cooling, or measure on each by itself",
    )


def difference_of(logs: NDArray[np.float64]) -> tuple[int, int, float, float]:
    """The fastest and the slowest board, and how much they differ.

    Args:
        logs: Logarithms of latencies, shape (boards, probes, rounds), two rounds at least.

    Returns:
        Indices of the fastest and the slowest board, the difference of their mean logarithms, and its standard error
        from what the rounds differ by.
    """
    n_probes, n_rounds = logs.shape[1:]
    noise = float(np.sqrt(logs.var(axis=2, ddof=1).mean()))
    speeds = logs.mean(axis=(1, 2))
    low, high = int(speeds.argmin()), int(speeds.argmax())
    return low, high, float(speeds[high] - speeds[low]), noise * float(np.sqrt(2 / (n_probes * n_rounds)))
