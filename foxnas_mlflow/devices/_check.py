"""What a machine has, what it lacks, and how to install it."""

from __future__ import annotations

from dataclasses import dataclass

from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._script import INSTALL, run_board

MIN_FREE_BYTES = 256 * 2**20
"""Space for the script, models and a runtime's caches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCheck:
    """What was found on a machine.

    Attributes:
        connection: The address.
        device: The machine in one line.
        machine: Its instruction set, as `uname -m` says it.
        system: Kernel and C library.
        cores: Processors.
        python, numpy, runtime, pillow: Versions; empty where missing.
        edgetpu: Whether an Edge TPU answers.
        emulated: Whether the processor is emulated.
        governor: Of the CPU's frequency; empty where the machine does not tell.
        temperature_c: In degrees Celsius, or None.
        free_bytes: Free disk space for models.
        missing: What must be installed, each with how.
        notes: What is worth changing for steadier figures.
    """

    connection: str
    device: str
    machine: str
    system: str
    cores: int
    python: str
    numpy: str
    runtime: str
    pillow: str
    edgetpu: bool
    emulated: bool
    governor: str
    temperature_c: float | None
    free_bytes: int
    missing: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def ready(self) -> bool:
        """Whether models can be measured there."""
        return not self.missing


def check(connection: Connection) -> DeviceCheck:
    """Look at a machine.

    Raises:
        DeviceError: If it has no Python or no space for one script.
        ConnectionLostError: If the machine went away.
    """
    answer = run_board(connection, ["check"], timeout_s=120)
    missing, notes = [], []
    if not answer["numpy"]:
        missing.append(f"NumPy: {INSTALL}")
    if not answer["runtime"]:
        missing.append(f"ai-edge-litert or tflite-runtime: {INSTALL} ({answer['runtime_error']})")
    if answer["runtime"].startswith("tflite-runtime") and answer["numpy"].split(".")[0] not in ("", "0", "1"):
        missing.append("NumPy below 2, which tflite-runtime needs: pip install ai-edge-litert in its place")
    if answer["free_bytes"] < MIN_FREE_BYTES:
        missing.append(f"disk space: {answer['free_bytes'] / 2**20:.0f} MiB free, {MIN_FREE_BYTES >> 20} MiB needed")
    if answer["governor"] not in ("", "performance"):
        notes.append(
            f"the CPU's governor is {answer['governor']}; for steadier figures: "
            "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
        )
    if answer["emulated"]:
        notes.append("the processor is emulated: results are right, times mean nothing")
    if not answer["pillow"]:
        notes.append(
            "no Pillow, which measuring does not need: deployed models take arrays there, no JPEG or PNG; "
            "install it there with: pip install Pillow"
        )
    if not answer["edgetpu"]:
        notes.append("no Edge TPU answers (needed for the target edgetpu only)")
    facts = {key: answer[key] for key in DeviceCheck.__dataclass_fields__ if key in answer}
    return DeviceCheck(connection=connection.uri, missing=tuple(missing), notes=tuple(notes), **facts)
