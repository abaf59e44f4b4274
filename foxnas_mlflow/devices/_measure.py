"""Measuring a model on a machine (protocol: docs/METHOD.md)."""

from __future__ import annotations

import io
import logging
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.edgetpu import COMPILED_OPERATOR
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, InvalidInputError
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._benchmark import (
    MAX_OUTPUT_LEVELS,
    Benchmark,
    is_steady,
    output_difference,
    summarize,
)
from foxnas_mlflow.devices._local import LocalConnection
from foxnas_mlflow.devices._script import prepare, run_board

RECONNECT_SECONDS = 60.0
"""How long a lost machine is waited for: one that restarts needs half a minute."""

MAX_LOSSES = 3
"""How often a machine may go away while it measures one model: one that does each time never ends."""

ANSWER_SECONDS = 600.0
DAY_SECONDS = 86_400

Outputs = Sequence[NDArray[Any]]
"""What a model answers to the board script's fixed inputs."""

T = TypeVar("T")

_log = logging.getLogger(__name__)


def measure(
    connection: Connection,
    model: str | Path | bytes,
    *,
    threads: int = 1,
    runs: int = 200,
    warmup: int = 10,
    warmup_seconds: float = 1.0,
    edgetpu: bool = False,
    expected: Outputs | None = None,
    max_output_levels: float = MAX_OUTPUT_LEVELS,
    min_seconds: float = 0.5,
    max_seconds: float = 10.0,
    sustained_seconds: float = 0.0,
    energy: str = "",
    wait_seconds: float = 600.0,
    attempts: int = 3,
) -> Benchmark:
    """Time a TensorFlow Lite model where it will live, in a fresh process.

    Runs that are not steady (something else worked on the machine) are measured again; the last
    attempt counts, whatever it is. A lost connection is opened again and the model measured anew. Where energy or the
    time under load cannot be measured then, the figures before count, and are invalid for what is missing.

    Args:
        connection: The machine, from `connect`. It may be used for any number of models.
        model: A .tflite file, or its bytes.
        threads: Threads of the runtime.
        runs: Timed runs, at least.
        warmup: Runs before them, at least.
        warmup_seconds: Least time of the runs before them.
        edgetpu: Run on the Edge TPU; the file must be compiled for it.
        expected: What the host answers, from `host_answer`; the machine's is compared with it.
        max_output_levels: Largest difference from it, in 8-bit levels.
        min_seconds: Least time of the timed runs.
        max_seconds: Time after which they end even when there are fewer than `runs` (but 20); 0: no limit.
        sustained_seconds: Time under load without a pause, after the timed runs; 0: none.
        energy: ``auto`` measures energy with the machine's own sensors, anything else is a command there that prints
            watts; empty: it is not measured. It takes 20 seconds, with a slow meter longer.
        wait_seconds: How long to wait while another measurement holds the machine.
        attempts: Measurements until one is steady, at most.

    Raises:
        InvalidInputError: If the model is no TensorFlow Lite file, is compiled for an Edge TPU and shall run
            elsewhere or the other way round, or a count is not positive.
        DeviceError: If the machine lacks something, refuses, or cannot run the model.
        ConnectionLostError: If the machine went away and did not come back.
    """
    data = read_model(model)
    _check_compiled(data, edgetpu)
    for name, value in (("threads", threads), ("runs", runs), ("warmup", warmup), ("attempts", attempts)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidInputError(f"{name} must be a positive integer", received=repr(value))
    options = ["--threads", str(threads), "--runs", str(runs), "--warmup", str(warmup)]
    options += ["--warmup-seconds", str(warmup_seconds)]
    options += ["--min-seconds", str(min_seconds), "--max-seconds", str(max_seconds)]
    options += ["--wait-seconds", str(wait_seconds)]
    options += ["--watch-stdin"] if connection.keeps_stdin else []
    options += ["--edgetpu"] if edgetpu else []
    options += ["--stick", connection.edgetpu] if edgetpu and connection.edgetpu else []
    # Once, when the timed runs are steady: they take long.
    longer = ["--sustained-seconds", str(sustained_seconds)] if sustained_seconds else []
    longer += ["--energy", energy] if energy else []
    timeout_s = wait_seconds + 3 * max_seconds + sustained_seconds + 180 if max_seconds else float(DAY_SECONDS)

    # Texts are not compared: of a model that answers nothing else nothing is.
    compared = bool(expected)
    answer: Mapping[str, Any] = {}
    attempt, steady, got = 0, False, None
    if energy:
        # Before minutes of runs that would be lost without it.
        require_meter(connection, energy)
    while not steady and attempt < attempts:
        answer, got = _with_reconnect(connection, lambda: _measure_once(connection, data, compared, options, timeout_s))
        steady = is_steady(answer, threads=threads, edgetpu=edgetpu)
        attempt += 1
    if longer:
        options += longer
        try:
            answer, got = _with_reconnect(
                connection, lambda: _measure_once(connection, data, compared, options, timeout_s)
            )
        except DeviceError as error:
            # Its figures are whole, and the machine may be gone.
            asked = [*(["load"] if sustained_seconds else []), *(["energy"] if energy else [])]
            answer = {**answer, "lost": f"no {' and no '.join(asked)}, {str(error).rstrip('.')}"}
    return summarize(
        answer,
        connection=connection.uri,
        threads=threads,
        runs=runs,
        warmup=warmup,
        attempts=attempt,
        edgetpu=edgetpu,
        output_difference=None if not expected or got is None else output_difference(got, expected),
        max_output_levels=max_output_levels,
    )


def require_meter(connection: Connection, energy: str) -> None:
    """Refuse a machine without the meter that is asked for.

    Args:
        connection: The machine.
        energy: As for `measure`.

    Raises:
        DeviceError: If it has no such meter, or that says nothing.
    """
    _with_reconnect(connection, lambda: run_board(connection, ["meter", energy], timeout_s=60))


def read_model(model: str | Path | bytes) -> bytes:
    """The bytes of a model.

    Raises:
        InvalidInputError: If they are not those of a TensorFlow Lite file.
    """
    name = "bytes"
    if not isinstance(model, bytes):
        name, path = str(model), Path(model)
        try:
            model = path.read_bytes()
        except OSError as error:
            raise InvalidInputError(
                "a model must be a file that can be read", received=f"{name}: {error.strerror}"
            ) from error
    if model[4:8] != b"TFL3":
        raise InvalidInputError(
            "a model must be a TensorFlow Lite file", received=name, remedy="convert a subnet with: foxnas quantize"
        )
    return model


def _check_compiled(data: bytes, edgetpu: bool) -> None:
    """An Edge TPU's delegate leaves a file that is not compiled to the processor, whose time would be taken for its."""
    compiled = COMPILED_OPERATOR.encode() in data
    if edgetpu and not compiled:
        raise InvalidInputError(
            "an Edge TPU runs only what was compiled for it",
            received=f"a model without the operator {COMPILED_OPERATOR}",
            remedy="compile it with: foxnas quantize --target edgetpu",
        )
    if compiled and not edgetpu:
        raise InvalidInputError(
            "a model that was compiled for an Edge TPU runs only there",
            remedy="give --target edgetpu, or the int8 model that it was compiled from",
        )


def host_answer(model: str | Path | bytes) -> list[NDArray[Any]] | None:
    """What this host answers to the board script's fixed inputs, to compare another machine with.

    In a process of its own: the runtime crashes on some damaged files.

    Returns:
        The model's outputs, or None where this host has no runtime or its runtime cannot run the model.

    Raises:
        InvalidInputError: If the model is no TensorFlow Lite file.
    """
    data = read_model(model)
    with LocalConnection() as connection:
        directory = prepare(connection)
        model, outputs = connection.send(data, "model.tflite"), f"{directory}/answer.npz"
        try:
            run_board(connection, ["answer", model, "--outputs", outputs], timeout_s=ANSWER_SECONDS)
        except DeviceError as error:
            _log.info("the outputs are not compared: %s", error)
            return None
        return _outputs(connection.get(outputs))


def _with_reconnect(connection: Connection, work: Callable[[], T]) -> T:
    n_losses = 0
    while True:
        try:
            return work()
        except ConnectionLostError as error:
            n_losses += 1
            if n_losses == MAX_LOSSES:
                raise ConnectionLostError(
                    f"{connection.uri} must not go away whenever it measures",
                    received=f"{n_losses} times in turn, at last: {error.received}",
                    remedy=error.remedy,
                ) from error
            await_machine(connection, error)


def await_machine(connection: Connection, lost: DeviceError) -> None:
    """Wait until a lost machine answers again, and open the connection anew.

    Raises:
        ConnectionLostError: If it does not come back in time.
    """
    seconds = RECONNECT_SECONDS if connection.reconnect_seconds is None else connection.reconnect_seconds
    deadline, pause = time.monotonic() + seconds, min(1.0, seconds / 2)
    _log.warning("%s went away: waiting up to %g s for it", connection.uri, seconds)
    while time.monotonic() < deadline:
        time.sleep(pause)
        try:
            connection.reconnect()
        except DeviceError as error:
            # A machine that restarts refuses connections for a while: the loss goes on.
            lost, pause = error, min(2 * pause, 5.0)
        else:
            return
    raise ConnectionLostError(
        f"{connection.uri} went away and did not come back",
        received=str(lost).rstrip("."),
        remedy="what was measured before is kept: run the same command again when it answers",
    ) from lost


def _measure_once(
    connection: Connection, data: bytes, compared: bool, options: Sequence[str], timeout_s: float
) -> tuple[dict[str, Any], list[NDArray[Any]] | None]:
    directory = prepare(connection)
    model, outputs = connection.send(data, "model.tflite"), f"{directory}/answer.npz"
    arguments = ["measure", model, *options, *(["--outputs", outputs] if compared else [])]
    answer = run_board(connection, arguments, timeout_s=timeout_s)
    return answer, _outputs(connection.get(outputs)) if compared else None


def _outputs(archive: bytes) -> list[NDArray[Any]]:
    try:
        with np.load(io.BytesIO(archive), allow_pickle=False) as arrays:
            return [arrays[name] for name in arrays.files]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise DeviceError(
            "a machine's outputs must arrive whole", received=str(error), remedy="run it again"
        ) from error
