"""Keeps deployed models on a board and answers from them; travels as ``runner.pyz`` with what it needs.

    python3 runner.pyz list ROOT
    python3 runner.pyz serve ROOT NAME
    python3 ROOT/NAME/current/runner.pyz classify photo.jpg

It needs Python 3.7, NumPy and a TFLite runtime, and Pillow to decode images; without it an image is
a .npy file of the network's input: (height, width, channels), uint8 or float in 0..1. Every command but ``serve``
prints one JSON document; an error is JSON too, ``{"error": kind, "message": text}``, with exit status 3.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import errno
import fcntl
import http.client
import io
import json
import os
import shutil
import signal
import socket
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from foxnas_mlflow.deploy import boot
from foxnas_mlflow.deploy.layout import (
    DEFAULT_SETTINGS,
    RunnerError,
    check_files,
    current,
    digest,
    kind_of,
    let_in,
    locked,
    make_incoming,
    make_run,
    open_to_read,
    point_to,
    read_json,
    read_settings,
    remove_stale,
    write_json,
)
from foxnas_mlflow.deploy.service import CONTROL_SOCKET, HTTP_SOCKET, START_SECONDS, become, run_service, url_of
from foxnas_mlflow.deploy.worker import run_worker

FIRST_PORT = 5001
"""Where a service listens that is not told: the first free port from here on, and always that one from then on."""

PORTS_TRIED = 3
"""Of those that were free, and are not any more when the service starts."""

MAX_FAILURE_BYTES = 2**16
CONTROL_SECONDS = 240.0
STOP_SECONDS = 60.0


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="runner.pyz")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list")
    listing.add_argument("root")
    for name in ("begin", "activate", "discard", "get", "rollback", "delete", "predict", "serve"):
        command = commands.add_parser(name)
        command.add_argument("root")
        command.add_argument("name")
        if name in ("begin", "activate"):
            command.add_argument("--new", action="store_true", help="refuse a name that is taken, not one that is free")
        if name in ("activate", "discard"):
            command.add_argument("directory")
        if name == "activate":
            command.add_argument("--sha256", required=True, help="of deployment.json, which has those of the files")
            command.add_argument("--service", default="{}", help="JSON: serve, host, port, workers, account")
        if name == "predict":
            command.add_argument("request")
    classifying = commands.add_parser("classify", help="answer from the version that this runner lies beside")
    classifying.add_argument("images", nargs="+")
    working = commands.add_parser("worker", help="for the service")
    working.add_argument("version")
    working.add_argument("descriptor", type=int)
    options = parser.parse_args()
    if options.command == "worker":
        run_worker(Path(options.version), options.descriptor)
        os._exit(0)
    if options.command == "serve":
        return run_service(_directory(options.root), options.name)
    # Libraries print to standard output as they like: the JSON gets a descriptor of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = 0
    try:
        result = run(options)
    except RunnerError as error:
        result, status = {"error": error.kind, "message": str(error)}, 3
    except OSError as error:
        result, status = {"error": kind_of(error), "message": f"{error.strerror}: {error.filename}"}, 3
    answer.write(json.dumps(result) + "\n")
    answer.flush()
    # Without interpreter shutdown: some runtimes crash while they unload.
    os._exit(status)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The answer to a command."""
    if options.command == "classify":
        here = Path(sys.argv[0]).resolve().parent
        return {"predictions": classify(here, [read_file(Path(image)) for image in options.images])}
    root = _directory(options.root)
    if options.command == "list":
        return {"deployments": [listed(root, path.parent.name) for path in sorted(root.glob("*/current"))]}
    name = options.name
    if options.command == "begin":
        return begin(root, name, new=options.new)
    if options.command == "activate":
        return activate(
            root,
            name,
            Path(options.directory),
            sha256=options.sha256,
            new=options.new,
            given=json.loads(options.service),
        )
    if options.command == "discard":
        shutil.rmtree(options.directory, ignore_errors=True)
        return {}
    if options.command == "get":
        return describe(root, name)
    if options.command == "rollback":
        return roll_back(root, name)
    if options.command == "delete":
        return delete(root, name)
    request = json.loads(Path(options.request).read_text())
    return {"predictions": predict(root, name, request["images"])}


def _directory(root: str) -> Path:
    """The directory of the deployments: what starts the service does so from another place."""
    return Path(root).expanduser().absolute()


def begin(root: Path, name: str, *, new: bool) -> dict[str, Any]:
    """A directory to copy a version to, where nothing looks for one."""
    check_taken(root, name, new=new)
    place = root / name
    place.mkdir(parents=True, exist_ok=True)
    # First, because what was interrupted may have filled the disk.
    remove_stale(root)
    return {"directory": make_incoming(place)}


def activate(root: Path, name: str, incoming: Path, *, sha256: str, new: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Check a copied version, try it, and make it the active one in one step.

    Args:
        root: Directory of the deployments.
        name: The deployment.
        incoming: The copy.
        sha256: Checksum of its ``deployment.json``.
        new: Whether the name must be free.
        given: ``serve`` and what else of `DEFAULT_SETTINGS` is to change.
    """
    if digest(incoming / "deployment.json") != sha256:
        raise RunnerError("damaged", "deployment.json")
    smoke = check(root, name, incoming)
    with locked(root):
        check_taken(root, name, new=new)
        versions = root / name / "versions"
        versions.mkdir(exist_ok=True)
        for directory in (root, root / name, versions):
            let_in(directory)
        numbers = [int(path.name) for path in versions.iterdir() if path.name.isdigit()]
        target = versions / f"{max(numbers, default=0) + 1:04d}"
        replaces = None if new else current(root, name).name
        state = {"replaces": replaces, "activated": time.time(), "smoke": smoke, "python": sys.executable}
        write_json(incoming / "state.json", state)
        open_to_read(incoming)
        # On a board the power goes at any time: the files first, then the pointer to them.
        os.sync()
        os.rename(str(incoming), str(target))
        try:
            switch(root, name, target, given)
        except BaseException:
            # It may be the active one already when it is interrupted.
            if (root / name / "current").resolve() != target.resolve():
                shutil.rmtree(str(target), ignore_errors=True)
            raise
        for path in versions.iterdir():
            if path.name not in (target.name, replaces):
                shutil.rmtree(str(path), ignore_errors=True)
    return describe(root, name)


def switch(root: Path, name: str, version: Path, given: dict[str, Any]) -> None:
    """Make a version the active one, and serve it if the deployment is served.

    Raises:
        RunnerError: If it cannot be served as asked; what was active is, and was served goes on.
    """
    place = root / name
    file = place / "service.json"
    old = read_settings(root, name) if file.exists() else None
    if not given.get("serve", old is not None):
        if old is not None:
            stop(root, name)
            file.unlink()
        point_to(root, name, version)
        return
    settings = {**(old or DEFAULT_SETTINGS), **{key: given[key] for key in DEFAULT_SETTINGS if key in given}}
    if old is not None and settings["host"] != old["host"] and "port" not in given:
        # Beside 127.0.0.1, where it listens until the switch, nobody can listen at the same port of 0.0.0.0.
        settings["port"] = old["port"] if can_listen(settings["host"], old["port"]) else None
    check_account(settings["account"], version)
    keep_runner(root / name)
    if old is None or not serving(root, name):
        start_at_port(root, name, version, settings, old)
        return
    settings["port"] = settings["port"] or free_port(root, name, settings["host"])
    if settings["account"] != old["account"]:
        raise RunnerError("account", f"{settings['account']}: a service that runs cannot change it; delete it first")
    ask(root, name, "prepare", version=str(version), settings=settings)
    before = current(root, name)
    try:
        write_json(file, settings)
        point_to(root, name, version)
        ask(root, name, "follow")
    except BaseException:
        point_to(root, name, before)
        write_json(file, old)
        raise
    with contextlib.suppress(RunnerError):
        boot.refresh(root, name)


def keep_runner(place: Path) -> None:
    """Let this runner serve a deployment from its next start on, whichever version is active."""
    # What runs from a directory, as tests do, does not travel.
    archive = getattr(__loader__, "archive", "")  # type: ignore[name-defined]
    kept, fresh = place / "runner.pyz", place / ".runner.pyz.next"
    if archive and not (kept.exists() and kept.samefile(archive)):
        with fresh.open("wb") as file:
            file.write(Path(archive).read_bytes())
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            # A board that loses its power now must find a whole one.
            os.fsync(file.fileno())
        os.replace(str(fresh), str(kept))


def start_at_port(root: Path, name: str, version: Path, settings: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Start a service at its port, or at the first free one, see `start`."""
    for left in reversed(range(PORTS_TRIED)):
        port = settings["port"] or free_port(root, name, settings["host"])
        try:
            start(root, name, version, {**settings, "port": port}, old)
            return
        except RunnerError as error:
            # Whoever deploys elsewhere on this machine may have found it free too.
            if settings["port"] or error.kind != "port" or not left:
                raise


def start(root: Path, name: str, version: Path, settings: dict[str, Any], old: dict[str, Any] | None) -> None:
    """Make a version the active one and start its service; undone if it does not start."""
    place = root / name
    before = (place / "current").resolve() if (place / "current").exists() else None
    with contextlib.suppress(RunnerError):
        stop(root, name)
    make_run(root, name, settings["account"])
    for file in failures(root, name):
        # A directory in its place says nothing either.
        with contextlib.suppress(OSError):
            file.unlink()
    write_json(place / "service.json", settings)
    point_to(root, name, version)
    try:
        settings["boot"] = boot.install(root, name)
        await_service(root, name, version)
        write_json(place / "service.json", settings)
        # Of a board without power the unit is there too.
        os.sync()
    except BaseException:
        if before is None:
            (place / "current").unlink()
        else:
            point_to(root, name, before)
        stop(root, name)
        (place / "service.json").unlink()
        if before is not None and old is not None:
            # It did not run either; it is tried again all the same.
            write_json(place / "service.json", old)
            with contextlib.suppress(RunnerError):
                boot.install(root, name)
        raise


def await_service(root: Path, name: str, version: Path) -> None:
    """Wait until a version is served.

    Raises:
        RunnerError: If the service says why it is not, or says nothing.
    """
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        state = serving(root, name)
        if state and state["version"] == version.name:
            return
        for file in failures(root, name):
            failure = read_failure(file)
            if failure is not None:
                raise failure
        time.sleep(0.05)
    raise RunnerError("busy", f"no answer of the service in {START_SECONDS:g} s")


def failures(root: Path, name: str) -> list[Path]:
    """Why a service did not start; one of an earlier release says it beside the lock."""
    return [root / name / "run" / "failed.json", root / name / "run" / "own" / "failed.json"]


def read_failure(file: Path) -> RunnerError | None:
    """What a service said, which may run as an account that is not trusted; None: no file is there."""
    try:
        descriptor = os.open(str(file), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        said = json.loads(os.read(descriptor, MAX_FAILURE_BYTES).decode())
        return RunnerError(str(said["kind"]), str(said["message"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return RunnerError("service", f"{file} does not say why it did not start")
    finally:
        os.close(descriptor)


def stop(root: Path, name: str) -> None:
    """End a service, and let it not start again; one that does not run is no error."""
    boot.remove(root, name)
    try:
        lock = os.open(str(root / name / "run" / "lock"), os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    with contextlib.suppress(RunnerError):
        ask(root, name, "stop")
    with os.fdopen(lock) as held:
        deadline = time.monotonic() + STOP_SECONDS
        while True:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if time.monotonic() > deadline:
                    # Whom an account names is not for root to kill.
                    if os.fstat(lock).st_uid == os.geteuid():
                        os.kill(int(held.read()), signal.SIGKILL)
                    return
                time.sleep(0.05)


def serving(root: Path, name: str) -> dict[str, Any]:
    """What the service of a deployment says of itself; empty if it does not run."""
    try:
        return ask(root, name, "status")
    except RunnerError:
        return {}


def ask(root: Path, name: str, command: str, **request: Any) -> dict[str, Any]:
    """Ask the service of a deployment, see `Service.control`.

    Raises:
        RunnerError: If it refuses, or does not run.
    """
    answer = over_socket(root, name, CONTROL_SOCKET, f"/{command}", json.dumps(request).encode(), {})
    if "error" in answer:
        raise RunnerError(answer["error"], answer["message"])
    return answer


def over_socket(root: Path, name: str, file: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
    """The JSON that a service answers over one of its sockets.

    Raises:
        RunnerError: If it does not run.
    """
    before = os.getcwd()
    try:
        # Paths of sockets are short.
        os.chdir(str(root / name / "run"))
        connection = http.client.HTTPConnection("service", timeout=CONTROL_SECONDS)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(CONTROL_SECONDS)
        with contextlib.closing(connection):
            connection.sock.connect(file)
            connection.request("POST", path, body, headers)
            answer: dict[str, Any] = json.loads(connection.getresponse().read().decode())
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise RunnerError("busy", f"the service does not answer: {type(error).__name__}: {error}") from error
    finally:
        os.chdir(before)
    return answer


def free_port(root: Path, name: str, host: str) -> int:
    """A port that nobody listens on, and that no other deployment here has."""
    taken = set()
    for file in root.glob("*/service.json"):
        # What is damaged is not served at its next start either.
        with contextlib.suppress(RunnerError, OSError, KeyError):
            if file.parent.name != name:
                taken.add(read_json(file)["port"])
    for port in range(FIRST_PORT, FIRST_PORT + 1000):
        if port not in taken and can_listen(host, port):
            return port
    raise RunnerError("port", f"{host}: none from {FIRST_PORT} to {FIRST_PORT + 999} is free")


def can_listen(host: str, port: int) -> bool:
    """Whether nobody listens at a port that this account may have.

    Raises:
        RunnerError: If no port would do: the address is none of this machine's.
    """
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            raise RunnerError("port", f"{host}: {error.strerror}") from error
    return True


def check_account(account: str, version: Path) -> None:
    """Refuse an account that could not read a version."""
    if not account:
        return
    child = os.fork()
    if child == 0:
        status = 2
        with contextlib.suppress(BaseException):
            become(account)
            status = 1
            (version / "model.tflite").open("rb").close()
            status = 0
        os._exit(status)
    status = os.WEXITSTATUS(os.waitpid(child, 0)[1])
    if status == 2:
        become(account)
    if status == 1:
        raise RunnerError("account", f"{account} cannot read {version}; use ?root= with a directory that it can")


def roll_back(root: Path, name: str) -> dict[str, Any]:
    """Make the version that the active one replaced the active one again."""
    current(root, name)
    with locked(root):
        active = current(root, name)
        replaced = read_json(active / "state.json")["replaces"]
        previous = active.parent / str(replaced)
        if replaced is None or not previous.is_dir():
            raise RunnerError("no_previous", name)
        check(root, name, previous)
        switch(root, name, previous, {})
    return describe(root, name)


def delete(root: Path, name: str) -> dict[str, Any]:
    """Remove a deployment with all its versions; one that is not there is no error."""
    if not (root / name).exists():
        return {"deleted": False}
    with locked(root):
        stop(root, name)
        # Out of sight in one step; then the files.
        gone = tempfile.mkdtemp(prefix=".deleted-", dir=str(root))
        os.rename(str(root / name), str(Path(gone, name)))
    shutil.rmtree(gone, ignore_errors=True)
    return {"deleted": True}


def listed(root: Path, name: str) -> dict[str, Any]:
    """What is known of a deployment, or its ``error``: one that is damaged hides no other."""
    try:
        return describe(root, name)
    except (RunnerError, OSError) as error:
        return {"name": name, "error": str(error)}


def describe(root: Path, name: str) -> dict[str, Any]:
    """What is known of a deployment.

    Raises:
        RunnerError: If there is none of that name, or a file of its active version is damaged.
    """
    active = current(root, name)
    try:
        return described(root, name, active)
    except (FileNotFoundError, KeyError, TypeError) as error:
        raise RunnerError("damaged", f"{active}: {type(error).__name__}: {error}") from error


def described(root: Path, name: str, active: Path) -> dict[str, Any]:
    """What is known of a deployment whose files are whole."""
    deployment, state = read_json(active / "deployment.json"), read_json(active / "state.json")
    previous = None
    # One that is damaged is no reason to tell nothing of the active one.
    with contextlib.suppress(RunnerError, OSError, KeyError):
        previous = read_json(active.parent / str(state["replaces"]) / "deployment.json")["model_uri"]
    return {
        **{key: deployment[key] for key in ("name", "flavor", "kind", "model_uri", "model_id", "threads", "delegate")},
        "sha256": deployment["files"]["model.tflite"],
        "preprocessing": deployment["preprocessing"],
        "directory": str(root / name / "current"),
        "version": active.name,
        "activated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state["activated"])),
        "previous": previous,
        "smoke": state["smoke"],
        "service": describe_service(root, name),
        "decodes_images": decodes_images(),
    }


def describe_service(root: Path, name: str) -> dict[str, Any] | None:
    """How a deployment is served; None: it is not."""
    if not (root / name / "service.json").exists():
        return None
    settings = read_settings(root, name)
    said = serving(root, name)
    kind = settings.get("boot", "nothing")
    return {
        "state": "running" if said else "stopped",
        "version": said.get("version"),
        "url": url_of(settings),
        "socket": str(root / name / "run" / HTTP_SOCKET),
        "workers": settings["workers"],
        "account": settings["account"],
        "starts_by": kind,
        "note": boot.note(kind, root, name),
    }


def check(root: Path, name: str, version: Path) -> dict[str, Any]:
    """Check the files of a version and compare its answers with those of the host.

    A version for an accelerator that the service holds is tried by its worker, when that has it.

    Raises:
        RunnerError: If a file is not as it was sent, or an answer is another one.
    """
    deployment = check_files(version)
    if held(root, name, deployment):
        return {"by": "the service"}
    numpy()
    from foxnas_mlflow.deploy.foxnas_edge import Version

    return Version(version).try_out()


def held(root: Path, name: str, deployment: dict[str, Any]) -> bool:
    """Whether the service of a deployment holds the accelerator that a version needs."""
    return bool(deployment["delegate"]) and bool(serving(root, name))


def predict(root: Path, name: str, images: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Answers of the active version; of the service, where it holds an accelerator."""
    version = current(root, name)
    if not held(root, name, read_json(version / "deployment.json")):
        return classify(version, [read_image(image) for image in images])
    rows: list[dict[str, Any]] = []
    for image in images:
        body = base64.b64decode(next(iter(image.values())))
        kind = "application/x-npy" if "array" in image else "image/*"
        answer = over_socket(root, name, HTTP_SOCKET, "/invocations", body, {"Content-Type": kind})
        if "predictions" not in answer:
            raise RunnerError("bad_image", str(answer.get("message", answer)))
        rows += answer["predictions"]
    return rows


def classify(version: Path, images: list[Any]) -> list[dict[str, Any]]:
    """Labels and probabilities of images: files as bytes, or arrays at the network's size."""
    numpy()
    from foxnas_mlflow.core.errors import InvalidInputError, MissingDependencyError
    from foxnas_mlflow.data.preprocess import OLDEST_PILLOW
    from foxnas_mlflow.deploy.foxnas_edge import Version

    model = Version(version)
    try:
        return model.classify(images)
    except MissingDependencyError as error:
        raise RunnerError(
            "no_pillow",
            f"decoding JPEG and PNG needs Pillow {OLDEST_PILLOW} or newer, which {sys.executable} lacks; "
            f"install it with: {sys.executable} -m pip install --upgrade Pillow, or give .npy files of shape "
            f"{model.classifier.input_shape}",
        ) from error
    except InvalidInputError as error:
        raise RunnerError("bad_image", str(error)) from error


def read_image(item: dict[str, str]) -> Any:
    """An image of a request: a file's bytes, or an array in NumPy's format."""
    data = base64.b64decode(next(iter(item.values())))
    return read_array(data) if "array" in item else data


def read_file(path: Path) -> Any:
    """An image of a file: its bytes, or the array of a ``.npy`` file."""
    data = path.read_bytes()
    return read_array(data) if path.suffix == ".npy" else data


def read_array(data: bytes) -> Any:
    """An array in NumPy's format."""
    try:
        # Not `load`, which opens archives too.
        return numpy().lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    except ValueError as error:
        raise RunnerError("bad_image", f"no array of NumPy: {error}") from error


def decodes_images() -> bool:
    """Whether there is a Pillow that does."""
    from foxnas_mlflow.core.errors import MissingDependencyError

    try:
        from foxnas_mlflow.data.preprocess import read_formats

        read_formats()
    except (ImportError, MissingDependencyError):
        return False
    return True


def numpy() -> Any:
    """NumPy, or what is missing."""
    try:
        import numpy as np
    except ImportError as error:
        raise RunnerError("missing", f"NumPy: {error}") from error
    return np


def check_taken(root: Path, name: str, *, new: bool) -> None:
    """Refuse a new deployment under a name that is taken, and an update of one that is not there."""
    if new and (root / name / "current").exists():
        raise RunnerError("exists", name)
    if not new:
        current(root, name)
