"""Tables as programs and people write them: separators, marks, units, and what is missing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidMeasurementsError
from foxnas_mlflow.core.measurements import Measurement, read_measurements, write_measurements
from foxnas_mlflow.core.predictors import fit_predictors, reference_latency
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target


@pytest.fixture
def rows() -> list[Measurement]:
    return [
        Measurement(a, 70 + i / 8, 12.5 + i, "measured", "board", "litert", 50, {"energy_mj": 3.25 + i})
        for i, a in enumerate(CPU_SPACE.sample(np.random.default_rng(0), n=4))
    ]


def with_semicolons(path: Path, decimal: str) -> None:
    import pandas as pd

    pd.read_csv(path).to_csv(path, sep=";", decimal=decimal, index=False)


@pytest.mark.parametrize("decimal", [",", "."])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_semicolons_decimal_commas_and_marks_are_read(
    tmp_path: Path, rows: list[Measurement], decimal: str, mark: str
) -> None:
    path = tmp_path / "table.csv"
    write_measurements(rows, path)
    with_semicolons(path, decimal)
    path.write_bytes((mark + path.read_text(encoding="utf-8")).replace("\n", "\r\n").encode())
    assert read_measurements(path) == rows


def test_a_mark_and_the_line_ends_of_windows_change_nothing(tmp_path: Path, rows: list[Measurement]) -> None:
    path = tmp_path / "table.csv"
    write_measurements(rows, path)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_measurements(path) == rows


@pytest.mark.parametrize("column", ["n_runs", "image_size"])
def test_an_infinite_number_is_told_with_its_line(tmp_path: Path, rows: list[Measurement], column: str) -> None:
    import pandas as pd

    path = tmp_path / "table.csv"
    write_measurements(rows, path)
    table = pd.read_csv(path).astype({column: float})
    table.loc[1, column] = np.inf
    table.to_csv(path, index=False)
    with pytest.raises(
        InvalidMeasurementsError, match=r"line 3 of table\.csv is not a measurement; received .*infinity"
    ):
        read_measurements(path)


def test_seconds_are_read_by_name_and_shares_are_refused(tmp_path: Path, rows: list[Measurement]) -> None:
    import pandas as pd

    path = tmp_path / "table.csv"
    write_measurements(rows, path)
    table = pd.read_csv(path)
    table.assign(latency_s=table["latency_ms"] / 1000).drop(columns="latency_ms").to_csv(path, index=False)
    assert [row.latency_ms for row in read_measurements(path)] == pytest.approx([row.latency_ms for row in rows])
    table.assign(accuracy=table["accuracy"] / 100).to_csv(path, index=False)
    with pytest.raises(InvalidMeasurementsError, match=r"'accuracy' of table.csv must be in percent.*them by 100"):
        read_measurements(path)


def test_seconds_under_the_name_of_milliseconds_are_found_out() -> None:
    from foxnas_mlflow.workflows.fit import _check_latencies

    target, networks = get_target("rpi4"), CPU_SPACE.sample(np.random.default_rng(1), n=12)
    real = reference_latency(target, CPU_SPACE).predict_table(networks)["latency_ms"]
    for factor, wrong in ((1, False), (3, False), (0.01, False), (1e-3, True), (4e-4, True)):
        rows = [Measurement(a, 70.0, float(ms) * factor, "measured") for a, ms in zip(networks, real, strict=True)]
        if wrong:
            with pytest.raises(InvalidMeasurementsError, match="look like seconds; call the column latency_s"):
                _check_latencies(rows, target, CPU_SPACE)
        else:
            _check_latencies(rows, target, CPU_SPACE)


def test_latencies_without_accuracies_give_latency_predictors_alone() -> None:
    target, networks = get_target("rpi4"), CPU_SPACE.sample(np.random.default_rng(1), n=40)
    real = reference_latency(target, CPU_SPACE).predict_table(networks)["latency_ms"]
    fit = fit_predictors(
        [Measurement(a, None, float(ms), "measured") for a, ms in zip(networks, real, strict=True)],
        CPU_SPACE,
        target="rpi4",
    )
    assert list(fit.reports) == ["latency_ms"]
    assert fit.predictors.accuracy == ()
    assert fit.predictors.latency
