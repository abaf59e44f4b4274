"""Arm's real Vela on probes: what maps, what it estimates, and how it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("ethosu")

from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.errors import InvalidInputError, OutOfDomainError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import reference_latency
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.devices import ACCELERATORS, estimate_latency_vela
from foxnas_mlflow.tflite import read_tflite, write_probe


def test_a_whole_network_maps_and_larger_accelerators_are_faster() -> None:
    network = build_network(CPU_SPACE, CPU_SPACE.smallest(128))
    probe = write_probe(network)
    small, large = (estimate_latency_vela(probe, name) for name in ("ethos-u55-32", "ethos-u55-256"))
    assert small.latency_ms > large.latency_ms > 0
    assert large.operators_cpu == 0
    assert large.operators_npu >= len(read_tflite(probe).operators)
    # Vela counts pooling and gates too.
    assert large.macs == pytest.approx(network_cost(network).macs, rel=0.1)
    assert large.metrics()["vela/latency_ms"] == large.latency_ms
    assert large.to_dict()["estimate"] is True
    assert set(read_tflite(large.compiled).operator_counts) == {"ethos-u"}


@pytest.mark.parametrize("name", ["ethos-u55-128", "ethos-u65-256"])
def test_the_packaged_cost_model_stands_for_vela(name: str) -> None:
    target = get_target(name)
    model = reference_latency(target, CPU_SPACE)
    with pytest.raises(OutOfDomainError, match="hold in space 'cpu' only"):
        reference_latency(target, CPU_SPACE.replace(name="mine", n_classes=10))
    assert "Nothing was measured" in model.notes[0]
    architecture = CPU_SPACE.uniform(160, depth=3, expansion=4, kernel=5)
    estimate = estimate_latency_vela(write_probe(build_network(CPU_SPACE, architecture)), name)
    predicted = model.of("latency_ms", 160).predict([architecture])[0]
    assert predicted == pytest.approx(estimate.latency_ms, rel=0.05)


@pytest.mark.parametrize("name", ["ethos-u65-512", "ethos-u85-256"])
def test_every_family_has_a_configuration(name: str) -> None:
    estimate = estimate_latency_vela(write_probe(build_network(CPU_SPACE, CPU_SPACE.smallest(128))), name)
    assert (estimate.system_config, estimate.memory_mode) == ACCELERATORS[name]


def test_what_vela_cannot_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="must be readable"):
        estimate_latency_vela(tmp_path / "absent.tflite")
    (tmp_path / "bad.tflite").write_text("not a model")
    with pytest.raises(InvalidInputError, match="able to compile"):
        estimate_latency_vela(tmp_path / "bad.tflite")
    with pytest.raises(InvalidInputError, match="accelerator must be one of"):
        estimate_latency_vela(b"", "ethos-u99")
    with pytest.raises(InvalidInputError, match="able to compile"):
        estimate_latency_vela(b"", memory_mode="No_Such_Mode")


@pytest.mark.server
def test_an_estimate_is_logged_as_one(tracking: str, tmp_path: Path) -> None:
    import mlflow

    from foxnas_mlflow.cli.main import main

    space = CPU_SPACE.replace(image_sizes=(32,), width_mult=0.5, n_classes=10)
    (tmp_path / "probe.tflite").write_bytes(write_probe(build_network(space, space.smallest())))
    assert main(["estimate", "--model", str(tmp_path / "probe.tflite"), "--target", "ethos-u55-128"]) == 0
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"])
    assert run.data.tags["foxnas.latency_source"] == "cost_model"
    assert run.data.tags["foxnas.estimator"].startswith("Vela")
    assert run.data.metrics["vela/latency_ms"] > 0
    assert not [key for key in run.data.metrics if key.startswith("benchmark/")]
    files = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert {"vela.json", "vela_layers.csv", "model_vela.tflite"} <= files


@pytest.mark.tflite
def test_a_float_model_maps_to_nothing_and_is_refused() -> None:
    tf = pytest.importorskip("tensorflow")
    model = tf.keras.Sequential([tf.keras.layers.Input((8, 8, 3), batch_size=1), tf.keras.layers.Conv2D(4, 3)])
    data = tf.lite.TFLiteConverter.from_keras_model(model).convert()
    with pytest.raises(InvalidInputError, match="quantized to int8"):
        estimate_latency_vela(data)
