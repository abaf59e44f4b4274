"""Energy of an inference, on made-up /sys trees and a stand-in meter."""

from __future__ import annotations

import dataclasses
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.devices import (
    LocalConnection,
    board,
    connect,
    measure,
    subnet_timing,
    what_helps,
    with_energy,
)
from foxnas_mlflow.testing import FakeBoard
from foxnas_mlflow.workflows._timers import time_subnet


def tree(root: Path, files: dict[str, str]) -> str:
    for path, text in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text + "\n")
    return str(root)


def test_rapl_counts_packages_and_wraps(tmp_path: Path) -> None:
    root = tree(
        tmp_path,
        {
            "class/powercap/intel-rapl:0/name": "package-0",
            "class/powercap/intel-rapl:0/energy_uj": "900000",
            "class/powercap/intel-rapl:0/max_energy_range_uj": "1000000",
            "class/powercap/intel-rapl:1/name": "package-1-die-0",
            "class/powercap/intel-rapl:1/energy_uj": "0",
            "class/powercap/intel-rapl:1/max_energy_range_uj": "1000000",
            # Cores are a part of their package.
            "class/powercap/intel-rapl:0:0/name": "core",
            "class/powercap/intel-rapl:0:0/energy_uj": "5",
            # The packages are a part of a laptop's platform.
            "class/powercap/intel-rapl:2/name": "psys",
            "class/powercap/intel-rapl:2/energy_uj": "7000000",
        },
    )
    meter = board.find_meter("auto", root)
    assert meter.name.startswith("RAPL")
    assert meter._joules() == 0
    (tmp_path / "class/powercap/intel-rapl:0/energy_uj").write_text("100000")
    (tmp_path / "class/powercap/intel-rapl:1/energy_uj").write_text("50000")
    (tmp_path / "class/powercap/intel-rapl:2/energy_uj").write_text("9000000")
    assert meter._joules() == pytest.approx(0.25)
    (tmp_path / "class/powercap/intel-rapl:1/energy_uj").write_text("")
    with pytest.raises(board.BoardError, match="intel-rapl:1 stopped"):
        meter._joules()


@pytest.mark.parametrize(
    ("files", "name", "watts"),
    [
        ({"hwmon0/name": "ina219", "hwmon0/power1_input": "2500000"}, "sensor ina219 power1", 2.5),
        (
            {
                "hwmon0/name": "ina3221",
                "hwmon0/in1_label": "VDD_IN", "hwmon0/in1_input": "5000", "hwmon0/curr1_input": "800",
                "hwmon0/in2_label": "VDD_CPU", "hwmon0/in2_input": "5000", "hwmon0/curr2_input": "300",
            },
            "sensor VDD_IN",
            4.0,
        ),
        (
            {
                "hwmon0/name": "ina3221",
                "hwmon0/in1_label": "CPU", "hwmon0/in1_input": "5000", "hwmon0/curr1_input": "200",
                "hwmon0/in2_label": "GPU", "hwmon0/in2_input": "5000", "hwmon0/curr2_input": "400",
                # Switched off, then the sum of the currents and the first channel's shunt in microvolts.
                "hwmon0/in3_label": "IO", "hwmon0/in3_input": "5000", "hwmon0/curr3_input": "",
                "hwmon0/in4_input": "1000", "hwmon0/curr4_input": "600",
            },
            "sensor CPU + GPU",
            3.0,
        ),
        (
            {
                "hwmon0/name": "ina219", "hwmon0/power1_input": "2500000",
                "hwmon1/name": "ina219", "hwmon1/power1_input": "500000",
            },
            "sensor ina219 power1 + ina219 power1 (hwmon1)",
            3.0,
        ),
        (
            {
                "hwmon0/name": "ina219", "hwmon0/power1_input": "2500000",
                "hwmon1/name": "ina3221", "hwmon1/in1_label": "GPU", "hwmon1/in1_input": "5000",
                "hwmon1/curr1_input": "200",
            },
            "sensor ina219 power1 + GPU",
            3.5,
        ),
    ],
)  # fmt: skip
def test_sensors_of_hwmon(files: dict[str, str], name: str, watts: float, tmp_path: Path) -> None:
    meter = board.find_meter("auto", tree(tmp_path, {f"class/hwmon/{key}": text for key, text in files.items()}))
    assert meter.name == name
    assert meter.power(0.1)[0] == pytest.approx(watts)


def test_rails_of_an_old_jetson(tmp_path: Path) -> None:
    place = "bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    files = {"in_power0_input": "3300", "rail_name_0": "POM_5V_IN", "in_power1_input": "900", "rail_name_1": "POM_CPU"}
    meter = board.find_meter("auto", tree(tmp_path, {f"{place}/{key}": text for key, text in files.items()}))
    assert meter.name == "sensor POM_5V_IN"
    assert meter.power(0.1)[0] == pytest.approx(3.3)


def test_idling_is_subtracted_and_the_error_covers_the_truth(monkeypatch: pytest.MonkeyPatch) -> None:
    """A board that draws 3 W, and 2 W more while it works: runs of 5 ms cost 10 mJ. It draws more as it gets warmer."""
    monkeypatch.setattr(board, "ENERGY_SECONDS", 1.0)
    state = SimpleNamespace(now=0.0, busy=0.0)

    def pass_time(seconds: float) -> None:
        state.now += seconds

    def work() -> None:
        pass_time(0.005)
        state.busy += 0.005

    # A busy machine's clock would say that the board drew less.
    clock = SimpleNamespace(perf_counter=lambda: state.now, process_time=lambda: state.busy, sleep=pass_time)
    monkeypatch.setattr(board, "time", clock)
    meter = board.Meter("stand-in", joules=lambda: 3.0 * state.now + 0.05 * state.now**2 + 2.0 * state.busy)
    result, (share, _, seconds) = board.measure_energy(work, meter, meter.segments(0.5))
    assert result["idle_w"] == pytest.approx(3.0, abs=0.15)
    assert result["energy_mj"] == pytest.approx(10.0, abs=result["energy_error_mj"])
    assert 0 < result["energy_error_mj"] < 0.5
    assert share == pytest.approx(1.0)
    assert seconds == 1.0


def test_what_a_slow_meter_says_after_the_work_is_no_power_of_it() -> None:
    """Of its second reading most is of idling: neither it nor the wait for it is of the work."""
    second, answered = threading.Event(), [0.0]

    def watts() -> float:
        if not answered[0]:
            answered[0] = time.perf_counter()
            return 5.0
        second.set()
        time.sleep(0.5)
        answered[0] = time.perf_counter()
        return 1.0

    runs = []

    def work() -> None:
        second.wait()
        runs.append(time.perf_counter())

    begin = time.perf_counter()
    power, seconds_a_run, _ = board.Meter("slow", watts=watts).power(0.0, work)
    assert power == 5.0
    assert begin + seconds_a_run * len(runs) < answered[0]


@pytest.mark.parametrize("energy", [" ", "'unclosed"])
def test_what_is_no_command_is_no_meter(energy: str) -> None:
    with pytest.raises(board.BoardError) as caught:
        board.find_meter(energy)
    assert caught.value.kind == "no_meter"


def test_a_command_that_reads_power_rests(tmp_path: Path) -> None:
    """So long that the work that it measures has the processor."""
    calls = tmp_path / "calls"
    command = script(tmp_path / "m", f"echo >> {calls}; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo 4.25")
    meter = board.find_meter(command)
    before = os.times()
    watts, *_ = meter.power(1.0)
    after = os.times()
    assert watts == 4.25
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    n_readings = len(calls.read_text()) - 1
    # The last one may have ended just before the end, and one more is waited for.
    assert (n_readings - 2) * spent / n_readings * board.METER_REST <= 1.0


@pytest.mark.parametrize("printed", ["nan", "inf", ""])
def test_what_is_no_number_of_watts_is_no_power(printed: str, tmp_path: Path) -> None:
    """Neither at the start nor when the meter breaks later."""
    with pytest.raises(board.BoardError, match="meter: "):
        board.find_meter(script(tmp_path / "meter", f"echo {printed}"))
    said = tmp_path / "said"
    said.write_text("3.5\n")
    broken = board.find_meter(script(tmp_path / "meter", f"cat {said}; echo {printed} > {said}"))
    with pytest.raises(board.BoardError, match="meter stopped"):
        broken.power(0.5)


def test_energy_that_company_disturbed_is_told(tmp_path: Path, probe: bytes) -> None:
    """What the meter's own command takes of the only processor is time that the model does not have."""
    command = script(tmp_path / "meter", "i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done; echo 4.25")
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(allowed)})
    try:
        with Hasty() as connection:
            benchmark = measure(connection, probe, runs=3, warmup=1, max_seconds=0.05, attempts=1, energy=command)
    finally:
        os.sched_setaffinity(0, allowed)
    assert any("other processes had the processor" in reason for reason in benchmark.invalid_reasons)


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: str(d / "none"), "a meter that it can read; received .*No such file"),
        (lambda d: script(d / "words", "echo on fire"), "a meter that it can read"),
    ],
    ids=["none", "words"],
)
def test_a_meter_that_fails_is_one_line(
    make: Callable[[Path], str], message: str, tmp_path: Path, probe: bytes
) -> None:
    with connect("local") as connection, pytest.raises(DeviceError, match=message) as caught:
        measure(connection, probe, runs=3, warmup=1, max_seconds=0.05, attempts=1, energy=make(tmp_path))
    assert "\n" not in str(caught.value)


class Hasty(LocalConnection):
    """This machine with a board script that measures energy for half a second."""

    def workspace(self, files: Mapping[str, bytes]) -> str:
        long, short = b"\nENERGY_SECONDS = 10.0\n", b"\nENERGY_SECONDS = 0.25\n"
        assert all(long in data for name, data in files.items() if name == "board.py")
        return super().workspace({name: data.replace(long, short) for name, data in files.items()})


@pytest.mark.parametrize(("calls", "under_load"), [(2, False), (13, True)], ids=["at once", "later"])
def test_a_meter_that_stops_takes_nothing_else_along(
    calls: int, under_load: bool, tmp_path: Path, probe: bytes
) -> None:
    """Neither the steady runs nor, where it worked before them, the minutes under load."""
    counting = f"echo >> {tmp_path}/calls; test $(wc -l < {tmp_path}/calls) -lt {calls} && echo 3"
    command = script(tmp_path / "meter", counting)
    quick: dict[str, Any] = {"runs": 3, "warmup": 1, "max_seconds": 0.05, "attempts": 1}
    with Hasty() as connection:
        benchmark = measure(connection, probe, sustained_seconds=0.2, energy=command, **quick)
    assert benchmark.n_runs >= 3
    assert (benchmark.sustained_p90_ms is not None) == under_load
    assert benchmark.energy_mj is None
    assert not benchmark.valid
    (lost,) = (reason for reason in benchmark.invalid_reasons if "not all was measured" in reason)
    assert re.search(r"no energy, .*meter stopped" if under_load else r"no load and no energy, .*a meter", lost)
    assert what_helps([lost]) == "look after the meter and the connection"
    # The latency is what it is.
    assert subnet_timing([dataclasses.replace(benchmark, invalid_reasons=(lost,))]).problems == ()


def test_a_users_command_measures(tmp_path: Path, probe: bytes) -> None:
    command = script(tmp_path / "meter", "echo 4.25")
    with Hasty() as connection:
        benchmark = measure(connection, probe, runs=3, warmup=1, max_seconds=0.05, attempts=1, energy=command)
    assert benchmark.power_meter == command
    assert benchmark.idle_w == benchmark.load_w == pytest.approx(4.25)
    assert benchmark.energy_mj == pytest.approx(0.0, abs=1e-9)
    assert {"benchmark/energy_mj", "benchmark/energy_error_mj"} <= set(benchmark.metrics())


def test_no_sensor_is_said(tmp_path: Path) -> None:
    with pytest.raises(board.BoardError, match="no RAPL, no INA2xx"):
        board.find_meter("auto", str(tmp_path))


def test_a_subnets_energy_comes_with_its_latency(probe: bytes) -> None:
    drawn = iter([6.5, -0.25, 6.5])
    with FakeBoard(lambda model: 5.0, energy_mj=lambda model: next(drawn)) as fake:
        measured = time_subnet(lambda model, **options: measure(fake, model, **options), probe, energy="auto")
        row = Measurement.of(CPU_SPACE.smallest(192), measured)
        assert row.latency_ms == pytest.approx(5.0, rel=0.01)
        assert row.quantities == {"energy_mj": 6.5}
        # A board that seems to draw less under load than idling was disturbed: nothing of it counts.
        noise = time_subnet(lambda model, **options: measure(fake, model, **options), probe, energy="auto")
        assert noise.problems == ("made up says -0.25 mJ an inference",)
        assert Measurement.of(CPU_SPACE.smallest(192), noise).quantities == {}
        # An energy while the board was throttled is that of another board than the others' rows.
        hot = dataclasses.replace(measure(fake, probe, energy="auto"), throttled_under_load=True)
        assert with_energy(measured, hot).problems == ("the machine was throttled under load",)
        assert time_subnet(lambda model, **options: measure(fake, model, **options), probe).quantities == {}
