"""The process that holds a model and answers the service's requests; travels in ``runner.pyz``.

A process of its own, because a runtime that crashes, or is killed for memory, must not take the service along. It
speaks frames over a socket: two lengths, a JSON header, a body. It ends when the other end of the socket does.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from foxnas_mlflow.deploy.layout import RunnerError, check_files, kind_of, log, read_json

MAX_BATCH = 1024
"""Most images of one request."""

OOM_SCORE = 500
"""How much sooner than the service the kernel ends a worker where memory ends, of -1000 to 1000."""

_LENGTHS = struct.Struct(">II")


class RefusedError(Exception):
    """A request that the scoring protocol refuses.

    Attributes:
        status: Status of HTTP.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status = status
        super().__init__(message)


def send(connection: socket.socket, header: dict[str, Any], body: bytes | bytearray = b"") -> None:
    """Write a frame."""
    head = json.dumps(header).encode()
    connection.sendall(_LENGTHS.pack(len(head), len(body)) + head)
    if body:
        connection.sendall(body)


def receive(connection: socket.socket) -> tuple[dict[str, Any], bytes]:
    """Read a frame.

    Raises:
        EOFError: If the other end is gone.
        OSError: If the socket fails, or its time is up.
    """
    n_head, n_body = _LENGTHS.unpack(_exactly(connection, _LENGTHS.size))
    header: dict[str, Any] = json.loads(_exactly(connection, n_head).decode())
    return header, _exactly(connection, n_body)


def _exactly(connection: socket.socket, n: int) -> bytes:
    data = bytearray(n)
    view = memoryview(data)
    while len(view):
        got = connection.recv_into(view)
        if not got:
            raise EOFError
        view = view[got:]
    return bytes(data)


def run_worker(version: Path, descriptor: int) -> None:
    """Open a version, say so, and answer until the other end is gone.

    Args:
        version: Its directory.
        descriptor: The socket.
    """
    from foxnas_mlflow.deploy.foxnas_edge import Version

    connection = socket.socket(fileno=descriptor)
    with contextlib.suppress(OSError):
        # Where memory ends, the kernel is to end this one and not the service, which replaces it.
        score = Path("/proc/self/oom_score_adj")
        score.write_text(str(min(1000, int(score.read_text()) + OOM_SCORE)))
    try:
        # A card that wears out is not to be answered from, under the checksum of what was sent.
        # The runner cannot try what another process holds.
        tried = bool(read_json(version / "deployment.json")["delegate"])
        check_files(version, tried=tried)
        model = Version(version)
        if tried:
            model.try_out()
        # What a runtime does at its first inference is done before the first request.
        shape = model.classifier.input_shape
        model.classify([black(shape)])
    except (RunnerError, OSError, MemoryError) as error:
        send(connection, {"error": kind_of(error), "message": str(error) or type(error).__name__})
        return
    send(connection, {"ready": True, "pid": os.getpid()})
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            header, body = receive(connection)
            start = time.perf_counter()
            working = Working(connection if header.get("told") else None)
            said, answer = answered(model, header.get("content_type") or "", body, working)
            send(connection, {**said, "seconds": time.perf_counter() - start}, answer)


class Working:
    """Says once a second that a request is worked at: a large one may take longer than a worker that hangs.

    Args:
        connection: To a service that wants to know, or None.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection
        self._said = time.monotonic()

    def __call__(self) -> None:
        """Say it, if it is time to."""
        if self._connection is not None and time.monotonic() > self._said + 1.0:
            send(self._connection, {"working": True})
            self._said = time.monotonic()


def black(shape: tuple[int, int, int]) -> Any:
    """A black image."""
    import numpy as np

    return np.zeros(shape, np.uint8)


def answered(model: Any, content_type: str, body: bytes, working: Callable[[], None]) -> tuple[dict[str, Any], bytes]:
    """Header and JSON of the answer to a request; `working` is called after each image.

    The header has the ``status``, the number of ``images``, and ``broken`` where an accelerator failed: it may have
    been unplugged, and only a new process finds it again.
    """
    from foxnas_mlflow.core.errors import InvalidInputError, MissingDependencyError
    from foxnas_mlflow.data.preprocess import OLDEST_PILLOW

    try:
        images, params = read_request(content_type, body)
        top_k = integer("top_k", params.get("top_k", 1), 1, len(model.labels))
        deployed = model.deployment["threads"]
        if integer("threads", params.get("threads", 0), 0, 1024) not in (0, deployed):
            raise RefusedError(400, f"threads must be 0 or as deployed, {deployed}; deploy again with -C threads=N")
        if not images:
            raise RefusedError(400, "a request has at least one image.")
        if len(images) > MAX_BATCH:
            raise RefusedError(400, f"a request has at most {MAX_BATCH} images; received {len(images)}.")
        rows = []
        for image in images:
            rows += model.classify([image], top_k=top_k)
            working()
    except RefusedError as refused:
        return {"status": refused.status}, problem("BAD_REQUEST", str(refused))
    except InvalidInputError as error:
        return {"status": 400}, problem("INVALID_PARAMETER_VALUE", str(error))
    except MissingDependencyError:
        message = f"decoding images needs Pillow {OLDEST_PILLOW} or newer on the board; send pixels, or install it"
        return {"status": 501}, problem("NOT_IMPLEMENTED", message)
    except Exception as error:
        # Whoever sent it learns nothing of this machine; the log does.
        log(f"{type(error).__name__}: {error}")
        message = "prediction failed inside the model; its log has the details"
        # What a runtime raises where an inference fails; images raise other errors.
        broken = bool(model.deployment["delegate"]) and type(error) is RuntimeError
        return {"status": 500, "broken": broken}, problem("INTERNAL_ERROR", message)
    return {"status": 200, "images": len(rows)}, json.dumps({"predictions": rows}).encode()


def problem(code: str, message: str) -> bytes:
    """An error as MLflow's scoring server words it."""
    return json.dumps({"error_code": code, "message": message}).encode()


def read_request(content_type: str, body: bytes) -> tuple[list[Any], dict[str, Any]]:
    """The images and parameters of a request to MLflow's scoring server.

    Also a JPEG, PNG or other image as it is (``image/*``), and an array or batch in NumPy's format
    (``application/x-npy``): what needs neither base64 nor JSON.

    Raises:
        RefusedError: If it is none.
    """
    mime, _, options = (part.strip() for part in content_type.partition(";"))
    mime = mime.lower()
    if mime.startswith("image/"):
        return [body], {}
    if mime == "application/x-npy":
        return read_npy(body), {}
    if options and options.lower().replace(" ", "").replace('"', "") != "charset=utf-8":
        raise RefusedError(415, f"the content type takes charset=utf-8 alone; received {options}.")
    if mime != "application/json":
        kinds = "application/json, image/*, application/x-npy"
        raise RefusedError(415, f"the content type must be one of {kinds}; received {content_type or 'none'}.")
    try:
        request = json.loads(body.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RefusedError(400, f"the body must be JSON in UTF-8: {error}.") from None
    keys = ("dataframe_split", "dataframe_records", "inputs", "instances")
    found = [key for key in keys if key in request] if isinstance(request, dict) else []
    if len(found) != 1:
        received = sorted(request) if isinstance(request, dict) else type(request).__name__
        raise RefusedError(400, f"the body must have one of the keys {', '.join(keys)}; received {received}.")
    params = request.get("params") or {}
    if not isinstance(params, dict):
        raise RefusedError(400, f"params must be an object; received {params!r:.80}.")
    return column(found[0], request[found[0]]), params


def column(key: str, data: Any) -> list[Any]:
    """The images of one of MLflow's forms of a table."""
    if key == "dataframe_split":
        if not isinstance(data, dict) or not isinstance(data.get("data"), list):
            raise RefusedError(400, 'dataframe_split must be {"columns": ["image"], "data": [[...], ...]}.')
        names = data.get("columns")
        if not isinstance(names, list) or "image" not in names:
            raise RefusedError(400, f"the input must have the column 'image'; received columns {names}.")
        place = names.index("image")
        if not all(isinstance(row, list) and len(row) == len(names) for row in data["data"]):
            raise RefusedError(400, "every row of dataframe_split must have a value for each column.")
        return [row[place] for row in data["data"]]
    if isinstance(data, dict):
        if "image" not in data:
            raise RefusedError(400, f"the input must have the column 'image'; received columns {sorted(data)}.")
        data = data["image"]
    if isinstance(data, str):
        return [data]
    if not isinstance(data, list):
        raise RefusedError(400, f"{key} must be a list; received a {type(data).__name__}.")
    if any(isinstance(row, dict) for row in data):
        if not all(isinstance(row, dict) and "image" in row for row in data):
            raise RefusedError(400, "every row must have the column 'image'.")
        return [row["image"] for row in data]
    if key == "dataframe_records" and data:
        raise RefusedError(400, "dataframe_records must be a list of objects with the key 'image'.")
    return data


def read_npy(body: bytes) -> list[Any]:
    """One image (height, width, channels), or a batch of them, in NumPy's format."""
    import numpy as np

    try:
        # Not `np.load`, which opens archives too.
        array = np.lib.format.read_array(io.BytesIO(body), allow_pickle=False)
    except ValueError as error:
        raise RefusedError(400, f"the body must be an array in NumPy's format: {error}.") from None
    if array.ndim not in (3, 4):
        raise RefusedError(400, f"an array must have 3 or 4 axes; received shape {array.shape}.")
    return [array] if array.ndim == 3 else list(array)


def integer(name: str, value: Any, lowest: int, highest: int) -> int:
    """A checked parameter."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise RefusedError(400, f"{name} must be an integer from {lowest} to {highest}; received {value!r:.40}.")
    return value
