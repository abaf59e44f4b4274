"""Where the latency of a subnet comes from: a device that runs a probe of it, or a cost model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import PredictorSet, reference_latency
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target


@dataclass(frozen=True)
class Timer:
    """A source of latencies.

    Attributes:
        time: Latency of a subnet of the space.
        source: ``measured`` or ``cost_model``.
        where: The device's address, or what the cost model is of.
        predictors: The cost model, if it is one.
    """

    time: Callable[[Architecture], Timing]
    source: str
    where: str
    predictors: PredictorSet | None = None


@contextlib.contextmanager
def open_timer(target: Target, space: SearchSpace, *, device: str = "") -> Iterator[Timer]:
    """A device's latencies, or without one those of the target's cost model.

    A target that has no cost model but a device of its own (``cpu``: this host) is measured there.

    Args:
        target: The target.
        space: The space whose subnets are timed.
        device: Connection; empty: none.

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
    with open_device(target, space, device) as timer:
        yield timer


@contextlib.contextmanager
def open_device(target: Target, space: SearchSpace, device: str) -> Iterator[Timer]:
    """Measure on a device, by int8 probes with random weights: values do not change the time.

    Raises:
        InvalidInputError: If the target's runtime cannot be measured by probes.
        DeviceError: If the device cannot be reached.
    """
    if target.runtime != "litert":
        raise InvalidInputError(
            "subnets are measured by LiteRT on a processor",
            received=f"target {target.name!r} with the runtime {target.runtime!r}",
            remedy="leave device empty for the cost model, or measure the final model with: foxnas benchmark",
        )
    from foxnas_mlflow.devices import connect, measure
    from foxnas_mlflow.tflite import write_probe

    with connect(device) as connection:

        def time(architecture: Architecture) -> Timing:
            probe = write_probe(build_network(space, architecture))
            benchmark = measure(connection, probe, threads=target.threads)
            return Timing(
                latency_ms=benchmark.latency_ms_p50,
                source="measured",
                device=benchmark.device,
                runtime=benchmark.runtime,
                n_runs=benchmark.n_runs,
                problems=tuple(benchmark.invalid_reasons),
                emulated=benchmark.emulated,
            )

        yield Timer(time, "measured", device)


def _estimate(predictors: PredictorSet) -> Callable[[Architecture], Timing]:
    def time(architecture: Architecture) -> Timing:
        predictor = predictors.of("latency_ms", architecture.image_size)
        return Timing(float(predictor.predict([architecture])[0]), "cost_model")

    return time
