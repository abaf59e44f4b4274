from __future__ import annotations

import numpy as np
import pytest

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.devices import host_answer

TINY_CPU = CPU_SPACE.replace(image_sizes=(32, 48, 64), width_mult=0.5, n_classes=10)


@pytest.fixture(scope="session")
def probe() -> bytes:
    """A small int8 model whose outputs vary with its input."""
    write_probe = pytest.importorskip("foxnas_mlflow.tflite").write_probe
    return bytes(write_probe(build_network(TINY_CPU, TINY_CPU.smallest(32))))


@pytest.fixture(scope="session")
def expected(probe: bytes) -> list[np.ndarray]:
    """What this host answers to a measurement's inputs."""
    outputs = host_answer(probe)
    assert outputs is not None
    assert len(np.unique(outputs[0])) > 3
    return outputs
