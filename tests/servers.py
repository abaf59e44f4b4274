"""Real servers on loopback, started for a test and ended by their own process group."""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import ipaddress
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.forked import forked

ADMIN = ("admin", "password of the admin")
MLFLOW = [sys.executable, "-m", "mlflow"]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def request(url: str, body: Any = None, *, timeout: float = 60, user: tuple[str, str] | None = None) -> tuple[int, str]:
    """POST JSON (or GET without a body), as a user with a password; the status and the answer's text."""
    data = None if body is None else json.dumps(body).encode()
    message = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    if user is not None:
        message.add_header("Authorization", f"Basic {base64.b64encode(':'.join(user).encode()).decode()}")
    try:
        with urllib.request.urlopen(message, timeout=timeout) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@contextlib.contextmanager
def running(
    command: Sequence[str], url: str, *, log: Path, env: Mapping[str, str] | None = None, seconds: float = 180
) -> Iterator[str]:
    """Run a server until the block ends; yields once `url` answers 200. MLflow's own commands are forked."""
    environment = {**os.environ, **(env or {})}
    if list(command[:3]) == MLFLOW:
        process: _Forked | subprocess.Popen[bytes] = _Forked(command[3:], environment, log)
    else:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )
    try:
        deadline = time.monotonic() + seconds
        while True:
            if process.poll() is not None:
                raise RuntimeError(f"{command} ended with {process.poll()}:\n{log.read_text()[-4000:]}")
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
        # Workers that outlived their server.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


class _Forked:
    """`mlflow` with the methods of `subprocess.Popen` that are used here."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        log.touch()
        self._process = forked("mlflow.cli:cli", argv, env, log)
        self.pid = self._process.pid or 0

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> None:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("mlflow", timeout or 0)


def listening_on(port: int) -> set[str]:
    """Addresses on which anything listens at a port, as Linux tells them: {"127.0.0.1"}."""
    addresses = set()
    for table in ("tcp", "tcp6"):
        for line in Path("/proc/net", table).read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, number = local.partition(":")
            if state == "0A" and int(number, 16) == port:
                raw = bytes.fromhex(address)
                words = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                addresses.add(str(ipaddress.ip_address(words)))
    return addresses


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """PostgreSQL on loopback with an empty database; yields its SQLAlchemy URI.

    Skips with the reason where it is not installed. It refuses to run as root, so root starts it as
    the user that Debian's package makes, or as nobody.
    """
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"))
    found = shutil.which("postgres")
    binaries = installed[-1].parent if installed else Path(found).parent if found else None
    if binaries is None or importlib.util.find_spec("psycopg2") is None:
        pytest.skip("PostgreSQL and psycopg2 are not installed (Debian: apt-get install postgresql)")
    user = None
    if os.geteuid() == 0:
        user = next(name for name in ("postgres", "nobody") if name in {entry.pw_name for entry in pwd.getpwall()})
    # Its user must be able to reach it, and pytest's own directories are closed.
    with tempfile.TemporaryDirectory(prefix="foxnas-postgres-", dir="/tmp", ignore_cleanup_errors=True) as directory:
        if user is not None:
            shutil.chown(directory, user)
        data, port = f"{directory}/data", free_port()
        subprocess.run(
            [str(binaries / "initdb"), "-D", data, "-U", "mlflow", "-A", "trust", "-E", "UTF8", "--no-sync"],
            check=True,
            capture_output=True,
            user=user,
            cwd=directory,
        )
        command = [str(binaries / "postgres"), "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", directory]
        with Path(directory, "log").open("wb") as log:
            process = subprocess.Popen(
                [*command, "-F"], stdout=log, stderr=log, user=user, cwd=directory, start_new_session=True
            )
        try:
            _await_postgres(process, port, Path(directory, "log"))
            yield f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        finally:
            process.send_signal(signal.SIGINT)  # clients are cut off, the rest is written
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _await_postgres(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    import psycopg2

    deadline = time.monotonic() + 60
    while True:
        try:
            psycopg2.connect(host="127.0.0.1", port=port, user="mlflow", dbname="postgres").close()
            return
        except psycopg2.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"PostgreSQL did not start:\n{log.read_text()}") from None
            time.sleep(0.1)


@contextlib.contextmanager
def s3(*, log: Path) -> Iterator[dict[str, str]]:
    """An S3 store on loopback with the bucket ``models``; yields the environment that MLflow needs for it."""
    if importlib.util.find_spec("moto") is None or importlib.util.find_spec("boto3") is None:
        pytest.skip("moto[server] and boto3 are not installed")
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with running(command, f"http://127.0.0.1:{port}/moto-api/", log=log):
        message = urllib.request.Request(f"http://127.0.0.1:{port}/models", method="PUT")
        urllib.request.urlopen(message, timeout=30).close()
        yield {
            "MLFLOW_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
        }


@contextlib.contextmanager
def tracking_server(
    store: str, artifacts: str, *, log: Path, env: Mapping[str, str] | None = None, options: Sequence[str] = ()
) -> Iterator[str]:
    """`mlflow server` on loopback that hands artifacts through; yields its URL."""
    port = free_port()
    command = [*MLFLOW, "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", store, "--serve-artifacts", "--artifacts-destination", artifacts, *options]
    with running(
        command,
        f"http://127.0.0.1:{port}/health",
        log=log,
        env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **(env or {})},
    ):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def login_server(store: str, directory: Path, *users: tuple[str, str]) -> Iterator[str]:
    """A tracking server that asks who is there: `ADMIN`, or users who may only read what is not their own.

    Skips where MLflow's basic-auth application lacks its package.
    """
    if importlib.util.find_spec("flask_wtf") is None:
        pytest.skip("Flask-WTF is not installed")
    settings = directory / "auth.ini"
    lines = ["[mlflow]", "default_permission = READ", f"database_uri = sqlite:///{directory}/auth.db"]
    # Without it every request hashes the password anew.
    lines += ["auth_cache_ttl_seconds = 600"]
    settings.write_text("\n".join(lines) + "\n")
    env = {
        "MLFLOW_AUTH_CONFIG_PATH": str(settings),
        "MLFLOW_AUTH_ADMIN_USERNAME": ADMIN[0],
        "MLFLOW_AUTH_ADMIN_PASSWORD": ADMIN[1],
        "MLFLOW_FLASK_SERVER_SECRET_KEY": "of a test",
    }
    options = ["--app-name", "basic-auth"]
    with tracking_server(store, str(directory / "served"), log=directory / "log", env=env, options=options) as url:
        for name, password in users:
            made = request(f"{url}/api/2.0/mlflow/users/create", {"username": name, "password": password}, user=ADMIN)
            assert made[0] == 200, made
        yield url


@contextlib.contextmanager
def scoring_server(
    model_uri: str, *, log: Path, env_manager: str = "local", env: Mapping[str, str] | None = None
) -> Iterator[str]:
    """`mlflow models serve`; yields the URL of its invocations."""
    port = free_port()
    command = [*MLFLOW, "models", "serve", "-m", model_uri, "-h", "127.0.0.1"]
    command += ["-p", str(port), "--env-manager", env_manager]
    with running(command, f"http://127.0.0.1:{port}/ping", log=log, env=env):
        yield f"http://127.0.0.1:{port}/invocations"
