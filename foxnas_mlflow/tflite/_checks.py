"""Checks that every int8 file must pass before anyone gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from foxnas_mlflow.core.errors import ConversionError, InvalidInputError
from foxnas_mlflow.core.targets import Int8Runtime
from foxnas_mlflow.tflite._graph import Operator
from foxnas_mlflow.tflite._model import OperatorInfo, TfliteFile

MAX_OPERATOR_VERSIONS: Mapping[str, Mapping[str, int]] = {
    # Seen to pass the Edge TPU compiler 16.0; higher ones are refused by it.
    "edgetpu": {
        "CONV_2D": 3,
        "DEPTHWISE_CONV_2D": 3,
        "ADD": 2,
        "MEAN": 2,
        "MUL": 2,
        "FULLY_CONNECTED": 4,
        "QUANTIZE": 2,
    },
    # Known to tflite-runtime 2.5 and everything later.
    "litert": {
        "CONV_2D": 5,
        "DEPTHWISE_CONV_2D": 6,
        "ADD": 3,
        "MEAN": 2,
        "MUL": 4,
        "FULLY_CONNECTED": 9,
        "QUANTIZE": 2,
    },
}
"""Highest operator versions that a runtime knows, for the operators that our networks use."""


def check_int8(model: TfliteFile, operators: Sequence[Operator], runtime: Int8Runtime = "litert") -> None:
    """Check that a converted file is the network that was meant, in integers only.

    Args:
        model: The file.
        operators: What `lower` says the network is.
        runtime: What will run it.

    Raises:
        ConversionError: With the first rule that is broken and where.
    """
    if len(model.inputs) != 1 or len(model.outputs) != 1:
        raise ConversionError("the model must have one input and one output", received=str(model.operator_counts))
    for tensor in (model.input, model.output):
        if tensor.type not in ("int8", "uint8") or tensor.shape[0] != 1 or tensor.dynamic:
            raise ConversionError(
                "the model's input and output must be 8-bit with a fixed batch of 1",
                received=f"{tensor.name}: {tensor.type} {list(tensor.shape)}{' (dynamic)' if tensor.dynamic else ''}",
            )
    for entry in model.operators:
        for index in (*entry.inputs, *entry.outputs):
            if index >= 0 and model.tensors[index].type not in ("int8", "uint8", "int32"):
                tensor = model.tensors[index]
                raise ConversionError(
                    "the model must have only integer tensors", received=f"{tensor.name} of {entry.kind}: {tensor.type}"
                )
    body = body_operators(model)
    received, expected = [entry.kind for entry in body], [operator.kind for operator in operators]
    for position, (got, want) in enumerate(zip(received, expected, strict=False)):
        if got != want:
            raise ConversionError(
                f"operator {position} must be {want} ({operators[position].name}), as in the layer description",
                received=got,
            )
    if len(received) != len(expected):
        raise ConversionError(
            f"the model must have {len(expected)} operators, as in the layer description", received=len(received)
        )
    limits = MAX_OPERATOR_VERSIONS[runtime]
    for entry in model.operators:
        if entry.version > limits.get(entry.kind, 1):
            raise ConversionError(
                f"{entry.kind} must have at most version {limits.get(entry.kind, 1)} for the runtime {runtime}",
                received=f"version {entry.version}",
            )
    for entry, operator in zip(body, operators, strict=True):
        _check_operator(model, entry.inputs, entry.outputs, operator, runtime)


def check_classifier(model: TfliteFile) -> None:
    """Check that a file, whoever made it, is an 8-bit classifier whose labels fit its output.

    Raises:
        InvalidInputError: With the rule that is broken.
    """
    for tensor in (model.input, model.output):
        if tensor.type not in ("int8", "uint8"):
            raise InvalidInputError(
                "the model must be quantized to 8 bits",
                received=f"{tensor.name}: {tensor.type}",
                remedy="convert the subnet with: foxnas quantize",
            )
    labels, n_classes = model.metadata.get("labels"), model.output.shape[-1]
    if labels and len(labels) != n_classes:
        raise InvalidInputError(
            f"the model must have one label for each of {n_classes} outputs", received=f"{len(labels)} labels"
        )


def body_operators(model: TfliteFile) -> list[OperatorInfo]:
    """The file's operators that correspond one to one to those of `lower`.

    Left out are the one QUANTIZE that turns a uint8 image into int8, at the very start, and the
    RESHAPE from (1, 1, 1, c) to (c,) that TensorFlow puts before an ADD of single pixels; it moves
    no data. Anything else that is not in the layer description stays, to be refused.
    """
    body = list(model.operators)
    if model.input.type == "uint8" and body and body[0].kind == "QUANTIZE":
        body = body[1:]
    return [
        entry
        for entry in body
        if not (entry.kind == "RESHAPE" and model.tensors[entry.inputs[0]].shape[:3] == (1, 1, 1))
    ]


def _check_operator(
    model: TfliteFile, inputs: tuple[int, ...], outputs: tuple[int, ...], operator: Operator, runtime: Int8Runtime
) -> None:
    shape = model.tensors[outputs[0]].shape
    if shape != (1, *operator.out_shape):
        raise ConversionError(f"{operator.name} must have the output shape {(1, *operator.out_shape)}", received=shape)
    if not operator.weight:
        return
    weights = model.tensors[inputs[1]]
    if weights.shape != operator.kernel_shape:
        raise ConversionError(
            f"{operator.name} must have weights of shape {operator.kernel_shape}", received=weights.shape
        )
    if operator.kind == "FULLY_CONNECTED":
        if runtime == "edgetpu" and len(weights.scale) != 1:
            raise ConversionError(
                "the classifier's weights must have one scale for the Edge TPU compiler", received=len(weights.scale)
            )
    elif len(weights.scale) != operator.out_channels:
        raise ConversionError(f"{operator.name} must have one scale a channel", received=len(weights.scale))
