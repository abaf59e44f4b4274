"""Predictors against published figures, NumPy and closed forms."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import nnls
from scipy.stats import t

from foxnas_mlflow.core.architecture import Architecture
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
    cross_validate,
    fit_family,
    fit_predictors,
    get_formula,
    load_predictors,
    reference_predictors,
    refit_predictors,
    widest_formula,
)
from foxnas_mlflow.core.random import Stream, stream
from foxnas_mlflow.core.searchers import accuracy_signal, search
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, BlockType, SearchSpace, StageSpec


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
    # The authors' runtime had fast kernels of 7x7: their own price is none.
    wide = predictor.columns.index("dw_wide")
    assert predictor.coefficients[wide] == 0
    np.testing.assert_allclose(np.delete(predictor.coefficients, wide), beta, rtol=1e-6)
    # Closed form of the prediction interval for relative errors.
    s2 = np.sum((1 - x @ beta / y) ** 2) / (len(y) - x.shape[1])
    covariance = s2 * np.linalg.inv((x / y[:, None]).T @ (x / y[:, None]))
    mean = x @ beta
    sd = np.sqrt(np.einsum("ij,jk,ik->i", x, covariance, x) + s2 * mean**2)
    from scipy.stats import t

    got = predictor.interval([m.architecture for m in rows], confidence=0.9)
    np.testing.assert_allclose(got.upper, mean + t.ppf(0.95, len(y) - x.shape[1]) * sd, rtol=1e-6)
    np.testing.assert_allclose(got.upper - mean, mean - got.lower, rtol=1e-6)


def test_variance_inflation_is_that_of_a_regression_on_the_other_columns(
    fit: FitResult, rows: list[Measurement]
) -> None:
    from statsmodels.stats.outliers_influence import variance_inflation_factor

    report = fit.paper["latency_ms"]
    x = get_formula("paper", "latency_ms").design(CPU_SPACE, [m.architecture for m in rows])
    expected = [variance_inflation_factor(x, i) for i in range(x.shape[1] - 1)]
    np.testing.assert_allclose([row["vif"] for row in report.table[:-1]], expected, rtol=1e-6)


def test_a_space_that_varies_nothing_is_described_by_its_constant() -> None:
    space = CPU_SPACE.replace(expansions=(4,), kernels=(5,), depths=(2,))
    for name in ("calibrated", "compact", "capacity"):
        formula = get_formula(name, "accuracy")
        design = formula.design(space, [space.smallest(256)])
        assert set(formula.columns(space)) <= {"log_size", "log_size_squared", "const"}
        assert design.shape == (1, len(formula.columns(space)))


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
        ({"format": 3}, "format 2 or 1"),
        ({"surprise": 1}, "surprise"),
        ({"accuracy": [{**data["accuracy"][0], "coefficients": [1.0]}]}, "columns"),
        ({"accuracy": [{**data["accuracy"][0], "coefficients": ["a"]}]}, "numbers"),
    ):
        path.write_text(json.dumps({**data, **change}))
        with pytest.raises(InvalidFormatError, match=message):
            load_predictors(path)


def test_predictors_of_format_1_are_read(tmp_path: Path) -> None:
    old = json.loads((Path(__file__).parent / "old" / "predictors-1.json").read_text())
    path = tmp_path / "p.json"
    for notes, origin in ((old["notes"], "packaged"), ([], "fitted")):
        path.write_text(json.dumps(old | {"notes": notes}))
        (read,) = load_predictors(path).latency
        assert (read.origin, list(read.notes)) == (origin, notes)
        assert read.coefficients.tolist() == old["latency"][0]["coefficients"]
    # Notes stood for all predictors together; those of accuracy began with its name.
    new = reference_predictors("rpi4").to_dict()
    written = {
        key: [
            {k: v for k, v in p.items() if k not in ("origin", "notes", "own_space_only", "held_out")} | {"unit": "x"}
            for p in new[key]
        ]
        for key in ("accuracy", "latency")
    }
    said = ["Latency is slow.", "Accuracy is high."]
    path.write_text(json.dumps({k: new[k] for k in ("target", "space")} | written | {"format": 1, "notes": said}))
    read_set = load_predictors(path)
    assert [p.notes for p in read_set.latency] == [(said[0],)]
    assert {p.notes for p in read_set.accuracy} == {(said[1],)}


def test_further_quantities_are_kept_and_predicted(tmp_path: Path) -> None:
    known = reference_predictors("rpi4")
    energy = dataclasses.replace(known.latency[0], quantity="energy_mj", coefficients=known.latency[0].coefficients * 2)
    predictors = dataclasses.replace(known, quantities={"energy_mj": (energy,)})
    predictors.save(tmp_path / "p.json")
    read = load_predictors(tmp_path / "p.json")
    network = CPU_SPACE.largest(256)
    table = read.predict_table([network])
    assert table["energy_mj"][0] == pytest.approx(2 * table["latency_ms"][0])
    assert list(read.groups) == ["accuracy", "latency_ms", "energy_mj"]
    assert read.bound("energy_mj", network, 0.95) > read.bound("energy_mj", network, 0.5)
    with pytest.raises(OutOfDomainError, match="know ram_bytes"):
        read.of("ram_bytes", 256)


def test_bounds_hold_what_held_out_errors_ask_for() -> None:
    (latency,) = reference_predictors("rpi4").latency
    errors = tuple(np.linspace(-3.0, 4.0, 39))
    held = dataclasses.replace(latency, held_out=errors)
    # 38 of 39 errors, or Student's quantile where it is more.
    assert held.t_quantile(0.95) == pytest.approx(errors[37])
    assert held.t_quantile(0.5) == 0.0
    assert held.stated_confidence == pytest.approx(39 / 40)
    calm = dataclasses.replace(latency, held_out=(0.0,) * 39)
    assert calm.t_quantile(0.95) == latency.t_quantile(0.95)
    x = latency.design([CPU_SPACE.largest(192)])
    sd = np.sqrt(np.einsum("ij,jk,ik->i", x, latency.spread(192), x))
    upper = x @ latency.coefficients + latency.t_quantile(0.9) * sd
    np.testing.assert_allclose(latency.upper_bound([CPU_SPACE.largest(192)], 0.9), upper)


def test_too_few_rows_says_how_many_are_needed() -> None:
    # Four columns of the smallest formula, the size left out, and 5 rows more.
    with pytest.raises(TooFewSamplesError, match=r"at least 9 rows .* received 8 rows"):
        fit_predictors(_synthetic(8), CPU_SPACE)


def test_rank_deficiency_names_the_columns() -> None:
    rows = [m for m in _synthetic(900) if m.architecture.stages[0].depth == 2]
    with pytest.raises(RankDeficientError, match="D_24"):
        fit_predictors(rows, CPU_SPACE)


def test_constant_targets_missing_targets_and_disagreement_are_refused() -> None:
    rows = _synthetic(60)
    with pytest.raises(FitError, match="must vary"):
        fit_predictors([dataclasses.replace(m, latency_ms=70.0) for m in rows], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="rows with accuracy"):
        fit_predictors([dataclasses.replace(m, accuracy=None, latency_ms=None) for m in rows], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="agree"):
        fit_predictors([*rows, dataclasses.replace(rows[0], accuracy=10.0)], CPU_SPACE)
    with pytest.raises(InvalidMeasurementsError, match="positive"):
        dataclasses.replace(rows[0], latency_ms=float("nan"))
    with pytest.raises(InvalidInputError, match="formula"):
        fit_predictors(rows, CPU_SPACE, formula="magic")


@pytest.mark.parametrize("accuracy", [100.0, 98.5])
def test_where_all_networks_are_as_accurate_the_fastest_is_found(accuracy: float) -> None:
    from foxnas_mlflow.core.searchers import Objective, fastest, front_of, search

    rows = [dataclasses.replace(m, accuracy=accuracy) for m in _synthetic(60)]
    predictors = fit_predictors(rows, CPU_SPACE).predictors
    assert f"all 60 networks that were evaluated are right at {accuracy:.4g} %" in predictors.notes[0]
    # A search says so before anything else.
    signal = accuracy_signal(predictors)
    assert signal is not None
    assert signal.absent
    assert str(signal) == predictors.notes[0]
    size = rows[0].architecture.image_size
    objective = Objective(predictors, image_sizes=(size,))
    quickest = fastest(objective)
    front = front_of(objective)
    assert len(front) == 1
    outcome = search(predictors, latency_ms=3 * quickest.latency_upper_ms, image_sizes=(size,), evaluations=2_000)
    assert outcome.accuracy == pytest.approx(accuracy)
    assert outcome.architecture == front.architecture(0)


def test_the_ceiling_of_rows_that_were_all_alike_is_no_ceiling() -> None:
    rows = _synthetic(60)
    known = fit_predictors([dataclasses.replace(m, accuracy=90.0) for m in rows], CPU_SPACE).predictors
    best = max(m.accuracy or 0.0 for m in rows)
    assert best < (known.accuracy[0].ceiling or 0.0)
    (again,) = refit_predictors(known, rows, latency=True).accuracy
    (expected,) = fit_predictors(rows, CPU_SPACE).predictors.accuracy
    assert again.ceiling == expected.ceiling


def test_an_accuracy_of_nothing_has_no_relative_error() -> None:
    rows = _synthetic(60)
    rows[0] = dataclasses.replace(rows[0], accuracy=0.0)
    (accuracy,) = fit_predictors(rows, CPU_SPACE).predictors.accuracy
    assert np.isfinite(accuracy.metrics["cv_mape"])


def _with_quantities(rows: Sequence[Measurement]) -> list[Measurement]:
    """Energy that adds up over layers, and a memory that follows equation 2 and adds up over none."""
    latency = np.array([row.latency_ms for row in rows])
    x = get_formula("paper", "ram_bytes").design(CPU_SPACE, [row.architecture for row in rows])
    ram = 1e6 + x @ np.random.default_rng(5).uniform(-2e3, 1e4, x.shape[1])
    return [
        dataclasses.replace(row, quantities={"energy_mj": float(3 * ms), "ram_bytes@pi": float(bytes_)})
        for row, ms, bytes_ in zip(rows, latency, ram, strict=True)
    ]


def test_any_measured_column_has_predictors_of_its_own(tmp_path: Path) -> None:
    rows = _with_quantities(_synthetic(80))
    write_measurements(rows, tmp_path / "m.csv")
    assert read_measurements(tmp_path / "m.csv") == rows
    fit = fit_predictors(rows, CPU_SPACE)
    assert list(fit.predictors.groups) == ["accuracy", "latency_ms", "energy_mj", "ram_bytes@pi"]
    networks = CPU_SPACE.sample(np.random.default_rng(9), n=20, image_size=256)
    table = fit.predictors.predict_table(networks)
    np.testing.assert_allclose(table["energy_mj"], 3 * np.array(table["latency_ms"]))
    assert fit.reports["energy_mj"].predictor.formula.startswith("calibrated")
    assert fit.reports["ram_bytes@pi"].predictor.formula == "paper"
    known = _with_quantities([Measurement(a, 70.0, 1.0, "measured") for a in networks])
    np.testing.assert_allclose(table["ram_bytes@pi"], [m.quantities["ram_bytes@pi"] for m in known], rtol=1e-6)
    limit = float(np.median(table["energy_mj"]))
    found = search(fit.predictors, 200.0, limits={"energy_mj": limit}, evaluations=2000)
    assert found.amounts["energy_mj"] <= limit


def test_a_latency_alone_is_fitted() -> None:
    rows = [dataclasses.replace(m, accuracy=None) for m in _synthetic(40)]
    fit = fit_predictors(rows, CPU_SPACE)
    assert list(fit.predictors.groups) == ["latency_ms"]
    assert fit.reports["latency_ms"].metrics["cv_mape"] < 1


def test_columns_with_gaps_constants_and_words_are_refused(tmp_path: Path) -> None:
    rows = _with_quantities(_synthetic(40))
    gap = [dataclasses.replace(rows[0], quantities={"energy_mj": 3.0}), *rows[1:]]
    with pytest.raises(InvalidMeasurementsError, match=r"ram_bytes@pi too.*1 of 40 rows without"):
        fit_predictors(gap, CPU_SPACE)
    # What no device measured has neither a latency nor what was measured with it.
    unmeasured = [dataclasses.replace(row, latency_ms=None, latency_source="", quantities={}) for row in rows[:5]]
    fit = fit_predictors([*unmeasured, *rows[5:]], CPU_SPACE)
    assert fit.reports["energy_mj"].metrics["n_samples"] == fit.reports["latency_ms"].metrics["n_samples"] == 35
    assert fit.reports["accuracy"].metrics["n_samples"] == 40
    constant = [dataclasses.replace(row, quantities={"energy_mj": 3.0}) for row in rows]
    with pytest.raises(FitError, match="energy_mj must vary"):
        fit_predictors(constant, CPU_SPACE)
    for name, value, message in (("energy_mj", -1.0, "positive"), ("Energy mJ", 1.0, "named by")):
        with pytest.raises(InvalidMeasurementsError, match=message):
            dataclasses.replace(rows[0], quantities={name: value})
    path = tmp_path / "m.csv"
    write_measurements(gap, path)
    assert read_measurements(path) == gap
    text = path.read_text().splitlines()
    path.write_text("\n".join([f"{text[0]},note", *(f"{line},fine" for line in text[1:])]))
    with pytest.raises(InvalidMeasurementsError, match="a column 'note'"):
        read_measurements(path)
    # What is appended keeps to the columns of the file, and a row that a kill tore is dropped.
    write_measurements(rows[:3], path)
    with path.open("a") as file:
        file.write(text[4][:-1].rsplit(",", 1)[0])
    append_measurement(rows[3], path)
    append_measurement(_synthetic(5)[4], path)
    assert read_measurements(path) == [*rows[:4], _synthetic(5)[4]]
    write_measurements(_synthetic(2), path)
    with pytest.raises(InvalidMeasurementsError, match="energy_mj"):
        append_measurement(rows[0], path)


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


def _sized(n: int, *, sizes: tuple[int, ...], noise: float = 0.1, seed: int = 0) -> list[Measurement]:
    """Rows of several image sizes: the reference's accuracy at 256 px, less at smaller ones."""
    rng = np.random.default_rng(seed)
    predictors = reference_predictors("rpi4")
    rows = []
    for a in CPU_SPACE.sample(rng, n=n, image_size=256):
        size = int(rng.choice(sizes))
        known = predictors.of("accuracy", 256)
        z = known.to_linear(known.predict([a])) + 0.8 * np.log(size / 256)
        sized = dataclasses.replace(a, image_size=size)
        latency = float(predictors.latency[0].predict([sized])[0])
        rows.append(
            Measurement(
                sized,
                accuracy=float(known.from_linear(z)[0]) + rng.normal(0, noise),
                latency_ms=latency * rng.normal(1, 0.004),
                latency_source="measured",
            )
        )
    return rows


def test_rows_of_several_sizes_are_fitted_together() -> None:
    sizes = (160, 192, 224, 256)
    fit = fit_predictors(_sized(60, sizes=sizes), CPU_SPACE)
    (predictor,) = fit.predictors.accuracy
    assert predictor.formula == "calibrated-sizes"
    assert fit.predictors.image_sizes == sizes
    test = _sized(200, sizes=sizes, noise=0.0, seed=1)
    errors = predictor.predict([m.architecture for m in test]) - [m.accuracy for m in test]
    assert np.sqrt(np.mean(errors**2)) < 0.45
    # Two sizes cannot tell a curve over sizes: it is left out, and nothing is refused.
    (two,) = fit_predictors(_sized(60, sizes=(160, 256)), CPU_SPACE).predictors.accuracy
    assert two.coefficients[two.columns.index("log_size_squared")] == 0.0
    assert two.coefficients[two.columns.index("log_size")] > 0.3


def _log_k(a: Architecture) -> float:
    return sum(float(np.log(b.kernel)) for s in a.stages for b in s.blocks)


def _capacity_matters_on_large_images(a: Architecture) -> float:
    return 70 + (2 + 0.1 * _log_k(a)) * float(np.log(a.image_size / 128))


def _kernels_suit_sizes_and_widths(a: Architecture) -> float:
    """Large kernels are good in wide blocks and on large images, as where both ends of a space are trained most."""
    k = np.array([np.mean([np.log(b.kernel) for b in s.blocks]) for s in a.stages])
    e = np.array([np.mean([np.log(b.expansion) for b in s.blocks]) for s in a.stages])
    return 70 + 2 * float((k - 1.5) @ (e - 1.2)) + 2 * float(k.sum() - 7) * float(np.log(a.image_size / 200))


@pytest.mark.parametrize(
    ("formula", "accuracy", "largest_error"),
    # Without prices that change with the size the best formula is 0.4 points off, without means-sizes 0.29.
    [
        ("capacity-sizes", _capacity_matters_on_large_images, 0.12),
        ("means-sizes", _kernels_suit_sizes_and_widths, 0.08),
    ],
)
def test_prices_may_change_with_the_image_size(
    formula: str, accuracy: Callable[[Architecture], float], largest_error: float
) -> None:
    rng = np.random.default_rng(0)
    sizes = (128, 192, 256, 320)
    rows = [
        Measurement(a, accuracy(a) + rng.normal(0, 0.1), 1.0 + i, "measured")
        for i, a in enumerate(a for size in sizes for a in CPU_SPACE.sample(rng, n=12, image_size=size))
    ]
    (report,) = fit_family("calibrated", "accuracy", rows, CPU_SPACE)
    assert report.predictor.formula == formula
    test = [a for size in sizes for a in CPU_SPACE.sample(rng, n=50, image_size=size)]
    errors = report.predictor.predict(test) - [accuracy(a) for a in test]
    assert np.sqrt(np.mean(errors**2)) < largest_error


def test_many_rows_of_each_size_may_have_predictors_of_their_own() -> None:
    fit = fit_predictors(_sized(300, sizes=(192, 256)), CPU_SPACE)
    assert {p.formula for p in fit.predictors.accuracy} <= {"calibrated", "calibrated-sizes"}
    assert fit.predictors.image_sizes == (192, 256)


@pytest.mark.parametrize(("name", "quantity"), [("calibrated", "accuracy"), ("calibrated-wide", "latency_ms")])
def test_cross_validation_is_that_of_plain_least_squares_a_fold(
    rows: list[Measurement], name: str, quantity: str
) -> None:
    """Held against NumPy's solver and SciPy's on all rows of a fold, without the shortcuts for large tables."""
    formula, n, top = get_formula(name, quantity), len(rows), 80.0 if quantity == "accuracy" else None
    x = formula.design(CPU_SPACE, [row.architecture for row in rows])
    x = x[:, x.any(axis=0)]
    y = np.array([row.value(quantity) for row in rows], dtype=np.float64)
    z = y if top is None else -np.log(top - y)
    weight = 1 / y if formula.relative else np.ones(n)
    predicted, inside = np.zeros((2, n)), np.zeros((2, n))
    for repeat in range(2):
        order = stream(3, Stream.FOLDS, repeat).permutation(n)
        for test in (order[fold::5] for fold in range(5)):
            train = np.setdiff1d(order, test)
            xw, zw = x[train] * weight[train, None], z[train] * weight[train]
            used = np.flatnonzero(nnls(xw, zw)[0]) if formula.non_negative else np.arange(x.shape[1])
            beta = np.linalg.lstsq(xw[:, used], zw)[0]
            value = x[np.ix_(test, used)] @ beta
            predicted[repeat, test] = value if top is None else top - np.exp(-value)
            s2 = np.sum((zw - xw[:, used] @ beta) ** 2) / (len(train) - len(used))
            cost = np.einsum(
                "ij,jk,ik->i", x_test := x[np.ix_(test, used)], np.linalg.pinv(xw[:, used].T @ xw[:, used]), x_test
            )
            spread = np.sqrt(s2 * (cost + (np.abs(value) if formula.relative else 1.0) ** 2))
            inside[repeat, test] = np.abs(z[test] - value) <= t.ppf(0.975, len(train) - len(used)) * spread
    found = cross_validate(formula, x, y, ceiling=top, seed=3, folds=5, repeats=2)
    np.testing.assert_allclose(found.predicted, predicted.mean(axis=0), rtol=1e-9)
    assert found.metrics["cv_rmse"] == pytest.approx(float(np.sqrt(np.mean((predicted - y) ** 2))))
    assert found.metrics["cv_coverage"] == pytest.approx(float(inside.mean()))


def test_a_large_table_keeps_every_row_and_the_prices_that_it_was_made_of(tmp_path: Path) -> None:
    space, rng = CPU_SPACE, np.random.default_rng(0)
    formula = get_formula("calibrated", "latency_ms")
    networks = space.sample(rng, n=500, image_size=224)
    prices = np.array([0.02, 0.1, 1.0, 0.5, 1.0, 0.2, 2.0, 0.5])
    ms = np.tile(formula.design(space, networks) @ prices, 8) * rng.normal(1, 0.01, 4_000)
    write_measurements(
        [Measurement(a, None, float(y), "measured") for a, y in zip(networks * 8, ms, strict=True)],
        tmp_path / "measurements.csv",
    )
    rows = read_measurements(tmp_path / "measurements.csv")
    assert [row.latency_ms for row in rows] == ms.tolist()
    told: list[tuple[int, int, str]] = []
    fit = fit_predictors(rows, space, progress=lambda *step: told.append(step))
    report = fit.reports["latency_ms"]
    assert report.metrics["n_samples"] == 4_000
    assert report.predictor.provenance["n_rows"] == 4_000
    np.testing.assert_allclose(report.predictor.predict(networks), ms[:500], rtol=0.05)
    np.testing.assert_allclose(report.predictor.predict(networks), formula.design(space, networks) @ prices, rtol=0.005)
    assert [done for done, *_ in told] == list(range(1, told[0][1] + 1))
    assert {quantity for *_, quantity in told} == {"latency_ms"}


def test_few_rows_are_fitted_by_a_smaller_formula() -> None:
    (predictor,) = fit_predictors(_synthetic(22), CPU_SPACE).predictors.accuracy
    assert predictor.formula in ("compact", "capacity")
    test = _synthetic(200, seed=1)
    errors = predictor.predict([m.architecture for m in test]) - [m.accuracy for m in test]
    assert np.sqrt(np.mean(errors**2)) < 0.7


def test_a_space_without_gates_has_no_price_of_them() -> None:
    rng = np.random.default_rng(0)
    space = TPU_SPACE
    rows = []
    for a in space.sample(rng, n=40, image_size=224):
        x = get_formula("calibrated", "latency_ms").design(space, [a])[0]
        rows.append(
            Measurement(a, float(rng.uniform(70, 75)), float(x.sum()) * rng.normal(1, 0.01), latency_source="measured")
        )
    latency = fit_predictors(rows, space).predictors.latency[0]
    for term in ("se", "se_fc"):
        assert latency.coefficients[latency.columns.index(term)] == 0.0
    np.testing.assert_allclose(latency.predict([m.architecture for m in rows]), [m.latency_ms for m in rows], rtol=0.04)


def test_accuracies_at_their_ceiling_are_fitted() -> None:
    """A small validation set and an easy task: many rows at 100 percent, all in steps of its size."""
    rng = np.random.default_rng(0)
    rows = []
    for a in CPU_SPACE.sample(rng, n=60, image_size=256):
        capacity = sum(b.expansion * b.kernel for s in a.stages for b in s.blocks)
        share = 1 - 0.04 * np.exp(-(capacity - 100) / 150)
        rows.append(Measurement(a, 100 * rng.binomial(360, share) / 360, float(capacity), latency_source="measured"))
    (predictor,) = fit_predictors(rows, CPU_SPACE).predictors.accuracy
    predicted = predictor.predict(CPU_SPACE.sample(rng, n=200, image_size=256))
    assert predicted.max() <= 100
    assert predictor.interval(CPU_SPACE.sample(rng, n=200, image_size=256)).upper.max() <= 100
    assert predicted.min() > 94


def test_kernels_without_a_fast_implementation_have_a_price_of_their_own() -> None:
    rng = np.random.default_rng(0)
    wide, plain = (get_formula(name, "latency_ms") for name in ("calibrated-wide", "calibrated"))
    prices = np.array([0.02, 0.1, 1.0, 0.5, 1.0, 0.2, 2.0, 8.0, 0.5])
    architectures = CPU_SPACE.sample(rng, image_size=192, n=40)
    slow = wide.design(CPU_SPACE, architectures) @ prices
    fast = plain.design(CPU_SPACE, architectures) @ np.delete(prices, -2)
    found = []
    for latency in (slow, fast):
        noisy = latency * rng.normal(1, 0.01, len(latency))
        rows = [Measurement(a, None, y, "measured") for a, y in zip(architectures, noisy, strict=True)]
        (report,) = fit_family("calibrated", "latency_ms", rows, CPU_SPACE)
        assert report.metrics["cv_mape"] < 2
        found.append(report.predictor.coefficients[wide.columns(CPU_SPACE).index("dw_wide")])
    assert found[0] == pytest.approx(8.0, rel=0.05)
    assert found[1] < 0.05
    # No such kernel, no such column.
    assert widest_formula("calibrated", "latency_ms", CPU_SPACE.replace(kernels=(3, 5)), 1) is plain


OFA_SPACE = CPU_SPACE.replace(name="ofa", expansions=(3, 4, 6), image_sizes=tuple(range(128, 225, 4)))


def _v100(path: Path, batch: int) -> list[Measurement]:
    """Networks of once-for-all's space that others measured on a V100."""
    rows = []
    for row in pd.read_csv(path).to_dict("records"):
        depths, kernels, expansions = (
            list(map(int, row[name].split())) for name in ("depths", "kernels", "expansions")
        )
        blocks = iter(zip(expansions, kernels, strict=True))
        architecture = OFA_SPACE.architecture(row["image_size"], [[next(blocks) for _ in range(d)] for d in depths])
        rows.append(Measurement(architecture, None, row[f"v100_batch{batch}_ms"], "measured"))
    return rows


@pytest.mark.parametrize(("batch", "most", "rank"), [(1, 5.0, 0.88), (64, 1.5, 0.995)])
def test_starts_of_layers_explain_a_gpu_from_few_rows(shared_data: Path, batch: int, most: float, rank: float) -> None:
    rows = _v100(shared_data / "ofa_mbv3_v100_latency.csv", batch)
    errors, ranks = [], []
    for draw in range(3):
        order = np.random.default_rng(draw).permutation(len(rows))
        (report,) = fit_family("calibrated", "latency_ms", [rows[i] for i in order[:20]], OFA_SPACE)
        test = [rows[i] for i in order[20:]]
        observed = pd.Series([m.latency_ms for m in test])
        predicted = pd.Series(report.predictor.predict([m.architecture for m in test]))
        errors.append(100 * (predicted / observed - 1).abs().mean())
        ranks.append(predicted.corr(observed, method="spearman"))
    assert np.median(errors) <= most
    assert np.median(ranks) >= rank


def test_starts_are_priced_where_a_device_waits_for_them_and_not_elsewhere() -> None:
    rng = np.random.default_rng(0)
    networks = CPU_SPACE.sample(rng, n=30, image_size=224)
    starts = get_formula("launches", "latency_ms").design(CPU_SPACE, networks)
    # 0.2 ms a layer, 0.5 ms a gate, 1 ms in all, and a little noise.
    ms = starts @ [0.2, 0.5, 1.0] * rng.normal(1, 0.001, len(networks))
    (report,) = fit_family(
        "calibrated",
        "latency_ms",
        [Measurement(a, None, float(y)) for a, y in zip(networks, ms, strict=True)],
        CPU_SPACE,
    )
    predictor = report.predictor
    assert predictor.recipe.launches
    prices = dict(zip(predictor.columns, predictor.coefficients, strict=True))
    assert prices["layers"] == pytest.approx(0.2, rel=0.1)
    assert prices["gates"] == pytest.approx(0.5, rel=0.1)
    (report,) = fit_family("calibrated", "latency_ms", _synthetic(30), CPU_SPACE)
    assert report.predictor.formula == "calibrated-wide"


def test_predictors_are_fitted_again_to_a_network_above_their_ceiling() -> None:
    rows = _sized(60, sizes=(160, 192, 224))
    known = fit_predictors(rows, CPU_SPACE).predictors
    ceiling = known.accuracy[0].ceiling
    assert ceiling is not None
    (new,) = CPU_SPACE.sample(np.random.default_rng(9), n=1, image_size=224)
    surprise = Measurement(new, ceiling + 0.1, 50.0, "measured")
    (again,) = refit_predictors(known, [*rows, surprise], latency=True).accuracy
    assert (again.ceiling or 0.0) > ceiling + 0.1
    (same,) = refit_predictors(known, [*rows, dataclasses.replace(surprise, accuracy=70.0)], latency=True).accuracy
    assert same.ceiling == ceiling


def test_a_few_measured_latencies_do_not_take_the_place_of_a_cost_model() -> None:
    rows = [dataclasses.replace(row, latency_source="cost_model") for row in _sized(60, sizes=(160, 192, 224))]
    model = reference_predictors("rpi4")
    known = fit_predictors(rows, CPU_SPACE, latency=model).predictors
    looked = [dataclasses.replace(row, latency_source="measured") for row in _sized(5, sizes=(160, 224), seed=3)]
    again = refit_predictors(known, [*rows, *looked], latency=False)
    assert again.latency == model.latency
    assert again.accuracy[0].metrics["n_samples"] == len({row.architecture for row in [*rows, *looked]})


def test_figures_of_several_fits_are_those_of_all_their_rows() -> None:
    fit = fit_predictors(_sized(300, sizes=(192, 256)), CPU_SPACE, formula="paper")
    each = [predictor.metrics for predictor in fit.predictors.accuracy]
    assert len(each) == 2
    figures = fit.predictors.figures("accuracy")
    assert figures["n_samples"] == sum(metrics["n_samples"] for metrics in each)
    assert min(m["cv_rmse"] for m in each) < figures["cv_rmse"] < max(m["cv_rmse"] for m in each)


def _small(block: BlockType = "mbconv", **changes: Any) -> SearchSpace:
    stages = tuple(StageSpec(width, 2, block) for width in (24, 40))
    return CPU_SPACE.replace(**{"name": "small", "image_sizes": (96,), "stages": stages} | changes)


@pytest.mark.parametrize(
    ("space", "own"),
    [
        # At most one identity block: its ratio is the stage's total.
        (_small(depths=(1, 2)), False),
        (_small(depths=(2,), image_sizes=(96, 128)), False),
        # The first block is all that there is, and its own mean; what it reads and what it writes are multiples.
        (_small(depths=(1,), image_sizes=(64, 96, 128)), True),
        # The same residual adds in all networks: their price is in the constant, and elsewhere they would cost nothing.
        (_small(depths=(3,), kernels=(3,)), True),
        (_small(depths=(4,), expansions=(3,)), True),
        # The first block's depthwise convolution is the only one.
        (_small("fused"), True),
        (_small("fused", image_sizes=(96, 128)), True),
    ],
)
def test_a_space_is_fitted_whatever_its_columns_have_in_common(space: SearchSpace, own: bool) -> None:
    rng = np.random.default_rng(0)
    networks = space.sample(rng, n=90)
    ms = get_formula("calibrated", "latency_ms").design(space, networks).sum(axis=1)
    capacity = np.array([sum(b.expansion * b.kernel for s in a.stages for b in s.blocks) for a in networks])
    accuracy = 90 - 20 * np.exp(-capacity / 100) + rng.normal(0, 0.1, len(networks))
    rows = [Measurement(a, float(y), float(t), "measured") for a, y, t in zip(networks, accuracy, ms, strict=True)]
    fit = fit_predictors(rows[:70], space)
    assert not fit.refused
    table = fit.predictors.predict_table(networks[70:])
    np.testing.assert_allclose(table["latency_ms"], ms[70:], rtol=1e-6)
    assert np.sqrt(np.mean((np.array(table["accuracy"]) - accuracy[70:]) ** 2)) < 0.3 * np.std(accuracy)
    assert fit.predictors.latency[0].own_space_only == own
