"""Gates: what a version must show before it is promoted.

A gate judges figures of the logged model itself, found by its id, and the files that were logged.
A latency, and what it is of (file, machine, emulated, valid), is taken from the document that the
measurement left in its run: metrics and tags can be written by anybody to any run, and travel with
copies. An accuracy is that of the model's own sealed description. It says what it saw: the verdict,
the numbers, and what to run when a number is missing.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from foxnas_mlflow.tracking.registry import shortened

LATENCY = "benchmark/latency_ms_p90"
SUSTAINED = "benchmark/sustained_p90_ms"
SUSTAINED_SECONDS = 60.0
"""Least time under load of which a 90th percentile is judged: it is that of a whole minute."""

VALID = "benchmark/valid"
THROTTLED = "benchmark/throttled"
THROTTLED_UNDER_LOAD = "benchmark/throttled_under_load"
ACCURACY = "accuracy/int8_top1"
DROP = "accuracy/quantization_drop"


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Latencies of one run, and what they are of.

    Attributes:
        run_id: The run.
        figures: What it measured, as metrics; a time under load is that of a whole minute.
        target: Name of the target that was measured for, or empty.
        machine: The machine in one line, or empty where nothing tells.
        emulated: Whether its processor was emulated.
        source: ``measured`` or ``cost_model``, or empty where nothing tells.
        sha256: Checksum of the file that was measured.
        unsigned: What is wrong with its signature; empty: nothing, or none is asked for.
        threads: Threads of the runtime, or 0 where nothing tells.
    """

    run_id: str
    figures: Mapping[str, float]
    target: str = ""
    machine: str = ""
    emulated: bool = False
    source: str = ""
    sha256: str = ""
    unsigned: str = ""
    threads: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether it was measured, on hardware that exists, by somebody who is trusted."""
        return self.source == "measured" and bool(self.machine) and not self.emulated and not self.unsigned

    @property
    def latency_ms(self) -> float | None:
        """The 90th percentile that is judged: of the last minute under load, where that was asked for."""
        return self.figures.get(SUSTAINED, self.figures.get(LATENCY))

    def __str__(self) -> str:
        """What it is of, for people."""
        words = "an unknown machine" if not self.machine else self.machine
        threads = f", {self.threads} threads" if self.threads > 1 else ""
        return f"{words}{' (emulated)' if self.emulated else ''}, target {self.target or 'unknown'}{threads}"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What is known of a version.

    Attributes:
        version: The version's number.
        figures: Figures of its model; latencies count from `benchmarks` alone.
        benchmarks: Runs that logged a latency of its model, the newest first.
        tags: Tags of the version.
        kind: Kind of the model.
        weights: What its sealed description says: ``trained``, ``none`` or ``random``.
        sha256: Checksum of its main file, which was verified.
        target: The target that it was made for, by its sealed description; empty: none in particular.
        machine: Regular expression of the machines of that target; empty: any.
        threads: Threads of that target; 0: any number, as nothing tells.
        sealed: Whether its manifest is the one that the registry has; False: the registry has none.
        signature: What is wrong with its signature, or empty; None: no signature is asked for.
        unread: Runs that logged a latency of its model and may not be read by who asks.
        evaluated_digest: Digest of the images that its accuracy is of; empty where nothing tells.
        labels: Its classes in the order of its outputs; none where nothing tells.
    """

    version: str
    figures: Mapping[str, float]
    benchmarks: Sequence[Measured] = ()
    tags: Mapping[str, str] = field(default_factory=dict)
    kind: str = "tflite"
    weights: str = ""
    sha256: str = ""
    target: str = ""
    machine: str = ""
    threads: int = 0
    sealed: bool = True
    signature: str | None = None
    unread: Sequence[str] = ()
    evaluated_digest: str = ""
    labels: Sequence[str] = ()

    def suits(self, measured: Measured) -> bool:
        """Whether a latency is of the version's file, and of what the version is for."""
        return (
            self.is_of_file(measured)
            and (not self.target or measured.target == self.target)
            and bool(re.search(self.machine, measured.machine))
            and (self.threads == measured.threads or 0 in (self.threads, measured.threads))
        )

    def is_of_file(self, measured: Measured) -> bool:
        """Whether a latency is of the version's file; of a holder, whose file may be gone, that is not known."""
        return not self.sha256 or not measured.sha256 or measured.sha256 == self.sha256

    @property
    def benchmark(self) -> Measured | None:
        """The latency that counts: of its own target, machines and threads, the newest that is real and valid.

        One of a minute under load counts before all that tell of a moment: no later one takes it back.
        """
        suitable = [measured for measured in self.benchmarks if self.suits(measured)]
        real = [measured for measured in suitable if measured.is_measured]
        valid = [measured for measured in real if measured.figures.get(VALID) == 1]
        under_load = [measured for measured in valid if SUSTAINED in measured.figures]
        return next(iter(under_load or valid or real or suitable), None)

    @property
    def latency_ms(self) -> float | None:
        """The 90th percentile that counts."""
        return None if self.benchmark is None else self.benchmark.latency_ms

    def like(self, measured: Measured) -> Measured | None:
        """Its newest latency that is of the target, machine and threads of another version's, and valid."""
        real = (m for m in self.benchmarks if m.is_measured and m.figures.get(VALID) == 1)
        return next((m for m in real if str(m) == str(measured)), None)


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
        _intact(candidate),
        *_signature(candidate),
        _weights(candidate),
        _with_unread(_measured(candidate), candidate),
        _valid(candidate),
        _latency(candidate, max_latency_ms),
        _drop(candidate, max_accuracy_drop),
        _holder(candidate, holder),
    ]


def _intact(candidate: Candidate) -> Verdict:
    if not candidate.sealed:
        text = "the registry has no checksum of its files: it was logged by an earlier release; log it again"
        return Verdict("intact", False, text)
    return Verdict("intact", True, f"files as logged, kind {candidate.kind}, sha256 {candidate.sha256[:12]}")


def _signature(candidate: Candidate) -> list[Verdict]:
    if candidate.signature is None:
        return []
    return [Verdict("signature", not candidate.signature, candidate.signature or "signed with the key that was given")]


def _weights(candidate: Candidate) -> Verdict:
    # The tag can be edited, the model's own description is sealed: neither may say otherwise.
    said = {candidate.weights, candidate.tags.get("weights", candidate.weights)}
    text = f"weights are {' and tagged '.join(sorted(said))}"
    if said == {"trained"}:
        return Verdict("weights", True, text)
    return Verdict("weights", False, f"{text}; only trained weights are promoted")


def _with_unread(verdict: Verdict, candidate: Candidate) -> Verdict:
    """A verdict that names the measurements which are left out because they may not be read."""
    if not candidate.unread:
        return verdict
    return replace(verdict, text=f"{verdict.text}; you may not read what was measured in {', '.join(candidate.unread)}")


def _measured(candidate: Candidate) -> Verdict:
    found = candidate.benchmark
    if found is None and candidate.benchmarks and not any(map(candidate.is_of_file, candidate.benchmarks)):
        run_id = candidate.benchmarks[0].run_id
        text = f"run {run_id} measured another file than the version's: run foxnas benchmark on this version"
        return Verdict("measured", False, text)
    if found is None and candidate.benchmarks:
        newest, made_for = candidate.benchmarks[0], f"target {candidate.target or 'any'}"
        made_for += "" if re.search(candidate.machine, newest.machine) else f" ({candidate.machine})"
        made_for += f" with {candidate.threads} thread(s)" if candidate.threads not in (0, newest.threads) else ""
        text = f"measured on {newest}, but the version is for {made_for}: run foxnas benchmark there"
        return Verdict("measured", False, text)
    if found is None:
        return Verdict("measured", False, "no measured latency: run foxnas benchmark on this version")
    if found.unsigned:
        text = f"run {found.run_id}: {found.unsigned.rstrip('.')}: run foxnas benchmark with --signing-key"
        return Verdict("measured", False, text)
    if found.source == "cost_model":
        return Verdict("measured", False, "the latency comes from the cost model: run foxnas benchmark with a device")
    if found.emulated:
        return Verdict("measured", False, f"measured on {found}: benchmark on the board itself")
    if not found.is_measured:
        return Verdict("measured", False, f"run {found.run_id} does not say what was measured: run foxnas benchmark")
    return Verdict("measured", True, f"measured on {found}")


def _valid(candidate: Candidate) -> Verdict:
    valid = None if candidate.benchmark is None else candidate.benchmark.figures.get(VALID)
    if valid is None:
        return Verdict("valid", False, "no benchmark: run foxnas benchmark on this version")
    text = "the benchmark is valid" if valid == 1 else "the benchmark is not valid: its benchmark.json tells why"
    if valid == 1 and candidate.benchmark is not None and THROTTLED not in candidate.benchmark.figures:
        text += "; whether its machine was throttled is unknown"
    if valid == 1 and candidate.benchmark is not None and candidate.benchmark.figures.get(THROTTLED_UNDER_LOAD):
        text += "; its machine was throttled under load, which its latency there tells"
    return Verdict("valid", valid == 1, text, valid, 1)


def _latency(candidate: Candidate, limit: float) -> Verdict:
    value = candidate.latency_ms
    if value is None or candidate.benchmark is None:
        return Verdict("latency", False, "no p90 latency: run foxnas benchmark on this version", limit=limit or None)
    if not 0 < value < math.inf:
        text = f"p90 {value:g} ms is no latency: run foxnas benchmark on this version"
        return Verdict("latency", False, text, limit=limit or None)
    words = f"p90 {told(value, limit, 4)} ms"
    if SUSTAINED in candidate.benchmark.figures:
        words += " of a minute under load"
        newest = next(filter(candidate.suits, candidate.benchmarks))
        if newest is not candidate.benchmark:
            words += f" (run {candidate.benchmark.run_id}, which newer ones of a moment do not replace)"
    if not limit:
        return Verdict("latency", True, f"{words}, no limit given", value)
    passed = value <= limit
    return Verdict("latency", passed, f"{words} {'<=' if passed else '>'} {limit:g} ms", value, limit)


def _drop(candidate: Candidate, limit: float) -> Verdict:
    value = candidate.figures.get(DROP)
    if value is None:
        return Verdict(
            "quantization", False, "no quantization drop: run foxnas quantize with labelled images", limit=limit
        )
    # Models of earlier releases are sealed with the difference of two percentages, which errs in its last digits.
    value = round(value, 9)
    passed = -100 <= value <= limit
    text = f"int8 loses {told(value, limit)} points of top-1 {'<=' if passed else '>'} {limit:g}"
    return Verdict("quantization", passed, text, value, limit)


def told(value: float, limit: float, digits: int = 3) -> str:
    """A value with the fewest digits, but so many, that show on which side of a limit it lies."""
    texts = (f"{value:.{n}g}" for n in range(digits, 18))
    return next((text for text in texts if (float(text) <= limit) == (value <= limit)), str(value))


def _holder(candidate: Candidate, holder: Candidate | None) -> Verdict:
    if holder is None:
        return Verdict("holder", True, "nobody holds the stage")
    if holder.version == candidate.version:
        return Verdict("holder", True, "it holds the stage itself")
    who, measured = f"version {holder.version}", candidate.benchmark
    if candidate.labels and holder.labels and tuple(candidate.labels) != tuple(holder.labels):
        theirs, ours = (shortened(each.labels, 5) for each in (holder, candidate))
        text = f"not comparable. BEWARE: {who} answers {theirs}, this one {ours}: what reads its answers must know them"
        return Verdict("holder", True, text)
    digests = {candidate.evaluated_digest, holder.evaluated_digest}
    if "" not in digests and len(digests) > 1:
        return Verdict("holder", True, f"not comparable: {who} was evaluated on other images")
    # Whatever the holder's tags say it is for: milliseconds of one machine are compared.
    held = None if measured is None else holder.like(measured)
    if held is None and holder.unread:
        runs = " and ".join(holder.unread)
        return Verdict("holder", False, f"{who} was measured in run {runs}, which you may not read: ask for that right")
    if measured is not None and held is None and holder.benchmarks:
        return Verdict("holder", True, f"not comparable: {who} was measured on {holder.benchmarks[0]}")
    accuracy, held_accuracy = candidate.figures.get(ACCURACY), holder.figures.get(ACCURACY)
    # A minute under load beside a moment would tell of the two measurements, and not of the two models.
    both = [each.figures for each in (measured, held) if each is not None]
    figure = SUSTAINED if all(SUSTAINED in figures for figures in both) else LATENCY
    latency, held_latency = (None if each is None else each.figures.get(figure) for each in (measured, held))
    if accuracy is None or latency is None or held_accuracy is None or held_latency is None:
        return Verdict("holder", True, f"not comparable: {who} or this one lacks accuracy or latency")
    numbers = f"{accuracy:.2f} %, {latency:.4g} ms against {held_accuracy:.2f} %, {held_latency:.4g} ms of {who}"
    numbers += " in a minute under load" if figure == SUSTAINED else ""
    if held_accuracy > accuracy and held_latency < latency:
        return Verdict("holder", False, f"beaten on both: {numbers}")
    return Verdict("holder", True, f"not beaten on both: {numbers}")


def passed(verdicts: Sequence[Verdict]) -> bool:
    """Whether every gate passes."""
    return all(verdict.passed for verdict in verdicts)
