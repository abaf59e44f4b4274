"""What is said of what goes wrong around the work: the address, the store, the environment, the names."""

from __future__ import annotations

import configparser
import importlib.util
import re
import shutil
from pathlib import Path

import mlflow
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import load_dataset
from foxnas_mlflow.flavor import get_default_pip_requirements
from foxnas_mlflow.tracking.registry import registered_name
from tests.servers import tracking_server


@pytest.mark.slow
@pytest.mark.server
def test_a_host_name_that_the_server_does_not_know_is_no_missing_right(
    empty_store: Path,
    tracking: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = shutil.copy(empty_store, tmp_path / "served.db")
    options = ["--allowed-hosts", "mlflow.example.org"]
    with tracking_server(f"sqlite:///{store}", str(tmp_path), log=tmp_path / "log", options=options) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        assert main(["promote", "--model", "models:/foxnas-cpu/1"]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
        assert line == (
            f"foxnas: the tracking server does not know the host name in {url}; start it with --allowed-hosts NAME."
        )


def test_a_relative_path_is_told_with_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=re.escape(f"received images, which is not in {tmp_path}")):
        load_dataset("images")
    with pytest.raises(InvalidInputError, match="received s3://bucket/images; copy the images to this machine first"):
        load_dataset("s3://bucket/images")


@pytest.mark.server
def test_a_relative_store_is_told_with_its_place(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rel.db").mkdir()
    for uri in ("sqlite:///rel.db",):
        mlflow.set_tracking_uri(uri)
        assert main(["search", "--latency-ms", "60"]) == 2
        assert f"received {uri}: {tmp_path / 'rel.db'}; " in capsys.readouterr().err


@pytest.mark.server
@pytest.mark.skipif(importlib.util.find_spec("psutil") is not None, reason="psutil is installed")
def test_system_metrics_without_their_package_begin_no_run(
    tracking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    assert main(["search", "--latency-ms", "60"]) == 2
    assert "needs the package 'psutil', which is not installed; install it with: pip" in capsys.readouterr().err
    assert mlflow.MlflowClient().search_runs(["0"]) == []


@pytest.mark.parametrize("prefix", ["", " ", "a ", " a", "a/b", "a:b"])
def test_a_name_that_is_none_is_refused_for_every_kind(prefix: str) -> None:
    for kind in ("supernet", "predictors", "subnet", "tflite", "edgetpu"):
        with pytest.raises(InvalidInputError, match="a registered model's name"):
            registered_name(prefix, kind, "rpi4")


def test_the_extra_serve_brings_what_models_for_serving_require(root: Path) -> None:
    setup = configparser.ConfigParser()
    setup.read(root / "setup.cfg")
    lines = f"{setup['options']['install_requires']}\n{setup['options.extras_require']['serve']}".splitlines()
    names = {re.split(r"[\[<>=;!~ ]", line)[0].lower() for line in lines}
    needed = {requirement.partition("==")[0].lower() for requirement in get_default_pip_requirements("tflite")}
    assert needed - {"mlflow"} <= names
