"""A proxy that fails chosen calls of a server, and a command that is run until each of its calls has failed.

`page` makes the table of the documentation from what became of the calls of a whole pipeline.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import socket
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

Kind = Literal["500", "reset", "403", "404"]

KINDS: tuple[Kind, ...] = ("500", "reset", "403")

_ANSWERS: dict[Kind, tuple[int, str]] = {
    "500": (500, '{"error_code": "INTERNAL_ERROR", "message": "the disk of the database is full"}'),
    "403": (403, "Permission denied"),  # as MLflow's own server with users does
    "404": (404, '{"error_code": "ENDPOINT_NOT_FOUND", "message": "no such endpoint"}'),
}

_IDS = re.compile(r"\b(m-)?[0-9a-f]{32}\b")


@dataclass(frozen=True)
class Call:
    """One call of a server, as it is told apart from others.

    Attributes:
        step: Step of the pipeline that makes it.
        what: What it asks for: endpoint, and the tag, file or status that it is about.
        writes: Whether it changes something.
        ends: Whether it ends a run that has failed, gives up a claim, or shows that the process lives.
    """

    step: str
    what: str
    writes: bool = field(default=True, compare=False)
    ends: bool = field(default=False, compare=False)

    def __str__(self) -> str:
        return f"{self.step}: {self.what}"


def _read(method: str, path: str, body: bytes, step: str) -> Call:
    parts = urlsplit(path)
    endpoint = _IDS.sub("ID", parts.path)
    endpoint = re.sub(r"^/(api|ajax-api)/[0-9.]+/(mlflow-artifacts|mlflow)/", "", endpoint)
    try:
        asked: dict[str, Any] = json.loads(body) if body.startswith(b"{") else {}
    except ValueError:
        asked = {}
    about = ""
    ends = False
    if endpoint.startswith("artifacts"):
        # Artifacts of runs and models, by their names there.
        name = re.sub(r"^artifacts/?(\d+/)?(models/)?(ID/)?(artifacts/)?", "", endpoint)
        listed = parse_qs(parts.query).get("path", [""])[0]
        name = name or re.sub(r"^\d+/", "", _IDS.sub("ID", listed))
        endpoint, about = {"PUT": "upload", "GET": "download"}.get(method, method.lower()), name
        if method == "GET" and parts.query:
            endpoint = "list"
    elif "key" in asked:
        about = str(asked["key"])
        given_up = (about, asked.get("value")) == ("foxnas.claim", "")
        ends = given_up or about == "foxnas.heartbeat"
        about += " given up" if given_up else ""
    elif endpoint == "runs/update":
        about = str(asked.get("status", ""))
        ends = about in ("FAILED", "KILLED", "4", "5")
    elif endpoint == "runs/log-batch":
        about = " ".join(name for name in ("params", "metrics", "tags") if asked.get(name))
    elif endpoint == "runs/search":
        about = re.sub(r"'([0-9a-f]+|%.*%)'", "...", str(asked.get("filter", "")))
    writes = method != "GET" and not endpoint.endswith("search")
    shown = "" if endpoint in ("upload", "download", "list") or method in ("POST", "GET") else f"{method} "
    return Call(step, f"{shown}{endpoint} {about}".strip(), writes, ends)


class FaultyServer:
    """A proxy on loopback; what `choose` says of a call happens to it.

    Attributes:
        url: Its address.
        calls: Every call, in the order in which they came.
    """

    def __init__(self, server: str) -> None:
        self._host, self._port = urlsplit(server).hostname or "", urlsplit(server).port
        self.choose: Callable[[Call], Kind | None] = lambda call: None
        self.calls: list[Call] = []
        self._lock = threading.Lock()
        self._stages: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self) -> None:
                owner.serve(self)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve  # noqa: N815

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        """End it."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def begin(self, choose: Callable[[Call], Kind | None]) -> None:
        """A command begins, whose calls fail as `choose` says."""
        with self._lock:
            self._stages.clear()
            self.choose = choose

    def serve(self, handler: BaseHTTPRequestHandler) -> None:
        """Hand a request on, or fail it."""
        body = handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
        with self._lock:
            call = _read(handler.command, handler.path, body, self._stages[-1] if self._stages else "begin")
            self.calls.append(call)
            kind = self.choose(call)
        if kind == "reset":
            # A linger of 0 s makes the closing a reset.
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            handler.close_connection = True
            handler.connection.close()
            return
        if kind is not None:
            status, answer = _ANSWERS[kind]
            kind_of_text = "application/json" if answer.startswith("{") else "text/plain"
            self._answer(handler, status, {"Content-Type": kind_of_text}, answer.encode())
            return
        upstream = http.client.HTTPConnection(self._host, self._port, timeout=120)
        try:
            headers = {key: value for key, value in handler.headers.items() if key.lower() not in ("connection",)}
            headers["Host"] = f"{self._host}:{self._port}"
            upstream.request(handler.command, handler.path, body, headers)
            response = upstream.getresponse()
            answered = response.read()
            self._follow(call, body)
            self._answer(handler, response.status, dict(response.headers.items()), answered)
        finally:
            upstream.close()

    def _follow(self, call: Call, body: bytes) -> None:
        """Which step the next call belongs to."""
        if call.what == "runs/create":
            tags = {tag["key"]: tag["value"] for tag in json.loads(body).get("tags", [])}
            self._stages.append(tags.get("foxnas.stage", "?"))
        elif call.what in ("runs/update FINISHED", "runs/update FAILED") and self._stages:
            # KILLED are those that an earlier command left behind.
            self._stages.pop()

    @staticmethod
    def _answer(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes) -> None:
        handler.send_response(status)
        for key, value in headers.items():
            if key.lower() not in ("content-length", "transfer-encoding", "connection", "server", "date"):
                handler.send_header(key, value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        with contextlib.suppress(OSError):
            handler.wfile.write(body)


@dataclass(frozen=True)
class Outcome:
    """What became of a command one of whose calls failed.

    Attributes:
        call: The call.
        kind: How it failed.
        survived: Whether the work went on without it.
        status: Exit status of the command.
        words: The line that it said of it.
    """

    call: Call
    kind: Kind
    survived: bool
    status: int
    words: str


def fail_each(
    server: FaultyServer,
    argv: Sequence[str],
    kinds: tuple[Kind, ...] = KINDS,
    *,
    only: str = "",
    most: int = 1000,
    log: Path,
) -> Iterator[Outcome]:
    """Run a command until each of its calls has failed in each way, once a run, and it came to its end.

    A call that fails does so as often as it is tried again. Where the work goes on without it, the next one fails in
    the same run.

    Args:
        server: The proxy that the command speaks with.
        argv: The command.
        kinds: How calls fail.
        only: Regular expression of the calls that fail.
        most: Most runs of the command.
        log: What the commands print.

    Yields:
        What became of it, call by call.

    Raises:
        RuntimeError: If it does not come to its end.
    """
    done: set[tuple[Call, Kind]] = set()
    for _ in range(most):
        failing: dict[Call, Kind] = {}

        def choose(call: Call, failing: dict[Call, Kind] = failing) -> Kind | None:
            if call in failing:
                return failing[call]
            # Once something failed, only what shows that the work goes on fails too.
            if (failing and (call.ends or not call.writes)) or not re.search(only, str(call)):
                return None
            for kind in kinds:
                if (call, kind) not in done:
                    done.add((call, kind))
                    failing[call] = kind
                    return kind
            return None

        server.begin(choose)
        status, printed = _forked(argv, log)
        server.begin(lambda call: None)
        said = [line for line in printed.splitlines() if line.startswith("foxnas: ") or "Traceback" in line]
        if not failing:
            if status == 0:
                return
            raise RuntimeError(f"nothing failed, but the command ended with {status}: {printed[-3000:]}")
        *survived, last = failing.items()
        yield from (Outcome(call, kind, True, status, "") for call, kind in survived)
        yield Outcome(*last, status == 0, status, said[-1] if said else "")
    raise RuntimeError(f"after {most} runs there are calls that did not fail yet")


def _forked(argv: Sequence[str], log: Path) -> tuple[int, str]:
    """Exit status and output of a command in a process of its own, which begins with what this one has imported."""
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that a fork leaves behind: here those of the proxy, which the child does not use.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        status = 70
        try:
            output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for descriptor in (1, 2):
                os.dup2(output, descriptor)
            sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1) for descriptor in (1, 2))
            # Those of pytest make errors of warnings.
            warnings.resetwarnings()
            from foxnas_mlflow.cli.main import main

            status = main(argv)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(waited), log.read_text(encoding="utf-8", errors="replace")


_WAYS: dict[Kind, str] = {"500": "status 500", "reset": "a connection that is reset", "403": "status 403"}

_PAGE = """\
# What a failing server does to a pipeline

Each call of `foxnas main` to MLflow {mlflow} fails until the command is run again: {ways}.
The next run goes on from what is finished, and the next call fails. {n_calls} calls, {n} failures:

- {n_stopped} times the command stopped with exit status 2 and one line: `foxnas: the tracking server does not answer
  as it should: runs/create: HTTP 500, also when asked again; check MLFLOW_TRACKING_URI and the server (foxnas doctor),
  then run the same command again: what is finished is kept.`, or `...: runs/create: Connection aborted; check ...`, or
  `foxnas: the tracking store refused: runs/create: HTTP 403: Permission denied; ask for that right; ...`. Where it says
  more, the table shows the middle of it.
- {n_survived} times it went on without what it can do without.
- {end}

Written by `FOXNAS_FAULTS=PAGE pytest tests/tracking/test_faults.py`, with the small pipeline of the tests on the cost
model of `rpi4`. `ID` stands for that of a run or model; "likewise" is the same line with the connection in place of
the status; a dash: the call was not failed in that way.

"""


def page(outcomes: Sequence[Outcome], *, end: str) -> str:
    """The page of the documentation; `end` tells how the pipeline ended and what it left."""
    import mlflow

    kinds = [kind for kind in KINDS if any(outcome.kind == kind for outcome in outcomes)]
    calls: dict[Call, dict[Kind, Outcome]] = {}
    for outcome in outcomes:
        calls.setdefault(outcome.call, {})[outcome.kind] = outcome
    text = _PAGE.format(
        mlflow=mlflow.__version__,
        ways=", ".join(_WAYS[kind] for kind in kinds),
        n_calls=len(calls),
        n=len(outcomes),
        n_stopped=sum(not outcome.survived for outcome in outcomes),
        n_survived=sum(outcome.survived for outcome in outcomes),
        end=end,
    )
    columns = ["step", "call", *kinds]
    text += f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    for call, ways in sorted(calls.items(), key=lambda item: _STEPS.index(item[0].step)):
        cells = [call.step, f"`{call.what.replace('`', '')}`", *(_cell(ways, kind) for kind in kinds)]
        text += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return text


def _cell(ways: dict[Kind, Outcome], kind: Kind) -> str:
    """What became of a call that failed in a way: goes on, stops, or the middle of the line where it says more."""
    if kind not in ways:
        return "-"
    if ways[kind].survived:
        return "goes on"
    words = _middle(ways[kind])
    if _PLAIN.fullmatch(words):
        return "stops"
    if kind == "reset" and "500" in ways:
        return "likewise" if _RESET.sub(_FAILED, words) == _middle(ways["500"]) else words
    return words


_FAILED = "HTTP 500, also when asked again"
_RESET = re.compile("Connection (aborted|reset)")
_PLAIN = re.compile(rf"\S+: ({_FAILED}|{_RESET.pattern}|HTTP 403: Permission denied)")


def _middle(outcome: Outcome) -> str:
    words = _IDS.sub("ID", outcome.words.removeprefix("foxnas: "))
    for begin in ("the tracking server does not answer as it should: ", "the tracking store refused: "):
        words = words.removeprefix(begin)
    return words.partition("; check MLFLOW_TRACKING_URI")[0].partition("; ask for that right")[0]


def tells_what_failed(outcome: Outcome) -> bool:
    """Whether the line of a command that stopped tells a server that failed from a right that is missing."""
    is_refusal = re.search("Permission denied|denied|forbidden", outcome.words, re.I) is not None
    is_failure = re.search(f"{_FAILED}|{_RESET.pattern}", outcome.words) is not None
    return outcome.words.startswith("foxnas: ") and (is_refusal, is_failure) == (
        outcome.kind == "403",
        outcome.kind != "403",
    )


_STEPS = ("begin", "main", "supernet", "sample", "fit", "search", "quantize", "benchmark", "compare", "promote")
