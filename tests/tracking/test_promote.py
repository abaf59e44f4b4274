"""Promotion on a real registry: gates, alias and stage, history, rollback, and refusals that move nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import PERMISSION_DENIED

from foxnas_mlflow.cli.main import main
from foxnas_mlflow.flavor import MODEL_FORMAT, model_id_of
from foxnas_mlflow.tracking.holders import StageKeeper
from tests.versions import NAME, log_measurement, register_version, state

pytestmark = pytest.mark.server

LIMITS = ["--max-latency-ms", "60", "--max-accuracy-drop", "1"]


def promote(model: str, stage: str = "Production", *more: str) -> int:
    return main(["promote", "--model", model, "--stage", stage, *LIMITS, *more])


def last_run() -> mlflow.entities.Run:
    return mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.stage` = 'promote'", max_results=1)[0]


def document() -> dict[str, Any]:
    return json.loads(mlflow.artifacts.load_text(f"runs:/{last_run().info.run_id}/promotion.json"))


def test_a_version_goes_through_the_stages(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_version(tmp_path)
    assert promote(f"models:/{NAME}/1", "Staging") == 0
    out = capsys.readouterr().out
    assert "p90 40 ms <= 60 ms" in out
    # With the limits that were asked for.
    assert f"Next: foxnas promote --model models:/{NAME}@staging --stage Production --max-latency-ms 60.0\n" in out
    assert state() == {"aliases": {"staging": "1"}, "stages": {"1": "Staging"}}
    assert promote(f"models:/{NAME}@staging") == 0
    # A version has one stage: it left staging.
    assert state() == {"aliases": {"production": "1"}, "stages": {"1": "Production"}}

    register_version(tmp_path, {"accuracy/int8_top1": 76.0})
    assert promote(NAME) == 0  # the newest
    assert state() == {"aliases": {"production": "2"}, "stages": {"1": "Archived", "2": "Production"}}
    run = last_run()
    assert run.info.status == "FINISHED"
    written = document()
    assert (written["version"], written["former"], written["holder"]) == ("2", "1", "2")
    assert written["run_id"] == run.info.run_id
    assert [v["gate"] for v in written["verdicts"] if v["passed"]] == [
        "intact",
        "weights",
        "measured",
        "valid",
        "latency",
        "quantization",
        "holder",
    ]
    latency = next(v for v in written["verdicts"] if v["gate"] == "latency")
    assert (latency["value"], latency["limit"]) == (40.0, 60.0)
    tags = mlflow.MlflowClient().get_model_version(NAME, "2").tags
    assert tags["gate.latency"] == "pass: p90 40 ms <= 60 ms"
    assert tags["gates"] == "passed for Production"
    assert tags["promotion_run"] == run.info.run_id
    description = mlflow.MlflowClient().get_model_version(NAME, "2").description
    assert "| latency p90, ms | 40 |" in description
    assert "| measured on | Raspberry Pi 4 Model B Rev 1.4, target rpi4 |" in description
    assert run.info.run_name == "promote"
    mlflow.MlflowClient().update_model_version(NAME, "2", description="mine")
    # Again: nothing changes, and the history has no second entry.
    assert promote(f"models:/{NAME}/production") == 0
    assert mlflow.MlflowClient().get_model_version(NAME, "2").description == "mine"
    assert [e.version for e in StageKeeper(NAME).history("Production")] == ["1", "2"]


@pytest.mark.parametrize(
    ("made", "gate", "words"),
    [
        ({"figures": {"benchmark/latency_ms_p90": None}}, "measured", "run foxnas benchmark"),
        ({"latency_source": "cost_model"}, "measured", "cost model"),
        ({"weights": "random", "tags": {"weights": "trained"}}, "weights", "random and tagged trained"),
    ],
)
def test_a_gate_that_fails_moves_nothing(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], made: dict[str, Any], gate: str, words: str
) -> None:
    register_version(tmp_path)
    assert promote(f"models:/{NAME}/1") == 0
    register_version(tmp_path, **made)
    before = state()
    assert promote(f"models:/{NAME}/2") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert words in line
    assert "nothing was moved" in line
    assert state() == before
    run = last_run()
    assert run.info.status == "FAILED"
    written = document()
    assert gate in [v["gate"] for v in written["verdicts"] if not v["passed"]]
    assert written["holder"] == "1"
    tags = mlflow.MlflowClient().get_model_version(NAME, "2").tags
    assert tags[f"gate.{gate}"].startswith("FAIL: ")
    assert tags["gates"] == "failed for Production"


@pytest.mark.parametrize(
    ("made", "words"),
    [
        ({"measured_for": "cpu", "machine": "AMD EPYC"}, "measured on AMD EPYC, target cpu, but the version is for"),
        ({"machine": "AMD EPYC"}, "measured on AMD EPYC, target rpi4, but the version is for target rpi4 (Raspberry"),
        (
            {"machine": "Raspberry Pi 400 Rev 1.0"},
            "measured on Raspberry Pi 400 Rev 1.0, target rpi4, but the version is",
        ),
        ({"emulated": True}, "(emulated), target rpi4: benchmark on the board itself"),
    ],
)
def test_figures_of_another_machine_never_count(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], made: dict[str, Any], words: str
) -> None:
    """Not by an edited tag either: what a figure is of stays with the figure."""
    register_version(tmp_path, **made)
    claim_the_board(NAME, "1")
    assert promote(f"models:/{NAME}/1") == 2
    assert words in capsys.readouterr().err


def test_a_copy_has_no_other_figures(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    client = mlflow.MlflowClient()
    register_version(tmp_path, machine="AMD EPYC")
    model_id = model_id_of(client.get_model_version(NAME, "1"))
    assert model_id is not None
    mlflow.register_model(f"models:/{model_id}", NAME)
    client.copy_model_version(f"models:/{NAME}/1", "shelf")
    for name, number in ((NAME, "2"), ("shelf", "1")):
        claim_the_board(name, number)
        assert promote(f"models:/{name}/{number}") == 2
        assert "measured on AMD EPYC, target rpi4, but the version is for target rpi4" in capsys.readouterr().err
    # Measured on the board, all three are what they were registered from.
    log_measurement(model_id, {"benchmark/latency_ms_p90": 40.0, "benchmark/valid": 1.0})
    for name, number in ((NAME, "1"), (NAME, "2"), ("shelf", "1")):
        assert promote(f"models:/{name}/{number}") == 0
        assert str(client.get_model_version_by_alias(name, "production").version) == number


def test_a_version_whose_logged_model_was_deleted(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)
    client = mlflow.MlflowClient()
    client.copy_model_version(f"models:/{NAME}/1", "shelf")
    model_id = str(model_id_of(client.get_model_version("shelf", "1")))
    client.delete_logged_model(model_id)
    assert promote("shelf") == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert f"received models:/shelf/1, whose model {model_id} was deleted; make it again with foxnas quantize" in line


def fast_figures_in_the_run_of_another(slow: str) -> None:
    """As after a call of `log_metrics` with the wrong model's id."""
    log_measurement(slow, {"benchmark/latency_ms_p90": 20.0, "benchmark/valid": 1.0}, data=b"another file")


def fast_figures_without_a_measurement(slow: str) -> None:
    tags = {"foxnas.latency_source": "measured", "foxnas.target": "rpi4", "foxnas.emulated": "false"}
    with mlflow.start_run(tags={**tags, "foxnas.board": "Raspberry Pi 4 Model B Rev 1.4"}):
        mlflow.log_metrics({"benchmark/latency_ms_p90": 20.0, "benchmark/valid": 1.0}, model_id=slow)


def fast_figures_after_the_measurement(slow: str) -> None:
    with mlflow.start_run(run_id=benchmark_run()):
        mlflow.log_metrics({"benchmark/latency_ms_p90": 20.0}, model_id=slow)


def sustained(slow: str) -> None:
    """Fast for a moment; under load it is not."""
    figures = {"benchmark/latency_ms_p90": 20.0, "benchmark/sustained_p90_ms": 90.0, "benchmark/valid": 1.0}
    log_measurement(slow, figures)


def less_than_a_minute(slow: str) -> None:
    """A second under load is none."""
    figures = {"benchmark/latency_ms_p90": 90.0, "benchmark/sustained_p90_ms": 20.0, "benchmark/valid": 1.0}
    log_measurement(slow, figures, sustained_seconds=59.0)


def benchmark_run() -> str:
    (run,) = mlflow.MlflowClient().search_runs(["0"], "tags.`foxnas.stage` = 'benchmark'", max_results=1)
    return str(run.info.run_id)


@pytest.mark.parametrize(
    ("trick", "words"),
    [
        (fast_figures_in_the_run_of_another, "latency: p90 90 ms > 60 ms"),
        (fast_figures_without_a_measurement, "latency: p90 90 ms > 60 ms"),
        (fast_figures_after_the_measurement, "latency: p90 90 ms > 60 ms"),
        (sustained, "latency: p90 90 ms of a minute under load > 60 ms"),
        (less_than_a_minute, "latency: p90 90 ms > 60 ms"),
    ],
)
def test_a_latency_is_what_its_own_measurement_says(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], trick: Callable[[str], None], words: str
) -> None:
    register_version(tmp_path, {"benchmark/latency_ms_p90": 90.0})
    trick(str(model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1"))))
    assert promote(NAME) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("figures", "trick", "words"),
    [
        ({}, fast_figures_in_the_run_of_another, "measured another file than the version's"),
        ({}, fast_figures_without_a_measurement, "does not say what was measured"),
        ({"benchmark/latency_ms_p90": float("nan")}, None, "p90 nan ms is no latency"),
        ({"benchmark/latency_ms_p90": -5.0}, None, "p90 -5 ms is no latency"),
    ],
)
def test_figures_that_are_none(
    tracking: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    figures: dict[str, float],
    trick: Callable[[str], None] | None,
    words: str,
) -> None:
    register_version(tmp_path, {"benchmark/latency_ms_p90": None, **figures})
    if trick is not None:
        trick(str(model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1"))))
    assert promote(NAME) == 2
    assert words in capsys.readouterr().err


def test_tags_of_a_measurement_make_no_other_machine_of_it(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path, machine="AMD EPYC", emulated=True)
    for key, value in {"board": "Raspberry Pi 4 Model B Rev 1.4", "emulated": "false"}.items():
        mlflow.MlflowClient().set_tag(benchmark_run(), f"foxnas.{key}", value)
    assert promote(NAME) == 2
    assert "measured on AMD EPYC (emulated), target rpi4, but the version is for" in capsys.readouterr().err
    # Neither does a file that nothing reads, or with a word where a number is expected.
    document = mlflow.artifacts.load_dict(f"runs:/{benchmark_run()}/benchmark.json")
    for text in (
        "{",
        json.dumps({**document, "latency_ms_p90": "fast"}),
        json.dumps({**document, "valid": []}),
        json.dumps({**document, "windows": [{}]}),
    ):
        mlflow.MlflowClient().log_text(benchmark_run(), text, "benchmark.json")
        assert promote(NAME) == 2
        assert "does not say what was measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("target", "details", "threads"), [("rpi4", {}, 1), ("my-board", {"machine": "Raspberry Pi", "threads": 4}, 4)]
)
def test_other_threads_are_another_board(
    tracking: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    target: str,
    details: dict[str, object],
    threads: int,
) -> None:
    register_version(tmp_path, {"benchmark/latency_ms_p90": None}, target=target, details=details)
    model_id = str(model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1")))
    figures = {"benchmark/latency_ms_p90": 40.0, "benchmark/valid": 1.0}
    log_measurement(model_id, figures, target=target, threads=5 - threads)
    assert promote(NAME) == 2
    err = capsys.readouterr().err
    assert f"but the version is for target {target} with {threads} thread(s): run foxnas benchmark there" in err
    log_measurement(model_id, figures, target=target, threads=threads)
    assert promote(NAME) == 0


def test_an_accuracy_is_what_the_model_was_sealed_with(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path, {"accuracy/quantization_drop": 5.0})
    client = mlflow.MlflowClient()
    model_id = model_id_of(client.get_model_version(NAME, "1"))
    maker = str(client.get_logged_model(str(model_id)).source_run_id)
    for run_id in (None, maker):
        with mlflow.start_run(run_id=run_id):
            mlflow.log_metrics({"accuracy/quantization_drop": 0.1, "accuracy/int8_top1": 99.0}, model_id=model_id)
        assert promote(NAME) == 2
        assert "int8 loses 5 points of top-1 > 1" in capsys.readouterr().err


def test_a_target_in_the_tag_alone_counts_too(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path, target="", tags={"target": "rpi4"}, measured_for="cpu", machine="AMD EPYC")
    assert promote(NAME) == 2
    assert "measured on AMD EPYC, target cpu, but the version is for target rpi4" in capsys.readouterr().err


def test_the_holder_is_compared_whatever_its_tags_say(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    worse = {"accuracy/int8_top1": 70.0, "benchmark/latency_ms_p90": 30.0}
    register_version(tmp_path, {"accuracy/int8_top1": 80.0, "benchmark/latency_ms_p90": 20.0}, details=of_images("a1"))
    assert promote(NAME) == 0
    client = mlflow.MlflowClient()
    client.set_model_version_tag(NAME, "1", "target", "cpu")
    client.set_model_version_tag(NAME, "1", "evaluated_digest", "b2")
    log_measurement(
        str(model_id_of(client.get_model_version(NAME, "1"))),
        {"benchmark/latency_ms_p90": 900.0, "benchmark/valid": 1.0},
        target="cpu",
        machine="AMD EPYC",
    )
    # There are more images to train on now.
    register_version(tmp_path, worse, details=of_images("a1", "more"))
    assert promote(NAME) == 2
    assert "beaten on both: 70.00 %, 30 ms against 80.00 %, 20 ms of version 1" in capsys.readouterr().err
    register_version(tmp_path, worse, details=of_images("b2"))
    assert promote(f"models:/{NAME}/3") == 0
    assert "not comparable: version 1 was evaluated on other images" in capsys.readouterr().out


def of_images(digest: str, all_of: str = "all") -> dict[str, object]:
    return {"provenance": {"data_digest": all_of, "evaluated_digest": digest}}


def test_no_rollback_to_files_that_were_changed(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for top1 in (75.0, 76.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME) == 0
    model_id = model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1"))
    (file,) = tmp_path.glob(f"**/{model_id}/artifacts/data/model.tflite")
    file.write_bytes(file.read_bytes() + b"\0")
    assert promote(NAME, "Production", "--rollback") == 2
    assert "a rollback goes to a version whose files are as they were logged" in capsys.readouterr().err
    assert state()["aliases"] == {"production": "2"}


def claim_the_board(name: str, number: str) -> None:
    """Tags of a version as if it had been measured on its board."""
    claimed = {"emulated": "false", "benchmark_device": "board", "benchmark_target": "rpi4", "weights": "trained"}
    for key, value in claimed.items():
        mlflow.MlflowClient().set_model_version_tag(name, number, key, value)


def test_a_measurement_that_was_deleted_counts_no_more(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs(["0"], "tags.`foxnas.stage` = 'benchmark'")
    client.delete_run(run.info.run_id)
    assert promote(NAME) == 2
    assert "no measured latency" in capsys.readouterr().err


def test_a_measurement_that_may_not_be_read_is_left_out_and_named(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)
    model_id = str(model_id_of(mlflow.MlflowClient().get_model_version(NAME, "1")))
    hidden = log_measurement(model_id, {"benchmark/latency_ms_p90": 20.0, "benchmark/valid": 1.0})
    hide(monkeypatch, hidden)
    assert promote(NAME) == 0
    assert "p90 40 ms <= 60 ms" in capsys.readouterr().out
    measured = next(v for v in document()["verdicts"] if v["gate"] == "measured")
    assert measured["text"].endswith(f"; you may not read what was measured in {hidden}")


def test_a_holder_whose_measurement_may_not_be_read_keeps_its_stage(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path, {"accuracy/int8_top1": 80.0, "benchmark/latency_ms_p90": 20.0})
    assert promote(NAME) == 0
    hidden = benchmark_run()
    register_version(tmp_path, {"accuracy/int8_top1": 70.0, "benchmark/latency_ms_p90": 30.0})
    hide(monkeypatch, hidden)
    assert promote(NAME) == 2
    assert f"version 1 was measured in run {hidden}, which you may not read" in capsys.readouterr().err


def hide(monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    """Let this user not read a run."""
    store = mlflow.store.tracking.sqlalchemy_store.SqlAlchemyStore
    get = store.get_run

    def refuse(self: Any, run_id: str) -> Any:
        if run_id == hidden:
            raise MlflowException("Permission denied", error_code=PERMISSION_DENIED)
        return get(self, run_id)

    monkeypatch.setattr(store, "get_run", refuse)


def test_labels_that_were_swapped_are_not_promoted(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)
    (file,) = tmp_path.glob("**/artifacts/data/foxnas.json")
    manifest = json.loads(file.read_text())
    manifest["metadata"]["labels"].reverse()
    file.write_text(json.dumps(manifest))
    assert promote(NAME) == 2
    assert "changed together with their checksums" in capsys.readouterr().err
    assert state() == {"aliases": {}, "stages": {"1": "None"}}


def test_better_on_one_side_is_enough(tracking: str, tmp_path: Path) -> None:
    register_version(tmp_path)
    assert promote(NAME) == 0
    register_version(tmp_path, {"benchmark/latency_ms_p90": 39.0, "accuracy/int8_top1": 74.0})
    register_version(tmp_path, {"benchmark/latency_ms_p90": 50.0}, machine="Raspberry Pi Compute Module 4 Rev 1.0")
    assert promote(f"models:/{NAME}/2") == 0
    # Milliseconds of two boards say nothing about each other.
    assert promote(f"models:/{NAME}/3") == 0
    assert "not comparable" in mlflow.MlflowClient().get_model_version(NAME, "3").tags["gate.holder"]


def test_dry_run_moves_nothing(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_version(tmp_path)
    assert promote(NAME, "Production", "--dry-run") == 0
    assert "nothing was moved" in capsys.readouterr().out
    assert state() == {"aliases": {}, "stages": {"1": "None"}}
    model = mlflow.MlflowClient().get_registered_model(NAME)
    assert not model.tags
    assert "gates" not in mlflow.MlflowClient().get_model_version(NAME, "1").tags
    assert document()["dry_run"] is True
    assert main(["promote", "--model", NAME, "--max-latency-ms", "39", "--dry-run"]) == 2


def test_rollback_and_history(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = datetime.now(UTC)
    for top1 in (75.0, 76.0, 77.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME) == 0
    assert promote(f"models:/{NAME}/1", "Production", "--rollback") == 2
    assert "a rollback leaves the version that holds the stage" in capsys.readouterr().err
    assert promote(NAME, "Production", "--rollback", "--dry-run") == 0
    assert state()["aliases"] == {"production": "3"}
    assert promote(f"models:/{NAME}@production", "Production", "--rollback") == 0
    assert state() == {"aliases": {"production": "2"}, "stages": {"1": "Archived", "2": "Production", "3": "Archived"}}
    assert document()["action"] == "rollback"
    assert promote(NAME, "Production", "--rollback") == 0
    assert state()["aliases"] == {"production": "1"}
    assert promote(NAME, "Production", "--rollback") == 2
    assert "held the stage before" in capsys.readouterr().err
    history = StageKeeper(NAME).history("Production")
    assert [(e.version, e.action) for e in history] == [
        ("1", "promote"),
        ("2", "promote"),
        ("3", "promote"),
        ("2", "rollback"),
        ("1", "rollback"),
    ]
    assert all(start <= e.since <= datetime.now(UTC) for e in history)
    moment = history[2].since.isoformat()
    assert main(["promote", "--history", "--model", NAME, "--stage", "Production", "--date", moment]) == 0
    out = capsys.readouterr().out
    assert "version 3" in out
    assert "version 2" not in out
    assert main(["promote", "--history", "--model", NAME, "--stage", "Production", "--date", "2020-01-01"]) == 0
    assert "nobody" in capsys.readouterr().out
    assert main(["promote", "--history", "--model", NAME, "--stage", "Production"]) == 0
    assert capsys.readouterr().out.count("version") == 5
    assert main(["promote", "--history", "--model", NAME, "--date", "yesterday"]) == 2


def test_a_rollback_of_staging_does_not_take_the_production_version(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for top1 in (75.0, 76.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME, "Staging") == 0
    assert promote(f"models:/{NAME}/1") == 0
    assert promote(NAME, "Staging", "--rollback") == 2
    assert f"{NAME} has none for Staging but version 1, which holds Production" in capsys.readouterr().err
    assert document()["error"]
    assert state()["aliases"] == {"production": "1", "staging": "2"}
    register_version(tmp_path, {"accuracy/int8_top1": 77.0})
    assert promote(NAME, "Staging") == 0
    assert promote(f"models:/{NAME}/2") == 0
    # Of versions 1 and 2, which held staging before, the nearest serves now.
    assert promote(NAME, "Staging", "--rollback") == 0
    assert state()["aliases"] == {"production": "2", "staging": "1"}


def test_a_pipeline_asks_a_version_that_serves_whether_it_still_may(tracking: str, tmp_path: Path) -> None:
    from foxnas_mlflow import MainRequest
    from foxnas_mlflow.workflows.main import _Pipeline
    from foxnas_mlflow.workflows.promote import PromoteResult

    class AlwaysDone(_Pipeline):
        def _step(self, name: str, result: Any, inputs: Any, after: Any, do: Any, **more: Any) -> Any:
            return do([], {})

    register_version(tmp_path)
    assert promote(f"models:/{NAME}/1") == 0
    asked = AlwaysDone(MainRequest(target="rpi4"), *[None] * 5)  # type: ignore[arg-type]
    result: PromoteResult = asked._promote(f"models:/{NAME}/1")
    assert (result.stage, document()["holder"]) == ("Production", "1")
    assert state() == {"aliases": {"production": "1"}, "stages": {"1": "Production"}}


def test_a_registry_that_fails_is_no_reason_to_go_back_further(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for top1 in (75.0, 76.0, 77.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME) == 0
    store = mlflow.store.model_registry.sqlalchemy_store.SqlAlchemyStore
    get = store.get_model_version

    def fail(self: Any, name: str, version: str) -> Any:
        if str(version) == "2":
            raise MlflowException("the disk of the database is full")
        return get(self, name, version)

    with monkeypatch.context() as patch:
        patch.setattr(store, "get_model_version", fail)
        assert promote(NAME, "Production", "--rollback") == 2
    assert "the disk of the database is full" in capsys.readouterr().err
    assert state()["aliases"] == {"production": "3"}
    assert promote(NAME, "Production", "--rollback") == 0
    assert state()["aliases"] == {"production": "2"}


def test_archived_withdraws_a_version(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for top1 in (75.0, 76.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME) == 0
    assert promote(f"models:/{NAME}/2", "Archived") == 0
    assert state() == {"aliases": {}, "stages": {"1": "Archived", "2": "Archived"}}
    assert f"{NAME} version 2 is archived and holds no stage and no alias." in capsys.readouterr().out
    assert [e.version for e in StageKeeper(NAME).history("Production")] == ["1", "2", None]
    # What was withdrawn is nothing to go back to.
    assert promote(NAME, "Production", "--rollback") == 0
    assert state()["aliases"] == {"production": "1"}
    # An alias of one's own is no stage.
    mlflow.MlflowClient().set_registered_model_alias(NAME, "champion", "2")
    assert promote(f"models:/{NAME}/2", "Archived") == 0
    assert "holds no stage; other aliases of it stay: champion." in capsys.readouterr().out


def test_what_others_moved_is_noted_and_mended(tracking: str, tmp_path: Path) -> None:
    client = mlflow.MlflowClient()
    for top1 in (75.0, 76.0, 77.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
    with pytest.warns(FutureWarning, match="stages"):
        client.transition_model_version_stage(NAME, "1", "Production")
    assert StageKeeper(NAME).holder("Production") == "1"  # a registry that knew stages only
    assert promote(f"models:/{NAME}/2") == 0
    assert state()["stages"] == {"1": "Archived", "2": "Production", "3": "None"}
    client.set_registered_model_alias(NAME, "production", "3")
    assert promote(f"models:/{NAME}/3") == 0
    assert state() == {"aliases": {"production": "3"}, "stages": {"1": "Archived", "2": "Archived", "3": "Production"}}
    history = StageKeeper(NAME).history("Production")
    assert [e.version for e in history] == ["1", "2", "3"]
    assert history[0].action == "outside"
    assert promote(NAME, "Staging") == 2
    assert "the production version does not go back to staging" in document()["error"]
    assert document()["verdicts"] == []
    client.delete_model_version(NAME, "2")
    assert promote(NAME, "Production", "--rollback") == 0  # 2 is gone
    assert state()["aliases"] == {"production": "1"}


def test_a_registry_without_stages(tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Unity Catalog, whose own client raises this error before it asks its server."""
    from mlflow.store._unity_catalog.registry.rest_store import UcModelRegistryStore
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore

    monkeypatch.setattr(
        SqlAlchemyStore, "transition_model_version_stage", UcModelRegistryStore.transition_model_version_stage
    )
    for top1 in (75.0, 76.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
        assert promote(NAME, "Staging") == 0
        assert promote(NAME) == 0
    assert state() == {"aliases": {"production": "2"}, "stages": {"1": "None", "2": "None"}}
    assert document()["stages"] is False
    assert promote(NAME, "Production", "--rollback") == 0
    assert state()["aliases"] == {"production": "1"}
    assert promote(f"models:/{NAME}@production", "Archived") == 0
    assert state()["aliases"] == {}


def test_without_rights_nothing_moves(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)
    before = state()
    mlflow.set_registry_uri(f"sqlite:///file:{tmp_path / 'mlflow.db'}?mode=ro&uri=true")
    assert promote(NAME) == 2
    error = capfd.readouterr().err
    assert "the right to change the registered model" in error
    assert "Traceback" not in error
    mlflow.set_registry_uri(tracking)
    assert state() == before


@pytest.mark.parametrize("denied", ["transition_model_version_stage", "set_registered_model_tag"])
def test_with_half_the_rights_the_alias_goes_back(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, denied: str
) -> None:
    for top1 in (75.0, 76.0):
        register_version(tmp_path, {"accuracy/int8_top1": top1})
    assert promote(f"models:/{NAME}/1") == 0
    before = state()

    def refuse(*args: object, **kwargs: object) -> None:
        raise MlflowException("Permission denied", error_code=7)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow.store.model_registry.sqlalchemy_store.SqlAlchemyStore, denied, refuse)
        assert promote(f"models:/{NAME}/2") == 2
    assert state()["aliases"] == before["aliases"]
    assert promote(f"models:/{NAME}/1") == 0
    assert state() == before


def test_a_registry_that_takes_no_text_stops_nothing(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register_version(tmp_path)

    def refuse(*args: object, **kwargs: object) -> None:
        raise MlflowException("Permission denied", error_code=7)

    monkeypatch.setattr(mlflow.store.model_registry.sqlalchemy_store.SqlAlchemyStore, "update_registered_model", refuse)
    assert promote(f"models:/{NAME}/1") == 0
    assert "did not take everything: Permission denied; the work goes on." in capsys.readouterr().err
    assert state()["aliases"] == {"production": "1"}


def test_bad_input(tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    register_version(tmp_path)
    cases = [
        ([], "give --model"),
        (["--model", f"models:/{NAME}/7"], "has the versions 1"),
        (["--model", "models:/nobody"], "no version of nobody"),
        (["--model", f"models:/{NAME}@staging"], "registered version"),
        (["--model", "runs:/abc/model"], "models:/name"),
        (["--model", f"models:/{NAME}/1/2"], "models:/name"),
        (["--model", NAME, "--stage", "Prod"], "stage must be"),
        (["--model", NAME, "--max-latency-ms", "-1"], "0 or more"),
        (["--model", NAME, "--max-accuracy-drop", "nan"], "finite"),
        (["--model", NAME, "--stage", "Archived", "--rollback"], "Staging or Production"),
        (["--model", NAME, "--rollback"], "held the stage before"),
    ]
    for argv, words in cases:
        assert main(["promote", *argv]) == 2
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
        assert words in line, line
    assert state() == {"aliases": {}, "stages": {"1": "None"}}


@pytest.mark.parametrize("damage", ["changed", "newer", "kind", "gone", "foreign"])
def test_files_that_are_not_as_logged(
    tracking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    register_version(tmp_path)
    (file,) = tmp_path.glob("**/artifacts/data/foxnas.json")
    text = file.read_text()
    words = {"changed": "as they were logged", "newer": "format from 1 to", "kind": "kind must be one of"}
    if damage == "changed":
        with (file.parent / "model.tflite").open("ab") as model:
            model.write(b"\0")
    elif damage == "newer":
        file.write_text(text.replace(f'"format": {MODEL_FORMAT}', '"format": 99'))
    elif damage == "kind":
        file.write_text(text.replace('"kind": "tflite"', '"kind": "onnx"'))
    elif damage == "gone":
        (file.parents[1] / "MLmodel").unlink()
    else:
        description = file.parents[1] / "MLmodel"
        description.write_text(description.read_text().replace("  foxnas:", "  other:"))
    assert promote(NAME) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("foxnas:")]
    assert words.get(damage, "") in line
    assert state() == {"aliases": {}, "stages": {"1": "None"}}
    assert last_run().info.status == "FAILED"
    assert document()["error"]
