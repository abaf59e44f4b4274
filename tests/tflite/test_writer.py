"""Probes written directly against what TensorFlow writes for the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace
from foxnas_mlflow.data.preprocess import Normalization, quantize
from foxnas_mlflow.runtime import Classifier, open_interpreter
from foxnas_mlflow.tflite import (
    Int8Model,
    check_int8,
    convert,
    lower,
    random_weights,
    read_tflite,
    write_probe,
)

from .conftest import NORMALIZATION, SMALL_CPU, SMALL_TPU, sample_images, sample_network


@pytest.mark.tflite
@pytest.mark.parametrize(("space", "runtime"), [(SMALL_CPU, "litert"), (SMALL_TPU, "edgetpu"), (SMALL_TPU, "litert")])
def test_probe_has_the_structure_of_a_conversion(space: SearchSpace, runtime: Any, rng: np.random.Generator) -> None:
    for size in (48, 64):
        network = sample_network(space, size, seed=size)
        conversion = convert(
            network,
            random_weights(network, rng),
            sample_images(8, size),
            normalization=NORMALIZATION,
            runtime=runtime,
        )
        probe = read_tflite(write_probe(network, per_channel_dense=runtime != "edgetpu"))
        converted = read_tflite(conversion.data)
        assert probe.structure == converted.structure
        assert probe.min_runtime_version == converted.min_runtime_version
        assert probe.parameter_bytes == converted.parameter_bytes


@pytest.mark.parametrize("space", [CPU_SPACE, TPU_SPACE])
def test_probe_passes_the_checks_runs_and_varies(space: SearchSpace, rng: np.random.Generator) -> None:
    for runtime in ("litert", "edgetpu"):
        network = build_network(space, space.sample(rng, image_size=160))
        model = read_tflite(write_probe(network, per_channel_dense=runtime == "litert"))
        check_int8(model, lower(network), runtime)
        interpreter = open_interpreter(model.data)
        outputs = []
        for _ in range(2):
            interpreter.set_tensor(model.inputs[0], rng.integers(-128, 128, model.input.shape, dtype=np.int8))
            interpreter.invoke()
            outputs.append(interpreter.get_tensor(model.outputs[0])[0])
        assert len(np.unique(outputs[0])) > 50
        assert np.mean(np.abs(outputs[0]) >= 127) < 0.2
        assert np.mean(outputs[0] != outputs[1]) > 0.5


def test_probe_is_deterministic() -> None:
    network = sample_network(SMALL_CPU, 32)
    assert write_probe(network, seed=3) == write_probe(network, seed=3)
    assert write_probe(network, seed=3) != write_probe(network, seed=4)


def test_probe_of_the_deepest_tpu_network_has_the_papers_operators() -> None:
    network = build_network(TPU_SPACE, TPU_SPACE.uniform(224, depth=3, expansion=4, kernel=3))
    counts = read_tflite(write_probe(network)).operator_counts
    # The authors' compiler log (design.md section 1); their AVERAGE_POOL_2D + RESHAPE is our MEAN.
    assert counts == {"CONV_2D": 34, "DEPTHWISE_CONV_2D": 8, "ADD": 10, "MEAN": 1, "FULLY_CONNECTED": 1}


def test_evaluation_and_serving_give_a_network_the_same_integers(tmp_path: Path, rng: np.random.Generator) -> None:
    """Also where every pixel value lies in the middle between two of them."""
    data = write_probe(sample_network(SMALL_CPU, 48))
    (tmp_path / "probe.tflite").write_bytes(data)
    given = read_tflite(data).input
    halves = Normalization((0.5,) * 3, (1 / (255 * given.scale[0]),) * 3)
    np.testing.assert_array_equal(
        quantize(np.array([0.5, 1.5, -0.5, -2.5, 0.4, 900.0, -900.0]), "int8", 1.0, 1), [2, 3, 0, -2, 1, 127, -128]
    )
    image = rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)
    evaluated = Int8Model(data, normalization=halves)
    served = Classifier(tmp_path / "probe.tflite", halves, "logits")
    output = evaluated.model.output
    logits = (served.raw(image).astype(np.float32) - output.zero_point[0]) * np.float32(output.scale[0])
    np.testing.assert_array_equal(evaluated.logits(image[None])[0], logits)
