"""A container as a machine, where a Docker daemon answers."""

from __future__ import annotations

import io
import socket
import tarfile
from collections.abc import Iterator

import numpy as np
import pytest

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.devices import check, connect, measure
from tests.servers import free_port

docker = pytest.importorskip("docker")

IMAGE = "foxnas-test-board:latest"
RECIPE = b"FROM python:3.11-slim\nRUN pip install --no-cache-dir numpy ai-edge-litert\n"


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    # Asked first: the SDK leaves sockets open where none answers.
    daemon = socket.socket(socket.AF_UNIX)
    try:
        daemon.connect("/var/run/docker.sock")
    except OSError:
        pytest.skip("no Docker daemon answers")
    finally:
        daemon.close()
    client = docker.from_env(timeout=600)
    context = io.BytesIO()
    with tarfile.open(fileobj=context, mode="w") as archive:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(RECIPE)
        archive.addfile(entry, io.BytesIO(RECIPE))
    context.seek(0)
    try:
        # One that was imported under this name serves where none can be pulled.
        if not client.images.list(name=IMAGE):
            client.images.build(fileobj=context, custom_context=True, tag=IMAGE)
        yield IMAGE
    except docker.errors.DockerException as error:
        pytest.skip(f"the image cannot be built: {error}")
    finally:
        client.close()


def test_measure_in_a_container(image: str, probe: bytes, expected: tuple[np.ndarray, np.ndarray]) -> None:
    with connect(f"docker://{image}") as connection:
        assert check(connection).ready
        benchmark = measure(connection, probe, runs=20, warmup=1, min_seconds=0.1, expected=expected)
        assert benchmark.output_difference == 0
        data = bytes(range(256))
        connection.put(data, f"{connection.workspace({})}/file")
        assert connection.get(f"{connection.workspace({})}/file") == data
    with connect(f"docker://{image}?python=/no/python") as connection, pytest.raises(DeviceError, match="must have Py"):
        check(connection)


def test_images_that_are_not_there(image: str) -> None:
    with pytest.raises(DeviceError, match=r"must name an image that is there|must start"):
        connect("docker://foxnas-no-such-image:none")


def test_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(DeviceError, match="a Docker daemon must answer"):
        connect("docker://busybox")
