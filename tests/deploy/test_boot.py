"""Services that a board starts itself: under a real systemd, the system's and a user's."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from foxnas_mlflow.deploy.runner import serving
from foxnas_mlflow.devices import LocalConnection
from foxnas_mlflow.devices._base import Completed
from tests.colour_model import encoded, image_of
from tests.deploy.systemd import SYSTEMD, Manager, UnavailableError
from tests.deploy.test_service import busy_workers, cron, open_root, python_for_all, send  # noqa: F401
from tests.servers import request

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(
        os.geteuid() != 0 or not SYSTEMD.exists() or Path("/run/systemd/system").is_dir(),
        reason="a systemd of its own needs root, systemd's files, and no systemd that runs already",
    ),
]

NOBODY = 65534


@pytest.fixture
def board(
    open_root: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[int], tuple[Manager, Path, str]]]:
    """Makes a board of an account: its systemd, its directory of deployments, and its target URI."""
    managers: list[Manager] = []

    def make(uid: int) -> tuple[Manager, Path, str]:
        manager = Manager(open_root, uid)
        managers.append(manager)
        try:
            manager.start()
        except UnavailableError as error:
            pytest.skip(str(error))

        def run(_: LocalConnection, argv: Sequence[str], *, timeout_s: float) -> Completed:
            done = subprocess.run(
                manager.inside(argv), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s
            )
            return Completed(done.returncode, done.stdout, done.stderr)

        def put(_: LocalConnection, data: bytes, path: str) -> None:
            subprocess.run(manager.inside(["sh", "-c", 'cat > "$1"', "sh", path]), input=data, check=True)

        monkeypatch.setattr(LocalConnection, "python", python_for_all(open_root))
        monkeypatch.setattr(LocalConnection, "run", run)
        monkeypatch.setattr(LocalConnection, "put", put)
        # What a unit must quote.
        root = manager.home / "it's 100% $HOME"
        return manager, root, f"edge://local?root={quote(str(root))}"

    yield make
    for manager in managers:
        manager.stop()


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def pid_of(root: Path) -> int:
    return int((root / "camera" / "run" / "lock").read_text())


@pytest.mark.parametrize(("uid", "starts_by"), [(0, "systemd"), (NOBODY, "systemd --user")])
def test_systemd_starts_it_again_after_a_crash_and_a_restart(
    board: Callable[[int], tuple[Manager, Path, str]], uid: int, starts_by: str, versions: tuple[str, str]
) -> None:
    manager, root, target = board(uid)
    client = get_deploy_client(target)
    created = client.create_deployment("camera", versions[0])["service"]
    assert (created["state"], created["starts_by"]) == ("running", starts_by)
    # The login that would switch lingering on is not part of this systemd.
    lingering = "it starts at a login only, and ends with it: sudo loginctl enable-linger nobody"
    assert created["note"] == (lingering if uid else "")
    units = manager.units if uid == 0 else manager.home / ".config" / "systemd" / "user"
    (unit,) = units.glob("foxnas-camera-*.service")
    assert manager.verify(unit.name) == ""
    assert Path(f"/proc/{pid_of(root)}").stat().st_uid == uid
    # A worker that is killed for memory, as the kernel does before it kills the service, does not end the unit.
    assert manager.systemctl("show", "--property=OOMPolicy", unit.name).stdout == "OOMPolicy=continue\n"
    (worker,) = busy_workers(root)
    service = int(Path(f"/proc/{pid_of(root)}/oom_score_adj").read_text())
    assert int(Path(f"/proc/{worker}/oom_score_adj").read_text()) == min(1000, service + 500)
    killed = pid_of(root)
    os.kill(killed, signal.SIGKILL)
    until(lambda: serving(root, "camera"))
    assert pid_of(root) != killed
    assert client.update_deployment("camera", versions[1])["service"]["version"] == "0002"
    manager.stop()
    assert serving(root, "camera") == {}
    manager.start()
    until(lambda: serving(root, "camera"))
    answer = send(created["url"], "image/jpeg", encoded(image_of("blue")))
    assert (answer[0], answer[1]["predictions"][0]["label"], answer[2]) == (200, "bleu", "0002")
    client.delete_deployment("camera")
    assert not unit.exists()
    assert manager.systemctl("is-enabled", unit.name).returncode != 0
    assert not [*units.glob("**/foxnas-*")]


def test_cron_starts_what_would_end_with_a_users_login(
    board: Callable[[int], tuple[Manager, Path, str]], versions: tuple[str, str]
) -> None:
    manager, _, target = board(NOBODY)
    tools, table = manager.home.parent / "cron", manager.home / "table"
    with cron(tools, table):
        manager.path(tools)
        client = get_deploy_client(target)
        created = client.create_deployment("camera", versions[0])["service"]
        assert (created["state"], created["starts_by"], created["note"]) == ("running", "cron", "")
        assert client.update_deployment("camera", versions[1])["service"]["starts_by"] == "cron"
        assert table.read_text().startswith("* * * * * ")
        assert not [*manager.home.glob(".config/systemd/user/foxnas-*")]
        client.delete_deployment("camera")
        assert table.read_text() == ""


def test_what_systemd_refuses_leaves_the_old_version_serving(
    board: Callable[[int], tuple[Manager, Path, str]], versions: tuple[str, str]
) -> None:
    manager, root, target = board(0)
    client = get_deploy_client(target)
    url = client.create_deployment("camera", versions[0])["service"]["url"]
    (unit,) = manager.units.glob("foxnas-camera-*.service")
    door = unit.with_name(unit.name.replace("camera", "door"))
    refused = r"systemd on local must take the service's unit; what was served before still is; received systemctl "
    # A unit that somebody has masked.
    door.symlink_to("/dev/null")
    with pytest.raises(MlflowException, match=rf"{refused}.*masked") as error:
        client.create_deployment("door", versions[1])
    assert len(str(error.value).splitlines()) == 1
    assert [each["name"] for each in client.list_deployments()] == ["camera"]
    assert request(url + "/ping")[0] == 200
    # A service that runs is switched without systemd; one that stands still cannot be started, and stays as it was.
    manager.systemctl("stop", unit.name)
    text = unit.read_text()
    unit.unlink()
    unit.symlink_to("/dev/null")
    manager.systemctl("daemon-reload")
    with pytest.raises(MlflowException, match=refused):
        client.update_deployment("camera", versions[1])
    unit.unlink(missing_ok=True)
    unit.write_text(text)
    manager.systemctl("daemon-reload")
    manager.systemctl("start", unit.name)
    until(lambda: serving(root, "camera"))
    assert send(url, "image/jpeg", encoded(image_of("blue")))[1]["predictions"][0]["label"] == "blue"
    assert client.get_deployment("camera")["model_uri"] == "models:/foxnas-rpi4/1"
