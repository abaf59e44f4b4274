"""Where the latency of a subnet comes from: a device that runs a probe of it, or a cost model."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError, InvalidInputError, OutOfDomainError, WorkerLostError, import_or_raise
from foxnas_mlflow.core.files import json_digest
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_finished
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.parallel import as_finished, one_at_a_time
from foxnas_mlflow.core.predictors import PredictorSet, reference_latency
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.core.workers import Executor, Ready
from foxnas_mlflow.workflows._addresses import addresses, is_here, shown
from foxnas_mlflow.workflows._boards import open_boards

if TYPE_CHECKING:
    from foxnas_mlflow.devices import Benchmark, DeviceCheck

_OPENED = contextlib.ExitStack()
"""What a worker has opened, until its process ends."""

_SUBNET: Mapping[str, Any] = {"warmup": 2, "warmup_seconds": 0.3, "runs": 10, "min_seconds": 1.0, "max_seconds": 1.0}
"""How a subnet is timed: a second is enough, since only its undisturbed runs count."""

_SUBNET_ATTEMPTS = 3
"""Such measurements at most, until at least half of their runs were undisturbed."""

_REMEMBERED = 16
"""Networks of a few MB each that are kept to be measured again."""

Probe = tuple[bytes, list[NDArray[Any]] | None]
"""An int8 file with random weights, and what this host answers to it; None where no other is held against it."""


@dataclass(frozen=True)
class Timer:
    """A source of latencies.

    Attributes:
        time: Latency of a subnet of the space.
        again: Latency of a subnet, measured once more where `time` remembers; None: `time` does.
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
    again: Callable[[Architecture], Timing] | None = None

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
    energy: str = "",
    executor: Executor | None = None,
    workers: int = 1,
) -> Iterator[Timer]:
    """A device's latencies, or without one those of the target's cost model.

    A target that has no cost model but a device of its own (``cpu``: this host) is measured there.

    Args:
        target: The target.
        space: The space whose subnets are timed.
        device: Connection; empty: none.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        energy, executor, workers: As for `open_device`.

    Raises:
        OutOfDomainError: If there is neither a device nor a cost model.
        InvalidInputError: If energy is asked for where nothing is measured, or a GPU is.
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
            if energy:
                raise InvalidInputError(
                    "energy is measured on a device",
                    received=f"energy={energy} with the cost model of {target.name}",
                    remedy="say where to measure: --device ssh://user@host",
                )
            yield Timer(_estimate(predictors), "cost_model", f"cost model of {target.name}", predictors)
            return
    with open_device(
        target,
        space,
        device,
        compiler_image=compiler_image,
        energy=energy,
        executor=executor,
        workers=workers,
    ) as timer:
        yield timer


@contextlib.contextmanager
def open_measure(
    device: str, executor: Executor | None = None, *, energy: str = ""
) -> Iterator[Callable[..., Benchmark]]:
    """Measure files on a device, from here or from the node that reaches it.

    Args:
        device: Connection.
        energy: The meter that it must have; empty: none.
        executor: Measures the boards that it has as resources, named by their addresses without options.

    Yields:
        Takes the bytes of a file and the options of `foxnas_mlflow.devices.measure`.

    Raises:
        DeviceError: If the device cannot be reached.
    """
    from foxnas_mlflow.devices import connect, measure, require_meter

    if executor is not None and executor.has(shown(device)):
        with contextlib.closing(executor.start(_Measure(device, energy), resource=shown(device))) as worker:
            yield lambda data, **options: worker((data, options))
        return
    with connect(device) as connection:
        if energy:
            require_meter(connection, energy)
        yield lambda data, **options: measure(connection, data, **options)


def time_subnet(measure_int8: Callable[..., Benchmark], int8: bytes, *, energy: str = "", **options: Any) -> Timing:
    """What a subnet costs on a device, whatever else the device does (protocol: docs/METHOD.md).

    Args:
        measure_int8: Takes an int8 file's bytes and options of `devices.measure`, see `open_meter`.
        int8: The subnet's file.
        energy: How to measure its energy too, 20 seconds longer; empty: it is not. Disturbed then, nothing counts.
        options: Further ones of `measure_int8`.
    """
    from foxnas_mlflow.devices import subnet_timing, with_energy

    made: list[Benchmark] = []
    while len(made) < _SUBNET_ATTEMPTS:
        made.append(measure_int8(int8, attempts=1, **_SUBNET, **options))
        timing = subnet_timing(made)
        if not timing.problems and 2 * timing.n_runs >= sum(each.n_runs for each in made):
            break
    if energy and not timing.problems:
        return with_energy(timing, measure_int8(int8, attempts=1, energy=energy, **_SUBNET, **options))
    return timing


@dataclass(frozen=True)
class _Measure:
    """Opens a device where it is asked to."""

    device: str
    energy: str

    def __call__(self) -> Callable[[tuple[bytes, Mapping[str, Any]]], Benchmark]:
        measure = _OPENED.enter_context(open_measure(self.device, energy=self.energy))
        return lambda item: measure(item[0], **item[1])


def check_device(device: str, executor: Executor | None = None) -> DeviceCheck:
    """What a machine has and lacks, seen from here or from the node that reaches it.

    Raises:
        DeviceError: If it cannot be reached.
        WorkerLostError: If the node that reaches it does not answer.
    """
    from foxnas_mlflow.devices import check, connect

    if executor is not None and executor.has(shown(device)):
        with contextlib.closing(executor.start(Ready(check_device), resource=shown(device))) as worker:
            return worker(device)
    with connect(device) as connection:
        return check(connection)


def target_content(target: Target, space: SearchSpace, device: str) -> dict[str, Any]:
    """What latencies of a target depend on, whatever its files are called; the space counts by itself.

    Args:
        target: The target.
        space: The space whose networks are timed.
        device: Connection; empty: its cost model tells their latency, where it has one.
    """
    facts = {key: value for key, value in target.to_dict().items() if key not in ("space", "predictors")}
    if not device:
        with contextlib.suppress(OutOfDomainError):
            facts["cost_model"] = json_digest(reference_latency(target, space).to_dict())
    return facts


def first_answering(device: str, executor: Executor | None = None) -> str:
    """The first board of a list that answers; the last one where none does."""
    from foxnas_mlflow.devices import connect

    *others, last = addresses(device)
    for address in others:
        with contextlib.suppress(DeviceError, WorkerLostError):
            if executor is not None and executor.has(shown(address)):
                check_device(address, executor)
            else:
                connect(address).close()
            return address
    return last


@contextlib.contextmanager
def open_meter(
    target: Target, device: str, *, compiler_image: str = "", energy: str = "", executor: Executor | None = None
) -> Iterator[Callable[..., Benchmark]]:
    """Measure int8 files on a device as a target runs them: with its threads, compiled first for an Edge TPU.

    Args:
        target: The target.
        device: Connection.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        energy, executor: As for `open_measure`.

    Yields:
        Takes the bytes of an int8 file and the options of `foxnas_mlflow.devices.measure`.

    Raises:
        DeviceError: If the device cannot be reached, or there is no compiler for its Edge TPU.
    """
    from foxnas_mlflow.tflite import require_compiler

    compiler = require_compiler(compiler_image) if target.runtime == "edgetpu" else None
    with open_measure(device, executor, energy=energy) as measure:

        def measure_int8(int8: bytes, **options: Any) -> Benchmark:
            data = int8 if compiler is None else compiler.compile(int8)
            return measure(data, threads=target.threads, edgetpu=compiler is not None, **options)

        yield measure_int8


@contextlib.contextmanager
def open_device(
    target: Target,
    space: SearchSpace,
    device: str,
    *,
    compiler_image: str = "",
    energy: str = "",
    executor: Executor | None = None,
    workers: int = 1,
) -> Iterator[Timer]:
    """Measure on a device, by networks with random weights: values do not change the time.

    Those are int8 files for LiteRT, compiled for an Edge TPU, and for the runtime ``torch`` networks on this
    machine's GPU.

    Args:
        target: The target.
        space: The space whose subnets are timed.
        device: Connection, or several of boards that are alike, comma separated: they share the work.
        compiler_image: Docker image with the Edge TPU's compiler; empty: the one on PATH.
        energy: How the energy of an inference is measured too, as for `foxnas_mlflow.devices.measure`; empty: not.
        executor: Measures the boards that it has as resources, named by their addresses without options, and makes
            the networks for the other boards.
        workers: How many of its workers make networks.

    Raises:
        DeviceError: If the device cannot be reached, or there is no compiler for its Edge TPU; if one of several is
            listed twice, or is faster or slower than another by more than noise.
    """

    devices = addresses(device)
    with contextlib.ExitStack() as stack:
        # This machine's processor would answer with the same runtime.
        making = _Build(target, space, answered=devices != ("local",) or target.runtime == "edgetpu")
        build: Callable[[Architecture], Probe] = making()
        away = [a for a in devices if not is_here(a) and not (executor is not None and executor.has(shown(a)))]
        if executor is not None and away:
            build = stack.enter_context(executor.workers(making, workers))

        def open_one(address: str) -> AbstractContextManager[Callable[[Architecture], Timing]]:
            if executor is not None and executor.has(shown(address)):
                board = _Board(target, space, address, compiler_image, energy)
                return contextlib.closing(executor.start(board, resource=shown(address)))
            return _open_one(target, space, address, compiler_image, energy, build)

        if len(devices) < 2:
            time = stack.enter_context(open_one(device))
            # A board measures one network at a time; what is made elsewhere for it does not disturb it.
            yield Timer(time if away else one_at_a_time(time), "measured", device, here=is_here(device))
            return
        boards = stack.enter_context(open_boards(open_one, devices, space))
        where = f"{len(boards.devices)} boards: {', '.join(map(shown, boards.devices))}"
        here = any(map(is_here, boards.devices))
        yield Timer(boards.time, "measured", where, n_boards=len(boards.devices), here=here, aside=boards.aside)


@dataclass(frozen=True)
class _Build:
    """Makes networks to measure where it is asked to.

    Attributes:
        answered: Whether this host says what it answers.
    """

    target: Target
    space: SearchSpace
    answered: bool = True

    def __call__(self) -> Callable[[Architecture], Probe]:
        from foxnas_mlflow.devices import host_answer

        # What is measured again is made once.
        write = functools.lru_cache(_REMEMBERED)(self._write)
        answers: dict[Architecture, list[NDArray[Any]]] = {}

        def build(architecture: Architecture) -> Probe:
            probe = write(architecture)
            if self.answered and architecture not in answers:
                answer = host_answer(probe)
                if answer is None:
                    # One that failed, as on a full disk, is asked for anew the next time.
                    return probe, None
                answers[architecture] = answer
            return probe, answers.get(architecture)

        return build

    def _write(self, architecture: Architecture) -> bytes:
        from foxnas_mlflow.tflite import write_probe

        network = build_network(self.space, architecture)
        return write_probe(network, per_channel_dense=self.target.runtime != "edgetpu")


@dataclass(frozen=True)
class _Board:
    """Opens a device where it is asked to, and makes networks for it there."""

    target: Target
    space: SearchSpace
    device: str
    compiler_image: str
    energy: str

    def __call__(self) -> Callable[[Architecture], Timing]:
        build = _Build(self.target, self.space)()
        return _OPENED.enter_context(
            _open_one(self.target, self.space, self.device, self.compiler_image, self.energy, build)
        )


@contextlib.contextmanager
def _open_one(
    target: Target,
    space: SearchSpace,
    device: str,
    compiler_image: str,
    energy: str,
    build: Callable[[Architecture], Probe],
) -> Iterator[Callable[[Architecture], Timing]]:
    """The latencies of one device."""
    if target.runtime == "torch":
        if energy:
            raise InvalidInputError(
                "energy is measured of TensorFlow Lite models",
                received=f"energy={energy} with the target {target.name}, which runs PyTorch",
            )
        yield _on_gpu(target, space, device)
        return
    with open_meter(target, device, compiler_image=compiler_image, energy=energy) as measure_int8:
        measure_one = one_at_a_time(measure_int8)

        def time(architecture: Architecture) -> Timing:
            probe, expected = build(architecture)
            return time_subnet(
                measure_one,
                probe,
                energy=energy,
                expected=expected,
                # Random weights carry through all layers what kernels round differently: LiteRT with and without
                # XNNPACK are up to 0.6 standard deviations apart on probes, unrelated outputs several.
                max_output_levels=1.0 if expected is None else max(1.0, float(expected[0].std())),
            )

        yield time


def this_gpu(target: Target, device: str) -> tuple[str, str]:
    """Name of this machine's GPU with the target's batch, and the runtime, as measurements on it have them.

    Raises:
        DeviceError: If there is none, or the device is not this machine.
    """
    import_or_raise("torch", extra="train", feature="measuring in PyTorch")
    import torch

    if device != "local" or not torch.cuda.is_available():
        raise DeviceError(
            f"the target {target.name} is measured by PyTorch on a CUDA GPU of this machine",
            received=device if device != "local" else "no GPU here",
            remedy="type the command on the machine with the GPU, with device=local",
        )
    return f"{torch.cuda.get_device_name()}, batch {target.batch}", f"torch {torch.__version__}"


def _on_gpu(target: Target, space: SearchSpace, device: str) -> Callable[[Architecture], Timing]:
    name, runtime = this_gpu(target, device)
    from foxnas_mlflow.devices import invalid_reasons, undisturbed
    from foxnas_mlflow.supernet import time_forward

    def time(architecture: Architecture) -> Timing:
        samples = time_forward(build_network(space, architecture), batch=target.batch, device="cuda")
        runs = undisturbed(np.array(samples))
        return Timing(
            latency_ms=float(np.median(runs)),
            source="measured",
            device=name,
            runtime=runtime,
            n_runs=len(runs),
            problems=invalid_reasons(runs, throttled=None, clock_tick_ms=1e-6),
        )

    return time


def remembered(timer: Timer, path: Path) -> Timer:
    """The timer with its measurements kept in a table as they finish: none is made twice, whatever ends the process.

    Of a network that was measured `again` the mean is remembered.

    Args:
        timer: Measures.
        path: ``measurements.csv``; rows that are there count.
    """
    known: dict[Architecture, list[Timing]] = {}
    for row in read_finished(path):
        if row.timing is not None:
            known.setdefault(row.architecture, []).append(row.timing)
    writing = threading.Lock()

    def again(architecture: Architecture) -> Timing:
        timing = timer.time(architecture)
        if not timing.problems:
            with writing:
                append_measurement(Measurement.of(architecture, timing), path)
            known.setdefault(architecture, []).append(timing)
        return timing

    def time(architecture: Architecture) -> Timing:
        if architecture not in known:
            return again(architecture)
        first, *others = known[architecture]
        return first.with_others(others)

    return dataclasses.replace(timer, time=time, again=again)


def _estimate(predictors: PredictorSet) -> Callable[[Architecture], Timing]:
    def time(architecture: Architecture) -> Timing:
        predictor = predictors.of("latency_ms", architecture.image_size)
        return Timing(float(predictor.predict([architecture])[0]), "cost_model")

    return time
