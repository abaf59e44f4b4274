"""What a machine has, what it lacks, and how to install it."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from foxnas_mlflow.data.preprocess import OLDEST_PILLOW
from foxnas_mlflow.devices._base import Connection
from foxnas_mlflow.devices._script import BOARD_ERRORS, EDGETPU_PAIRS, OTHER_PROCESSOR, STICK, how_to_install, run_board

MIN_FREE_BYTES = 64 * 2**20
"""Space for the script, a model and its outputs; where /tmp is in memory, small boards have little more."""

MIN_FREE_MEMORY_BYTES = 128 * 2**20
"""Memory for Python, a runtime and a mobile network."""

HOT_C = 75.0
"""Temperature above which a board that idles will be throttled under load: a Pi's limit is 80."""

CPUFREQ = "/sys/devices/system/cpu/cpu*/cpufreq"

LIFT = f"for c in {CPUFREQ}; do sudo tee $c/scaling_max_freq < $c/cpuinfo_max_freq; done"
"""Each cluster of processors has a limit of its own."""

Verdict = Literal["fine", "not fine", "unknown"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a check.

    Attributes:
        name: What was looked at.
        verdict: What is thought of it.
        text: What was found.
        remedy: What to do about it; empty: nothing.
        needed: Whether measuring needs it to be fine.
    """

    name: str
    verdict: Verdict
    text: str
    remedy: str = ""
    needed: bool = False

    def __str__(self) -> str:
        return f"{self.name:<14}{self.verdict:<10}{self.text}{f'; {self.remedy}' if self.remedy else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCheck:
    """What was found on a machine.

    Attributes:
        connection: The address.
        device: The machine in one line.
        machine: Instruction set of its Python, as `uname -m` says it.
        system: Kernel and C library.
        cores: Processors that a process may use: its affinity, within the quota of its container.
        quota: Processors' worth of time that a container's quota leaves; None without one.
        python, numpy, runtime, pillow: Versions; empty where missing.
        edgetpu: Whether an Edge TPU answers.
        emulated: Whether the processor is emulated.
        governor: Of the CPU's frequency; empty where the machine does not tell.
        temperature_c: In degrees Celsius, or None.
        free_bytes: Free disk space for models.
        findings: All that was looked at, and what is thought of it.
    """

    connection: str
    device: str
    machine: str
    system: str
    cores: int
    quota: float | None
    python: str
    numpy: str
    runtime: str
    pillow: str
    edgetpu: bool
    emulated: bool
    governor: str
    temperature_c: float | None
    free_bytes: int
    findings: tuple[Finding, ...]

    @property
    def missing(self) -> tuple[str, ...]:
        """What must be mended before anything can be measured, each with how."""
        return tuple(f"{f.name}: {f.text}; {f.remedy}" for f in self.findings if f.needed and f.verdict != "fine")

    @property
    def notes(self) -> tuple[str, ...]:
        """What is worth changing for steadier figures, or cannot be known."""
        return tuple(
            f"{f.text}; {f.remedy}" for f in self.findings if not f.needed and f.verdict != "fine" and f.remedy
        )

    @property
    def ready(self) -> bool:
        """Whether models can be measured there."""
        return not self.missing


def check(connection: Connection) -> DeviceCheck:
    """Look at a machine, and run there what a measurement runs.

    Raises:
        DeviceError: If it has no Python or no space for one script.
        ConnectionLostError: If the machine went away.
    """
    answer = run_board(connection, ["check", "--stick", connection.edgetpu], timeout_s=240)
    facts = {key: answer[key] for key in DeviceCheck.__dataclass_fields__ if key in answer}
    findings = (*_software(answer, connection), *_hardware(answer), *_shell(connection))
    return DeviceCheck(connection=connection.uri, findings=findings, **facts)


def _software(answer: Mapping[str, Any], connection: Connection) -> Iterator[Finding]:
    install = how_to_install(connection, answer)
    numpy, runtime, error = answer["numpy"], answer["runtime"], answer["runtime_error"]
    missing = answer["numpy_error"]
    if numpy:
        yield Finding("NumPy", "fine", numpy)
    elif missing.startswith("No module named 'numpy'"):
        yield Finding("NumPy", "not fine", "none", install, needed=True)
    else:
        yield Finding("NumPy", "not fine", f"it cannot be imported: {missing}", _rebuilt(missing, install), needed=True)
    if not numpy and "signal" in missing:
        yield Finding("runtime", "unknown", "it needs NumPy")
    elif "signal" in error and not runtime:
        yield Finding("runtime", "not fine", f"it cannot be imported: {error}", _rebuilt(error, install), needed=True)
    elif not runtime:
        yield Finding("runtime", "not fine", f"no ai-edge-litert or tflite-runtime ({error})", install, needed=True)
    elif error:
        yield Finding("runtime", "not fine", f"{runtime}: {error}", _mend(runtime, numpy, install), needed=True)
    else:
        yield Finding("runtime", "fine", f"{runtime}, computes right")
    if int(answer["pillow"].split(".")[0] or 0) >= OLDEST_PILLOW:
        yield Finding("Pillow", "fine", answer["pillow"])
    else:
        has = f"Pillow {answer['pillow']}, older than {OLDEST_PILLOW}" if answer["pillow"] else "no Pillow"
        yield Finding(
            "Pillow",
            "not fine",
            f"{has}, which measuring does not need: deployed models take arrays there, no JPEG or PNG",
            f"install it there with: pip install {'--upgrade ' if answer['pillow'] else ''}Pillow",
        )
    if answer["edgetpu"]:
        found = ", ".join(answer["edgetpus"]) or "one"
        yield Finding("Edge TPU", "fine", f"{found} answers, its library fits the runtime")
    elif "signal" in answer["edgetpu_error"] and not error:
        text = f"its library crashes when it takes an operator ({answer['edgetpu_error'].strip()})"
        mend = EDGETPU_PAIRS if f"signal {signal.SIGSEGV.value}" in answer["edgetpu_error"] else STICK
        yield Finding("Edge TPU", "not fine", text, f"for the target edgetpu: {mend}")
    else:
        needed = "needed for the target edgetpu only"
        mend = f"for the target edgetpu: {EDGETPU_PAIRS}"
        if answer["edgetpu_error"].startswith("no_edgetpu_device") or "Failed to load" in answer["edgetpu_error"]:
            mend = "for the target edgetpu: plug it in, and check that no other process holds it"
        yield Finding("Edge TPU", "unknown", f"no Edge TPU answers ({answer['edgetpu_error']}; {needed})", mend)
    if answer["lock"]:
        rule, remedy = BOARD_ERRORS[answer["lock"]]
        text = f"{rule.format(uri=connection.uri)} ({answer['lock_error']})"
        yield Finding("lock", "not fine", text, remedy, needed=True)


def _rebuilt(error: str, install: str) -> str:
    """What helps where importing a package fails or crashes."""
    if f"signal {signal.SIGILL.value}" in error:
        return f"{OTHER_PROCESSOR}; else {install}"
    return install


def _mend(runtime: str, numpy: str, install: str) -> str:
    if runtime.startswith("tflite-runtime") and numpy.split(".")[0] not in ("0", "1"):
        return "pip install 'numpy<2' there, or ai-edge-litert in its place"
    if runtime.startswith("tflite-runtime") and tuple(int(n) for n in numpy.split(".")[:2]) < (1, 20):
        return "tflite-runtime needs NumPy 1.20 or newer, below 2: pip install --upgrade 'numpy<2' there"
    return install


def _hardware(answer: Mapping[str, Any]) -> Iterator[Finding]:
    free, memory = answer["free_bytes"], answer["free_memory_bytes"]
    enough = free >= MIN_FREE_BYTES
    remedy = f"{MIN_FREE_BYTES >> 20} MiB are needed: free some (df -h), or set TMPDIR there to a directory with more"
    text = f"{free / 2**30:.1f} GiB"
    yield Finding("free disk", "fine" if enough else "not fine", text, "" if enough else remedy, needed=True)
    if memory is None:
        yield Finding("free memory", "unknown", "not told")
    else:
        enough = memory >= MIN_FREE_MEMORY_BYTES
        remedy = "" if enough else f"{MIN_FREE_MEMORY_BYTES >> 20} MiB are needed: end other programs"
        text = f"{memory / 2**20:.0f} MiB"
        yield Finding("free memory", "fine" if enough else "not fine", text, remedy, needed=True)
    quota = answer["quota"]
    if quota is not None and quota < 1:
        yield Finding(
            "processors",
            "not fine",
            f"a quota of {quota:g} processors",
            "give the container one or more (docker run --cpus): else runs are cut in pieces",
        )
    else:
        limit = "" if quota is None else f", a quota of {quota:g}"
        yield Finding("processors", "fine", f"{answer['cores']}{limit}")
    if answer["governor"] in ("", "performance"):
        yield Finding("governor", "fine" if answer["governor"] else "unknown", answer["governor"] or "not told")
    else:
        yield Finding(
            "governor",
            "not fine",
            f"the CPU's governor is {answer['governor']}",
            f"for steadier figures: echo performance | sudo tee {CPUFREQ}/scaling_governor",
        )
    temperature = answer["temperature_c"]
    hot = temperature is not None and temperature > HOT_C
    if temperature is None:
        yield Finding("temperature", "unknown", "not told")
    else:
        yield Finding(
            "temperature",
            "not fine" if hot else "fine",
            f"{temperature:.1f} C{f', above {HOT_C:g}' if hot else ''}",
            "cool it: a fan, a heat sink, a pause" if hot else "",
        )
    yield _clock(answer["frequency_mhz"], answer["clock_cap_mhz"], answer["clock_most_mhz"], hot=hot)
    yield _throttling(answer["throttle"])
    if answer["emulated"]:
        yield Finding(
            "emulation", "not fine", "the processor is emulated", "results are right, times mean nothing", needed=False
        )


def _clock(now_mhz: float | None, cap_mhz: float | None, most_mhz: float | None, *, hot: bool) -> Finding:
    now = "" if now_mhz is None else f"{now_mhz:.0f} MHz now"
    if cap_mhz is not None and most_mhz is not None and cap_mhz < most_mhz:
        return Finding(
            "clock",
            "not fine",
            f"{f'{now}, ' if now else ''}capped at {cap_mhz:.0f} of {most_mhz:.0f} MHz",
            f"{'cool it first, then ' if hot else ''}lift the cap: {LIFT}",
        )
    return Finding("clock", "fine" if now else "unknown", now or "not told")


def _throttling(state: str) -> Finding:
    if not state:
        return Finding("throttling", "unknown", "the machine does not tell")
    if not state.startswith("0x"):
        return Finding("throttling", "fine", f"{state} times since it started")
    flags = int(state, 16)
    power = "check its power supply and cooling"
    if flags & 0xF:
        return Finding("throttling", "not fine", f"throttled now ({state})", power)
    if flags & 0xF0000:
        return Finding(
            "throttling",
            "unknown",
            f"it was throttled since it started ({state}), which hides whether it is again",
            f"{power}, and restart it",
        )
    return Finding("throttling", "fine", "none since it started")


def _shell(connection: Connection) -> Iterator[Finding]:
    if connection.login_words:
        yield Finding(
            "login shell",
            "not fine",
            f"it prints {connection.login_words.splitlines()[0]!r} before every command, which is left out",
            "print only in interactive shells there",
        )
