"""Arm Ethos-U through Vela, its vendor's compiler: what maps, how much memory, and how long it should take.

Vela runs anywhere and needs no board. Its times come from a performance model of the accelerator:
they are estimates, and nothing here may be logged as a measurement.
"""

from __future__ import annotations

import csv
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.errors import DeviceError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.files import sought

ACCELERATORS: Mapping[str, tuple[str, str]] = {
    **{f"ethos-u55-{macs}": ("Ethos_U55_High_End_Embedded", "Shared_Sram") for macs in (32, 64, 128, 256)},
    **{f"ethos-u65-{macs}": ("Ethos_U65_Client_Server", "Dedicated_Sram_384KB") for macs in (256, 512)},
    **{f"ethos-u85-{macs}": ("Ethos_U85_SYS_DRAM_Mid", "Dedicated_Sram_384KB") for macs in (128, 256, 512, 1024, 2048)},
}
"""Accelerators (their multiply-accumulates a cycle at the end), with system configuration and memory
mode of Arm's vela.ini."""

_TIMEOUT_S = 300
_KIB = 1024


@dataclass(frozen=True)
class VelaEstimate:
    """What Vela says of a model. The latency is an estimate, not a measurement.

    Attributes:
        accelerator: Name in `ACCELERATORS`.
        system_config, memory_mode: Sections of vela.ini that clock, memories and bandwidths come from.
        latency_ms: Estimated time of one inference.
        cycles: Estimated cycles of one inference.
        macs: Multiply-accumulates.
        sram_bytes, dram_bytes: Memory used.
        operators_npu, operators_cpu: Operators on the accelerator, and left to the processor.
        version: Version of Vela.
        layers: One row an operator, as Vela wrote them.
        compiled: The TensorFlow Lite file for the accelerator.
    """

    accelerator: str
    system_config: str
    memory_mode: str
    latency_ms: float
    cycles: int
    macs: int
    sram_bytes: int
    dram_bytes: int
    operators_npu: int
    operators_cpu: int
    version: str
    layers: tuple[Mapping[str, str], ...] = field(repr=False)
    compiled: bytes = field(repr=False)

    def metrics(self) -> dict[str, float]:
        """Metrics ``vela/...``, unit in the name."""
        names = ("latency_ms", "cycles", "macs", "sram_bytes", "dram_bytes", "operators_npu", "operators_cpu")
        return {f"vela/{name}": float(getattr(self, name)) for name in names}

    def to_dict(self) -> dict[str, Any]:
        """JSON object, without layers and compiled file."""
        data = asdict(self)
        del data["layers"], data["compiled"]
        return {"format": 1, "estimate": True, **data}


def estimate_latency_vela(
    model: str | Path | bytes,
    accelerator: str = "ethos-u65-256",
    *,
    system_config: str = "",
    memory_mode: str = "",
) -> VelaEstimate:
    """Compile an int8 model for an Ethos-U and read what Vela estimates.

    Args:
        model: An int8 .tflite file, or its bytes.
        accelerator: One of `ACCELERATORS`.
        system_config, memory_mode: Sections of Arm's vela.ini; empty: those of `ACCELERATORS`.

    Raises:
        InvalidInputError: If the accelerator is unknown, or the model cannot be compiled or has
            nothing that the accelerator runs.
        MissingDependencyError: If Vela is not installed.
        DeviceError: If Vela does not end, or writes something else than expected.
    """
    if accelerator not in ACCELERATORS:
        raise InvalidInputError(f"accelerator must be one of {list(ACCELERATORS)}", received=accelerator)
    if importlib.util.find_spec("ethosu") is None:
        raise MissingDependencyError(
            "estimates for an Ethos-U need Arm's compiler Vela, which is not installed",
            remedy="install it with: pip install 'foxnas-mlflow[vela]'",
        )
    try:
        data = model if isinstance(model, bytes) else Path(model).read_bytes()
    except OSError as error:
        raise InvalidInputError("a model file must be readable", received=sought(str(model), error)) from error
    default_system, default_memory = ACCELERATORS[accelerator]
    with tempfile.TemporaryDirectory(prefix="foxnas-vela-") as directory:
        source, output = Path(directory) / "model.tflite", Path(directory) / "output"
        source.write_bytes(data)
        log = _run_vela(
            [
                *(str(source), "--output-dir", str(output), "--verbose-performance"),
                *("--accelerator-config", accelerator, "--config", "Arm/vela.ini"),
                *("--system-config", system_config or default_system),
                *("--memory-mode", memory_mode or default_memory),
            ],
            directory,
        )
        try:
            (summary,) = _rows(output, "model_summary_*.csv")
            layers = tuple(_rows(output, "model_per-layer.csv"))
            operators = {which: int(_OPERATORS[which].findall(log)[-1]) for which in _OPERATORS}
            estimate = VelaEstimate(
                accelerator=accelerator,
                system_config=summary["system_config"],
                memory_mode=summary["memory_mode"],
                latency_ms=1000 * float(summary["inference_time"]),
                cycles=int(float(summary["cycles_total"])),
                macs=int(float(summary["nn_macs"])),
                sram_bytes=round(_KIB * float(summary["sram_memory_used"])),
                dram_bytes=round(_KIB * float(summary["dram_memory_used"])),
                operators_npu=operators["NPU"],
                operators_cpu=operators["CPU"],
                version=importlib.metadata.version("ethos-u-vela"),
                layers=layers,
                compiled=(output / "model_vela.tflite").read_bytes(),
            )
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise DeviceError(
                "Vela must write its summary, its layers and the compiled model",
                received=f"{type(error).__name__}: {error} {log[-300:]}",
                remedy="install the version that foxnas-mlflow[vela] names",
            ) from error
    if estimate.operators_npu == 0:
        raise InvalidInputError(
            "an Ethos-U runs models quantized to int8",
            received="a model of which no operator maps to it",
            remedy="convert the subnet with: foxnas quantize",
        )
    return estimate


_OPERATORS = {which: re.compile(rf"^{which} operators = (\d+)", re.MULTILINE) for which in ("CPU", "NPU")}


def _run_vela(arguments: list[str], directory: str) -> str:
    """Run Vela of this interpreter in a directory, and return its log."""
    try:
        done = subprocess.run(  # noqa: S603 - a fixed program; every argument is checked or our own path
            [sys.executable, "-m", "ethosu.vela", *arguments],
            cwd=directory,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceError(f"Vela must end within {_TIMEOUT_S} s", received="it was stopped") from error
    if done.returncode != 0:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise InvalidInputError(
            "Vela must be able to compile the model",
            received=lines[-1] if lines else f"exit status {done.returncode}",
            remedy="give an int8 .tflite file, and system_config and memory_mode of Arm's vela.ini",
        )
    return done.stdout


def _rows(directory: Path, pattern: str) -> list[dict[str, str]]:
    (path,) = directory.glob(pattern)
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))
