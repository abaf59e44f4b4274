from __future__ import annotations

import numpy as np
import pytest

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE

TINY_CPU = CPU_SPACE.replace(image_sizes=(32, 48, 64), width_mult=0.5, n_classes=10)


@pytest.fixture(scope="session")
def probe() -> bytes:
    """A small int8 model whose outputs vary with its input."""
    write_probe = pytest.importorskip("foxnas_mlflow.tflite").write_probe
    return bytes(write_probe(build_network(TINY_CPU, TINY_CPU.smallest(32))))


@pytest.fixture(scope="session")
def expected(probe: bytes) -> tuple[np.ndarray, np.ndarray]:
    """An input and the output that this host computes for it."""
    from foxnas_mlflow.tflite import sample_answer

    given, output = sample_answer(probe)
    assert len(np.unique(output)) > 3
    return given, output
