"""Predictors against published figures, NumPy and closed forms."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import (
    FitError,
    InvalidFormatError,
    InvalidInputError,
    InvalidMeasurementsError,
    OutOfDomainError,
    RankDeficientError,
    TooFewSamplesError,
)
from foxnas_mlflow.core.measurements import (
    Measurement,
    append_measurement,
    read_measurements,
    write_measurements,
)
from foxnas_mlflow.core.predictors import (
    FitResult,
    authors_predictor,
    build_reference,
    fit_predictors,
    get_formula,
    load_predictors,
    reference_predictors,
)
from foxnas_mlflow.core.space import CPU_SPACE


@pytest.fixture(scope="module")
def rows(shared_data: Path) -> list[Measurement]:
    return read_measurements(shared_data / "foxnas_rpi4_cpu256.csv")


@pytest.fixture(scope="module")
def fit(rows: list[Measurement]) -> FitResult:
    return fit_predictors(rows, CPU_SPACE, target="rpi4", ceiling=78.0)


def _synthetic(n: int, seed: int = 0) -> list[Measurement]:
    """Rows of the reference predictors with noise, for refusals that need no published table."""
    rng = np.random.default_rng(seed)
    architectures = CPU_SPACE.sample(rng, n=n, image_size=256)
    table = reference_predictors("rpi4").predict_table(architectures)
    return [
        Measurement(
            a, accuracy=acc + rng.normal(0, 0.1), latency_ms=ms * (1 + rng.normal(0, 0.004)), latency_source="measured"
        )
        for a, acc, ms in zip(architectures, table["accuracy"], table["latency_ms"], strict=True)
    ]


def test_the_authors_table_is_parsed_to_its_own_derived_columns(shared_data: Path, rows: list[Measurement]) -> None:
    import pandas as pd

    frame = pd.read_csv(shared_data / "foxnas_rpi4_cpu256.csv")
    for j, width in enumerate((24, 40, 80, 112, 160)):
        rest = [m.architecture.stages[j].blocks[1:] for m in rows]
        np.testing.assert_allclose([np.mean([b.expansion for b in r]) for r in rest], frame[f"avg_e_{width}"])
        np.testing.assert_allclose([np.mean([b.kernel for b in r]) for r in rest], frame[f"avg_k_{width}"])


def test_equation_2_reproduces_the_published_fit(fit: FitResult) -> None:
    assert round(fit.paper["accuracy"].metrics["r2_adjusted"], 4) == 0.9391
    assert round(fit.paper["latency_ms"].metrics["r2_adjusted"], 4) == 0.9888


def test_calibrated_formulas_reach_their_figures(fit: FitResult) -> None:
    accuracy, latency = fit.reports["accuracy"].metrics, fit.reports["latency_ms"].metrics
    assert accuracy["cv_rmse"] <= 0.17
    assert latency["cv_mape"] <= 0.40
    for metrics in (accuracy, latency):
        assert 0.93 <= metrics["cv_coverage"] <= 0.97


def test_coefficients_are_least_squares(fit: FitResult, rows: list[Measurement]) -> None:
    y = np.array([m.latency_ms for m in rows])
    x = get_formula("calibrated", "latency_ms").design(CPU_SPACE, [m.architecture for m in rows])
    beta = np.linalg.lstsq(x / y[:, None], np.ones(len(y)), rcond=None)[0]
    predictor = fit.predictors.latency[0]
    np.testing.assert_allclose(predictor.coefficients, beta, rtol=1e-6)
    # Closed form of the prediction interval for relative errors.
    s2 = np.sum((1 - x @ beta / y) ** 2) / (len(y) - x.shape[1])
    covariance = s2 * np.linalg.inv((x / y[:, None]).T @ (x / y[:, None]))
    mean = x @ beta
    sd = np.sqrt(np.einsum("ij,jk,ik->i", x, covariance, x) + s2 * mean**2)
    from scipy.stats import t

    got = predictor.interval([m.architecture for m in rows], confidence=0.9)
    np.testing.assert_allclose(got.upper, mean + t.ppf(0.95, len(y) - x.shape[1]) * sd, rtol=1e-6)
    np.testing.assert_allclose(got.upper - mean, mean - got.lower, rtol=1e-6)


def test_the_packaged_reference_is_what_its_command_builds(shared_data: Path) -> None:
    built = build_reference(
        shared_data / "foxnas_rpi4_cpu256.csv", shared_data / "foxnas_rpi4_cpu192_coefficients.json"
    )
    shipped = reference_predictors("rpi4")
    assert shipped.image_sizes == built.image_sizes == (192, 256)
    for a, b in zip((*shipped.accuracy, *shipped.latency), (*built.accuracy, *built.latency), strict=True):
        np.testing.assert_allclose(a.coefficients, b.coefficients, rtol=1e-7)
        assert a.provenance["sha256"] == b.provenance["sha256"]


def test_json_round_trip_predicts_the_same_without_statsmodels(tmp_path: Path) -> None:
    predictors = reference_predictors("rpi4")
    path = tmp_path / "p.json"
    predictors.save(path)
    architecture = CPU_SPACE.largest(256)
    code = (
        "import sys, json; sys.modules['statsmodels'] = None\n"
        "from foxnas_mlflow.core.predictors import load_predictors\n"
        "from foxnas_mlflow.core.architecture import Architecture\n"
        "print(json.dumps(load_predictors(sys.argv[1]).predict_table([Architecture.from_json(sys.argv[2])])))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, str(path), architecture.to_json()], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout) == predictors.predict_table([architecture])


def test_published_coefficients_have_no_intervals(shared_data: Path) -> None:
    data = json.loads((shared_data / "foxnas_rpi4_cpu192_coefficients.json").read_text())
    predictor = authors_predictor(data, "latency_ms")
    with pytest.raises(OutOfDomainError, match="no intervals"):
        predictor.interval([CPU_SPACE.largest(192)])
    with pytest.raises(OutOfDomainError, match="192"):
        predictor.predict([CPU_SPACE.largest(256)])


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    data = reference_predictors("rpi4").to_dict()
    for change, message in (
        ({"format": 2}, "format 1"),
        ({"surprise": 1}, "surprise"),
        ({"accuracy": [{**data["accuracy"][0], "coefficients": [1.0]}]}, "columns"),
        ({"accuracy": [{**data["accuracy"][0], "coefficients": ["a"]}]}, "numbers"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(InvalidFormatError, match=message):
            load_predictors(path)


def test_too_few_rows_says_how_many_are_needed() -> None:
    with pytest.raises(TooFewSamplesError, match=r"at least 29 rows .* received 20 rows"):
        fit_predictors(_synthetic(20), CPU_SPACE)


def test_rank_deficiency_names_the_columns() -> None:
    rows = [m for m in _synthetic(900) if m.architecture.stages[0].depth == 2]
    with pytest.raises(RankDeficientError, match="D_24"):
        fit_predictors(rows, CPU_SPACE)


def test_constant_targets_missing_targets_and_disagreement_are_refused() -> None:
    rows = _synthetic(60)
    with pytest.raises(FitError, match="must vary"):
        fit_predictors([dataclasses.replace(m, accuracy=70.0) for m in rows], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="rows with accuracy"):
        fit_predictors([dataclasses.replace(m, accuracy=None) for m in rows], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="agree"):
        fit_predictors([*rows, dataclasses.replace(rows[0], accuracy=10.0)], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="positive"):
        dataclasses.replace(rows[0], latency_ms=float("nan"))
    with pytest.raises(InvalidInputError, match="formula"):
        fit_predictors(rows, CPU_SPACE, formula="magic")


def test_measurements_round_trip_and_survive_a_kill(tmp_path: Path) -> None:
    rows = _synthetic(5)
    path = tmp_path / "m.csv"
    write_measurements(rows, path)
    assert read_measurements(path) == rows
    append_measurement(rows[0], path)
    assert read_measurements(path) == [*rows, rows[0]]
    path.write_text(path.read_text().replace(",256,", ",255,", 1))
    with pytest.raises(InvalidMeasurementsError, match="line 2"):
        read_measurements(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InvalidMeasurementsError, match="columns"):
        read_measurements(path)
