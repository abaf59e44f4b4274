"""Google's Edge TPU compiler: found, run, and its words turned into figures.

The compiler is a closed program for x86-64 Linux, from Google's own package archive. On another
machine it runs in a container, from an image that anyone can build::

    FROM --platform=linux/amd64 debian:bookworm-slim
    RUN apt-get update && apt-get install -y curl gnupg \\
     && curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg \\
        | gpg --dearmor -o /usr/share/keyrings/coral.gpg \\
     && echo "deb [signed-by=/usr/share/keyrings/coral.gpg] https://packages.cloud.google.com/apt \\
              coral-edgetpu-stable main" > /etc/apt/sources.list.d/coral.list \\
     && apt-get update && apt-get install -y edgetpu-compiler

Its exit status says little: it exits with 0 after some failures, and a model of which nothing was
mapped "compiled successfully". So the output file and the log are judged.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.edgetpu import COMPILED_OPERATOR
from foxnas_mlflow.core.errors import ConversionError, DeviceError, import_or_raise
from foxnas_mlflow.tflite._model import read_tflite

COMPILER = "edgetpu_compiler"
INSTALL_HINT = (
    f"install Google's {COMPILER} (x86-64 Linux; package edgetpu-compiler of Google's archive), "
    "or give a Docker image that has it; the docstring of foxnas_mlflow.tflite._edgetpu_compiler has its Dockerfile"
)

_MAPPED = "Mapped to Edge TPU"
_NAME = "model"
_ROOT = "foxnas"
_GRACE_S = 10
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True, slots=True)
class OperatorStatus:
    """A row of the compiler's table.

    Attributes:
        operator: Kind of operator.
        count: How many of them.
        status: ``Mapped to Edge TPU``, or why not.
    """

    operator: str
    count: int
    status: str

    @property
    def mapped(self) -> bool:
        """Whether they run on the Edge TPU."""
        return self.status == _MAPPED


@dataclass(frozen=True, slots=True)
class CompilerReport:
    """What the compiler says of a model.

    Attributes:
        version: Version of the compiler.
        compile_ms: Time that it took.
        on_chip_used_bytes, on_chip_remaining_bytes: On-chip memory for weights.
        off_chip_bytes: Weights that are streamed in every inference.
        n_subgraphs: Parts that run on the Edge TPU.
        n_operations: Operations of the model.
        n_unmapped: Operations that run on the processor.
        operators: The table, as far as it was printed.
    """

    version: str
    compile_ms: float
    on_chip_used_bytes: int
    on_chip_remaining_bytes: int
    off_chip_bytes: int
    n_subgraphs: int
    n_operations: int
    n_unmapped: int
    operators: tuple[OperatorStatus, ...]

    @property
    def n_mapped(self) -> int:
        """Operations that run on the Edge TPU."""
        return self.n_operations - self.n_unmapped

    @property
    def unmapped(self) -> tuple[OperatorStatus, ...]:
        """Rows of what runs on the processor."""
        return tuple(row for row in self.operators if not row.mapped)

    @property
    def metrics(self) -> dict[str, float]:
        """The figures, by the names of MLflow's metrics."""
        return {
            "edgetpu/operators_mapped": self.n_mapped,
            "edgetpu/operators_unmapped": self.n_unmapped,
            "edgetpu/on_chip_used_bytes": self.on_chip_used_bytes,
            "edgetpu/on_chip_remaining_bytes": self.on_chip_remaining_bytes,
            "edgetpu/off_chip_bytes": self.off_chip_bytes,
            "edgetpu/subgraphs": self.n_subgraphs,
            "edgetpu/compile_ms": self.compile_ms,
        }


@dataclass(frozen=True, slots=True)
class CompilerOutput:
    """What a run of the compiler left.

    Attributes:
        data: The compiled file; empty if there is none.
        log: Everything that it printed, and its table of operators.
    """

    data: bytes = field(repr=False)
    log: str

    def report(self) -> CompilerReport:
        """Judge the run by its file and its log.

        Raises:
            ConversionError: If no file was made, it is no compiled model, or nothing was mapped.
        """
        if not self.data:
            raise ConversionError(
                "the Edge TPU compiler must make a file",
                received=_reason(self.log),
                remedy="see edgetpu.log, and edgetpu_readiness.json for what it refuses",
            )
        report = parse_log(self.log)
        if report.n_mapped < 1 or COMPILED_OPERATOR not in read_tflite(self.data).operator_counts:
            raise ConversionError(
                "at least one operator must be mapped to the Edge TPU",
                received=f"{report.n_mapped} of {report.n_operations}",
                remedy="see edgetpu_readiness.json for what the compiler refuses",
            )
        return report


@dataclass(frozen=True, slots=True)
class EdgeTpuCompiler:
    """A compiler that can be run.

    Attributes:
        command: Path of the program, or its name inside the image.
        image: Docker image to run it in; empty: on this machine.
    """

    command: str
    image: str = ""

    def run(self, data: bytes, *, timeout_s: int = 600) -> CompilerOutput:
        """Compile a model.

        Args:
            data: An int8 TensorFlow Lite file.
            timeout_s: Seconds after which the compiler is stopped.

        Raises:
            ConversionError: If it does not end in time.
            DeviceError: If the program or the container cannot be started.
        """
        # The compiler's own limit comes first, so that it can say so.
        arguments = [self.command, "-s", "-t", str(timeout_s), "-o", "out", f"{_NAME}.tflite"]
        with tempfile.TemporaryDirectory(prefix="foxnas-edgetpu-") as name:
            directory = Path(name)
            (directory / "out").mkdir()
            (directory / f"{_NAME}.tflite").write_bytes(data)
            run = _run_in_container if self.image else _run_here
            printed = run(arguments, directory, timeout_s, self.image)
            compiled, table = (directory / "out" / f"{_NAME}_edgetpu{end}" for end in (".tflite", ".log"))
            if table.is_file() and not _rows(printed):
                printed += "\n" + table.read_text(encoding="utf-8", errors="replace")
            return CompilerOutput(compiled.read_bytes() if compiled.is_file() else b"", printed)

    def compile(self, data: bytes) -> bytes:
        """The compiled file of a model of which the Edge TPU can run something.

        Raises:
            ConversionError, DeviceError: As `run` and `CompilerOutput.report`.
        """
        output = self.run(data)
        output.report()
        return output.data


def find_compiler(image: str = "") -> EdgeTpuCompiler | None:
    """The compiler of a Docker image, or the one on PATH; None if there is none.

    Raises:
        DeviceError: If Docker has no such image, or does not answer.
    """
    if image:
        docker = import_or_raise("docker", extra="device", feature="the Edge TPU compiler in a container")
        with _docker_answers(docker, image), contextlib.closing(docker.from_env()) as client:
            client.images.get(image)
        return EdgeTpuCompiler(COMPILER, image)
    path = shutil.which(COMPILER)
    return None if path is None else EdgeTpuCompiler(path)


def require_compiler(image: str = "") -> EdgeTpuCompiler:
    """The compiler, where nothing can be done without one.

    Raises:
        DeviceError: If there is none.
    """
    compiler = find_compiler(image)
    if compiler is None:
        raise DeviceError(
            "a network must be compiled before an Edge TPU can run it", received=f"no {COMPILER}", remedy=INSTALL_HINT
        )
    return compiler


def parse_log(text: str) -> CompilerReport:
    """Read what the compiler printed.

    Raises:
        ConversionError: If it is not the log of a successful compilation.
    """
    rows = _rows(text)
    try:
        n_operations = int(_find(r"Total number of operations: (\d+)", text))
        on_cpu = re.search(r"Number of operations that will run on CPU: (\d+)", text)
        return CompilerReport(
            version=_find(r"Edge TPU Compiler version (\S+)", text),
            compile_ms=float(_find(r"Model compiled successfully in ([\d.]+) ms", text)),
            on_chip_used_bytes=_bytes(text, "On-chip memory used for caching model parameters"),
            on_chip_remaining_bytes=_bytes(text, "On-chip memory (?:remaining|available) for caching model parameters"),
            off_chip_bytes=_bytes(text, "Off-chip memory used for streaming uncached model parameters"),
            n_subgraphs=int(_find(r"Number of Edge TPU subgraphs: (\d+)", text)),
            n_operations=n_operations,
            n_unmapped=int(on_cpu[1]) if on_cpu else sum(row.count for row in rows if not row.mapped),
            operators=rows,
        )
    except LookupError as error:
        raise ConversionError(
            "the log must be that of a successful Edge TPU compilation", received=f"no {error.args[0]}: {_reason(text)}"
        ) from error


def _rows(text: str) -> tuple[OperatorStatus, ...]:
    found = re.findall(r"^([A-Z][A-Z0-9_]*)[ \t]+(\d+)[ \t]+(\S.*?)[ \t]*$", text, flags=re.MULTILINE)
    return tuple(OperatorStatus(operator, int(count), status) for operator, count, status in found)


def _find(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    if match is None:
        raise LookupError(pattern.split("(")[0].strip())
    return match[1]


def _bytes(text: str, label: str) -> int:
    match = re.search(rf"{label}: ([\d.]+)([KMG]i)?B", text)
    if match is None:
        raise LookupError(label)
    return round(float(match[1]) * _UNITS[f"{match[2] or ''}B"])


def _reason(log: str) -> str:
    """The last line that says anything."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|invalid|not quantized|abort|failed", line, re.IGNORECASE)]
    return " / ".join(errors[-3:]) or (lines[-1] if lines else "an empty log")


def _run_here(arguments: list[str], directory: Path, timeout_s: int, image: str) -> str:
    try:
        # A group of its own: the compiler works in a child process, which must not outlive it.
        process = subprocess.Popen(  # noqa: S603 - a list, and the program that PATH names
            arguments,
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    except OSError as error:
        raise DeviceError(
            "the Edge TPU compiler must be a program that this machine can run",
            received=f"{arguments[0]}: {error.strerror}",
            remedy="it needs x86-64 Linux; elsewhere give a Docker image that has it",
        ) from error
    try:
        return process.communicate(timeout=timeout_s + _GRACE_S)[0]
    except subprocess.TimeoutExpired:
        raise _too_slow(timeout_s) from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def _run_in_container(arguments: list[str], directory: Path, timeout_s: int, image: str) -> str:
    docker = import_or_raise("docker", extra="device", feature="the Edge TPU compiler in a container")
    requests = import_or_raise("requests", extra="device", feature="the Edge TPU compiler in a container")
    with _docker_answers(docker, image), _container(docker, image, arguments) as container:
        # Archives, not a mounted directory: the daemon may be on another machine.
        container.put_archive("/", _packed(directory))
        container.start()
        try:
            container.wait(timeout=timeout_s + _GRACE_S)
        except requests.exceptions.RequestException:
            raise _too_slow(timeout_s) from None
        printed: str = container.logs().decode("utf-8", "replace")
        chunks, _ = container.get_archive(f"/{_ROOT}/out")
        with tarfile.open(fileobj=io.BytesIO(b"".join(chunks))) as archive:
            archive.extractall(directory, filter="data")
        return printed


@contextlib.contextmanager
def _docker_answers(docker: Any, image: str) -> Iterator[None]:
    try:
        yield
    except docker.errors.DockerException as error:
        raise DeviceError(
            "Docker must be able to run the Edge TPU compiler's image",
            received=f"{image}: {str(error).strip().splitlines()[0]}",
            remedy="start the daemon and build the image; " + INSTALL_HINT,
        ) from error


@contextlib.contextmanager
def _container(docker: Any, image: str, arguments: list[str]) -> Iterator[Any]:
    client = docker.from_env()
    try:
        container = client.containers.create(
            image, arguments[1:], entrypoint=arguments[:1], working_dir=f"/{_ROOT}", network_disabled=True
        )
        try:
            yield container
        finally:
            container.remove(force=True)
    finally:
        client.close()


def _packed(directory: Path) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(directory, arcname=_ROOT)
    return buffer.getvalue()


def _too_slow(timeout_s: int) -> ConversionError:
    return ConversionError(f"the Edge TPU compiler must end within {timeout_s} s", remedy="try a smaller network")
