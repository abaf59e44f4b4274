"""Every command in the documentation is executed, or has a reason here why it is not.

A fenced block of ``bash`` is a sequence of commands. Each is run as it is printed, from a copy of
the checkout, in order and with one tracking store a file, so that a command finds what those
before it registered. What a reader has and a test has not (folders, long trainings) is replaced by
`REPLACED`; what runs until it is stopped is started, asked and stopped (`SERVERS`); what cannot run
here is in `NOT_RUN` with its reason.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.measurements import Measurement, write_measurements
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.space import CPU_SPACE
from tests.conftest import ROOT, copy_store
from tests.servers import free_port, running

NOT_RUN: dict[str, str] = {
    r"python3? -m venv|^\. \S*activate|^source ": "makes the environment that this test runs in: .ci/run does it",
    r"^pip install|^sudo |apt-get": "installs: .ci/run does it",
    r"scripts/(check|test)": "is what runs this test",
    r"scripts/demo": "installs, and takes minutes; tests/test_pipeline.py runs it on small settings",
    r"scripts/build_reference": "needs the authors' table; tests/core/test_predictors.py rebuilds from it",
    r"^python benchmarks/": "takes minutes; figures are taken by hand",
    r"\btorchrun\b": "needs several processes for minutes; tests/tracking/test_supernet_run.py runs two",
    r"ssh://|docker://|edge://": "needs a board; tests/devices and tests/deploy run the same on one that is made",
    r"^mlflow run \. --env-manager local$": "takes minutes; tests/test_pipeline.py runs it on small settings",
    r"foxnas promote": "the gates need a figure of a quiet machine; tests/tracking/test_promote.py promotes",
    r"^mlflow models serve|/invocations": "needs what was promoted; tests/tracking/test_stack.py serves",
    r"^mlflow run (?!.*--env-manager)": "makes a conda environment",
    r"--env-manager (uv|virtualenv|conda)": "makes an environment of gigabytes",
    r"^docker |^kubectl |^databricks ": "needs a cluster or a daemon",
}
"""Pattern of a command to the reason why it is not run."""

REPLACED: dict[str, str] = {
    "/path/to/measurements.csv": "{measurements}",
    "/path/to/images": "{images}",
    "-P latency_ms=60": "-P latency_ms=60 -P evaluations=2000",
    "-P preset=small": "-P preset=tiny -P epochs=1 -P max_train=200",
    "--preset small": "--preset tiny --epochs 1 --max-train 200",
}
"""What a reader has, to what the test has."""

SERVERS: dict[str, tuple[str, str]] = {
    r"^mlflow (ui|server)": ("--workers 1 --port {port}", "http://127.0.0.1:{port}/health"),
    r"^mlflow models serve": ("--port {port}", "http://127.0.0.1:{port}/ping"),
}
"""Pattern of a command that runs until it is stopped, to its option for a port and what it answers."""

DOCUMENTS = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
    "docs/tasks/goals.md",
]
"""Those of the tasks repeat the README's commands, but for the goals."""


@dataclass(frozen=True)
class Command:
    document: str
    line: int
    text: str
    language: str

    def __str__(self) -> str:
        return f"{self.document}:{self.line}: {self.text}"


def commands_of(document: str) -> Iterator[Command]:
    """The commands of a document; a Python block is one command."""
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    language, start, block = "", 0, []
    for number, line in enumerate(lines, start=1):
        fence = re.fullmatch(r"\s*```(\w*)\s*", line)
        if fence is None:
            if language:
                block.append(line)
        elif not language:
            language, start, block = fence.group(1) or "text", number + 1, []
        else:
            if language == "python":
                yield Command(document, start, "\n".join(block), "python")
            elif language in ("bash", "sh", "shell", "console"):
                yield from _split(document, start, block)
            language = ""


def _split(document: str, start: int, block: list[str]) -> Iterator[Command]:
    """Commands of a block: lines, joined where one ends with a backslash or opens a here-document."""
    if any("<<" in line for line in block):
        yield Command(document, start, "\n".join(block), "bash")
        return
    joined = ""
    for offset, line in enumerate(block):
        text = line.split(" #")[0].rstrip()
        if not joined and (not text or text.startswith("#")):
            continue
        joined += text.removesuffix("\\")
        if not text.endswith("\\"):
            yield Command(document, start + offset, joined.strip(), "bash")
            joined = ""


def reason_of(command: Command) -> str | None:
    """Why a command is not run, or None."""
    if command.language == "python":
        return None
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, command.text)), None)


def run_of(document: str) -> list[Command]:
    """The commands of a document that are run: what the README says too is run with it."""
    found = [command for command in commands_of(document) if reason_of(command) is None]
    if document == "README.md":
        return found
    known = {command.text for command in run_of("README.md")}
    return [command for command in found if command.text not in known]


@pytest.fixture
def reader(empty_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What a reader has: a checkout, an environment, a store, images and measurements."""
    # Other tests write to caches meanwhile.
    caches = ("__pycache__", ".*_cache", ".cache", ".hypothesis")
    ignored = shutil.ignore_patterns(
        ".git", ".ci", ".venv*", "tests", "mlruns", "mlartifacts", "*.db", "*.egg-info", *caches
    )
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", copy_store(empty_store, tmp_path))
    # Tasks of the server's own, which nothing here starts, take processes.
    monkeypatch.setenv("MLFLOW_SERVER_ENABLE_JOB_EXECUTION", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    return {"measurements": str(_measurements(tmp_path)), "images": str(_images(tmp_path))}


def _measurements(directory: Path) -> Path:
    predictors, rng = reference_predictors("rpi4"), np.random.default_rng(0)
    drawn = CPU_SPACE.sample(rng, n=80, image_size=256)
    table = predictors.predict_table(drawn)
    noise = rng.normal(1, 0.003, size=(2, len(drawn)))
    rows = [
        Measurement(a, table["accuracy"][i] * noise[0, i], table["latency_ms"][i] * noise[1, i], "measured")
        for i, a in enumerate(drawn)
    ]
    write_measurements(rows, directory / "measurements.csv")
    return directory / "measurements.csv"


def _images(directory: Path) -> Path:
    """Two classes of 40 pictures each."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for label, colour in (("cats", (200, 80, 40)), ("dogs", (40, 80, 200))):
        (directory / "images" / label).mkdir(parents=True)
        for i in range(40):
            pixels = np.clip(rng.normal(colour, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(directory / "images" / label / f"{i}.png")
    return directory / "images"


def test_nothing_is_left_for_the_reader_to_fill_in() -> None:
    for document in DOCUMENTS:
        for command in commands_of(document):
            text = command.text
            for shown in REPLACED:
                text = text.replace(shown, "")
            assert reason_of(command) or command.language == "python" or not re.search("/path/to/|<[a-z ]+>", text), (
                f"{command}: say in REPLACED what stands for the placeholder, or in NOT_RUN why it is not run"
            )


@pytest.mark.slow
@pytest.mark.server
@pytest.mark.train
@pytest.mark.parametrize("document", [d for d in DOCUMENTS if run_of(d)])
def test_commands_of_a_document_run(document: str, reader: dict[str, str], tmp_path: Path) -> None:
    for number, command in enumerate(run_of(document)):
        with contextlib.chdir(tmp_path / "checkout"):
            _execute(command, reader, tmp_path / f"{number}.log")


def _execute(command: Command, reader: dict[str, str], log: Path) -> None:
    text = command.text
    for shown, replacement in REPLACED.items():
        text = text.replace(shown, replacement.format(**reader))
    for pattern, (option, url) in SERVERS.items():
        if re.search(pattern, text):
            port = free_port()
            argv = ["bash", "-euc", f"exec {re.sub(r' (-p|--port) [0-9]+', '', text)} {option.format(port=port)}"]
            with running(argv, url.format(port=port), log=log):
                return
    argv = [sys.executable, "-c", text] if command.language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    with log.open("wb") as output:
        done = subprocess.run(argv, stdout=output, stderr=subprocess.STDOUT, timeout=1200, check=False)
    assert done.returncode == 0, f"{command}\nrun as: {text}\n{log.read_text(errors='replace')[-3000:]}"
