"""A container as a machine, where a Docker daemon answers."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import ConnectionLostError, ConversionError, DeviceError
from foxnas_mlflow.devices import _measure as measuring
from foxnas_mlflow.devices import board, check, connect, measure
from foxnas_mlflow.tflite import EdgeTpuCompiler, find_compiler, read_tflite
from foxnas_mlflow.tflite._edgetpu_compiler import COMPILER
from tests.measuring import SHORT, shorten
from tests.servers import free_port

docker = pytest.importorskip("docker")


def test_measure_in_a_container(board_image: str, probe: bytes, expected: list[np.ndarray]) -> None:
    with connect(f"docker://{board_image}") as connection:
        assert check(connection).ready
        benchmark = measure(connection, probe, expected=expected, **SHORT)
        assert benchmark.output_difference == 0
        data = bytes(range(256))
        connection.put(data, f"{connection.workspace({})}/file")
        assert connection.get(f"{connection.workspace({})}/file") == data
        with pytest.raises(DeviceError, match=r"reading a file on docker://\S+ was refused"):
            connection.get("/no/such/file")
        assert connection.run(["sh", "-c", "exit 7"], timeout_s=60).status == 7
        with pytest.raises(DeviceError, match="must end within 1 s"):
            connection.run(["sleep", "60"], timeout_s=1)
    bare = f"docker://{board_image}?python=/no/python"
    with connect(bare) as connection, pytest.raises(DeviceError, match="must have Python"):
        check(connection)


def test_a_container_with_half_a_processor(board_image: str, probe: bytes) -> None:
    with connect(f"docker://{board_image}?cpus=0.5") as connection:
        found = check(connection)
        if found.quota is None:
            pytest.skip("the daemon here keeps no quota")
        # On a busy machine it would not come to half a processor, and nothing would hold it back.
        client = docker.from_env()
        for container in client.containers.list(filters={"ancestor": board_image}):
            container.update(cpu_shares=262144)
        client.close()
        benchmark = measure(connection, probe, runs=20, warmup=1, min_seconds=1.0, attempts=1)
    assert (found.quota, found.cores) == (0.5, 1)
    assert any("a quota of 0.5 processors held it back" in reason for reason in benchmark.invalid_reasons), benchmark
    assert not any("other processes" in reason for reason in benchmark.invalid_reasons)


def test_a_container_and_this_machine_wait_for_each_other(board_image: str, probe: bytes) -> None:
    descriptor = os.open(board.lock_path(), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        message = "another measurement holds docker://"
        with connect(f"docker://{board_image}") as connection, pytest.raises(DeviceError, match=message):
            measure(connection, probe, runs=1, warmup=1, wait_seconds=0.1)
    finally:
        os.close(descriptor)


def test_a_container_that_dies_is_replaced(board_image: str, probe: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "RECONNECT_SECONDS", 20.0)
    client = docker.from_env()
    killed: list[str] = []

    def kill() -> None:
        deadline = time.monotonic() + 60
        while not killed and time.monotonic() < deadline:
            # One that is just made or removed has no processes.
            with contextlib.suppress(docker.errors.APIError, TypeError):
                for container in client.containers.list(filters={"ancestor": board_image}):
                    if any("measure" in " ".join(row) for row in container.top()["Processes"]):
                        container.kill()
                        killed.append(container.id)
            time.sleep(0.05)

    killer = threading.Thread(target=kill)
    with connect(f"docker://{board_image}") as connection:
        killer.start()
        benchmark = measure(connection, probe, runs=10**6, warmup=1, max_seconds=0.5)
        killer.join()
        assert len(killed) == 1
        assert benchmark.n_runs >= 20
    # Outside a measurement, and for good.
    with connect(f"docker://{board_image}") as connection:
        connection.workspace({})
        for container in client.containers.list(filters={"ancestor": board_image}):
            container.kill()
        with pytest.raises(ConnectionLostError, match="went away"):
            connection.run(["sleep", "0"], timeout_s=60)
    # The daemon removes them in its own time.
    deadline = time.monotonic() + 120
    while client.containers.list(all=True, filters={"ancestor": board_image}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not client.containers.list(all=True, filters={"ancestor": board_image})
    client.close()


@pytest.mark.server
def test_the_commands_measure_in_a_container(
    board_image: str,
    probe: bytes,
    tracking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import mlflow

    shorten(monkeypatch)
    device = f"docker://{board_image}"
    assert main(["device", "check", "--device", device]) == 0
    assert f"Found at {device}" in capsys.readouterr().out
    (tmp_path / "probe.tflite").write_bytes(probe)
    status = main(["benchmark", "--model", str(tmp_path / "probe.tflite"), "--device", device, "--runs", "20"])
    assert "at most 0 levels from this host's" in capsys.readouterr().out
    (run,) = mlflow.MlflowClient().search_runs(["0"])
    assert run.data.tags["foxnas.device"] == device
    assert run.data.metrics["benchmark/latency_ms_p50"] > 0
    assert status == (0 if run.data.metrics["benchmark/valid"] else 3)


def test_the_edge_tpu_compiler_in_a_container(board_image: str, probe: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = find_compiler(board_image)
    assert compiler is not None
    output = compiler.run(probe)
    assert output.report().n_mapped == sum(read_tflite(probe).operator_counts.values())
    assert read_tflite(output.data).operator_counts == {"edgetpu-custom-op": 1}
    with pytest.raises(ConversionError, match="must make a file"):
        compiler.run(b"no model").report()
    client = docker.from_env()
    recipe = f"FROM {board_image}\nENV STAND_IN_MODE=slow STAND_IN_PID=/tmp/pid\n"
    slow, _ = client.images.build(fileobj=io.BytesIO(recipe.encode()), tag="foxnas-test-slow:latest", rm=True)
    try:
        monkeypatch.setattr("foxnas_mlflow.tflite._edgetpu_compiler._GRACE_S", 0)
        with pytest.raises(ConversionError, match="must end within 2 s"):
            EdgeTpuCompiler(COMPILER, slow.tags[0]).run(probe, timeout_s=2)
        assert not client.containers.list(all=True, filters={"ancestor": board_image})
    finally:
        client.images.remove(slow.id, force=True)
        client.close()


def test_images_that_are_not_there(board_image: str) -> None:
    with pytest.raises(DeviceError, match=r"must name an image that is there|must start"):
        connect("docker://foxnas-no-such-image:none")
    with pytest.raises(DeviceError, match="Docker must be able to run the Edge TPU compiler's image"):
        find_compiler("foxnas-no-such-image:none")


def test_no_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"tcp://127.0.0.1:{free_port()}")
    with pytest.raises(DeviceError, match="a Docker daemon must answer"):
        connect("docker://busybox")
