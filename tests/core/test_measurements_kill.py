"""A killed process loses no measurement that it had finished."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from foxnas_mlflow.core.errors import InvalidMeasurementsError
from foxnas_mlflow.core.measurements import Measurement, append_measurement, read_measurements
from foxnas_mlflow.core.space import CPU_SPACE

WRITER = """
import sys
import numpy as np
from foxnas_mlflow.core.measurements import Measurement, append_measurement
from foxnas_mlflow.core.space import CPU_SPACE

for i, architecture in enumerate(CPU_SPACE.sample(np.random.default_rng(0), n=5_000, image_size=256), start=1):
    append_measurement(Measurement(architecture, latency_ms=float(i), latency_source="measured"), sys.argv[1])
    print(i, flush=True)
"""


def test_rows_acknowledged_before_sigkill_are_there(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        acknowledged = 0
        while acknowledged < 20:
            acknowledged = int(process.stdout.readline())
        process.kill()
        acknowledged = max([acknowledged, *map(int, process.stdout.read().split())])
    rows = read_measurements(path)
    assert acknowledged <= len(rows) <= acknowledged + 1
    assert [row.latency_ms for row in rows] == [float(i) for i in range(1, len(rows) + 1)]
    more = Measurement(CPU_SPACE.largest(256), latency_ms=1.5, latency_source="measured")
    append_measurement(more, path)
    assert read_measurements(path) == [*rows, more]


def test_a_row_torn_by_a_power_cut_harms_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    row = Measurement(CPU_SPACE.largest(256), latency_ms=1.5, latency_source="measured")
    append_measurement(row, path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1][:40])
    with pytest.raises(InvalidMeasurementsError):
        read_measurements(path)
    append_measurement(row, path)
    assert read_measurements(path) == [row, row]


def test_a_torn_row_of_a_table_with_further_quantities_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "m.csv"
    row = Measurement(CPU_SPACE.largest(256), latency_ms=1.5, latency_source="measured", quantities={"energy_mj": 3.5})
    append_measurement(row, path)
    whole = path.read_bytes()
    path.write_bytes(whole + whole.splitlines()[1].removesuffix(b",3.5"))
    append_measurement(row, path)
    assert read_measurements(path) == [row, row]
    # Without its newline the row is kept.
    path.write_bytes(whole[:-1])
    append_measurement(row, path)
    assert read_measurements(path) == [row, row]


@pytest.mark.parametrize("tail_bytes", [3, 4096])
def test_a_torn_row_is_dropped_however_long_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tail_bytes: int
) -> None:
    monkeypatch.setattr("foxnas_mlflow.core.measurements._TAIL_BYTES", tail_bytes)
    path = tmp_path / "m.csv"
    row = Measurement(CPU_SPACE.largest(256), latency_ms=1.5, latency_source="measured")
    append_measurement(row, path)
    whole = path.read_bytes()
    # Without its newline the row is kept.
    path.write_bytes(whole[:-1])
    append_measurement(row, path)
    assert read_measurements(path) == [row, row]
    # A torn first line is all that there is.
    path.write_bytes(whole[:20])
    append_measurement(row, path)
    assert read_measurements(path) == [row]
    path.write_bytes(whole + whole.splitlines()[1][:-9])
    append_measurement(row, path)
    assert read_measurements(path) == [row, row]
