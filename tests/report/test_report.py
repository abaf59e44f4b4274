"""The search report and the predictor files."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import marginal_effects, reference_predictors
from foxnas_mlflow.core.searchers import SEARCHERS, search
from foxnas_mlflow.core.space import CPU_SPACE
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.report import write_search_report
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
