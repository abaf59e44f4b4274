"""Logging a quantization: the int8 file, what it loses and where, and the registered model."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.classification import (
    TEST_ACCURACY,
    TEST_IMAGES,
    balanced_percent,
    class_table,
    held_out,
    majority_percent,
)
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.files import file_digest, write_csv
from foxnas_mlflow.core.network import Network
from foxnas_mlflow.core.rejection import Rejection
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.data import Evaluation
from foxnas_mlflow.data.preprocess import Preprocessing
from foxnas_mlflow.flavor import SubnetModel, TfliteModel, log_model
from foxnas_mlflow.tflite import CompilerReport, Conversion, LayerError, QuantizationLoss, Readiness
from foxnas_mlflow.tracking.gates import ACCURACY, DROP
from foxnas_mlflow.tracking.registry import PICTURE, picture_of, register, registered_name, shortened
from foxnas_mlflow.tracking.run import EntryRun
from foxnas_mlflow.tracking.search import FRONT_PICTURE
from foxnas_mlflow.tracking.steps import has_artifact


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
        rejection: When the int8 file should answer none of its classes.
        errors: What each operator loses, the worst first.
        provenance: Where subnet and data came from.
        before: What it lost before it was trained with simulated int8, or None.
        test: The int8 file's answers to the images that were held out, by which nothing was chosen; None where the data
            have none.
    """

    subnet: SubnetModel
    network: Network
    preprocessing: Preprocessing
    labels: tuple[str, ...]
    conversion: Conversion
    loss: QuantizationLoss
    rejection: Rejection
    errors: tuple[LayerError, ...]
    provenance: Mapping[str, Any]
    before: QuantizationLoss | None = None
    test: Evaluation | None = None


@dataclass(frozen=True)
class EdgeTpuResult:
    """The int8 file and the Edge TPU.

    Attributes:
        readiness: What is known without a compiler.
        data: The compiled file; empty where there is no compiler.
        report: What the compiler said.
    """

    readiness: Readiness
    data: bytes = b""
    report: CompilerReport | None = None

    @property
    def metrics(self) -> dict[str, float]:
        """All figures."""
        return self.readiness.metrics | ({} if self.report is None else self.report.metrics)


@dataclass(frozen=True)
class LoggedQuantization:
    """A quantization in MLflow.

    Attributes:
        model_uri: The registered int8 model.
        edgetpu_model_uri: Its Edge TPU twin; empty where it was not compiled.
        metrics: Figures of the int8 model, as logged.
    """

    model_uri: str
    edgetpu_model_uri: str
    metrics: Mapping[str, float]


def log_quantized(
    run: EntryRun, quantized: Quantized, *, target: Target, name: str, edgetpu: EdgeTpuResult | None = None
) -> LoggedQuantization:
    """Log a quantization to its run and register the int8 model, and its Edge TPU twin if it was compiled.

    Args:
        run: The open run.
        quantized: The quantization.
        target: The target.
        name: Prefix of the registered models.
        edgetpu: What became of it for an Edge TPU.
    """
    conversion, loss = quantized.conversion, quantized.loss
    architecture = quantized.subnet.architecture
    files = run.directory / "artifacts"
    files.mkdir()
    (files / "architecture.json").write_text(architecture.to_json(indent=2), encoding="utf-8")
    write_layer_errors(quantized.errors, files / "layer_errors.csv")
    run.log_artifacts(files)
    run.log_table([dataclasses.asdict(row) for row in quantized.errors], "tables/layer_errors.json")
    run.log_table(class_table(loss.int8.counts, quantized.labels), "tables/classes.json")
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
        "eval/balanced_accuracy_int8": balanced_percent(loss.int8.counts),
        "eval/majority_share": majority_percent(loss.int8.counts),
        **quantized.rejection.metrics(),
    }
    if quantized.before is not None:
        metrics["accuracy/quantization_drop_before_repair"] = quantized.before.drop_points
    if quantized.test is not None:
        metrics |= {TEST_ACCURACY: quantized.test.top1_percent, TEST_IMAGES: quantized.test.n_images}
    tags = {
        "weights": "trained",
        "target": target.name,
        "runtime": target.runtime,
        "subnet": quantized.provenance["subnet"],
        "data": quantized.provenance["data"],
        "data_digest": quantized.provenance["data_digest"],
        **_origin(quantized.subnet),
    }
    path = run.directory / "model.tflite"
    conversion.save(path)
    model = TfliteModel(
        path,
        quantized.labels,
        quantized.preprocessing,
        architecture=architecture,
        details={
            "sha256": conversion.sha256,
            "target": target.name,
            "machine": target.machine,
            "threads": target.threads,
            "provenance": dict(quantized.provenance),
            "operators": dict(conversion.operator_counts),
            "rejection": quantized.rejection.to_dict(),
            # Sealed with the model: what a promotion asks for.
            "figures": {key: metrics[key] for key in (ACCURACY, DROP)},
        },
    )
    facts = {} if edgetpu is None else edgetpu.readiness.metrics
    uri = _register(
        run,
        model,
        "tflite",
        registered_name(name, "tflite", target.name),
        metrics | facts,
        tags | {"sha256": file_digest(path)},
        target,
    )
    twin_uri = ""
    if edgetpu is not None and edgetpu.report is not None:
        compiled = run.directory / "model_edgetpu.tflite"
        compiled.write_bytes(edgetpu.data)
        twin = dataclasses.replace(
            model, path=compiled, fallback=path, details={**model.details, "compiler": edgetpu.report.version}
        )
        # Its accuracy is that of the int8 file: only an Edge TPU could tell another.
        twin_uri = _register(
            run,
            twin,
            "edgetpu",
            registered_name(name, "edgetpu", target.name),
            metrics | edgetpu.metrics | {"model/size_bytes": len(edgetpu.data)},
            tags | {"sha256": file_digest(compiled), "int8_model": uri, "compiler": edgetpu.report.version},
            target,
        )
    return LoggedQuantization(uri, twin_uri, metrics | facts)


def _register(
    run: EntryRun,
    model: TfliteModel,
    kind: str,
    registered: str,
    metrics: Mapping[str, float],
    tags: Mapping[str, object],
    target: Target,
) -> str:
    info = log_model(model, name=kind, kind=kind)
    accuracies = {key: value for key, value in metrics.items() if key.startswith(("accuracy/", "eval/"))}
    run.log_metrics({k: v for k, v in metrics.items() if k not in accuracies}, model_id=info.model_id)
    run.log_metrics(accuracies, model_id=info.model_id, dataset=run.dataset)
    size, channels = model.preprocessing.image_size, model.preprocessing.channels
    front = str(tags.get("search_run", ""))
    return register(
        info.model_uri,
        registered,
        kind,
        tags=tags,
        facts={
            "converted from": tags["subnet"],
            "target": tags["target"],
            "float top-1, %": metrics["accuracy/float_top1"],
            "int8 top-1, %": metrics["accuracy/int8_top1"],
            "int8, mean of the classes, %": metrics["eval/balanced_accuracy_int8"],
            "lost by quantization, points": f"{metrics['accuracy/quantization_drop']:.2f} +- "
            f"{metrics['accuracy/quantization_drop_standard_error']:.2f}",
            "validation images": f"{metrics['accuracy/n_images']:,.0f} of {tags['data']}",
            **dict(held_out(metrics)),
            "file, bytes": f"{metrics['model/size_bytes']:,.0f}",
            "labels": shortened(model.labels),
            "input": f"images of any size, resized to {size} x {size} px, {'grey' if channels == 1 else 'colour'}",
            "architecture": str(model.architecture),
            "SHA-256": tags["sha256"],
            **({PICTURE: picture_of(front, FRONT_PICTURE)} if front and has_artifact(front, FRONT_PICTURE) else {}),
        },
        command=lambda uri: benchmark_command(uri, kind, target),
    )


def _origin(subnet: SubnetModel) -> dict[str, str]:
    """What the subnet says of where it is from."""
    keys = ("supernet", "predictors", "search_run")
    return {key: str(subnet.details[key]) for key in keys if key in subnet.details}


def benchmark_command(uri: str, kind: str, target: Target) -> str:
    """How to measure a model: one that was not compiled for its Edge TPU runs on this host only."""
    runs_there = target.runtime != "edgetpu" or kind == "edgetpu"
    where = f"{target.argument}{target.device_option}" if runs_there else "cpu"
    return f"foxnas benchmark --model {shlex.quote(uri)} --target {where}"


def write_layer_errors(errors: tuple[LayerError, ...], path: Path) -> None:
    """Write ``layer_errors.csv``: what quantization does to each operator's output, the worst first."""
    rows = ((e.name, e.kind, f"{e.own_error:.6g}", f"{e.error:.6g}", f"{e.saturated:.6g}") for e in errors)
    write_csv(path, ("name", "operator", "own_error", "error", "saturated"), rows)
