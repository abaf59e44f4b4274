"""Benchmark: a TensorFlow Lite model measured on a device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.workflows._addresses import without_key
from foxnas_mlflow.workflows._executor import ClusterRequest, open_executor
from foxnas_mlflow.workflows._request import chosen_device, energy_parameter, parameter, sustained_parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow

if TYPE_CHECKING:
    from collections.abc import Mapping

    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.devices import Benchmark
    from foxnas_mlflow.tracking.benchmark import MeasuredModel


_DEFAULT_TARGET = "cpu"

_MEASURING = ("threads", "runs", "warmup", "max_seconds", "sustained_seconds", "energy")
"""Parameters that say how it is measured."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkRequest(ClusterRequest):
    """What to measure; see `run_benchmark`."""

    model: str = parameter(
        "", "Path of a .tflite file, or models:/NAME/VERSION; empty: the newest version that quantize registered."
    )
    target: str = parameter(
        "", "Target: rpi4, edgetpu, cpu, or the path of a target YAML; empty: the model's own, of a file cpu."
    )
    device: str = parameter(
        "", "Where to measure: local, ssh://user@host[:port], docker://image; empty: the target's device."
    )
    threads: int = parameter(0, "Threads of the runtime; 0: the target's.", at_least=0)
    runs: int = parameter(200, "Timed runs, at least.", at_least=1)
    warmup: int = parameter(10, "Runs before the timed ones, at least; they also last one second at least.", at_least=1)
    max_seconds: float = parameter(
        120.0, "Most seconds of timed runs; fewer runs than asked for are said. 0: no limit.", at_least=0
    )
    sustained_seconds: float = sustained_parameter()
    energy: str = energy_parameter("Measure energy")
    signing_key: str = parameter(
        "", "Private key of an elliptic curve (PEM) to sign the measurement with, see foxnas sign; empty: it is not."
    )
    name: str = parameter("foxnas", "Prefix of the registered model.")


@dataclass(frozen=True, kw_only=True)
class BenchmarkResult(Result):
    """A measurement.

    Attributes:
        latency_ms: Median latency.
        valid: Whether the figures can be trusted.
        emulated: Whether an emulator measured them.
        metrics: ``benchmark/{figure}`` as logged.
    """

    latency_ms: float
    valid: bool
    emulated: bool
    metrics: Mapping[str, float]

    @property
    def exit_status(self) -> int:
        """3 where the figures, which are logged all the same, cannot be trusted."""
        return 0 if self.valid else 3


def run_benchmark(request: BenchmarkRequest, *, tags: Mapping[str, str] | None = None) -> BenchmarkResult:
    """Measure a model, log the figures, and tag its version.

    Args:
        request: What to measure, and where.
        tags: Further tags of its run.

    Raises:
        InvalidInputError: If there is no such model, it cannot be measured, or the key cannot be read.
        DeviceError: If the device cannot be reached, or lacks something.
    """
    import contextlib
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.flavor import signer
    from foxnas_mlflow.tracking.benchmark import find_model, log_benchmark, next_command
    from foxnas_mlflow.tracking.registry import registered_name
    from foxnas_mlflow.tracking.run import entry_run
    from foxnas_mlflow.workflows._timers import open_measure

    # What to measure is looked up by the target, and the target, where none is given, by what is measured.
    target = None if request.model and not request.target else get_target(request.target or _DEFAULT_TARGET)
    if target is not None:
        _check_target(target)
    sign = signer(Path(request.signing_key)) if request.signing_key else None
    kind = "edgetpu" if target is not None and target.runtime == "edgetpu" else "tflite"
    name = "" if target is None else target.name
    source = request.model or f"models:/{registered_name(request.name, kind, name)}/latest"
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory, contextlib.ExitStack() as stack:
        executor = stack.enter_context(open_executor(request))
        # A model that cannot be measured and a machine that does not answer leave no run behind.
        if target is not None:
            measure = stack.enter_context(open_measure(_device(request, target), executor))
        model = find_model(source, Path(directory))
        if target is None:
            target = _own_target(model)
            _check_target(target)
            measure = stack.enter_context(open_measure(_device(request, target), executor))
        threads, device = request.threads or target.threads, _device(request, target)
        data, expected = _read(model)
        with entry_run(
            stage="benchmark",
            params=request.texts()
            | {
                "model": model.source,
                "target": request.target or target.name,
                "device": device,
                "threads": threads,
            },
            target=target.name,
            latency_source="measured",
            tags=tags,
        ) as run:
            benchmark = measure(
                data,
                threads=threads,
                runs=request.runs,
                warmup=request.warmup,
                edgetpu=target.runtime == "edgetpu",
                expected=expected,
                max_seconds=request.max_seconds,
                sustained_seconds=request.sustained_seconds,
                energy=request.energy,
            )
            # Whose key it is, and with what it was signed, is no concern of the model's page.
            shown = next_command(benchmark, model, target, without_key(device), request.options(*_MEASURING))
            log_benchmark(run, benchmark, model, target=target, command=shown, sign=sign)
            command = next_command(benchmark, model, target, device, request.options(*_MEASURING, "signing_key"))
    return BenchmarkResult(
        run_id=run.run_id,
        latency_ms=benchmark.latency_ms_p50,
        valid=benchmark.valid,
        emulated=benchmark.emulated,
        metrics=benchmark.metrics(),
        summary=_summary(benchmark, model, target, run.run_id, command),
    )


def _check_target(target: Target) -> None:
    from foxnas_mlflow.core.errors import InvalidInputError

    if target.runtime == "torch":
        raise InvalidInputError(
            "a benchmark is of a TensorFlow Lite model",
            received=f"the target {target.name}, which runs PyTorch",
            remedy=f"its networks are measured by: foxnas sample --target {target.argument} --device local",
        )


def _device(request: BenchmarkRequest, target: Target) -> str:
    from foxnas_mlflow.core.errors import InvalidInputError

    device = chosen_device(request.device, target.device)
    if not device:
        raise InvalidInputError(
            "a benchmark is made on a device",
            received=request.device or f"the target {target.name}, which has none of its own",
            remedy="say where to measure: --device ssh://user@host",
        )
    return device


def _own_target(model: MeasuredModel) -> Target:
    """The target that a model was made for; of a file that does not say, this host."""
    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.targets import BUILTIN_TARGETS

    name = model.target or _DEFAULT_TARGET
    if name not in BUILTIN_TARGETS:
        raise InvalidInputError(
            "the target of a model must be known to measure it",
            received=f"{model.source}, made for {name}",
            remedy="give the path of its YAML file with --target",
        )
    return BUILTIN_TARGETS[name]


def _read(model: MeasuredModel) -> tuple[bytes, Any]:
    """The bytes of a model, and what this host answers to the inputs of a measurement."""
    from foxnas_mlflow.devices import host_answer, read_model

    # A file that is compiled for an accelerator runs there alone: its twin answers, if it has one.
    return read_model(model.path), host_answer(model.path if model.twin is None else model.twin)


def _window(window: Mapping[str, float | None]) -> str:
    temperature, clock = window["temperature_c"], window["frequency_mhz"]
    place = "temperature unknown" if temperature is None else f"{temperature:.1f} C"
    speed = "clock unknown" if clock is None else f"{clock:.0f} MHz"
    return f"from {window['second']:.0f} s: p50 {window['p50_ms']:.3f}, p90 {window['p90_ms']:.3f} ms, {place}, {speed}"


def _ends(start: float | None, end: float | None, unit: str) -> str:
    """A quantity before and after the timed runs."""
    if start is None or end is None:
        return "unknown: the machine does not tell"
    return f"{unit.format(start)} before the runs, {unit.format(end)} after them"


def _limited(benchmark: Benchmark) -> str:
    if benchmark.n_runs >= benchmark.asked_runs:
        return ""
    return f"; {benchmark.asked_runs} were asked for, the time limit ended them (--max-seconds 0: no limit)"


def _summary(benchmark: Benchmark, model: MeasuredModel, target: Target, run_id: str, command: str) -> str:
    from foxnas_mlflow.devices import what_helps
    from foxnas_mlflow.tracking.benchmark import BENCHMARK_FILE, BENCHMARK_PAGE, has_page
    from foxnas_mlflow.tracking.gates import SUSTAINED_SECONDS

    compared = benchmark.output_difference
    again = "" if benchmark.attempts == 1 else f", attempt {benchmark.attempts}: those before were disturbed"
    rows = [
        ("model", model.source),
        ("machine", f"{benchmark.device} ({benchmark.connection}), {benchmark.runtime}, {benchmark.threads} thread(s)"),
        (
            "latency",
            f"{benchmark.latency_ms_p50:.3f} ms median (95 % interval {benchmark.latency_ms_p50_low:.3f} to "
            f"{benchmark.latency_ms_p50_high:.3f}), p90 {benchmark.latency_ms_p90:.3f}, "
            f"p99 {benchmark.latency_ms_p99:.3f}",
        ),
        ("runs", f"{benchmark.n_runs} after {benchmark.warmup} or more for warm-up{again}{_limited(benchmark)}"),
        ("throughput", f"{benchmark.throughput_per_s:.1f} images/s"),
        ("peak memory", f"{benchmark.peak_memory_bytes / 2**20:.1f} MiB, Python and runtime included"),
        ("output", "not compared" if compared is None else f"at most {compared:g} levels from this host's"),
    ]
    known: dict[bool | None, str] = {True: "yes", False: "no"}
    rows += [
        ("shared", known.get(benchmark.shared, "unknown: only one thread tells, which waits for no quota or disk")),
        ("throttled", known.get(benchmark.throttled, "unknown: the machine cannot tell")),
    ]
    rows += [
        ("temperature", _ends(benchmark.temperature_c_start, benchmark.temperature_c_end, "{:.1f} C")),
        ("clock", _ends(benchmark.frequency_mhz_start, benchmark.frequency_mhz_end, "{:.0f} MHz")),
    ]
    if benchmark.sustained_p90_ms is not None:
        seconds = benchmark.sustained_seconds
        rows.append(
            (
                "sustained",
                f"p90 {benchmark.sustained_p90_ms:.3f} ms in the last {min(seconds, SUSTAINED_SECONDS):.0f} s of "
                f"{seconds:.0f} s under load"
                + ("" if seconds >= SUSTAINED_SECONDS else "; a promotion judges it from a minute on"),
            )
        )
        rows += [("", _window(window)) for window in benchmark.windows]
    if benchmark.energy_mj is not None:
        rows.append(
            (
                "energy",
                f"{benchmark.energy_mj:.2f} +- {benchmark.energy_error_mj:.2f} mJ an inference above "
                f"{benchmark.idle_w:.2f} W idling ({benchmark.power_meter})",
            )
        )
    if benchmark.sustained_p90_ms is not None or benchmark.energy_mj is not None:
        words = known.get(benchmark.throttled_under_load, "unknown: the machine cannot tell")
        told = ", as it will be under such a load: the benchmark stays valid" if benchmark.throttled_under_load else ""
        rows.append(("", f"throttled meanwhile: {words}{told}"))
    if benchmark.governor not in ("", "performance"):
        rows.append(("governor", f"{benchmark.governor}; steadier with performance"))
    rows.append(("run", f"{run_id}: {BENCHMARK_FILE}{', ' + BENCHMARK_PAGE if has_page(benchmark) else ''}"))
    lines = [f"Measured for {target.name}:", *(f"  {key:<14}{text}" for key, text in rows)]
    if benchmark.emulated:
        lines.append("EMULATED: the processor is emulated; these times say nothing of real hardware.")
    if not benchmark.valid:
        remedy = what_helps(benchmark.invalid_reasons)
        lines.append(f"INVALID: {'; '.join(benchmark.invalid_reasons)}. To measure again, {remedy}.")
    lines.append(f"Next: {command}")
    return "\n".join(lines)


WORKFLOW = Workflow(
    "benchmark",
    "Measure a TensorFlow Lite model where it will run, and say when the figures cannot be trusted.",
    BenchmarkRequest,
    run_benchmark,
)
