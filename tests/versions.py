"""Registered int8 versions with figures, for tests of promotion and of what comes after it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
from mlflow.entities.model_registry import ModelVersion

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.devices import Benchmark
from foxnas_mlflow.flavor import TfliteModel, log_model, model_id_of, signer
from foxnas_mlflow.tflite import write_probe
from foxnas_mlflow.tracking.registry import metrics_of

NAME = "foxnas-rpi4"
FIGURES = {
    "benchmark/latency_ms_p90": 40.0,
    "benchmark/valid": 1.0,
    "accuracy/int8_top1": 75.0,
    "accuracy/quantization_drop": 0.4,
}


@functools.cache
def probe() -> bytes:
    """A small int8 network with three classes."""
    space = dataclasses.replace(CPU_SPACE, n_classes=3)
    return write_probe(build_network(space, space.smallest(128)))


def register_version(
    directory: Path,
    figures: Mapping[str, float | None] = {},
    *,
    name: str = NAME,
    latency_source: str = "measured",
    weights: str = "trained",
    tags: Mapping[str, str] = {},
    target: str = "rpi4",
    measured_for: str = "rpi4",
    machine: str = "Raspberry Pi 4 Model B Rev 1.4",
    emulated: bool = False,
    details: Mapping[str, object] = {},
) -> str:
    """Log and register a version as `quantize` and `benchmark` do; returns its number.

    A figure that is None is left out.
    """
    path = directory / "probe.tflite"
    path.write_bytes(probe())
    values = {key: value for key, value in {**FIGURES, **figures}.items() if value is not None}
    quality = {key: value for key, value in values.items() if key.startswith("accuracy/")}
    sealed = {"figures": quality, **({"target": target} if target else {}), **details}
    model = TfliteModel(path, ("a", "b", "c"), Preprocessing(128, 3), weights=weights, details=sealed)  # type: ignore[arg-type]
    client = mlflow.MlflowClient()
    with mlflow.start_run(nested=True):
        info = log_model(model, name="model", registered_model_name=name, code_paths=[])
        mlflow.log_metrics(quality, model_id=info.model_id)
    log_measurement(
        info.model_id,
        {key: value for key, value in values.items() if key not in quality},
        target=measured_for,
        machine=machine,
        emulated=emulated,
        latency_source=latency_source,
    )
    number = str(info.registered_model_version)
    for key, value in {"weights": weights, "target": target, **tags}.items():
        client.set_model_version_tag(name, number, key, value)
    return number


def version_metrics(version: ModelVersion) -> dict[str, float]:
    """The figures of a version: the latest value of every metric of its logged model."""
    model_id = model_id_of(version)
    return {} if model_id is None else {metric.key: metric.value for metric in metrics_of(model_id)}


def log_measurement(
    model_id: str,
    figures: Mapping[str, float],
    *,
    target: str = "rpi4",
    machine: str = "Raspberry Pi 4 Model B Rev 1.4",
    emulated: bool = False,
    latency_source: str = "measured",
    data: bytes | None = None,
    signing_key: str = "",
    threads: int = 1,
    sustained_seconds: float = 60.0,
) -> str:
    """A run with latencies of a model, whose file is `data`, as `benchmark` leaves it; returns its id."""
    tags = {
        "foxnas.stage": "benchmark",
        "foxnas.latency_source": latency_source,
        "foxnas.target": target,
        "foxnas.board": machine,
        "foxnas.emulated": str(emulated).lower(),
    }
    with mlflow.start_run(tags=tags, nested=True) as run:
        if "benchmark/latency_ms_p90" in figures:
            document = benchmark(figures, probe() if data is None else data, machine, emulated)
            windows = ({"second": 0.0, "seconds": sustained_seconds},)
            document = dataclasses.replace(document, threads=threads, windows=windows)
            mlflow.log_dict(document.to_dict(), "benchmark.json")
            if signing_key:
                path = mlflow.artifacts.download_artifacts(f"runs:/{run.info.run_id}/benchmark.json")
                mlflow.log_text(signer(Path(signing_key))(Path(path)), "benchmark.json.sig")
        if figures:
            mlflow.log_metrics(dict(figures), model_id=model_id)
        if not emulated:
            mlflow.MlflowClient().set_logged_model_tags(model_id, {"foxnas.board": machine})
    return str(run.info.run_id)


def benchmark(figures: Mapping[str, float], data: bytes, machine: str, emulated: bool) -> Benchmark:
    """What was measured, for its figures."""
    p90 = figures["benchmark/latency_ms_p90"]
    valid = figures.get("benchmark/valid", 0.0) == 1
    times = dict.fromkeys(("p50", "p99", "mean", "std", "p50_low", "p50_high"), p90)
    return Benchmark(
        **{f"latency_ms_{part}": ms for part, ms in times.items()},
        latency_ms_p90=p90,
        throughput_per_s=1.0,
        peak_memory_bytes=1,
        valid=valid,
        invalid_reasons=() if valid else ("the machine was throttled",),
        emulated=emulated,
        **dict.fromkeys(("n_runs", "asked_runs", "attempts", "threads", "batch", "warmup"), 1),
        runtime="LiteRT",
        device=machine,
        connection="local",
        governor="performance",
        temperature_c_start=None,
        temperature_c_end=None,
        throttled=None,
        load_ms=1.0,
        first_invoke_ms=1.0,
        edgetpu=False,
        output_difference=0.0,
        sustained_p90_ms=figures.get("benchmark/sustained_p90_ms"),
        model_sha256=hashlib.sha256(data).hexdigest(),
        samples_ms=(p90,),
    )


def state(name: str = NAME) -> dict[str, Any]:
    """Aliases, and the stage of every version."""
    client = mlflow.MlflowClient()
    model = client.get_registered_model(name)
    stages = {str(v.version): v.current_stage for v in client.search_model_versions(f"name='{name}'")}
    return {"aliases": {k: str(v) for k, v in model.aliases.items()}, "stages": stages}
