"""Measures one TensorFlow Lite model on the machine that it runs on; this file travels alone.

It needs Python 3.7, NumPy and ai-edge-litert or tflite-runtime, nothing of foxnas_mlflow, and
prints one JSON document:

    python3 board.py check
    python3 board.py measure model.tflite --threads 1 --runs 200

An error is JSON too, ``{"error": kind, "message": text}``, with exit status 3.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import gc
import glob
import hashlib
import importlib
import json
import os
import platform
import shutil
import struct
import subprocess
import sys
import threading
import time
from typing import Any

RUNTIMES = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}
EDGETPU_LIBRARY = "libedgetpu.so.1"
LOCK = "/tmp/foxnas-measurement.lock"  # noqa: S108
WARMUP_SECONDS = 1.0
MIN_TIMED_RUNS = 20
THROTTLED_NOW, THROTTLED_SINCE_BOOT = 0xF, 0xF0000


class BoardError(Exception):
    """Something that the board lacks, or a model that it cannot run."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("check")
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--threads", type=int, default=1)
    measuring.add_argument("--runs", type=int, default=200)
    measuring.add_argument("--warmup", type=int, default=10)
    measuring.add_argument("--min-seconds", type=float, default=0.5)
    measuring.add_argument("--max-seconds", type=float, default=10.0)
    measuring.add_argument("--wait-seconds", type=float, default=600.0, help="how long to wait for the machine")
    measuring.add_argument("--input", default="", help=".npy of the model's input; its output is returned")
    measuring.add_argument("--edgetpu", action="store_true")
    measuring.add_argument("--watch-stdin", action="store_true", help="end when standard input ends")
    options = parser.parse_args()

    # Libraries print to standard output as they like: the JSON gets a descriptor of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = 0
    try:
        result = check() if options.command == "check" else measure(options)
    except BoardError as error:
        result, status = {"error": error.kind, "message": str(error)}, 3
    answer.write(json.dumps(result) + "\n")
    answer.flush()
    # Without interpreter shutdown: some runtimes crash while they unload.
    os._exit(status)


def check() -> dict[str, Any]:
    """What this machine has."""
    facts = describe_machine()
    facts["free_bytes"] = shutil.disk_usage(os.path.dirname(os.path.abspath(__file__))).free
    facts["runtime"] = ""
    facts["edgetpu"] = False
    for name, module in (("numpy", "numpy"), ("pillow", "PIL")):
        facts[name] = ""
        with contextlib.suppress(ImportError):
            facts[name] = str(importlib.import_module(module).__version__)
    try:
        facts["runtime"], runtime = load_runtime()
    except BoardError as error:
        facts["runtime_error"] = str(error)
        return facts
    try:
        runtime.load_delegate(EDGETPU_LIBRARY)
        facts["edgetpu"] = True
    except (OSError, ValueError):
        pass
    return facts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load a model, warm up, and time `invoke()` alone."""
    if options.watch_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    try:
        import numpy as np
    except ImportError as error:
        raise BoardError("no_numpy", str(error)) from error
    runtime_name, runtime = load_runtime()
    with open(options.model, "rb") as file:
        model = file.read()
    with machine_lock(options.wait_seconds):
        result = describe_machine()
        result.update(_clock_state("start"))
        start = time.perf_counter_ns()
        interpreter = _open(runtime, runtime_name, model, options.threads, options.edgetpu)
        result["load_ms"] = (time.perf_counter_ns() - start) / 1e6
        inputs, outputs = interpreter.get_input_details(), interpreter.get_output_details()
        if options.input:
            _set_given(interpreter, inputs, np.load(options.input, allow_pickle=False))
        else:
            _set_random(interpreter, inputs, np)
        start = time.perf_counter_ns()
        interpreter.invoke()
        result["first_invoke_ms"] = (time.perf_counter_ns() - start) / 1e6
        if options.input:
            result["output"] = _encode(interpreter.get_tensor(outputs[0]["index"]))
        samples, result["cpu_share"] = time_invoke(interpreter.invoke, options)
        result.update(_clock_state("end"))
    result["samples_ms"] = [round(sample / 1e6, 6) for sample in samples]
    result["clock_tick_ms"] = clock_tick_ns() / 1e6
    result["throttled"] = _throttled(result.pop("throttle_start"), result.pop("throttle_end"))
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["runtime"] = runtime_name
    result["batch"] = int(inputs[0]["shape"][0])
    result["model_sha256"] = hashlib.sha256(model).hexdigest()
    return result


def time_invoke(invoke: Any, options: argparse.Namespace) -> tuple[list[int], float]:
    """Warm up, then time single runs in nanoseconds; and the share of that time that this process had a processor.

    Warm-up: the asked runs and one second, whichever is longer. Timed: the asked runs and the least
    time; the most time ends it sooner, once there are 20 runs.
    """
    clock = time.perf_counter_ns
    begin = clock()
    done = 0
    while done < options.warmup or clock() - begin < WARMUP_SECONDS * 1e9:
        if done >= 1 and clock() - begin > options.max_seconds * 1e9:
            break
        invoke()
        done += 1
    samples = []
    least, most = options.min_seconds * 1e9, options.max_seconds * 1e9
    gc.collect()
    gc.disable()
    begin, busy = clock(), time.process_time_ns()
    while True:
        start = clock()
        invoke()
        end = clock()
        samples.append(end - start)
        elapsed = end - begin
        if len(samples) >= options.runs and elapsed >= least:
            break
        if len(samples) >= min(MIN_TIMED_RUNS, options.runs) and elapsed >= most:
            break
    share = (time.process_time_ns() - busy) / max(clock() - begin, 1)
    gc.enable()
    return samples, share


@contextlib.contextmanager
def machine_lock(wait_seconds: float) -> Any:
    """Hold the machine: only one measurement at a time, whoever takes it.

    The lock is on a directory, which every user can open whoever made it.
    """
    with contextlib.suppress(FileExistsError):
        os.mkdir(LOCK, 0o755)
    descriptor = os.open(LOCK, os.O_RDONLY)
    deadline = time.monotonic() + wait_seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise BoardError("busy", "waited %g s" % wait_seconds) from None
                time.sleep(0.05)
        yield
    finally:
        os.close(descriptor)


def load_runtime() -> tuple[str, Any]:
    """Name with version, and module, of the runtime: LiteRT first."""
    reasons = []
    for package, distribution in RUNTIMES.items():
        try:
            module = importlib.import_module(package + ".interpreter")
        except Exception as error:
            # A wheel for another NumPy or C library fails in many ways.
            reasons.append("%s: %s" % (distribution, error))
            continue
        return ("%s %s" % (distribution, _version(package, distribution))).strip(), module
    raise BoardError("no_runtime", "; ".join(reasons))


def describe_machine() -> dict[str, Any]:
    """The machine in words, and whether it only pretends to be one."""
    emulated = is_emulated()
    return {
        "device": device_name() + (" (emulated)" if emulated else ""),
        "machine": platform.machine(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "emulated": emulated,
        "governor": _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        "temperature_c": temperature_c(),
    }


def device_name() -> str:
    """The board's name where firmware or kernel tell it, else the processor's."""
    board = _read("/proc/device-tree/model")
    if board:
        return board
    lines = {}
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        lines[key.strip()] = value.strip()
    for key in ("Model", "model name", "Hardware"):
        if lines.get(key):
            return lines[key]
    return platform.processor() or platform.machine()


def is_emulated() -> bool:
    """Whether instructions of another processor are translated here.

    User-mode emulators answer /proc/self/exe, /proc/self/maps, uname and often /proc/cpuinfo for
    the program that they run. The path through the task directory tells the truth: the process is
    an emulator's binary, made for another processor than this Python.
    """
    process, python = _elf_machine("/proc/self/task/%d/exe" % os.getpid()), _elf_machine(sys.executable)
    if process is not None and python is not None and process != python:
        return True
    cpuinfo = _read("/proc/cpuinfo")
    # Full-system emulation: QEMU's own processors, which no silicon has.
    return "QEMU TCG CPU" in cpuinfo or "CPU implementer\t: 0x00" in cpuinfo


def temperature_c() -> float | None:
    """The processor's temperature, or None where nothing tells it."""
    zones = sorted(glob.glob("/sys/class/thermal/thermal_zone*"))
    names = ("cpu", "x86_pkg", "soc")
    zones.sort(key=lambda zone: not any(name in _read(zone + "/type") for name in names))
    for zone in zones:
        try:
            return int(_read(zone + "/temp")) / 1000
        except ValueError:
            continue
    return None


def throttle_state() -> str:
    """A Raspberry Pi's flags (hexadecimal), else the processor's count of throttlings, else empty."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, timeout=10, check=True)  # noqa: S607
        return run.stdout.decode().strip().split("=")[-1]
    counts = glob.glob("/sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    return str(sum(int(_read(path) or 0) for path in counts)) if counts else ""


def clock_tick_ns() -> int:
    """The smallest step of the clock that is seen."""
    steps = []
    for _ in range(50):
        start = end = time.perf_counter_ns()
        while end == start:
            end = time.perf_counter_ns()
        steps.append(end - start)
    return min(steps)


def peak_memory_bytes() -> int:
    """The most memory that this process held: Python, the runtime and the model."""
    # Not getrusage: its figure still holds what the parent had before this program started.
    for line in _read("/proc/self/status").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _open(runtime: Any, runtime_name: str, model: bytes, threads: int, edgetpu: bool) -> Any:
    options: dict[str, Any] = {"num_threads": threads}
    if edgetpu:
        try:
            options["experimental_delegates"] = [runtime.load_delegate(EDGETPU_LIBRARY)]
        except OSError as error:
            raise BoardError("no_edgetpu_library", str(error)) from error
        except ValueError as error:
            raise BoardError("no_edgetpu_device", str(error)) from error
    try:
        interpreter = runtime.Interpreter(model_content=model, **options)
        interpreter.allocate_tensors()
    except Exception as error:
        import numpy as np

        if runtime_name.startswith("tflite-runtime") and int(np.__version__.split(".")[0]) >= 2:
            raise BoardError("numpy_too_new", "NumPy %s: %s" % (np.__version__, error)) from error
        raise BoardError("bad_model", "%s: %s" % (runtime_name, error)) from error
    return interpreter


def _set_given(interpreter: Any, inputs: Any, array: Any) -> None:
    if tuple(array.shape) != tuple(inputs[0]["shape"]) or array.dtype != inputs[0]["dtype"]:
        raise BoardError(
            "bad_input", "%s %s for %s" % (array.dtype, array.shape, tuple(int(n) for n in inputs[0]["shape"]))
        )
    interpreter.set_tensor(inputs[0]["index"], array)


def _set_random(interpreter: Any, inputs: Any, np: Any) -> None:
    rng = np.random.RandomState(0)
    for detail in inputs:
        dtype = np.dtype(detail["dtype"])
        if dtype.kind in "iu":
            limits = np.iinfo(dtype)
            values = rng.randint(max(limits.min, -(2**31)), min(limits.max, 2**31 - 2) + 1, detail["shape"])
        else:
            values = rng.standard_normal(detail["shape"])
        interpreter.set_tensor(detail["index"], values.astype(dtype))


def _encode(array: Any) -> dict[str, Any]:
    return {
        "dtype": str(array.dtype),
        "shape": list(array.shape),
        "base64": base64.b64encode(array.tobytes()).decode(),
    }


def _clock_state(moment: str) -> dict[str, Any]:
    try:
        frequency: float | None = int(_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")) / 1000
    except ValueError:
        frequency = None
    return {
        "temperature_c_" + moment: temperature_c(),
        "frequency_mhz_" + moment: frequency,
        "throttle_" + moment: throttle_state(),
    }


def _throttled(before: str, after: str) -> bool | None:
    if not before or not after:
        return None
    if not before.startswith("0x"):
        return before != after
    first, last = int(before, 16), int(after, 16)
    return bool((first | last) & THROTTLED_NOW or (first ^ last) & THROTTLED_SINCE_BOOT)


def _elf_machine(path: str) -> int | None:
    try:
        with open(path, "rb") as file:
            head = file.read(20)
    except OSError:
        return None
    if len(head) < 20 or head[:4] != b"\x7fELF":
        return None
    return int(struct.unpack("<H" if head[5] == 1 else ">H", head[18:20])[0])


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip("\x00\n ")
    except OSError:
        return ""


def _version(package: str, distribution: str) -> str:
    try:
        return str(importlib.import_module("importlib.metadata").version(distribution))
    except Exception:
        # Python 3.7, or a package that was put in place without its metadata.
        return str(getattr(importlib.import_module(package), "__version__", ""))


def _end_with_stdin() -> None:
    """Leave nothing behind when the host that asked has gone away."""
    while os.read(0, 4096):
        pass
    directory = os.path.dirname(os.path.abspath(__file__))
    if os.path.basename(directory).startswith("foxnas-board-"):
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(4)


if __name__ == "__main__":
    sys.exit(main())
