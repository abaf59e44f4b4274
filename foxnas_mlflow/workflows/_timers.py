"""Where the latency of a subnet comes from: a device that runs a probe of it, or a cost model."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, OutOfDomainError, import_or_raise
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_finished
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.predictors import PredictorSet, reference_latency
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.workflows._addresses import addresses, is_here, shown
from foxnas_mlflow.workflows._boards import open_boards

if TYPE_CHECKING:
    from foxnas_mlflow.core.workers import Executor
    from foxnas_mlflow.devices import Benchmark


@dataclass(frozen=True)
class Timer:
    """A source of latencies.

    Attributes:
        time: Latency of a subnet of the space.
        source: ``measured`` or ``cost_model``.
        where: The device's address, or what the cost model is of.
        predictors: The cost model, if it is one.
        n_boards: How many networks can be timed at once, by as many threads.
        here: Whether this machine is among the boards, so that other work on it disturbs them.
        aside: Why boards were set aside, by address; it grows while the work goes on.
    """

    time: Callable[[Architecture], Timing]
    source: str
    where: str
    predictors: PredictorSet | None = None
    n_boards: int = 1
    here: bool = False
    aside: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def ahead(self, architectures: Iterable[Architecture]) -> None:
        """Time networks on all boards at once, so that who asks for one later finds it `remembered`."""
        for _ in as_finished(self.time, architectures, n=self.n_boards):
            pass


@contextlib.contextmanager
def open_timer(
    target: Target,
    space: SearchSpace,
    *,
    device: str = "",
    compiler_image: str = "",
    executor: Executor | None = None,
) -> Iterator[Timer]:
    """A device's latencies, or without one those of the target's cost model.

    A target that has no cost model but a device of its own (``cpu``: this host) is measured there.

    Args:
        target: The target.
        space: The space whose subnets are timed.
        device: Connection; empty: none.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        executor: Reaches boards that this machine may not reach.

    Raises:
        OutOfDomainError: If there is neither a device nor a cost model.
        DeviceError: If the device cannot be reached.
    """
    if not device:
        try:
            predictors = reference_latency(target, space)
        except OutOfDomainError:
            if not target.device:
                raise
            device = target.device
        else:
            yield Timer(_estimate(predictors), "cost_model", f"cost model of {target.name}", predictors)
            return
    with open_device(target, space, device, compiler_image=compiler_image, executor=executor) as timer:
        yield timer


@contextlib.contextmanager
def open_meter(target: Target, device: str, *, compiler_image: str = "") -> Iterator[Callable[..., Benchmark]]:
    """Measure int8 files on a device as a target runs them: with its threads, compiled first for an Edge TPU.

    Yields:
        Takes the bytes of an int8 file and the options of `foxnas_mlflow.devices.measure`.

    Raises:
        DeviceError: If the device cannot be reached, or there is no compiler for its Edge TPU.
    """
    from foxnas_mlflow.devices import connect, measure
    from foxnas_mlflow.tflite import require_compiler

    compiler = require_compiler(compiler_image) if target.runtime == "edgetpu" else None
    with connect(device) as connection:

        def measure_int8(int8: bytes, **options: Any) -> Benchmark:
            data = int8 if compiler is None else compiler.compile(int8)
            return measure(connection, data, threads=target.threads, edgetpu=compiler is not None, **options)

        yield measure_int8


@contextlib.contextmanager
def open_device(
    target: Target, space: SearchSpace, device: str, *, compiler_image: str = "", executor: Executor | None = None
) -> Iterator[Timer]:
    """Measure on a device, by networks with random weights: values do not change the time.

    Those are int8 files for LiteRT, compiled for an Edge TPU, and for the runtime ``torch`` networks on this
    machine's GPU.

    Args:
        target: The target.
        space: The space whose subnets are timed.
        device: Connection, or several of boards that are alike, comma separated: they share the work.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        executor: Measures the boards that it has as resources, named by their addresses without options.

    Raises:
        DeviceError: If the device cannot be reached, or there is no compiler for its Edge TPU; if one of several is
            listed twice, or is faster or slower than another by more than noise.
    """

    def open_one(address: str) -> AbstractContextManager[Callable[[Architecture], Timing]]:
        if executor is not None and executor.has(shown(address)):
            board = _Board(target, space, address, compiler_image)
            return contextlib.closing(executor.start(board, resource=shown(address)))
        return _open_one(target, space, address, compiler_image)

    devices = addresses(device)
    if len(devices) < 2:
        with open_one(device) as time:
            yield Timer(time, "measured", device, here=is_here(device))
        return
    with open_boards(open_one, devices, space) as boards:
        where = f"{len(boards.devices)} boards: {', '.join(map(shown, boards.devices))}"
        here = any(map(is_here, boards.devices))
        yield Timer(boards.time, "measured", where, n_boards=len(boards.devices), here=here, aside=boards.aside)


@dataclass(frozen=True)
class _Board:
    """Opens a device where it is asked to, and leaves it open as long as that process lives."""

    target: Target
    space: SearchSpace
    device: str
    compiler_image: str

    def __call__(self) -> Callable[[Architecture], Timing]:
        opened = contextlib.ExitStack()
        time = opened.enter_context(_open_one(self.target, self.space, self.device, self.compiler_image))

        def measure(architecture: Architecture, opened: contextlib.ExitStack = opened) -> Timing:
            return time(architecture)

        return measure


@contextlib.contextmanager
def _open_one(
    target: Target, space: SearchSpace, device: str, compiler_image: str
) -> Iterator[Callable[[Architecture], Timing]]:
    """The latencies of one device."""
    if target.runtime == "torch":
        yield _on_gpu(target, space, device)
        return
    from foxnas_mlflow.devices import host_answer
    from foxnas_mlflow.tflite import write_probe

    edgetpu = target.runtime == "edgetpu"
    with open_meter(target, device, compiler_image=compiler_image) as measure_int8:

        def time(architecture: Architecture) -> Timing:
            probe = write_probe(build_network(space, architecture), per_channel_dense=not edgetpu)
            # This machine's processor would answer with the same runtime.
            expected = None if device == "local" and not edgetpu else host_answer(probe)
            benchmark = measure_int8(
                probe,
                expected=expected,
                # Random weights carry through all layers what kernels round differently: LiteRT with and without
                # XNNPACK are up to 0.6 standard deviations apart on probes, unrelated outputs several.
                max_output_levels=1.0 if expected is None else max(1.0, float(expected[0].std())),
            )
            return benchmark.timing

        yield time


def _on_gpu(target: Target, space: SearchSpace, device: str) -> Callable[[Architecture], Timing]:
    import_or_raise("torch", extra="train", feature="measuring in PyTorch")
    import torch

    if device != "local" or not torch.cuda.is_available():
        raise DeviceError(
            f"the target {target.name} is measured by PyTorch on a CUDA GPU of this machine",
            received=device if device != "local" else "no GPU here",
            remedy="type the command on the machine with the GPU, with device=local",
        )
    from foxnas_mlflow.devices import invalid_reasons
    from foxnas_mlflow.supernet import time_forward

    name = torch.cuda.get_device_name()

    def time(architecture: Architecture) -> Timing:
        samples = np.array(time_forward(build_network(space, architecture), batch=target.batch, device="cuda"))
        return Timing(
            latency_ms=float(np.median(samples)),
            source="measured",
            device=f"{name}, batch {target.batch}",
            runtime=f"torch {torch.__version__}",
            n_runs=len(samples),
            problems=invalid_reasons(samples, throttled=None, clock_tick_ms=1e-6),
        )

    return time


def remembered(timer: Timer, path: Path) -> Timer:
    """The timer with its measurements kept in a table as they finish: none is made twice, whatever ends the process.

    Args:
        timer: Measures.
        path: ``measurements.csv``; rows that are there count.
    """
    known = {row.architecture: row.timing for row in read_finished(path)}
    writing = threading.Lock()

    def time(architecture: Architecture) -> Timing:
        timing = known.get(architecture)
        if timing is None:
            timing = timer.time(architecture)
            if not timing.problems:
                with writing:
                    append_measurement(Measurement.of(architecture, timing), path)
                known[architecture] = timing
        return timing

    return dataclasses.replace(timer, time=time)


def _estimate(predictors: PredictorSet) -> Callable[[Architecture], Timing]:
    def time(architecture: Architecture) -> Timing:
        predictor = predictors.of("latency_ms", architecture.image_size)
        return Timing(float(predictor.predict([architecture])[0]), "cost_model")

    return time
