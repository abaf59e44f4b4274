"""The pipeline on a server that others use too: behind a login, its address with the password in it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.pipelines import Running, options
from tests.servers import ADMIN, login_server

pytestmark = [pytest.mark.server, pytest.mark.slow, pytest.mark.train, pytest.mark.tflite]


@dataclass(frozen=True)
class Done:
    """What a finished pipeline left.

    Attributes:
        url: Address of the server, with user and password.
        env: Environment of its users.
        home: All that the users have written, the store and the artifacts.
        output: What was printed.
    """

    url: str
    env: dict[str, str]
    home: Path
    output: str

    def foxnas(self, *argv: str) -> subprocess.CompletedProcess[str]:
        """Another command of the same user."""
        command = [sys.executable, "-m", "foxnas_mlflow", *argv]
        return subprocess.run(
            command, cwd=self.home / "user", env={**os.environ, **self.env}, text=True, capture_output=True
        )


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
        # Without a device: how busy this machine is changes nothing.
        running = Running([*options(user), "--device", "none"], env)
        status = running.end()
        output = "\n".join(running.lines)
        assert status == 0, output[-4000:]
        yield Done(url, env, home, output)


def test_no_password_is_written(done: Done) -> None:
    secret = "s3cr3t-of-a-board"
    device = f"ssh://pi:{secret}@127.0.0.1:1"
    failed = done.foxnas("benchmark", "--model", "models:/foxnas-cpu/1", "--device", device)
    assert failed.returncode == 2
    assert "an ssh address has no password; received ssh://pi:***@127.0.0.1:1" in failed.stderr
    debugged = done.foxnas("benchmark", "--model", "models:/foxnas-cpu/1", "--device", device, "--debug")
    assert "Traceback" in debugged.stderr
    told = done.foxnas("doctor")
    assert told.returncode == 0
    assert "answers in" in told.stdout
    for result in (failed, debugged, told):
        for word in (ADMIN[1], quote(ADMIN[1]), secret):
            assert word not in result.stdout + result.stderr
    assert "View run" in done.output  # MLflow's own line, with the address
    written = [path for path in done.home.rglob("*") if path.is_file() and path.name not in ("auth.ini", "auth.db")]
    assert {"report.html", "mlflow.db", "foxnas.json", "pipeline.json"} <= {path.name for path in written}
    for word in (ADMIN[1], quote(ADMIN[1]), secret):
        assert word not in done.output
        assert [path for path in written if word.encode() in path.read_bytes()] == []
