from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import ConversionError, FoxNasError, InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.data import Evaluation
from foxnas_mlflow.runtime import open_interpreter
from foxnas_mlflow.tflite import (
    Conversion,
    Int8Model,
    QuantizationLoss,
    check_int8,
    convert,
    edgetpu_readiness,
    fold_weights,
    layer_errors,
    lower,
    random_weights,
    read_tflite,
    reference_forward,
    write_probe,
)
from foxnas_mlflow.tflite._keras import build_keras
from foxnas_mlflow.tflite._model import with_metadata

from .conftest import NORMALIZATION, SMALL_CPU, SMALL_TPU, sample_images, sample_network

pytestmark = pytest.mark.tflite

ARCHITECTURE = SMALL_CPU.uniform(32, depth=2, expansion=3, kernel=5)
NETWORK = build_network(SMALL_CPU, ARCHITECTURE)
LABELS = [f"class {i}" for i in range(10)]


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return random_weights(NETWORK, np.random.default_rng(0))


@pytest.fixture(scope="module")
def conversion(weights: dict[str, np.ndarray]) -> Conversion:
    return convert(
        NETWORK,
        weights,
        sample_images(32, 32),
        normalization=NORMALIZATION,
        labels=LABELS,
        architecture=ARCHITECTURE,
        provenance={"run_id": "abc"},
    )


def float_logits(weights: dict[str, np.ndarray], images: np.ndarray) -> np.ndarray:
    operators = lower(NETWORK)
    folded = fold_weights(operators, weights)
    return reference_forward(operators, folded, NORMALIZATION(images))[operators[-1].name]


def test_conversion_keeps_the_function(conversion: Conversion, weights: dict[str, np.ndarray]) -> None:
    assert conversion.parity_error < 1e-4
    images = sample_images(16, 32, seed=1)
    exact = float_logits(weights, images)
    got = Int8Model(conversion.data).logits(images)
    assert exact.std() > 0.1
    assert np.sqrt(np.mean((got - exact) ** 2)) < 0.1 * exact.std()
    assert np.mean(got.argmax(axis=1) == exact.argmax(axis=1)) >= 0.75


def test_it_runs_by_its_signature_too(conversion: Conversion) -> None:
    interpreter = open_interpreter(conversion.data)
    assert interpreter.get_signature_list() == {"serving_default": {"inputs": ["input"], "outputs": ["output_0"]}}
    image = np.random.default_rng(0).integers(-128, 128, (1, 32, 32, 3), dtype=np.int8)
    by_name = interpreter.get_signature_runner()(input=image)["output_0"]
    interpreter = open_interpreter(conversion.data)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], image)
    interpreter.invoke()
    np.testing.assert_array_equal(by_name, interpreter.get_tensor(interpreter.get_output_details()[0]["index"]))


def test_file_tells_where_it_comes_from(conversion: Conversion, tmp_path: Path) -> None:
    conversion.save(tmp_path / "model.tflite")
    assert [p.name for p in tmp_path.iterdir()] == ["model.tflite"]
    model = read_tflite(tmp_path / "model.tflite")
    assert model.sha256 == conversion.sha256
    assert model.metadata["labels"] == LABELS
    assert model.metadata["normalization"] == {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
    assert Architecture.from_dict(model.metadata["architecture"]) == ARCHITECTURE
    assert model.metadata["provenance"] == {"run_id": "abc"}
    assert Int8Model(tmp_path / "model.tflite").labels == tuple(LABELS)


def test_uint8_input_takes_one_operator_at_the_start_and_changes_nothing(
    conversion: Conversion, weights: dict[str, np.ndarray]
) -> None:
    other = convert(NETWORK, weights, sample_images(32, 32), normalization=NORMALIZATION, input_type="uint8")
    model = read_tflite(other.data)
    assert model.input.type == "uint8"
    assert [o.kind for o in model.operators][:2] == ["QUANTIZE", "CONV_2D"]
    images = sample_images(4, 32, seed=2)
    expected = Int8Model(conversion.data).logits(images)
    np.testing.assert_array_equal(Int8Model(other.data).logits(images), expected)


def test_trainers_outputs_are_compared(weights: dict[str, np.ndarray]) -> None:
    images = sample_images(8, 32)
    logits = float_logits(weights, images)
    assert convert(NETWORK, weights, images, normalization=NORMALIZATION, reference_logits=logits).parity_error < 1e-4
    with pytest.raises(ConversionError, match="trainer's outputs must agree within"):
        convert(NETWORK, weights, images, normalization=NORMALIZATION, reference_logits=logits + 0.01)


def test_layer_errors_find_the_layer_that_was_spoilt(conversion: Conversion, weights: dict[str, np.ndarray]) -> None:
    # One channel of batch norm a thousand times the others: the layer's one scale is lost on it.
    spoilt = {name: value.copy() for name, value in weights.items()}
    spoilt["stage3.block0.project.norm.weight"][0] *= 1000
    images = sample_images(16, 32)
    rows = layer_errors(NETWORK, spoilt, convert(NETWORK, spoilt, images, normalization=NORMALIZATION).data, images[:4])
    assert len(rows) == len(lower(NETWORK))
    clean = layer_errors(NETWORK, weights, conversion.data, images[:4])
    assert max(row.own_error for row in clean) < 0.1
    # The relative error of the spoilt layer is small, for its large channel dominates the power;
    # what reads it loses the other channels.
    worst = {row.name for row in sorted(rows, key=lambda row: -row.error)}
    assert "stage3.block1.add" in worst
    assert [row.own_error for row in rows] == sorted((row.own_error for row in rows), reverse=True)


def test_layer_errors_agree_with_the_whole_model(conversion: Conversion, weights: dict[str, np.ndarray]) -> None:
    images = sample_images(8, 32, seed=5)
    row = next(r for r in layer_errors(NETWORK, weights, conversion.data, images) if r.name == "head.classifier")
    exact, got = float_logits(weights, images), Int8Model(conversion.data).logits(images)
    # The per-layer table starts from the dequantized input, `exact` from the float one.
    assert row.error == pytest.approx(np.sqrt(np.mean((got - exact) ** 2) / np.mean(exact**2)), rel=0.3)


def test_a_drop_is_of_whole_images() -> None:
    for n, n_right in ((100, 28), (300, 13), (700, 11)):
        float_, int8 = (
            Evaluation.of(np.eye(2)[(np.arange(n) >= right).astype(int)], np.zeros(n, np.int64))
            for right in (n_right, n_right - n // 100)
        )
        assert QuantizationLoss(float_.top1_percent, int8.top1_percent, 0.0, n, int8).drop_points == 1


@pytest.mark.parametrize("runtime", ["litert", "edgetpu"])
def test_both_spaces_convert_for_both_runtimes(runtime: Any, rng: np.random.Generator) -> None:
    network = sample_network(SMALL_TPU, 48)
    conversion = convert(
        network, random_weights(network, rng), sample_images(8, 48), normalization=NORMALIZATION, runtime=runtime
    )
    model = read_tflite(conversion.data)
    dense = model.tensors[model.operators[-1].inputs[1]]
    assert len(dense.scale) == (1 if runtime == "edgetpu" else 10)
    assert edgetpu_readiness(model).ready is (runtime == "edgetpu")


def float_file() -> bytes:
    import tensorflow as tf

    operators = lower(NETWORK)
    weights = random_weights(NETWORK, np.random.default_rng(0))
    model = build_keras(operators, fold_weights(operators, weights), (32, 32, 3))
    graph = tf.function(model).get_concrete_function(tf.TensorSpec((1, 32, 32, 3)))
    return tf.lite.TFLiteConverter.from_concrete_functions([graph]).convert()


def test_float_file_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    data = float_file()
    with pytest.raises(InvalidInputError, match="quantized to 8 bits"):
        Int8Model(data, normalization=NORMALIZATION)
    with pytest.raises(ConversionError, match="input and output must be 8-bit"):
        check_int8(read_tflite(data), lower(NETWORK))


def test_checks_name_the_broken_rule() -> None:
    operators = lower(NETWORK)
    model = read_tflite(write_probe(NETWORK))
    check_int8(model, operators)
    first = model.operators[0]

    def with_operator(**changes: Any) -> Any:
        return dataclasses.replace(model, operators=(dataclasses.replace(first, **changes), *model.operators[1:]))

    cases = [
        (with_operator(kind="TRANSPOSE"), "operator 0 must be CONV_2D"),
        (with_operator(version=6), "at most version 5"),
        (dataclasses.replace(model, operators=model.operators[:-1]), "must have"),
        (dataclasses.replace(model, operators=(*model.operators[:5], first, *model.operators[5:])), "operator 5"),
    ]
    quantize = dataclasses.replace(first, kind="QUANTIZE")
    cases.append((dataclasses.replace(model, operators=(quantize, *model.operators)), "operator 0"))
    tensors = list(model.tensors)
    middle = model.operators[3].outputs[0]
    tensors[middle] = dataclasses.replace(tensors[middle], type="float32")
    cases.append((dataclasses.replace(model, tensors=tuple(tensors)), "only integer tensors"))
    tensors = list(model.tensors)
    tensors[model.inputs[0]] = dataclasses.replace(tensors[model.inputs[0]], dynamic=True)
    cases.append((dataclasses.replace(model, tensors=tuple(tensors)), "fixed batch of 1"))
    for broken, message in cases:
        with pytest.raises(ConversionError, match=message):
            check_int8(broken, operators)
    with pytest.raises(ConversionError, match="one scale for the Edge TPU"):
        check_int8(model, operators, "edgetpu")
    with pytest.raises(ConversionError, match=r"output shape|must be|operators"):
        check_int8(model, lower(sample_network(SMALL_CPU, 64)))


def test_images_and_labels_that_do_not_fit_are_refused(weights: dict[str, np.ndarray]) -> None:
    images = sample_images(8, 32)
    for bad in (images[:3], images[:, :30], images.astype(np.float32), images[..., :1]):
        with pytest.raises(InvalidInputError, match="representative images"):
            convert(NETWORK, weights, bad, normalization=NORMALIZATION)
    with pytest.raises(InvalidInputError, match="one label for each of 10"):
        convert(NETWORK, weights, images, normalization=NORMALIZATION, labels=["a"])


def test_model_with_other_outputs_than_labels_is_refused() -> None:
    data = with_metadata(
        write_probe(NETWORK), {"labels": ["a", "b"], "normalization": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    )
    with pytest.raises(InvalidInputError, match="one label for each of 10"):
        Int8Model(data)


@pytest.mark.parametrize("content", [b"", b"not a model at all", b"\x1c\0\0\0TFL3", json.dumps({}).encode()])
def test_files_that_are_no_models_are_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(content)
    with pytest.raises(InvalidFormatError):
        read_tflite(path)
    with pytest.raises(InvalidInputError):
        read_tflite(tmp_path / "missing.tflite")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_damaged_files_never_crash_the_reader(data: st.DataObject) -> None:
    content = bytearray(write_probe(NETWORK)[:20_000])
    for _ in range(data.draw(st.integers(0, 8))):
        content[data.draw(st.integers(8, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FoxNasError):
        read_tflite(bytes(content))
