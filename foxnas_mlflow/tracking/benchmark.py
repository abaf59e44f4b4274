"""Logging a measurement: the figures with their model, and what is known of the machine."""

from __future__ import annotations

import importlib.util
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import InvalidInputError, RegistrationError
from foxnas_mlflow.core.files import write_csv
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.devices import Benchmark, VelaEstimate
from foxnas_mlflow.flavor import FLAVOR_NAME, TfliteModel, load_model
from foxnas_mlflow.tracking.holders import STAGES
from foxnas_mlflow.tracking.registry import (
    describe_version,
    find_version,
    lacks_right,
    reason,
    tag_version,
    version_uri,
)
from foxnas_mlflow.tracking.run import EntryRun, best_effort

BENCHMARK_FILE = "benchmark.json"
"""Artifact of a measurement: all of it, also what a promotion asks for."""

BENCHMARK_PAGE = "report.html"
"""Artifact of a measurement under load: it drawn."""

BENCHMARK_SIGNATURE = "benchmark.json.sig"
"""Artifact beside it: its signature, where it was measured with a key."""


@dataclass(frozen=True)
class MeasuredModel:
    """The TensorFlow Lite file to measure, and the logged model that it belongs to.

    Attributes:
        source: What the user named.
        path: The file.
        twin: For a file compiled for an Edge TPU: the same network for a processor, if there is one.
        kind: Kind of the logged model.
        model_id: Id of the logged model, or None for a plain file.
        version: Its registered version, or None.
        target: Name of the target that it was made for, or empty.
    """

    source: str
    path: Path
    twin: Path | None = None
    kind: str = "tflite"
    model_id: str | None = None
    version: ModelVersion | None = None
    target: str = ""


def find_model(source: str, directory: Path) -> MeasuredModel:
    """The model that a path or a URI names.

    Args:
        source: Path of a .tflite file, or ``models:/name/version``, ``models:/name@alias``, ``runs:/...``.
        directory: Where a logged model is downloaded to.

    Raises:
        InvalidInputError: If it is a model of another kind, or names no version.
        InvalidFormatError: If a logged file was changed.
        MlflowException: If there is no such model.
    """
    if not source.startswith(("models:/", "runs:/")):
        return MeasuredModel(source, Path(source))
    version = None
    # models:/m-... is a logged model that need not be registered.
    if source.startswith("models:/") and ("/" in source.removeprefix("models:/") or "@" in source):
        version = find_version(source)
        source = version_uri(version.name, version.version)
    model = load_model(source, str(directory))
    if not isinstance(model, TfliteModel):
        raise InvalidInputError(
            "only a model of kind tflite or edgetpu can be measured",
            received=f"{source}: {type(model).__name__}",
            remedy="convert a subnet with: foxnas quantize",
        )
    # From the model itself: SQL stores leave its id out of the version.
    info = mlflow.models.get_model_info(source)
    kind, target = info.flavors[FLAVOR_NAME]["kind"], str(model.details.get("target", ""))
    return MeasuredModel(source, model.path, model.fallback, kind, info.model_id, version, target)


def log_benchmark(
    run: EntryRun,
    benchmark: Benchmark,
    model: MeasuredModel,
    *,
    target: Target,
    command: str,
    sign: Callable[[Path], str] | None = None,
) -> None:
    """Log a measurement to its run, its model and the model's registered version.

    Args:
        run: The open run.
        benchmark: The measurement.
        model: What was measured.
        target: The target that it was measured for.
        command: What to type next, for the version's page.
        sign: Makes the signature of the measurement's file; None: nobody vouches for it.

    Raises:
        RegistrationError: If this user may not change the model; the run keeps the measurement.
    """
    kept = run.log_json(benchmark.to_dict(), BENCHMARK_FILE)
    if sign is not None:
        document = run.directory / BENCHMARK_FILE
        document.write_text(kept, encoding="utf-8")
        run.log_text(sign(document), BENCHMARK_SIGNATURE)
    if has_page(benchmark):
        from foxnas_mlflow.report import write_benchmark_report

        page = run.directory / BENCHMARK_PAGE
        write_benchmark_report(page, model=model.source, target=target.name, benchmark=benchmark.to_dict())
        best_effort(run.log_artifact)(page)
    run.set_tags(
        {
            "foxnas.device": benchmark.connection,
            "foxnas.board": benchmark.device,
            "foxnas.runtime": benchmark.runtime,
            "foxnas.emulated": json.dumps(benchmark.emulated),
            "foxnas.model": model.source,
            "foxnas.model_sha256": benchmark.model_sha256,
            **({} if benchmark.valid else {"foxnas.invalid": "; ".join(benchmark.invalid_reasons)}),
            **({"foxnas.throttled_under_load": "true"} if benchmark.throttled_under_load else {}),
        }
    )
    try:
        _log_to_model(run, benchmark, model, target, command)
    except MlflowException as error:
        if not lacks_right(error):
            raise
        raise RegistrationError(
            "writing a measurement to its model needs the right to change that model",
            received=f"{model.source}: {reason(error)}",
            remedy=f"the measurement is kept in run {run.run_id}; ask for that right",
        ) from error


def has_page(benchmark: Benchmark) -> bool:
    """Whether a measurement gets `BENCHMARK_PAGE`: of single runs alone there is little to draw."""
    return bool(benchmark.windows) and importlib.util.find_spec("plotly") is not None


def _log_to_model(run: EntryRun, benchmark: Benchmark, model: MeasuredModel, target: Target, command: str) -> None:
    try:
        run.log_metrics(benchmark.metrics(), model_id=model.model_id)
    except MlflowException:
        run.log_metrics(benchmark.metrics())
        raise
    if model.model_id is not None and not benchmark.emulated:
        # So that models are found by their board; a promotion reads the run's.
        mlflow.MlflowClient().set_logged_model_tags(model.model_id, {"foxnas.board": benchmark.device})
    if model.version is None:
        return
    # For people: a promotion reads the run's tags, which no copy of a version and no second measurement changes.
    tags = {
        "benchmark_device": benchmark.device,
        "benchmark_target": target.name,
        "benchmark_valid": json.dumps(benchmark.valid),
        "emulated": json.dumps(benchmark.emulated),
    }
    tag_version(model.version.name, model.version.version, tags)
    words = "valid" if benchmark.valid else f"not valid: {'; '.join(benchmark.invalid_reasons)}"
    facts: dict[str, object] = {
        "latency median, ms": benchmark.latency_ms_p50,
        "latency p90, ms": benchmark.latency_ms_p90,
        **_later(benchmark),
        "measured on": f"{benchmark.device}, target {target.name}",
        "measured with": f"{benchmark.runtime}, {benchmark.threads} thread(s)",
        "measurement": "emulated: no real time" if benchmark.emulated else words,
    }
    if model.target not in ("", target.name):
        # Its own rows are of the machines that it is for.
        facts = {
            f"measured for {target.name} too": f"p90 {benchmark.latency_ms_p90:.4g} ms on {benchmark.device}, {words}"
        }
    describe_version(model.version.name, model.version.version, model.kind, facts=facts, command=command)


def _later(benchmark: Benchmark) -> dict[str, object]:
    """Facts of the time under load and of energy, where they were asked for."""
    facts: dict[str, object] = {}
    if benchmark.sustained_p90_ms is not None:
        words = f"{benchmark.sustained_p90_ms:.4g} at the end of {benchmark.sustained_seconds:.0f} s"
        facts["latency p90 under load, ms"] = words + (", throttled" if benchmark.throttled_under_load else "")
    if benchmark.energy_mj is not None:
        facts["energy an inference, mJ"] = f"{benchmark.energy_mj:.4g} +- {benchmark.energy_error_mj:.2g}"
    return facts


def next_command(benchmark: Benchmark, model: MeasuredModel, target: Target, device: str, options: str = "") -> str:
    """What to type after a measurement; a promotion refuses one that is not valid, or emulated.

    Args:
        benchmark: The measurement.
        model: What was measured.
        target: The target that it was measured for.
        device: Address that it was measured at.
        options: How it was measured, as it is typed.
    """
    if benchmark.valid and not benchmark.emulated:
        if model.version is None:
            return "mlflow ui, and compare the run."
        # The production version does not go back to staging: it is asked whether it still may serve.
        stage = "production" if STAGES["Production"] in model.version.aliases else "staging"
        return f"foxnas promote --stage {stage} --model {shlex.quote(model.source)}"
    device = "ssh://user@board" if benchmark.emulated else device
    source = shlex.quote(model.source)
    return f"foxnas benchmark --model {source} --target {target.argument} --device {shlex.quote(device)}{options}"


def log_estimate(run: EntryRun, estimate: VelaEstimate, model: MeasuredModel) -> None:
    """Log what Vela says of a model. It is no measurement: no ``benchmark`` metric or tag is set.

    Args:
        run: The open run.
        estimate: The estimate.
        model: What was compiled.
    """
    run.log_json(estimate.to_dict(), "vela.json")
    columns = list(estimate.layers[0])
    rows = ([layer[column] for column in columns] for layer in estimate.layers)
    write_csv(run.directory / "vela_layers.csv", columns, rows)
    run.log_table(list(estimate.layers), "tables/vela_layers.json")
    (run.directory / "model_vela.tflite").write_bytes(estimate.compiled)
    run.log_artifacts(run.directory)
    run.set_tags({"foxnas.estimator": f"Vela {estimate.version}", "foxnas.model": model.source})
    run.log_metrics(estimate.metrics(), model_id=model.model_id)
