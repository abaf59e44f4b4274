"""From a version to its images and back, on a real registry; what was deleted is said to be gone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlflow
import pytest

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.tracking.lineage import trace
from foxnas_mlflow.tracking.registry import describe_version
from tests.versions import NAME, register_version

pytestmark = pytest.mark.server


@pytest.fixture
def made(tracking: str, tmp_path: Path) -> dict[str, str]:
    """Versions of every kind, tagged as the steps tag them; their registered models' names tell the kinds."""
    client = mlflow.MlflowClient()
    runs = {what: client.create_run("0").info.run_id for what in ("sample", "search")}
    rows = f"runs:/{runs['sample']}/measurements.csv"
    data = {"data": "digits", "data_digest": "d" * 64}
    register_version(tmp_path, name="s", tags=data, target="")
    register_version(tmp_path, name="p", tags={"source": rows, "supernet": "models:/s/1"}, target="")
    origin = {**data, "supernet": "models:/s/1", "predictors": "models:/p/1", "search_run": runs["search"]}
    register_version(tmp_path, name="n", tags=origin, target="")
    register_version(tmp_path, name="n", tags={**origin, "finetuned_from": "models:/n/1"}, target="")
    register_version(tmp_path, tags={**origin, "subnet": "models:/n/2"})
    client.set_registered_model_alias(NAME, "production", "1")
    return {"rows": rows, **runs}


def test_a_version_leads_to_its_images_and_back(made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    found = trace(f"models:/{NAME}@production")
    assert [(a.what, a.name) for a in found.ancestors[:-2]] == [
        ("data", "digits"),
        ("supernet", "models:/s/1"),
        ("rows", made["rows"]),
        ("predictors", "models:/p/1"),
        ("search", f"runs:/{made['search']}"),
        ("shared subnet", "models:/n/1"),
        ("subnet", "models:/n/2"),
        ("file", f"models:/{NAME}/1"),
    ]
    benchmark, board = found.ancestors[-2:]
    (run,) = mlflow.MlflowClient().search_runs(
        ["0"], "tags.`foxnas.stage` = 'benchmark' and tags.`foxnas.target` = 'rpi4'", max_results=1
    )
    assert (benchmark.name, benchmark.note) == (f"runs:/{run.info.run_id}", "p90 40 ms")
    assert board.name == "Raspberry Pi 4 Model B Rev 1.4"
    assert all(a.url.startswith("http://127.0.0.1:5000/#/") for a in found.ancestors[1:-1])
    assert set(trace("models:/s/1").descendants) == {"models:/p/1", "models:/n/1", "models:/n/2", f"models:/{NAME}/1"}
    assert set(trace("models:/n/2").descendants) == {f"models:/{NAME}/1"}
    assert found.descendants == {}
    assert main(["lineage", f"models:/{NAME}@production"]) == 0
    out = capsys.readouterr().out
    assert "models:/p/1" in out
    assert f"http://127.0.0.1:5000/#/models/{NAME}/versions/1" in out
    assert "@production" in out


def test_it_is_drawn_on_the_page_and_the_next_command_stays(made: dict[str, str]) -> None:
    client = mlflow.MlflowClient()
    describe_version(NAME, "1", "tflite", facts={"a": 1}, command="foxnas what comes next")
    assert main(["lineage", f"models:/{NAME}/1"]) == 0
    page = client.get_model_version(NAME, "1").description
    assert "[supernet: models:/s/1](#/models/s/versions/1) → [rows: " in page
    assert page.endswith("Next:\n\n    foxnas what comes next")
    client.update_model_version(NAME, "1", description="mine")
    assert main(["lineage", f"models:/{NAME}/1"]) == 0
    assert client.get_model_version(NAME, "1").description == "mine"


def test_what_is_gone_is_said_to_be(made: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    client = mlflow.MlflowClient()
    client.delete_model_version("p", "1")
    client.delete_registered_model("s")
    notes = {a.what: a.note for a in trace(NAME).ancestors}
    assert (notes["supernet"], notes["predictors"]) == ("is gone", "is gone")
    assert "rows" not in notes
    assert main(["lineage", "models:/nobody/1"]) == 2
    assert "no version of nobody" in capsys.readouterr().err


def test_the_documented_question_finds_the_best_model(tracking: str, tmp_path: Path, root: Path) -> None:
    for top1, latency, valid in ((70.0, 15.0, 1.0), (72.0, 18.0, 1.0), (75.0, 19.0, 0.0), (80.0, 40.0, 1.0)):
        figures = {"benchmark/latency_ms_p90": latency, "accuracy/int8_top1": top1, "benchmark/valid": valid}
        register_version(tmp_path, figures)
    text = (root / "docs" / "tasks" / "promotion.md").read_text(encoding="utf-8")
    (question,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "search_logged" in code]
    names: dict[str, Any] = {}
    exec(question, names)
    (model,) = names["models"]
    assert {metric.key: metric.value for metric in model.metrics}["accuracy/int8_top1"] == 72
