"""Latency cost models: the Edge TPU's against hand counts and its build, and cost models in other spaces."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.edgetpu import CHIP_BYTES, array_ms, edgetpu_terms
from foxnas_mlflow.core.errors import OutOfDomainError
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.predictors import (
    LinearPredictor,
    PredictorSet,
    fit_predictors,
    get_formula,
    load_predictors,
    reference_latency,
    reference_predictors,
)
from foxnas_mlflow.core.searchers import Objective, exact_optimum
from foxnas_mlflow.core.space import CPU_SPACE, TPU_SPACE, SearchSpace
from foxnas_mlflow.core.targets import Target, get_target

ROOT = Path(__file__).resolve().parents[2]
SMALL = TPU_SPACE.replace(name="small", image_sizes=(32, 48), width_mult=0.5, n_classes=10)


def test_array_cycles_of_hand_counted_layers() -> None:
    # One tile: 64 cycles of weights, M pixels, 64 + 64 - 2 of skew, the last one not counted.
    assert array_ms(100, 64, 64) * 480_000 == pytest.approx(64 + 100 + 126 - 1)
    assert array_ms(100, 65, 129) * 480_000 == pytest.approx(2 * 3 * (100 + 190) - 1)


def test_shipped_edgetpu_models_are_what_the_script_builds(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(ROOT / "scripts" / "build_edgetpu"), str(tmp_path)], check=True, timeout=120)
    built = sorted(path.name for path in tmp_path.glob("*.json"))
    assert built == ["edgetpu-devboard.json", "edgetpu-rpi4.json", "edgetpu.json"]
    for name in built:
        model = load_predictors(tmp_path / name).latency[0]
        shipped = reference_predictors(Path(name).stem).latency[0]
        np.testing.assert_allclose(model.coefficients, shipped.coefficients, rtol=1e-9)
        assert model.provenance == shipped.provenance
    metrics = reference_predictors("edgetpu").latency[0].metrics
    assert metrics["mape"] < 3
    assert metrics["left_out_mape"] < 4


def test_the_networks_behind_the_edgetpu_figures_have_their_published_numbers_of_weights() -> None:
    path = ROOT / "scripts" / "build_edgetpu"
    loader = importlib.machinery.SourceFileLoader("build_edgetpu", str(path))
    spec = importlib.util.spec_from_loader("build_edgetpu", loader)
    assert spec is not None
    script = importlib.util.module_from_spec(spec)
    loader.exec_module(script)
    millions = {
        "mobilenet_v1": 4.2,
        "mobilenet_v1_0.25_128": 0.47,
        "mobilenet_v2": 3.5,
        "inception_v1": 6.6,
        "inception_v2": 11.2,
        "inception_v3": 23.8,
        "inception_v4": 42.7,
        "resnet_50": 25.6,
        "resnet_152": 60.3,
        "squeezenet": 1.25,
        "vgg16": 138.4,
        "vgg19": 143.7,
        "efficientnet_edgetpu_s": 5.4,
        "efficientnet_edgetpu_m": 6.9,
        "efficientnet_edgetpu_l": 10.6,
    }
    for name, published in millions.items():
        assert script.NETWORKS[name]().params / 1e6 == pytest.approx(published, rel=0.02), name


def test_predictors_of_the_earlier_edgetpu_formula_are_read_and_priced_as_before(rng: np.random.Generator) -> None:
    model = reference_predictors("edgetpu").latency[0].to_dict()
    prices = [1.59, 0.026, 2.0, 0.57]
    columns = ["array", "depthwise", "link", "const"]
    earlier = model | {"formula": "edgetpu", "columns": columns, "coefficients": prices, "covariance": None}
    predictor = LinearPredictor.from_dict(earlier, TPU_SPACE)
    (network,) = TPU_SPACE.sample(rng, n=1)
    array, depthwise, _, _ = edgetpu_terms(build_network(TPU_SPACE, network).layers)
    link = (3 * network.image_size**2 + 1000) / 1e6
    assert predictor.predict([network])[0] == pytest.approx(np.dot(prices, [array, depthwise, link, 1]))


@pytest.mark.parametrize("space", [TPU_SPACE, CPU_SPACE, SMALL])
def test_edgetpu_design_is_the_networks_own_count(space: SearchSpace, rng: np.random.Generator) -> None:
    architectures = space.sample(rng, n=5)
    x = get_formula("edgetpu-outputs", "latency_ms").design(space, architectures)
    for row, architecture in zip(x, architectures, strict=True):
        terms = edgetpu_terms(build_network(space, architecture).layers)
        assert terms[3] * 1e6 < CHIP_BYTES
        np.testing.assert_allclose(row[:3], terms[:3])
        # All weights stay on chip: only image and class scores travel.
        assert row[3] == pytest.approx((space.in_channels * architecture.image_size**2 + space.n_classes) / 1e6)


@pytest.mark.parametrize("width", [1.5, 4.0])
def test_streamed_weights_are_bounded_from_above(width: float, rng: np.random.Generator) -> None:
    space = TPU_SPACE.replace(width_mult=width)
    architectures = [space.smallest(224), space.largest(224), *space.sample(rng, n=20, image_size=224)]
    x = get_formula("edgetpu-outputs", "latency_ms").design(space, architectures)
    streamed = x[:, 3] - (3 * 224**2 + 1000) / 1e6
    weights = np.array([edgetpu_terms(build_network(space, a).layers)[3] for a in architectures])
    exact = np.maximum(0, weights - CHIP_BYTES / 1e6)
    np.testing.assert_allclose(streamed[:2], exact[:2], atol=1e-9)
    assert (streamed >= exact - 1e-9).all()
    if exact.min() > 0:
        np.testing.assert_allclose(streamed, exact)


def _accuracy(space: SearchSpace, rng: np.random.Generator) -> LinearPredictor:
    columns = get_formula("calibrated", "accuracy").columns(space)
    return LinearPredictor(
        "calibrated",
        "accuracy",
        space,
        space.image_sizes,
        space.image_sizes,
        columns,
        np.append(rng.uniform(0, 0.2, len(columns) - 1), -3.0),
        None,
        0.0,
        1,
        ceiling=95.0,
    )


def test_search_on_the_edgetpu_model_is_exact(rng: np.random.Generator) -> None:
    space = SMALL.replace(stages=SMALL.stages[:2], depths=(1, 2), expansions=(4, 8), image_sizes=(32,))
    latency = reference_latency(get_target("edgetpu"), space).latency
    predictors = PredictorSet("edgetpu", space, (_accuracy(space, rng),), latency)
    kinds = [(e, 3) for e in space.expansions]
    stages = [list(blocks) for depth in space.depths for blocks in itertools.product(kinds, repeat=depth)]
    everything = [space.architecture(32, [a, b]) for a in stages for b in stages]
    assert len(everything) == space.n_architectures
    upper = latency[0].upper_bound(everything, 0.9)
    accuracy = predictors.accuracy[0].predict(everything)
    for limit in np.quantile(upper, [0.2, 0.6]) * (1 + 1e-12):  # a network's own bound, whatever its last digit is
        optimum = exact_optimum(Objective(predictors, confidence=0.9), float(limit))
        assert optimum.accuracy == pytest.approx(accuracy[upper <= limit].max())
        assert optimum.proof_gap == pytest.approx(0, abs=1e-9)


def test_a_cost_model_serves_another_space_and_says_so() -> None:
    small = CPU_SPACE.replace(name="digits", image_sizes=(32, 64), width_mult=0.5, n_classes=10)
    reference = reference_predictors("rpi4")
    carried = reference_latency(get_target("rpi4"), small)
    (model,) = carried.latency
    assert carried.accuracy == ()
    assert "extrapolates" in carried.notes[-1]
    assert carried.notes[:-1] == reference.latency[0].notes
    assert not any("ImageNet" in note for note in carried.notes)
    network = [small.largest(64)]
    # The prices are those of the packaged model; the interval is the one for sizes that were not fitted.
    np.testing.assert_array_equal(model.coefficients, reference.latency[0].coefficients)
    interval = model.interval(network)
    assert (interval.upper - interval.value)[0] > 1.96 * model.transfer_sigma * interval.value[0]
    own = reference_latency(get_target("rpi4"), CPU_SPACE)
    assert own.notes == reference.latency[0].notes
    assert own.latency[0].to_dict() == reference.latency[0].to_dict()
    with pytest.raises(OutOfDomainError, match="know nothing of accuracy"):
        Objective(carried)


def test_a_cost_model_of_its_own_space_serves_other_classes_of_it(tmp_path: Path) -> None:
    reference = reference_predictors("rpi4")
    (latency,) = reference.latency
    kept = dataclasses.replace(reference, accuracy=(), latency=(dataclasses.replace(latency, own_space_only=True),))
    kept.save(tmp_path / "board.json")
    target = dataclasses.replace(get_target("rpi4"), predictors=str(tmp_path / "board.json"))
    (model,) = reference_latency(target, CPU_SPACE.replace(n_classes=10, in_channels=1)).latency
    np.testing.assert_array_equal(model.coefficients, latency.coefficients)
    with pytest.raises(OutOfDomainError, match="hold in space 'cpu' only"):
        reference_latency(target, CPU_SPACE.replace(depths=(2, 3)))


def test_ethos_targets_are_searched_with_the_packaged_accuracy_and_say_so() -> None:
    predictors = reference_predictors("ethos-u55-128")
    assert predictors.image_sizes == (192, 256)
    assert any("does not depend on the board" in note for note in predictors.notes)
    limit = float(predictors.latency[0].predict([CPU_SPACE.uniform(192, depth=3, expansion=4, kernel=3)])[0])
    assert exact_optimum(Objective(predictors), limit).latency_ms <= limit
    # A cost model alone stays one: nothing of accuracy comes with it.
    assert reference_latency(get_target("ethos-u55-128"), CPU_SPACE).accuracy == ()


def test_a_target_without_a_cost_model_is_told_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(OutOfDomainError, match="foxnas device calibrate"):
        reference_latency(get_target("cpu"), CPU_SPACE)
    # A target file names its own model; equation 2 holds in its own space only.
    reference_predictors("rpi4").save(tmp_path / "board.json")
    board = Target("board", predictors=str(tmp_path / "board.json"))
    assert reference_latency(board, CPU_SPACE).latency[0].formula == "calibrated-wide"
    paper = get_formula("paper", "latency_ms").columns(CPU_SPACE)
    own = LinearPredictor("paper", "latency_ms", CPU_SPACE, (256,), (256,), paper, np.ones(len(paper)), None, 0.0, 1)
    PredictorSet("board", CPU_SPACE, (), (own,)).save(tmp_path / "board.json")
    with pytest.raises(OutOfDomainError, match="hold in space 'cpu' only"):
        reference_latency(board, SMALL)


def test_a_fit_never_mixes_estimates_with_measurements(rng: np.random.Generator) -> None:
    architectures = CPU_SPACE.sample(rng, n=60, image_size=256)
    table = reference_predictors("rpi4").predict_table(architectures)
    rows = [
        Measurement(a, accuracy=acc + rng.normal(0, 0.1), latency_ms=ms, latency_source="cost_model")
        for a, acc, ms in zip(architectures, table["accuracy"], table["latency_ms"], strict=True)
    ]
    latency = reference_latency(get_target("rpi4"), CPU_SPACE)
    estimated = fit_predictors(rows, CPU_SPACE, target="rpi4", ceiling=78.0, latency=latency)
    assert estimated.predictors.latency == latency.latency
    assert estimated.predictors.notes == latency.notes
    assert set(estimated.reports) == {"accuracy"}
    # Thirty rows measured, twice as slow as the estimates: only they count.
    mixed = [
        dataclasses.replace(m, latency_ms=2 * m.latency_ms * (1 + rng.normal(0, 0.01)), latency_source="measured")
        if i < 30
        else m
        for i, m in enumerate(rows)
    ]
    fit = fit_predictors(mixed, CPU_SPACE, target="rpi4", ceiling=78.0, latency=latency)
    assert fit.reports["latency_ms"].metrics["n_samples"] == 30
    ratio = fit.predictors.latency[0].predict(architectures) / np.array(table["latency_ms"])
    assert np.median(ratio) == pytest.approx(2, abs=0.02)
