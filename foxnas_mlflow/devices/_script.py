"""Talking with the board script: push it, start it, read its JSON, name what went wrong."""

from __future__ import annotations

import importlib.resources
import json
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError
from foxnas_mlflow.devices._base import Completed, Connection
from foxnas_mlflow.runtime import FITTING_LIBRARY

USUAL_PACKAGES = "numpy ai-edge-litert"

MISSING_OPERATOR = (
    "convert it with TensorFlow Lite's own operators alone (target_spec.supported_ops = [TFLITE_BUILTINS])"
)

EDGETPU_PAIRS = f"install there {FITTING_LIBRARY}"

STICK = "look after the Edge TPU's power and cable: under load it draws more than a hub without a supply gives"

OTHER_PROCESSOR = (
    "its build is for another processor: on a Jetson put export OPENBLAS_CORETYPE=ARMV8 where that user's shell starts"
)

BOARD_ERRORS: Mapping[str, tuple[str, str]] = {
    "no_numpy": ("{uri} must have NumPy", "{install}"),
    "no_runtime": ("{uri} must have ai-edge-litert or tflite-runtime", "{install}"),
    "numpy_too_new": (
        "tflite-runtime on {uri} needs NumPy below 2",
        "install ai-edge-litert in its place, or pip install 'numpy<2' there",
    ),
    "numpy_too_old": (
        "the runtime on {uri} needs the NumPy that it was built for",
        "pip install --upgrade 'numpy<2' there, in a virtual environment (tflite-runtime needs 1.20 or newer)",
    ),
    "no_lock": (
        "{uri} must have a directory for temporary files that can be written",
        "set TMPDIR for that user to one, and export it where its shell starts",
    ),
    "closed_lock": (
        "every user of {uri} must be able to open the directory that stands for the machine",
        "have its owner or root run chmod 755 on it there",
    ),
    "no_delegate": (
        "a delegate's library on {uri} must be one of TensorFlow Lite",
        f"mend what the library's name points to, or {EDGETPU_PAIRS}",
    ),
    "custom_operator": (
        "the runtime on {uri} must know all operators of the model",
        f"{MISSING_OPERATOR}, or run it with the program that brings its custom operators",
    ),
    "flex_operator": (
        "the runtime on {uri} runs no operators of TensorFlow itself (flex)",
        f"{MISSING_OPERATOR}, without SELECT_TF_OPS",
    ),
    "no_input": (
        "a model to measure must have inputs, of numbers or text",
        "give a model that computes something from an image, or other numbers",
    ),
    "no_meter": (
        "measuring energy on {uri} needs a meter that it can read",
        "RAPL's counters are read by root alone (chmod o+r /sys/class/powercap/*/energy_uj); or give a command "
        "that prints watts",
    ),
    "no_edgetpu_library": (
        "an Edge TPU on {uri} needs the library libedgetpu.so.1",
        EDGETPU_PAIRS,
    ),
    "no_edgetpu_device": (
        "an Edge TPU must be connected to {uri}",
        "plug it in, check the udev rules of libedgetpu and that no other process holds it; with several, name one: "
        "?edgetpu=usb:0",
    ),
    "bad_model": (
        "the runtime on {uri} must be able to load the model",
        "update the runtime there, and check that the file is a TensorFlow Lite model for it",
    ),
    "busy": (
        "another measurement holds {uri}",
        "wait for it to end: one machine measures one thing at a time",
    ),
}
"""Rule and remedy of every error that the board script names."""


def runtime_packages(machine: str, python: str, *, glibc: bool = True) -> str:
    """What pip installs for a runtime on a machine; empty where no wheel fits.

    Args:
        machine: Instruction set, as `uname -m` says it.
        python: Version of its Python.
        glibc: Whether its C library is GNU's.
    """
    major, minor = (int(part) for part in python.split(".")[:2])
    if not glibc:
        return ""
    if machine in ("x86_64", "aarch64") and (major, minor) >= (3, 10):
        return USUAL_PACKAGES
    if machine in ("x86_64", "aarch64", "armv7l") and (3, 7) <= (major, minor) <= (3, 11):
        return "'numpy<2' tflite-runtime"
    return ""


def how_to_install(connection: Connection, facts: Mapping[str, Any]) -> str:
    """What puts NumPy and a runtime on a machine, by what its board script told of it."""
    machine, python = facts["machine"], facts["python"]
    packages = runtime_packages(machine, python, glibc=facts["glibc"])
    install = connection.install.format(packages=packages)
    if "{packages}" in connection.install and not packages:
        if not facts["glibc"]:
            return (
                "no runtime's wheel fits its C library (musl, of Alpine): give a Python of a Debian container or root "
                "on it, with docker://IMAGE or ?python=/path"
            )
        return (
            f"no runtime's wheel fits {machine} with Python {python}: "
            "give a Python 3.7 to 3.11 of 64-bit ARM or x86, or of 32-bit ARM (armv7l), with ?python=/path"
        )
    if facts["managed"] and "-m venv" in install:
        install += " (Debian's venv comes with: sudo apt install python3-venv)"
    return install


def prepare(connection: Connection) -> str:
    """The connection's directory on the machine, with the board script in it.

    Raises:
        DeviceError: If the machine refuses.
        ConnectionLostError: If the machine went away.
    """
    script = importlib.resources.files("foxnas_mlflow.devices") / "board.py"
    return connection.workspace({"board.py": script.read_bytes()})


def run_board(connection: Connection, arguments: Sequence[str], *, timeout_s: float) -> dict[str, Any]:
    """Run the board script and read its answer.

    Raises:
        DeviceError: If the machine lacks something, or the script's answer is an error.
        ConnectionLostError: If the machine went away.
    """
    directory = prepare(connection)
    try:
        completed = connection.run([connection.python, f"{directory}/board.py", *arguments], timeout_s=timeout_s)
    except ConnectionLostError:
        raise
    except DeviceError:
        # Its time was up: the script takes the end of its input for that of this host, and removes its directory.
        connection.leave_workspace()
        raise
    return read_answer(completed, connection, edgetpu="--edgetpu" in arguments)


def read_answer(completed: Completed, connection: Connection, *, edgetpu: bool = False) -> dict[str, Any]:
    """The script's JSON, or the error that its end means; `edgetpu`: whether it was to run there."""
    uri = connection.uri
    try:
        answer = json.loads(completed.stdout.strip().splitlines()[-1])
        if not isinstance(answer, dict):
            raise ValueError(answer)
    except (ValueError, IndexError):
        raise _ended(completed, connection, edgetpu) from None
    if completed.status == 0 and "error" not in answer:
        return answer
    rule, remedy = BOARD_ERRORS.get(
        str(answer.get("error")), ("the measurement on {uri} failed", "run it again with --debug")
    )
    if "{install}" in remedy:
        remedy = remedy.format(install=how_to_install(connection, answer))
    raise DeviceError(rule.format(uri=uri), received=answer.get("message") or None, remedy=remedy)


def _ended(completed: Completed, connection: Connection, edgetpu: bool) -> DeviceError:
    """The error for a script that ended without an answer."""
    uri, status = connection.uri, completed.status
    said = (completed.stderr.strip().splitlines() or [f"exit status {status}"])[-1]
    if status in (126, 127):
        return DeviceError(
            f"{uri} must have Python 3.7 or newer at {connection.python}",
            received=said,
            remedy="install python3 there, or add ?python=/path/to/python to the address",
        )
    if "No space left" in completed.stderr:
        return DeviceError(f"{uri} must have free disk space", received=said, remedy="free some there (df -h)")
    if "SyntaxError" in said:
        return DeviceError(
            f"{uri} must have Python 3.7 or newer at {connection.python}",
            received=said,
            remedy="add ?python=/path/to/python to the address",
        )
    if status - 128 in (signal.SIGKILL, signal.SIGTERM, signal.SIGXCPU):
        return DeviceError(
            f"the measuring process on {uri} was killed",
            received=said,
            remedy="look whether its memory was full (dmesg), or who ended it",
        )
    if status == 128 + signal.SIGILL:
        return DeviceError(
            f"NumPy and the runtime on {uri} must be built for its processor",
            received=f"signal {status - 128}",
            remedy=f"run foxnas device check, which says whose it is; {OTHER_PROCESSOR}",
        )
    if status == 128 + signal.SIGSEGV and edgetpu:
        return DeviceError(
            f"the Edge TPU's library on {uri} must be one for its runtime",
            received=f"signal {status - 128}",
            remedy=EDGETPU_PAIRS,
        )
    if status > 128:
        # What aborts says why.
        words = f": {said}" if completed.stderr.strip() else ""
        return DeviceError(
            f"the {'Edge TPU' if edgetpu else 'runtime'} on {uri} must not crash",
            received=f"signal {status - 128}{words}",
            remedy=STICK
            if edgetpu
            else "update ai-edge-litert there, and check that the model was made for this processor",
        )
    return DeviceError(f"the board script on {uri} must answer", received=said, remedy="run foxnas device check")
