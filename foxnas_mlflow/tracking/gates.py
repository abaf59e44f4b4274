"""Gates: what a version must show before it is promoted.

A gate judges figures that belong to the version itself, logged with its `model_id`, and the files
that were logged. It says what it saw: the verdict, the numbers, and what to run when a number is
missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

LATENCY = "benchmark/latency_ms_p90"
VALID = "benchmark/valid"
ACCURACY = "accuracy/int8_top1"
DROP = "accuracy/quantization_drop"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of a version.

    Attributes:
        version: The version's number.
        figures: Latest value of every metric of its model.
        tags: Tags of the version.
        kind: Kind of the model.
        weights: What its sealed description says: ``trained``, ``none`` or ``random``.
        sha256: Checksum of its main file, which was verified.
        latency_source: ``measured`` or ``cost_model``: tag of the run that logged its latency, or empty.
    """

    version: str
    figures: Mapping[str, float]
    tags: Mapping[str, str] = field(default_factory=dict)
    kind: str = "tflite"
    weights: str = ""
    sha256: str = ""
    latency_source: str = ""

    @property
    def device(self) -> str:
        """What its latency was measured on, or empty."""
        return self.tags.get("benchmark_device", "")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one gate says.

    Attributes:
        gate: Name of the gate.
        passed: Whether the version passes.
        text: The numbers, and what to do when they are missing.
        value: The figure that was judged, if the gate judges one.
        limit: What it was compared with.
    """

    gate: str
    passed: bool
    text: str
    value: float | None = None
    limit: float | None = None

    @property
    def word(self) -> str:
        """``pass`` or ``FAIL``."""
        return "pass" if self.passed else "FAIL"


def judge(
    candidate: Candidate, holder: Candidate | None, *, max_latency_ms: float, max_accuracy_drop: float
) -> list[Verdict]:
    """Ask every gate.

    Args:
        candidate: The version that is to be promoted.
        holder: The version that holds the stage now, or None.
        max_latency_ms: Largest 90th percentile of the measured latency; 0: any.
        max_accuracy_drop: Most points of top-1 that quantization may cost.
    """
    return [
        Verdict("intact", True, f"files as logged, kind {candidate.kind}, sha256 {candidate.sha256[:12]}"),
        _weights(candidate),
        _measured(candidate),
        _valid(candidate),
        _latency(candidate, max_latency_ms),
        _drop(candidate, max_accuracy_drop),
        _holder(candidate, holder),
    ]


def _weights(candidate: Candidate) -> Verdict:
    # The tag can be edited, the model's own description is sealed: neither may say otherwise.
    said = {candidate.weights, candidate.tags.get("weights", candidate.weights)}
    text = f"weights are {' and tagged '.join(sorted(said))}"
    if said == {"trained"}:
        return Verdict("weights", True, text)
    return Verdict("weights", False, f"{text}; only trained weights are promoted")


def _measured(candidate: Candidate) -> Verdict:
    on = f" on {candidate.device}" if candidate.device else ""
    if LATENCY not in candidate.figures:
        return Verdict("measured", False, "no measured latency: run foxnas benchmark on this version")
    if candidate.latency_source == "cost_model":
        return Verdict("measured", False, "the latency comes from the cost model: run foxnas benchmark with a device")
    if candidate.tags.get("emulated", "false").lower() == "true":
        return Verdict("measured", False, f"measured{on}, which is emulated: benchmark on the board itself")
    return Verdict("measured", True, f"measured{on}, not emulated")


def _valid(candidate: Candidate) -> Verdict:
    valid = candidate.figures.get(VALID)
    if valid is None:
        return Verdict("valid", False, "no benchmark: run foxnas benchmark on this version")
    text = "the benchmark is valid" if valid == 1 else "the benchmark is not valid: its benchmark.json tells why"
    return Verdict("valid", valid == 1, text, valid, 1)


def _latency(candidate: Candidate, limit: float) -> Verdict:
    value = candidate.figures.get(LATENCY)
    if value is None:
        return Verdict("latency", False, "no p90 latency: run foxnas benchmark on this version", limit=limit or None)
    if not limit:
        return Verdict("latency", True, f"p90 {value:.4g} ms, no limit given", value)
    passed = value <= limit
    return Verdict("latency", passed, f"p90 {value:.4g} ms {'<=' if passed else '>'} {limit:g} ms", value, limit)


def _drop(candidate: Candidate, limit: float) -> Verdict:
    value = candidate.figures.get(DROP)
    if value is None:
        return Verdict(
            "quantization", False, "no quantization drop: run foxnas quantize with labelled images", limit=limit
        )
    passed = value <= limit
    text = f"int8 loses {value:.3g} points of top-1 {'<=' if passed else '>'} {limit:g}"
    return Verdict("quantization", passed, text, value, limit)


def _holder(candidate: Candidate, holder: Candidate | None) -> Verdict:
    if holder is None:
        return Verdict("holder", True, "nobody holds the stage")
    if holder.version == candidate.version:
        return Verdict("holder", True, "it holds the stage itself")
    pairs = [(c.figures.get(ACCURACY), c.figures.get(LATENCY)) for c in (candidate, holder)]
    (accuracy, latency), (held_accuracy, held_latency) = pairs
    who = f"version {holder.version}"
    if accuracy is None or latency is None or held_accuracy is None or held_latency is None:
        return Verdict("holder", True, f"not comparable: {who} or this one lacks accuracy or latency")
    if candidate.device != holder.device:
        return Verdict("holder", True, f"not comparable: {who} was measured on {holder.device or 'an unknown device'}")
    numbers = f"{accuracy:.2f} %, {latency:.4g} ms against {held_accuracy:.2f} %, {held_latency:.4g} ms of {who}"
    if held_accuracy > accuracy and held_latency < latency:
        return Verdict("holder", False, f"beaten on both: {numbers}")
    return Verdict("holder", True, f"not beaten on both: {numbers}")


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether every gate passes."""
    return all(verdict.passed for verdict in verdicts)
