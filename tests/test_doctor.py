"""What `foxnas doctor` tells of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.workflows import WORKFLOWS
from foxnas_mlflow.workflows.doctor import NEEDS
from tests.servers import free_port


class Version(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        found = self.path == "/version"
        self.send_response(200 if found else 404)
        self.end_headers()
        self.wfile.write(b"3.17.2" if found else b"")

    def log_message(self, *args: object) -> None:
        pass


def test_it_names_what_each_command_lacks_and_imports_nothing(root: Path) -> None:
    # Without site-packages nothing beyond Python itself is installed.
    result = subprocess.run(
        [sys.executable, "-S", "-m", "foxnas_mlflow", "doctor"], cwd=root, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[1].strip(): line for line in result.stdout.splitlines() if line.startswith("  ")}
    assert "lacks statsmodels, matplotlib: pip install 'foxnas-mlflow[fit]'" in lines["fit"]
    assert (
        "lacks torch, safetensors, scikit-learn, Pillow, matplotlib: pip install 'foxnas-mlflow[train]'"
        in lines["supernet"]
    )
    assert "ready" in lines["promote"]
    assert result.stdout.splitlines()[-1].startswith("Next: pip install 'foxnas-mlflow[")


def test_it_knows_every_command() -> None:
    assert {workflow.name for workflow in WORKFLOWS if workflow.entry_point} | {"sign", "executor=ray"} <= set(NEEDS)


def test_it_asks_the_tracking_server(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), Version) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
        assert main(["doctor", "--timeout-s", "60"]) == 0
        out = capsys.readouterr().out
        assert "MLflow 3.17.2 answers" in out
        assert "but its models answer with status 501" in out
        monkeypatch.setattr(Version, "do_POST", Version.do_GET, raising=False)
        assert main(["doctor", "--timeout-s", "60"]) == 0
        assert "but cannot store models: it needs MLflow 3" in capsys.readouterr().out
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}/elsewhere")
        assert main(["doctor", "--timeout-s", "60"]) == 0
        assert "answers with status 404" in capsys.readouterr().out
        server.shutdown()
        thread.join()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    assert main(["doctor", "--timeout-s", "1"]) == 0
    assert "does not answer" in capsys.readouterr().out


def test_it_looks_at_local_stores_and_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "foxnas_mlflow" / "samples" / "x").mkdir(parents=True)
    for name, expected in (("there.db", "0.0 MiB, writable"), ("new.db", "made by the first run")):
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / name}")
        (tmp_path / "there.db").touch()
        assert main(["doctor"]) == 0
        out = capsys.readouterr().out
        assert f"{tmp_path / name}, {expected}" in out
        assert "1 unfinished samples" in out
    assert not (tmp_path / "new.db").exists()
    # Without an address MLflow takes a folder of runs that is there.
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    monkeypatch.chdir(tmp_path)
    for expected in (tmp_path / "mlflow.db", tmp_path / "mlruns"):
        assert main(["doctor"]) == 0
        assert f"{expected}, " in capsys.readouterr().out
        (tmp_path / "mlruns" / "0").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mlruns" / "0" / "meta.yaml").touch()
    assert os.listdir(tmp_path / "foxnas_mlflow") == ["samples"]
    assert main(["doctor", "--timeout-s", "0"]) == 2
