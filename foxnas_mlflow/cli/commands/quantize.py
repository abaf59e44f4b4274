"""``foxnas quantize``: a trained subnet to int8 TensorFlow Lite, evaluated and registered."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from foxnas_mlflow.cli.parameters import COMPILER_IMAGE, Parameter

if TYPE_CHECKING:
    from foxnas_mlflow.core.network import Network
    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.data.preprocess import Normalization, Preprocessing
    from foxnas_mlflow.flavor import SubnetModel
    from foxnas_mlflow.tflite import EdgeTpuCompiler
    from foxnas_mlflow.tracking.quantize import EdgeTpuResult, Quantized
    from foxnas_mlflow.tracking.run import EntryRun

SUMMARY = "Convert a trained subnet to int8 TensorFlow Lite, evaluate and register it."

PARAMETERS = (
    Parameter("subnet", "", "Model URI of a subnet with weights, for example models:/foxnas-subnet-cpu/1."),
    Parameter("data", "", "Images: digits, fashion-mnist or a folder; empty: those of the subnet's training."),
    Parameter("target", "rpi4", "Target: rpi4, edgetpu, cpu, or the path of a target YAML."),
    Parameter("calibration_images", 200, "Training images that the ranges of activations are measured on.", int),
    Parameter("max_val", 0, "Evaluate on at most so many validation images, drawn by class; 0: all.", int),
    Parameter("input_type", "int8", "Type of the network's input.", choices=("int8", "uint8")),
    Parameter("seed", "", "Seed of the split and of the calibration images; empty: that of the training.", int),
    COMPILER_IMAGE,
    Parameter("name", "foxnas", "Prefix of the registered model."),
)

_PARITY_IMAGES = 8
_TABLE_IMAGES = 8


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Convert, evaluate and register."""
    from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
    from foxnas_mlflow.core.network import build_network
    from foxnas_mlflow.core.targets import get_target
    from foxnas_mlflow.data import load_dataset

    for name, least in (("calibration_images", 8), ("max_val", 0), ("seed", 0)):
        if getattr(args, name) != "" and getattr(args, name) < least:
            raise InvalidInputError(f"{name} must be {least} or more", received=getattr(args, name))
    target = get_target(args.target)
    if target.runtime == "torch":
        raise InvalidInputError(
            "quantize makes TensorFlow Lite files: the target's runtime must be litert or edgetpu",
            received=f"{target.name}: {target.runtime}",
        )

    from foxnas_mlflow.tflite import quiet_tensorflow

    with quiet_tensorflow():
        import_or_raise("tensorflow", extra="tflite", feature="conversion to TensorFlow Lite")

    from foxnas_mlflow.tracking.registry import registered_name
    from foxnas_mlflow.tracking.run import entry_run

    registered_name(args.name, "tflite", target.name)
    compiler = None
    if target.runtime == "edgetpu":
        from foxnas_mlflow.tflite import find_compiler

        # Before the conversion: an image that is not there shall cost no wait.
        compiler = find_compiler(args.compiler_image)
    subnet, uri = _load_subnet(args.subnet)
    network = build_network(subnet.space, subnet.architecture)
    source = args.data or str(subnet.details.get("data", ""))
    if not source:
        raise InvalidInputError("data must be given: the subnet does not tell what it was trained on", received=uri)
    # The seed decides which images are validation images where the source has no split of its own.
    seed = int(subnet.details.get("data_seed", 0)) if args.seed == "" else args.seed
    dataset = load_dataset(source, seed=seed, max_val=args.max_val or None)
    preprocessing, labels = _fitting(subnet, network, dataset)

    given = vars(args) | {"subnet": uri, "data": source, "seed": seed}
    with entry_run(stage="quantize", params=given, target=target.name, space=subnet.space.name) as run:
        from foxnas_mlflow.tracking.quantize import log_quantized
        from foxnas_mlflow.tracking.supernet import log_dataset

        log_dataset(run, dataset, context="quantization")
        provenance = {"subnet": uri, "run_id": run.run_id, "data": source, "data_digest": dataset.digest, "seed": seed}
        quantized = _quantize(args, target.runtime, subnet, network, dataset, preprocessing, labels, provenance)
        edgetpu = _compile(run, quantized.conversion.data, compiler) if target.runtime == "edgetpu" else None
        return log_quantized(run, quantized, target=target, name=args.name, edgetpu=edgetpu)


def _compile(run: EntryRun, data: bytes, compiler: EdgeTpuCompiler | None) -> EdgeTpuResult:
    """What the Edge TPU's compiler makes of a file, and what can be said without one."""
    from foxnas_mlflow.tflite import edgetpu_readiness, read_tflite
    from foxnas_mlflow.tracking.quantize import EdgeTpuResult

    readiness = edgetpu_readiness(read_tflite(data))
    run.log_json(readiness.to_dict(), "edgetpu_readiness.json")
    if compiler is None:
        return EdgeTpuResult(readiness)
    output = compiler.run(data)
    run.log_text(output.log, "edgetpu.log")
    return EdgeTpuResult(readiness, output.data, output.report())


def _load_subnet(uri: str) -> tuple[SubnetModel, str]:
    """A registered subnet that has weights, and its URI with the version in place of an alias."""
    from pathlib import Path

    from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError
    from foxnas_mlflow.flavor import SubnetModel, load_model
    from foxnas_mlflow.tracking.registry import find_version

    if not uri or Path(uri).is_file():
        raise InvalidInputError(
            "subnet must be the model URI of a subnet with weights",
            received=uri or None,
            remedy="make one with: foxnas search --supernet models:/foxnas-supernet/1",
        )
    if uri.startswith("models:/") and not uri.startswith("models:/m-"):
        version = find_version(uri)
        uri = f"models:/{version.name}/{version.version}"
    model = load_model(uri)
    if not isinstance(model, SubnetModel):
        raise InvalidFormatError(
            "subnet must be a model of kind 'subnet'", received=f"{uri}: {type(model).__name__.removesuffix('Model')}"
        )
    if model.weights is None:
        raise InvalidInputError(
            "the subnet must have weights",
            received=f"{uri} (weights=none)",
            remedy="search again with --supernet, which gives the found network its weights",
        )
    return model, uri


def _fitting(subnet: SubnetModel, network: Network, dataset: ImageDataset) -> tuple[Preprocessing, tuple[str, ...]]:
    """How images are prepared, and the labels; refused if data and subnet do not belong together."""
    import dataclasses

    from foxnas_mlflow.core.errors import InvalidInputError
    from foxnas_mlflow.data.preprocess import Preprocessing

    if subnet.labels and subnet.labels != dataset.labels:
        differing = sorted(set(subnet.labels) ^ set(dataset.labels)) or ["another order"]
        raise InvalidInputError(
            f"data must have the {len(subnet.labels)} classes of the subnet, in their order",
            received=f"{dataset.n_classes} classes in {dataset.source}; differing: {', '.join(differing[:5])}",
        )
    if network.n_classes != dataset.n_classes:
        raise InvalidInputError(
            f"data must have {network.n_classes} classes, as the subnet",
            received=f"{dataset.n_classes} in {dataset.source}",
        )
    if dataset.channels != network.in_channels:
        raise InvalidInputError(
            f"data must have images of {network.in_channels} channels, as the subnet",
            received=f"{dataset.source}: {dataset.channels}",
        )
    preprocessing = subnet.preprocessing
    if preprocessing is None:
        preprocessing = Preprocessing(network.image_size, network.in_channels, normalization=dataset.normalization)
    return dataclasses.replace(preprocessing, image_size=network.image_size), dataset.labels


def _quantize(
    args: argparse.Namespace,
    runtime: Any,
    subnet: SubnetModel,
    network: Network,
    dataset: ImageDataset,
    preprocessing: Preprocessing,
    labels: tuple[str, ...],
    provenance: dict[str, Any],
) -> Quantized:
    """Convert the subnet and evaluate the result."""

    from foxnas_mlflow.cli.progress import progress_bar
    from foxnas_mlflow.data import calibration_images, prepared_batches
    from foxnas_mlflow.tflite import FloatModel, Int8Model, convert, layer_errors, quantization_loss
    from foxnas_mlflow.tracking.quantize import Quantized

    weights = subnet.weights or {}
    normalization = preprocessing.normalization
    representative = calibration_images(dataset, preprocessing, args.calibration_images, seed=provenance["seed"])
    conversion = convert(
        network,
        weights,
        representative,
        normalization=normalization,
        labels=labels,
        architecture=subnet.architecture,
        provenance=provenance | {"calibration_images": len(representative)},
        reference_logits=_torch_logits(network, weights, normalization, representative[:_PARITY_IMAGES]),
        runtime=runtime,
        input_type=args.input_type,
    )
    with progress_bar("quantize", "image") as show:

        def validation() -> Any:
            done = 0
            for images, targets in prepared_batches(dataset.val, preprocessing):
                yield images, targets
                done += len(images)
                show(done, len(dataset.val), "evaluating")

        loss = quantization_loss(FloatModel(network, weights, normalization), Int8Model(conversion.data), validation())
    errors = layer_errors(network, weights, conversion.data, representative[:_TABLE_IMAGES])
    return Quantized(subnet, network, preprocessing, labels, conversion, loss, tuple(errors), provenance)


def _torch_logits(network: Network, weights: Any, normalization: Normalization, images: Any) -> Any:
    """The trainer's own float logits, or None where PyTorch is not installed."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return None
    from foxnas_mlflow.supernet import plain_logits

    return plain_logits(network, weights, normalization(images))
