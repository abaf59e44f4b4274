"""Measures one TensorFlow Lite model on the machine that it runs on; this file travels alone.

It needs Python 3.7, NumPy and ai-edge-litert or tflite-runtime, nothing of foxnas_mlflow, and
prints one JSON document:

    python3 board.py check
    python3 board.py measure model.tflite --threads 1 --runs 200
    python3 board.py answer model.tflite --outputs answer.npz

An error is JSON too, ``{"error": kind, "message": text}``, with exit status 3.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import ctypes
import fcntl
import gc
import glob
import hashlib
import importlib
import json
import math
import os
import platform
import pwd
import re
import resource
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from typing import Any

RUNTIMES = {"ai_edge_litert": "ai-edge-litert", "tflite_runtime": "tflite-runtime"}
EDGETPU_LIBRARY = "libedgetpu.so.1"
DELEGATE_SYMBOLS = ("tflite_plugin_create_delegate", "tflite_plugin_destroy_delegate")
LOCKS = ("/tmp/foxnas-measurement.lock", "/dev/shm/foxnas-measurement.lock", "/run/lock/foxnas-measurement.lock")  # noqa: S108
CGROUPS = "/sys/fs/cgroup"
MIN_TIMED_RUNS = 20
WINDOW_SECONDS = 10.0
LAST_SECONDS = 60.0
THROTTLED_NOW, THROTTLED_SINCE_BOOT = 0xF, 0xF0000
PROCESSOR_ZONES = ("cpu", "x86_pkg", "soc", "bcm2835", "imx_thermal")
PROCESSOR_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal")
PROCESSORS = "/sys/devices/system/cpu"
PI_THROTTLED = "/sys/devices/platform/soc/soc:firmware/get_throttled"
DIRECTORY = "foxnas-board-"
LEFT_SECONDS = 7 * 86400.0
ENERGY_SEGMENTS = 5
ENERGY_SECONDS = 10.0
METER_REST = 30.0

# One int8 convolution, 1x1, from three channels to two: y = (w x + b) / 20, rounded.
TINY_MODEL = (
    "eNp9UrtKA0EUPZNdNI8hLhgkhWUKixQBLWwkFmKV0iJFCpFAsLESTCBFSvEb/A7xIzZ+iPgFChnPvXvX3SzBXc6cuXfu4+yd9QBu"
    "rkenJLyEEDrkMXFLPNeACBkuiR4RE5+ME64TU+KDNrBHO+aaxQjv/0SbhhM7Vp/g8f5hIb3ohvQC2uhyl8Brftv8XYkl5sTS4meV"
    "vCOukteyvGP1w4nOE902eX6gdZuW6yzGofi2XE/NOCriVHOPxjt5Yvb3JoSEPMhCGsJf9NVNW56LUm1gNRReWA1nHFvfN5v9wGyh"
    "PperkNVNKnVlv05HF8J3Jf35PA8r8zwr8lXva/hf7zpNtfZTSaMrzUf6dHS6+Osj8z+3HsKeL+zc2/+y6zv46GzmO2aT30Wi9Yp+"
    "fvv+ol+cfjV7"
)
# The Edge TPU's operator with no program in it, which its library refuses.
EMPTY_EDGETPU_MODEL = (
    "eNqTYWBgCHHzMWYAAz4GEQYBBh4GDiCbBchjAPIYGGSA2IaRgYEZSAMpqCwIQvggNTxwnSxAEiJmA8QOQOyCpI6BgQssD1LHBTWLByoPwwxY+E"
    "xAnAK2l4Fh0////0FmGUCkOEH0EqAYyCwRJD0MSGYxMDTYg+hKqFmMULNgfuaHuokP6l8LqNkWYPfxgDkwv3FA/cKIw44KNDsQYQSyBxJ6IHMU"
    "oGaBmIJAIjUlPbWkoFQ3ubS4JD9XN78AKAYAytkXFA=="
)
TINY_WEIGHTS, TINY_BIASES = ((7, -5, 3), (-2, 9, 1)), (100, -50)


class BoardError(Exception):
    """Something that the board lacks, or a model that it cannot run."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def main() -> int:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    checking = commands.add_parser("check")
    checking.add_argument("--stick", default="", help="which Edge TPU, in libedgetpu's words: usb:0")
    looking = commands.add_parser("look")
    looking.add_argument("at", help="a module, runtime, or edgetpus")
    trying = commands.add_parser("try")
    trying.add_argument("--library", default="", help="of a delegate; empty: the processor")
    trying.add_argument("--stick", default="")
    metering = commands.add_parser("meter")
    metering.add_argument("energy", help="auto: the board's own sensors; else a command that prints watts")
    answering = commands.add_parser("answer")
    measuring = commands.add_parser("measure")
    for command in (answering, measuring):
        command.add_argument("model")
        command.add_argument("--threads", type=int, default=1)
        command.add_argument("--outputs", default="", help=".npz to write what the model answers to the fixed inputs")
        command.add_argument("--edgetpu", action="store_true")
        command.add_argument("--stick", default="", help="which Edge TPU, in libedgetpu's words: usb:0")
    measuring.add_argument("--runs", type=int, default=200)
    measuring.add_argument("--warmup", type=int, default=10)
    measuring.add_argument("--warmup-seconds", type=float, default=1.0)
    measuring.add_argument("--min-seconds", type=float, default=0.5)
    measuring.add_argument("--max-seconds", type=float, default=10.0, help="0: no limit")
    measuring.add_argument("--sustained-seconds", type=float, default=0.0)
    measuring.add_argument("--energy", default="", help="as for meter; empty: none")
    measuring.add_argument("--wait-seconds", type=float, default=600.0, help="how long to wait for the machine")
    measuring.add_argument("--watch-stdin", action="store_true", help="end when standard input ends")
    options = parser.parse_args()
    tidy(os.path.dirname(os.path.abspath(__file__)))

    # Libraries print to standard output as they like: the JSON gets a descriptor of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = 0
    work: dict[str, Any] = {
        "check": lambda: check(options.stick),
        "look": lambda: look(options.at),
        "try": lambda: try_out(options),
        "meter": lambda: {"power_meter": find_meter(options.energy).name},
        "answer": lambda: answer_only(options),
    }
    try:
        result = work.get(options.command, lambda: measure(options))()
    except BoardError as error:
        result, status = {"error": error.kind, "message": str(error), **fitting()}, 3
    answer.write(json.dumps(result) + "\n")
    answer.flush()
    # Without interpreter shutdown: some runtimes crash while they unload.
    os._exit(status)


def tidy(directory: str) -> None:
    """Mark this script's directory as used, and remove those of this user that nobody used for a week.

    A host that was killed between two measurements leaves its own behind.
    """
    parent, name = os.path.split(directory)
    if not name.startswith(DIRECTORY):
        return
    with contextlib.suppress(OSError):
        os.utime(directory)
    for path in glob.glob(os.path.join(parent, DIRECTORY + "*")):
        with contextlib.suppress(OSError):
            status = os.lstat(path)
            if status.st_uid == os.getuid() and time.time() - status.st_mtime > LEFT_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def check(stick: str) -> dict[str, Any]:
    """What this machine has, and whether what a measurement does works here."""
    facts = describe_machine()
    facts["free_bytes"] = shutil.disk_usage(os.path.dirname(os.path.abspath(__file__))).free
    facts["free_memory_bytes"] = free_memory_bytes()
    facts["throttle"] = throttle_state()
    facts.update(_clock_state())
    facts["clock_cap_mhz"], facts["clock_most_mhz"] = clock_limits()
    facts.update(fitting())
    facts["lock"] = facts["lock_error"] = ""
    # Each in a process of its own: a build for another processor or another NumPy crashes when it is imported.
    for name, module in (("numpy", "numpy"), ("pillow", "PIL"), ("runtime", "runtime")):
        found, facts[name + "_error"] = _apart(["look", module])
        facts[name] = found.get("found", "")
    try:
        with machine_lock(0):
            pass
    except BoardError as error:
        if error.kind != "busy":
            facts["lock"], facts["lock_error"] = error.kind, str(error)
    if facts["runtime"]:
        _, facts["runtime_error"] = _apart(["try"])
    _, facts["edgetpu_error"] = _apart(["try", "--library", EDGETPU_LIBRARY, "--stick", stick])
    facts["edgetpu"] = not facts["edgetpu_error"]
    facts["edgetpus"] = _apart(["look", "edgetpus"])[0].get("found", [])
    return facts


def _apart(arguments: list[str]) -> tuple[dict[str, Any], str]:
    """What this script answers in a process of its own, and what is wrong; empty: nothing."""
    # A wrapper may have given this Python options (-S, -E): they decide which packages it sees.
    options: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    command = [sys.executable, *options, os.path.abspath(__file__), *arguments]
    try:
        run = subprocess.run(command, capture_output=True, timeout=60)  # noqa: S603
    except subprocess.TimeoutExpired:
        return {}, "it did not end within 60 s"
    try:
        answer: dict[str, Any] = json.loads(run.stdout.decode().strip().splitlines()[-1])
        return answer, str(answer.get("message", "")) or str(answer.get("error", ""))
    except (ValueError, IndexError):
        how = "status %d" % run.returncode if run.returncode >= 0 else "signal %d" % -run.returncode
        said = run.stderr.decode(errors="replace").strip().splitlines()
        return {}, "it ended with %s%s" % (how, ": " + said[-1] if said else "")


def look(at: str) -> dict[str, Any]:
    """The version of a module or of the runtime, or the Edge TPUs that pycoral sees."""
    try:
        if at == "runtime":
            return {"found": load_runtime()[0]}
        if at == "edgetpus":
            found = importlib.import_module("pycoral.utils.edgetpu").list_edge_tpus()
            return {"found": ["%s %s" % (each["type"], each["path"]) for each in found]}
        return {"found": str(importlib.import_module(at).__version__)}
    except Exception as error:
        return {"message": str(error)}


def try_out(options: argparse.Namespace) -> dict[str, Any]:
    """Run the smallest model through the runtime, or let an Edge TPU's library take an operator."""
    np = load_numpy()
    name, runtime = load_runtime()
    if options.library:
        # A library that was built for another runtime loads, and crashes when it takes its first operator.
        try:
            open_model(runtime, name, _unpacked(EMPTY_EDGETPU_MODEL), 1, options.library, options.stick)
        except BoardError as error:
            if error.kind != "bad_model":
                raise
        return {}
    interpreter = open_model(runtime, name, _unpacked(TINY_MODEL), 1, "")
    given = np.arange(-24, 24).astype(np.int8).reshape(1, 4, 4, 3)
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], given)
    interpreter.invoke()
    got = interpreter.get_tensor(interpreter.get_output_details()[0]["index"]).reshape(16, 2)
    exact = (given.reshape(16, 3).astype(int).dot(np.array(TINY_WEIGHTS).T) + np.array(TINY_BIASES)) / 20.0
    if abs(got - exact).max() > 1:
        raise BoardError("bad_model", "%s computes one convolution wrongly" % name)
    return {}


def _unpacked(model: str) -> bytes:
    return zlib.decompress(base64.b64decode(model))


def answer_only(options: argparse.Namespace) -> dict[str, Any]:
    """What a model answers to the fixed inputs, without measuring."""
    np = load_numpy()
    name, runtime = load_runtime()
    with open(options.model, "rb") as file:
        interpreter = open_model(runtime, name, file.read(), options.threads, _library(options), options.stick)
    set_inputs(interpreter, np)
    _invoke_first(interpreter, name)
    write_outputs(interpreter, np, options.outputs)
    return {"runtime": name}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Load a model, warm up, and time `invoke()` alone."""
    if options.watch_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    np = load_numpy()
    runtime_name, runtime = load_runtime()
    meter = find_meter(options.energy) if options.energy else None
    with open(options.model, "rb") as file:
        model = file.read()
    with machine_lock(options.wait_seconds):
        result = describe_machine()
        idle = meter.segments(ENERGY_SECONDS / 2) if meter else []
        for key, value in _clock_state().items():
            result[key + "_start"] = value
        before, waits = throttle_state(), quota_waits()
        start = time.perf_counter_ns()
        interpreter = open_model(runtime, runtime_name, model, options.threads, _library(options), options.stick)
        result["load_ms"] = (time.perf_counter_ns() - start) / 1e6
        inputs = interpreter.get_input_details()
        set_inputs(interpreter, np)
        start = time.perf_counter_ns()
        _invoke_first(interpreter, runtime_name)
        result["first_invoke_ms"] = (time.perf_counter_ns() - start) / 1e6
        if options.outputs:
            write_outputs(interpreter, np, options.outputs)
        samples, phase = time_invoke(interpreter.invoke, options)
        phases = [phase]
        for key, value in _clock_state().items():
            result[key + "_end"] = value
        timed = throttle_state()
        result["throttled"] = throttled(before, timed)
        result["windows"], result["sustained_p90_ms"], phase = sustain(
            interpreter.invoke, options.sustained_seconds, np
        )
        phases.append(phase)
        result["lost"] = ""
        if meter:
            try:
                energy, phase = measure_energy(interpreter.invoke, meter, idle)
                result.update(energy)
                phases.append(phase)
            except BoardError as error:
                # Half an hour of load may be measured: what is there is told.
                result["lost"] = "no energy, %s" % error
        # What held it back is asked where it was held back most.
        result["cpu_share"], result["disk_waits"], result["cpu_seconds"] = min(phases)
        # A case without a fan is throttled after minutes of load, which says nothing of the timed runs before.
        under_load = options.sustained_seconds or meter
        result["throttled_under_load"] = throttled(timed, throttle_state()) if under_load else None
        result["quota_waits"] = quota_waits() - waits
    result["samples_ms"] = [round(sample / 1e6, 6) for sample in samples]
    result["clock_tick_ms"] = clock_tick_ns() / 1e6
    result["peak_memory_bytes"] = peak_memory_bytes()
    result["runtime"] = runtime_name
    # Of anything but images the first axis may be any: 15600 samples of one sound.
    result["batch"] = int(inputs[0]["shape"][0]) if len(inputs[0]["shape"]) == 4 else 1
    result["model_sha256"] = hashlib.sha256(model).hexdigest()
    return result


def watched() -> Any:
    """Begin to watch this process.

    What is returned tells the share of the time since that it had a processor, how often it waited for memory on disk
    meanwhile, and the seconds.
    """
    begin, busy, faults = time.perf_counter_ns(), time.process_time_ns(), disk_waits()

    def phase() -> tuple[float, int, float]:
        worked, passed = time.process_time_ns() - busy, max(time.perf_counter_ns() - begin, 1)
        return worked / passed, disk_waits() - faults, passed / 1e9

    return phase


def time_invoke(invoke: Any, options: argparse.Namespace) -> tuple[list[int], tuple[float, int, float]]:
    """Warm up, then time single runs in nanoseconds; and what `watched` tells of that time.

    Warm-up: the asked runs and the asked time, whichever is longer. Timed: the asked runs and the least
    time; the most time ends it sooner, once there are 20 runs.
    """
    clock = time.perf_counter_ns
    least, most = options.min_seconds * 1e9, options.max_seconds * 1e9 or float("inf")
    begin = clock()
    done = 0
    while done < options.warmup or clock() - begin < options.warmup_seconds * 1e9:
        if done >= 1 and clock() - begin > most:
            break
        invoke()
        done += 1
    samples: list[int] = []
    gc.collect()
    gc.disable()
    begin, phase = clock(), watched()
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
    found = phase()
    gc.enable()
    return samples, found


def sustain(
    invoke: Any, seconds: float, np: Any
) -> tuple[list[dict[str, Any]], float | None, tuple[float, int, float]]:
    """Run without a pause.

    Figures a window of ten seconds, the 90th percentile of the last minute in ms, and what `watched` tells of the time.
    """
    if not seconds:
        return [], None, (1.0, 0, 0.0)
    clock = time.perf_counter_ns
    begin, phase = clock(), watched()
    windows: list[dict[str, Any]] = []
    recent: list[Any] = []
    while clock() - begin < seconds * 1e9:
        opened = clock()
        samples: list[int] = []
        length = min(WINDOW_SECONDS, max(seconds - (opened - begin) / 1e9, 0.1))
        while not samples or clock() - opened < length * 1e9:
            start = clock()
            invoke()
            samples.append(clock() - start)
        in_ms = np.array(samples) / 1e6
        recent = [(end, each) for end, each in recent if clock() - end < LAST_SECONDS * 1e9] + [(clock(), in_ms)]
        window = {"second": (opened - begin) / 1e9, "n_runs": len(samples)}
        window["seconds"] = (clock() - opened) / 1e9
        window["p50_ms"], window["p90_ms"] = (float(value) for value in np.percentile(in_ms, (50, 90)))
        window.update(_clock_state())
        windows.append(window)
    found = phase()
    return windows, float(np.percentile(np.concatenate([each for _, each in recent]), 90)), found


class Meter:
    """Reads the power or the energy that this board draws.

    `joules` counts up where the board counts energy; else `watts` reads power, which is summed here.
    """

    def __init__(self, name: str, watts: Any = None, joules: Any = None) -> None:
        self.name, self._watts, self._joules = name, watts, joules

    def power(self, seconds: float, work: Any = None) -> tuple[float, float, float]:
        """Mean power in watts over some seconds, of idling or of a work that is repeated.

        And seconds a run of the work, and the share of the time that this process had a processor. A reading counts
        that ended meanwhile; one that takes longer is waited for.
        """
        begin, busy, count = time.perf_counter(), time.process_time(), 0
        readings: list[float] = []
        done = threading.Event()
        thread = threading.Thread(target=self._collect, args=(readings, done), daemon=True)
        before = self._joules() if self._joules else 0.0
        if not self._joules:
            thread.start()
        while time.perf_counter() - begin < seconds or (work and not count) or not (self._joules or readings):
            if work is None:
                time.sleep(min(0.05, seconds))
            else:
                work()
                count += 1
        elapsed, busy = time.perf_counter() - begin, time.process_time() - busy
        if self._joules:
            watts = (self._joules() - before) / elapsed
        else:
            counted = list(readings)
            watts = sum(counted) / len(counted)
            done.set()
            thread.join(60)
        if watts != watts:
            raise BoardError("no_meter", "%s stopped" % self.name)
        return watts, elapsed / max(count, 1), busy / elapsed

    def segments(self, seconds: float, work: Any = None) -> list[tuple[float, float, float]]:
        """What `power` tells of several segments in turn."""
        return [self.power(seconds / ENERGY_SEGMENTS, work) for _ in range(ENERGY_SEGMENTS)]

    def _collect(self, readings: list[float], done: threading.Event) -> None:
        while not done.is_set():
            worked = _seconds_of_commands()
            try:
                readings.append(self._watts())
            except (OSError, ValueError, subprocess.SubprocessError):
                readings.append(float("nan"))
                return
            # A command that reads works on the same processors: it rests so long that it does not count.
            done.wait(max(0.05, METER_REST * (_seconds_of_commands() - worked)))


def _seconds_of_commands() -> float:
    """Processor time that ended child processes took."""
    spent = os.times()
    return spent.children_user + spent.children_system


def find_meter(energy: str, root: str = "/sys") -> Meter:
    """The meter that was asked for: ``auto``, or a command that prints watts.

    RAPL counts microjoules; hwmon's power*_input is in microwatts; a Jetson's INA3221 gives mA and mV a rail, or
    milliwatts with its older driver. Where a board has an input rail (VDD_IN, POM_5V_IN), it counts alone: the
    others are behind it.
    """
    if energy != "auto":

        def ask() -> float:
            run = subprocess.run(shlex.split(energy), stdout=subprocess.PIPE, timeout=10, check=True)  # noqa: S603
            watts = float((run.stdout.split() or [b""])[0])
            if not math.isfinite(watts):
                raise ValueError("%s is no number of watts" % watts)
            return watts

        try:
            ask()
        except (OSError, ValueError, IndexError, subprocess.SubprocessError) as error:
            raise BoardError("no_meter", "%s: %s" % (energy, error)) from error
        return Meter(energy, watts=ask)
    packages = sorted(glob.glob(root + "/class/powercap/intel-rapl:[0-9]*"))
    # Beside packages there are their parts, and on laptops the platform (psys), which has the packages in it.
    packages = [path for path in packages if _read(path + "/name").startswith("package") and _read(path + "/energy_uj")]
    if packages:
        return Meter("RAPL (processor packages)", joules=_Rapl(packages))
    rails = _rails(root)
    inputs = [name for name in rails if name.upper().endswith("_IN")]
    chosen = [rails[name] for name in (inputs[:1] or rails)]
    if chosen:
        name = "sensor " + (inputs[0] if inputs else " + ".join(rails))
        return Meter(name, watts=lambda: sum(read() for read in chosen))
    raise BoardError("no_meter", "no RAPL, no INA2xx or INA3221, no power sensor in hwmon that this user may read")


class _Rapl:
    """Joules of processor packages since the first reading; each counter wraps."""

    def __init__(self, packages: list[str]) -> None:
        self._last = {path: self._count(path) for path in packages}
        self._range = {path: int(_read(path + "/max_energy_range_uj") or 2**32) for path in packages}
        self._total = 0.0

    def _count(self, path: str) -> int:
        try:
            return int(_read(path + "/energy_uj"))
        except ValueError:
            raise BoardError("no_meter", "%s stopped" % path) from None

    def __call__(self) -> float:
        for path, last in self._last.items():
            now = self._count(path)
            step = now - last
            self._total += (step if step >= 0 else step + self._range[path]) / 1e6
            self._last[path] = now
        return self._total


def _rails(root: str) -> dict[str, Any]:
    """Readers of power in watts by the name of the rail, and of its chip where two have one name."""
    rails: dict[str, Any] = {}

    def add(label: str, directory: str, factor: float, *paths: str) -> None:
        # A channel that is switched off has files that cannot be read.
        if all(_read(path) for path in paths):
            name = "%s (%s)" % (label, os.path.basename(directory)) if label in rails else label
            rails[name] = _product(factor, *paths)

    for hwmon in sorted(glob.glob(root + "/class/hwmon/hwmon*")):
        chip = _read(hwmon + "/name")
        powers = sorted(glob.glob(hwmon + "/power*_input"))
        for path in powers:
            number = re.sub(r"\D", "", os.path.basename(path))
            label = _read(hwmon + "/power%s_label" % number) or "%s power%s" % (chip, number)
            add(label, hwmon, 1e-6, path)
        if powers or not chip.startswith("ina"):
            continue
        # Three channels; the fourth current is their sum, the fourth voltage the first one's shunt.
        for number in "123":
            label = _read(hwmon + "/in%s_label" % number) or "%s rail %s" % (chip, number)
            if not label.lower().startswith("nc"):
                add(label, hwmon, 1e-6, hwmon + "/curr%s_input" % number, hwmon + "/in%s_input" % number)
    for path in sorted(glob.glob(root + "/bus/i2c/drivers/ina3221x/*/iio:device*/in_power*_input")):
        number = re.sub(r"\D", "", os.path.basename(path))
        device = os.path.dirname(path)
        add(_read(device + "/rail_name_" + number) or "rail " + number, device, 1e-3, path)
    return rails


def _product(factor: float, *paths: str) -> Any:
    def read() -> float:
        value = factor
        for path in paths:
            value *= float(_read(path))
        return value

    return read


def measure_energy(
    invoke: Any, meter: Meter, idle: list[tuple[float, float, float]]
) -> tuple[dict[str, Any], tuple[float, int, float]]:
    """Energy of one inference in mJ above what the board draws when it idles, with its error (95 %).

    And what `watched` tells of the time under load, but for waiting for a slow meter. Both powers are means of
    segments; the error is two standard errors of their difference. Idling was measured before; here it is measured
    once more afterwards, so that a drift shows as error.
    """
    faults = disk_waits()
    loaded = meter.segments(ENERGY_SECONDS, invoke)
    faults = disk_waits() - faults
    idle = idle + meter.segments(ENERGY_SECONDS / 2)

    def mean(values: list[float]) -> tuple[float, float]:
        middle = sum(values) / len(values)
        return middle, sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values)

    (busy, busy_error), (idling, idling_error) = mean([w for w, _, _ in loaded]), mean([w for w, _, _ in idle])
    seconds, share = (sum(values) / len(loaded) for values in list(zip(*loaded))[1:])
    energy = {
        "energy_mj": 1e3 * (busy - idling) * seconds,
        "energy_error_mj": 2e3 * (busy_error + idling_error) ** 0.5 * seconds,
        "idle_w": idling,
        "load_w": busy,
        "power_meter": meter.name,
    }
    return energy, (share, faults, ENERGY_SECONDS)


@contextlib.contextmanager
def machine_lock(wait_seconds: float) -> Any:
    """Hold the machine: only one measurement at a time, whoever takes it.

    The lock is on a directory, which every user can open whoever made it.
    """
    path = lock_path()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise BoardError("closed_lock", "%s of %s: %s" % (path, _owner(path), error.strerror)) from error
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


def lock_path() -> str:
    """The directory that stands for the machine, made where it can be: /tmp may be read-only."""
    reasons = []
    for path in (*LOCKS, os.path.join(tempfile.gettempdir(), os.path.basename(LOCKS[0]))):
        try:
            os.mkdir(path)
        except FileExistsError:
            pass
        except OSError as error:
            reasons.append("%s: %s" % (path, error.strerror))
            continue
        # Others must open it, whatever this user lets them read of new files. In a container it is read-only.
        with contextlib.suppress(OSError):
            if os.lstat(path).st_uid == os.getuid():
                os.chmod(path, 0o755)  # noqa: S103 - every account measures
        return path
    raise BoardError("no_lock", "; ".join(reasons))


def _owner(path: str) -> str:
    """The user whose a file is, by name where it has one."""
    number = os.lstat(path).st_uid
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return str(number)


def load_numpy() -> Any:
    """NumPy, or what is wrong with it."""
    try:
        import numpy as np
    except Exception as error:
        # A wheel for another processor or C library fails in many ways.
        raise BoardError("no_numpy", str(error)) from error
    return np


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
        "machine": instruction_set(),
        "system": platform.platform(),
        "cores": n_processors(),
        "quota": quota_processors(),
        "python": platform.python_version(),
        "emulated": emulated,
        "governor": governor(),
        "temperature_c": temperature_c(),
    }


def fitting() -> dict[str, Any]:
    """What decides which packages fit here, and how they are installed."""
    glibc = None
    with contextlib.suppress(AttributeError, OSError, ValueError):
        # As pip asks: another C library (musl, of Alpine) has no such name, or nothing to say.
        glibc = os.confstr("CS_GNU_LIBC_VERSION")
    managed = os.path.exists(os.path.join(os.path.dirname(os.__file__), "EXTERNALLY-MANAGED"))
    return {
        "machine": instruction_set(),
        "python": platform.python_version(),
        "glibc": bool(glibc),
        "managed": managed,
    }


def instruction_set(machine: str = "", bits: int = 8 * struct.calcsize("P")) -> str:
    """As `uname -m` says it, but of this Python: a 64-bit kernel also runs systems of 32 bits."""
    machine = machine or platform.machine()
    return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(machine, machine) if bits == 32 else machine


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


def temperature_c(root: str = "/sys") -> float | None:
    """The processor's temperature, or None where nothing tells it.

    Most zones of a PC are others' (acpitz is a place on its board); where none is the processor's, its driver's sensor
    is in hwmon.
    """
    found = []
    for zone in sorted(glob.glob(root + "/class/thermal/thermal_zone*")):
        # TCPU, CPU-therm and cpu_thermal are the processor's too.
        if any(name in _read(zone + "/type").lower() for name in PROCESSOR_ZONES):
            found.append(zone + "/temp")
    for hwmon in sorted(glob.glob(root + "/class/hwmon/hwmon*")):
        if _read(hwmon + "/name") in PROCESSOR_SENSORS:
            found.append(hwmon + "/temp1_input")
    for path in found:
        with contextlib.suppress(ValueError):
            return int(_read(path)) / 1000
    return None


def throttle_state() -> str:
    """A Raspberry Pi's flags (hexadecimal), else the processor's count of throttlings, else empty: unknown."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        run = subprocess.run(["vcgencmd", "get_throttled"], stdout=subprocess.PIPE, timeout=10, check=True)  # noqa: S607
        # It also prints errors with exit status 0.
        flags = re.match(r"throttled=(0x[0-9a-fA-F]+)$", run.stdout.decode(errors="replace").strip())
        if flags:
            return flags.group(1)
    flags = re.match(r"(?:0x)?([0-9a-fA-F]+)$", _read(PI_THROTTLED))
    if flags:
        return "0x" + flags.group(1)
    counts = glob.glob(PROCESSORS + "/cpu*/thermal_throttle/core_throttle_count")
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


def free_memory_bytes() -> int | None:
    """Memory that a new process may have, or None where nothing tells it.

    Files that the system merely keeps in memory are given up for it.
    """
    found = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found.append(int(line.split()[1]) * 1024)
    for directory in _cgroups("memory"):
        for limit, used, files in (
            ("memory.max", "memory.current", "inactive_file"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        ):
            kept = re.search(r"^%s (\d+)$" % files, _read(directory + "/memory.stat"), re.MULTILINE)
            with contextlib.suppress(ValueError):
                in_use = int(_read(directory + "/" + used)) - (int(kept.group(1)) if kept else 0)
                found.append(max(int(_read(directory + "/" + limit)) - in_use, 0))
    return min(found) if found else None


def _allowed() -> list[int]:
    """Numbers of the processors that this process may use."""
    return sorted(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def n_processors() -> int:
    """Processors that this process may use: its affinity, within the quota of its container."""
    allowed = len(_allowed())
    quota = quota_processors()
    return allowed if quota is None else max(1, min(allowed, int(quota)))


def quota_processors() -> float | None:
    """Processors' worth of time that the control groups leave this process, or None without a quota."""
    found = []
    for directory in _cgroups("cpu"):
        words = _read(directory + "/cpu.max").split() or [
            _read(directory + "/cpu.cfs_quota_us"),
            _read(directory + "/cpu.cfs_period_us"),
        ]
        with contextlib.suppress(ValueError, IndexError, ZeroDivisionError):
            quota = int(words[0]) / int(words[1])
            if quota > 0:
                found.append(quota)
    return min(found) if found else None


def quota_waits() -> int:
    """How often a quota has held this process's group back."""
    waits = 0
    for directory in _cgroups("cpu"):
        for line in _read(directory + "/cpu.stat").splitlines():
            if line.startswith("nr_throttled "):
                waits += int(line.split()[1])
    return waits


def disk_waits() -> int:
    """How often this process has waited for a page of its memory that was on disk: swapped out, or not yet read."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_majflt


def _cgroups(controller: str) -> list[str]:
    """Directories of the control groups of this process, innermost first, of version 2 and of a controller of 1."""
    found = []
    for line in _read("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number != "0" and controller not in names.split(","):
            continue
        root = CGROUPS if number == "0" else os.path.join(CGROUPS, names)
        if number != "0" and not os.path.isdir(root):
            root = os.path.join(CGROUPS, controller)
        # In a container the path may be that of the host, of which only the root is seen.
        while True:
            directory = (root + path).rstrip("/")
            if os.path.isdir(directory) and directory not in found:
                found.append(directory)
            if path in ("", "/"):
                break
            path = os.path.dirname(path)
    return found


def _library(options: argparse.Namespace) -> str:
    return EDGETPU_LIBRARY if options.edgetpu else ""


def load_delegate(runtime: Any, library: str, stick: str) -> Any:
    """A delegate, after its library was looked at: the runtime's own words for a wrong one are a traceback."""
    try:
        loaded = ctypes.CDLL(library)
    except OSError as error:
        raise BoardError("no_edgetpu_library", str(error)) from error
    missing = [name for name in DELEGATE_SYMBOLS if not hasattr(loaded, name)]
    if missing:
        place = [
            line.split()[-1] for line in _read("/proc/self/maps").splitlines() if os.path.basename(library) in line
        ]
        raise BoardError(
            "no_delegate", "%s is a library without %s" % (place[0] if place else library, " and ".join(missing))
        )
    try:
        return runtime.load_delegate(library, {"device": stick} if stick else None)
    except OSError as error:
        raise BoardError("no_edgetpu_library", str(error)) from error
    except ValueError as error:
        raise BoardError("no_edgetpu_device", "%s%s" % (stick and stick + ": ", error)) from error


def open_model(runtime: Any, runtime_name: str, model: bytes, threads: int, library: str, stick: str = "") -> Any:
    """An interpreter with its tensors allocated."""
    options: dict[str, Any] = {"num_threads": threads}
    if library:
        options["experimental_delegates"] = [load_delegate(runtime, library, stick)]
    try:
        interpreter = runtime.Interpreter(model_content=model, **options)
        interpreter.allocate_tensors()
    except Exception as error:
        np = load_numpy()
        text = "%s: %s" % (runtime_name, error)
        if runtime_name.startswith("tflite-runtime") and int(np.__version__.split(".")[0]) >= 2:
            raise BoardError("numpy_too_new", "NumPy %s: %s" % (np.__version__, error)) from error
        if isinstance(error, (ImportError, SystemError)) or "error set" in str(error):
            raise BoardError("numpy_too_old", "NumPy %s: %s" % (np.__version__, error)) from error
        if "Select TensorFlow op" in text or "Flex" in text:
            raise BoardError("flex_operator", text) from error
        if "unresolved custom op" in text or "custom op" in text:
            raise BoardError("custom_operator", text) from error
        raise BoardError("bad_model", text) from error
    return interpreter


def set_inputs(interpreter: Any, np: Any) -> None:
    """Fill every input with numbers that are the same everywhere; integers without a scale are 0 or 1, as indices are.

    Texts are of one letter. The generator's stream is one that NumPy never changes.
    """
    rng = np.random.RandomState(0)
    details = interpreter.get_input_details()
    if not details:
        raise BoardError("no_input", "0 inputs")
    for detail in details:
        dtype = np.dtype(detail["dtype"])
        if dtype.kind in "iu" and (dtype.itemsize == 1 or detail["quantization"][0]):
            limits = np.iinfo(dtype)
            values = rng.randint(max(limits.min, -(2**31)), min(limits.max, 2**31 - 2) + 1, detail["shape"])
        elif dtype.kind in "iub":
            values = rng.randint(0, 2, detail["shape"])
        elif dtype.kind in "fc":
            values = rng.standard_normal(detail["shape"])
        elif dtype.kind in "SOU":
            values = np.full(detail["shape"], b"a")
        else:
            raise BoardError("no_input", "%s: %s" % (detail["name"], dtype))
        interpreter.set_tensor(detail["index"], np.asarray(values).astype(dtype))


def _invoke_first(interpreter: Any, runtime_name: str) -> None:
    try:
        interpreter.invoke()
    except Exception as error:
        raise BoardError("bad_model", "%s: %s" % (runtime_name, error)) from error


def write_outputs(interpreter: Any, np: Any, path: str) -> None:
    """Write the model's outputs in their order, as NumPy's archive."""
    outputs = [interpreter.get_tensor(detail["index"]) for detail in interpreter.get_output_details()]
    np.savez(path, *[output for output in outputs if output.dtype.kind in "iufb"])


def governor() -> str:
    """Of the clock of the processors that this process may use: ``mixed`` where they differ, empty where untold."""
    found = {_read("%s/cpu%d/cpufreq/scaling_governor" % (PROCESSORS, number)) for number in _allowed()}
    return found.pop() if len(found) == 1 else "mixed"


def clock_limits() -> tuple[float | None, float | None]:
    """The clock in MHz that a processor of this process is held to, and the most that it can have; None: not told.

    Of several the one that is held back most.
    """
    found = []
    for number in _allowed():
        with contextlib.suppress(ValueError):
            held, most = (
                int(_read("%s/cpu%d/cpufreq/%s_max_freq" % (PROCESSORS, number, name)))
                for name in ("scaling", "cpuinfo")
            )
            found.append((held / 1000, most / 1000))
    return min(found, key=lambda pair: pair[0] / pair[1]) if found else (None, None)


def _clock_state() -> dict[str, Any]:
    """The processor's temperature, and the clock in MHz of the one that this process ran on last."""
    # The 39th word; the second is a name in brackets, with any words in it.
    words = _read("/proc/self/stat").rpartition(")")[2].split()
    number = words[36] if len(words) > 36 else "0"
    try:
        frequency: float | None = int(_read("%s/cpu%s/cpufreq/scaling_cur_freq" % (PROCESSORS, number))) / 1000
    except ValueError:
        frequency = None
    return {"temperature_c": temperature_c(), "frequency_mhz": frequency}


def throttled(before: str, after: str) -> bool | None:
    """Whether the processor was throttled between two states; None: it cannot be known.

    A Pi's flags since boot tell nothing new once they are set.
    """
    if not before or not after:
        return None
    if not before.startswith("0x"):
        return before != after
    first, last = int(before, 16), int(after, 16)
    if (first | last) & THROTTLED_NOW or (first ^ last) & THROTTLED_SINCE_BOOT:
        return True
    return None if first & THROTTLED_SINCE_BOOT else False


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
    if os.path.basename(directory).startswith(DIRECTORY):
        shutil.rmtree(directory, ignore_errors=True)
    os._exit(4)


if __name__ == "__main__":
    sys.exit(main())
