"""Commands in processes forked from one that has imported everything once, which would take each ten seconds."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import EntryPoint
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

PRELOADED = ["mlflow.cli", "torch", "tensorflow", "statsmodels.api", "matplotlib.figure", "sklearn.datasets"]
"""What takes long to import."""

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


def forked(command: str, argv: Sequence[str], env: Mapping[str, str], output: Connection | Path) -> ForkServerProcess:
    """Start a command in a process group of its own, in this process's directory.

    Args:
        command: Its entry point, ``module:function``.
        argv: Its arguments.
        env: Its environment.
        output: Where its output goes, errors among it.
    """
    process = CONTEXT.Process(target=_run, args=(command, list(argv), dict(env), os.getcwd(), output))
    process.start()
    return process


def _run(command: str, argv: Sequence[str], env: Mapping[str, str], directory: str, output: Connection | Path) -> None:
    """What the script of an entry point does."""
    os.setsid()
    with output.open("wb") if isinstance(output, Path) else output as opened:
        for descriptor in (1, 2):
            os.dup2(opened.fileno(), descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    os.environ.clear()
    os.environ.update(env)
    os.chdir(directory)
    # As Python does when it starts.
    for place in map(Path, env.get("PYTHONPATH", "").split(os.pathsep)):
        if (place / "sitecustomize.py").is_file():
            runpy.run_path(str(place / "sitecustomize.py"))
    sys.exit(EntryPoint("", command, "").load()(argv))
