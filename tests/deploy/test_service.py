"""The service on a board: real processes, real sockets, real kills."""

from __future__ import annotations

import ast
import base64
import contextlib
import errno
import fcntl
import http.client
import io
import json
import os
import resource
import runpy
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mlflow.deployments import get_deploy_client
from mlflow.exceptions import MlflowException

from foxnas_mlflow.deploy import boot, foxnas_edge, layout, service
from foxnas_mlflow.deploy import runner as runner_module
from foxnas_mlflow.deploy._bundle import runner
from foxnas_mlflow.deploy.layout import RunnerError
from foxnas_mlflow.deploy.runner import activate, current, serving, stop, switch
from foxnas_mlflow.deploy.worker import RefusedError, Working, receive
from foxnas_mlflow.devices import LocalConnection
from tests.colour_model import LABELS, SIZE, encoded, image_of
from tests.deploy.boards import clear
from tests.deploy.test_deploy import python_with
from tests.servers import free_port, request, scoring_server

pytestmark = pytest.mark.server

OTHER_LABELS = ("rouge", "vert", "bleu")
"""Those of every version but the first."""

REQUESTS = int(os.environ.get("FOXNAS_REQUESTS", "2000"))
"""Of the storm, with a switch for each 500 of them and a kill for each 2,000; 10,000 take a minute."""


@pytest.fixture
def deployed(versions: tuple[str, str], target: str, tmp_path: Path) -> tuple[Any, dict[str, Any], Path]:
    """Two versions on a board, the first one active: client, deployment, root."""
    client = get_deploy_client(target)
    client.create_deployment("camera", versions[0])
    client.update_deployment("camera", versions[1])
    return client, client.update_deployment("camera", config={"rollback": "true"}), tmp_path / "board"


def text(image: bytes) -> str:
    return base64.b64encode(image).decode()


def send(url: str, kind: str, body: bytes) -> tuple[int, Any, str]:
    """Status, JSON and version of an answer."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        connection.request("POST", "/invocations", body, {"Content-Type": kind})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read()), answer.headers.get("X-Foxnas-Version", "")


def in_chunks(url: str, chunks: Sequence[bytes]) -> tuple[int, Any]:
    """Status and JSON of the answer to a request whose length nobody knows when it begins."""
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    with contextlib.closing(connection):
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/invocations", iter(chunks), headers)
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read())


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a socket in the file system."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def test_it_answers_as_the_scoring_server_does(
    versions: tuple[str, str], target: str, tracking: str, tmp_path: Path
) -> None:
    deployment = get_deploy_client(target).create_deployment("camera", versions[0])
    service = deployment["service"]
    url = service["url"]
    assert (service["state"], service["version"], service["workers"]) == ("running", "0001", 1)
    pictures = [encoded(image_of(colour, seed=3)) for colour in LABELS]
    texts = [text(picture) for picture in pictures]
    split = {"columns": ["image"], "data": [[each] for each in texts]}
    requests = [
        {"dataframe_split": split},
        {"dataframe_records": [{"image": each} for each in texts]},
        {"dataframe_split": split, "params": {"top_k": 2}},
        {"inputs": {"image": texts}},
        {"instances": [{"image": each} for each in texts]},
        {"dataframe_split": split, "params": {"top_k": 0}},
        {"dataframe_split": {"columns": ["picture"], "data": [["x"]]}},
        {"dataframe_records": [{"image": "no image"}]},
        {"dataframe_records": []},
        {"dataframe_split": split, "signature_name": "serving_default", "params": {"top_k": 2, "temperature": 1}},
        {"dataframe_split": split, "params": [1]},
        {},
    ]
    with scoring_server(versions[0], log=tmp_path / "reference.log") as invocations:
        reference = invocations.removesuffix("/invocations")
        for path in ("/ping", "/health", "/version"):
            assert request(url + path) == request(reference + path)
        for body in requests:
            ours, theirs = request(url + "/invocations", body), request(reference + "/invocations", body)
            assert ours[0] == theirs[0], body
            if ours[0] == 200:
                assert json.loads(ours[1]) == json.loads(theirs[1])
            else:
                assert set(json.loads(ours[1])) == {"error_code", "message"}
        whole = json.dumps(requests[0]).encode()
        assert (
            in_chunks(url, [whole[:100], whole[100:]])
            == in_chunks(reference, [whole])
            == send(url, "application/json", whole)[:2]
        )
        for kind, data in (("text/plain", b"x"), ("application/json; a=b", b"{}")):
            connection = http.client.HTTPConnection(reference.removeprefix("http://"), timeout=60)
            with contextlib.closing(connection):
                connection.request("POST", "/invocations", data, {"Content-Type": kind})
                answer = connection.getresponse()
                status = answer.status
            assert send(url, kind, data)[0] == status == 415
    # And what needs no base64.
    pixels = np.stack([image_of(colour, height=SIZE, width=SIZE) for colour in LABELS])
    buffer = io.BytesIO()
    np.save(buffer, pixels)
    by_name = {
        kind: send(url, kind, data)
        for kind, data in (("image/jpeg", pictures[1]), ("application/x-npy", buffer.getvalue()))
    }
    assert [row["label"] for row in by_name["application/x-npy"][1]["predictions"]] == list(LABELS)
    assert by_name["image/jpeg"][1]["predictions"][0]["label"] == "green"
    over_unix = UnixConnection(service["socket"])
    with contextlib.closing(over_unix):
        over_unix.request("GET", "/info")
        info = json.loads(over_unix.getresponse().read())
    assert info["model_uri"] == "models:/foxnas-rpi4/1"
    assert info["sha256"] == deployment["sha256"]


def answers(url: str, sent: bytes) -> list[tuple[int, str]]:
    """Status and message of all that a connection answers to some bytes, until the service closes it."""
    host, _, port = url.removeprefix("http://").rpartition(":")
    found = []
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(sent)
        with connection.makefile("rb") as stream:
            while line := stream.readline():
                headers = http.client.parse_headers(stream)
                body = stream.read(int(headers.get("Content-Length", 0)))
                found.append((int(line.split()[1]), json.loads(body).get("message", "") if body.strip() else ""))
    return found


def test_who_is_refused_is_told_so(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    url = deployed[1]["service"]["url"]
    archive = io.BytesIO()
    np.savez(archive, image_of("red", height=SIZE, width=SIZE))
    for body in (archive.getvalue(), b"PK\x03\x04 no archive", b"no array"):
        status, answer, _ = send(url, "application/x-npy", body)
        assert (status, answer["message"].partition(":")[0]) == (400, "the body must be an array in NumPy's format")
    place = b"POST /invocations HTTP/1.1\r\n"
    # As large as the buffers between the two, and larger: it is sent while the answer comes.
    large = bytes(service.MAX_BODY_BYTES + 1)
    length = f"Content-Length: {len(large)}\r\n".encode()
    chunked = place + b"Transfer-Encoding: chunked\r\n\r\n"
    at_most = f"a body has at most {service.MAX_BODY_BYTES} bytes; received {len(large)} or more"
    refused = [
        (place + length + b"\r\n" + large, 413, at_most),
        (
            b"POST /elsewhere HTTP/1.1\r\n" + length + b"\r\n" + large,
            404,
            "predictions are asked with POST /invocations",
        ),
        (chunked + b"%x\r\n" % len(large) + large, 413, at_most),
        (chunked + b"-1\r\n", 400, "a chunk must begin with its length, in hexadecimal"),
        (chunked + b"2\r\n{}{}\r\n0\r\n\r\n", 400, "a chunk must be as long as it says"),
        (place + b"\r\n", 411, "a request must say its Content-Length, or come in chunks"),
        (
            place + "Content-Length: ²\r\n\r\n".encode("latin-1"),
            411,
            "a request must say its Content-Length, or come in chunks",
        ),
        (
            place + b"Content-Length: 2\r\n" * 2 + b"\r\n{}",
            411,
            "a request must say its Content-Length, or come in chunks",
        ),
        (
            chunked.replace(b"\r\n\r\n", b"\r\nContent-Length: 2\r\n\r\n{}"),
            400,
            "a body comes in chunks, or with its Content-Length",
        ),
        # Who asks before sending is not told to go on.
        (place + length + b"Expect: 100-continue\r\n\r\n", 413, at_most),
        (
            place.replace(b"POST", b"GET") + b"Expect: 100-continue\r\nConnection: close\r\n\r\n",
            405,
            "/invocations is asked with POST",
        ),
    ]
    for sent, status, message in refused:
        assert [each for each in answers(url, sent) if each[0] != 100] == [(status, message)]
    # What a GET carries is not the next request.
    inner = b"GET /nowhere HTTP/1.1\r\n\r\n"
    assert answers(url, b"GET /ping HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % len(inner) + inner) == [(200, "")]


def test_room_for_requests_is_bounded_in_number_and_bytes() -> None:
    metrics = service.Metrics()
    with contextlib.ExitStack() as stack:
        for _ in range(service.MAX_WAITING):
            stack.enter_context(metrics.running())
        with pytest.raises(RefusedError, match="requests wait already"):
            stack.enter_context(metrics.running())
        hold = stack.enter_context(metrics.entered())
        hold(service.MAX_HELD_BYTES)
        another = stack.enter_context(metrics.entered())
        # A small one has room whatever the others hold.
        another(service.SMALL_BYTES)
        with pytest.raises(RefusedError, match="bytes of requests wait already"):
            another(1)
        # What has come may end.
        hold(0)
    with metrics.entered() as hold, metrics.running():
        hold(service.MAX_HELD_BYTES)
    assert metrics.waiting == 0


def test_who_announces_a_body_and_sends_little_keeps_nobody_out(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    url = deployed[1]["service"]["url"]
    host, _, port = url.removeprefix("http://").rpartition(":")
    head = f"POST /invocations HTTP/1.1\r\nContent-Length: {service.MAX_BODY_BYTES}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        for _ in range(service.MAX_WAITING + 1):
            connection = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            connection.sendall(head + b"little")
        deadline = time.monotonic() + 60
        while counted(url)["foxnas_requests_waiting"] <= service.MAX_WAITING and time.monotonic() < deadline:
            time.sleep(0.02)
        assert counted(url)["foxnas_requests_waiting"] > service.MAX_WAITING
        assert send(url, "image/jpeg", encoded(image_of("blue")))[0] == 200


def test_a_body_must_keep_coming(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = service.Metrics()
    monkeypatch.setattr(service, "UPLOAD_SECONDS", 0.05)
    with listening(service.TcpHandler, metrics=metrics) as url:
        ((status, _),) = answers(url, b"POST /invocations HTTP/1.1\r\nContent-Length: 100\r\n\r\nlittle")
        assert status == 408
    # Also a little at a time.
    monkeypatch.setattr(service, "UPLOAD_SECONDS", -1.0)
    with pytest.raises(RefusedError, match="a body must come in -1 s"), metrics.entered() as hold:
        hold(1)
    assert (metrics.waiting, metrics._held) == (0, 0)
    # Between chunks too, where nothing is held.
    handler, held = object.__new__(service.Handler), list[int]()
    handler.rfile = io.BufferedReader(io.BytesIO(b"2;x\r\n{}\r\n0\r\nA: b\r\n\r\n"))  # type: ignore[arg-type]
    assert handler._body(None, held.append) == b"{}"
    assert held == [0] * len("2;x\r\n") + [2] + [0] * len("\r\n0\r\nA: b\r\n\r\n")


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Leave for thousands of connections."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[1], 4096), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.usefixtures("many_descriptors")
def test_who_has_only_just_come_is_not_closed_for_the_next() -> None:
    with contextlib.ExitStack() as stack:
        pairs = [socket.socketpair() for _ in range(service.MAX_CONNECTIONS)]
        for pair in pairs:
            stack.enter_context(pair[0])
            stack.enter_context(pair[1])
        held = {ours: float("inf") for ours, _ in pairs}
        newest, client = pairs[-1]
        server = stack.enter_context(service.TcpServer(("127.0.0.1", 0), service.TcpHandler))
        server.service = SimpleNamespace(connections=held)  # type: ignore[assignment]
        # Since when it waits: all the others are asking.
        held[newest] = time.monotonic() + 60
        assert not server.verify_request(None, None)
        client.sendall(b"asks")
        assert newest.recv(100) == b"asks"
        held[newest] = time.monotonic() - 1
        assert server.verify_request(None, None)
        assert newest.recv(100) == b""
        assert newest not in held


@pytest.mark.usefixtures("many_descriptors")
def test_idle_connections_keep_nobody_out(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str]
) -> None:
    """More of them than the service may have descriptors: 1024, as often on a board."""
    client, deployment, root = deployed
    url, pid, image = deployment["service"]["url"], pid_of(root), encoded(image_of("blue"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (1024, 1024))
    host, _, port = url.removeprefix("http://").rpartition(":")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] < 1500:
        pytest.skip("this account may not open so many connections")

    def used() -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with contextlib.ExitStack() as stack:
        uploading = stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
        head = f"POST /invocations HTTP/1.1\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
        uploading.sendall(head.encode() + image[:100])
        asking = stack.enter_context(contextlib.closing(http.client.HTTPConnection(host, int(port), timeout=60)))
        asking.connect()
        kept = asking.sock
        for _ in range(11):
            for _ in range(100):
                stack.enter_context(socket.create_connection((host, int(port)), timeout=60))
            # The last one to come is the last one to be accepted.
            assert request(url + "/ping")[0] == 200
            asking.request("GET", "/ping")
            assert asking.getresponse().read() == b"\n"
        # Who asks now and then, or sends, is not closed for others.
        assert asking.sock is kept
        uploading.sendall(image[100:])
        assert uploading.recv(100).startswith(b"HTTP/1.1 200")
        assert send(url, "image/jpeg", image)[0] == 200
        os.kill(busy_workers(root)[0], signal.SIGKILL)
        assert send(url, "image/jpeg", image)[0] == 200
        assert client.update_deployment("camera", versions[1])["service"]["version"] == "0003"
        assert len(os.listdir(f"/proc/{pid}/fd")) < 2 * service.MAX_CONNECTIONS
        before = used()
        time.sleep(2)
        assert used() - before < 1
    assert send(url, "image/jpeg", image)[0] == 200


def test_who_still_sends_at_the_end_is_not_waited_for_until_a_kill() -> None:
    metrics, unit = service.Metrics(), dict(line.split("=", 1) for line in boot.UNIT.splitlines() if "=" in line)
    with metrics.entered():
        assert metrics.leave_seconds() > service.LEAVE_SECONDS
        assert metrics.leave_seconds() < min(float(unit["TimeoutStopSec"]), runner_module.STOP_SECONDS)
        with metrics.running():
            assert metrics.leave_seconds() == service.CLOSE_SECONDS
    assert metrics.leave_seconds() == service.LEAVE_SECONDS


def test_a_small_board_holds_less_and_keeps_the_allocator_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "maxsize", 2**31 - 1)
        patched.setattr(os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**17}.__getitem__)
        on_board = runpy.run_path(service.__file__)
    assert on_board["KEPT_MEMORY"] == {}
    assert on_board["MAX_HELD_BYTES"] == 2**26


def test_an_upload_that_is_under_way_at_the_end_is_answered(
    deployed: tuple[Any, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, deployment, root = deployed
    image = encoded(image_of("blue"))
    host, _, port = deployment["service"]["url"].removeprefix("http://").rpartition(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        head = f"POST /invocations HTTP/1.1\r\nContent-Type: image/jpeg\r\nContent-Length: {len(image)}\r\n\r\n"
        connection.sendall(head.encode() + image[:100])
        deadline = time.monotonic() + 60
        while not counted(deployment["service"]["url"])["foxnas_requests_waiting"] and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(pid_of(root), signal.SIGTERM)
        # It waits for no client that says nothing so long.
        time.sleep(service.LEAVE_SECONDS + 2 * service.POLL_SECONDS)
        connection.sendall(image[100:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")


def counted(url: str) -> dict[str, float]:
    lines = request(url + "/metrics")[1].splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_who_speaks_http_1_0_is_told_whether_a_connection_stays(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    host, _, port = deployed[1]["service"]["url"].removeprefix("http://").rpartition(":")
    for asked, n in (("keep-alive", 2), ("close", 1)):
        connection = socket.create_connection((host, int(port)), timeout=60)
        with connection, connection.makefile("rb") as stream:
            for _ in range(n):
                connection.sendall(f"GET /ping HTTP/1.0\r\nConnection: {asked}\r\n\r\n".encode())
                assert stream.readline().startswith(b"HTTP/1.1 200")
                headers = http.client.parse_headers(stream)
                assert headers["Connection"] == asked
                assert stream.read(int(headers["Content-Length"])) == b"\n"


def test_a_log_without_a_journal_is_bounded(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    root = deployed[2]
    log = root / "camera" / "run" / "log"
    with log.open("ab") as file:
        file.write(bytes(boot.MAX_LOG_BYTES + 1))
    deadline = time.monotonic() + 60
    while log.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.stat().st_size == 0
    # What it writes next is all that is there.
    (root / "camera" / "versions" / "0009").mkdir()
    layout.point_to(root, "camera", root / "camera" / "versions" / "0009")
    while not log.stat().st_size and time.monotonic() < deadline:
        time.sleep(0.02)
    assert log.read_bytes().startswith(b"error: ")


def test_a_log_of_starts_that_fail_is_bounded_too(tmp_path: Path) -> None:
    run = tmp_path / "camera" / "run"
    run.mkdir(parents=True)
    layout.write_json(tmp_path / "camera" / "service.json", layout.DEFAULT_SETTINGS)
    (run / "log").write_bytes(bytes(boot.MAX_LOG_BYTES + 1))
    code = """
import pathlib, sys
from foxnas_mlflow.deploy.service import run_service
sys.exit(run_service(pathlib.Path(sys.argv[1]), "camera"))
"""
    with (run / "log").open("ab") as log:
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=log, timeout=60)
    assert done.returncode == 1
    assert (run / "log").read_bytes() == b"error: camera\n"


def test_images_that_are_for_a_deployment_alone_stop_no_worker(tmp_path: Path) -> None:
    files = {}
    for name in ("model.tflite", "smoke.npz"):
        (tmp_path / name).write_bytes(b"sent")
        files[name] = layout.digest(tmp_path / name)
    code = """
from pathlib import Path
from foxnas_mlflow.deploy import foxnas_edge, worker
from foxnas_mlflow.deploy.layout import RunnerError
def opened(*_):
    raise RunnerError("opened", "it would be")
foxnas_edge.Version = opened
worker.run_worker(Path(sys.argv[2]), connection.detach())
"""
    # An accelerator's answers are compared by the worker.
    for damaged, delegate, kind in (
        ("smoke.npz", "", "opened"),
        ("smoke.npz", "libedgetpu.so.1", "damaged"),
        ("model.tflite", "", "damaged"),
    ):
        layout.write_json(tmp_path / "deployment.json", {"files": files, "delegate": delegate})
        (tmp_path / damaged).write_bytes(b"rent")
        with pytest.raises(RunnerError) as error:
            service.Worker(worker_of(tmp_path, code), sys.executable)
        assert error.value.kind == kind
        with pytest.raises(RunnerError, match=f"{damaged} is damaged"):
            layout.check_files(tmp_path)
        (tmp_path / damaged).write_bytes(b"sent")


def test_metrics(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    url = deployed[1]["service"]["url"]
    body = {"inputs": [image_of("red", height=SIZE, width=SIZE).tolist()] * 2}
    for _ in range(3):
        assert request(url + "/invocations", body)[0] == 200
    assert request(url + "/invocations", {"inputs": [[1]]})[0] == 400
    metrics = counted(url)
    assert metrics['foxnas_requests_total{code="200"}'] == 3
    assert metrics['foxnas_requests_total{code="400"}'] == 1
    assert metrics["foxnas_rejected_total"] == 1
    assert metrics["foxnas_images_total"] == 6
    assert metrics["foxnas_requests_waiting"] == 0
    assert metrics["foxnas_switches_total"] == 2
    for name in ("request", "worker"):
        buckets = [value for key, value in metrics.items() if key.startswith(f"foxnas_{name}_seconds_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == metrics[f"foxnas_{name}_seconds_count"] == 4
    assert 0 < metrics["foxnas_worker_seconds_sum"] < metrics["foxnas_request_seconds_sum"]
    (info,) = (key for key in metrics if key.startswith("foxnas_info"))
    assert 'version="0001"' in info


class Clients:
    """Threads that ask again and again, and know the right answers of each version.

    Args:
        service: What the deployment says of its service.
        n: Threads; every second one asks over the Unix socket.
    """

    def __init__(self, service: dict[str, Any], n: int) -> None:
        self.wrong: list[str] = []
        self.answers: dict[str, int] = {}
        self._lock = threading.Lock()
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(service, i)) for i in range(n)]

    def __enter__(self) -> Clients:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    @property
    def n_answers(self) -> int:
        with self._lock:
            return sum(self.answers.values())

    def wait_for(self, n: int) -> None:
        """Wait for so many more answers."""
        until, deadline = self.n_answers + n, time.monotonic() + 120
        while self.n_answers < until and time.monotonic() < deadline:
            time.sleep(0.01)
        assert self.n_answers >= until, self.wrong

    def _work(self, service: dict[str, Any], i: int) -> None:
        host = service["url"].removeprefix("http://")
        connection = UnixConnection(service["socket"]) if i % 2 else http.client.HTTPConnection(host, timeout=120)
        images = {}
        for seed, colour in enumerate(LABELS):
            buffer = io.BytesIO()
            np.save(buffer, image_of(colour, height=SIZE, width=SIZE, seed=10 * i + seed))
            images[colour] = buffer.getvalue()
        first: dict[str, list[float]] = {}
        with contextlib.closing(connection):
            while not self._end.is_set():
                for colour, image in images.items():
                    try:
                        connection.request("POST", "/invocations", image, {"Content-Type": "application/x-npy"})
                        answer = connection.getresponse()
                        body, version = json.loads(answer.read()), answer.headers["X-Foxnas-Version"]
                        (row,) = body["predictions"]
                        right = (LABELS if version == "0001" else OTHER_LABELS)[LABELS.index(colour)]
                        same = first.setdefault(colour, row["probabilities"]) == row["probabilities"]
                    except Exception as error:
                        self.wrong.append(f"lost: {error!r}")
                        connection.close()
                        continue
                    if row["label"] != right or not same:
                        self.wrong.append(f"wrong: {row} of {version}")
                    with self._lock:
                        self.answers[version] = self.answers.get(version, 0) + 1


def storm(root: Path, service: dict[str, Any], *, switches: int, kills: int, requests: int) -> Clients:
    """Requests across switches of the version and kills of workers."""
    with Clients(service, 4) as clients:
        for i in range(switches):
            clients.wait_for(requests // switches)
            target = "0002" if current(root, "camera").name == "0001" else "0001"
            if i * kills // switches != (i + 1) * kills // switches:
                # One is killed while it answers, and before it is retired.
                (worker, *_) = busy_workers(root)
                os.kill(worker, signal.SIGKILL)
                clients.wait_for(20)
            with layout.locked(root):
                switch(root, "camera", root / "camera" / "versions" / target, {})
            assert serving(root, "camera").get("version") == target
        clients.wait_for(20)
    return clients


def busy_workers(root: Path) -> list[int]:
    """Workers of the active version, whether they answer or wait."""
    wanted = f"worker {current(root, 'camera')}".encode()
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().replace(b"\0", b" "):
                found.append(int(path.parent.name))
    return found


def test_no_request_is_lost_across_switches_and_kills(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    _, deployment, root = deployed
    switches, kills = REQUESTS // 500, REQUESTS // 2000
    clients = storm(root, deployment["service"], switches=switches, kills=kills, requests=REQUESTS)
    assert clients.wrong == []
    assert clients.n_answers > REQUESTS
    assert set(clients.answers) == {"0001", "0002"}
    metrics = counted(deployment["service"]["url"])
    assert metrics['foxnas_requests_total{code="200"}'] == clients.n_answers
    # Two are of the fixture.
    assert metrics["foxnas_switches_total"] == switches + 2
    assert metrics["foxnas_worker_restarts_total"] == kills
    # Of the versions before no process is left.
    deadline = time.monotonic() + 30
    while len(workers_of(root)) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers_of(root) == busy_workers(root)


def workers_of(root: Path) -> list[int]:
    """All workers of a board."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f" worker {root}/" in line:
                found.append(int(path.parent.name))
    return found


def test_what_cannot_be_served_leaves_the_old_version_serving(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str], tmp_path: Path
) -> None:
    client, before, root = deployed
    url = before["service"]["url"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MlflowException, match=f"port that are free.*received 127.0.0.1 port {port}.*in use"):
            client.update_deployment("camera", versions[1], config={"port": str(port)})
        with pytest.raises(MlflowException, match="port that are free"):
            client.create_deployment("door", versions[1], config={"port": str(port)})
    assert client.get_deployment("camera") == before
    assert request(url + "/ping")[0] == 200
    assert not (root / "door" / "current").exists()
    assert [each["name"] for each in client.list_deployments()] == ["camera"]
    # The same name is free, another port is chosen, and the service moves to a port that is free.
    door = client.create_deployment("door", versions[1])
    assert door["service"]["url"] != url
    moved = client.update_deployment("camera", versions[1], config={"port": str(free_port())})
    assert request(moved["service"]["url"] + "/ping")[0] == 200
    with pytest.raises(OSError, match="refused"):
        request(url + "/ping")
    # A deployment may stop to be served, and be served again.
    assert client.update_deployment("camera", versions[0], config={"serve": "false"})["service"] is None
    with pytest.raises(OSError, match="refused"):
        request(moved["service"]["url"] + "/ping")
    again = client.update_deployment("camera", versions[1], config={"serve": "true", "workers": "2"})
    assert again["service"]["state"] == "running"
    assert len(workers_of(root / "camera")) == 2


def test_a_port_that_is_taken_meanwhile_is_replaced_unless_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by who deploys elsewhere on this machine at the same time."""
    tried: list[int] = []
    (tmp_path / "camera").mkdir()

    def start(root: Path, name: str, version: Path, settings: dict[str, Any], old: object) -> None:
        tried.append(settings["port"])
        if settings["port"] < 5003:
            raise RunnerError("port", "in use")

    monkeypatch.setattr(runner_module, "start", start)
    monkeypatch.setattr(runner_module, "free_port", lambda *_: 5001 + len(tried))
    switch(tmp_path, "camera", tmp_path, {"serve": True})
    assert tried == [5001, 5002, 5003]
    with pytest.raises(RunnerError, match="in use"):
        switch(tmp_path, "camera", tmp_path, {"serve": True, "port": 5002})
    assert tried == [5001, 5002, 5003, 5002]
    # Not without end.
    monkeypatch.setattr(runner_module, "free_port", lambda *_: 5000)
    with pytest.raises(RunnerError, match="in use"):
        switch(tmp_path, "camera", tmp_path, {"serve": True})
    assert tried[4:] == [5000] * runner_module.PORTS_TRIED


def test_an_address_that_is_not_the_boards_is_no_taken_port(
    versions: tuple[str, str], target: str, tmp_path: Path
) -> None:
    client = get_deploy_client(target)
    for host, reason in (("203.0.113.1", "Cannot assign requested address"), ("no.such.host.invalid", "[Nn]ame")):
        with pytest.raises(MlflowException, match=f"port that are free.*received {host}: .*{reason}"):
            client.create_deployment("camera", versions[0], config={"host": host})
    assert client.list_deployments() == []


def test_an_interruption_after_the_switch_leaves_the_active_version_its_files(
    deployed: tuple[Any, dict[str, Any], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, deployment, root = deployed
    incoming = Path(layout.make_incoming(root / "camera"))
    shutil.copytree(root / "camera" / "versions" / "0002", incoming, dirs_exist_ok=True)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(boot, "refresh", interrupted)
    with pytest.raises(KeyboardInterrupt):
        activate(root, "camera", incoming, sha256=layout.digest(incoming / "deployment.json"), new=False, given={})
    assert (current(root, "camera") / "model.tflite").exists()
    assert send(deployment["service"]["url"], "image/jpeg", encoded(image_of("blue")))[2] == "0003"


def worker_of(directory: Path, code: str) -> Path:
    """A version whose worker runs some code, with its socket as ``connection``."""
    start = "import socket, sys, time\nfrom foxnas_mlflow.deploy.worker import receive, send\n"
    (directory / "runner.pyz").write_text(f"{start}connection = socket.socket(fileno=int(sys.argv[3]))\n{code}")
    return directory


def test_a_worker_that_says_that_it_works_is_waited_for(tmp_path: Path) -> None:
    code = """
send(connection, {"ready": True})
assert receive(connection)[0]["told"]
for _ in range(2):
    send(connection, {"working": True})
send(connection, {"status": 200}, b"answer")
"""
    worker = service.Worker(worker_of(tmp_path, code), sys.executable)
    try:
        assert worker.ask("image/jpeg", b"image") == ({"status": 200}, b"answer")
    finally:
        worker.end()


def generation_of(directory: Path, code: str) -> service.Generation:
    """The one worker of a version, see `worker_of`."""
    (directory / "deployment.json").write_text("{}")
    return service.Generation(worker_of(directory, code), sys.executable, 1, service.Metrics())


def test_a_worker_that_cannot_be_started_at_once_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "AGAIN_SECONDS", 0.0)
    code = """
import os
if len(os.listdir(".")) in %s:
    os.mkdir(str(time.monotonic()))
    os.kill(os.getpid(), 9)
os.mkdir(str(time.monotonic()))
send(connection, {"ready": True})
receive(connection)
send(connection, {"status": 200}, b"answer")
receive(connection)
"""
    starts = tmp_path / "starts"
    starts.mkdir()
    monkeypatch.chdir(starts)
    # The first start succeeds, and that worker is killed; then two fail, or all that a request tries.
    for failing, found in (((1, 2), b"answer"), ((1, 2, 3), None)):
        for path in starts.iterdir():
            path.rmdir()
        generation = generation_of(tmp_path, code % (failing,))
        try:
            os.kill(generation.pids()[0], signal.SIGKILL)
            while generation.alive():
                time.sleep(0.01)
            if found is None:
                with pytest.raises(RunnerError, match="a worker ended with status -9"):
                    generation.ask("image/jpeg", b"image")
            else:
                assert generation.ask("image/jpeg", b"image") == ({"status": 200}, found)
        finally:
            generation.close()


def test_what_does_not_pass_is_not_tried_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    starts.mkdir()
    code = f"""
import os
first = not os.listdir({str(starts)!r})
os.mkdir(os.path.join({str(starts)!r}, str(time.monotonic())))
send(connection, {{"ready": True}} if first else {{"error": "accelerator", "message": "none"}})
"""
    generation = generation_of(tmp_path, code)
    try:
        while generation.alive():
            time.sleep(0.01)
        with pytest.raises(RunnerError, match="none"):
            generation.ask("image/jpeg", b"image")
    finally:
        generation.close()
    assert len(list(starts.iterdir())) == 2


def test_a_worker_that_is_busy_when_its_version_is_closed_ends_when_it_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "CLOSE_SECONDS", 0.0)
    go_on = tmp_path / "go-on"
    generation = generation_of(
        tmp_path,
        f"""
import os
send(connection, {{"ready": True}})
receive(connection)
while not os.path.exists({str(go_on)!r}):
    time.sleep(0.01)
send(connection, {{"status": 200}})
receive(connection)
""",
    )
    (pid,) = generation.pids()

    def ask() -> None:
        with generation.used():
            generation.ask("image/jpeg", b"image")

    asking = threading.Thread(target=ask)
    asking.start()
    while generation.pids():
        time.sleep(0.01)
    generation.close()
    assert Path(f"/proc/{pid}").exists()
    go_on.touch()
    asking.join()
    assert not Path(f"/proc/{pid}").exists()


def test_a_worker_says_once_a_second_that_it_works() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        working = Working(theirs)
        working._said -= 2
        # A service of an earlier release would take it for the answer.
        of_another = Working(None)
        of_another._said -= 2
        for _ in range(3):
            of_another()
            working()
        theirs.shutdown(socket.SHUT_WR)
        assert receive(ours) == ({"working": True}, b"")
        with pytest.raises(EOFError):
            receive(ours)


def test_a_worker_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "START_SECONDS", 0.1)
    with pytest.raises(RunnerError, match=r"a worker did not open its model in 0\.1 s") as late:
        service.Worker(worker_of(tmp_path, "time.sleep(600)"), sys.executable)
    monkeypatch.undo()
    # Where memory ends, a worker is killed whatever its model: it is no refusal.
    for code, kind in (("import os; os.kill(os.getpid(), 9)", "busy"), ("sys.exit(9)", "worker")):
        with pytest.raises(RunnerError, match=r"a worker ended with status -?9 at its start") as error:
            service.Worker(worker_of(tmp_path, code), sys.executable)
        assert error.value.kind == kind
    assert late.value.kind == "busy"
    # Of descriptors none is left, or enough for its socket alone.
    for call, what in (("socket.socketpair", "no socket for a worker"), ("subprocess.Popen", sys.executable)):
        with monkeypatch.context() as patched:
            patched.setattr(call, scarce)
            with pytest.raises(RunnerError, match=f"^{what}: Too many open files") as error:
                service.Worker(tmp_path, sys.executable)
        assert error.value.kind == "busy"


def scarce(*_: Any, **__: Any) -> None:
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@contextlib.contextmanager
def listening(handler: type[service.Handler], **attributes: Any) -> Iterator[str]:
    """The URL of a listener of a service that has nothing but these attributes."""
    server = service.TcpServer(("127.0.0.1", 0), handler)
    server.service = SimpleNamespace(connections={}, stopping=False, **attributes)  # type: ignore[assignment]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_what_a_service_is_short_of_refuses_no_version(tmp_path: Path) -> None:
    errors: list[tuple[Exception, str, str]] = [
        (RuntimeError("can't start new thread"), "busy", "can't start new thread"),
        (MemoryError(), "busy", "MemoryError"),
        (OSError(errno.EMFILE, "Too many open files"), "busy", "[Errno 24] Too many open files"),
        (OSError(errno.ENOSPC, "No space left on device"), "system", "[Errno 28] No space left on device"),
        (RunnerError("port", "taken"), "port", "taken"),
        (KeyError("version"), "service", "'version'"),
    ]
    for raised, kind, message in errors:
        with listening(service.ControlHandler, control=raising(raised)) as url:
            assert request(url + "/prepare", {}) == (200, json.dumps({"error": kind, "message": message}))
    # Nor what a worker is short of, nor what a start is.
    layout.write_json(tmp_path / "deployment.json", {"files": {}, "delegate": ""})
    code = """
from pathlib import Path
from foxnas_mlflow.deploy import foxnas_edge, worker
def short(*_):
    raise MemoryError
foxnas_edge.Version = short
worker.run_worker(Path(sys.argv[2]), connection.detach())
"""
    with pytest.raises(RunnerError, match="MemoryError") as error:
        service.Worker(worker_of(tmp_path, code), sys.executable)
    assert error.value.kind == "busy"
    (tmp_path / "camera").mkdir()
    layout.write_json(tmp_path / "camera" / "service.json", layout.DEFAULT_SETTINGS)
    code = """
import sys
from pathlib import Path
from foxnas_mlflow.deploy import service
def short(*_):
    raise RuntimeError("can't start new thread")
service.Service = short
sys.exit(service.run_service(Path(sys.argv[1]), "camera"))
"""
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == 1
    failure = runner_module.read_failure(tmp_path / "camera" / "run" / "own" / "failed.json")
    assert failure is not None
    assert (failure.kind, str(failure)) == ("busy", "can't start new thread")


def raising(error: Exception) -> Callable[..., None]:
    """A function that raises."""

    def fail(*_: object) -> None:
        raise error

    return fail


def test_what_does_not_answer_in_time_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "camera" / "run").mkdir(parents=True)
    systemctl, unit = tmp_path / "systemctl", tmp_path / "foxnas-camera.service"
    systemctl.write_text("#!/bin/sh\nexec sleep 600\n")
    systemctl.chmod(0o755)
    monkeypatch.setattr(boot, "COMMAND_SECONDS", 0.1)
    monkeypatch.setattr(boot, "unit_path", lambda *_: unit)
    monkeypatch.setattr(runner_module, "START_SECONDS", 0.0)
    for act in (
        lambda: runner_module.await_service(tmp_path, "camera", tmp_path),
        # The service ended since it was asked last.
        lambda: runner_module.ask(tmp_path, "camera", "prepare"),
        lambda: boot._install_unit(tmp_path, "camera", [str(systemctl)]),
    ):
        with pytest.raises(RunnerError) as error:
            act()
        assert error.value.kind == "busy"
    assert not unit.exists()


def test_a_log_that_is_full_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        layout.log("error")
        with pytest.raises(OSError, match="No space"):
            full.flush()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()


def test_labels_are_quoted_as_prometheus_has_them() -> None:
    text = service.Metrics().text({"model_uri": 'models:/Kamera-Süd "a\\b"\n/1'})
    assert r'foxnas_info{model_uri="models:/Kamera-Süd \"a\\b\"\n/1"} 1' in text.splitlines()


def test_another_host_keeps_the_port_where_it_can(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str]
) -> None:
    client, _, root = deployed
    image = encoded(image_of("blue"))
    ports = [layout.read_json(root / "camera" / "service.json")["port"]]
    # The second one covers the first, whose listener has the port until the switch; from then on it is free.
    for host in ("127.0.0.2", "0.0.0.0", "127.0.0.1"):
        updated = client.update_deployment("camera", versions[1], config={"host": host})
        settings = layout.read_json(root / "camera" / "service.json")
        assert settings["host"] == host
        ports.append(settings["port"])
        url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{settings['port']}"
        assert updated["service"]["state"] == "running"
        assert send(url, "image/jpeg", image)[1]["predictions"][0]["label"] == "bleu"
    assert ports[0] == ports[1] != ports[2] != ports[3]
    with pytest.raises(OSError, match="refused"):
        request(f"http://127.0.0.2:{ports[0]}/ping")


def test_the_service_follows_the_pointer_also_unasked(deployed: tuple[Any, dict[str, Any], Path]) -> None:
    """As when the host is cut off between the pointer and the service."""
    _, deployment, root = deployed
    layout.point_to(root, "camera", root / "camera" / "versions" / "0002")
    deadline = time.monotonic() + 60
    while serving(root, "camera").get("version") != "0002" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert serving(root, "camera").get("version") == "0002"
    image = encoded(image_of("blue"))
    assert send(deployment["service"]["url"], "image/jpeg", image)[1]["predictions"][0]["label"] == "bleu"
    # A version that is not as it was sent is not served, whoever points to it.
    shutil.copytree(root / "camera" / "versions" / "0001", root / "camera" / "versions" / "0009")
    (root / "camera" / "versions" / "0009" / "model.tflite").write_bytes(b"no model")
    layout.point_to(root, "camera", root / "camera" / "versions" / "0009")
    log, deadline = root / "camera" / "run" / "log", time.monotonic() + 60
    while b"version 0009" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"error: version 0009: model.tflite is damaged or was changed" in log.read_bytes()
    assert send(deployment["service"]["url"], "image/jpeg", image)[2] == "0002"
    # Nor does one whose description was damaged end the service.
    (root / "camera" / "versions" / "0009" / "deployment.json").write_bytes(b"{")
    (root / "camera" / "versions" / "0009").rename(root / "camera" / "versions" / "0010")
    layout.point_to(root, "camera", root / "camera" / "versions" / "0010")
    while b"version 0010" not in log.read_bytes() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert b"0010/deployment.json: Expecting property name" in log.read_bytes()
    assert send(deployment["service"]["url"], "image/jpeg", image)[2] == "0002"


def serve(root: Path, name: str) -> list[str]:
    return [sys.executable, str(root / name / "runner.pyz"), "serve", str(root), name]


def pid_of(root: Path) -> int:
    return int((root / "camera" / "run" / "lock").read_text())


def test_a_service_that_was_killed_starts_again_where_it_was(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str]
) -> None:
    client, deployment, root = deployed
    url = deployment["service"]["url"]
    # Whoever starts it a second time, as cron does every minute, changes nothing.
    assert subprocess.run(serve(root, "camera"), timeout=60, check=True).returncode == 0
    assert request(url + "/ping")[0] == 200
    pid = pid_of(root)
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 60
    while workers_of(root) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert workers_of(root) == []
    assert client.get_deployment("camera")["service"]["state"] == "stopped"
    # An update starts it.
    updated = client.update_deployment("camera", versions[1])
    assert (updated["service"]["state"], updated["service"]["url"]) == ("running", url)
    assert pid_of(root) != pid
    # As systemd ends it: what was accepted is answered.
    with Clients(updated["service"], 2) as clients:
        clients.wait_for(100)
        os.kill(pid_of(root), signal.SIGTERM)
        deadline = time.monotonic() + 60
        while workers_of(root) and time.monotonic() < deadline:
            time.sleep(0.02)
        while not clients.wrong and time.monotonic() < deadline:
            time.sleep(0.02)
    assert workers_of(root) == []
    # Every request had its answer; only then new ones were refused, on connections that were open too.
    assert clients.wrong
    assert {line.partition("(")[0] for line in clients.wrong} <= {
        "lost: BrokenPipeError",
        "lost: ConnectionRefusedError",
        "lost: ConnectionResetError",
        "lost: RemoteDisconnected",
    }
    process = subprocess.Popen(serve(root, "camera"), start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not serving(root, "camera") and time.monotonic() < deadline:
            time.sleep(0.05)
        assert request(url + "/ping")[0] == 200
        client.delete_deployment("camera")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_a_version_of_an_earlier_release_is_served_by_what_deployed_last(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str]
) -> None:
    client, _, root = deployed
    client.update_deployment("camera", versions[1])
    # Its own runner cannot serve: it does not know where this release keeps the sockets.
    old = root / "camera" / "versions" / "0001"
    with zipfile.ZipFile(old / "runner.pyz") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    files["__main__.py"] = b"import sys\nassert sys.argv[1] != 'serve'\n" + files["__main__.py"]
    with zipfile.ZipFile(old / "runner.pyz", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    description = layout.read_json(old / "deployment.json")
    description["files"]["runner.pyz"] = layout.digest(old / "runner.pyz")
    layout.write_json(old / "deployment.json", description)
    # What an earlier release deployed has no runner beside its versions.
    (root / "camera" / "runner.pyz").unlink(missing_ok=True)
    assert boot.start_command(root, "camera")[1] == str(root / "camera" / "current" / "runner.pyz")
    client.update_deployment("camera", config={"rollback": "true"})
    os.kill(pid_of(root), signal.SIGKILL)
    deadline = time.monotonic() + 60
    while workers_of(root) and time.monotonic() < deadline:
        time.sleep(0.02)
    process = subprocess.Popen(boot.start_command(root, "camera"), start_new_session=True)
    try:
        while not serving(root, "camera") and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        assert serving(root, "camera").get("version") == "0001"
        client.delete_deployment("camera")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()
    assert not (root / "camera").exists()


def test_in_a_program_of_its_own(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str], tmp_path: Path
) -> None:
    client, deployment, root = deployed
    python = python_with(tmp_path / "venv", "numpy", "ai_edge_litert", "flatbuffers", "typing_extensions")
    pixels = tmp_path / "pixels.npy"
    np.save(pixels, image_of("blue", height=SIZE, width=SIZE))
    code = f"""
import sys
sys.path.insert(0, {deployment["directory"] + "/runner.pyz"!r})
import numpy, foxnas_edge
model = foxnas_edge.load({str(root / "camera")!r})
for line in sys.stdin:
    row = model.classify(numpy.load({str(pixels)!r}))
    print(model.version, row["label"], *row["probabilities"], flush=True)
assert not {{"mlflow", "PIL", "pandas"}} & set(sys.modules)
"""
    with subprocess.Popen([python, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdin is not None
        assert program.stdout is not None

        def classified() -> list[str]:
            program.stdin.write("\n")
            program.stdin.flush()
            return program.stdout.readline().split()

        version, label, *probabilities = classified()
        assert (version, label) == ("0001", "blue")
        client.update_deployment("camera", versions[1])
        assert classified()[:2] == ["0003", "bleu"]
        program.stdin.close()
        assert program.wait(timeout=60) == 0
    over_http = send(client.get_deployment("camera")["service"]["url"], "application/x-npy", pixels.read_bytes())[1]
    assert [float(value) for value in probabilities] == over_http["predictions"][0]["probabilities"]


def test_a_program_sees_that_a_deployment_was_made_anew(
    deployed: tuple[Any, dict[str, Any], Path], versions: tuple[str, str]
) -> None:
    """Its first version has the number of the one that was deleted."""
    client, _, root = deployed
    model, pixels = foxnas_edge.load(root / "camera"), image_of("blue", height=SIZE, width=SIZE)
    assert (model.classify(pixels)["label"], model.version) == ("blue", "0001")
    # One that cannot be opened is none to answer from.
    unopened = root / "camera" / "versions" / "0009"
    shutil.copytree(root / "camera" / "versions" / "0001", unopened)
    (unopened / "model.tflite").write_bytes(b"no model")
    layout.point_to(root, "camera", unopened)
    with pytest.warns(RuntimeWarning, match="version 0001 goes on answering: a TFLite model must be one"):
        assert (model.classify(pixels)["label"], model.version) == ("blue", "0001")
    assert (model.classify(pixels)["label"], model.version) == ("blue", "0001")
    description = layout.read_json(unopened / "deployment.json")
    for damaged, why in (
        ({**description, "preprocessing": {}}, "InvalidFormatError: "),
        ({**description, "labels": None}, "TypeError: "),
        (None, "FileNotFoundError: "),
    ):
        if damaged is None:
            (unopened / "deployment.json").unlink()
        else:
            layout.write_json(unopened / "deployment.json", damaged)
        with pytest.warns(RuntimeWarning, match=f"version 0001 goes on answering: {why}"):
            assert (model.classify(pixels)["label"], model.version) == ("blue", "0001")
        assert (model.classify(pixels)["label"], model.version) == ("blue", "0001")
    layout.point_to(root, "camera", root / "camera" / "versions" / "0002")
    assert (model.classify(pixels)["label"], model.version) == ("bleu", "0002")
    client.delete_deployment("camera")
    with pytest.raises(RunnerError) as error:
        model.classify(pixels)
    assert error.value.kind == "no_deployment"
    client.create_deployment("camera", versions[1], config={"serve": "false"})
    assert (model.classify(pixels)["label"], model.version) == ("bleu", "0001")


def test_what_travels_is_python_3_7_and_names_nothing_that_boards_lack() -> None:
    allowed = {"foxnas_mlflow", "numpy"}
    with zipfile.ZipFile(io.BytesIO(runner())) as archive:
        for name in archive.namelist():
            tree = ast.parse(archive.read(name), feature_version=(3, 7))
            for node in ast.walk(tree):
                names: Sequence[str] = ()
                if isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                elif isinstance(node, ast.ImportFrom):
                    names = [node.module or ""]
                assert {n.split(".")[0] for n in names} <= allowed | sys.stdlib_module_names, name
                for own in (n for n in names if n.startswith("foxnas_mlflow")):
                    path = own.replace(".", "/")
                    assert {f"{path}.py", f"{path}/__init__.py"} & set(archive.namelist()), f"{name} imports {own}"
                # Of Python 3.9 and newer.
                assert not (isinstance(node, ast.Attribute) and node.attr in ("removeprefix", "removesuffix", "cache"))
                keywords = [k.arg for k in node.keywords] if isinstance(node, ast.Call) else []
                assert not {"slots", "kw_only", "strict"} & set(keywords), name
                joined = [node.left, node.right] if isinstance(node, ast.BinOp) else []
                joined = [node.value] if isinstance(node, ast.AugAssign) else joined
                if joined and isinstance(node.op, ast.BitOr):  # type: ignore[attr-defined]
                    assert not any(isinstance(part, ast.Dict) for each in joined for part in ast.walk(each)), name


@pytest.fixture
def open_root() -> Iterator[Path]:
    """A directory that every account can enter."""
    root = Path(tempfile.mkdtemp(prefix="foxnas-board-", dir="/tmp"))
    root.chmod(0o755)
    yield root
    clear(root / "board")
    shutil.rmtree(root)


def python_for_all(directory: Path) -> str:
    """A Python that every account can run, with the packages of this one."""
    installed = Path(np.__file__).resolve().parents[1]
    if not all(path.stat().st_mode & stat.S_IXOTH for path in (installed, *installed.parents)):
        pytest.skip(f"other accounts cannot read the packages at {installed}")
    real = Path(sys.executable).resolve()
    if all(path.stat().st_mode & stat.S_IXOTH for path in (real, *real.parents)):
        return sys.executable
    system = shutil.which(f"python{sys.version_info.major}.{sys.version_info.minor}", path="/usr/bin")
    if system is None:
        pytest.skip(f"other accounts cannot run {real}, and there is no such Python in /usr/bin")
    before = os.umask(0o022)
    try:
        subprocess.run([system, "-m", "venv", "--without-pip", str(directory / "venv")], check=True)
        (packages,) = (directory / "venv").glob("lib/python*/site-packages")
        (packages / "tests.pth").write_text(f"{Path(np.__file__).parents[1]}\n")
    finally:
        os.umask(before)
    return str(directory / "venv" / "bin" / "python")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may serve as another account")
def test_another_account_serves(
    versions: tuple[str, str], open_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a deployer who lets nobody read what is new."""
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    config = {"account": "nobody"}
    with pytest.raises(MlflowException, match=r"runs as an account that can read its model.*nobody cannot read"):
        get_deploy_client(f"edge://local?root={closed / 'board'}").create_deployment(
            "camera", versions[0], config=config
        )
    before = os.umask(0o077)
    try:
        monkeypatch.setattr(LocalConnection, "python", python_for_all(open_root))
        client = get_deploy_client(f"edge://local?root={open_root / 'board'}")
        deployment = client.create_deployment("camera", versions[0], config=config)
    finally:
        os.umask(before)
    assert deployment["service"]["account"] == "nobody"
    root = open_root / "board"
    owners = {Path(f"/proc/{pid}").stat().st_uid for pid in (pid_of(root), *workers_of(root))}
    assert owners == {65534}
    assert not (root / "camera").stat().st_mode & stat.S_IWOTH
    # It may write where its sockets are, and nowhere else; they are where they always were.
    writable = [path for path in (root, *root.glob("**/*")) if path.lstat().st_uid == 65534]
    assert {path.parent for path in writable} == {root / "camera" / "run", root / "camera" / "run" / "own"}
    assert [path.name for path in writable if path.parent.name == "run"] == ["own"]
    over_unix = UnixConnection(deployment["service"]["socket"])
    with contextlib.closing(over_unix):
        over_unix.request("GET", "/ping")
        assert over_unix.getresponse().status == 200
    image = encoded(image_of("green"))
    assert send(deployment["service"]["url"], "image/jpeg", image)[1]["predictions"][0]["label"] == "green"
    assert client.update_deployment("camera", versions[1])["service"]["version"] == "0002"
    with pytest.raises(MlflowException, match="cannot change it"):
        client.update_deployment("camera", versions[1], config={"account": "root"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may serve as another account")
def test_links_of_the_account_lead_root_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the directory that an earlier release gave to the account."""
    run, precious = tmp_path / "camera" / "run", tmp_path / "precious"
    (run / "given").mkdir(parents=True)
    precious.write_text("kept")
    for name in ("lock", "log", "failed.json", ".failed.json.next", "own"):
        (run / name).symlink_to(precious if name != "own" else tmp_path)
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as control:
        monkeypatch.chdir(run)
        control.bind("control.sock")
    for path in (run, *run.iterdir()):
        os.chown(path, 65534, 65534, follow_symlinks=False)
    for start in (lambda: boot.start_detached(tmp_path, "camera"), lambda: stop(tmp_path, "camera")):
        with pytest.raises(OSError, match="symbolic links"):
            start()
    owner = tmp_path.stat().st_uid
    assert layout.make_run(tmp_path, "camera", "nobody") == run / "own"
    assert sorted(path.name for path in run.iterdir()) == ["control.sock", "own"]
    assert (run.stat().st_uid, (run / "own").lstat().st_uid, tmp_path.stat().st_uid) == (0, 65534, owner)
    assert precious.read_text() == "kept"


def test_what_an_account_left_in_place_of_a_failure_stops_nothing(tmp_path: Path) -> None:
    secret, run = tmp_path / "secret", tmp_path / "camera" / "run"
    secret.write_text('{"kind": "port", "message": "of root"}')
    own = run / "own" / "failed.json"
    (own.parent / "deep").mkdir(parents=True)
    (own.parent / "deep" / "failed.json").write_bytes(secret.read_bytes())
    assert runner_module.failures(tmp_path, "camera") == [run / "failed.json", own]
    for make in (lambda: None, own.mkdir, lambda: own.symlink_to(secret), lambda: os.mkfifo(own)):
        make()
        assert runner_module.read_failure(own) is None
        if own.is_dir():
            own.rmdir()
        else:
            with contextlib.suppress(FileNotFoundError):
                own.unlink()
    for data in (b"", b"{", b"[]", b"{}", b'{"kind": "port"}', b"[" * 2**17, b"\xff"):
        own.write_bytes(data)
        failure = runner_module.read_failure(own)
        assert failure is not None
        assert (failure.kind, str(failure)) == ("service", f"{own} does not say why it did not start")
    own.write_bytes(secret.read_bytes())
    failure = runner_module.read_failure(own)
    assert failure is not None
    assert (failure.kind, str(failure)) == ("port", "of root")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may become another user")
def test_a_user_without_an_account_has_a_service_too(open_root: Path) -> None:
    """As in a container that was started with a number."""
    os.chown(open_root, 54321, 54321)
    os.seteuid(54321)
    try:
        (open_root / "camera").mkdir()
        own = layout.make_run(open_root, "camera", "")
    finally:
        os.seteuid(0)
    assert own.stat().st_uid == 54321


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may serve as another account")
def test_root_kills_nobody_that_an_account_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner_module, "STOP_SECONDS", 0.0)
    run = tmp_path / "camera" / "run"
    run.mkdir(parents=True)
    with subprocess.Popen(["sleep", "600"]) as process, (run / "lock").open("w") as lock:
        lock.write(f"{process.pid}\n")
        lock.flush()
        os.chown(run / "lock", 65534, 65534)
        fcntl.flock(lock, fcntl.LOCK_EX)
        stop(tmp_path, "camera")
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.2)
        process.kill()


def test_a_file_that_is_damaged_stops_no_other_deployment(tmp_path: Path) -> None:
    for name, text in (
        ("camera", "{"),
        ("door", "[]"),
        ("gate", "{}"),
        ("shed", "{}"),
        ("yard", f'{{"port": {runner_module.FIRST_PORT}}}'),
    ):
        version = tmp_path / name / "versions" / "0001"
        version.mkdir(parents=True)
        (version.parents[1] / "current").symlink_to(version)
        for file in (version / "deployment.json", version / "state.json", version.parents[1] / "service.json"):
            file.write_text(text)
    assert runner_module.free_port(tmp_path, "new", "127.0.0.1") != runner_module.FIRST_PORT
    # What cannot be read is neither.
    for file in (tmp_path / "shed" / "versions" / "0001" / "deployment.json", tmp_path / "shed" / "service.json"):
        file.unlink()
        file.mkdir()
    assert runner_module.free_port(tmp_path, "new", "127.0.0.1") != runner_module.FIRST_PORT
    names = ("camera", "door", "gate", "shed")
    found = [runner_module.listed(tmp_path, name) for name in names]
    assert [each["name"] for each in found] == list(names)
    for name, each in zip(names, found, strict=True):
        version = tmp_path / name / "versions" / "0001"
        beginning = {"gate": f"{version}: KeyError", "shed": "[Errno 21] Is a directory"}
        assert each["error"].startswith(beginning.get(name, f"{version / 'deployment.json'}: "))
    for name in ("camera", "door", "gate"):
        assert service.run_service(tmp_path, name) == 1


def test_leftovers_go_by_age_on_a_clock_that_nobody_sets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "camera"
    place.mkdir()
    old = Path(layout.make_incoming(place))
    boot, seconds = layout.moment()
    # A machine that has just started counts few seconds: the old copy is not made earlier, the others are later.
    later = seconds + layout.STALE_SECONDS + 10
    monkeypatch.setattr(layout, "moment", lambda: (boot, later))
    fresh = Path(layout.make_incoming(place))
    earlier_start = place / fresh.name.replace(boot, "0" * 32)
    unmarked = place / ".incoming-abcdefgh"
    for path in (earlier_start, unmarked, tmp_path / ".deleted-x"):
        path.mkdir()
    for path in (old, earlier_start, unmarked, tmp_path / ".deleted-x"):
        (path / "model.tflite").write_bytes(b"half")
    # A clock that jumped by years either way tells nothing.
    for path, seconds_of_clock in ((fresh, 0), (old, 2**32)):
        os.utime(path, (seconds_of_clock, seconds_of_clock))
    layout.remove_stale(tmp_path)
    assert list(place.iterdir()) == [fresh]
    assert not (tmp_path / ".deleted-x").exists()


CRONTAB = """#!/bin/sh
# A crontab of one user: prints it, or takes another from standard input.
case "$1" in
  -l) test -f {table} && cat {table} || {{ echo "no crontab for you" >&2; exit 1; }} ;;
  -) cat > {table} ;;
  *) exit 2 ;;
esac
"""


@contextlib.contextmanager
def cron(tools: Path, table: Path) -> Iterator[None]:
    """A directory with a crontab, of one user, and a daemon's process."""
    tools.mkdir()
    (tools / "crontab").write_text(CRONTAB.format(table=table))
    shutil.copy(shutil.which("sleep") or "", tools / "cron")
    for tool in tools.iterdir():
        tool.chmod(0o755)
    with subprocess.Popen([tools / "cron", "600"]) as daemon:
        try:
            yield
        finally:
            daemon.kill()


@pytest.mark.skipif(Path("/run/systemd/system").is_dir(), reason="systemd runs here, and is asked first")
def test_cron_starts_it_where_there_is_no_systemd(
    versions: tuple[str, str], target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, table = tmp_path / "tools", tmp_path / "table"
    table.write_text("@daily backup\n")
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    client = get_deploy_client(target)
    with cron(tools, table):
        created = client.create_deployment("camera", versions[0])
        assert (created["service"]["starts_by"], created["service"]["note"]) == ("cron", "")
    client.update_deployment("camera", versions[1])
    other, line = table.read_text().splitlines()
    assert other == "@daily backup"
    assert line.startswith("* * * * * ")
    root = tmp_path / "board"
    os.kill(pid_of(root), signal.SIGKILL)
    # What cron does with the line.
    process = subprocess.Popen(["/bin/sh", "-c", line.removeprefix("* * * * * ")], start_new_session=True)
    deadline = time.monotonic() + 60
    while serving(root, "camera").get("version") != "0002" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert request(created["service"]["url"] + "/ping")[0] == 200
    client.delete_deployment("camera")
    assert process.wait(timeout=60) == 0
    assert table.read_text() == "@daily backup\n"


def test_a_daemon_of_cron_is_seen_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"cron-{os.getpid()}"
    monkeypatch.setattr(boot, "CRON_DAEMONS", (name,))
    assert not boot._cron_runs()
    assert boot.note("cron", tmp_path, "camera").startswith("no cron runs here: start it, or let this ")
    daemon = Path(shutil.copy(shutil.which("sleep") or "", tmp_path / name))
    with subprocess.Popen([daemon, "600"]) as process:
        try:
            # It is started a moment before it has its name.
            deadline = time.monotonic() + 60
            while Path(f"/proc/{process.pid}/comm").read_text() != f"{name}\n" and time.monotonic() < deadline:
                time.sleep(0.01)
            assert boot._cron_runs()
            assert boot.note("cron", tmp_path, "camera") == ""
        finally:
            process.kill()


def test_a_users_crontab_is_kept_byte_by_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools, table = tmp_path / "tools", tmp_path / "table"
    tools.mkdir()
    (tools / "crontab").write_text(CRONTAB.format(table=table))
    (tools / "crontab").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    others = "# Süd\n@daily a\x0cb\u2028c\n".encode() + b"@daily caf\xe9\n\n"
    for before in (others, others[:-2], None):
        table.unlink(missing_ok=True)
        if before is not None:
            table.write_bytes(before)
        assert boot._edit_crontab(tmp_path, "camera", add=True)
        assert table.read_bytes().startswith(before or b"* * * * * ")
        assert boot._edit_crontab(tmp_path, "camera", add=False)
        assert table.read_bytes().rstrip(b"\n") == (before or b"").rstrip(b"\n")
    # A table that cannot be read is not taken for an empty one.
    table.write_bytes(others)
    (tools / "crontab").write_text(f"#!/bin/sh\ntest $1 = - && exec cat > {table}\necho no space left >&2; exit 1\n")
    for add in (True, False):
        assert not boot._edit_crontab(tmp_path, "camera", add=add)
    assert table.read_bytes() == others


@pytest.mark.skipif(
    Path("/run/systemd/system").is_dir() or shutil.which("crontab") is not None, reason="something here starts it"
)
def test_a_board_where_nothing_starts_it_says_so(
    versions: tuple[str, str], target: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = get_deploy_client(target).create_deployment("camera", versions[0])["service"]
    assert service["starts_by"] == "nothing"
    assert f"camera: {service['note']}" in caplog.messages
    assert service["note"].startswith("no systemd and no cron here: let this start it when the board starts: ")
    assert service["note"].endswith(" ".join(serve(tmp_path / "board", "camera")))
