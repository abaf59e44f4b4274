"""What is inside a TensorFlow Lite file: operators, tensors, versions, metadata.

Read with the schema that ships with LiteRT; neither TensorFlow nor an interpreter is needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, import_or_raise

METADATA_NAME = "foxnas_mlflow"
"""Name of our entry among the file's metadata."""

METADATA_FORMAT = 1
MAX_FILE_BYTES = 2**31 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor of a TensorFlow Lite file.

    Attributes:
        name: Its name.
        shape: Its shape; the batch first.
        type: ``int8``, ``uint8``, ``int32``, ``float32``, ...
        scale, zero_point: Quantization parameters, one or one per channel; empty if not quantized.
        constant: Whether the file holds its values.
        dynamic: Whether a dimension is left open.
        size_bytes: Bytes of its values in the file.
    """

    name: str
    shape: tuple[int, ...]
    type: str
    scale: tuple[float, ...]
    zero_point: tuple[int, ...]
    constant: bool
    dynamic: bool
    size_bytes: int


@dataclass(frozen=True, slots=True)
class OperatorInfo:
    """An operator of a TensorFlow Lite file.

    Attributes:
        kind: Builtin operator, for example ``CONV_2D``, or the name of a custom one.
        version: Version of the operator.
        inputs, outputs: Indices of tensors; -1 for an optional input that is absent.
        options: The operator's options by name.
    """

    kind: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TfliteFile:
    """The content of a TensorFlow Lite file.

    Attributes:
        data: The file.
        operators: Operators of the only subgraph in the order in which they run.
        tensors: Its tensors.
        inputs, outputs: Indices of its inputs and outputs.
        min_runtime_version: Oldest TensorFlow Lite runtime that knows all operator versions, or empty.
        metadata: Ours: labels, normalisation, architecture, provenance; empty if the file has none.
    """

    data: bytes = field(repr=False)
    operators: tuple[OperatorInfo, ...]
    tensors: tuple[TensorInfo, ...] = field(repr=False)
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    min_runtime_version: str
    metadata: Mapping[str, Any]

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.data).hexdigest()

    @property
    def input(self) -> TensorInfo:
        """The first input."""
        return self.tensors[self.inputs[0]]

    @property
    def output(self) -> TensorInfo:
        """The first output."""
        return self.tensors[self.outputs[0]]

    @property
    def operator_counts(self) -> dict[str, int]:
        """How often each operator occurs."""
        counts: dict[str, int] = {}
        for operator in self.operators:
            counts[operator.kind] = counts.get(operator.kind, 0) + 1
        return counts

    @property
    def structure(self) -> list[tuple[Any, ...]]:
        """What decides the speed: operators, versions, options, and tensors but for their names and values."""
        rows: list[tuple[Any, ...]] = []
        for operator in self.operators:
            tensors = [self.tensors[i] for i in (*operator.inputs, *operator.outputs)]
            # Internal to TensorFlow's converter; a runtime does not read it.
            options = sorted((key, value) for key, value in operator.options.items() if key != "quantSpec")
            kinds = [(t.type, t.shape, t.constant, len(t.scale), t.dynamic) for t in tensors]
            rows.append((operator.kind, operator.version, options, kinds))
        return rows

    @property
    def parameter_bytes(self) -> int:
        """Bytes of all constants that operators read."""
        used = {i for operator in self.operators for i in operator.inputs if i >= 0}
        return sum(self.tensors[i].size_bytes for i in used)


def read_tflite(source: bytes | str | Path) -> TfliteFile:
    """Read a TensorFlow Lite file.

    Args:
        source: Path of a file, or its bytes.

    Raises:
        InvalidInputError: If the file cannot be read.
        InvalidFormatError: If it is not a TensorFlow Lite file, is damaged, or has several subgraphs.
    """
    if isinstance(source, bytes):
        data, shown = source, f"{len(source)} bytes"
    else:
        shown = str(source)
        try:
            if Path(source).stat().st_size > MAX_FILE_BYTES:
                raise InvalidFormatError("a TensorFlow Lite file has less than 2 GiB", received=shown)
            data = Path(source).read_bytes()
        except OSError as error:
            raise InvalidInputError(f"the model must be a readable file ({error.strerror})", received=shown) from error
    if data[4:8] != b"TFL3":
        raise InvalidFormatError(
            "the model must be a TensorFlow Lite file (identifier 'TFL3')",
            received=shown,
            remedy="convert the subnet with: foxnas quantize",
        )
    schema = _schema()
    try:
        model = schema.ModelT.InitFromPackedBuf(data, 0)
        return _summary(schema, model, data)
    except InvalidFormatError:
        raise
    except Exception as error:  # the generated reader raises struct, index, type and memory errors alike
        raise InvalidFormatError("the TensorFlow Lite file must not be damaged or cut", received=shown) from error


def with_metadata(data: bytes, metadata: Mapping[str, Any]) -> bytes:
    """The same model with our metadata, as JSON, in the file; earlier metadata of ours is replaced."""
    schema = _schema()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    payload = json.dumps({"format": METADATA_FORMAT, **metadata}, sort_keys=True).encode("utf-8")
    set_metadata(schema, model, METADATA_NAME, payload)
    return pack(model)


def with_signature(data: bytes, input_name: str) -> bytes:
    """The same model with the signature that TensorFlow gives a SavedModel: one input, and ``output_0``."""
    schema = _schema()
    model = schema.ModelT.InitFromPackedBuf(data, 0)
    (graph,) = model.subgraphs
    signature = schema.SignatureDefT()
    signature.signatureKey = "serving_default"
    signature.inputs, signature.outputs = [], []
    for maps, name, index in (
        (signature.inputs, input_name, graph.inputs[0]),
        (signature.outputs, "output_0", graph.outputs[0]),
    ):
        entry = schema.TensorMapT()
        entry.name, entry.tensorIndex = name, int(index)
        maps.append(entry)
    model.signatureDefs = [signature]
    return pack(model)


def set_metadata(schema: Any, model: Any, name: str, payload: bytes) -> None:
    """Set one entry of a model's metadata (object API)."""
    content = schema.BufferT()
    content.data = np.frombuffer(payload, dtype=np.uint8)
    model.metadata = model.metadata or []
    for entry in model.metadata:
        if _text(entry.name) == name:
            model.buffers[entry.buffer] = content
            return
    entry = schema.MetadataT()
    entry.name = name
    entry.buffer = len(model.buffers)
    model.buffers.append(content)
    model.metadata.append(entry)


def pack(model: Any) -> bytes:
    """Serialise a model (object API)."""
    flatbuffers = import_or_raise("flatbuffers", extra="device", feature="writing TensorFlow Lite files")
    size = sum(0 if buffer.data is None else len(buffer.data) for buffer in model.buffers)
    builder = flatbuffers.Builder(size + 2**16)
    builder.Finish(model.Pack(builder), b"TFL3")
    return bytes(builder.Output())


def _schema() -> Any:
    return import_or_raise(
        "ai_edge_litert.schema_py_generated", extra="device", feature="reading and writing TensorFlow Lite files"
    )


def _enum_names(enum: Any) -> dict[int, str]:
    return {value: name for name, value in vars(enum).items() if isinstance(value, int)}


def _summary(schema: Any, model: Any, data: bytes) -> TfliteFile:
    if len(model.subgraphs) != 1:
        raise InvalidFormatError("the model must have one subgraph", received=len(model.subgraphs))
    graph = model.subgraphs[0]
    types = _enum_names(schema.TensorType)
    kinds = _enum_names(schema.BuiltinOperator)
    tensors = []
    for tensor in graph.tensors:
        content = model.buffers[tensor.buffer].data
        quantization = tensor.quantization
        scale = () if quantization is None or quantization.scale is None else quantization.scale
        zero_point = () if quantization is None or quantization.zeroPoint is None else quantization.zeroPoint
        signature = tensor.shapeSignature
        tensors.append(
            TensorInfo(
                name=_text(tensor.name),
                shape=() if tensor.shape is None else tuple(int(n) for n in tensor.shape),
                type=types[tensor.type].lower(),
                scale=tuple(float(s) for s in scale),
                zero_point=tuple(int(z) for z in zero_point),
                constant=content is not None and len(content) > 0,
                dynamic=signature is not None and any(int(n) < 0 for n in signature),
                size_bytes=0 if content is None else len(content),
            )
        )
    operators = []
    for operator in graph.operators:
        code = model.operatorCodes[operator.opcodeIndex]
        kind = kinds[max(code.builtinCode, code.deprecatedBuiltinCode)]
        operators.append(
            OperatorInfo(
                kind=_text(code.customCode) if kind == "CUSTOM" else kind,
                version=int(code.version),
                inputs=tuple(int(i) for i in operator.inputs),
                outputs=tuple(int(i) for i in operator.outputs),
                options={} if operator.builtinOptions is None else dict(vars(operator.builtinOptions)),
            )
        )
    entries = {_text(entry.name): model.buffers[entry.buffer].data for entry in model.metadata or []}
    return TfliteFile(
        data=data,
        operators=tuple(operators),
        tensors=tuple(tensors),
        inputs=tuple(int(i) for i in graph.inputs),
        outputs=tuple(int(i) for i in graph.outputs),
        min_runtime_version=_bytes(entries.get("min_runtime_version")).rstrip(b"\0").decode("ascii"),
        metadata=_metadata(_bytes(entries.get(METADATA_NAME))),
    )


def _metadata(payload: bytes) -> dict[str, Any]:
    if not payload:
        return {}
    metadata = json.loads(payload)
    if metadata.pop("format") != METADATA_FORMAT:
        raise InvalidFormatError(
            f"the model's metadata must have format {METADATA_FORMAT}", remedy="read it with a newer foxnas-mlflow"
        )
    return dict(metadata)


def _bytes(content: NDArray[np.uint8] | list[int] | None) -> bytes:
    return b"" if content is None else bytes(bytearray(content))


def _text(name: bytes | str | None) -> str:
    return name.decode("utf-8") if isinstance(name, bytes) else name or ""
