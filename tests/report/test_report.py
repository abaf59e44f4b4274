"""The search report and the predictor files."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.comparison import Comparison, agreement
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import marginal_effects, reference_predictors
from foxnas_mlflow.core.searchers import SEARCHERS, Objective, front_of, search, verify
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.report import PipelinePage, write_benchmark_report, write_pipeline_report, write_search_report
from foxnas_mlflow.report._pipeline import _classes, _images
from foxnas_mlflow.report._search import latency_shares, stage_latencies


@pytest.mark.parametrize("size", [192, 256])
def test_shares_of_latency_sum_to_the_prediction(size: int, rng: np.random.Generator) -> None:
    latency = reference_predictors("rpi4").of("latency_ms", size)
    architecture = CPU_SPACE.sample(rng, image_size=size)
    predicted = latency.predict([architecture])[0]
    np.testing.assert_allclose(sum(latency_shares(latency, architecture).values()), predicted)
    constant, stages = stage_latencies(latency, architecture)
    np.testing.assert_allclose(constant + sum(stages), predicted)
    other = CPU_SPACE.sample(rng, image_size=size)
    mixed = Architecture(architecture.space, size, (*architecture.stages[:4], other.stages[4]))
    changed = stage_latencies(latency, mixed)[1]
    np.testing.assert_allclose(changed[:4], stages[:4])


def test_effects_are_differences_of_predictions() -> None:
    predictor = reference_predictors("rpi4").of("latency_ms", 256)
    effects = {e.label: e for e in marginal_effects(predictor)}
    assert len(effects) == 15
    base = [[(4, 5)] * 3] * 5
    deeper = [*base[:2], [(4, 5)] * 4, *base[3:]]
    expected = np.diff(predictor.predict([CPU_SPACE.architecture(256, b) for b in (base, deeper)]))[0]
    np.testing.assert_allclose(effects["stage 80: depth 3 -> 4"].delta, expected)
    assert all(e.margin > 0 for e in effects.values())


def test_the_page_is_self_contained_and_says_what_was_found(tmp_path: Path) -> None:
    outcome = search(reference_predictors("rpi4"), 60.0, evaluations=5000)
    comparisons = [s.search(outcome.problem, evaluations=2000) for s in SEARCHERS.values()]
    path = tmp_path / "report.html"
    request = {"latency_ms": 60.0, "confidence": 0.95, "name": "<script>alert(1)</script>"}
    row = Measurement(outcome.architecture, 71.5, 47.25, "measured")
    write_search_report(
        path,
        outcome=outcome,
        comparisons=comparisons,
        request=request,
        target=get_target("rpi4"),
        measurements=[row],
    )
    page = path.read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)\s*=", page)
    assert "<script>alert" not in page
    assert f"{outcome.accuracy:.2f} %" in page
    assert "2021" in page
    assert "not a measurement" in page
    assert '"x": [47.25], "y": [71.5], "mode": "markers", "name": "measured networks"' in page
    for searcher in SEARCHERS:
        assert f'"{searcher}"' in page


def test_every_price_of_a_cost_model_has_a_name() -> None:
    from foxnas_mlflow.core.predictors import FORMULAS
    from foxnas_mlflow.report._search import _TERM_NAMES

    terms = {term for formula in FORMULAS.values() for term in getattr(formula, "terms", ())}
    assert "dw_wide" in terms
    assert terms <= set(_TERM_NAMES)


def test_the_page_lists_the_worst_classes_first() -> None:
    def row(label: str, recall: float | None) -> dict[str, object]:
        figures = dict.fromkeys(("precision", "f1"), recall)
        return {"label": label, "images": 0 if recall is None else 9, "recall": recall, **figures, "taken_for": "x<y"}

    rows = [row("a", None), row("b", 90.0), row("c", None), row("d", 10.0), *(row(f"e{i}", 95.0) for i in range(30))]
    html = _classes(rows)
    assert html.index("<td>d</td>") < html.index("<td>b</td>") < html.index("<td>e0</td>")
    assert "and 14 better ones" in html
    assert "x&lt;y" in html
    assert _classes(()) == ""


def test_the_page_of_a_pipeline_has_the_warnings_of_its_images() -> None:
    html = _images({"source": "pictures"}, ["classes without validation images: cat & <dog>"])
    assert "<li>classes without validation images: cat &amp; &lt;dog&gt;</li>" in html
    assert "<ul>" not in _images({"source": "pictures"}, ())


def pipeline_page(limits_ms: list[float | None], **request: object) -> PipelinePage:
    """A page of found networks and two others, without training and gates."""
    predictors = reference_predictors("rpi4")
    networks = CPU_SPACE.sample(np.random.default_rng(0), n=len(limits_ms) + 2, image_size=256)
    table = predictors.predict_table(networks)
    rows = [
        Comparison(a, "found" if i < len(limits_ms) else "front", acc, ms, 1.1 * ms, acc - 1, 400, 2 * ms)
        for i, (a, acc, ms) in enumerate(zip(networks, table["accuracy"], table["latency_ms"], strict=True))
    ]
    found = [
        {
            "limit_ms": limit,
            "model_uri": f"models:/n-rpi4/{i}",
            "int8_top1": 70.5,
            "quantization_drop": 0.25,
            "size_bytes": 4096,
            "latency_ms": 30.0,
            "valid": True,
        }
        for i, limit in enumerate(limits_ms, 1)
    ]
    quantization = {"accuracy/float_top1": 71.0, "accuracy/int8_top1": 70.5, "accuracy/quantization_drop": 0.5}
    quantization |= {"model/size_bytes": 4096.0, "model/params": 1e6, "model/macs": 1e7}
    benchmark = {
        "device": "a board",
        "connection": "local",
        "runtime": "LiteRT",
        "threads": 1,
        "batch": 1,
        "n_runs": 2,
        "latency_ms_p50": 30.0,
        "latency_ms_p90": 31.0,
        "latency_ms_p99": 32.0,
        "peak_memory_bytes": 2**20,
        "valid": True,
        "emulated": False,
        "samples_ms": [30.0, 30.0],
    }
    return PipelinePage(
        request={"latency_ms": [], "limits": "", "objective": "accuracy", "confidence": 0.95} | request,
        latency_ms=limits_ms[0],
        target=get_target("rpi4"),
        model_uri="models:/n-rpi4/1",
        steps=[],
        data={"source": "digits", "training images": "100"},
        training={},
        measurements=[],
        predictors=predictors,
        front=front_of(Objective(predictors)),
        architecture=networks[0],
        quantization=quantization,
        finetuning=None,
        benchmark=benchmark,
        comparisons=rows,
        checks=[f"check {i}" for i, _ in enumerate(limits_ms, 1)],
        networks=found,
        agreement=agreement(rows, limits_ms[0]),
        gates=[],
        stage="",
        refusal="",
    )


LOAD: dict[str, Any] = {
    "windows": [
        {"second": s, "seconds": 10.0, "n_runs": 9, "p50_ms": 30.0 + s, "p90_ms": 31.0 + s}
        | {"temperature_c": 50.0 + s, "frequency_mhz": None}
        for s in (0.0, 10.0, 20.0)
    ],
    "sustained_p90_ms": 48.25,
    "throttled": False,
    "throttled_under_load": True,
}


def test_a_load_is_drawn_with_what_the_board_tells_meanwhile(tmp_path: Path) -> None:
    benchmark = {**(pipeline_page([40.0]).benchmark or {}), **LOAD}
    path = tmp_path / "report.html"
    write_benchmark_report(path, model="models:/n/<1>", target="rpi4", benchmark=benchmark)
    page = path.read_text()
    assert "models:/n/&lt;1&gt;" in page
    assert "at the end of 30 s of load without a pause at most <b>48.25 ms</b>" in page
    assert '"x": [10.0, 20.0, 30.0], "y": [31.0, 41.0, 51.0]' in page
    assert '"y": [50.0, 60.0, 70.0], "yaxis": "y2", "mode": "lines+markers", "name": "temperature"' in page
    assert '"name": "clock"' not in page
    assert "The machine does not tell its clock." in page
    shown = cells(page)
    assert shown[shown.index("throttled meanwhile") + 1] == "yes"
    assert shown[shown.index("throttled") + 1] == "no"


def test_the_page_of_a_pipeline_draws_the_load_of_its_benchmark(tmp_path: Path) -> None:
    path, page = tmp_path / "report.html", pipeline_page([40.0])
    write_pipeline_report(path, page)
    assert "Under load" not in path.read_text()
    # A window of an earlier release does not say how long it was.
    windows = [{key: value for key, value in w.items() if key != "seconds"} for w in LOAD["windows"]]
    write_pipeline_report(path, dataclasses.replace(page, benchmark={**page.benchmark, **LOAD, "windows": windows}))
    assert '<h3>Under load</h3><div id="load"' in path.read_text()


def test_the_page_of_a_pipeline_tells_each_of_its_networks(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_pipeline_report(path, pipeline_page([40.0]))
    page = path.read_text()
    assert "within the limit of 40 ms" in page
    assert "A network for each latency" not in page
    # Every network took twice what was predicted: half of what was measured is missing, in the rows as in the mean.
    assert page.count("-50.0 %") == 3
    assert "mean error 50 %" in page
    assert "0 of 3 networks stay within their upper latency bound" in page
    told = pipeline_page([40.0])
    rows = [*told.comparisons[:2], dataclasses.replace(told.comparisons[2], latency_valid=False)]
    write_pipeline_report(path, dataclasses.replace(told, comparisons=rows, agreement=agreement(rows, 40.0)))
    assert "0 of 2 networks stay within their upper latency bound" in path.read_text()
    write_pipeline_report(path, pipeline_page([20.0, 40.0], latency_ms=[20.0, 40.0]))
    page = path.read_text()
    assert "<b>above</b> the limit of 20 ms" in page
    assert "first of 2 networks, one for each latency" in page
    assert "At most 40 ms: check 2" in page
    assert [cell for cell in cells(page) if cell.startswith("found")] == ["found, 20 ms", "found, 40 ms"]
    assert {"20", "models:/n-rpi4/1", "30, above"} <= set(cells(page))
    assert {"40", "models:/n-rpi4/2", "30, within"} <= set(cells(page))


@pytest.mark.parametrize(
    ("passed", "said"),
    [
        (False, "The gates refused <b>Staging</b>."),
        (True, "It was not promoted: version 3 took Staging in the meantime"),
        (None, "It was not promoted: version 3 took Staging in the meantime"),
    ],
)
def test_the_page_of_a_pipeline_says_what_refused(tmp_path: Path, passed: bool | None, said: str) -> None:
    gates = [] if passed is None else [{"gate": "latency", "passed": passed, "text": "p90 40 ms"}]
    page = pipeline_page([40.0])
    page = dataclasses.replace(page, gates=gates, stage="Staging", refusal="version 3 took Staging in the meantime")
    write_pipeline_report(tmp_path / "report.html", page)
    assert said in (tmp_path / "report.html").read_text()


def test_the_page_tells_what_a_network_with_less_would_have_to_meet(tmp_path: Path) -> None:
    for limits, said in (({}, "at 73 %: the optimum"), ({"macs": 1e9}, "at 73 % within the limits: the optimum")):
        outcome = search(
            reference_predictors("rpi4"), objective="latency_ms", min_accuracy=73.0, limits=limits, evaluations=300
        )
        path = tmp_path / "report.html"
        write_search_report(path, outcome=outcome, comparisons=[], request={}, target=get_target("rpi4"))
        assert f"is predicted to have less latency_ms {said}" in path.read_text()


def cells(page: str) -> list[str]:
    """Texts of all cells of all tables of a page."""
    return re.findall(r"<td>([^<]*)</td>", page)


def test_the_page_tells_a_proof_of_the_network_that_it_is_of(tmp_path: Path) -> None:
    outcome = search(reference_predictors("rpi4"), 60.0, evaluations=300)
    seen = verify(
        outcome, n_candidates=3, time=lambda a: Timing(99.0 if a == outcome.architecture else 5.0, "measured")
    )
    assert seen.chosen.architecture != outcome.optimum.architecture
    other = dataclasses.replace(outcome, architecture=seen.chosen.architecture, found_by="verification")
    for each, text in (
        (outcome, "is predicted better within these limits: the optimum is proven."),
        (other, f"Another network is predicted best, of {outcome.accuracy:.2f} %, and none of the space at "),
    ):
        path = tmp_path / "report.html"
        write_search_report(
            path, outcome=each, comparisons=[], request={}, target=get_target("rpi4"), candidates=seen.candidates
        )
        assert text in path.read_text()


def test_the_page_of_a_pipeline_says_why_nothing_was_promoted(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page = pipeline_page([40.0])
    write_pipeline_report(path, page)
    assert "No gate was asked" in path.read_text()
    write_pipeline_report(path, dataclasses.replace(page, refusal="another network beats it"))
    assert "No gate was asked" not in path.read_text()
    assert "<b>Refused.</b> another network beats it" in path.read_text()
