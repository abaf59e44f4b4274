"""Workers on a Ray cluster of two nodes of this machine, of which one is killed."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow import __version__
from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.core.parallel import as_finished
from foxnas_mlflow.core.sampling import collect
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.core.workers import LocalExecutor
from foxnas_mlflow.devices import Benchmark
from foxnas_mlflow.workflows import _boards, _ray, _timers
from tests.core.test_workers import Squares
from tests.devices.conftest import TINY_CPU
from tests.devices.sshd import Server, make_key, ssh_server
from tests.devices.test_boards import address, needs_sshd
from tests.kills import moment
from tests.measuring import shorten, started
from tests.servers import free_port

NO_RAY = "no Ray here: pip install 'foxnas-mlflow[ray]'"


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two boards, to which this user and the cluster's may log in."""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setenv("HOME", str(home))
        patch.delenv("SSH_AUTH_SOCK", raising=False)
        public = make_key(home / ".ssh" / "id_ed25519")
        running = [stack.enter_context(ssh_server(home / name, public)) for name in ("a", "b")]
        (home / ".ssh" / "known_hosts").write_text("".join(server.known_hosts_line for server in running))
        yield running


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A head with one processor, and a way to add nodes, whose measurements are short."""
    pytest.importorskip("ray", reason=NO_RAY)
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        # What the cluster's processes print is in its own logs.
        patch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Beside other tests, Ray's workers would wait for them.
        patch.setenv("RAY_worker_niceness", "0")
        started(patch, tmp_path_factory.mktemp("cluster") / "short", shorten)
        running = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        yield running
        running.shutdown()


@pytest.fixture
def two_nodes(cluster: Any) -> Iterator[Any]:
    """The cluster with a second node, of one processor, which nothing before has killed."""
    node = cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes(timeout=120)
    yield cluster
    if node in cluster.worker_nodes:
        cluster.remove_node(node)


def test_workers_share_the_items_and_a_lost_ones_is_done_again(two_nodes: Any, tmp_path: Path) -> None:
    cluster = two_nodes
    with _ray.open_ray(cluster.address, workers=2) as executor:
        assert executor.threads(2) == 1
        assert not executor.has("ssh://pi@other")
        with executor.workers(Squares(tmp_path), 2) as shared:
            # 13 ends the first process that is asked for it.
            results = dict(as_finished(shared, range(20), n=2))
            assert {x: square for x, (square, _) in results.items()} == {x: x * x for x in range(20)}
            assert os.getpid() not in {pid for _, pid in results.values()}
            with pytest.raises(InvalidInputError, match="must not be 99; received 99"):
                shared(99)
        with LocalExecutor().workers(Squares(tmp_path), 1) as shared:
            assert {x: shared(x)[0] for x in range(20)} == {x: x * x for x in range(20)}


def test_the_work_goes_on_when_a_node_is_killed(cluster: Any, tmp_path: Path) -> None:
    assert "node lost" in moment("node", random.Random(0), tmp_path, cluster)


@needs_sshd
def test_boards_are_measured_from_the_nodes_that_reach_them_and_one_dies_with_its_node(
    cluster: Any,
    servers: list[Server],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Only nodes can reach the boards; how alike and how busy this host is, is not what is asked.
    monkeypatch.setattr("foxnas_mlflow.devices.connect", None)
    monkeypatch.setattr(_boards, "compare", lambda *arguments: None)
    monkeypatch.setattr(_ray, "NO_ROOM_SECONDS", 1.5)
    a, b = (address(server).partition("?")[0] for server in servers)
    options = {"num_cpus": 0, "env_vars": {"HOME": os.environ["HOME"]}}
    cluster.add_node(**options, resources={a: 1})
    leaving = cluster.add_node(**options, resources={b: 1})
    cluster.wait_for_nodes(timeout=120)
    networks = TINY_CPU.sample(np.random.default_rng(0), n=3, image_size=32)
    evaluated: list[Architecture] = []
    at_work = itertools.count(1)

    def evaluate(architecture: Architecture) -> float:
        evaluated.append(architecture)
        if next(at_work) == 2:
            cluster.remove_node(leaving, allow_graceful=False)
        return 70.0

    with _ray.open_ray(cluster.address, workers=1) as executor:
        assert executor.has(a)
        assert _timers.check_device(address(servers[0]), executor).ready
        assert _timers.first_answering(",".join(map(address, servers)), executor) == address(servers[0])
        with _timers.open_measure(address(servers[1]), executor) as measure:
            probe, expected = _timers._Build(get_target("cpu"), TINY_CPU)()(networks[0])
            benchmark = measure(probe, runs=20, attempts=1, expected=expected, max_output_levels=99.0)
            assert isinstance(benchmark, Benchmark)
            assert benchmark.latency_ms_p50 > 0
        devices = ",".join(map(address, servers))
        with _timers.open_device(get_target("cpu"), TINY_CPU, devices, executor=executor) as timer:

            def timed(architecture: Architecture) -> Timing:
                return dataclasses.replace(timer.time(architecture), problems=())

            rows = collect(networks, tmp_path / "rows.csv", evaluate=evaluate, time=timed, n_at_once=3)
            for architecture in networks:
                if not timer.aside:
                    timed(architecture)
            assert list(timer.aside) == [address(servers[1])]
    assert Counter(evaluated) == Counter(networks)
    assert [row.architecture for row in rows] == networks
    assert all(row.latency_ms is not None for row in rows)
    assert {row.device.rpartition(" at ")[2] for row in rows} <= {a, b}
    assert rows[-1].device.endswith(f" at {a}")
    assert f"{b} is set aside, the other boards go on" in caplog.text


def test_a_cluster_that_cannot_do_the_work_is_refused_before_it_begins(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (
        pytest.raises(InvalidInputError, match=r"needs a processor of the Ray cluster; received 50 workers"),
        _ray.open_ray(cluster.address, workers=50),
    ):
        pass
    monkeypatch.setattr(_ray, "__version__", "99.0")
    with (
        pytest.raises(
            InvalidInputError, match=r"must have foxnas-mlflow 99\.0.*received \S+ has " + re.escape(__version__)
        ),
        _ray.open_ray(cluster.address, workers=1),
    ):
        pass


def test_an_address_that_does_not_answer(capsys: pytest.CaptureFixture[str], tracking: str) -> None:
    pytest.importorskip("ray", reason=NO_RAY)
    for given, message in (
        (f"127.0.0.1:{free_port()}", "must answer at ray_address"),
        ("nowhere.invalid:6379", "must answer at ray_address"),
        ("head", "must be host:port"),
    ):
        with pytest.raises(InvalidInputError, match=message), _ray.open_ray(given, workers=1):
            pass
    import mlflow

    for command in ("main", "search"):
        asked = ["--executor", "ray", "--ray-address", f"127.0.0.1:{free_port()}", "--device", "none"]
        assert main([command, "--target", "rpi4", *asked]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("foxnas: a Ray cluster must answer at ray_address")
    # Before the work begins.
    assert mlflow.MlflowClient().search_runs(["0"]) == []


def test_an_address_of_ray_belongs_to_ray(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--ray-address", "head:6379"]) == 2
    assert "give --executor ray too" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.train
@pytest.mark.tflite
@pytest.mark.usefixtures("undisturbed")
def test_the_command_of_the_ray_job_runs_the_pipeline_on_a_cluster(
    cluster: Any, root: Path, tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    import yaml

    from foxnas_mlflow.core.measurements import read_measurements
    from tests.pipelines import N_SAMPLES, options

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = yaml.safe_load((root / "examples" / "06_cluster" / "ray.yaml").read_text())
    command = job["spec"]["entrypoint"].split()[3:]
    for option, value in {"--data": "digits", "--ray-address": cluster.address, "--workers": "1"}.items():
        command[command.index(option) + 1] = value
    assert main([*command, *options(tmp_path)]) == 0
    client = mlflow.MlflowClient()
    runs = {run.data.tags["foxnas.stage"]: run for run in client.search_runs(["0"])}
    assert {"supernet", "sample", "fit", "search", "quantize", "compare", "main"} <= set(runs)
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    for stage in ("sample", "search"):
        assert (runs[stage].data.params["cfg.executor"], runs[stage].data.params["cfg.workers"]) == ("ray", "1")
    (steps,) = [json.loads(mlflow.artifacts.load_text(f"runs:/{runs['main'].info.run_id}/pipeline.json"))["steps"]]
    assert not any(step["reused"] for step in steps)
    table = mlflow.artifacts.load_text(f"runs:/{runs['main'].info.run_id}/predicted_vs_real.csv").splitlines()
    assert len(table) == 1 + 2

    # In this process the same weights make the same rows; fewer of them are the first ones.
    shutil.rmtree(tmp_path / "cache")
    weights = {step["name"]: step["outputs"] for step in steps}["supernet"]["model_uri"]
    alone = ["sample", "--supernet", weights, "--target", "rpi4", "--device", "none", "--n-samples", "4"]
    assert main(alone) == 0
    here = client.search_runs(["0"], "tags.`foxnas.stage` = 'sample'", order_by=["attributes.start_time DESC"])[0]
    assert here.data.params["cfg.executor"] == "local"
    rows, same = (
        read_measurements(
            mlflow.artifacts.download_artifacts(
                f"runs:/{run.info.run_id}/measurements.csv", dst_path=str(tmp_path / run.info.run_id)
            )
        )
        for run in (runs["sample"], here)
    )
    assert rows[:4] == same
    assert len(rows) == N_SAMPLES
