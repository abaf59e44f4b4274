"""What is said of what goes wrong around the work: the address, the store, the environment, the names."""

from __future__ import annotations

import configparser
import re
import shlex
import shutil
import sys
from pathlib import Path

import mlflow
import numpy as np
import pytest
from click.testing import CliRunner
from mlflow.store.artifact import cli as artifacts
from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
from PIL import Image

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import FoxNasError, InvalidInputError, UnknownTargetError
from foxnas_mlflow.core.measurements import read_measurements
from foxnas_mlflow.core.predictors import load_predictors
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target, get_target
from foxnas_mlflow.data import load_dataset
from foxnas_mlflow.flavor import get_default_pip_requirements
from foxnas_mlflow.tracking.quantize import benchmark_command
from foxnas_mlflow.tracking.registry import registered_name
from tests.servers import s3, tracking_server


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
    options = ["--allowed-hosts", "mlflow.example.org,localhost:*"]
    with tracking_server(f"sqlite:///{store}", str(tmp_path), log=tmp_path / "log", options=options) as url:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", url)
        mlflow.set_tracking_uri(url)
        mlflow.set_registry_uri(url)
        assert main(["promote", "--model", "models:/foxnas-cpu/1"]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
        assert line == (
            f"foxnas: the tracking server does not know the host name in {url}; start it with --allowed-hosts NAME."
        )
        assert main(["doctor", "--timeout-s", "60"]) == 0
        assert "know the host name in this address: start it with --allowed-hosts NAME" in capsys.readouterr().out
        # A token in the place of the user is printed nowhere, not by MLflow either, and kept nowhere.
        token = "t0ken-of-a-server"
        with_token = url.replace("://127.0.0.1", f"://{token}@localhost")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", with_token)
        mlflow.set_tracking_uri(with_token)
        mlflow.set_registry_uri(with_token)
        assert main(["search", "--latency-ms", "60", "--evaluations", "200"]) == 0
        captured = capsys.readouterr()
        assert mlflow.MlflowClient().get_model_version("foxnas-subnet-rpi4", "1").run_id in captured.out
        assert token not in captured.out + captured.err
    assert [path for path in tmp_path.rglob("*") if path.is_file() and token.encode() in path.read_bytes()] == []


def test_a_relative_path_is_told_with_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=re.escape(f"received images, which is not in {tmp_path}")):
        load_dataset("images")
    monkeypatch.setenv("MLFLOW_RUN_ID", "0123abcd")
    with pytest.raises(InvalidInputError, match="works in the project's directory: give an absolute path"):
        load_dataset("images")
    for uri in ("s3://bucket/images", "mlflow-artifacts:/images"):
        with pytest.raises(InvalidInputError, match=f"received {uri}; copy .*: mlflow artifacts download .* {uri} --"):
            load_dataset(uri)
    for read in (get_target, SearchSpace.from_yaml, load_predictors, read_measurements):
        for name in ("rows.yaml", "/nowhere/rows.yaml"):
            place = name if name.startswith("/") else f"{name} in {tmp_path}"
            with pytest.raises(FoxNasError, match=re.escape(f"received {place}: No such file or directory")):
                read(name)


def test_a_target_of_ones_own_takes_no_name_that_is_built_in(tmp_path: Path) -> None:
    """Its machines would be any."""
    path = tmp_path / "mine.yaml"
    path.write_text("name: rpi4\n")
    with pytest.raises(UnknownTargetError, match=r"has a name of its own.*which names the built-in target rpi4"):
        get_target(str(path))


@pytest.mark.parametrize("key", ["description", "space", "runtime", "device", "predictors", "latency_note", "machine"])
def test_a_key_of_a_target_is_text_or_empty(key: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(f"name: mine\n{key}:\n")
    assert get_target(str(path)) == Target("mine")
    path.write_text(f"name: mine\n{key}: 4\n")
    with pytest.raises(UnknownTargetError, match=f"a target's {key} must be text; received 4; put quotes"):
        get_target(str(path))


def test_a_target_of_ones_own_is_named_by_its_file(tmp_path: Path) -> None:
    path = tmp_path / "my board.yaml"
    path.write_text("name: my-board\nruntime: edgetpu\n")
    target = get_target(str(path))
    assert "file" not in target.to_dict()
    assert Target.from_dict(target.to_dict()) == target
    with pytest.raises(UnknownTargetError, match="only the keys"):
        Target.from_dict({"name": "my-board", "file": "my-board.yaml"})
    for kind, named, words in (
        ("edgetpu", target, f"'{path}' --device ssh://user@board"),
        ("tflite", target, "cpu"),
        # It has no device of its own, and a benchmark without one is refused.
        ("tflite", get_target("rpi4"), "rpi4 --device ssh://user@board"),
        ("tflite", get_target("cpu"), "cpu"),
    ):
        command = benchmark_command("models:/mine/1", kind, named)
        assert command == f"foxnas benchmark --model models:/mine/1 --target {words}"


@pytest.mark.server
def test_data_elsewhere_is_copied_by_the_command_that_the_refusal_names(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "two words"
    for label in ("dark", "light"):
        (folder / label).mkdir(parents=True)
        for i in range(4):
            level = i + 200 * (label == "light")
            Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(folder / label / f"{i}.png")
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(folder), "images")
    dataset = load_dataset(folder.as_uri())
    assert "%20" in folder.as_uri()
    assert dataset.labels == ("dark", "light")
    with s3(log=tmp_path / "s3.log") as env:
        for key, value in env.items():
            monkeypatch.setenv(key, value)
        get_artifact_repository("s3://models/of/images").log_artifacts(str(folder))
        for uri in (f"runs:/{run.info.run_id}/images", "s3://models/of/images"):
            with pytest.raises(InvalidInputError) as error:
                load_dataset(uri)
            (command,) = re.findall(r"mlflow artifacts (download .* images),", str(error.value))
            done = CliRunner().invoke(artifacts.commands, shlex.split(command))
            assert done.exit_code == 0, done.output
            (copied,) = (tmp_path / "images").rglob("dark")
            assert load_dataset(str(copied.parent)).digest == dataset.digest
            shutil.rmtree(tmp_path / "images")


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
def test_system_metrics_without_their_package_begin_no_run(
    tracking: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
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
