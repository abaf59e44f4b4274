"""Talking with the runner on a board."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.deploy._bundle import runner
from foxnas_mlflow.deploy.layout import DEFAULT_ROOT
from foxnas_mlflow.devices import Connection, connect

COMMAND_SECONDS = 300.0

_ERRORS: Mapping[str, tuple[str, str]] = {
    "exists": ("a new deployment needs a name that is free on {uri}", "use mlflow deployments update, or another name"),
    "no_deployment": ("there must be a deployment of that name on {uri}", "see mlflow deployments list, or create it"),
    "no_previous": ("a rollback needs a version before the active one on {uri}", "deploy another version with -m"),
    "damaged": ("files must arrive on {uri} as they were sent", "check the board's storage, and deploy again"),
    "wrong_answer": (
        "the board {uri} must answer as this host does",
        "use the same runtime on both, or -C tolerance=N for another kind of processor",
    ),
    "missing": (
        "{uri} lacks what the runner needs",
        "install it there: pip install numpy ai-edge-litert Pillow, and name that Python with ?python=/path",
    ),
    "old_python": ("{uri} must have Python 3.7 or newer", "name another one with ?python=/path/to/python"),
    "accelerator": (
        "an accelerator of {uri} must be free for the model: one process has it to itself",
        "plug it in, end what holds it, or name another of several with -C delegate=libedgetpu.so.1@usb:1; "
        "workers=1 for one accelerator",
    ),
    "numpy": (
        "NumPy and the runtime on {uri} must be made for each other",
        "install what matches there: pip install --upgrade ai-edge-litert numpy, or beside tflite-runtime 'numpy<2'",
    ),
    "bad_model": ("the runtime on {uri} must be able to open the model", "update ai-edge-litert there"),
    "bad_image": ("an image must be a whole JPEG or PNG, or an array of the network's input shape", "send another one"),
    "port": (
        "a service on {uri} needs an address and a port that are free; what was served before still is",
        "give another with -C port=N, or end what holds it",
    ),
    "account": (
        "a service on {uri} runs as an account that can read its model, and that the deployer may become",
        "deploy as root with -C account=NAME, or leave account out",
    ),
    "busy": (
        "{uri} must have time and memory to start what is deployed, and to answer; what was served before still is",
        "try again later; see there what needs them: top, free -m; the service's log: ROOT/NAME/run/log, or journalctl",
    ),
    "unit": (
        "systemd on {uri} must take the service's unit; what was served before still is",
        "look there: systemctl status, journalctl -xe; or deploy without a service, -C serve=false",
    ),
    "worker": (
        "a worker on {uri} must start with the model; what was served before still is",
        "look at the service's log there: ROOT/NAME/run/log, or journalctl",
    ),
    "service": (
        "the service on {uri} must start and answer; what was served before still is",
        "look at its log there: ROOT/NAME/run/log, or journalctl",
    ),
    "settings": ("what {uri} has written of how it serves must be whole", "delete the deployment, and create it again"),
    "system": ("{uri} refused", "check rights and free space there (df -h)"),
}
"""Rule and remedy of every error that the runner names."""


class RunnerRefusedError(DeviceError):
    """What the runner on a board refused.

    Attributes:
        kind: The runner's name for it.
    """

    def __init__(self, kind: str, message: str, uri: str) -> None:
        self.kind = kind
        rule, remedy = _ERRORS.get(kind, ("the runner on {uri} failed", "run it again"))
        super().__init__(rule.format(uri=uri), received=message or None, remedy=remedy)


class Board:
    """Deployments of one machine.

    Args:
        connection: Open connection to it.
        root: Directory of its deployments.
    """

    def __init__(self, connection: Connection, root: str) -> None:
        self._connection = connection
        self._root = root

    def call(self, command: str, *arguments: str) -> dict[str, Any]:
        """Run one command of the runner.

        Raises:
            RunnerRefusedError: If the runner refuses.
            DeviceError: If it does not answer.
            ConnectionLostError: If the machine went away.
        """
        connection = self._connection
        script = f"{connection.workspace({'runner.pyz': runner()})}/runner.pyz"
        completed = connection.run(
            [connection.python, script, command, self._root, *arguments], timeout_s=COMMAND_SECONDS
        )
        try:
            answer = json.loads(completed.stdout.strip().splitlines()[-1])
        except (ValueError, IndexError):
            said = (completed.stderr.strip().splitlines() or [f"exit status {completed.status}"])[-1]
            raise DeviceError(
                f"the runner on {connection.uri} must answer",
                received=said,
                remedy="it needs Python 3.7, NumPy and ai-edge-litert or tflite-runtime there",
            ) from None
        if "error" in answer:
            raise RunnerRefusedError(answer["error"], answer["message"], connection.uri)
        result: dict[str, Any] = answer
        return result

    def deploy(self, name: str, files: Mapping[str, bytes], service: Mapping[str, Any], *, new: bool) -> dict[str, Any]:
        """Copy a version aside, check and try it there, and make it the active one, served as asked.

        Whatever ends this early leaves the active version as it was.
        """
        fresh = ["--new"] if new else []
        directory = self.call("begin", name, *fresh)["directory"]
        try:
            for file, data in files.items():
                self._connection.put(data, f"{directory}/{file}")
            digest = hashlib.sha256(files["deployment.json"]).hexdigest()
            asked = json.dumps({**({"serve": True} if new else {}), **service})
            return self.call("activate", name, directory, "--sha256", digest, "--service", asked, *fresh)
        except BaseException:
            with contextlib.suppress(DeviceError):
                self.call("discard", name, directory)
            raise

    def predict(self, name: str, images: Sequence[Mapping[str, str]]) -> list[dict[str, Any]]:
        """Answers of the active version to images, see `runner.read_image`."""
        request = f"{self._connection.workspace({'runner.pyz': runner()})}/request.json"
        self._connection.put(json.dumps({"images": list(images)}).encode(), request)
        predictions: list[dict[str, Any]] = self.call("predict", name, request)["predictions"]
        return predictions


@contextlib.contextmanager
def open_board(target_uri: str) -> Iterator[Board]:
    """Connect to the board of a target URI, see `target_help`.

    Raises:
        DeviceError: If the URI is malformed or the board cannot be reached.
    """
    device, root = split_target(target_uri)
    with connect(device) as connection:
        yield Board(connection, root)


def split_target(target_uri: str) -> tuple[str, str]:
    """Device for `connect`, and directory of the deployments, of a target URI."""
    parts = urlsplit(target_uri)
    options = dict(parse_qsl(parts.query))
    root = options.pop("root", DEFAULT_ROOT)
    if parts.scheme != "edge" or not parts.netloc or parts.path.strip("/") or parts.fragment:
        raise DeviceError(
            "a target is edge://local or edge://user@host[:port]",
            received=target_uri,
            remedy="see: mlflow deployments help -t edge",
        )
    if parts.netloc == "local":
        if options:
            raise DeviceError("edge://local takes only ?root=", received=target_uri)
        return "local", root
    if "edgetpu" in options:
        raise DeviceError(
            "which of several accelerators a deployment uses is part of it",
            received=f"edgetpu={options['edgetpu']} in the target",
            remedy=f"give -C delegate=libedgetpu.so.1@{options['edgetpu']} in its place",
        )
    query = urlencode(options, safe="/~")
    return f"ssh://{parts.netloc}" + (f"?{query}" if query else ""), root
