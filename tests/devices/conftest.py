from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.devices import host_answer

from .virtual_pi import UnavailableError, unpack_virtual_pi

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


@pytest.fixture(scope="session")
def pi_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The root file system of a virtual Pi, unpacked for this session."""
    directory = tmp_path_factory.mktemp("pi") / "root"
    try:
        unpack_virtual_pi(directory)
    except UnavailableError as error:
        pytest.skip(str(error))
    yield directory
    # 450 MB, which pytest would keep for three sessions.
    shutil.rmtree(directory)


@pytest.fixture
def control_group() -> Iterator[Path]:
    """A control group with half a processor's worth of time, of which others take nothing."""
    group = Path(
        "/sys/fs/cgroup/cpu" if Path("/sys/fs/cgroup/cpu").is_dir() else "/sys/fs/cgroup", f"foxnas-{os.getpid()}"
    )
    try:
        group.mkdir()
        if (group / "cpu.cfs_quota_us").exists():
            (group / "cpu.cfs_quota_us").write_text("50000")
            (group / "cpu.shares").write_text("262144")
        else:
            (group / "cpu.max").write_text("50000 100000")
            (group / "cpu.weight").write_text("10000")
    except OSError as error:
        pytest.skip(f"a control group of its own needs rights ({error})")
    yield group
    deadline = time.monotonic() + 10
    while group.exists() and time.monotonic() < deadline:
        # Processes that were told to end need a moment.
        with contextlib.suppress(OSError):
            group.rmdir()
        time.sleep(0.05)
