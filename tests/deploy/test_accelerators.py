"""Deployments on accelerators that one process has to itself; a library with libedgetpu's interface stands in."""

from __future__ import annotations

import dataclasses
import fcntl
from pathlib import Path

import mlflow
import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.deploy._board import split_target
from foxnas_mlflow.deploy.foxnas_edge import Version
from foxnas_mlflow.deploy.layout import RunnerError, current, read_json, write_json
from foxnas_mlflow.deploy.runner import serving
from foxnas_mlflow.flavor import TfliteModel, log_model
from foxnas_mlflow.tflite import require_compiler
from tests.colour_model import LABELS, encoded, image_of
from tests.deploy.test_service import Clients, counted, send
from tests.servers import request

pytestmark = [pytest.mark.server, pytest.mark.usefixtures("edgetpu")]


@pytest.fixture
def sticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where a file is a stick; there is one, usb:0."""
    directory = tmp_path / "sticks"
    directory.mkdir()
    (directory / "usb:0").touch()
    monkeypatch.setenv("STAND_IN_STICKS", str(directory))
    return directory


@pytest.fixture
def compiled(sticks: Path, tracking: str, colour_model: TfliteModel, tmp_path: Path) -> tuple[str, str]:
    """Two versions for an Edge TPU; the second one has its labels in another language."""
    path = tmp_path / "colour_edgetpu.tflite"
    path.write_bytes(require_compiler().compile(colour_model.path.read_bytes()))
    model = dataclasses.replace(colour_model, path=path, fallback=colour_model.path)
    for labels in (LABELS, ("rouge", "vert", "bleu")):
        with mlflow.start_run():
            log_model(
                dataclasses.replace(model, labels=labels),
                name="model",
                registered_model_name="foxnas-coral",
                code_paths=[],
            )
    return "models:/foxnas-coral/1", "models:/foxnas-coral/2"


def test_one_stick_is_handed_over_without_a_lost_request(
    compiled: tuple[str, str], target: str, tmp_path: Path
) -> None:
    client, root = get_deploy_client(target), tmp_path / "board"
    created = client.create_deployment("camera", compiled[0])
    service = created["service"]
    assert (created["kind"], created["delegate"]) == ("edgetpu", "libedgetpu.so.1")
    with Clients(service, 2) as clients:
        for config in ({}, {"rollback": "true"}, {}):
            clients.wait_for(30)
            client.update_deployment("camera", None if config else compiled[1], config=config)
        clients.wait_for(30)
        # A second worker has no stick: nothing is left to the processor, and what was served still is.
        with pytest.raises(MlflowException, match=r"one process has it to itself.*workers=1 for one accelerator"):
            client.update_deployment("camera", compiled[0], config={"workers": "2"})
        clients.wait_for(30)
    assert clients.wrong == []
    assert set(clients.answers) == {"0001", "0002", "0003"}
    assert counted(service["url"])["foxnas_switches_total"] == 3
    assert serving(root, "camera")["version"] == "0003"
    # What asks for an answer need not have the stick; what wants it for itself is refused.
    rows = client.predict(
        "camera", {"image": [image_of("blue", height=32, width=32).tolist(), encoded(image_of("red"))]}
    )
    assert [row["label"] for row in rows["predictions"]] == ["bleu", "rouge"]
    with pytest.raises(MlflowException, match=r"an accelerator of local must be free.*no device answered"):
        client.create_deployment("door", compiled[0])
    assert send(service["url"], "image/jpeg", encoded(image_of("blue")))[1]["predictions"][0]["label"] == "bleu"


def test_a_stick_that_was_unplugged_is_found_again(compiled: tuple[str, str], sticks: Path, target: str) -> None:
    url = get_deploy_client(target).create_deployment("camera", compiled[0])["service"]["url"]
    image = encoded(image_of("blue"))
    assert (send(url, "image/jpeg", image)[0], request(url + "/ping")[0]) == (200, 200)
    (sticks / "usb:0").unlink()
    for _ in range(2):
        assert send(url, "image/jpeg", image)[0] == 500
        assert request(url + "/ping")[0] == 503
    (sticks / "usb:0").touch()
    assert (send(url, "image/jpeg", image)[0], request(url + "/ping")[0]) == (200, 200)


def test_of_several_sticks_one_is_named(compiled: tuple[str, str], sticks: Path, target: str) -> None:
    client = get_deploy_client(target)
    (sticks / "usb:1").touch()
    with (sticks / "usb:1").open("rb+") as taken:
        fcntl.flock(taken, fcntl.LOCK_EX)
        for stick in ("usb:1", "usb:2"):
            with pytest.raises(MlflowException, match=rf"no device answered to libedgetpu\.so\.1@{stick}"):
                client.create_deployment("camera", compiled[0], config={"delegate": f"libedgetpu.so.1@{stick}"})
    for name, stick in (("camera", "usb:1"), ("door", "usb:0")):
        config = {"delegate": f"libedgetpu.so.1@{stick}"}
        assert client.create_deployment(name, compiled[0], config=config)["service"]["state"] == "running"
    client.delete_deployment("door")
    answer = send(client.get_deployment("camera")["service"]["url"], "image/jpeg", encoded(image_of("red")))
    assert answer[1]["predictions"][0]["label"] == "red"


def test_a_target_names_no_stick() -> None:
    with pytest.raises(DeviceError, match=r"-C delegate=libedgetpu\.so\.1@usb:1 in its place"):
        split_target("edge://pi@board?edgetpu=usb:1")


def test_a_stick_that_fails_at_once_may_answer_later(
    compiled: tuple[str, str], sticks: Path, edgetpu_directory: Path, target: str, tmp_path: Path
) -> None:
    """No refusal of its version: it is found, and lost before its first inference ends."""
    get_deploy_client(target).create_deployment("camera", compiled[0], config={"serve": "false"})
    version = current(tmp_path / "board", "camera")
    description = read_json(version / "deployment.json")
    write_json(version / "deployment.json", {**description, "delegate": str(edgetpu_directory / "libedgetpu.so.1")})
    opened = Version(version)
    assert opened.try_out()["images"] > 0
    (sticks / "usb:0").unlink()
    with pytest.raises(RunnerError) as error:
        opened.try_out()
    assert error.value.kind == "accelerator"
