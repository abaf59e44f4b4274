"""Pipelines in a space so small that one takes a minute, and killing them."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.forked import CONTEXT, forked

SPACE = """\
format: 1
name: two
image_sizes: [16, 20]
kernels: [3, 5]
expansions: [2, 4]
depths: [2, 3]
stages:
  - {width: 24, stride: 2, block: mbconv}
  - {width: 40, stride: 2, block: mbconv_se}
tail: {block_width: null, block_expansion: 6, conv_width: 120, hidden_width: 160}
stem_width: 16
stem_stride: 1
first_width: 16
first_stride: 1
width_mult: 1.0
in_channels: 1
n_classes: 10
"""

STEPS = ("supernet", "sample", "fit", "search", "quantize", "benchmark", "compare", "promote")


N_SAMPLES = 14


def options(directory: Path) -> list[str]:
    """Options of `foxnas main` for a pipeline of a minute."""
    path = directory / "space.yaml"
    path.write_text(SPACE, encoding="utf-8")
    values = {"data": "digits", "space": path, "max-train": 200, "epochs": 1}
    values |= {"n-samples": N_SAMPLES, "rounds": 1, "n-compare": 1}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


WAITING = """
import pkgutil, threading

owner, name = pkgutil.resolve_name({owner!r}), {name!r}
function, calls = getattr(owner, name), []

def until_the_last(*arguments, **values):
    calls.append(name)
    if len(calls) == {n}:
        threading.Event().wait()
    return function(*arguments, **values)

setattr(owner, name, until_the_last)
"""


def waiting(directory: Path, function: str, n: int) -> dict[str, str]:
    """The environment of a command that waits without end in a call of a function: a kill meets it in its middle.

    Args:
        directory: Where to write what it imports.
        function: ``module:name``, or ``module:class.name``.
        n: Which call.
    """
    directory.mkdir()
    owner, _, name = function.replace(":", ".").rpartition(".")
    (directory / "sitecustomize.py").write_text(WAITING.format(owner=owner, name=name, n=n))
    # After what makes latencies up.
    return {"PYTHONPATH": os.pathsep.join(filter(None, (os.environ.get("PYTHONPATH"), str(directory))))}


class Running:
    """A command, `foxnas` unless another is named, in a process group of its own, its output read as it comes.

    The process is forked from one that has imported everything once, which would take each ten seconds.
    """

    def __init__(
        self, argv: Sequence[str], env: Mapping[str, str] | None = None, command: str = "foxnas_mlflow.cli.main:main"
    ) -> None:
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self._output, output = CONTEXT.Pipe(duplex=False)
        self.process = forked(command, argv, {**os.environ, **(env or {})}, output)
        output.close()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def begins(self, step: str, seconds: float) -> bool:
        """Wait for a step to begin; False when the pipeline ended before."""
        with self._heard:
            self._heard.wait_for(lambda: self._has(rf"^== {step} \(") or not self._reader.is_alive(), seconds)
            return self._has(rf"^== {step} \(")

    @property
    def is_alive(self) -> bool:
        return self.process.exitcode is None

    def kill(self, after_seconds: float) -> bool:
        """SIGKILL to the whole group after a while; False when it had ended by itself."""
        self.process.join(after_seconds)
        alive = self.is_alive
        if alive:
            os.killpg(self.process.pid or 0, signal.SIGKILL)
        self.end()
        return alive

    def interrupt(self, signum: signal.Signals, seconds: float = 60) -> int:
        """A signal to the process; its exit status."""
        os.kill(self.process.pid or 0, signum)
        return self.end(seconds)

    def end(self, seconds: float = 900) -> int:
        """Exit status, once it ended."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "\n".join(self.lines[-20:])
        self._reader.join()
        return self.process.exitcode

    def _has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    def _read(self) -> None:
        with os.fdopen(os.dup(self._output.fileno()), errors="replace") as output:
            for line in output:
                with self._heard:
                    self.lines.append(line.rstrip())
                    self._heard.notify_all()
        self._output.close()
        with self._heard:
            self._heard.notify_all()
