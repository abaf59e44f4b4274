"""The deployment target `edge` on this machine: real files, real runner processes."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

import foxnas_mlflow.deploy as plugin
from foxnas_mlflow import flavor, runtime
from foxnas_mlflow.cli.main import main
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.deploy import layout
from foxnas_mlflow.deploy._board import split_target
from foxnas_mlflow.deploy._bundle import Options, bundle, runner
from foxnas_mlflow.deploy.foxnas_edge import Version
from foxnas_mlflow.deploy.layout import RunnerError
from foxnas_mlflow.devices import LocalConnection, check, measure
from foxnas_mlflow.flavor import TfliteModel, model_id_of
from tests.colour_model import LABELS, SIZE, convert_colour_model, encoded, image_of
from tests.deploy.boards import board, needs_sshd, ssh_target
from tests.flavor.test_seal import deny_its_name, swap_labels
from tests.pipelines import Running
from tests.servers import request

pytestmark = pytest.mark.server


def labels_of(client: Any, name: str = "camera") -> list[str]:
    images = [encoded(image_of(colour)) for colour in LABELS]
    return client.predict(name, pd.DataFrame({"image": images})).get_predictions()["label"].tolist()


@pytest.mark.parametrize(
    ("details", "config", "threads"), [({}, {}, 1), ({"threads": 3}, {}, 3), ({"threads": 3}, {"threads": "2"}, 2)]
)
def test_threads_are_those_of_its_target(
    colour_model: TfliteModel, details: dict[str, Any], config: dict[str, Any], threads: int
) -> None:
    model = dataclasses.replace(colour_model, details=details)
    files = bundle(model, Options.from_config(config), name="camera", kind="tflite", source="file", model_id=None)
    assert json.loads(files["deployment.json"])["threads"] == threads


def test_the_smoke_test_knows_wrong_floats(colour_model: TfliteModel, tmp_path: Path) -> None:
    convert_colour_model(tmp_path / "floats.tflite", "float32")
    model = dataclasses.replace(colour_model, path=tmp_path / "floats.tflite")
    files = bundle(model, Options(), name="camera", kind="tflite", source="file", model_id=None)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    version = Version(tmp_path)
    assert version.try_out()["largest_difference"] == 0
    with np.load(tmp_path / "smoke.npz") as smoke:
        images, outputs = smoke["images"], smoke["outputs"]
    assert outputs.dtype == np.float32
    for wrong, refused in ((1.5e-3, False), (0.1, True), (float("nan"), True)):
        np.savez(tmp_path / "smoke.npz", images=images, outputs=outputs + np.float32(wrong))
        with pytest.raises(RunnerError, match="the outputs differ by") if refused else contextlib.nullcontext():
            assert version.try_out()["largest_difference"] > 0


def test_numpy_that_does_not_match_the_runtime_is_named(
    colour_model: TfliteModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = bundle(colour_model, Options(), name="camera", kind="tflite", source="file", model_id=None)
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)

    class Interpreter:
        def __init__(self, **_: object) -> None:
            raise wrong

    for wrong, kind in (
        (ImportError("numpy.core.multiarray failed to import"), "numpy"),
        (SystemError("returned a result with an error set"), "numpy"),
        (ValueError("Cannot set tensor: got NOTYPE"), "bad_model"),
        # The last release of tflite-runtime was built for NumPy 1.
        (ValueError("Cannot set tensor: got NOTYPE"), "numpy"),
    ):
        monkeypatch.setattr(runtime, "load_runtime", lambda: SimpleNamespace(Interpreter=Interpreter))
        with pytest.raises(RunnerError) as error:
            Version(tmp_path)
        assert error.value.kind == kind
        assert kind == "bad_model" or str(error.value) == f"NumPy {np.__version__}: {wrong}"
        if kind == "bad_model":
            monkeypatch.setitem(sys.modules, "tflite_runtime", ModuleType("tflite_runtime"))


def test_a_deployment_from_creation_to_deletion(versions: tuple[str, str], target: str, tmp_path: Path) -> None:
    first, second = versions
    client = get_deploy_client(target)
    assert client.list_deployments() == []
    created = client.create_deployment("camera", first)
    assert (created["name"], created["flavor"], created["version"]) == ("camera", "foxnas", "0001")
    # The alias may move on; the board says what it has.
    assert created["model_uri"] == "models:/foxnas-rpi4/1"
    assert created["previous"] is None
    assert created["smoke"]["images"] == 3
    assert created["smoke"]["largest_difference"] == 0
    assert labels_of(client) == list(LABELS)

    with pytest.raises(MlflowException, match="a name that is free"):
        client.create_deployment("camera", second)
    updated = client.update_deployment("camera", second, config={"threads": "2"})
    assert (updated["version"], updated["previous"], updated["threads"]) == ("0002", "models:/foxnas-rpi4/1", 2)
    assert labels_of(client) == ["rouge", "vert", "bleu"]
    assert client.list_deployments() == [updated]

    back = client.update_deployment("camera", config={"rollback": "true"})
    assert (back["version"], back["model_uri"]) == ("0001", "models:/foxnas-rpi4/1")
    assert labels_of(client) == list(LABELS)
    with pytest.raises(MlflowException, match="a rollback needs a version before"):
        client.update_deployment("camera", config={"rollback": "true"})

    client.update_deployment("camera", second)
    kept = sorted(path.name for path in (tmp_path / "board" / "camera" / "versions").iterdir())
    assert kept == ["0001", "0003"]
    client.delete_deployment("camera")
    client.delete_deployment("camera")
    assert client.list_deployments() == []
    with pytest.raises(MlflowException, match="there must be a deployment of that name"):
        client.get_deployment("camera")


def test_an_alias_that_moves_meanwhile_deploys_one_version(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, client = flavor.load_model, get_deploy_client(target)

    def moved(*arguments: Any) -> Any:
        mlflow.MlflowClient().set_registered_model_alias("foxnas-rpi4", "production", "2")
        return load(*arguments)

    monkeypatch.setattr(flavor, "load_model", moved)
    created = client.create_deployment("camera", versions[0], config={"serve": "false"})
    assert created["model_uri"] == "models:/foxnas-rpi4/1"
    assert labels_of(client) == list(LABELS)


def test_a_root_without_a_leading_slash_is_served_too(
    versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with board(Path("board")) as target:
        created = get_deploy_client(target).create_deployment("camera", versions[0])
        assert created["directory"] == str(tmp_path / "board" / "camera" / "current")
        assert created["service"]["state"] == "running"


def test_directories_that_others_may_enter_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be another account's, and then nobody else may change their mode."""
    chmod, changes = Path.chmod, list[int]()

    def change(path: Path, mode: int) -> None:
        changes.append(stat.S_IMODE(mode))
        chmod(path, mode)

    for before, after in ((0o700, 0o755), (0o775, 0o775)):
        tmp_path.chmod(before)
        # Their time of change would not tell: it is that of the kernel's last tick.
        with monkeypatch.context() as patch:
            patch.setattr(Path, "chmod", change)
            layout.let_in(tmp_path)
        assert stat.S_IMODE(tmp_path.stat().st_mode) == after
    assert changes == [0o755]


def test_the_board_answers_as_the_pyfunc_does(versions: tuple[str, str], target: str, tmp_path: Path) -> None:
    client = get_deploy_client(target)
    directory = Path(client.create_deployment("camera", versions[0])["directory"])
    images = [encoded(image_of(colour, seed=7)) for colour in LABELS]
    expected = mlflow.pyfunc.load_model(versions[0]).predict(pd.DataFrame({"image": images}))
    pixels = np.stack([image_of(colour, height=SIZE, width=SIZE) for colour in LABELS])
    texts = [base64.b64encode(image).decode() for image in images]
    for inputs in (pd.DataFrame({"image": images}), {"image": texts}):
        rows = client.predict("camera", inputs)["predictions"]
        assert [row["probabilities"] for row in rows] == expected["probabilities"].tolist()
        assert [row["rejected"] for row in rows] == expected["rejected"].tolist()
    grey = np.full((1, SIZE, SIZE, 3), 128, np.uint8)
    (row,) = client.predict("camera", grey)["predictions"]
    assert row["rejected"]
    assert not expected["rejected"].any()
    for inputs in (pixels, pixels / np.float32(255)):
        assert [row["label"] for row in client.predict("camera", inputs)["predictions"]] == list(LABELS)
    # On the board itself, without MLflow.
    photo = tmp_path / "photo.jpg"
    photo.write_bytes(images[2])
    command = [sys.executable, str(directory / "runner.pyz"), "classify", str(photo)]
    done = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(done.stdout)["predictions"][0]["label"] == "blue"
    for wrong, words in (
        ({"picture": texts}, "must have the column 'image'"),
        ({"image": [b"no image"]}, "must be a whole JPEG or PNG"),
        (pixels[:, :8], "must be a whole JPEG or PNG, or an array of the network's input shape"),
    ):
        with pytest.raises(MlflowException, match=words):
            client.predict("camera", wrong)


@pytest.mark.parametrize("step", ["model.tflite", "deployment.json"])
def test_an_interrupted_copy_leaves_the_old_version(
    versions: tuple[str, str], target: str, step: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    client = get_deploy_client(target)
    before = client.create_deployment("camera", versions[0])
    put = LocalConnection.put

    def cut(self: LocalConnection, data: bytes, path: str) -> None:
        if path.endswith(step):
            put(self, data[: len(data) // 2], path)
            raise ConnectionLostError("the connection to local was lost")
        put(self, data, path)

    with monkeypatch.context() as patched:
        patched.setattr(LocalConnection, "put", cut)
        with pytest.raises(MlflowException, match="connection to local was lost"):
            client.update_deployment("camera", versions[1])
        with pytest.raises(MlflowException, match="connection to local was lost"):
            client.create_deployment("door", versions[1])
    assert client.get_deployment("camera") == before
    assert labels_of(client) == list(LABELS)
    assert [deployment["name"] for deployment in client.list_deployments()] == ["camera"]
    assert client.create_deployment("door", versions[1])["version"] == "0001"


def test_what_arrives_otherwise_than_sent_is_refused(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = get_deploy_client(target)
    before = client.create_deployment("camera", versions[0])
    put = LocalConnection.put
    for name in ("model.tflite", "deployment.json"):

        def flip(self: LocalConnection, data: bytes, path: str, name: str = name) -> None:
            damaged = bytes([data[-9] ^ 1])
            put(self, data[:-9] + damaged + data[-8:] if path.endswith(name) else data, path)

        with monkeypatch.context() as patched:
            patched.setattr(LocalConnection, "put", flip)
            with pytest.raises(MlflowException, match=f"must arrive .* received {name}"):
                client.update_deployment("camera", versions[1])
    assert client.get_deployment("camera") == before


def test_a_board_that_answers_otherwise_is_refused(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from foxnas_mlflow.deploy import _bundle

    raw = _bundle.Classifier.raw
    monkeypatch.setattr(_bundle.Classifier, "raw", lambda self, image: raw(self, image) + np.int8(3))
    client = get_deploy_client(target)
    with pytest.raises(MlflowException, match="must answer as this host does; received the outputs differ by 3"):
        client.create_deployment("camera", versions[0])
    assert client.list_deployments() == []
    assert list((tmp_path / "board" / "camera").iterdir()) == []
    assert client.create_deployment("camera", versions[0], config={"tolerance": "3"})["name"] == "camera"


def test_two_updates_at_once_leave_one_active_version(versions: tuple[str, str], target: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    client = get_deploy_client(target)
    client.create_deployment("camera", versions[0])
    with ThreadPoolExecutor(3) as threads:
        updates = list(threads.map(lambda uri: client.update_deployment("camera", uri), [versions[1]] * 3))
    active = client.get_deployment("camera")
    assert active["version"] == "0004"
    assert sorted(update["version"] for update in updates) == ["0002", "0003", "0004"]
    assert client.update_deployment("camera", config={"rollback": "true"})["version"] == "0003"


@pytest.mark.parametrize(
    ("name", "uri", "config", "words"),
    [
        ("../door", "models:/foxnas-rpi4/1", {}, "1 to 64 letters"),
        ("camera", "models:/foxnas-rpi4/1", {"thread": "1"}, "only the keys"),
        ("camera", "models:/foxnas-rpi4/1", {"threads": "many"}, "must be numbers"),
        ("camera", "models:/foxnas-rpi4/1", {"port": "70000"}, "port must be in 1..65535"),
        ("camera", "models:/foxnas-rpi4/1", {"serve": "maybe"}, "serve must be true or false"),
        ("camera", "models:/foxnas-rpi4/1", {"account": "nobody-here"}, "there is none of that name"),
        ("camera", "models:/foxnas-rpi4/1", {"threads": "0"}, "1 or more"),
        ("camera", "models:/foxnas-rpi4/1", {"delegate": "libnone.so"}, "delegate .* cannot be loaded"),
        ("camera", "models:/foxnas-rpi4/9", {}, "not found"),
    ],
)
def test_bad_input(versions: tuple[str, str], target: str, name: str, uri: str, config: Any, words: str) -> None:
    client = get_deploy_client(target)
    with pytest.raises(MlflowException, match=words):
        client.create_deployment(name, uri, config=config)
    assert client.list_deployments() == []


def test_updates_that_contradict_themselves(versions: tuple[str, str], target: str) -> None:
    client = get_deploy_client(target)
    with pytest.raises(MlflowException, match="a deployment of that name"):
        client.update_deployment("camera", versions[0])
    with pytest.raises(MlflowException, match="a deployment of that name"):
        client.update_deployment("camera", config={"rollback": "true"})
    for uri, config in ((None, {}), (versions[0], {"rollback": "true"}), (None, {"rollback": "yes"})):
        with pytest.raises(MlflowException, match="rollback"):
            client.update_deployment("camera", uri, config=config)


def test_targets() -> None:
    assert split_target("edge://local") == ("local", "~/.foxnas/deployments")
    assert split_target("edge://pi@board:2222?python=~/v/bin/python&root=/srv/models") == (
        "ssh://pi@board:2222?python=~/v/bin/python",
        "/srv/models",
    )
    for wrong in ("edge", "edge://", "edge://pi@board/path", "edge://local?python=python3"):
        with pytest.raises(DeviceError, match="edge://local"):
            split_target(wrong)


def test_the_command_line(versions: tuple[str, str], target: str, tmp_path: Path) -> None:
    from click.testing import CliRunner
    from mlflow.deployments.cli import commands

    request = tmp_path / "images.json"
    request.write_text(json.dumps({"image": [base64.b64encode(encoded(image_of("green"))).decode()]}))

    def deployments(*arguments: str) -> str:
        done = CliRunner().invoke(commands, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0
        return done.output

    named = ("-t", target, "--name", "camera")
    assert "edge://user@host[:port]" in deployments("help", "-t", "edge")
    assert "foxnas deployment camera is created" in deployments("create", *named, "-m", versions[0])
    assert '"label":"green"' in deployments("predict", *named, "-I", str(request)).replace(" ", "")
    assert "is updated" in deployments("update", *named, "-m", versions[1], "-C", "threads=2")
    assert "'threads': 2" in deployments("list", "-t", target)
    assert "version: 0002" in deployments("get", *named)
    assert "is updated" in deployments("update", *named, "-C", "rollback=true")
    assert "version: 0001" in deployments("get", *named)
    assert "is deleted" in deployments("delete", *named)
    assert "camera" not in deployments("list", "-t", target)


def test_a_local_run(
    versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with board(tmp_path / "home" / ".foxnas" / "deployments"):
        mlflow.deployments.run_local("edge", "camera", versions[0])
        said = capsys.readouterr().out
        assert f"{tmp_path}/home/.foxnas/deployments/camera/current" in said
        assert "it is served at http://127.0.0.1:" in said
        assert labels_of(get_deploy_client("edge://local")) == list(LABELS)


def test_the_plugin_is_as_mlflow_wants_it() -> None:
    assert "edge" in mlflow.deployments.interface.plugin_store.registry
    assert mlflow.deployments.interface._target_help("edge") == plugin.target_help()
    code = "import sys, foxnas_mlflow.deploy; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"asyncssh", "ai_edge_litert", "PIL"} & set(done.stdout.split())
    assert runner() == runner()


def python_with(directory: Path, *names: str) -> str:
    """A Python that has some packages of this one, and no others."""
    import venv

    venv.create(directory, symlinks=True)
    (packages,) = directory.glob("lib/python*/site-packages")
    for name in names:
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        path = Path(spec.origin).parent if spec.submodule_search_locations else Path(spec.origin)
        for found in (path, path.with_name(f"{name}.libs")):
            if found.exists():
                (packages / found.name).symlink_to(found)
    return str(directory / "bin" / "python")


def test_a_board_without_pillow(
    versions: tuple[str, str], target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    measures = ("numpy", "ai_edge_litert", "flatbuffers", "typing_extensions")
    monkeypatch.setattr(LocalConnection, "python", python_with(tmp_path / "venv", *measures))
    with LocalConnection() as connection:
        found = check(connection)
    assert found.ready
    assert found.pillow == ""
    assert any("pip install Pillow" in note for note in found.notes)
    client = get_deploy_client(target)
    # The test at the deployment is made with arrays.
    created = client.create_deployment("camera", versions[0])
    assert created["smoke"]["largest_difference"] == 0
    assert not created["decodes_images"]
    # This host decodes for it.
    assert labels_of(client) == list(LABELS)
    photo, pixels = tmp_path / "photo.jpg", tmp_path / "pixels.npy"
    photo.write_bytes(encoded(image_of("blue")))
    np.save(pixels, image_of("blue", height=SIZE, width=SIZE))

    def classify(path: Path) -> dict[str, Any]:
        command = [LocalConnection.python, str(Path(created["directory"]) / "runner.pyz"), "classify", str(path)]
        done = subprocess.run(command, capture_output=True, check=False, text=True)
        (line,) = done.stdout.splitlines()
        assert done.returncode == (3 if "error" in json.loads(line) else 0)
        return json.loads(line)

    assert classify(pixels)["predictions"][0]["label"] == "blue"
    refused = classify(photo)
    assert refused["error"] == "no_pillow"
    assert refused["message"] == (
        f"decoding JPEG and PNG needs Pillow 8 or newer, which {LocalConnection.python} lacks; install it with: "
        f"{LocalConnection.python} -m pip install --upgrade Pillow, or give .npy files of shape {(SIZE, SIZE, 3)}"
    )


@pytest.mark.parametrize(
    ("names", "words", "lacks"),
    [
        ((), "received NumPy: No module named 'numpy'", "NumPy"),
        (("numpy",), "received running a TFLite model needs one of the packages", "ai-edge-litert or tflite-runtime"),
    ],
)
def test_a_board_without_a_runtime(
    versions: tuple[str, str],
    target: str,
    names: tuple[str, ...],
    words: str,
    lacks: str,
    colour_model: TfliteModel,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    client = get_deploy_client(target)
    before = client.create_deployment("camera", versions[0])
    monkeypatch.setattr(LocalConnection, "python", python_with(tmp_path / "venv", *names))
    with pytest.raises(MlflowException, match=words) as caught:
        client.update_deployment("camera", versions[1])
    assert "lacks what the runner needs" in str(caught.value)
    assert "pip install numpy ai-edge-litert Pillow" in str(caught.value)
    with LocalConnection() as connection:
        assert any("pip install" in text for text in check(connection).missing)
        with pytest.raises(DeviceError, match=f"must have {lacks}.*pip install"):
            measure(connection, colour_model.path.read_bytes(), runs=1, warmup=1)
    monkeypatch.undo()
    assert get_deploy_client(target).get_deployment("camera") == before
    assert not list(tmp_path.glob("board/camera/.incoming-*"))


def test_what_was_changed_with_its_checksums_is_neither_deployed_nor_promoted(
    versions: tuple[str, str], target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    client, board_of = mlflow.MlflowClient(), get_deploy_client(target)
    version = client.get_model_version("foxnas-rpi4", "1")
    model_id = model_id_of(version)
    (file,) = tmp_path.glob(f"mlruns/**/{model_id}/artifacts/MLmodel")
    swap_labels(file.parent)
    # Whatever else is edited, in the registry and beside the files: they no longer say which model they are.
    deny_its_name(file.parent)
    digest = hashlib.sha256((file.parent / "data" / "foxnas.json").read_bytes()).hexdigest()
    client.update_model_version(version.name, version.version, description=f"sealed with {digest}")
    for key in ("foxnas.manifest_sha256", "sha256"):
        client.set_model_version_tag(version.name, version.version, key, digest)
        client.set_logged_model_tags(str(model_id), {key: digest})
    client.copy_model_version("models:/foxnas-rpi4/1", "shelf")
    for uri in (f"models:/{model_id}", "models:/foxnas-rpi4/1", versions[0], "models:/shelf/1"):
        with pytest.raises(MlflowException, match="changed together with their checksums"):
            board_of.create_deployment("camera", uri)
    assert board_of.list_deployments() == []
    # A version in production is not promoted to staging, whatever it is.
    client.delete_registered_model_alias("foxnas-rpi4", "production")
    assert main(["promote", "--model", "models:/foxnas-rpi4/1"]) == 2
    assert "changed together with their checksums" in capsys.readouterr().err


@needs_sshd
def test_a_board_behind_ssh(versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ssh_target(tmp_path, monkeypatch) as (target, _):
        client = get_deploy_client(target)
        created = client.create_deployment("camera", versions[0])
        assert created["smoke"]["largest_difference"] == 0
        # The command over ssh is done; the service goes on.
        assert request(f"{created['service']['url']}/ping") == (200, "\n")
        assert client.update_deployment("camera", versions[1])["version"] == "0002"
        assert labels_of(client) == ["rouge", "vert", "bleu"]
        assert client.update_deployment("camera", config={"rollback": "true"})["version"] == "0001"
        assert labels_of(client) == list(LABELS)
        assert client.get_deployment("camera")["service"]["version"] == "0001"
        client.delete_deployment("camera")
        assert client.list_deployments() == []
        with pytest.raises(OSError, match="refused"):
            request(f"{created['service']['url']}/ping")


@needs_sshd
@pytest.mark.slow
def test_a_copy_that_is_cut_off_changes_nothing(
    versions: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host is killed in the middle of a model; then the cable is pulled."""
    slow, board = tmp_path / "slow", tmp_path / "board"
    with ssh_target(tmp_path, monkeypatch, slow=slow) as (target, server):
        client = get_deploy_client(target)
        before = client.create_deployment("camera", versions[0])
        for name, verb, cut in (
            ("camera", "update", "host"),
            ("door", "create", "cable"),
        ):
            slow.touch()
            # What `mlflow deployments` runs.
            argv = [verb, "-t", target, "--name", name, "-m", versions[1]]
            host = Running(argv, command="mlflow.deployments.cli:commands")
            half = await_half_a_model(board / name, host)
            if cut == "host":
                assert host.kill(after_seconds=0)
            else:
                server.stop()
                assert host.end() != 0
                # Where it was cut, or, if the host asked once more, that nobody listens there.
                said = host.lines[-1]
                assert "the connection to ssh://" in said or "an ssh server must listen at ssh://" in said
                server.start()
            slow.unlink()
            # On the board itself nothing but whole versions is found.
            done = subprocess.run(
                [sys.executable, str(board / "camera" / "current" / "runner.pyz"), "list", str(board)],
                capture_output=True,
                check=True,
            )
            assert [d["version"] for d in json.loads(done.stdout)["deployments"]] == ["0001"]
            assert client.get_deployment("camera") == before
            assert labels_of(client) == list(LABELS)
            assert half.stat().st_size == 512
            # It is taken for a copy of an earlier start of the board: one of this start is kept for an hour.
            mark, boot, rest = half.parent.name.split("-", 2)
            half.parent.rename(half.parent.with_name(f"{mark}-{'0' * len(boot)}-{rest}"))
        # A version that was copied, and not made active before the power went.
        shutil.copytree(board / "camera" / "versions" / "0001", board / "camera" / "versions" / "0007")
        assert client.create_deployment("door", versions[1])["version"] == "0001"
        assert client.update_deployment("camera", versions[1])["version"] == "0008"
        assert labels_of(client) == ["rouge", "vert", "bleu"]
        assert sorted(path.name for path in (board / "camera" / "versions").iterdir()) == ["0001", "0008"]
        assert not list(board.glob("*/.incoming-*"))


def await_half_a_model(place: Path, host: Running) -> Path:
    """The newest model that is being copied to a deployment."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and host.process.is_alive():
        for path in place.glob(".incoming-*/model.tflite"):
            if path.stat().st_mtime > 0 and path.stat().st_size == 512:
                return path
        time.sleep(0.02)
    raise AssertionError(host.lines)
