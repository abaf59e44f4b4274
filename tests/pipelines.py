"""Pipelines in a space so small that one takes a minute, and killing them."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

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
    values = {"space": path, "max-train": 200, "epochs": 1, "n-samples": N_SAMPLES, "rounds": 1, "n-compare": 1}
    return [word for key, value in values.items() for word in (f"--{key}", str(value))]


class Running:
    """`foxnas main` in a process group of its own, its output read as it comes."""

    def __init__(self, argv: list[str], env: Mapping[str, str] | None = None) -> None:
        self.lines: list[str] = []
        self._heard = threading.Condition()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "foxnas_mlflow", "main", *argv],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env={"OMP_NUM_THREADS": "1", **os.environ, **(env or {})},
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def begins(self, step: str, seconds: float) -> bool:
        """Wait for a step to begin; False when the pipeline ended before."""
        with self._heard:
            self._heard.wait_for(lambda: self._has(rf"^== {step} \(") or not self._reader.is_alive(), seconds)
            return self._has(rf"^== {step} \(")

    def kill(self, after_seconds: float) -> bool:
        """SIGKILL to the whole group after a while; False when it had ended by itself."""
        try:
            self.process.wait(after_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.end()
            return True
        self.end()
        return False

    def end(self, seconds: float = 900) -> int:
        """Exit status, once it ended."""
        status = self.process.wait(seconds)
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status

    def _has(self, pattern: str) -> bool:
        return any(re.search(pattern, line) for line in self.lines)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self._heard:
                self.lines.append(line.rstrip())
                self._heard.notify_all()
        with self._heard:
            self._heard.notify_all()
