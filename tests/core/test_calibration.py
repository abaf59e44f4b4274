"""A cost model from a dozen measured networks, and the target file that it becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from benchmarks.launches import OFA_SPACE, v100_rows
from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.calibration import calibrate, choose_checks, choose_probes
from foxnas_mlflow.core.errors import InvalidInputError, OutOfDomainError, TooFewSamplesError
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import (
    LinearPredictor,
    get_formula,
    load_predictors,
    reference_latency,
    reference_predictors,
)
from foxnas_mlflow.core.searchers import Objective
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target, named_beside


def measured(n: int, *, noise: float = 0.0035) -> list[Measurement]:
    """Networks with the latencies of a board whose prices are known, and a board's noise."""
    probes = choose_probes(CPU_SPACE, n)
    truth = reference_predictors("rpi4").latency[0].predict(probes) / 5
    scatter = 1 + noise * np.random.default_rng(0).standard_normal(n)
    return [Measurement(a, None, float(t), "measured") for a, t in zip(probes, truth * scatter, strict=True)]


def test_twelve_probes_find_the_prices() -> None:
    pytest.importorskip("statsmodels")
    outside = CPU_SPACE.sample(np.random.default_rng(1), n=200)
    # The best networks use few of the kernels and ratios.
    outside += CPU_SPACE.replace(kernels=(3,)).sample(np.random.default_rng(2), n=200)
    truth = reference_predictors("rpi4").latency[0].predict(outside) / 5
    predictors = calibrate(measured(12), CPU_SPACE, target="board", provenance={"device": "board"})
    (latency,) = predictors.latency
    errors = np.abs(latency.predict(outside) / truth - 1)
    assert 100 * errors.mean() < 0.5
    assert 100 * errors.max() < 2
    assert latency.stated_confidence == 1  # nothing was held against it: the formula's word
    # Accuracy comes from the packaged predictors, so the result can be searched.
    assert predictors.image_sizes == (192, 256)
    Objective(predictors, confidence=0.95, image_sizes=None)
    assert any("accuracy" in note.lower() for note in predictors.notes)


def biased(networks: Sequence[Architecture], rng: np.random.Generator) -> list[Measurement]:
    """A board whose small images take longer than the cost model's terms say, by up to 11 %, and noise."""
    truth = reference_predictors("rpi4").latency[0].predict(networks) / 5
    sizes = np.array([network.image_size for network in networks])
    truth *= np.interp(sizes, (128, 160, 192, 224), (1.11, 1.065, 1.055, 1.0))
    truth *= 1 + 0.01 * rng.standard_normal(len(networks))
    return [Measurement(a, None, float(t), "measured") for a, t in zip(networks, truth, strict=True)]


def test_bounds_hold_on_a_board_that_the_terms_do_not_describe() -> None:
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(5)
    formula_alone, held = [], []
    for seed in range(4):
        rows = biased(choose_probes(CPU_SPACE, 12, seed=seed), rng)
        checks = biased(choose_checks(CPU_SPACE, 20, seed=seed), rng)
        (latency,) = calibrate(rows, CPU_SPACE, target="board", outside=checks).latency
        assert latency.metrics["n_samples"] == 32
        assert latency.metrics["n_outside"] == len(latency.held_out) == 20
        known = [row.architecture for row in checks]
        above = latency.upper_bound(known, 0.95) / latency.predict(known) - 1
        assert latency.metrics["bound_width"] == pytest.approx(100 * above.mean())
        new = [CPU_SPACE.sample(rng, image_size=int(rng.choice(CPU_SPACE.image_sizes))) for _ in range(250)]
        observed = np.array([row.latency_ms for row in biased(new, rng)])
        assert 100 * np.mean(np.abs(latency.predict(new) / observed - 1)) < 4
        held.append(np.mean(observed <= latency.upper_bound(new, 0.95)))
        (design_alone,) = calibrate(rows, CPU_SPACE, target="board").latency
        formula_alone.append(np.mean(observed <= design_alone.upper_bound(new, 0.95)))
    assert 0.92 <= np.mean(held) <= 0.995
    assert np.mean(formula_alone) < 0.9


@pytest.mark.parametrize(("batch", "error"), [(1, 6.0), (64, 2.0)])
def test_bounds_hold_on_a_gpu(shared_data: Path, batch: int, error: float) -> None:
    """600 networks on a V100, which at batch 1 waits for starts of kernels: half of the scatter is no amount's."""
    pytest.importorskip("statsmodels")
    rows = v100_rows(shared_data / "ofa_mbv3_v100_latency.csv", batch)
    order = np.random.default_rng(2).permutation(len(rows))
    known, outside, new = (([rows[i] for i in part]) for part in np.split(order, (12, 32)))
    (latency,) = calibrate(known, OFA_SPACE, target="gpu", outside=outside).latency
    networks, observed = [row.architecture for row in new], np.array([row.latency_ms for row in new])
    assert 100 * np.mean(np.abs(latency.predict(networks) / observed - 1)) < error
    assert 0.9 <= np.mean(observed <= latency.upper_bound(networks, 0.95)) <= 1
    assert latency.stated_confidence == pytest.approx(20 / 21)


def test_bounds_are_wider_where_nothing_was_measured(tmp_path: Path) -> None:
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(7)
    rows = biased(choose_probes(CPU_SPACE, 12, image_sizes=[160]), rng)
    checks = biased(choose_checks(CPU_SPACE, 20, image_sizes=[160]), rng)
    predictors = calibrate(rows, CPU_SPACE, target="board", outside=checks)
    (latency,) = predictors.latency
    assert latency.transfer_sigma >= latency.metrics["outside_mape"] / 100 > 0
    assert any("At other image sizes than 160 px it extrapolates" in note for note in predictors.notes)

    def shares(model: LinearPredictor, size: int) -> np.ndarray:
        networks = model.space.sample(np.random.default_rng(3), n=50, image_size=size)
        return model.upper_bound(networks, 0.95) / model.predict(networks) - 1

    for size, as_before in ((160, True), (224, False)):
        without = shares(dataclasses.replace(latency, transfer_sigma=0.0), size)
        assert np.allclose(shares(latency, size), without) == as_before
        assert (shares(latency, size) >= without).all()
    # And in another space at every size.
    predictors.save(tmp_path / "board.json")
    target = dataclasses.replace(get_target("rpi4"), predictors=str(tmp_path / "board.json"))
    (elsewhere,) = reference_latency(target, CPU_SPACE.replace(name="other")).latency
    assert (shares(elsewhere, 160) > shares(latency, 160)).all()


def test_no_confidence_is_stated_that_was_not_seen() -> None:
    pytest.importorskip("statsmodels")
    rng = np.random.default_rng(6)
    rows, checks = biased(choose_probes(CPU_SPACE, 12), rng), biased(choose_checks(CPU_SPACE, 3), rng)
    predictors = calibrate(rows, CPU_SPACE, target="board", outside=checks)
    Objective(predictors, confidence=0.75, image_sizes=None)
    with pytest.raises(OutOfDomainError, match=r"at most 0\.750.*--n-checks 19 or more"):
        Objective(predictors, confidence=0.95, image_sizes=None)
    with pytest.raises(OutOfDomainError, match="at most"):
        predictors.latency[0].upper_bound([CPU_SPACE.largest(224)], 0.95)


def test_prices_are_not_below_zero() -> None:
    """A board that charges nothing for most amounts, and noise: least squares alone would pay for some of them."""
    pytest.importorskip("statsmodels")
    formula = get_formula("calibrated", "latency_ms")
    prices = np.where(np.isin(formula.columns(CPU_SPACE), ("pw", "dw", "const")), 0.05, 0.0)
    probes = choose_probes(CPU_SPACE, 16)
    x = formula.design(CPU_SPACE, probes)
    y = x @ prices * (1 + 0.05 * np.random.default_rng(3).standard_normal(16))
    free = np.linalg.lstsq(x / y[:, None], np.ones(16), rcond=None)[0]
    assert (free < 0).any()
    rows = [Measurement(a, None, float(t), "measured") for a, t in zip(probes, y, strict=True)]
    (latency,) = calibrate(rows, CPU_SPACE, target="board").latency
    assert (latency.coefficients >= 0).all()
    # No price can be moved, up or where it is above 0 also down, to a smaller error.
    residual = 1 - (latency.recipe.design(CPU_SPACE, probes) / y[:, None]) @ latency.coefficients
    slope = (latency.recipe.design(CPU_SPACE, probes) / y[:, None]).T @ residual
    assert (slope < 1e-6).all()
    np.testing.assert_allclose(slope[latency.coefficients > 0], 0, atol=1e-6)
    outside = CPU_SPACE.sample(np.random.default_rng(1), n=200)
    truth = formula.design(CPU_SPACE, outside) @ prices
    bound = latency.upper_bound(outside, 0.95)
    assert (latency.predict(outside) > 0).all()
    assert np.mean(truth * (1 + 0.05 * np.random.default_rng(4).standard_normal(200)) <= bound) >= 0.9


def test_too_few_probes_and_probes_that_are_there() -> None:
    pytest.importorskip("statsmodels")
    with pytest.raises(InvalidInputError, match="n_probes must be 11 or more"):
        choose_probes(CPU_SPACE, 9)
    with pytest.raises(TooFewSamplesError):
        calibrate(measured(12)[:9], CPU_SPACE, target="board")
    first = choose_probes(CPU_SPACE, 11)
    assert choose_probes(CPU_SPACE, 11, measured=first) == []
    more = choose_probes(CPU_SPACE, 13, measured=first)
    assert len(more) == 2
    assert not set(more) & set(first)


def test_a_target_file_names_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("statsmodels")
    predictors = calibrate(measured(12), CPU_SPACE, target="board")
    (tmp_path / "targets").mkdir()
    predictors.save(tmp_path / "targets" / "board.json")
    path = tmp_path / "targets" / "board.yaml"
    path.write_text("name: board\nspace: cpu\npredictors: board.json\n")
    monkeypatch.chdir(tmp_path)
    target = get_target("targets/board.yaml")
    assert target.space == "cpu"
    assert load_predictors(target.predictors).latency[0].columns == predictors.latency[0].columns
    path.write_text(f"name: board\npredictors: {tmp_path / 'targets' / 'board.json'}\n")
    assert get_target(str(path)).predictors == str(tmp_path / "targets" / "board.json")
    path.write_text("name: board\npredictors: models:/board/1.json\nspace: small.yaml\n")
    assert get_target(str(path)).predictors == "models:/board/1.json"
    assert get_target(str(path)).space == str(tmp_path / "targets" / "small.yaml")
    # A target that is made from it elsewhere has the same space.
    (tmp_path / "targets" / "small.yaml").touch()
    (tmp_path / "others").mkdir()
    other = tmp_path / "others" / "copy.yaml"
    for given in ("targets/board.yaml", str(path)):
        space = named_beside(Path("others/copy.yaml"), get_target(given).space)
        other.write_text(f"name: copy\nspace: {space}\n")
        assert Path(get_target(str(other)).space).samefile(tmp_path / "targets" / "small.yaml")
    assert named_beside(other, "cpu") == "cpu"
