"""Measuring on this machine, for real, and judging the figures."""

from __future__ import annotations

import ast
import dataclasses
import fcntl
import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.protocol import in_turns
from foxnas_mlflow.core.errors import ConnectionLostError, DeviceError, InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.processors import n_processors
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.devices import (
    Benchmark,
    Completed,
    LocalConnection,
    _measure,
    board,
    check,
    connect,
    measure,
    subnet_timing,
    undisturbed,
    what_helps,
)
from foxnas_mlflow.devices._benchmark import invalid_reasons, median_interval
from foxnas_mlflow.devices._check import _software
from foxnas_mlflow.devices._script import BOARD_ERRORS, read_answer
from foxnas_mlflow.tflite import write_probe
from tests.measuring import SHORT
from tests.versions import benchmark as made_up

from .sshd import board_processes

BOARD = Path(board.__file__)
STEADY = np.full(200, 5.0)


def test_measure_here(probe: bytes, expected: list[np.ndarray], tmp_path: Path) -> None:
    path = tmp_path / "model.tflite"
    path.write_bytes(probe)
    with connect("local") as connection:
        benchmark = measure(connection, path, runs=50, warmup=5, expected=expected, min_seconds=0.1)
        directory = connection.workspace({})
        assert (Path(directory) / "board.py").is_file()
        # The next model travels alone.
        again = measure(connection, probe, **SHORT)
        assert connection.workspace({}) == directory
    assert not Path(directory).exists()
    assert benchmark.n_runs == len(benchmark.samples_ms) >= 50
    samples = np.array(benchmark.samples_ms)
    assert benchmark.latency_ms_p50 == pytest.approx(np.median(samples))
    assert samples.min() <= benchmark.latency_ms_p50_low <= benchmark.latency_ms_p50
    assert benchmark.latency_ms_p50 <= benchmark.latency_ms_p50_high <= benchmark.latency_ms_p90
    assert benchmark.throughput_per_s == pytest.approx(1000 / samples.mean())
    assert benchmark.output_difference == 0
    assert again.output_difference is None
    assert benchmark.model_sha256 == hashlib.sha256(probe).hexdigest()
    assert benchmark.runtime.startswith(("ai-edge-litert", "tflite-runtime"))
    assert not benchmark.emulated
    assert benchmark.peak_memory_bytes > 10**7
    assert (benchmark.threads, benchmark.batch, benchmark.warmup, benchmark.connection) == (1, 1, 5, "local")
    assert set(benchmark.metrics()) >= {"benchmark/latency_ms_p50", "benchmark/valid", "benchmark/peak_memory_bytes"}


def test_benchmark_json_round_trip(probe: bytes) -> None:
    with connect("local") as connection:
        benchmark = measure(connection, probe, **SHORT)
    data = json.loads(json.dumps(benchmark.to_dict()))
    assert Benchmark.from_dict(data) == benchmark
    with pytest.raises(InvalidFormatError, match="format 3"):
        Benchmark.from_dict({**data, "format": 4})
    with pytest.raises(InvalidFormatError, match="speed"):
        Benchmark.from_dict({**data, "speed": 1})


def test_outputs_that_differ_are_found(probe: bytes, expected: list[np.ndarray]) -> None:
    with connect("local") as connection:
        benchmark = measure(connection, probe, expected=[expected[0] ^ np.int8(16)], **SHORT)
        assert not benchmark.valid
        assert any("differs from the host's" in reason for reason in benchmark.invalid_reasons)
        assert "runtime" in what_helps(benchmark.invalid_reasons)
        assert "quiet" in what_helps(["the machine was throttled"])
        assert "more memory" in what_helps(["it waited for memory on disk 500 times, and had no processor for 50 %"])
        other = measure(connection, probe, expected=[expected[0][:, :4]], **SHORT)
        assert other.output_difference == float("inf")


@pytest.mark.parametrize(
    ("samples", "facts", "reason"),
    [
        (STEADY, {"throttled": True}, "throttled"),
        (np.repeat([5.0, 5.3], 100), {}, "two halves of the runs differ by 6.0 %"),
        (STEADY / 1000, {"clock_tick_ms": 0.0001}, "clock ticks"),
        (STEADY, {"output_difference": 2.0}, "output differs"),
        (STEADY, {"cpu_share": 0.5, "quota": 0.5}, "a quota of 0.5 processors held it back for 50 %"),
        (STEADY, {"cpu_share": 0.5}, "other processes had the processor for 50 %"),
        (STEADY, {"cpu_share": 0.5, "disk_waits": 12, "seconds": 1800.0}, "other processes had the processor for 50 %"),
        (
            STEADY,
            {"cpu_share": 0.5, "disk_waits": 500, "seconds": 5.0},
            "waited for memory on disk 500 times, and had no processor for 50",
        ),
        (STEADY, {"output_difference": float("nan")}, "output differs"),
    ],
)
def test_figures_that_cannot_be_trusted(samples: np.ndarray, facts: dict[str, float], reason: str) -> None:
    steady = {"throttled": None, "clock_tick_ms": 1e-6}
    assert invalid_reasons(STEADY, **{**steady, "output_difference": 1.0}) == ()  # type: ignore[arg-type]
    (found,) = invalid_reasons(samples, **{**steady, **facts})  # type: ignore[arg-type]
    assert reason in found


@pytest.mark.parametrize(
    ("before", "after", "throttled"),
    [
        ("0x0", "0x0", False),
        ("0x50000", "0x50000", None),  # since boot: whether it was again cannot be seen
        ("0x0", "0x4", True),
        ("0x50005", "0x50000", True),
        ("0x0", "0x40000", True),
        ("12", "12", False),
        ("12", "13", True),
        ("", "", None),
        ("0x0", "", None),
    ],
)
def test_flags_and_counts_of_throttling(before: str, after: str, throttled: bool | None) -> None:
    assert board.throttled(before, after) is throttled


def test_a_raspberry_pi_tells_its_flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vcgencmd").write_text("#!/bin/sh\necho throttled=0x50005\n")
    (tmp_path / "vcgencmd").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert board.throttle_state() == "0x50005"
    for script in ("exit 1", "echo VCHI initialization failed", "echo throttled=", "echo error=1 error_msg=x"):
        (tmp_path / "vcgencmd").write_text(f"#!/bin/sh\n{script}\n")
        assert not board.throttle_state().startswith("0x")
    # Without the program the kernel tells them too.
    (tmp_path / "vcgencmd").unlink()
    (tmp_path / "get_throttled").write_text("50005\n")
    monkeypatch.setattr(board, "PI_THROTTLED", str(tmp_path / "get_throttled"))
    assert board.throttle_state() == "0x50005"


def test_company_that_stays_is_found(probe: bytes) -> None:
    allowed = os.sched_getaffinity(0)
    # One processor for both: children inherit it.
    os.sched_setaffinity(0, {min(allowed)})
    company = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        with connect("local") as connection:
            benchmark = measure(connection, probe, runs=20, warmup=1, min_seconds=0.5, attempts=1)
    finally:
        company.kill()
        company.wait()
        os.sched_setaffinity(0, allowed)
    assert not benchmark.valid
    assert any("other processes had the processor" in reason for reason in benchmark.invalid_reasons)


def test_company_under_load_is_found_too() -> None:
    # Who sleeps has no processor, as one has none who waits for it.
    windows, _, (share, _, _) = board.sustain(lambda: time.sleep(0.005), 0.2, np)
    assert windows
    assert share < 0.5
    assert board.sustain(lambda: None, 0.0, np) == ([], None, (1.0, 0, 0.0))


@pytest.mark.parametrize(
    ("facts", "shared"),
    [
        ({}, False),
        ({"invalid_reasons": ("other processes had the processor for 50 % of the time",)}, True),
        ({"threads": 2}, None),
        ({"edgetpu": True}, None),
        ({"quota": 0.5, "invalid_reasons": ("a quota of 0.5 processors held it back for 50 % of the time",)}, None),
        (
            {"invalid_reasons": ("it waited for memory on disk 500 times, and had no processor for 50 % of the time",)},
            None,
        ),
        # A quota that did not hold it back hides nothing.
        ({"quota": 2.0}, False),
        ({"quota": 2.0, "invalid_reasons": ("other processes had the processor for 50 % of the time",)}, True),
    ],
)
def test_whether_the_processor_was_shared_is_told_where_it_is_known(
    facts: dict[str, object], shared: bool | None
) -> None:
    once = made_up({"benchmark/latency_ms_p90": 40.0, "benchmark/valid": 1.0}, b"file", "board", emulated=False)
    assert dataclasses.replace(once, **facts).shared is shared


def test_waits_for_memory_on_disk_are_counted() -> None:
    """Of pages that the system gave up, as it does where memory is short."""
    kind = subprocess.run(["stat", "-f", "-c", "%T", "/var/tmp"], capture_output=True, text=True).stdout.strip()
    if kind in ("tmpfs", "ramfs", "zfs"):
        pytest.skip(f"{kind} gives no pages up")
    with tempfile.TemporaryFile(dir="/var/tmp") as file:
        file.write(bytes(64 * mmap.PAGESIZE))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        before = board.disk_waits()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            assert sum(memory[:: mmap.PAGESIZE]) == 0
    assert board.disk_waits() > before


def test_runs_that_neighbours_slow_down_do_not_count(rng: np.random.Generator) -> None:
    quiet = 4 * rng.normal(1, 0.01, 400)
    # A quiet machine's all count, among them the single long ones that every system has.
    quiet[::50] *= 3
    np.testing.assert_array_equal(undisturbed(quiet), quiet)
    # Slow for stretches, most of the time, as a virtual machine that shares its processor.
    slow = np.repeat(rng.random(20) < 0.7, 20)
    assert slow.mean() > 0.5
    runs = np.where(slow, 1.6, 1) * quiet
    assert abs(np.median(runs) / np.median(quiet) - 1) > 0.5
    assert abs(np.median(undisturbed(runs)) / np.median(quiet) - 1) < 0.005
    # Four fast runs are a matter of luck, and few runs are what they are.
    lucky = np.array([5.0] * 8 + [4.0] * 2 + [5.0] * 8)
    assert np.median(undisturbed(lucky)) == 5.0
    np.testing.assert_array_equal(undisturbed(runs[:5]), runs[:5])


def test_a_subnets_latency_is_that_of_its_undisturbed_runs(probe: bytes) -> None:
    with connect("local") as connection:
        real = measure(connection, probe, **SHORT)
    changed = "the two halves of the runs differ by 60.0 %"
    slow = dataclasses.replace(real, samples_ms=(8.0,) * 20, n_runs=20, invalid_reasons=())
    mixed = dataclasses.replace(real, samples_ms=(5.0,) * 6 + (8.0,) * 14, n_runs=20, invalid_reasons=(changed,))
    company = dataclasses.replace(real, samples_ms=(3.0,) * 20, invalid_reasons=("other processes", changed))
    assert subnet_timing([slow]).latency_ms == 8.0
    together = subnet_timing([slow, mixed, company])
    assert (together.latency_ms, together.n_runs, together.problems) == (5.0, 6, ())
    assert subnet_timing([company]).problems == ("other processes",)


def test_median_interval_covers_the_median(rng: np.random.Generator) -> None:
    covered = [low <= 1.0 <= high for low, high in (median_interval(rng.lognormal(size=101)) for _ in range(2000))]
    assert 0.94 < np.mean(covered) < 0.985


@pytest.mark.parametrize("given", [b"not a model at all", "/does/not/exist.tflite"])
def test_what_is_no_model_is_refused(given: bytes | str) -> None:
    with connect("local") as connection, pytest.raises(InvalidInputError, match="a model must be"):
        measure(connection, given)


def test_a_damaged_model_and_bad_counts_are_refused(probe: bytes) -> None:
    with connect("local") as connection:
        with pytest.raises(DeviceError, match="able to load the model"):
            measure(connection, probe[:4000], runs=1, warmup=1)
        for name in ("threads", "runs", "warmup"):
            with pytest.raises(InvalidInputError, match=name):
                measure(connection, probe, **{name: 0})  # type: ignore[arg-type]


def test_one_machine_measures_one_thing_at_a_time(probe: bytes) -> None:
    descriptor = os.open(board.lock_path(), os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        with connect("local") as connection, pytest.raises(DeviceError, match="another measurement holds local"):
            measure(connection, probe, runs=1, warmup=1, wait_seconds=0.1)
    finally:
        os.close(descriptor)


def test_a_measurement_ends_with_the_process_that_asked(probe: bytes, tmp_path: Path) -> None:
    """Killed hard, the host leaves neither a process nor files behind."""
    (tmp_path / "model.tflite").write_bytes(probe)
    code = (
        "from foxnas_mlflow.devices import connect, measure\n"
        "connection = connect('local'); print(connection.workspace({}), flush=True)\n"
        f"connection._directory = None\n"
        f"measure(connection, {str(tmp_path / 'model.tflite')!r}, runs=10**9, max_seconds=600.0)"
    )
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    empty = Path(process.stdout.readline().strip())
    empty.rmdir()
    deadline = time.monotonic() + 60
    while not board_processes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert board_processes(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while (board_processes(tmp_path) or list(tmp_path.glob("foxnas-board-*"))) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not board_processes(tmp_path)
    assert not list(tmp_path.glob("foxnas-board-*"))


class Watched(LocalConnection):
    """This machine, which tells what it was asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.commands: list[str] = []
        self.files: list[str] = []

    def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
        self.commands += argv[2:3] if argv[0] == self.python else []
        return super().run(argv, timeout_s=timeout_s)

    def put(self, data: bytes, path: str) -> None:
        self.files.append(os.path.basename(path))
        super().put(data, path)


def test_a_machine_that_goes_away_under_load_is_given_up(probe: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_measure, "RECONNECT_SECONDS", 0.02)

    class Weak(Watched):
        """This machine with a power supply that is too weak; it is back at once."""

        def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
            if "measure" in argv and len(self.commands) < 20:
                self.commands.append("measure")
                raise ConnectionLostError("the connection was lost", received="reset", remedy="look at it")
            return super().run(argv, timeout_s=timeout_s)

    with Weak() as connection, pytest.raises(ConnectionLostError, match=r"3 times in turn.*; look at it") as caught:
        measure(connection, probe, **SHORT)
    assert connection.commands == ["measure"] * 3
    assert "\n" not in str(caught.value)


def test_a_machine_that_is_lost_under_load_keeps_what_was_measured(
    probe: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_measure, "RECONNECT_SECONDS", 0.02)

    class Radio(LocalConnection):
        """This machine, whose radio gives up in the last minute."""

        def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
            if "--sustained-seconds" in argv:
                raise ConnectionLostError("the connection was lost", received="reset", remedy="look at it")
            return super().run(argv, timeout_s=timeout_s)

        def _reopen(self) -> None:
            raise DeviceError("there must be a route")

    with Radio() as connection:
        benchmark = measure(connection, probe, sustained_seconds=60, **SHORT)
    assert benchmark.n_runs >= 20
    assert benchmark.sustained_p90_ms is None
    assert not benchmark.valid
    (lost,) = (reason for reason in benchmark.invalid_reasons if "not all was measured" in reason)
    assert lost.startswith("not all was measured: no load, local went away and did not come back")


def test_a_meter_that_is_missing_is_told_before_anything_is_measured(probe: bytes) -> None:
    with Watched() as connection, pytest.raises(DeviceError, match="needs a meter"):
        measure(connection, probe, energy="/no/such/meter", **SHORT)
    assert connection.commands == ["meter"]


def test_a_model_travels_once(probe: bytes) -> None:
    other = probe + b"\0"
    with Watched() as connection:
        for model in (probe, probe, other, probe):
            measure(connection, model, **SHORT)
        assert connection.files == ["board.py", *["model.tflite"] * 3]
        # A machine that was started anew has nothing.
        connection.reconnect()
        measure(connection, probe, **SHORT)
        assert connection.files[-2:] == ["board.py", "model.tflite"]


def test_check_here() -> None:
    with connect("local") as connection:
        found = check(connection)
    assert found.ready
    assert found.numpy == np.__version__
    assert found.runtime
    assert found.cores == n_processors()
    assert not found.emulated


@pytest.mark.parametrize(("free", "ready"), [(100 * 2**20, True), (20 * 2**20, False)])
def test_a_small_board_needs_little_space(free: int, ready: bool) -> None:
    """Half of the memory of a small board is what a /tmp there has at most."""

    class Small(LocalConnection):
        """This machine with a small /tmp."""

        def run(self, argv: Sequence[str], *, timeout_s: float) -> Completed:
            done = super().run(argv, timeout_s=timeout_s)
            if "check" not in argv:
                return done
            return dataclasses.replace(done, stdout=json.dumps({**json.loads(done.stdout), "free_bytes": free}))

    with Small() as connection:
        found = check(connection)
    assert found.ready is ready
    assert ready or "or set TMPDIR there" in found.missing[0]


def test_a_pillow_that_is_too_old_is_not_fine(tmp_path: Path) -> None:
    version = ""

    class Old(LocalConnection):
        """This machine with another Pillow."""

        def run(self, argv: list[str], *, timeout_s: float) -> Completed:  # type: ignore[override]
            argv = ["env", f"PYTHONPATH={tmp_path / version}", *argv] if argv[0] == self.python else argv
            return super().run(argv, timeout_s=timeout_s)

    found = {}
    for version in ("8.1.2", "5.4.1"):
        # Each in a place of its own: bytecode knows its source by second and size.
        (tmp_path / version / "PIL").mkdir(parents=True)
        (tmp_path / version / "PIL" / "__init__.py").write_text(f"__version__ = {version!r}")
        with Old() as connection:
            found[version] = check(connection)
        assert (found[version].ready, found[version].pillow) == (True, version)
    assert not any("Pillow" in note for note in found["8.1.2"].notes)
    assert [note for note in found["5.4.1"].notes if "Pillow" in note] == [
        "Pillow 5.4.1, older than 8, which measuring does not need: deployed models take arrays there, no JPEG or PNG; "
        "install it there with: pip install --upgrade Pillow"
    ]


def test_a_machine_that_lacks_packages_is_told_how_to_get_them(tmp_path: Path) -> None:
    class Bare(LocalConnection):
        """This machine's Python without its packages."""

        def run(self, argv: list[str], *, timeout_s: float) -> Completed:  # type: ignore[override]
            argv = [argv[0], "-S", *argv[1:]] if argv[0] == self.python else argv
            return super().run(argv, timeout_s=timeout_s)

    with Bare() as connection:
        found = check(connection)
        assert not found.ready
        assert [text.split(":")[0] for text in found.missing] == ["NumPy", "runtime"]
        # A connection to this machine takes no other Python.
        assert found.missing[0] == "NumPy: none; pip install 'foxnas-mlflow[device]'"
        connection.put(b"\0\0\0\0TFL3", str(tmp_path / "model.tflite"))
        with pytest.raises(DeviceError, match=r"must have NumPy.*; pip install 'foxnas-mlflow\[device\]'"):
            measure(connection, tmp_path / "model.tflite")


def test_every_error_of_the_board_script_is_mapped() -> None:
    tree = ast.parse(BOARD.read_text(encoding="utf-8"))
    raised = {
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "BoardError"
        if isinstance(node.args[0], ast.Constant)
    }
    assert raised == set(BOARD_ERRORS)


def test_the_board_script_is_python_3_7_and_needs_nothing_of_ours() -> None:
    source = BOARD.read_text(encoding="utf-8")
    tree = ast.parse(source, feature_version=(3, 7))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imported - {"numpy"} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    ("completed", "message"),
    [
        (Completed(127, "", "python3: not found"), "must have Python 3.7 or newer"),
        (Completed(1, "", "SyntaxError: future feature annotations is not defined"), "must have Python 3.7 or newer"),
        (Completed(1, "", "OSError: [Errno 28] No space left on device"), "free disk space"),
        (Completed(137, "", ""), "killed"),
        (Completed(143, "", ""), "killed"),
        (Completed(134, "", "INFO\nwhat(): bad weights"), r"must not crash; received signal 6: what\(\): bad weights;"),
        (Completed(139, "", ""), "must not crash; received signal 11"),
        (Completed(1, "", "Traceback\nKeyError: 'x'"), "must answer; received KeyError"),
        (Completed(3, '{"error": "news", "message": "?"}', ""), "failed"),
    ],
)
def test_how_the_script_ended_is_told_in_one_line(completed: Completed, message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        read_answer(completed, LocalConnection())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (
            134,
            r"Edge TPU on local must not crash; received signal 6: F usb_driver.cc:1148\] transfer in failed; look",
        ),
        (139, "library on local must be one for its runtime; received signal 11; install there the libedgetpu"),
        (143, "was killed"),
    ],
)
def test_a_crash_with_an_edge_tpu_is_not_always_the_library_s(status: int, message: str) -> None:
    """A stick that browns out under load ends the process too, and says why."""
    completed = Completed(status, "", "INFO: Created\nF usb_driver.cc:1148] transfer in failed\n")
    with pytest.raises(DeviceError, match=message):
        read_answer(completed, LocalConnection(), edgetpu=True)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [("signal 6: F usb_driver.cc:1148] transfer in failed", "power and cable"), ("signal 11", "2.5 to 2.11")],
)
def test_a_check_tells_a_stick_s_crash_from_a_library_s(error: str, remedy: str) -> None:
    facts: dict[str, Any] = dict.fromkeys(("numpy_error", "runtime_error", "pillow", "lock"), "")
    facts |= {"numpy": "2.0", "runtime": "ai-edge-litert 2.0", "edgetpu": False, "edgetpus": []}
    facts |= {"machine": "aarch64", "python": "3.12.1", "glibc": True, "managed": False}
    found = _software({**facts, "edgetpu_error": f"it ended with {error}"}, LocalConnection())
    (line,) = (each for each in found if each.name == "Edge TPU")
    assert error in line.text
    assert remedy in line.remedy


def test_local_refusals_name_the_reason(tmp_path: Path) -> None:
    connection = LocalConnection()
    with pytest.raises(DeviceError, match="No such file or directory"):
        connection.get(str(tmp_path / "nothing"))
    with pytest.raises(DeviceError, match="No such file or directory"):
        connection.put(b"", str(tmp_path / "no" / "thing"))
    with pytest.raises(DeviceError, match="must end within"):
        connection.run(["sleep", "60"], timeout_s=0.2)
    assert connection.run(["/does/not/exist"], timeout_s=5).status == 127
    with pytest.raises(DeviceError, match="a device is local"):
        connect("telnet://board")


def test_no_working_directory_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither by Ctrl-C while it is filled nor, for ever, by a host that was killed."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    class Interrupted(LocalConnection):
        """This machine, on which a user loses patience."""

        def put(self, data: bytes, path: str) -> None:
            raise KeyboardInterrupt

    with Interrupted() as connection, pytest.raises(KeyboardInterrupt):
        check(connection)
    assert not list(tmp_path.iterdir())
    for name, days in (("foxnas-board-used", 6), ("foxnas-board-left", 8), ("foxnas-others", 8)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "board.py").touch()
        os.utime(tmp_path / name, (time.time() - days * 86400,) * 2)
    with connect("local") as connection:
        # It is in use, however long ago it was made.
        directory = connection.workspace({"board.py": BOARD.read_bytes()})
        os.utime(directory, (0, 0))
        assert check(connection).ready
    assert {path.name for path in tmp_path.iterdir()} == {"foxnas-board-used", "foxnas-others"}


def test_a_working_directory_that_cannot_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/proc/nowhere")
    with connect("local") as connection, pytest.raises(DeviceError, match="making a directory on local was refused"):
        check(connection)


@pytest.mark.slow
def test_litert_times_the_same() -> None:
    """Against LiteRT's own program, in turns; benchmarks/protocol.py tells more.

    The fastest runs of both: other work makes none faster. As long as they differ there is another turn, because one
    of the two may have had no quiet moment yet.
    """
    if shutil.which("litert-benchmark") is None:
        pytest.skip("no litert-benchmark here (ai-edge-litert 2.1 and newer)")
    network = CPU_SPACE.replace(kernels=(3,)).smallest(224)
    fastest = np.full(2, np.inf)
    for turn in in_turns(write_probe(build_network(CPU_SPACE, network)), turns=12, runs=100):
        fastest = np.minimum(fastest, turn[:, 1])
        if abs(fastest[0] / fastest[1] - 1) < 0.05:
            break
    assert 0.9 < fastest[0] / fastest[1] < 1.1
