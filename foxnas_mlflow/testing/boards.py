"""A board that is not there, for tests of what measures on boards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.devices import Completed, LocalConnection


class FakeBoard(LocalConnection):
    """A machine whose latencies are made up, for tests without a board and without waiting.

    Commands and files are those of this machine; only the board script's measurements are answered here. Every
    answer says that the machine is emulated, so that no figure of it passes for one of hardware.

    Args:
        latency_ms: The median latency of a TensorFlow Lite file, in ms, from its bytes.
        spread: Standard deviation of single runs, relative to the median.
        measurements: After so many the machine is gone, and does not come back; None: never.
        seed: Seed of the runs.
        energy_mj: Energy of one inference, in mJ, from the bytes of a file; None: the board has no meter but those of
            this machine.

    Examples:
        >>> from foxnas_mlflow import get_space
        >>> from foxnas_mlflow.core.network import build_network
        >>> from foxnas_mlflow.devices import measure
        >>> from foxnas_mlflow.testing import FakeBoard
        >>> from foxnas_mlflow.tflite import write_probe
        >>> space = get_space("cpu")
        >>> board = FakeBoard(lambda model: len(model) / 1e6)
        >>> probe = write_probe(build_network(space, space.smallest(192)))
        >>> with board:
        ...     benchmark = measure(board, probe)
        >>> benchmark.emulated, benchmark.valid, round(benchmark.latency_ms_p50 / (len(probe) / 1e6), 2)
        (True, True, 1.0)
    """

    def __init__(
        self,
        latency_ms: Callable[[bytes], float],
        *,
        spread: float = 0.005,
        measurements: int | None = None,
        seed: int = 0,
        energy_mj: Callable[[bytes], float] | None = None,
    ) -> None:
        super().__init__()
        self.uri = "fake board"
        self._latency_ms = latency_ms
        self._spread = spread
        self._left = measurements
        self._energy_mj = energy_mj
        self._rng = np.random.default_rng(seed)

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        """A command of this machine, but for a measurement: that is answered at once."""
        asked = argv[2] if len(argv) > 3 and argv[1].endswith("/board.py") else ""
        if asked == "meter" and self._energy_mj is not None:
            return Completed(0, json.dumps({"power_meter": "made up"}), "")
        if asked != "measure":
            return super().run(argv, timeout_s=timeout_s)
        if self._left == 0:
            raise self._gone()
        self._left = None if self._left is None else self._left - 1
        model, options = argv[3], argv[4:]
        if "--outputs" in options:
            outputs = ["--outputs", options[options.index("--outputs") + 1]]
            answered = super().run([argv[0], argv[1], "answer", model, *outputs], timeout_s=timeout_s)
            if answered.status != 0:
                return answered
        runs = int(options[options.index("--runs") + 1])
        content = Path(model).read_bytes()
        answer = self._answer(content, runs)
        if "--energy" in options and self._energy_mj is not None:
            energy = {"energy_mj": float(self._energy_mj(content)), "energy_error_mj": 0.0, "power_meter": "made up"}
            answer |= {**energy, "idle_w": 1.0, "load_w": 2.0, "throttled_under_load": False}
        return Completed(0, json.dumps(answer), "")

    def reconnect(self) -> None:
        """Open it anew; what is gone stays gone."""
        if self._left == 0:
            raise self._gone()
        super().reconnect()

    def _answer(self, model: bytes, runs: int) -> dict[str, Any]:
        median = float(self._latency_ms(model))
        if not median > 0:
            raise DeviceError("a fake board needs a positive latency", received=median)
        samples = median * (1 + self._spread * self._rng.standard_normal(runs))
        return {
            "device": f"{self.uri} (emulated)",
            "runtime": "made up",
            "emulated": True,
            "samples_ms": [float(sample) for sample in np.maximum(samples, median / 10)],
            "model_sha256": hashlib.sha256(model).hexdigest(),
            "batch": 1,
            "cpu_share": 1.0,
            "cpu_seconds": 1.0,
            "clock_tick_ms": 1e-6,
            "load_ms": 0.0,
            "first_invoke_ms": median,
            "peak_memory_bytes": len(model),
            "throttled": False,
            "throttled_under_load": None,
            "governor": "",
            "quota": None,
            "quota_waits": 0,
            "disk_waits": 0,
            "lost": "",
            "windows": [],
            **dict.fromkeys(("temperature_c_start", "temperature_c_end", "sustained_p90_ms")),
            **dict.fromkeys(("frequency_mhz_start", "frequency_mhz_end")),
        }

    def _gone(self) -> ConnectionLostError:
        return ConnectionLostError(f"{self.uri} went away", remedy="it was told to, by its parameter measurements")
