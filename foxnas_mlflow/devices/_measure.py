"""Measuring a model on a machine (protocol: docs/METHOD.md)."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.edgetpu import COMPILED_OPERATOR
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, InvalidInputError
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._benchmark import MAX_OUTPUT_LEVELS, Benchmark, is_steady, summarize
from foxnas_mlflow.devices._script import prepare, run_board

RECONNECT_SECONDS = (1.0, 4.0, 10.0)
"""Pauses before each try to reach a lost machine again."""


def measure(
    connection: Connection,
    model: str | Path | bytes,
    *,
    threads: int = 1,
    runs: int = 200,
    warmup: int = 10,
    edgetpu: bool = False,
    expected: tuple[NDArray[Any], NDArray[Any]] | None = None,
    max_output_levels: float = MAX_OUTPUT_LEVELS,
    min_seconds: float = 0.5,
    max_seconds: float = 10.0,
    wait_seconds: float = 600.0,
    attempts: int = 3,
) -> Benchmark:
    """Time a TensorFlow Lite model where it will live, in a fresh process.

    Runs that are not steady (something else worked on the machine) are measured again; the last
    attempt counts, whatever it is. A lost connection is opened again and the model measured anew.

    Args:
        connection: The machine, from `connect`. It may be used for any number of models.
        model: A .tflite file, or its bytes.
        threads: Threads of the runtime.
        runs: Timed runs, at least.
        warmup: Runs before them, at least; they also last one second at least.
        edgetpu: Run on the Edge TPU; the file must be compiled for it.
        expected: An input and the output that the host computed for it; the machine's is compared.
        max_output_levels: Largest difference from it, in 8-bit levels.
        min_seconds: Least time of the timed runs.
        max_seconds: Time after which they end even when there are fewer than `runs` (but 20).
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
    options += ["--min-seconds", str(min_seconds), "--max-seconds", str(max_seconds)]
    options += ["--wait-seconds", str(wait_seconds)]
    options += ["--watch-stdin"] if connection.keeps_stdin else []
    options += ["--edgetpu"] if edgetpu else []
    timeout_s = wait_seconds + 3 * max_seconds + 120

    answer: Mapping[str, Any] = {}
    attempt, steady = 0, False
    while not steady and attempt < attempts:
        answer = _with_reconnect(connection, data, None if expected is None else expected[0], options, timeout_s)
        steady = is_steady(answer, threads=threads, edgetpu=edgetpu)
        attempt += 1
    difference, integer = None, True
    if expected is not None:
        difference, integer = _output_difference(answer["output"], expected[1])
    return summarize(
        answer,
        connection=connection.uri,
        threads=threads,
        warmup=warmup,
        attempts=attempt,
        edgetpu=edgetpu,
        output_difference=difference,
        integer_output=integer,
        max_output_levels=max_output_levels,
    )


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


def _with_reconnect(
    connection: Connection, data: bytes, given: NDArray[Any] | None, options: Sequence[str], timeout_s: float
) -> dict[str, Any]:
    lost: DeviceError | None = None
    for pause in (0.0, *RECONNECT_SECONDS):
        if lost is not None:
            time.sleep(pause)
            try:
                connection.reconnect()
            except DeviceError as error:
                # A machine that restarts refuses connections for a while: the loss goes on.
                lost = error
                continue
        try:
            return _measure_once(connection, data, given, options, timeout_s)
        except ConnectionLostError as error:
            lost = error
    raise ConnectionLostError(
        f"{connection.uri} went away and did not come back",
        received=str(lost).rstrip("."),
        remedy="what was measured before is kept: run the same command again when it answers",
    ) from lost


def _measure_once(
    connection: Connection, data: bytes, given: NDArray[Any] | None, options: Sequence[str], timeout_s: float
) -> dict[str, Any]:
    arguments = list(options)
    directory = prepare(connection)
    connection.put(data, f"{directory}/model.tflite")
    if given is not None:
        buffer = io.BytesIO()
        np.save(buffer, given, allow_pickle=False)
        connection.put(buffer.getvalue(), f"{directory}/input.npy")
        arguments += ["--input", f"{directory}/input.npy"]
    return run_board(connection, ["measure", f"{directory}/model.tflite", *arguments], timeout_s=timeout_s)


def _output_difference(answer: Mapping[str, Any], expected: NDArray[Any]) -> tuple[float, bool]:
    """Largest absolute difference, and whether the output is integer."""
    dtype = np.dtype(str(answer["dtype"]))
    got = np.frombuffer(base64.b64decode(answer["base64"]), dtype).reshape(answer["shape"])
    integer = dtype.kind in "iu"
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return float("inf"), integer
    return float(np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()), integer
