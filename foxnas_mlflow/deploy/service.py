"""Serves the active version of a deployment over HTTP on the board itself; travels in ``runner.pyz``.

The service holds the sockets and never the model: workers do, processes of their own. So a worker may die, and
its request is answered by the next one; and a version is switched while the sockets stay open: the new version's
workers are started and tried first, then new requests go to them, and the old ones end when they have answered.

    GET  /ping, /health   200 while a worker answers
    GET  /version         the MLflow that deployed
    GET  /info            JSON: which version serves, and how
    GET  /metrics         counters and histograms, in the text format of Prometheus
    POST /invocations     MLflow's scoring protocol, see `worker.read_request`

The runner speaks with it over a socket that other accounts cannot open: ``/prepare``, ``/follow``, ``/stop``. What
is active is what ``current`` points to, always: the service looks there again and again, also unasked.

Nothing but the standard library is imported here: the service stays small, and starts at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.server
import json
import os
import queue
import re
import select
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from foxnas_mlflow.core.places import Places
from foxnas_mlflow.deploy.boot import MAX_LOG_BYTES
from foxnas_mlflow.deploy.layout import (
    SCARCE,
    RunnerError,
    current,
    entry_of,
    kind_of,
    log,
    make_run,
    read_json,
    read_settings,
    write_json,
)
from foxnas_mlflow.deploy.worker import RefusedError, problem, receive, send

HTTP_SOCKET = "http.sock"
CONTROL_SOCKET = "control.sock"
MAX_BODY_BYTES = 64 * 2**20
START_SECONDS = 120.0
"""A worker that has not opened its model by then never will."""
EXIT_SECONDS = 10.0
"""A worker that has closed its socket has ended by then."""
ANSWER_SECONDS = 60.0
"""A worker that has neither answered by then nor said that it is at its next image is replaced; it has a second more
for each 64 KiB of the request."""
IDLE_SECONDS = 75.0
"""A connection on which nothing comes for so long is closed."""
CLOSE_SECONDS = 300.0
"""What is to end waits so long for those whose requests it answers."""
LEAVE_SECONDS = 2.0
"""At its end the service waits so long for clients that ask again on an open connection."""
POLL_SECONDS = 0.5
HEAL_SECONDS = 10.0
"""A worker that could not be started is tried again after so long; a request tries at once."""
KEEP_SECONDS = 120.0
"""A version that was prepared, and is not active by then, is dropped."""
ATTEMPTS = 3
"""A request at which so many workers died, or could not be started, is not tried again."""
AGAIN_SECONDS = 1.0
"""After so long a request tries again to start a worker: memory that was short may be there then."""
UPLOAD_SECONDS = 20.0
"""A body of which nothing comes for so long is refused, and one that takes longer, with a second more for each 64 KiB.
At its end the service waits so long for one: less than who ends it waits before a kill."""
MAX_CONNECTIONS = 256
"""Of applications. For one more, that which has asked nothing for longest is closed: of descriptors, often 1024 in all,
some are left for the runner and for a worker that must be replaced."""
FRESH_SECONDS = 0.01
"""A connection that was taken so recently may not have had the time to ask, and is not closed for another one. Longer,
and so many as come in that time would keep all others out."""
STACK_BYTES = 2**19
"""Of a connection's thread: with 32 bits there is no room for so many of the usual 8 MiB."""
NO_DESCRIPTOR_SECONDS = 0.1
"""A connection that cannot be taken is looked for again after so long: it waits, and would be told of at once."""
MAX_WAITING = 128
"""Whole requests that wait or run at once; more are rejected with status 503."""
MAX_HELD_BYTES = max(MAX_BODY_BYTES, min(2**27, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 8))
"""Of all bodies, also of those that still come, the service has so much in memory at once."""
SMALL_BYTES = MAX_HELD_BYTES // MAX_CONNECTIONS
"""So much of every body there is always room for, beyond what all are held to: in all twice that at most."""
DRAIN_SECONDS = 2.0
"""What a client still sends of a request that was refused is read for so long."""
BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Upper bounds of the histograms, in seconds."""
KEPT_MEMORY = (
    {"MALLOC_TRIM_THRESHOLD_": str(32 * 2**20), "MALLOC_MMAP_THRESHOLD_": str(16 * 2**20)}
    if sys.maxsize > 2**32
    else {}
)
"""A worker keeps the memory of an image for the next one: glibc would give it back, and fault in each page again.
With 32 bits glibc refuses the second one, and the first one alone ends what it learns by itself."""
_PIECE_BYTES = 2**16
_LONGEST_LINE = 1024
_MOST_TRAILERS = 100


class Worker:
    """A process that has a version open."""

    def __init__(self, version: Path, python: str) -> None:
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            raise RunnerError("busy", f"no socket for a worker: {error.strerror}") from error
        with theirs:
            try:
                self._process = subprocess.Popen(  # noqa: S603
                    [python, str(version / "runner.pyz"), "worker", str(version), str(theirs.fileno())],
                    stdin=subprocess.DEVNULL,
                    stdout=2,
                    pass_fds=(theirs.fileno(),),
                    env={**KEPT_MEMORY, **os.environ},
                )
            except OSError as error:
                ours.close()
                kind = "busy" if error.errno in SCARCE else "worker"
                raise RunnerError(kind, f"{python}: {error.strerror}") from error
        self._connection = ours
        try:
            ours.settimeout(START_SECONDS)
            header, _ = receive(ours)
        except socket.timeout:
            self.end()
            raise RunnerError("busy", f"a worker did not open its model in {START_SECONDS:g} s") from None
        except (OSError, EOFError):
            with contextlib.suppress(subprocess.TimeoutExpired):
                # Its end of the socket closes first; a kill meanwhile would hide how it ended.
                self._process.wait(EXIT_SECONDS)
            self.end()
            status = self._process.returncode
            # Killed as the kernel does where memory ends.
            kind = "busy" if status == -signal.SIGKILL else "worker"
            raise RunnerError(kind, f"a worker ended with status {status} at its start") from None
        if "error" in header:
            self.end()
            raise RunnerError(header["error"], header["message"])

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def alive(self) -> bool:
        """Whether it runs."""
        return self._process.poll() is None

    def ask(self, content_type: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """Its answer to a request.

        Raises:
            EOFError, OSError: If it died, or does not answer.
        """
        self._connection.settimeout(ANSWER_SECONDS + len(body) / 2**16)
        send(self._connection, {"content_type": content_type, "told": True}, body)
        while True:
            header, answer = receive(self._connection)
            if "status" in header:
                return header, answer

    def end(self) -> None:
        """End it, whatever it does."""
        self._connection.close()
        self._process.kill()
        self._process.wait()


class Generation:
    """The workers of one version.

    Args:
        version: Its directory.
        python: Python that has its runtime.
        size: Requests that it answers at a time.
        metrics: Counts the workers that are replaced.

    Raises:
        RunnerError: If a worker cannot be started.
    """

    def __init__(self, version: Path, python: str, size: int, metrics: Metrics) -> None:
        self.version = version
        self.deployment = read_json(version / "deployment.json")
        self._python = python
        self._size = size
        self._metrics = metrics
        self._users = 0
        self._closed = False
        self._heal_after = 0.0
        self._changed = threading.Condition()
        self._tending = threading.Lock()
        # None is the place of a worker that died.
        self._free: queue.LifoQueue[Worker | None] = Places()
        self._workers: set[Worker] = set()
        try:
            for _ in range(size):
                self._free.put(self._opened())
        except RunnerError:
            self._end_workers()
            raise

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """Hold off `close` for the duration of the block."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()
                if self._closed and not self._users:
                    self._end_workers()

    def ask(self, content_type: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes]:
        """The answer of a worker; of another one, if it dies meanwhile.

        Raises:
            RunnerError: If no worker can be started, or every one that tried has died.
        """
        for left in reversed(range(ATTEMPTS)):
            try:
                worker = self._take()
            except RunnerError as error:
                # A stick that is gone, or a file that is damaged, is not there a second later.
                if not left or error.kind not in ("busy", "worker"):
                    raise
                time.sleep(AGAIN_SECONDS)
                continue
            try:
                answer = worker.ask(content_type, body)
            except BaseException as error:
                self._end(worker)
                self._free.put(None)
                if not isinstance(error, (OSError, EOFError)):
                    raise
            else:
                broken = answer[0].get("broken")
                if broken:
                    self._end(worker)
                self._free.put(None if broken else worker)
                return answer
        raise RunnerError("worker", f"{ATTEMPTS} workers ended, or did not answer, at this request")

    def heal(self) -> None:
        """Replace idle workers that died, so that the next request need not wait for that."""
        if time.monotonic() < self._heal_after:
            return
        with self._tending:
            self._heal()

    def _heal(self) -> None:
        places = []
        with contextlib.suppress(queue.Empty):
            while True:
                places.append(self._free.get_nowait())
        dead = [worker for worker in places if worker is None or not worker.alive()]
        for worker in places:
            if worker not in dead:
                self._free.put(worker)
        for worker in dead:
            try:
                self._free.put(self._replaced(worker))
            except Exception as error:
                log(f"error: {error}")
                self._heal_after = time.monotonic() + HEAL_SECONDS

    def alive(self) -> bool:
        """Whether a worker answers, or could."""
        return any(worker.alive() for worker in self._workers.copy())

    def pids(self) -> list[int]:
        """Processes of the idle workers."""
        with self._free.mutex:
            return [worker.pid for worker in self._free.queue if worker is not None]

    def close(self) -> None:
        """End the workers once nobody uses them any more; who still does after a while ends them then."""
        with self._changed:
            self._changed.wait_for(lambda: self._users == 0, timeout=CLOSE_SECONDS)
            self._closed = True
            if not self._users:
                self._end_workers()

    def reopen(self) -> None:
        """Go on after `close`: workers are started when they are needed, or by `heal`."""
        with self._changed:
            self._closed = False
            if not self._users:
                for _ in range(self._size):
                    self._free.put(None)

    def _take(self) -> Worker:
        worker = self._free.get()
        return worker if worker is not None and worker.alive() else self._replaced(worker)

    def _replaced(self, worker: Worker | None) -> Worker:
        if worker is not None:
            self._end(worker)
        self._metrics.replaced()
        try:
            return self._opened()
        except BaseException:
            self._free.put(None)
            raise

    def _end_workers(self) -> None:
        with self._tending, contextlib.suppress(queue.Empty):
            while True:
                worker = self._free.get_nowait()
                if worker is not None:
                    self._end(worker)

    def _opened(self) -> Worker:
        worker = Worker(self.version, self._python)
        self._workers.add(worker)
        return worker

    def _end(self, worker: Worker) -> None:
        self._workers.discard(worker)
        worker.end()


class Metrics:
    """What the service counts."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codes: dict[int, int] = {}
        self._images = 0
        self.waiting = 0
        self._running = 0
        self._held = 0
        self._counts = {name: [0] * (len(BUCKETS) + 1) for name in ("request", "worker")}
        self._seconds = {"request": 0.0, "worker": 0.0}
        self.switches = 0
        self._restarts = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[Callable[[int], None]]:
        """Count one more request in for the duration of the block; it says how many bytes of it have come.

        Raises:
            RefusedError: If there is no room for so many bytes, or they come too slowly.
        """
        mine, began = 0, time.monotonic()

        def hold(n_bytes: int) -> None:
            nonlocal mine
            if time.monotonic() > began + UPLOAD_SECONDS + (mine + n_bytes) / 2**16:
                raise RefusedError(408, f"a body must come in {UPLOAD_SECONDS:g} s, and a second for each 64 KiB")
            with self._lock:
                if n_bytes and mine + n_bytes > SMALL_BYTES and self._held + n_bytes > MAX_HELD_BYTES:
                    raise RefusedError(503, f"{MAX_HELD_BYTES} bytes of requests wait already; send this later")
                self._held += n_bytes
                mine += n_bytes

        with self._lock:
            self.waiting += 1
        try:
            yield hold
        finally:
            with self._lock:
                self.waiting -= 1
                self._held -= mine

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let one more request, which is there to its end, wait for a worker or run for the duration of the block.

        Raises:
            RefusedError: If there is no room for it.
        """
        with self._lock:
            if self._running >= MAX_WAITING:
                raise RefusedError(503, f"{MAX_WAITING} requests wait already; send this later")
            self._running += 1
        try:
            yield
        finally:
            with self._lock:
                self._running -= 1

    def leave_seconds(self) -> float:
        """How long after its end the service stays for what there is to answer."""
        with self._lock:
            return CLOSE_SECONDS if self._running else UPLOAD_SECONDS if self.waiting else LEAVE_SECONDS

    def replaced(self) -> None:
        """Count a worker that was replaced."""
        with self._lock:
            self._restarts += 1

    def count(self, status: int, images: int, **seconds: float) -> None:
        """Count an answer, and what took how long."""
        with self._lock:
            self._codes[status] = self._codes.get(status, 0) + 1
            self._images += images
            for name, value in seconds.items():
                place = next((i for i, bound in enumerate(BUCKETS) if value <= bound), len(BUCKETS))
                self._counts[name][place] += 1
                self._seconds[name] += value

    def text(self, info: dict[str, str]) -> str:
        """All of it in the text format of Prometheus."""
        with self._lock:
            lines = [
                "# HELP foxnas_info What is served.",
                "# TYPE foxnas_info gauge",
                f"foxnas_info{{{','.join(f'{key}={_quoted(value)}' for key, value in info.items())}}} 1",
                "# HELP foxnas_requests_total Requests for predictions, by status.",
                "# TYPE foxnas_requests_total counter",
                *(f'foxnas_requests_total{{code="{code}"}} {n}' for code, n in sorted(self._codes.items())),
            ]
            values = (
                ("rejected_total", "counter", "Requests that were refused or failed.", self._rejected()),
                ("images_total", "counter", "Images that were classified.", self._images),
                ("requests_waiting", "gauge", "Requests that come, wait or run.", self.waiting),
                ("worker_restarts_total", "counter", "Workers that were replaced.", self._restarts),
                ("switches_total", "counter", "Changes of the active version.", self.switches),
            )
            for name, kind, words, value in values:
                lines += [f"# HELP foxnas_{name} {words}", f"# TYPE foxnas_{name} {kind}", f"foxnas_{name} {value}"]
            for name, words in (("request", "Time to an answer."), ("worker", "Time in the worker alone.")):
                lines += [f"# HELP foxnas_{name}_seconds {words}", f"# TYPE foxnas_{name}_seconds histogram"]
                n = 0
                for bound, inside in zip((*map(str, BUCKETS), "+Inf"), self._counts[name]):
                    n += inside
                    lines.append(f'foxnas_{name}_seconds_bucket{{le="{bound}"}} {n}')
                lines += [f"foxnas_{name}_seconds_sum {self._seconds[name]:.6f}", f"foxnas_{name}_seconds_count {n}"]
        return "\n".join(lines) + "\n"

    def _rejected(self) -> int:
        return sum(n for code, n in self._codes.items() if code >= 400)


def _quoted(value: str) -> str:
    """A label's value in the text format of Prometheus, which knows three escapes and takes the rest as it is."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _checked_length(n_bytes: int) -> int:
    if n_bytes > MAX_BODY_BYTES:
        raise RefusedError(413, f"a body has at most {MAX_BODY_BYTES} bytes; received {n_bytes} or more")
    return n_bytes


class Handler(http.server.BaseHTTPRequestHandler):
    """Applications' requests."""

    protocol_version = "HTTP/1.1"
    server_version = "foxnas"
    sys_version = ""
    timeout = IDLE_SECONDS
    # An answer leaves in one piece.
    wbufsize = -1
    _unread = False

    @property
    def service(self) -> Service:
        """Whose requests these are."""
        service: Service = self.server.service  # type: ignore[attr-defined]
        return service

    def handle_one_request(self) -> None:
        """Wait for a request, and answer it."""
        # The runner's connections are not taken for others.
        if self.timeout is not None:
            self.service.connections[self.request] = time.monotonic()
        super().handle_one_request()

    def parse_request(self) -> bool:
        """Read a request's head; from then on it is answered."""
        parsed = super().parse_request()
        self.service.connections[self.request] = float("inf")
        return parsed

    def finish(self) -> None:
        """Read what need not be answered."""
        if self._unread:
            self._drain()
        super().finish()

    def do_GET(self) -> None:
        """Answer what is asked without a body."""
        if self.headers.get("Transfer-Encoding") or self.headers.get("Content-Length", "0") != "0":
            # It would be taken for the next request.
            self._unread = self.close_connection = True
        path = urlsplit(self.path).path
        service = self.service
        if path in ("/ping", "/health"):
            self._answer(200 if service.alive() else 503, b"\n")
        elif path == "/version":
            self._answer(200, str(service.active.deployment.get("mlflow_version", "")).encode())
        elif path == "/info":
            self._answer(200, json.dumps(service.info()).encode())
        elif path == "/metrics":
            self._answer(200, service.metrics_text().encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif path == "/invocations":
            self._answer(405, problem("BAD_REQUEST", "/invocations is asked with POST"))
        else:
            self._answer(404, problem("NOT_FOUND", "there are /invocations, /ping, /version, /info and /metrics"))

    def do_POST(self) -> None:
        """Answer a request for predictions."""
        start = time.perf_counter()
        try:
            length = self._announced()
            with self.service.metrics.entered() as hold:
                body = self._come(length, hold)
                with self.service.metrics.running():
                    self._predict(body, start)
        except RefusedError as refused:
            self._refuse(refused)

    def _predict(self, body: bytearray, start: float) -> None:
        try:
            header, answer, version = self.service.predict(self.headers.get("Content-Type") or "", body)
        except RunnerError as error:
            log(f"error: {error}")
            header, answer = {"status": 500}, problem("INTERNAL_ERROR", "no worker could answer; the log has more")
            version = ""
        took = {"request": time.perf_counter() - start}
        if "seconds" in header:
            took["worker"] = header["seconds"]
        # Counted before it is sent: whoever has the answer finds it counted.
        self.service.metrics.count(header["status"], header.get("images", 0), **took)
        self._answer(header["status"], answer, version=version)
        self.wfile.flush()

    def handle_expect_100(self) -> bool:
        """Let a client go on at once that waits for leave to, if what it will send can be taken."""
        try:
            if self.command == "POST":
                self._announced()
        except RefusedError as refused:
            self._refuse(refused)
            return False
        go_on = super().handle_expect_100()
        self.wfile.flush()
        return go_on

    def log_message(self, format: str, *args: Any) -> None:
        """Metrics count; a log of every request would fill the board's card."""

    def _announced(self) -> int | None:
        """Bytes of a request's body; None: it comes in chunks.

        Raises:
            RefusedError: If it is not for predictions, or its body cannot be taken.
        """
        if urlsplit(self.path).path != "/invocations":
            raise RefusedError(404, "predictions are asked with POST /invocations")
        return self._length()

    def _length(self) -> int | None:
        lengths = self.headers.get_all("Content-Length", [])
        coding = self.headers.get("Transfer-Encoding")
        if coding is not None:
            if lengths or coding.strip().lower() != "chunked":
                raise RefusedError(400, "a body comes in chunks, or with its Content-Length")
            return None
        if len(lengths) != 1 or not lengths[0].isdecimal():
            raise RefusedError(411, "a request must say its Content-Length, or come in chunks")
        return _checked_length(int(lengths[0]))

    def _come(self, length: int | None, hold: Callable[[int], None]) -> bytearray:
        """A body of an application, which must keep coming."""
        self.connection.settimeout(UPLOAD_SECONDS)
        try:
            return self._body(length, hold)
        except socket.timeout:
            raise RefusedError(408, f"nothing of the body came for {UPLOAD_SECONDS:g} s") from None
        finally:
            self.connection.settimeout(self.timeout)

    def _body(self, length: int | None, hold: Callable[[int], None]) -> bytearray:
        body = bytearray()
        if length is not None:
            self._read(body, length, hold)
            return body
        while True:
            size, _, _ = self._line(hold).partition(b";")
            if not re.fullmatch(rb"[0-9A-Fa-f]{1,8}\s*", size):
                raise RefusedError(400, "a chunk must begin with its length, in hexadecimal")
            n = int(size, 16)
            if n == 0:
                break
            _checked_length(len(body) + n)
            self._read(body, n, hold)
            if self._line(hold).strip():
                raise RefusedError(400, "a chunk must be as long as it says")
        for _ in range(_MOST_TRAILERS):
            if not self._line(hold).strip():
                return body
        raise RefusedError(400, f"a body has at most {_MOST_TRAILERS} trailers")

    def _line(self, hold: Callable[[int], None]) -> bytes:
        """A line between chunks, or the beginning of one that is too long."""
        line = b""
        while len(line) < _LONGEST_LINE and not line.endswith(b"\n"):
            byte = self.rfile.read(1)
            if not byte:
                break
            # Not for its memory, but for its time: `readline` waits for an end that may never come.
            hold(0)
            line += byte
        return line

    def _read(self, body: bytearray, n: int, hold: Callable[[int], None]) -> None:
        """Add so many bytes to a body; they are held when they have come, not when they are announced."""
        n += len(body)
        while len(body) < n:
            piece = self.rfile.read1(min(_PIECE_BYTES, n - len(body)))
            if not piece:
                raise RefusedError(400, "the body ended early")
            hold(len(piece))
            body += piece

    def _refuse(self, refused: RefusedError) -> None:
        """Answer a request whose body is not read to its end."""
        self._unread = self.close_connection = True
        if refused.status != 404:
            self.service.metrics.count(refused.status, 0)
        code = {404: "NOT_FOUND", 503: "RESOURCE_EXHAUSTED"}.get(refused.status, "BAD_REQUEST")
        self._answer(refused.status, problem(code, str(refused)))

    def _drain(self) -> None:
        """Read what is still sent, for a while: closed before that, a connection is reset, and its answer lost."""
        with contextlib.suppress(OSError, ValueError):
            self.wfile.flush()
            self.connection.shutdown(socket.SHUT_WR)
            deadline = time.monotonic() + DRAIN_SECONDS
            self.connection.settimeout(DRAIN_SECONDS)
            while self.rfile.read1(2**16) and time.monotonic() < deadline:
                pass

    def _answer(self, status: int, body: bytes, kind: str = "application/json", version: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if version:
            self.send_header("X-Foxnas-Version", version)
        if self.service.stopping or self.close_connection:
            self.send_header("Connection", "close")
            self.close_connection = True
        elif self.request_version == "HTTP/1.0":
            # Who asked for it waits for the end of the connection, unless told that it stays.
            self.send_header("Connection", "keep-alive")
        self.end_headers()
        self.wfile.write(body)


class TcpHandler(Handler):
    """Over TCP an answer is not held back to fill a packet."""

    disable_nagle_algorithm = True


class ControlHandler(Handler):
    """The runner's requests."""

    timeout = None  # type: ignore[assignment]

    def _announced(self) -> int | None:
        return self._length()

    def do_POST(self) -> None:
        """Answer a command."""
        try:
            request = json.loads(self._body(self._announced(), lambda _: None).decode() or "{}")
            answer = self.service.control(urlsplit(self.path).path.strip("/"), request)
        except Exception as error:
            answer = {"error": kind_of(error), "message": str(error) or type(error).__name__}
        self.close_connection = True
        self._answer(200, json.dumps(answer).encode())


class Patient(socketserver.ThreadingMixIn, socketserver.TCPServer):
    """A thread a connection; for the next one it waits where there is no descriptor, and does not spin."""

    daemon_threads = True

    def get_request(self) -> tuple[Any, Any]:
        """The next connection."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in SCARCE:
                time.sleep(NO_DESCRIPTOR_SECONDS)
            raise


class _Quiet(Patient):
    """Counts connections from when they are accepted, and closes idle ones for new ones."""

    allow_reuse_address = True
    request_queue_size = 256
    service: Service

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is room for a connection."""
        held = self.service.connections.copy()
        if self.RequestHandlerClass is ControlHandler or len(held) < MAX_CONNECTIONS:
            return True
        idle = min(held, key=held.__getitem__)
        if held[idle] > time.monotonic() - FRESH_SECONDS:
            return False
        # Not asked twice; it counts itself in again if there is a request to answer.
        self.service.connections.pop(idle, None)
        with contextlib.suppress(OSError):
            idle.shutdown(socket.SHUT_RD)
        return True

    def process_request(self, request: Any, client_address: Any) -> None:
        """Count a connection in."""
        control = self.RequestHandlerClass is ControlHandler
        self.service.connections[request] = float("inf") if control else time.monotonic()
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Count it out."""
        self.service.connections.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away as they like; anything else is logged in one line."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, socket.timeout)):
            log(f"error: {type(error).__name__}: {error}")


class TcpServer(_Quiet):
    """HTTP over TCP."""


class Tcp6Server(TcpServer):
    """HTTP over IPv6."""

    address_family = socket.AF_INET6


class UnixServer(_Quiet, socketserver.UnixStreamServer):
    """HTTP over a socket in the file system."""


class Prepared(NamedTuple):
    """A version that may be served at once."""

    version: Path
    settings: dict[str, Any]
    generation: Generation | None
    """Its workers; None: they start when those of the active version have given the accelerator up."""
    listener: TcpServer | None
    """Where it will be served; None: where the active one is."""
    until: float
    """When it is dropped, of `time.monotonic`."""


class Service:
    """A deployment that is served.

    Args:
        root: Directory of the board's deployments.
        name: The deployment.

    Raises:
        RunnerError: If the active version cannot be served.
    """

    def __init__(self, root: Path, name: str) -> None:
        self._root, self._name = root, name
        self._place = root / name
        self._changing = threading.Lock()
        self._prepared: Prepared | None = None
        self._open = threading.Event()
        self._open.set()
        self._refused: tuple[str, str] = ("", "")
        self._stopped = False
        self.stopping = False
        # Since when each waits for a request; infinity: it has asked, or is not to be closed.
        self.connections: dict[socket.socket, float] = {}
        self.metrics = Metrics()
        self.settings = read_settings(root, name)
        # Paths of sockets are short: they are made where the service is.
        os.chdir(str(self._place / "run" / "own"))
        self._listener = self._bound(self.settings)
        self._sockets = [
            self._unix(HTTP_SOCKET, Handler, 0o666),
            self._unix(CONTROL_SOCKET, ControlHandler, 0o600),
        ]
        self.active = self._generation(current(root, name), self.settings)
        for server in (self._listener, *self._sockets):
            self._accept(server)

    def run(self) -> None:
        """Serve until told to stop, and look after pointer and workers."""
        while not self._stopped:
            # No event: a signal's handler must not wait for a lock that this thread may hold.
            time.sleep(POLL_SECONDS)
            try:
                self._look_after()
            except Exception as error:
                # Whatever it is, what is served still is.
                log(f"error: {type(error).__name__}: {error}")
        self.stopping = True
        # What was accepted is answered; then the workers end.
        for server in (self._listener, *self._sockets):
            self._close(server)
        start = time.monotonic()
        # Clients that keep a connection open are told with their next answer; idle ones are not waited for long.
        while self.connections and time.monotonic() - start < self.metrics.leave_seconds():
            time.sleep(0.02)
        self.active.close()

    def _look_after(self) -> None:
        shorten_log(self._place / "run")
        self.active.heal()
        with self._changing:
            if self._prepared is not None and time.monotonic() > self._prepared.until:
                self._drop()
            try:
                self._follow()
            except Exception as error:
                log(f"error: version {self._refused[0]}: {error}")

    def stop(self, *_: Any) -> None:
        """End `run`."""
        self._stopped = True

    def predict(self, content_type: str, body: bytes | bytearray) -> tuple[dict[str, Any], bytes, str]:
        """A worker's answer, and the number of the version that gave it."""
        while True:
            self._open.wait()
            active = self.active
            with active.used():
                # Not one that was retired between these two lines.
                if active is self.active and self._open.is_set():
                    header, answer = active.ask(content_type, body)
                    return header, answer, active.version.name

    def alive(self) -> bool:
        """Whether requests are answered, or wait for a version that takes an accelerator over."""
        return self.active.alive() or not self._open.is_set()

    def info(self) -> dict[str, Any]:
        """What is served, and how."""
        active = self.active
        return {
            "name": self._name,
            "version": active.version.name,
            "model_uri": active.deployment["model_uri"],
            "model_id": active.deployment["model_id"],
            "kind": active.deployment["kind"],
            "sha256": active.deployment["files"]["model.tflite"],
            "foxnas_version": active.deployment["foxnas_version"],
            "labels": active.deployment["labels"],
            "url": url_of(self.settings),
            "socket": str(self._place / "run" / HTTP_SOCKET),
            "workers": self.settings["workers"],
        }

    def metrics_text(self) -> str:
        """What ``/metrics`` answers."""
        info = self.info()
        names = ("name", "version", "model_uri", "sha256", "foxnas_version")
        return self.metrics.text({name: str(info[name]) for name in names})

    def control(self, command: str, request: dict[str, Any]) -> dict[str, Any]:
        """Answer the runner.

        ``prepare``: start a version's workers, and listen where it will be served, both aside. ``follow``: serve
        what ``current`` points to. ``status``: tell. ``stop``: end.

        Raises:
            RunnerError: If it cannot be done; what was served still is.
        """
        if command == "stop":
            self.stop()
        elif command in ("prepare", "follow"):
            with self._changing:
                if command == "prepare":
                    self._prepare(Path(request["version"]), request["settings"])
                else:
                    self._refused = ("", "")
                    self._follow()
        elif command != "status":
            raise RunnerError("unknown", command)
        return {"pid": os.getpid(), "workers": self.active.pids(), **self.info()}

    def _prepare(self, version: Path, settings: dict[str, Any]) -> None:
        self._drop()
        moved = any(settings[key] != self.settings[key] for key in ("host", "port"))
        listener = self._bound(settings) if moved else None
        try:
            # One process has an accelerator to itself: such a version starts when the active one has ended.
            alone = bool(read_json(version / "deployment.json")["delegate"])
            generation = None if alone else self._generation(version, settings)
        except BaseException:
            if listener is not None:
                listener.server_close()
            raise
        self._prepared = Prepared(version, settings, generation, listener, time.monotonic() + KEEP_SECONDS)

    def _drop(self) -> None:
        if self._prepared is not None:
            dropped, self._prepared = self._prepared, None
            if dropped.generation is not None:
                dropped.generation.close()
            if dropped.listener is not None:
                dropped.listener.server_close()

    def _follow(self) -> None:
        """Serve what is active, if something else is served."""
        try:
            version = current(self._root, self._name)
        except RunnerError:
            return  # It is being deleted.
        if self._prepared is None or self._prepared.version != version:
            if version == self.active.version or version.name == self._refused[0]:
                return
            try:
                self._prepare(version, read_settings(self._root, self._name))
            except Exception as error:
                self._refused = (version.name, str(error))
                raise
        assert self._prepared is not None
        prepared, self._prepared = self._prepared, None
        settings, generation, listener = prepared.settings, prepared.generation, prepared.listener
        old, old_listener = self.active, self._listener
        if generation is None:
            try:
                self._take_over(version, settings)
            except BaseException as error:
                self._refused = (version.name, str(error))
                if listener is not None:
                    listener.server_close()
                raise
        else:
            self.active = generation
        self.settings = settings
        self.metrics.switches += 1
        if listener is not None:
            self._listener = listener
            self._accept(listener)
            self._close(old_listener)
        threading.Thread(target=old.close, daemon=True).start()

    def _take_over(self, version: Path, settings: dict[str, Any]) -> None:
        """Serve a version on the accelerator that the active one holds: requests wait meanwhile.

        Raises:
            RunnerError: If it cannot be served; the active one is again.
        """
        self._open.clear()
        try:
            self.active.close()
            try:
                self.active = self._generation(version, settings)
            except BaseException:
                self.active.reopen()
                raise
        finally:
            self._open.set()

    def _generation(self, version: Path, settings: dict[str, Any]) -> Generation:
        state = read_json(version / "state.json")
        return Generation(version, state.get("python") or sys.executable, settings["workers"], self.metrics)

    def _bound(self, settings: dict[str, Any]) -> TcpServer:
        host, port = settings["host"], settings["port"]
        try:
            server = (Tcp6Server if ":" in host else TcpServer)((host, port), TcpHandler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RunnerError("port", f"{host} port {port}: {reason}") from error
        server.service = self
        return server

    def _unix(self, name: str, handler: Any, mode: int) -> Any:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        before = os.umask(0o777 & ~mode)
        try:
            server = UnixServer(name, handler)
        finally:
            os.umask(before)
        server.service = self
        return server

    def _close(self, server: Any) -> None:
        """Listen no more; who waits for a connection already still gets it."""
        server.shutdown()
        while select.select([server], [], [], 0)[0]:
            server.handle_request()
        server.server_close()

    def _accept(self, server: Any) -> None:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.5}, daemon=True).start()


def url_of(settings: dict[str, Any]) -> str:
    """Where a service listens."""
    host = settings["host"]
    return f"http://{f'[{host}]' if ':' in host else host}:{settings['port']}"


def shorten_log(run: Path) -> None:
    """Begin the log beside the service anew where it is large; a journal is bounded by itself."""
    with contextlib.suppress(OSError):
        status = os.fstat(2)
        if status.st_size > MAX_LOG_BYTES and os.path.samestat(status, (run / "log").stat()):
            # All who write to it append.
            os.ftruncate(2, 0)


def run_service(root: Path, name: str) -> int:
    """Serve a deployment until it is stopped; at once 0 if another process does already."""
    run = root / name / "run"
    # Also where it ends at every start, and is started again.
    shorten_log(run)
    try:
        settings = read_settings(root, name)
        own = make_run(root, name, settings["account"])
    except (RunnerError, OSError) as error:
        log(f"error: {error}")
        return 1
    lock = os.open(str(run / "lock"), os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return 0
    # Who cannot open it cannot hold it either.
    os.fchmod(lock, 0o600)
    os.ftruncate(lock, 0)
    os.write(lock, f"{os.getpid()}\n".encode())
    for file in (HTTP_SOCKET, CONTROL_SOCKET):
        with contextlib.suppress(FileNotFoundError):
            (run / file).unlink()
        (run / file).symlink_to(Path("own", file))
    threading.stack_size(STACK_BYTES)
    try:
        become(settings["account"])
        service = Service(root, name)
    except (RunnerError, OSError, MemoryError, RuntimeError) as error:
        message = str(error) or type(error).__name__
        log(f"error: {message}")
        with contextlib.suppress(OSError):
            write_json(own / "failed.json", {"kind": kind_of(error), "message": message})
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, service.stop)
    service.run()
    return 0


def become(account: str) -> None:
    """Go on as another account; empty: as this one.

    Raises:
        RunnerError: If there is no such account, or this one may not become it.
    """
    if not account:
        return
    entry = entry_of(account)
    if entry.pw_uid == os.geteuid():
        return
    try:
        os.initgroups(account, entry.pw_gid)
        os.setgid(entry.pw_gid)
        os.setuid(entry.pw_uid)
    except PermissionError as error:
        raise RunnerError("account", f"{account}: only root can serve as another account") from error
    os.environ["HOME"] = entry.pw_dir
