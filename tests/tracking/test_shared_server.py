"""The pipeline on a server that others use too: behind a login, its address with the password in it."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import mlflow
import pytest
import requests

from foxnas_mlflow.flavor import model_id_of
from foxnas_mlflow.tracking.registry import FACTS
from tests.pipelines import Running, options
from tests.servers import ADMIN, login_server

STAGES = ("supernet", "sample", "fit", "search", "quantize", "compare")

TARGET = "rpi4"
"""Its latencies are those of a cost model: how busy this machine is changes nothing."""

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.train, pytest.mark.tflite]


@dataclass(frozen=True)
class Done:
    """What a finished pipeline left.

    Attributes:
        server: Address of the server.
        env: Environment of its users.
        home: All that the users have written, the store and the artifacts.
        output: What was printed.
    """

    server: str
    env: dict[str, str]
    home: Path
    output: str

    def client(self, patch: pytest.MonkeyPatch) -> mlflow.MlflowClient:
        """The server as the user sees it."""
        for name, value in zip(("USERNAME", "PASSWORD"), ADMIN, strict=True):
            patch.setenv(f"MLFLOW_TRACKING_{name}", value)
        return mlflow.MlflowClient(self.server, self.server)

    def foxnas(self, *argv: str) -> tuple[int, str]:
        """Exit status and output of another command of the same user."""
        with contextlib.chdir(self.home / "user"):
            running = Running(argv, self.env)
        return running.end(), "\n".join(running.lines)


@pytest.fixture(scope="module")
def done(empty_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Done]:
    """A pipeline from images to gates."""
    home = tmp_path_factory.mktemp("shared")
    user = home / "user"
    user.mkdir()
    store = shutil.copy(empty_store, home / "mlflow.db")
    with login_server(f"sqlite:///{store}", home) as url:
        login = ":".join(quote(part, safe="") for part in ADMIN)
        env = {
            "MLFLOW_TRACKING_URI": url.replace("://", f"://{login}@"),
            "XDG_CACHE_HOME": str(user / "cache"),
            "MLFLOW_EXPERIMENT_NAME": "shared",
            "PYTHONPATH": os.getcwd(),
        }
        # Three at once, as from three hosts: with nothing in common but the server.
        running = [
            Running(
                ["main", *options(user), "--target", TARGET, "--device", "none"],
                {**env, "XDG_CACHE_HOME": str(user / f"cache-{i}")},
            )
            for i in range(3)
        ]
        statuses = [one.end() for one in running]
        output = "\n".join(line for one in running for line in one.lines)
        assert statuses == [0, 0, 0], [one.lines[-20:] for one in running]
        yield Done(url, env, home, output)


def test_of_three_pipelines_one_works_at_each_step(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    client = done.client(monkeypatch)
    experiment = client.get_experiment_by_name("shared")
    runs = client.search_runs([experiment.experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    steps = [run for run in runs if "foxnas.step_digest" in run.data.tags]
    assert {run.data.tags["foxnas.stage"] for run in steps} == set(STAGES)
    assert set(collections.Counter(run.data.tags["foxnas.step_digest"] for run in steps).values()) == {1}
    mains = [run for run in runs if run.data.tags["foxnas.stage"] == "main"]
    assert len(mains) == 3
    assert len({run.data.tags["foxnas.model"] for run in mains}) == 1
    assert "works on it; waiting for its result" in done.output
    # Another target and another name go on from the same supernet.
    argv = ["main", *options(done.home / "user"), "--target", "edgetpu", "--device", "none", "--name", "other"]
    other = Running(argv, done.env)
    try:
        assert other.begins("sample", seconds=300), other.lines[-20:]
        assert "== supernet: found, its inputs are unchanged" in "\n".join(other.lines)
    finally:
        other.kill(after_seconds=0)


def test_pages_tell_what_a_version_is(done: Done, monkeypatch: pytest.MonkeyPatch) -> None:
    client = done.client(monkeypatch)
    experiment = client.get_experiment_by_name("shared")
    runs = client.search_runs([experiment.experiment_id])
    names = {(run.info.run_name, run.data.tags["foxnas.stage"]) for run in runs}
    assert names >= {("supernet", "supernet"), *((f"{stage} {TARGET}", stage) for stage in ("main", *STAGES[1:]))}
    assert all(name.split()[0] == stage for name, stage in names)
    version = client.get_model_version(f"foxnas-{TARGET}", "1")
    size = json.loads(version.tags[FACTS])["input"]
    assert "| labels | 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 |" in version.description
    assert "px, grey" in size
    assert "| architecture | two @ " in version.description
    assert f"mlflow.pyfunc.load_model('models:/foxnas-{TARGET}/1')" in version.description
    # The picture's address is that of the server that shows the page.
    (address,) = re.findall(r"!\[front\]\((.*)\)", version.description)
    picture = requests.get(f"{done.server}/{address}", auth=ADMIN, timeout=60)
    assert picture.headers["Content-Type"] == "image/png"
    assert picture.content.startswith(b"\x89PNG")
    # Accuracies are of a data set, in the pages of the model too.
    model_id = model_id_of(version)
    assert model_id is not None
    metrics = {metric.key: metric for metric in client.get_logged_model(model_id).metrics}
    assert metrics["accuracy/int8_top1"].dataset_name == metrics["eval/balanced_accuracy_int8"].dataset_name == "digits"
    assert metrics["accuracy/int8_top1"].dataset_digest == version.tags["data_digest"][:36]
    assert metrics["model/size_bytes"].dataset_name is None
    # From a file back to the images, and from the images to all that came of them.
    subnet = client.get_model_version(*version.tags["subnet"].removeprefix("models:/").split("/"))
    assert subnet.tags["supernet"] == version.tags["supernet"] == "models:/foxnas-supernet/1"
    supernet = client.get_model_version("foxnas-supernet", "1")
    assert supernet.tags["data_digest"] == subnet.tags["data_digest"] == version.tags["data_digest"]
    predictors = client.get_model_version(*version.tags["predictors"].removeprefix("models:/").split("/"))
    assert predictors.tags["supernet"] == "models:/foxnas-supernet/1"
    assert predictors.tags["data_digest"] == supernet.tags["data_digest"]
    found = client.search_model_versions("tags.supernet = 'models:/foxnas-supernet/1'")
    assert {v.name for v in found} >= {f"foxnas-{kind}{TARGET}" for kind in ("", "subnet-", "predictors-")}


def test_no_password_is_written(done: Done) -> None:
    secret = "s3cr3t-of-a-board"
    device = f"ssh://pi:{secret}@127.0.0.1:1"
    failed = done.foxnas("benchmark", "--model", f"models:/foxnas-{TARGET}/1", "--device", device)
    assert failed[0] == 2
    assert "an ssh address has no password; received ssh://pi:***@127.0.0.1:1" in failed[1]
    debugged = done.foxnas("benchmark", "--model", f"models:/foxnas-{TARGET}/1", "--device", device, "--debug")
    assert "Traceback" in debugged[1]
    told = done.foxnas("doctor", "--timeout-s", "60")
    assert told[0] == 0
    assert "answers in" in told[1], told[1]
    for _, said in (failed, debugged, told):
        for word in (ADMIN[1], quote(ADMIN[1]), secret):
            assert word not in said
    assert "View run" in done.output  # MLflow's own line, with the address
    written = [path for path in done.home.rglob("*") if path.is_file() and path.name not in ("auth.ini", "auth.db")]
    assert {"report.html", "mlflow.db", "foxnas.json", "pipeline.json"} <= {path.name for path in written}
    for word in (ADMIN[1], quote(ADMIN[1]), secret):
        assert word not in done.output
        assert [path for path in written if word.encode() in path.read_bytes()] == []
