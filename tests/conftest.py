"""Fixtures shared by all tests."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

if TYPE_CHECKING:
    from foxnas_mlflow.flavor import TfliteModel

# Networks of tests are tiny: threads that wait for each other at every layer cost more than they save, and on a
# busy machine they wait for seconds. Torch reads it when it is first imported; subprocesses inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell starts background jobs with Ctrl-C ignored, and their processes inherit that: tests send it.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]


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


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite store with MLflow's tables: making them takes seconds, copying the file does not."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}", f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A fresh SQLite store; MLflow's global state is put back afterwards."""
    import mlflow

    shutil.copy(empty_store, tmp_path / "mlflow.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "mlflow.db")) as store, store:
        store.execute("UPDATE experiments SET artifact_location = ?", (f"{tmp_path}/mlruns/0",))
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    yield uri
    while mlflow.active_run() is not None:
        mlflow.end_run()
    mlflow.set_tracking_uri(None)
    mlflow.set_registry_uri(None)


@pytest.fixture(scope="session")
def edgetpu_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with stand-ins for the Edge TPU's compiler and library."""
    from tests.edgetpu_stand_in import build_library, write_stand_in

    directory = tmp_path_factory.mktemp("edgetpu")
    if build_library(directory) is None:
        pytest.skip("a stand-in for libedgetpu.so.1 needs a C compiler (cc)")
    write_stand_in(directory)
    return directory


@pytest.fixture
def edgetpu(edgetpu_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs that are started now find an Edge TPU and its compiler; this process finds the compiler only."""
    monkeypatch.setenv("PATH", str(edgetpu_directory), prepend=os.pathsep)
    monkeypatch.setenv("LD_LIBRARY_PATH", str(edgetpu_directory))


@pytest.fixture(scope="session")
def colour_model(tmp_path_factory: pytest.TempPathFactory) -> TfliteModel:
    """A tiny int8 classifier of colours, converted once a session."""
    from tests.colour_model import build_colour_model

    if importlib.util.find_spec("tensorflow") is None:
        pytest.skip("converting the test network needs tensorflow")
    return build_colour_model(tmp_path_factory.mktemp("colour") / "colour.tflite")


@pytest.fixture(scope="session")
def board_image(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Docker image with LiteRT and the stand-in for Google's compiler, where a daemon answers."""
    from tests.containers import board_image

    with board_image(tmp_path_factory.mktemp("image")) as name:
        yield name
