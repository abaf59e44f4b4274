"""``foxnas benchmark``: measure a TensorFlow Lite model on a device."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.cli.parameters import Parameter

if TYPE_CHECKING:
    from foxnas_mlflow.core.targets import Target
    from foxnas_mlflow.devices import Benchmark
    from foxnas_mlflow.tracking.benchmark import MeasuredModel

SUMMARY = "Measure a TensorFlow Lite model where it will run, and say when the figures cannot be trusted."

PARAMETERS = (
    Parameter(
        "model",
        "",
        "Path of a .tflite file, or models:/NAME/VERSION; empty: the newest version that quantize registered.",
    ),
    Parameter("target", "cpu", "Target: rpi4, edgetpu, cpu, or the path of a target YAML."),
    Parameter(
        "device", "", "Where to measure: local, ssh://user@host[:port], docker://image; empty: the target's device."
    ),
    Parameter("threads", 0, "Threads of the runtime; 0: the target's.", int),
    Parameter("runs", 200, "Timed runs, at least.", int),
    Parameter("warmup", 10, "Runs before the timed ones, at least; they also last one second at least.", int),
    Parameter("name", "foxnas", "Prefix of the registered model."),
)


def run(args: argparse.Namespace) -> dict[str, str | float]:
    """Measure, log, and tag the version."""
    import tempfile
    from pathlib import Path

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.core.targets import get_target

    target = get_target(args.target)
    if target.runtime == "torch":
        raise InvalidInputError(
            "a benchmark is of a TensorFlow Lite model",
            received=f"the target {target.name}, which runs PyTorch",
            remedy=f"its networks are measured by: foxnas sample --target {target.name} --device local",
        )
    device = args.device or target.device
    if not device:
        raise InvalidInputError(
            f"the target {target.name} has no device of its own",
            remedy="say where to measure: --device ssh://user@host",
        )
    for name, least in (("threads", 0), ("runs", 1), ("warmup", 1)):
        if getattr(args, name) < least:
            raise InvalidInputError(f"{name} must be {least} or more", received=getattr(args, name))
    threads = args.threads or target.threads

    from foxnas_mlflow.devices import connect, measure
    from foxnas_mlflow.tracking.benchmark import find_model, log_benchmark
    from foxnas_mlflow.tracking.registry import registered_name
    from foxnas_mlflow.tracking.run import entry_run

    kind = "edgetpu" if target.runtime == "edgetpu" else "tflite"
    source = args.model or f"models:/{registered_name(args.name, kind, target.name)}/latest"
    with tempfile.TemporaryDirectory(prefix="foxnas-") as directory, connect(device) as connection:
        # A model that cannot be measured and a machine that does not answer leave no run behind.
        model = find_model(source, Path(directory))
        data, expected = _read(model)
        with entry_run(
            stage="benchmark",
            params=vars(args) | {"model": model.source, "device": device, "threads": threads},
            target=target.name,
            latency_source="measured",
        ) as run:
            benchmark = measure(
                connection,
                data,
                threads=threads,
                runs=args.runs,
                warmup=args.warmup,
                edgetpu=target.runtime == "edgetpu",
                expected=expected,
            )
            log_benchmark(run, benchmark, model, target=target)
    print(_summary(benchmark, model, target, run.run_id))
    return {"run_id": run.run_id, "latency_ms": benchmark.latency_ms_p50}


def _read(model: MeasuredModel) -> tuple[bytes, Any]:
    """The bytes of a checked model, and an input with the output that this host computes for it."""
    from foxnas_mlflow.core.edgetpu import COMPILED_OPERATOR
    from foxnas_mlflow.core.errors import MissingDependencyError
    from foxnas_mlflow.tflite import check_classifier, read_tflite, sample_answer

    content = read_tflite(model.path)
    check_classifier(content)
    comparable = model.twin
    if comparable is None and COMPILED_OPERATOR not in content.operator_counts:
        comparable = model.path
    try:
        return content.data, None if comparable is None else sample_answer(comparable.read_bytes())
    except MissingDependencyError:
        return content.data, None


def _summary(benchmark: Benchmark, model: MeasuredModel, target: Target, run_id: str) -> str:
    from foxnas_mlflow.tracking.benchmark import promote_command

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
        ("runs", f"{benchmark.n_runs} after {benchmark.warmup} or more for warm-up{again}"),
        ("throughput", f"{benchmark.throughput_per_s:.1f} images/s"),
        ("peak memory", f"{benchmark.peak_memory_bytes / 2**20:.1f} MiB, Python and runtime included"),
        ("output", "not compared" if compared is None else f"at most {compared:g} levels from this host's"),
    ]
    if benchmark.governor not in ("", "performance"):
        rows.append(("governor", f"{benchmark.governor}; steadier with performance"))
    rows.append(("run", f"{run_id}: benchmark.json"))
    lines = [f"Measured for {target.name}:", *(f"  {key:<14}{text}" for key, text in rows)]
    if benchmark.emulated:
        lines.append("EMULATED: the processor is emulated; these times say nothing of real hardware.")
    if not benchmark.valid:
        lines.append(f"INVALID: {'; '.join(benchmark.invalid_reasons)}. Measure again on a quiet, cool machine.")
    following = promote_command(model) if model.version else "mlflow ui, and compare the run."
    lines.append(f"Next: {following}")
    return "\n".join(lines)
