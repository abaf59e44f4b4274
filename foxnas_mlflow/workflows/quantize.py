"""Quantize: a trained subnet to int8 TensorFlow Lite, evaluated and registered."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._images import CALIBRATION_IMAGES, batches_of, class_weights_of, images_of, unknown_images
from foxnas_mlflow.workflows._request import Request, compiler_image, parameter
from foxnas_mlflow.workflows._workflow import Result, Workflow, logger, progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from foxnas_mlflow.core.network import Network
    from foxnas_mlflow.core.targets import Int8Runtime, Target
    from foxnas_mlflow.data import ImageDataset
    from foxnas_mlflow.data.preprocess import Normalization, Preprocessing
    from foxnas_mlflow.flavor import SubnetModel
    from foxnas_mlflow.tflite import Conversion, EdgeTpuCompiler, QuantizationLoss
    from foxnas_mlflow.tracking.quantize import EdgeTpuResult, LoggedQuantization, Quantized
    from foxnas_mlflow.tracking.run import EntryRun


@dataclass(frozen=True, kw_only=True)
class QuantizeRequest(Request):
    """What to quantize; see `run_quantize`."""

    subnet: str = parameter("", "Model URI of a subnet with weights, for example models:/foxnas-subnet-cpu/1.")
    data: str = parameter("", "Images: glyphs, digits, fashion-mnist or a folder; empty: those of the training.")
    target: str = parameter("rpi4", "Target: rpi4, edgetpu, cpu, or the path of a target YAML.")
    calibration_images: int = parameter(
        CALIBRATION_IMAGES, "Training images that the ranges of activations are measured on.", at_least=8
    )
    max_val: int = parameter(0, "Evaluate on at most so many validation images, drawn by class; 0: all.", at_least=0)
    input_type: Literal["int8", "uint8"] = parameter("int8", "Type of the network's input.")
    max_accuracy_drop: float = parameter(
        1.0, "Points of top-1 that int8 may lose before the network is trained to lose less.", at_least=0
    )
    repair_epochs: int = parameter(
        3, "Epochs of training with simulated int8 where it loses more than that; 0: none.", at_least=0
    )
    max_false_accept: float = parameter(
        0.05, "Share of images of none of the classes that may be answered with a class.", above=0, below=1
    )
    unknown: str = parameter("", "Folder of images of none of the classes; empty: wrong answers stand for them.")
    seed: int | None = parameter(None, "Seed of the calibration images; empty: that of the training.", at_least=0)
    compiler_image: str = compiler_image()
    name: str = parameter("foxnas", "Prefix of the registered model.")


REPAIR_LEARNING_RATE = 0.02
_REPAIR_BATCH = 64
_NAMED_LAYERS = 5
_PARITY_IMAGES = 8
_TABLE_IMAGES = 8


@dataclass(frozen=True, kw_only=True)
class QuantizeResult(Result):
    """Registered int8 models.

    Attributes:
        model_uri: The int8 file for processors.
        edgetpu_model_uri: The file compiled for an Edge TPU; empty where none was.
        metrics: ``accuracy/{figure}`` and ``model/{figure}`` as logged.
        classes: Of each class: label, images, recall, precision and f1 in percent, what it is most often taken for.
    """

    model_uri: str
    edgetpu_model_uri: str = ""
    classes: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, float]

    @property
    def runnable_uri(self) -> str:
        """The model that runs on the target: for an Edge TPU the compiled one."""
        return self.edgetpu_model_uri or self.model_uri


def run_quantize(request: QuantizeRequest, *, tags: Mapping[str, str] | None = None) -> QuantizeResult:
    """Convert a subnet, evaluate and register the int8 file.

    Args:
        request: What to convert.
        tags: Further tags of its run.

    Raises:
        InvalidInputError: If subnet, data and target do not belong together.
        ConversionError: If the network cannot be converted, or its file computes something else.
    """
    from foxnas_mlflow.core.errors import import_or_raise
    from foxnas_mlflow.core.network import build_network
    from foxnas_mlflow.core.targets import get_target

    target = get_target(request.target)
    runtime = target.int8_runtime("quantize")

    from foxnas_mlflow.tflite import quiet_tensorflow

    with quiet_tensorflow():
        import_or_raise("tensorflow", extra="tflite", feature="conversion to TensorFlow Lite")

    from foxnas_mlflow.tracking.inputs import open_subnet
    from foxnas_mlflow.tracking.registry import registered_name
    from foxnas_mlflow.tracking.run import entry_run

    registered_name(request.name, "tflite", target.name)
    compiler = None
    if runtime == "edgetpu":
        from foxnas_mlflow.tflite import find_compiler

        # Before the conversion: an image that is not there shall cost no wait.
        compiler = find_compiler(request.compiler_image)
    subnet, weights, uri = open_subnet(request.subnet)
    network = build_network(subnet.space, subnet.architecture)
    source = request.data or str(subnet.details.get("data", ""))
    if not source:
        raise InvalidInputError("data must be given: the subnet does not tell what it was trained on", received=uri)
    seed = int(subnet.details.get("data_seed", 0)) if request.seed is None else request.seed
    size = subnet.architecture.image_size
    dataset = images_of(subnet, source, seed=seed, max_val=request.max_val or None, sizes=(size,))
    preprocessing = _fitting(subnet, network, dataset)
    unknown = unknown_images(request.unknown, preprocessing)

    given = request.texts() | {"subnet": uri, "data": source, "seed": str(seed)}
    with entry_run(stage="quantize", params=given, target=target.name, space=subnet.space.name, tags=tags) as run:
        from foxnas_mlflow.core.classification import class_table
        from foxnas_mlflow.tracking.quantize import log_quantized
        from foxnas_mlflow.tracking.supernet import log_dataset

        log_dataset(run, dataset, context="quantization")
        provenance = {"subnet": uri, "run_id": run.run_id, "data": source, "data_digest": dataset.digest, "seed": seed}
        inputs = _Inputs(subnet, weights, network, dataset, preprocessing, unknown, runtime, seed, provenance)
        quantized = _quantize(request, inputs)
        edgetpu = _compile(run, quantized.conversion.data, compiler) if runtime == "edgetpu" else None
        logged = log_quantized(run, quantized, target=target, name=request.name, edgetpu=edgetpu)
        return QuantizeResult(
            run_id=run.run_id,
            model_uri=logged.model_uri,
            edgetpu_model_uri=logged.edgetpu_model_uri,
            metrics=logged.metrics,
            classes=class_table(quantized.loss.int8.counts, quantized.labels),
            summary=_summary(quantized, target, logged, run.run_id, edgetpu, request.max_accuracy_drop),
        )


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


def _fitting(subnet: SubnetModel, network: Network, dataset: ImageDataset) -> Preprocessing:
    """How images are prepared; refused if data and subnet do not belong together."""
    import dataclasses

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
        preprocessing = dataset.preprocessing(network.image_size)
    return dataclasses.replace(preprocessing, image_size=network.image_size)


@dataclass(frozen=True, eq=False)
class _Inputs:
    """What is converted, for what, and the images that it is converted and evaluated with.

    Attributes:
        weights: Those of the subnet: arrays by parameter name.
        unknown: Images of none of the classes, (n, size, size, channels); None: none were given.
        seed: Seed of the calibration images.
        provenance: What the file tells of its origin.
    """

    subnet: SubnetModel
    weights: Mapping[str, NDArray[Any]]
    network: Network
    dataset: ImageDataset
    preprocessing: Preprocessing
    unknown: NDArray[np.uint8] | None
    runtime: Int8Runtime
    seed: int
    provenance: Mapping[str, Any]


def _quantize(request: QuantizeRequest, inputs: _Inputs) -> Quantized:
    """Convert the subnet and evaluate the result."""
    import importlib.util

    from foxnas_mlflow.core.rejection import fit_rejection
    from foxnas_mlflow.data import ImageSet, calibration_images, evaluate, images_digest, prepared_batches
    from foxnas_mlflow.tflite import FloatModel, Int8Model, convert, layer_errors, quantization_loss
    from foxnas_mlflow.tracking.quantize import Quantized

    network, dataset, preprocessing, weights = inputs.network, inputs.dataset, inputs.preprocessing, inputs.weights
    normalization = preprocessing.normalization
    representative = calibration_images(dataset, preprocessing, request.calibration_images, seed=inputs.seed)
    conversion = convert(
        network,
        weights,
        representative,
        normalization=normalization,
        labels=dataset.labels,
        architecture=inputs.subnet.architecture,
        provenance={**inputs.provenance, "calibration_images": len(representative)},
        reference_logits=_torch_logits(network, weights, normalization, representative[:_PARITY_IMAGES]),
        runtime=inputs.runtime,
        input_type=request.input_type,
    )

    def prepared(images: ImageSet) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
        done = 0
        with progress_bar("quantize", "image") as show:
            for batch, targets in prepared_batches(images, preprocessing):
                yield batch, targets
                done += len(batch)
                show(done, len(images), "evaluating")

    exact = FloatModel(network, weights, normalization)
    int8 = Int8Model(conversion.data)
    loss = quantization_loss(exact, int8, prepared(dataset.val))
    repair: QuantizationLoss | None = None
    too_much = loss.drop_points > request.max_accuracy_drop
    if request.repair_epochs and too_much and importlib.util.find_spec("torch") is None:
        logger.warning("int8 loses %.2f points, and without PyTorch nothing can be trained", loss.drop_points)
    elif request.repair_epochs and too_much:
        logger.info(
            "int8 loses %.2f points: the network is trained with simulated int8 for %d epochs",
            *(loss.drop_points, request.repair_epochs),
        )
        other, its_weights = _repaired(request, inputs, conversion)
        its_loss = quantization_loss(exact, Int8Model(other.data), prepared(dataset.val))
        if its_loss.int8_top1_percent > loss.int8_top1_percent:
            repair, loss, conversion, weights, int8 = loss, its_loss, other, its_weights, Int8Model(other.data)
    test = None
    if dataset.test is not None:
        (test,) = evaluate(prepared(dataset.test), int8.logits)
    rejection = fit_rejection(
        loss.int8.scores,
        loss.int8.targets,
        max_false_accept=request.max_false_accept,
        unknown=None if inputs.unknown is None else int8.logits(inputs.unknown),
    )
    errors = layer_errors(network, weights, conversion.data, representative[:_TABLE_IMAGES])
    # Without those that broke meanwhile.
    provenance = {**inputs.provenance, "evaluated_digest": images_digest(dataset.val)}
    return Quantized(
        inputs.subnet,
        network,
        preprocessing,
        dataset.labels,
        conversion,
        loss,
        rejection,
        tuple(errors),
        provenance,
        before=repair,
        test=test,
    )


def _repaired(
    request: QuantizeRequest, inputs: _Inputs, conversion: Conversion
) -> tuple[Conversion, Mapping[str, NDArray[Any]]]:
    """The file with weights that were trained on its grids, and these weights in floats.

    The float network teaches beside the labels.
    """
    from foxnas_mlflow.supernet import PlainNetwork, SimulatedNetwork, network_teacher, subnet_weights
    from foxnas_mlflow.tflite import grids_of, one_scale_of, read_tflite, with_weights

    network, weights, ours = inputs.network, inputs.weights, inputs.preprocessing.normalization
    file = read_tflite(conversion.data)
    batches = batches_of(inputs.subnet, inputs.dataset, batch_size=_REPAIR_BATCH, augment=False, seed=inputs.seed)
    teacher = network_teacher(PlainNetwork.from_weights(network, weights), its=ours, ours=ours)
    simulated = SimulatedNetwork(network, weights, grids_of(file, network), one_scale=one_scale_of(file, network))
    with progress_bar("repair", "step") as show:
        simulated.trained(
            batches,
            epochs=request.repair_epochs,
            learning_rate=REPAIR_LEARNING_RATE,
            class_weights=class_weights_of(inputs.subnet),
            teacher=teacher,
            progress=lambda done, n, loss: show(done, n, f"loss {loss:.3f}"),
        )
    how = f"{request.repair_epochs} epochs with simulated int8"
    return with_weights(conversion, network, simulated.parameters_of_file(), how), subnet_weights(simulated)


def _torch_logits(
    network: Network, weights: Mapping[str, NDArray[Any]], normalization: Normalization, images: NDArray[np.uint8]
) -> NDArray[np.floating] | None:
    """The trainer's own float logits, or None where PyTorch is not installed."""
    import importlib.util

    if importlib.util.find_spec("torch") is None:
        return None
    from foxnas_mlflow.supernet import plain_logits

    return plain_logits(network, weights, normalization(images))


def _summary(
    quantized: Quantized,
    target: Target,
    logged: LoggedQuantization,
    run_id: str,
    edgetpu: EdgeTpuResult | None,
    max_drop: float,
) -> str:
    from foxnas_mlflow.core.classification import balanced_percent, no_better_than_majority, worst_classes
    from foxnas_mlflow.tracking.gates import told
    from foxnas_mlflow.tracking.quantize import benchmark_command

    conversion, loss = quantized.conversion, quantized.loss
    n_operators = sum(conversion.operator_counts.values())
    kind = "edgetpu" if logged.edgetpu_model_uri else "tflite"
    served = logged.edgetpu_model_uri or logged.model_uri
    lines = [
        f"Quantized {quantized.provenance['subnet']} for {target.name} ({target.runtime}, int8):",
        f"  file                 {conversion.size_bytes:,} bytes, {n_operators} operators",
        f"  float top-1          {loss.float_top1_percent:.2f} % ({loss.n_images:,} validation images of "
        f"{quantized.provenance['data']})",
        f"  int8 top-1           {loss.int8_top1_percent:.2f} %, mean of the classes "
        f"{balanced_percent(loss.int8.counts):.2f} %",
        f"  drop                 {loss.drop_points:.2f} +- {loss.standard_error:.2f} points",
    ]
    test = quantized.test
    if test is not None:
        lines.append(
            f"  held-out test        {test.top1_percent:.2f} % +- {test.standard_error:.2f} int8 top-1, mean of the "
            f"classes {test.balanced_percent:.2f} % ({test.n_images:,} images by which nothing was chosen)"
        )
    if quantized.before is not None:
        lines.append(
            f"  repaired             from {quantized.before.drop_points:.2f} +- {quantized.before.standard_error:.2f} "
            f"points by {conversion.metadata['repaired']}"
        )
    worst, useless = (say(loss.int8.counts, quantized.labels) for say in (worst_classes, no_better_than_majority))
    lines += [f"  worst classes        {worst}"] if worst else []
    lines.append(f"  none of these        {quantized.rejection.describe()}")
    lines += [f"  {useless}"] if useless else []
    if loss.drop_points > max_drop:
        too_much = f"{told(loss.drop_points, max_drop)} points are more than {max_drop:g}"
        lines.append(f"  {too_much}; the layers that lose most (all in layer_errors.csv):")
        lines += [
            f"    {row.name:<28} {row.kind:<18} adds {100 * row.own_error:.1f} %, {100 * row.error:.1f} % in all"
            for row in quantized.errors[:_NAMED_LAYERS]
        ]
    lines += [] if edgetpu is None else _edgetpu_lines(edgetpu)
    lines += [
        f"  registered           {logged.model_uri} (SHA-256 {conversion.sha256[:16]}...)",
        *([f"                       {logged.edgetpu_model_uri}"] if logged.edgetpu_model_uri else []),
        f"  run                  {run_id}: layer_errors.csv, architecture.json",
        f"Next: {benchmark_command(served, kind, target)}",
    ]
    return "\n".join(lines)


def _edgetpu_lines(edgetpu: EdgeTpuResult) -> list[str]:
    from foxnas_mlflow.tflite import INSTALL_HINT

    readiness, report = edgetpu.readiness, edgetpu.report
    state = "ready" if readiness.ready else "not ready"
    lines = [
        f"  Edge TPU             {state}: {readiness.n_mappable} of {readiness.n_operators} operators can be mapped, "
        f"{readiness.parameter_bytes / 2**20:.2f} of {readiness.cache_bytes / 2**20:.2f} MiB on-chip memory"
    ]
    lines += [f"    {issue.layer} ({issue.operator}): {issue.reason}" for issue in readiness.issues[:_NAMED_LAYERS]]
    if len(readiness.issues) > _NAMED_LAYERS:
        lines.append(f"    and {len(readiness.issues) - _NAMED_LAYERS} more in edgetpu_readiness.json")
    if report is None:
        lines.append(f"  compiler             none, so that no -edgetpu version is registered: {INSTALL_HINT}")
        return lines
    lines.append(
        f"  compiler {report.version}: {report.n_mapped} of {report.n_operations} operators mapped, "
        f"{report.on_chip_used_bytes / 2**20:.2f} MiB on the chip, {report.off_chip_bytes / 2**20:.2f} MiB streamed"
    )
    lines += [f"    {row.count} {row.operator}: {row.status}" for row in report.unmapped[:_NAMED_LAYERS]]
    return lines


WORKFLOW = Workflow(
    "quantize",
    "Convert a trained subnet to int8 TensorFlow Lite, evaluate and register it.",
    QuantizeRequest,
    run_quantize,
)
