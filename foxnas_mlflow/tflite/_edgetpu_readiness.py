"""What the Edge TPU compiler will refuse, known before any compiler is at hand.

The rules are those of Coral's page "TensorFlow models on the Edge TPU" (supported operators, tensor
ranks, operator constraints), and the operator versions that the last compiler, 16.0, knows.
Without the flag for several subgraphs the compiler maps a prefix of the network: the first operator
that it refuses, and everything after it, runs on the processor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from foxnas_mlflow.core.edgetpu import CACHE_BYTES
from foxnas_mlflow.tflite._checks import MAX_OPERATOR_VERSIONS
from foxnas_mlflow.tflite._model import OperatorInfo, TfliteFile

EDGETPU_OPERATORS = frozenset(
    {
        "ADD",
        "AVERAGE_POOL_2D",
        "CONCATENATION",
        "CONV_2D",
        "DEPTHWISE_CONV_2D",
        "EXPAND_DIMS",
        "FULLY_CONNECTED",
        "L2_NORMALIZATION",
        "LOGISTIC",
        "LSTM",
        "MAXIMUM",
        "MAX_POOL_2D",
        "MEAN",
        "MINIMUM",
        "MUL",
        "PACK",
        "PAD",
        "PRELU",
        "QUANTIZE",
        "REDUCE_MAX",
        "REDUCE_MIN",
        "RELU",
        "RELU6",
        "RELU_N1_TO_1",
        "RESHAPE",
        "RESIZE_BILINEAR",
        "RESIZE_NEAREST_NEIGHBOR",
        "RSQRT",
        "SLICE",
        "SOFTMAX",
        "SPACE_TO_DEPTH",
        "SPLIT",
        "SQUARED_DIFFERENCE",
        "SQUEEZE",
        "STRIDED_SLICE",
        "SUB",
        "SUM",
        "TANH",
        "TRANSPOSE",
        "TRANSPOSE_CONV",
    }
)
"""Operators that the compiler maps."""

_MAX_SOFTMAX = 16_000


@dataclass(frozen=True, slots=True)
class ReadinessIssue:
    """One operator that will not run on the Edge TPU, or not at full speed.

    Attributes:
        layer: Name of the tensor that the operator writes.
        operator: Its kind.
        reason: What is wrong.
        blocking: Whether it runs on the processor; otherwise it is only slower.
    """

    layer: str
    operator: str
    reason: str
    blocking: bool = True


@dataclass(frozen=True, slots=True)
class Readiness:
    """Whether a file is fit for the Edge TPU compiler.

    Attributes:
        issues: What is not, in the order of the operators.
        n_operators: Operators of the file.
        n_mappable: Operators before the first blocking issue.
        parameter_bytes: Bytes of all weights.
        cache_bytes: On-chip memory for weights.
    """

    issues: tuple[ReadinessIssue, ...]
    n_operators: int
    n_mappable: int
    parameter_bytes: int
    cache_bytes: int = CACHE_BYTES

    @property
    def ready(self) -> bool:
        """Whether every operator can run on the Edge TPU."""
        return self.n_mappable == self.n_operators

    @property
    def metrics(self) -> dict[str, float]:
        """The figures, by the names of MLflow's metrics."""
        return {
            "edgetpu/ready": float(self.ready),
            "edgetpu/operators_mappable": self.n_mappable,
            "edgetpu/parameter_bytes": self.parameter_bytes,
        }

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this report."""
        return {
            "ready": self.ready,
            "n_operators": self.n_operators,
            "n_mappable": self.n_mappable,
            "parameter_bytes": self.parameter_bytes,
            "cache_bytes": self.cache_bytes,
            "issues": [
                {"layer": i.layer, "operator": i.operator, "reason": i.reason, "blocking": i.blocking}
                for i in self.issues
            ],
        }


def edgetpu_readiness(model: TfliteFile) -> Readiness:
    """Check a file against everything that is known of the compiler.

    Args:
        model: Any TensorFlow Lite file, not only ours.
    """
    issues: list[ReadinessIssue] = []
    n_mappable = len(model.operators)
    cached, full = 0, False
    counted: set[int] = set()
    for position, operator in enumerate(model.operators):
        layer = _name(model, operator)
        for reason in _refusals(model, operator):
            issues.append(ReadinessIssue(layer, operator.kind, reason))
            n_mappable = min(n_mappable, position)
        for i in operator.inputs:
            if i >= 0 and i not in counted:
                counted.add(i)
                cached += model.tensors[i].size_bytes
        if cached > CACHE_BYTES and not full:
            full = True
            reason = (
                f"the weights up to here take {cached / 2**20:.2f} MiB, more than the {CACHE_BYTES / 2**20:.2f} MiB "
                "on the chip: from here on they are streamed in every inference"
            )
            issues.append(ReadinessIssue(layer, operator.kind, reason, blocking=False))
    return Readiness(tuple(issues), len(model.operators), n_mappable, model.parameter_bytes)


def _refusals(model: TfliteFile, operator: OperatorInfo) -> Iterator[str]:
    """Reasons for which an operator is not mapped."""
    if operator.kind not in EDGETPU_OPERATORS:
        yield "the operator is not supported"
        return
    limit = MAX_OPERATOR_VERSIONS["edgetpu"].get(operator.kind, 1)
    if operator.version > limit:
        yield f"version {operator.version} of the operator is newer than the compiler's, {limit}"
    for i in (*operator.inputs, *operator.outputs):
        if i < 0:
            continue
        tensor = model.tensors[i]
        if tensor.type not in ("int8", "uint8") and not (tensor.type == "int32" and tensor.constant):
            yield f"{tensor.name or 'a tensor'} is {tensor.type}, not quantized to 8 bits"
        if tensor.dynamic:
            yield f"{tensor.name or 'a tensor'} has a size that is not fixed"
        if not tensor.constant and any(n > 1 for n in tensor.shape[:-3]):
            yield f"a tensor of shape {list(tensor.shape)} has more than three dimensions above 1"
    yield from _constraints(model, operator)


def _constraints(model: TfliteFile, operator: OperatorInfo) -> Iterator[str]:
    """The constraints of single operators."""
    options = operator.options
    source = model.tensors[operator.inputs[0]]
    result = model.tensors[operator.outputs[0]]
    weights = model.tensors[operator.inputs[1]] if len(operator.inputs) > 1 and operator.inputs[1] >= 0 else None
    if operator.kind in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED") and weights is not None:
        if not weights.constant:
            yield "weights must be constants"
        dilation = options.get("dilationHFactor", 1), options.get("dilationWFactor", 1)
        if operator.kind == "DEPTHWISE_CONV_2D" and dilation != (1, 1):
            yield f"a dilated depthwise convolution {dilation} is not supported"
        if operator.kind == "CONV_2D" and dilation[0] != dilation[1]:
            yield f"a convolution must have one dilation for both axes, not {dilation}"
        if operator.kind == "FULLY_CONNECTED":
            if len(weights.scale) > 1:
                yield f"dense weights must have one scale, not one for each of {len(weights.scale)} outputs"
            if options.get("weightsFormat", 0) != 0:
                yield "dense weights must have the default format"
            if any(n > 1 for n in result.shape[:-1]):
                yield f"the output must have one dimension, not {list(result.shape)}"
    elif operator.kind in ("MEAN", "SUM", "REDUCE_MAX", "REDUCE_MIN"):
        if source.shape[0] != 1:
            yield "a reduction over the batch is not supported"
        over_channels = source.shape[-1:] != result.shape[-1:]
        if over_channels and source.shape[-1] % 4:
            yield f"a reduction over channels needs a multiple of 4 of them, not {source.shape[-1]}"
    elif operator.kind == "SOFTMAX" and source.shape[-1] > _MAX_SOFTMAX:
        yield f"a softmax has at most {_MAX_SOFTMAX} elements, not {source.shape[-1]}"


def _name(model: TfliteFile, operator: OperatorInfo) -> str:
    """The first of the names that TensorFlow joins for an operator, without its model's prefix."""
    name = model.tensors[operator.outputs[0]].name.split(";")[0]
    return name.removeprefix("functional_1/").removeprefix("functional/")
