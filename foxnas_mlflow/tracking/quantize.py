"""Logging a quantization: the int8 file, what it loses and where, and the registered model."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor import SubnetModel, TfliteModel, log_model
from foxnas_mlflow.tflite import Conversion, LayerError, QuantizationLoss
from foxnas_mlflow.tracking.registry import registered_name, tag_version
from foxnas_mlflow.tracking.run import EntryRun

MAX_DROP_POINTS = 1.0
"""A larger drop of top-1 makes the layers be named that lose most."""

_NAMED_LAYERS = 5


@dataclass(frozen=True)
class Quantized:
    """A finished quantization.

    Attributes:
        subnet: The subnet.
        network: Its network.
        preprocessing: How images are prepared for it.
        labels: Class names in output order.
        conversion: The int8 file.
        loss: What it loses in accuracy.
        errors: What each operator loses, the worst first.
        provenance: Where subnet and data came from.
    """

    subnet: SubnetModel
    network: Network
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    conversion: Conversion
    loss: QuantizationLoss
    errors: tuple[LayerError, ...]
    provenance: Mapping[str, Any]


def log_quantized(run: EntryRun, quantized: Quantized, *, target: Target, name: str) -> dict[str, Any]:
    """Log a quantization to its run and register the int8 model.

    Args:
        run: The open run.
        quantized: The quantization.
        target: The target.
        name: Prefix of the registered model.

    Returns:
        ``run_id`` and ``model_uri``.
    """
    conversion, loss = quantized.conversion, quantized.loss
    architecture = quantized.subnet.architecture
    files = run.directory / "artifacts"
    files.mkdir()
    (files / "architecture.json").write_text(architecture.to_json(indent=2), encoding="utf-8")
    write_layer_errors(quantized.errors, files / "layer_errors.csv")
    run.log_artifacts(files)
    cost = network_cost(quantized.network)
    metrics = {
        "model/size_bytes": conversion.size_bytes,
        "model/params": cost.params,
        "model/macs": cost.macs,
        "model/peak_activation_bytes": cost.peak_activation_bytes,
        "model/parity_error": conversion.parity_error,
        "accuracy/float_top1": loss.float_top1_percent,
        "accuracy/int8_top1": loss.int8_top1_percent,
        "accuracy/quantization_drop": loss.drop_points,
        "accuracy/quantization_drop_standard_error": loss.standard_error,
        "accuracy/n_images": loss.n_images,
    }
    path = run.directory / "model.tflite"
    conversion.save(path)
    details = {
        "sha256": conversion.sha256,
        "target": target.name,
        "provenance": dict(quantized.provenance),
        "operators": dict(conversion.operator_counts),
        "metrics": metrics,
    }
    model = TfliteModel(path, quantized.labels, quantized.preprocessing, architecture=architecture, details=details)
    registered = registered_name(name, "tflite", target.name)
    info = log_model(model, name="int8", kind="tflite", registered_model_name=registered)
    run.log_metrics(metrics, model_id=info.model_id)
    tags = {
        "weights": "trained",
        "target": target.name,
        "runtime": target.runtime,
        "subnet": quantized.provenance["subnet"],
        "data": quantized.provenance["data"],
        "data_digest": quantized.provenance["data_digest"],
        "sha256": conversion.sha256,
    }
    tag_version(registered, info.registered_model_version, tags)
    uri = f"models:/{registered}/{info.registered_model_version}"
    print(_summary(quantized, target, uri, run.run_id))
    return {"run_id": run.run_id, "model_uri": uri}


def write_layer_errors(errors: tuple[LayerError, ...], path: Path) -> None:
    """Write ``layer_errors.csv``: what quantization does to each operator's output, the worst first."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("name", "operator", "own_error", "error", "saturated"))
        for row in errors:
            writer.writerow((row.name, row.kind, f"{row.own_error:.6g}", f"{row.error:.6g}", f"{row.saturated:.6g}"))


def _summary(quantized: Quantized, target: Target, uri: str, run_id: str) -> str:
    conversion, loss = quantized.conversion, quantized.loss
    n_operators = sum(conversion.operator_counts.values())
    lines = [
        f"Quantized {quantized.provenance['subnet']} for {target.name} ({target.runtime}, int8):",
        f"  file                 {conversion.size_bytes:,} bytes, {n_operators} operators",
        f"  float top-1          {loss.float_top1_percent:.2f} % ({loss.n_images:,} validation images of "
        f"{quantized.provenance['data']})",
        f"  int8 top-1           {loss.int8_top1_percent:.2f} %",
        f"  drop                 {loss.drop_points:.2f} +- {loss.standard_error:.2f} points",
    ]
    if loss.drop_points > MAX_DROP_POINTS:
        lines.append(f"  More than {MAX_DROP_POINTS:g} point; the layers that lose most (all in layer_errors.csv):")
        lines += [
            f"    {row.name:<28} {row.kind:<18} adds {100 * row.own_error:.1f} %, {100 * row.error:.1f} % in all"
            for row in quantized.errors[:_NAMED_LAYERS]
        ]
    lines += [
        f"  registered           {uri} (SHA-256 {conversion.sha256[:16]}...)",
        f"  run                  {run_id}: layer_errors.csv, architecture.json",
        f"Next: foxnas benchmark --model {uri} --target {target.name}",
    ]
    return "\n".join(lines)
