"""The registry on what teams run: PostgreSQL, `mlflow server` that serves artifacts, S3; and promotions at once."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import mlflow
import numpy as np
import pandas as pd
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.flavor import load_model, model_id_of
from foxnas_mlflow.runtime import Classifier
from foxnas_mlflow.tracking.holders import StageKeeper
from tests.colour_model import encoded, image_of
from tests.servers import listening_on, postgres, request, s3, scoring_server, tracking_server
from tests.versions import FIGURES, NAME, register_version

pytestmark = [pytest.mark.server, pytest.mark.slow]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL of a tracking server, and URI of the database behind it."""
    logs = tmp_path_factory.mktemp("stack")
    with (
        postgres() as database,
        s3(log=logs / "s3.log") as env,
        tracking_server(database, "s3://models/mlflow", log=logs / "mlflow.log", env=env) as url,
    ):
        for address in (url, database, env["MLFLOW_S3_ENDPOINT_URL"]):
            assert listening_on(urlsplit(address).port or 0) == {"127.0.0.1"}
        yield url, database


@pytest.fixture
def server(stack: tuple[str, str], tracking: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tracking server is where everything goes."""
    url, _ = stack
    monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
    mlflow.set_tracking_uri(url)
    mlflow.set_registry_uri(url)
    return url


def test_a_model_from_its_run_to_a_scoring_server(server: str, tmp_path: Path) -> None:
    register_version(tmp_path)
    client = mlflow.MlflowClient()
    version = client.get_model_version(NAME, "1")
    logged = client.get_logged_model(model_id_of(version) or "")
    assert {m.key: m.value for m in logged.metrics or []} == FIGURES
    assert logged.artifact_location.startswith("mlflow-artifacts:/")
    assert main(["promote", "--model", NAME, "--stage", "Production", "--max-latency-ms", "60"]) == 0
    assert main(["promote", "--model", NAME, "--stage", "Staging", "--max-latency-ms", "1"]) == 2
    version = client.get_model_version_by_alias(NAME, "production")
    assert (version.version, version.current_stage) == ("1", "Production")
    image = image_of("red", height=128, width=128)
    frame = pd.DataFrame({"image": [encoded(image, "PNG")]})
    table = mlflow.pyfunc.load_model(f"models:/{NAME}@production").predict(frame)
    # By its stage; by its alias it is read here.
    with scoring_server(f"models:/{NAME}/Production", log=tmp_path / "serve.log") as url:
        assert listening_on(urlsplit(url).port or 0) == {"127.0.0.1"}
        status, text = request(url, {"inputs": image[None].tolist()})
        assert status == 200, text
    (row,) = json.loads(text)["predictions"]
    # What the runtime itself says of the same pixels, from the registry as from the server.
    model = load_model(f"models:/{NAME}@production")
    expected = Classifier(model.path, model.preprocessing.normalization, model.output)(image)
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(row["probabilities"], expected, rtol=1e-6)
    np.testing.assert_allclose(table["probabilities"][0], expected, rtol=1e-6)
    assert row["label"] == table["label"][0] == "abc"[int(np.argmax(expected))]


_PROMOTERS = """
import os, sys
from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import PromotionError
from foxnas_mlflow.tracking.holders import StageKeeper
import foxnas_mlflow.workflows.promote

def work(name, version):
    keeper = StageKeeper(name)
    keeper.holder("Production")
    os.write(ready, b"r")
    os.read(go, 1)
    # Refused where another was first.
    main(["promote", "--model", f"models:/{name}/{version}", "--stage", "Production"])
    for _ in range(3):
        try:
            keeper.move(version, "Production", former=keeper.holder("Production"), action="promote", run_id=version)
        except PromotionError as error:
            assert "in the meantime" in str(error), error

# What is imported is shared; the connections to the store are each process's own.
name, *versions = sys.argv[1:]
(told, ready), (go, start) = os.pipe(), os.pipe()
children = []
for version in versions:
    children.append(os.fork())
    if not children[-1]:
        os.close(start)
        try:
            work(name, version)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
        os._exit(0)
os.close(ready)
for _ in children:
    os.read(told, 1)
os.close(start)  # all begin at once
sys.exit(max(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
"""


@pytest.mark.parametrize("store", ["sqlite", "postgres"])
def test_promotions_at_once_leave_one_holder(
    tracking: str, tmp_path: Path, store: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if store == "postgres":
        request.getfixturevalue("server")
        # Straight to the database: nothing in between puts the promotions in order.
        _, database = request.getfixturevalue("stack")
        monkeypatch.setenv("MLFLOW_REGISTRY_URI", database)
    name = "foxnas-at-once"
    versions = [register_version(tmp_path, name=name) for _ in range(3)]
    done = subprocess.run(
        [sys.executable, "-c", _PROMOTERS, name, *versions], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr
    client = mlflow.MlflowClient()
    (holder,) = (str(version) for version in client.get_registered_model(name).aliases.values())
    stages = {str(v.version): v.current_stage for v in client.search_model_versions(f"name='{name}'")}
    assert [version for version, stage in stages.items() if stage == "Production"] == [holder]
    history = StageKeeper(name).history("Production")
    assert history[-1].version == holder
    assert len({entry.since for entry in history}) == len(history)
