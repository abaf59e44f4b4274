"""Whatever TensorFlow Lite file people have is measured, or refused in one line."""

from __future__ import annotations

import dataclasses
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import DeviceError, FoxNasError, MissingDependencyError
from foxnas_mlflow.devices import Connection, check, connect, host_answer, measure
from foxnas_mlflow.devices._benchmark import output_difference
from foxnas_mlflow.tflite import read_tflite

QUICK: dict[str, Any] = {"runs": 3, "warmup": 1, "min_seconds": 0.0, "max_seconds": 0.05, "attempts": 1}


@pytest.fixture(scope="module")
def here() -> Iterator[Connection]:
    with connect("local") as connection:
        yield connection


@pytest.fixture(scope="module")
def models() -> dict[str, bytes]:
    tf = pytest.importorskip("tensorflow")
    layers = tf.keras.layers
    image = layers.Input((8, 8, 3), batch_size=1)
    network = tf.keras.Model(image, layers.Dense(4)(layers.GlobalAveragePooling2D()(layers.Conv2D(4, 3)(image))))
    left, right = layers.Input((4,), batch_size=1), layers.Input((4,), batch_size=1)
    both = tf.keras.Model([left, right], layers.Dense(3)(layers.Subtract()([left, right])))

    @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.float32)])
    def loop(x):  # type: ignore[no-untyped-def]
        return tf.while_loop(lambda i, y: i < 3, lambda i, y: (i + 1, y * 2.0 + 1.0), (tf.constant(0), x))[1]

    @tf.function(input_signature=[tf.TensorSpec((1, 4), tf.int32)])
    def embed(indices):  # type: ignore[no-untyped-def]
        return tf.gather(tf.reshape(tf.range(6.0), (2, 3)), indices)

    samples = [np.random.default_rng(0).normal(size=(1, 8, 8, 3)).astype(np.float32) for _ in range(4)]

    def convert(model: Any, *, quantized: str = "") -> bytes:
        call = tf.function(lambda *inputs: model(list(inputs) if len(inputs) > 1 else inputs[0]))
        graph = call.get_concrete_function(*(tf.TensorSpec(i.shape, i.dtype) for i in model.inputs))
        converter = tf.lite.TFLiteConverter.from_concrete_functions([graph])
        if quantized:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
        if quantized in ("int8", "int16"):
            converter.representative_dataset = lambda: ([x] for x in samples)
        sets = tf.lite.OpsSet
        if quantized == "int8":
            converter.target_spec.supported_ops = [sets.TFLITE_BUILTINS_INT8]
        if quantized == "int16":
            converter.target_spec.supported_ops = [sets.EXPERIMENTAL_TFLITE_BUILTINS_ACTIVATIONS_INT16_WEIGHTS_INT8]
            converter.inference_input_type = converter.inference_output_type = tf.int16
        with warnings.catch_warnings():
            # TensorFlow 2.21 says so of every int8 model with float inputs.
            warnings.filterwarnings("ignore", message="Statistics for quantized inputs")
            return bytes(converter.convert())

    def of_function(function: Any) -> bytes:
        concrete = function.get_concrete_function()
        return bytes(tf.lite.TFLiteConverter.from_concrete_functions([concrete]).convert())

    @tf.function(input_signature=[tf.TensorSpec((15600,), tf.float32)])
    def sound(samples):  # type: ignore[no-untyped-def]
        return tf.reduce_max(samples, keepdims=True)

    return {
        "sound": of_function(sound),
        "float": convert(network),
        "dynamic range": convert(network, quantized="dynamic"),
        "int8 with float input": convert(network, quantized="int8"),
        "int16": convert(network, quantized="int16"),
        "two inputs": convert(both),
        "subgraphs": of_function(loop),
        "indices": of_function(embed),
    }


@pytest.mark.tflite
@pytest.mark.slow
def test_every_kind_is_measured_and_compared(models: dict[str, bytes], here: Connection) -> None:
    for kind, data in models.items():
        expected = host_answer(data)
        assert expected is not None, kind
        benchmark = measure(here, data, expected=expected, **QUICK)
        assert benchmark.n_runs >= 3, kind
        assert benchmark.output_difference == 0, kind
        # The first axis of one sound is no batch.
        assert benchmark.batch == 1, kind
    answer = host_answer(models["two inputs"])
    assert answer is not None
    # Both inputs are filled, and not alike: else their difference would be nothing.
    assert np.ptp(answer[0]) > 0


def edited(data: bytes, **changes: Any) -> bytes:
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    from foxnas_mlflow.tflite._model import pack

    model = schema.ModelT.InitFromPackedBuf(data, 0)
    if "inputs" in changes:
        model.subgraphs[0].inputs = changes["inputs"]
    if "custom" in changes:
        code = model.operatorCodes[0]
        code.builtinCode, code.deprecatedBuiltinCode = schema.BuiltinOperator.CUSTOM, schema.BuiltinOperator.CUSTOM
        code.customCode = changes["custom"]
    return pack(model)


def text_model() -> bytes:
    """A model that gives texts another shape."""
    schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
    from foxnas_mlflow.tflite._model import pack

    code, operator, graph, model = schema.OperatorCodeT(), schema.OperatorT(), schema.SubGraphT(), schema.ModelT()
    code.builtinCode = code.deprecatedBuiltinCode = schema.BuiltinOperator.RESHAPE
    code.version = 1
    for shape in ((2, 2), (4,)):
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer, tensor.name = shape, schema.TensorType.STRING, 0, "text"
        graph.tensors = [*(graph.tensors or []), tensor]
    operator.opcodeIndex, operator.inputs, operator.outputs = 0, [0], [1]
    operator.builtinOptionsType, operator.builtinOptions = (
        schema.BuiltinOptions.ReshapeOptions,
        schema.ReshapeOptionsT(),
    )
    operator.builtinOptions.newShape = [4]
    graph.operators, graph.inputs, graph.outputs = [operator], [0], [1]
    model.version, model.operatorCodes, model.subgraphs, model.buffers = 3, [code], [graph], [schema.BufferT()]
    return pack(model)


def test_a_model_of_text_is_measured_and_not_compared(here: Connection) -> None:
    data = text_model()
    benchmark = measure(here, data, expected=host_answer(data), **QUICK)
    assert benchmark.n_runs >= 3
    assert benchmark.output_difference is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"custom": "MyOperator"}, "must know all operators.*MyOperator.*own operators alone"),
        ({"custom": "FlexAddV2"}, "no operators of TensorFlow itself"),
        ({"inputs": []}, "must have inputs, of numbers or text; received 0 inputs"),
    ],
)
def test_what_cannot_run_is_told_with_what_helps(
    changes: dict[str, Any], message: str, probe: bytes, here: Connection
) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        measure(here, edited(probe, **changes), **QUICK)
    assert "\n" not in str(caught.value)


def test_damaged_files_are_one_line(probe: bytes, here: Connection, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    outcomes = set()
    for i in range(12):
        damaged = bytearray(probe)
        if i % 3 == 0:
            damaged = damaged[: int(rng.integers(8, len(damaged)))]
        else:
            # Near the end are the tables, in front the weights.
            low = 8 if i % 3 == 1 else len(damaged) - 3000
            for place in rng.integers(low, len(damaged), 1 + i):
                damaged[place] = rng.integers(256)
        try:
            measure(here, bytes(damaged), **QUICK)
            outcomes.add("measured")
        except FoxNasError as error:
            outcomes.add("refused" if "\n" not in str(error) and "Traceback" not in str(error) else str(error))
    assert outcomes <= {"measured", "refused"}
    assert "refused" in outcomes
    with pytest.raises(FoxNasError, match=r"able to load the model|must be a TensorFlow Lite file"):
        measure(here, probe[: len(probe) // 10], **QUICK)


@pytest.mark.parametrize(
    ("got", "expected", "levels"),
    [
        (np.int8([1, 2]), np.int8([1, 4]), 2.0),
        (np.int16([0, 512]), np.int16([0, 0]), 2.0),
        (np.float32([1.0, 2000.0]), np.float32([1.0, 2002.0]), 2000 / 2002 * 1e3 * 2 / 2000),
        (np.float32([0.1]), np.float32([0.102]), 2.0),
        (np.float32([np.nan, np.inf]), np.float32([np.nan, np.inf]), 0.0),
        (np.float32([np.nan]), np.float32([1.0]), float("inf")),
        (np.float32([1.0]), np.int8([1]), float("inf")),
        (np.float32([1.0]), np.float32([1.0, 2.0]), float("inf")),
    ],
)
def test_differences_between_outputs(got: np.ndarray, expected: np.ndarray, levels: float) -> None:
    assert output_difference([got], [expected]) == pytest.approx(levels, rel=1e-3)
    assert output_difference([got], []) == float("inf")


def test_runs_mean_what_they_say(probe: bytes, here: Connection) -> None:
    many = measure(here, probe, runs=20_000, warmup=1, max_seconds=0.0, attempts=1)
    assert many.n_runs == len(many.samples_ms) == many.asked_runs == 20_000
    few = measure(here, probe, runs=10**7, warmup=1, max_seconds=0.1, attempts=1)
    assert 20 <= few.n_runs < few.asked_runs == 10**7


def test_measuring_needs_no_schema(probe: bytes, here: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with tflite-runtime alone has none."""
    monkeypatch.setitem(sys.modules, "ai_edge_litert.schema_py_generated", None)
    with pytest.raises(MissingDependencyError):
        read_tflite(probe)
    benchmark = measure(here, probe, expected=host_answer(probe), **QUICK)
    assert benchmark.output_difference == 0
    assert check(here).ready


def test_figures_under_a_load_that_lasts(probe: bytes, here: Connection) -> None:
    benchmark = measure(here, probe, sustained_seconds=1.0, **QUICK)
    assert benchmark.windows
    assert 1.0 <= benchmark.sustained_seconds < 10.0
    assert sum(int(window["n_runs"] or 0) for window in benchmark.windows) > 0
    for window in benchmark.windows:
        assert set(window) == {"second", "seconds", "n_runs", "p50_ms", "p90_ms", "temperature_c", "frequency_mhz"}
        assert (window["p50_ms"] or 0) <= (window["p90_ms"] or 0)
    assert benchmark.metrics()["benchmark/sustained_p90_ms"] == benchmark.sustained_p90_ms
    assert type(benchmark).from_dict(benchmark.to_dict()) == benchmark
    # A file of format 1, which knew no sustained load.
    plain = dataclasses.replace(benchmark, windows=(), sustained_p90_ms=None, asked_runs=benchmark.n_runs)
    later = ("asked_runs", "frequency_mhz_start", "frequency_mhz_end", "quota", "windows", "sustained_p90_ms")
    later += ("energy_mj", "energy_error_mj", "idle_w", "load_w", "power_meter", "throttled_under_load")
    old = {key: value for key, value in plain.to_dict().items() if key not in later}
    assert type(benchmark).from_dict({**old, "format": 1}).n_runs == benchmark.n_runs
    # Of format 2, which knew no throttling under load.
    old = {key: value for key, value in benchmark.to_dict().items() if key != "throttled_under_load"}
    assert type(benchmark).from_dict({**old, "format": 2}).windows == benchmark.windows


def test_throttling_under_load_is_told_and_spoils_no_runs_before(
    probe: bytes, here: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A Pi whose soft temperature limit comes under load: asked before and after the timed runs, twice, and at the end.
    stub = tmp_path / "vcgencmd"
    stub.write_text(
        f"#!/bin/sh\necho x >> {tmp_path}/asked\n"
        f"if [ $(wc -l < {tmp_path}/asked) -lt 5 ]; then echo throttled=0x0; else echo throttled=0x80008; fi\n"
    )
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    benchmark = measure(here, probe, sustained_seconds=0.2, **QUICK)
    assert (benchmark.throttled, benchmark.throttled_under_load) == (False, True)
    assert not any("throttled" in reason for reason in benchmark.invalid_reasons)
    assert benchmark.metrics()["benchmark/throttled_under_load"] == 1
