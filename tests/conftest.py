"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import shutil
import signal
import sqlite3
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from foxnas_mlflow.flavor import TfliteModel

# Networks of tests are tiny: threads that wait for each other at every layer cost more than they save, and on a
# busy machine they wait for seconds. Torch reads it when it is first imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A proxy does not know the servers of tests, which listen on loopback.
for variable in ("no_proxy", "NO_PROXY"):
    os.environ[variable] = ",".join(filter(None, (os.environ.get(variable), "127.0.0.1", "localhost")))

# Where it is set, each of hundreds of processes compiles the package anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# A shell starts background jobs with Ctrl-C ignored, and their processes inherit that: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in each run, however busy the machine is.
settings.register_profile(
    "tests", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tests")

ROOT = Path(__file__).resolve().parents[1]

GROUPS = {
    # Two measurements at a time would disturb each other.
    "measures": (
        "devices/test_any_model",
        "devices/test_device",
        "devices/test_docker",
        "devices/test_edgetpu",
        "devices/test_energy",
        "devices/test_field",
        "devices/test_measure",
        "devices/test_ssh",
        "tracking/test_benchmark_run",
    ),
    # Servers of several processes each.
    "serves": (
        "flavor/test_conformance",
        "flavor/test_serving",
        "tracking/test_faults",
        "tracking/test_stack",
        "tracking/test_rights",
        "tracking/test_shared_server",
        "tracking/test_words",
    ),
    "deploys": ("deploy/",),
    # What a module makes once: a cluster, a board, a trained subnet, converted networks, a fit, predictors, two ranks.
    "cluster": ("test_ray",),
    "board": ("devices/test_virtual_pi",),
    "subnet": ("tracking/test_quantize_run",),
    "conversion": ("tflite/", "test_pixels"),
    "fit": ("core/test_predictors", "core/test_rounds", "core/test_verify"),
    "predictors": ("tracking/test_verified_search_run",),
    "ranks": ("supernet/test_train",),
}
"""Tests that one worker runs one after the other, by the beginning of their path."""


def pytest_itemcollected(item: pytest.Item) -> None:
    """Name the groups for `pytest --dist loadgroup`, before xdist looks for them."""
    place = item.path.relative_to(ROOT / "tests").as_posix()
    for group, beginnings in GROUPS.items():
        if place.startswith(beginnings):
            item.add_marker(pytest.mark.xdist_group(group))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long begin first: begun last, one would leave the other workers idle."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_xdist_auto_num_workers() -> int:
    """One worker more than cores: a third of the time tests wait, for servers, boards and what they kill."""
    from foxnas_mlflow.core.processors import n_processors

    return n_processors() + 1


def once_a_run(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A directory that the first test of a run in need of it makes, for all of the run's workers.

    Args:
        factory: Knows where the run's files are.
        name: Name of the directory.
        make: Fills it; what it raises is raised for every worker, each of which tries.
    """
    # A worker's directory lies in that of the run.
    base = factory.getbasetemp().parent if "PYTEST_XDIST_WORKER" in os.environ else factory.getbasetemp()
    directory, done = base / name, base / f"{name}.done"
    with (base / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            done.touch()
    return directory


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Published measurements beside the checkout, or a skip that says what is missing."""
    path = Path(os.environ.get("FOXNAS_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not (path / "foxnas_rpi4_cpu256.csv").is_file():
        pytest.skip(f"the published measurements are not at {path}; set FOXNAS_SHARED_DATA")
    return path


@pytest.fixture(autouse=True)
def mlflow_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A test that names no store writes to one of its worker, not to the checkout.

    MLflow keeps the stores that it is told in the environment, where the next test's processes would find them.
    """
    before = {key: value for key, value in os.environ.items() if key.startswith("MLFLOW_")}
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{tmp_path_factory.getbasetemp() / 'mlflow.db'}"
    yield
    for key in [key for key in os.environ if key.startswith("MLFLOW_")]:
        del os.environ[key]
    os.environ.update(before)


@pytest.fixture(autouse=True, scope="session")
def no_system_wide_ssh() -> Iterator[None]:
    """What this machine's owner wrote to /etc/ssh is not for the servers of tests."""
    from foxnas_mlflow.devices import _ssh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_ssh, "SYSTEM_CONFIG", "/does/not/exist")
        patch.setattr(_ssh, "KNOWN_HOSTS", {**_ssh.KNOWN_HOSTS, "GlobalKnownHostsFile": ()})
        yield


@pytest.fixture(autouse=True)
def module_path() -> Iterator[None]:
    """MLflow puts the code of every model that it loads on the module path, where each import looks through it."""
    before = list(sys.path)
    yield
    sys.path[:] = before


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables: making them takes seconds, copying the file does not."""

    def make(directory: Path) -> None:
        import mlflow

        uri = f"sqlite:///{directory / 'mlflow.db'}"
        mlflow.MlflowClient(uri, uri).search_experiments()

    return once_a_run(tmp_path_factory, "store", make) / "mlflow.db"


def copy_store(store: Path, directory: Path) -> str:
    """A copy of an SQLite store in a directory, whose runs keep their files there; its URI."""
    shutil.copy(store, directory / "mlflow.db")
    with contextlib.closing(sqlite3.connect(directory / "mlflow.db")) as copy, copy:
        copy.execute("UPDATE experiments SET artifact_location = ?", (f"{directory}/mlruns/0",))
        for table, column in _PLACES:
            copy.execute(f"UPDATE {table} SET {column} = REPLACE({column}, ?, ?)", (str(store.parent), str(directory)))
    return f"sqlite:///{directory / 'mlflow.db'}"


_PLACES = (
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "source"),
    ("model_versions", "storage_location"),
)
"""Where a store says in which directory files are."""


@contextlib.contextmanager
def mlflow_at(uri: str) -> Iterator[None]:
    """Let MLflow use a store for all, in this process and, by the environment, in those that it starts."""
    import mlflow

    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            patch.setenv(name, uri)
        mlflow.set_tracking_uri(uri)
        mlflow.set_registry_uri(uri)
        yield
        mlflow.set_tracking_uri(None)
        mlflow.set_registry_uri(None)


@pytest.fixture
def tracking(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh SQLite store; MLflow's global state is put back afterwards."""
    import mlflow

    uri = copy_store(empty_store, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    # What a test sets is of its own store.
    monkeypatch.setattr("mlflow.tracking.fluent._active_experiment_id", None)
    with mlflow_at(uri):
        yield uri
        while mlflow.active_run() is not None:
            mlflow.end_run()


@pytest.fixture
def undisturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, and in the commands that are started, latencies are made up, so that the same is chosen in each run.

    How good figures are is asked in tests/devices.
    """
    from tests.measuring import make_up, started

    make_up(monkeypatch)
    started(monkeypatch, tmp_path / "made_up", make_up)


@pytest.fixture
def shortened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here, and in the commands that are started, measurements are short, and count although other tests disturb them.

    Each would be done three times, and of those of a sampling too few might be left.
    """
    from tests.measuring import shorten, started

    shorten(monkeypatch)
    started(monkeypatch, tmp_path / "short", shorten)


@pytest.fixture(scope="session")
def edgetpu_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with stand-ins for the Edge TPU's compiler and library."""
    from tests.edgetpu_stand_in import build_library, write_stand_in

    def make(directory: Path) -> None:
        if build_library(directory) is None:
            pytest.skip("a stand-in for libedgetpu.so.1 needs a C compiler (cc)")
        write_stand_in(directory)

    return once_a_run(tmp_path_factory, "edgetpu", make)


@pytest.fixture
def edgetpu(edgetpu_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are started now find an Edge TPU and its compiler; this process finds the compiler only."""
    monkeypatch.setenv("PATH", str(edgetpu_directory), prepend=os.pathsep)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(edgetpu_directory))


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> TfliteModel:
    """A tiny int8 classifier of colours, converted once a run."""
    from tests.colour_model import colour_model, convert_colour_model

    def make(directory: Path) -> None:
        if importlib.util.find_spec("tensorflow") is None:
            pytest.skip("converting the test network needs tensorflow")
        convert_colour_model(directory / "colour.tflite")

    return colour_model(once_a_run(tmp_path_factory, "colour", make) / "colour.tflite")


@pytest.fixture(scope="session")
def board_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Docker image with LiteRT and the stand-in for Google's compiler, where a daemon answers."""
    from tests.containers import board_image

    with board_image(tmp_path_factory.mktemp("image")) as name:
        yield name
