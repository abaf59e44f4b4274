"""Real servers on loopback, started for a test and ended by their own process group."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def request(url: str, body: Any = None, *, timeout: float = 60) -> tuple[int, str]:
    """POST JSON (or GET without a body); the status and the answer's text."""
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(message, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, *, log: Path, env: Mapping[str, str] | None = None, seconds: float = 180
) -> Iterator[str]:
    """Run a server until the block ends; yields once `url` answers 200."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env={**os.environ, **(env or {})}
        )
        try:
            deadline = time.monotonic() + seconds
            while True:
                if process.poll() is not None:
                    raise RuntimeError(f"{command} ended with {process.returncode}:\n{log.read_text()[-4000:]}")
                with contextlib.suppress(OSError):
                    if request(url, timeout=5)[0] == 200:
                        break
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{command} did not answer:\n{log.read_text()[-4000:]}")
                time.sleep(0.1)
            yield url
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@contextlib.contextmanager
def scoring_server(
    model_uri: str, *, log: Path, env_manager: str = "local", env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`mlflow models serve`; yields the URL of its invocations."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model_uri, "-h", "127.0.0.1"]
    command += ["-p", str(port), "--env-manager", env_manager]
    with running(command, f"http://127.0.0.1:{port}/ping", log=log, env=env):
        yield f"http://127.0.0.1:{port}/invocations"
