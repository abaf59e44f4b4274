"""What each gate says, and how the history reads."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.targets import BUILTIN_TARGETS
from foxnas_mlflow.tracking.gates import (
    ACCURACY,
    DROP,
    LATENCY,
    SUSTAINED,
    THROTTLED,
    THROTTLED_UNDER_LOAD,
    VALID,
    Candidate,
    Measured,
    judge,
    passed,
)
from foxnas_mlflow.tracking.history import Entry, former_versions, held_on, next_moment, read_history

FIGURES = {LATENCY: 40.0, VALID: 1.0, ACCURACY: 75.0, DROP: 0.4}
PI = "Raspberry Pi 4 Model B Rev 1.4"
BENCHMARK = Measured(run_id="run", figures={LATENCY: 40.0, VALID: 1.0}, target="rpi4", machine=PI, source="measured")
GOOD = Candidate(
    "2",
    FIGURES,
    (BENCHMARK,),
    {"weights": "trained"},
    weights="trained",
    target="rpi4",
    machine=BUILTIN_TARGETS["rpi4"].machine,
)


def changed(figures: dict[str, float | None] | None = None, **values: Any) -> Candidate:
    """The good version with other figures, or none; of its benchmark too."""
    merged = {key: value for key, value in {**FIGURES, **(figures or {})}.items() if value is not None}
    latencies = {key: merged[key] for key in (LATENCY, VALID) if key in merged}
    benchmarks = (measured(figures=latencies),) if LATENCY in merged else ()
    return dataclasses.replace(GOOD, **{"figures": merged, "benchmarks": benchmarks, **values})


def measured(**values: Any) -> Measured:
    return dataclasses.replace(BENCHMARK, **values)


def timed(latency_ms: float, valid: float = 1.0, **values: Any) -> Measured:
    return measured(figures={LATENCY: latency_ms, VALID: valid}, **values)


def failed(candidate: Candidate, holder: Candidate | None = None, max_latency_ms: float = 60) -> dict[str, str]:
    verdicts = judge(candidate, holder, max_latency_ms=max_latency_ms, max_accuracy_drop=1)
    return {v.gate: v.text for v in verdicts if not v.passed}


def test_a_good_version_passes_at_the_limits() -> None:
    assert failed(GOOD) == {}
    assert failed(changed({LATENCY: 60.0, DROP: 1.0, VALID: 1.0})) == {}
    # As earlier releases sealed a drop of one image in a hundred.
    assert failed(changed({DROP: 100 * 0.28 - 100 * 0.27})) == {}
    assert failed(changed({LATENCY: 999.0}), max_latency_ms=0) == {}
    assert failed(changed({DROP: -0.2})) == {}  # int8 can be better by chance
    assert passed(judge(changed(tags={}), None, max_latency_ms=60, max_accuracy_drop=1))


@pytest.mark.parametrize(("throttled", "told"), [({}, True), ({THROTTLED: 0.0}, False)])
def test_throttling_that_nobody_saw_is_unknown(throttled: dict[str, float], told: bool) -> None:
    candidate = changed(benchmarks=(measured(figures={LATENCY: 40.0, VALID: 1.0, **throttled}),))
    (verdict,) = (v for v in judge(candidate, None, max_latency_ms=60, max_accuracy_drop=1) if v.gate == "valid")
    assert verdict.passed
    assert ("throttled is unknown" in verdict.text) == told


def test_a_minute_under_load_is_not_taken_back_by_a_moment() -> None:
    minute = measured(run_id="minute", figures={LATENCY: 40.0, SUSTAINED: 80.0, VALID: 1.0, THROTTLED_UNDER_LOAD: 1.0})
    candidate = changed(benchmarks=(timed(50.0, run_id="moment"), minute))
    assert failed(candidate) == {
        "latency": "p90 80 ms of a minute under load (run minute, which newer ones of a moment do not replace) > 60 ms"
    }
    (valid,) = (v for v in judge(candidate, None, max_latency_ms=90, max_accuracy_drop=1) if v.gate == "valid")
    assert valid.text.endswith("throttled under load, which its latency there tells")
    # A newer minute does, and one that is of another machine or not valid never counted.
    better = measured(figures={LATENCY: 40.0, SUSTAINED: 50.0, VALID: 1.0})
    assert failed(changed(benchmarks=(better, minute))) == {}
    spoilt = dataclasses.replace(minute, figures={**minute.figures, VALID: 0.0})
    assert failed(changed(benchmarks=(timed(50.0), spoilt, dataclasses.replace(minute, machine="AMD EPYC")))) == {}


@pytest.mark.parametrize(
    ("candidate", "gates", "words"),
    [
        (changed({LATENCY: 60.1}), {"latency"}, "p90 60.1 ms > 60 ms"),
        (changed({LATENCY: 60.0004}), {"latency"}, "p90 60.0004 ms > 60 ms"),
        (changed({LATENCY: None}), {"measured", "valid", "latency"}, "run foxnas benchmark"),
        (changed({VALID: 0.0}), {"valid"}, "benchmark.json"),
        (changed({VALID: None}), {"valid"}, "run foxnas benchmark"),
        (changed({DROP: 1.5}), {"quantization"}, "1.5 points of top-1 > 1"),
        (changed({DROP: 1.004}), {"quantization"}, "1.004 points of top-1 > 1"),
        (changed({DROP: float("nan")}), {"quantization"}, "nan points of top-1"),
        (changed({DROP: float("-inf")}), {"quantization"}, "-inf points of top-1"),
        (changed({DROP: None}), {"quantization"}, "run foxnas quantize"),
        (changed(benchmarks=(measured(source="cost_model"),)), {"measured"}, "cost model"),
        (changed(benchmarks=(measured(emulated=True),)), {"measured"}, f"measured on {PI} (emulated), target rpi4"),
        (changed(benchmarks=(measured(source=""),)), {"measured"}, "run run does not say what was measured"),
        (
            changed(benchmarks=(measured(target="cpu", machine="AMD EPYC"),)),
            {"measured", "valid", "latency"},
            "measured on AMD EPYC, target cpu, but the version is for target rpi4",
        ),
        (
            # Who says rpi4 on a PC is not believed.
            changed(benchmarks=(measured(machine="AMD EPYC"),)),
            {"measured", "valid", "latency"},
            "measured on AMD EPYC, target rpi4, but the version is for target rpi4 (Raspberry Pi",
        ),
        (
            changed(threads=1, benchmarks=(measured(threads=4),)),
            {"measured", "valid", "latency"},
            f"measured on {PI}, target rpi4, 4 threads, but the version is for target rpi4",
        ),
        (changed(sealed=False), {"intact"}, "logged by an earlier release"),
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
    another = timed(latency, machine="Raspberry Pi Compute Module 4 Rev 1.0")
    assert failed(GOOD, dataclasses.replace(holder, benchmarks=(another,))) == {}
    assert failed(GOOD, dataclasses.replace(holder, benchmarks=(timed(latency, threads=4),))) == {}
    assert failed(GOOD, dataclasses.replace(holder, figures={})) == {}


def test_accuracies_on_other_images_or_of_other_classes_are_not_compared() -> None:
    def said(**holders: Any) -> str:
        mine = dataclasses.replace(GOOD, evaluated_digest="a1", labels=("A", "B"))
        better = changed({ACCURACY: 98.0, LATENCY: 0.2}, version="1", **holders)
        verdict = judge(mine, better, max_latency_ms=60, max_accuracy_drop=1)[-1]
        return f"{verdict.word} {verdict.text}"

    assert (
        said(evaluated_digest="b2", labels=("A", "B")) == "pass not comparable: version 1 was evaluated on other images"
    )
    assert said(evaluated_digest="b2", labels=("0", "1", "2")) == (
        "pass not comparable. BEWARE: version 1 answers 0, 1, 2, this one A, B: what reads its answers must know them"
    )
    assert "BEWARE: version 1 answers B, A, this one A, B" in said(evaluated_digest="a1", labels=("B", "A"))
    assert said(evaluated_digest="a1", labels=("A", "B")).startswith("FAIL beaten on both")
    # As releases before told nothing of either.
    assert said().startswith("FAIL beaten on both")


@pytest.mark.parametrize(
    ("mine", "holders", "beaten"),
    [
        # Both for a minute under load: by that; else by what both have.
        ({SUSTAINED: 50.0}, {SUSTAINED: 45.0}, True),
        ({SUSTAINED: 50.0}, {SUSTAINED: 55.0}, False),
        ({SUSTAINED: 50.0}, {LATENCY: 45.0}, False),
        ({SUSTAINED: 50.0}, {LATENCY: 39.0}, True),
        ({}, {LATENCY: 39.0, SUSTAINED: 45.0}, True),
    ],
)
def test_a_minute_under_load_is_compared_with_one(
    mine: dict[str, float], holders: dict[str, float], beaten: bool
) -> None:
    candidate = changed(benchmarks=(measured(figures={**BENCHMARK.figures, **mine}),))
    holder = changed({ACCURACY: 76.0}, version="1", benchmarks=(measured(figures={**BENCHMARK.figures, **holders}),))
    assert ("holder" in failed(candidate, holder)) == beaten


def test_which_of_several_measurements_counts() -> None:
    foreign = timed(1.0, target="cpu", machine="AMD EPYC")
    emulated, busy = timed(900.0, emulated=True), timed(80.0, valid=0.0)
    for benchmarks, latency_ms in (
        # The newest first. What is of another machine never counts, and an emulator's time not beside a real one.
        ((foreign, emulated, timed(41.0), timed(39.0)), 41.0),
        # A measurement that was disturbed takes nothing from one that was not.
        ((busy, timed(42.0)), 42.0),
        ((busy, emulated), 80.0),
        ((emulated, foreign), 900.0),
        ((foreign,), None),
        ((), None),
    ):
        assert changed(benchmarks=benchmarks).latency_ms == latency_ms
    # An earlier release did not say with how many threads a version's target runs.
    assert changed(benchmarks=(measured(threads=4),)).latency_ms == 40.0
    assert changed(benchmarks=(measured(threads=4), timed(41.0, threads=1)), threads=1).latency_ms == 41.0
    # A version for no target in particular takes what there is.
    assert changed(benchmarks=(foreign,), target="", machine="").latency_ms == 1.0


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
