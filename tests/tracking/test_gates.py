"""What each gate says, and how the history reads."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.tracking.gates import ACCURACY, DROP, LATENCY, VALID, Candidate, judge, passed
from foxnas_mlflow.tracking.history import Entry, former_versions, held_on, next_moment, read_history

FIGURES = {LATENCY: 40.0, VALID: 1.0, ACCURACY: 75.0, DROP: 0.4}
GOOD = Candidate(
    "2", FIGURES, {"weights": "trained", "emulated": "false", "benchmark_device": "board"}, weights="trained"
)


def changed(figures: dict[str, float | None] | None = None, **values: Any) -> Candidate:
    merged = {key: value for key, value in {**FIGURES, **(figures or {})}.items() if value is not None}
    return dataclasses.replace(GOOD, figures=merged, **values)


def failed(candidate: Candidate, holder: Candidate | None = None, max_latency_ms: float = 60) -> dict[str, str]:
    verdicts = judge(candidate, holder, max_latency_ms=max_latency_ms, max_accuracy_drop=1)
    return {v.gate: v.text for v in verdicts if not v.passed}


def test_a_good_version_passes_at_the_limits() -> None:
    assert failed(GOOD) == {}
    assert failed(changed({LATENCY: 60.0, DROP: 1.0, VALID: 1.0})) == {}
    assert failed(changed({LATENCY: 999.0}), max_latency_ms=0) == {}
    assert failed(changed({DROP: -0.2})) == {}  # int8 can be better by chance
    assert passed(judge(changed(tags={}), None, max_latency_ms=60, max_accuracy_drop=1))


@pytest.mark.parametrize(
    ("candidate", "gates", "words"),
    [
        (changed({LATENCY: 60.1}), {"latency"}, "p90 60.1 ms > 60 ms"),
        (changed({LATENCY: None}), {"measured", "latency"}, "run foxnas benchmark"),
        (changed({VALID: 0.0}), {"valid"}, "benchmark.json"),
        (changed({VALID: None}), {"valid"}, "run foxnas benchmark"),
        (changed({DROP: 1.5}), {"quantization"}, "1.5 points of top-1 > 1"),
        (changed({DROP: None}), {"quantization"}, "run foxnas quantize"),
        (changed(latency_source="cost_model"), {"measured"}, "cost model"),
        (
            changed(tags={"emulated": "true", "benchmark_device": "qemu"}),
            {"measured"},
            "measured on qemu, which is emulated",
        ),
        (changed(weights="random"), {"weights"}, "only trained weights"),
        (changed(tags={"weights": "none"}), {"weights"}, "only trained weights"),
        (changed(weights="none", tags={}), {"weights"}, "weights are none"),
    ],
)
def test_each_gate_fails_alone(candidate: Candidate, gates: set[str], words: str) -> None:
    said = failed(candidate)
    assert set(said) == gates
    assert words in " ".join(said.values())


@pytest.mark.parametrize(
    ("accuracy", "latency", "beaten"),
    [(76.0, 39.0, True), (76.0, 40.0, False), (75.0, 39.0, False), (74.0, 30.0, False), (80.0, 41.0, False)],
)
def test_only_better_on_both_keeps_the_stage(accuracy: float, latency: float, beaten: bool) -> None:
    holder = changed({ACCURACY: accuracy, LATENCY: latency}, version="1")
    assert ("holder" in failed(GOOD, holder)) == beaten
    # Milliseconds of two boards, or figures that are not there, say nothing.
    assert failed(GOOD, dataclasses.replace(holder, tags={"benchmark_device": "another"})) == {}
    assert failed(GOOD, dataclasses.replace(holder, figures={})) == {}


START = datetime(2026, 11, 1, 12, tzinfo=UTC)


def entries(*moves: tuple[str | None, str]) -> list[Entry]:
    return [Entry(START + timedelta(days=i), version, action) for i, (version, action) in enumerate(moves)]


def test_history_round_trips_and_merges() -> None:
    made = entries(("1", "promote"), ("2", "promote"), (None, "archive"), ("2", "promote"))
    tags = dict(e.tag("production") for e in reversed(made))
    assert read_history(tags, "production") == made
    assert read_history(tags, "staging") == []
    # Another client noted version 1 first and did not know who had promoted it.
    early = Entry(START - timedelta(seconds=1), "1", "outside")
    merged = read_history(dict([early.tag("production"), *tags.items()]), "production")
    assert merged[0] == Entry(early.since, "1", "promote")
    assert merged[1:] == made[1:]
    foreign = {"foxnas.production.owner": "vision", "foxnas.production.2026-11-01T12:00:00.000000Z": "[]"}
    assert read_history(foreign, "production") == []
    ahead = [Entry(datetime.now(UTC) + timedelta(hours=1), "1", "promote")]
    assert next_moment(ahead) > ahead[0].since


def test_who_held_the_stage() -> None:
    made = entries(("1", "promote"), ("2", "promote"), (None, "archive"))
    for moment, versions in {
        "2026-10-31": [],
        "2026-11-01": ["1"],
        "2026-11-02": ["1", "2"],
        "2026-11-02T11:59": ["1"],
        "2026-11-02T12:00": ["2"],
        "2026-11-02T13:00+02:00": ["1"],
        "2026-11-04": [],
    }.items():
        assert [i.version for i in held_on(made, moment)] == versions, moment
    with pytest.raises(InvalidInputError, match="ISO 8601"):
        held_on(made, "yesterday")


@pytest.mark.parametrize(
    ("moves", "former"),
    [
        ([], []),
        ([("1", "promote")], []),
        ([("1", "promote"), ("2", "promote"), ("3", "promote")], ["2", "1"]),
        ([("1", "promote"), ("2", "promote"), ("3", "promote"), ("2", "rollback")], ["1"]),
        ([("1", "promote"), ("2", "promote"), ("1", "promote")], ["2"]),
        ([("1", "promote"), ("2", "promote"), (None, "archive")], ["1"]),
    ],
)
def test_where_a_rollback_goes(moves: list[tuple[str | None, str]], former: list[str]) -> None:
    assert former_versions(entries(*moves)) == former
