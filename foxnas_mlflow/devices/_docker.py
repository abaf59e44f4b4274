"""``docker://image``: a container of this machine's Docker daemon, or of that of ``DOCKER_HOST``."""

from __future__ import annotations

import contextlib
import io
import tarfile
import threading
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, import_or_raise
from foxnas_mlflow.devices._base import Completed, Connection, refused, timed_out
from foxnas_mlflow.devices.board import LOCKS, lock_path

LIFETIME_SECONDS = 86_400
"""A container that is left behind by a killed process ends after a day."""

SETTLE_SECONDS = 2
"""How long a container may take to end after its last command did."""


class DockerConnection(Connection):
    """A container that waits for commands; it has no network.

    Args:
        uri: The address, for messages.
        image: Name of the image; it must be there already, or in a registry that the daemon knows.
        python: Python in the image.
        cpus: Processors that it may use, as a quota of their time; None: all.

    Raises:
        DeviceError: If the daemon does not answer or the image cannot be started.
        MissingDependencyError: If the docker SDK is not installed.
    """

    # `docker exec` without a terminal has none.
    keeps_stdin = False
    install = "install it in the image: pip install {packages}"

    def __init__(self, uri: str, image: str, *, python: str | None = None, cpus: float | None = None) -> None:
        super().__init__()
        self.uri = uri.partition("?")[0]
        self.python = python or "python3"
        self._docker: Any = import_or_raise("docker", extra="device", feature="measuring in a container")
        try:
            self._client = self._docker.from_env()
        except self._docker.errors.DockerException as error:
            raise DeviceError(
                "a Docker daemon must answer",
                received=str(error),
                remedy="start it, check DOCKER_HOST and the rights on its socket (group docker)",
            ) from error
        self._image = image
        self._quota = {} if cpus is None else {"nano_cpus": round(cpus * 1e9)}
        self._container: Any = None
        try:
            self._reopen()
        except BaseException:
            self._client.close()
            raise

    def _reopen(self) -> None:
        try:
            self._container = self._client.containers.run(
                self._image,
                entrypoint=["sleep"],
                command=[str(LIFETIME_SECONDS)],
                detach=True,
                auto_remove=True,
                network_mode="none",
                labels=["foxnas_mlflow"],
                **self._quota,
                # The machine's lock, so that containers and processes outside wait for each other.
                volumes={lock_path(): {"bind": LOCKS[0], "mode": "ro"}},
            )
        except self._docker.errors.ImageNotFound as error:
            raise DeviceError(
                f"{self.uri} must name an image that is there",
                received=error.explanation,
                remedy="build or pull it first: docker images lists those that are there",
            ) from error
        except (self._docker.errors.DockerException, OSError) as error:
            raise DeviceError(
                f"a container of {self.uri} must start",
                received=str(error),
                remedy="the image needs the command sleep, and a platform that this machine runs",
            ) from error

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        api = self._client.api
        late = threading.Event()

        def end() -> None:
            # The SDK waits for output without end, and Docker cannot end one command of a container.
            late.set()
            self._kill()

        timer = threading.Timer(timeout_s, end)
        timer.start()
        try:
            command = api.exec_create(self._container.id, list(argv))["Id"]
            output, errors = api.exec_start(command, demux=True)
            status = api.exec_inspect(command)["ExitCode"]
        except (self._docker.errors.DockerException, OSError) as error:
            # requests' errors are OSErrors.
            if late.is_set():
                raise timed_out(argv, timeout_s, self.uri) from None
            raise self._failure(error) from error
        finally:
            timer.cancel()
        if late.is_set():
            raise timed_out(argv, timeout_s, self.uri)
        if status in (None, 137) and not self._is_running():
            # Killed with its container.
            raise self._failure(f"exit status {status}")
        out, err = ((stream or b"").decode(errors="replace") for stream in (output, errors))
        # A program that is missing is told on standard output, in the daemon's words.
        return Completed(int(status or 0), "" if status in (126, 127) else out, err or (out if status else ""))

    def put(self, data: bytes, path: str) -> None:
        place, buffer = PurePosixPath(path), io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            entry = tarfile.TarInfo(place.name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        try:
            self._container.put_archive(str(place.parent), buffer.getvalue())
        except (self._docker.errors.DockerException, OSError) as error:
            raise self._failure(error, "writing a file") from error

    def get(self, path: str) -> bytes:
        try:
            chunks, _ = self._container.get_archive(path)
            with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
                file = archive.extractfile(archive.next() or "")
                return b"" if file is None else file.read()
        except (self._docker.errors.DockerException, tarfile.TarError, OSError) as error:
            raise self._failure(error, "reading a file") from error

    def _failure(self, error: Exception | str, action: str = "running a command") -> DeviceError:
        """A refusal, or the loss of the container."""
        text = str(getattr(error, "explanation", None) or error)
        if self._is_running():
            return refused(action, text, self.uri)
        return ConnectionLostError(
            f"the container of {self.uri} went away",
            received=text,
            remedy="look at the Docker daemon and its memory; what was measured before is kept",
        )

    def _is_running(self) -> bool:
        errors = (self._docker.errors.DockerException, OSError)
        with contextlib.suppress(*errors):
            # The end of a command is told before that of the container that ended it.
            self._container.wait(timeout=SETTLE_SECONDS)
        with contextlib.suppress(*errors):
            self._container.reload()
            return bool(self._container.status == "running")
        return False

    def _disconnect(self) -> None:
        self._kill()
        self._client.close()

    def _kill(self) -> None:
        with contextlib.suppress(self._docker.errors.DockerException, OSError):
            self._container.kill()
