"""What a measurement says, and when it says that it cannot be trusted."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from foxnas_mlflow.core.errors import InvalidFormatError
from foxnas_mlflow.core.measurements import Timing
from foxnas_mlflow.runtime import float_level

FORMAT = 3

WINDOW_SECONDS = 10.0
"""Seconds of a window of the sustained load, but for the last one."""

MAX_HALVES_DIFFERENCE = 0.05
"""Largest relative difference between the medians of the first and the second half of the runs."""

WINDOW_RUNS = 5
"""Runs in a row whose median tells whether something disturbed them: fewer are a matter of luck."""

MIN_CPU_SHARE = 0.9
"""Least share of the time that one thread must have had a processor: company that stays is not seen in the halves."""

DISK_WAIT_SECONDS = 0.005
"""What a wait for memory on disk takes, about: where they explain half of the lost time, they are its reason."""

MAX_CLOCK_SHARE = 0.01
"""Largest share of the median that one tick of the clock may be."""

MAX_OUTPUT_LEVELS = 1.0
"""Largest difference from the host's outputs, in 8-bit levels.

Kernels for different processors round products differently by one level where they are not XNNPACK's.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Latency of one model on one machine.

    Attributes:
        latency_ms_p50: Median of single runs in ms; `_p90`, `_p99` their percentiles.
        latency_ms_mean: Mean in ms; `_std` the standard deviation of single runs.
        latency_ms_p50_low, latency_ms_p50_high: 95 % interval of the median, from order statistics.
        throughput_per_s: Images a second: batch / mean latency.
        peak_memory_bytes: Most memory of the measuring process, Python and runtime included.
        valid: Whether nothing speaks against the figures.
        invalid_reasons: What speaks against them.
        emulated: Whether the processor is emulated: its times say nothing of real hardware.
        n_runs: Timed runs.
        attempts: Measurements that it took: all before the last were not steady.
        threads, batch, warmup: Of the runtime; images a run (of inputs that are no images 1); asked runs before the
            timed ones.
        runtime: Runtime with version.
        device: The machine in one line.
        connection: The address that it was reached at.
        governor: Of the CPU's frequency, or empty where the machine does not tell; ``mixed`` where processors differ.
        temperature_c_start, temperature_c_end: In degrees Celsius, None where not told.
        throttled: Whether it was throttled until the timed runs ended, None where the machine does not tell.
        throttled_under_load: Whether it was after them, in the sustained load and while energy was measured: figures of
            that time are of a throttled board, as it will be. None where nothing tells, or neither was asked for.
        load_ms, first_invoke_ms: Loading the model, and its first run, in ms.
        edgetpu: Whether the Edge TPU ran it.
        output_difference: Largest difference from the host's outputs in 8-bit levels, see `output_difference`;
            None when nothing was compared.
        asked_runs: How many timed runs were asked for; fewer were made where the time limit ended them.
        frequency_mhz_start, frequency_mhz_end: Clock of the processor that ran it last, None where not told.
        quota: Processors' worth of time that a container's quota left; None without one.
        windows: Of the sustained load, ten seconds each: second, seconds, n_runs, p50_ms, p90_ms, temperature_c,
            frequency_mhz.
        sustained_p90_ms: 90th percentile of the last minute under load; None when it was not asked for.
        energy_mj: Energy of one inference above idling, in mJ; None when it was not asked for.
        energy_error_mj: Its error (95 %).
        idle_w, load_w: Power of the board idling and under load, in watts.
        power_meter: What measured it, or empty.
        model_sha256: Of the model file.
        samples_ms: Every timed run in ms, in order.
    """

    latency_ms_p50: float
    latency_ms_p90: float
    latency_ms_p99: float
    latency_ms_mean: float
    latency_ms_std: float
    latency_ms_p50_low: float
    latency_ms_p50_high: float
    throughput_per_s: float
    peak_memory_bytes: int
    valid: bool
    invalid_reasons: tuple[str, ...]
    emulated: bool
    n_runs: int
    attempts: int
    threads: int
    batch: int
    warmup: int
    runtime: str
    device: str
    connection: str
    governor: str
    temperature_c_start: float | None
    temperature_c_end: float | None
    throttled: bool | None
    load_ms: float
    first_invoke_ms: float
    edgetpu: bool
    output_difference: float | None
    model_sha256: str
    asked_runs: int
    frequency_mhz_start: float | None = None
    frequency_mhz_end: float | None = None
    quota: float | None = None
    windows: tuple[Mapping[str, float | None], ...] = ()
    sustained_p90_ms: float | None = None
    energy_mj: float | None = None
    energy_error_mj: float | None = None
    idle_w: float | None = None
    load_w: float | None = None
    power_meter: str = ""
    throttled_under_load: bool | None = None
    samples_ms: tuple[float, ...] = dataclasses.field(repr=False)

    @property
    def shared(self) -> bool | None:
        """Whether other processes had the processor meanwhile.

        None: with several threads, an Edge TPU, a quota that held it back or memory on disk waiting is not others'
        work alone, and nothing tells.
        """
        if self.threads > 1 or self.edgetpu or any(r.startswith((_HELD, _WAITED)) for r in self.invalid_reasons):
            return None
        return any(reason.startswith(_SHARED) for reason in self.invalid_reasons)

    @property
    def sustained_seconds(self) -> float:
        """Seconds under load without a pause after the timed runs; 0 when none were asked for."""
        if not self.windows:
            return 0.0
        last = self.windows[-1]
        # A document of an earlier release does not say how long its last window was.
        return float(last["second"] or 0.0) + float(last.get("seconds", WINDOW_SECONDS) or 0.0)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``benchmark.json``."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            "format": FORMAT,
            **{key: list(value) if isinstance(value, tuple) else value for key, value in values.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Benchmark:
        """Read ``benchmark.json``, also of formats 1 and 2, which lack what is in `_SINCE`.

        Raises:
            InvalidFormatError: If the format is newer, or keys are missing or unknown.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        if isinstance(data, Mapping) and data.get("format") in (1, 2):
            since = {name for number, keys in _SINCE.items() if number > data["format"] for name in keys}
            later = {field.name: field.default for field in dataclasses.fields(cls) if field.name in since}
            asked = {"asked_runs": data["n_runs"]} if data["format"] == 1 and "n_runs" in data else {}
            data = {**data, **later, **asked, "format": FORMAT}
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise InvalidFormatError(f"a benchmark must have format {FORMAT}", received=found)
        if set(data) - {"format"} != names:
            differing = sorted(map(str, (set(data) - {"format"}) ^ names))
            raise InvalidFormatError(
                "a benchmark has exactly its known keys", received=f"missing or unknown {differing}"
            )
        return cls(**{name: _tuple(data[name]) for name in names})

    def metrics(self) -> dict[str, float]:
        """The figures as MLflow metrics, ``benchmark/...``; what the machine does not tell is left out."""
        names = [f"latency_ms_{part}" for part in ("p50", "p90", "p99", "mean", "std")]
        names += ["throughput_per_s", "peak_memory_bytes", "valid", "temperature_c_start", "temperature_c_end"]
        names += ["throttled", "throttled_under_load", "sustained_p90_ms", "energy_mj", "energy_error_mj"]
        values = {name: getattr(self, name) for name in names}
        return {f"benchmark/{name}": float(value) for name, value in values.items() if value is not None}


def subnet_timing(benchmarks: Sequence[Benchmark]) -> Timing:
    """The latency of a subnet by one or more measurements of it on one machine: of their `undisturbed` runs.

    Runs of which some were disturbed are no problem then: what is sought is what the network costs, and not what the
    machine was like. Measurements with another problem do not count unless all have one.
    """
    problems = [tuple(r for r in each.invalid_reasons if not r.startswith((_HALVES, _LOST))) for each in benchmarks]
    good = [each for each, problem in zip(benchmarks, problems, strict=True) if not problem]
    runs = undisturbed(np.array([ms for each in good or benchmarks[-1:] for ms in each.samples_ms]))
    last = benchmarks[-1]
    return Timing(
        latency_ms=float(np.median(runs)),
        source="measured",
        device=last.device,
        # With one thread it is what every table has always said.
        runtime=with_threads(last.runtime, last.threads),
        n_runs=len(runs),
        problems=() if good else problems[-1],
        emulated=last.emulated,
    )


def with_energy(timing: Timing, benchmark: Benchmark) -> Timing:
    """The latency of a subnet, and the energy of an inference from a measurement of it.

    Unlike a latency, the energy is all that the machine drew meanwhile: company and throttling are in it.
    """
    problems = tuple(reason for reason in benchmark.invalid_reasons if not reason.startswith(_HALVES))
    energy_mj = benchmark.energy_mj or 0.0
    if benchmark.throttled_under_load:
        problems += ("the machine was throttled under load",)
    if not problems and not energy_mj > 0:
        problems += (f"{benchmark.power_meter} says {energy_mj:.3g} mJ an inference",)
    return dataclasses.replace(timing, quantities={"energy_mj": energy_mj}, problems=problems)


def with_threads(runtime: str, threads: int) -> str:
    """A runtime, and with how many threads where they are several: latencies of other ones are of another machine."""
    return runtime if threads == 1 else f"{runtime}, {threads} threads"


_SINCE: Mapping[int, Sequence[str]] = {
    2: (
        "frequency_mhz_start",
        "frequency_mhz_end",
        "quota",
        "windows",
        "sustained_p90_ms",
        "energy_mj",
        "energy_error_mj",
        "idle_w",
        "load_w",
        "power_meter",
    ),
    3: ("throttled_under_load",),
}
"""Keys that a format added, beside format 2's `asked_runs`."""


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


_ENERGY = ("energy_mj", "energy_error_mj", "idle_w", "load_w", "power_meter")


def summarize(
    answer: Mapping[str, Any],
    *,
    connection: str,
    threads: int,
    runs: int,
    warmup: int,
    attempts: int,
    edgetpu: bool,
    output_difference: float | None,
    max_output_levels: float,
) -> Benchmark:
    """Turn the board script's answer into figures, and judge them."""
    samples = np.asarray(answer["samples_ms"], dtype=np.float64)
    p50, p90, p99 = (float(value) for value in np.percentile(samples, (50, 90, 99)))
    low, high = median_interval(samples)
    reasons = invalid_reasons(
        samples,
        throttled=answer["throttled"],
        clock_tick_ms=answer["clock_tick_ms"],
        cpu_share=cpu_share(answer, threads=threads, edgetpu=edgetpu),
        quota=answer["quota"] if answer["quota_waits"] else None,
        disk_waits=answer["disk_waits"],
        seconds=answer["cpu_seconds"],
        output_difference=output_difference,
        max_output_levels=max_output_levels,
    )
    if answer["lost"]:
        reasons = (*reasons, f"{_LOST} {answer['lost']}")
    mean = float(samples.mean())
    return Benchmark(
        latency_ms_p50=p50,
        latency_ms_p90=p90,
        latency_ms_p99=p99,
        latency_ms_mean=mean,
        latency_ms_std=float(samples.std(ddof=1)) if len(samples) > 1 else 0.0,
        latency_ms_p50_low=low,
        latency_ms_p50_high=high,
        throughput_per_s=1000 * answer["batch"] / mean,
        valid=not reasons,
        invalid_reasons=reasons,
        n_runs=len(samples),
        asked_runs=runs,
        attempts=attempts,
        threads=threads,
        warmup=warmup,
        connection=connection,
        edgetpu=edgetpu,
        output_difference=output_difference,
        samples_ms=tuple(answer["samples_ms"]),
        windows=tuple(answer["windows"]),
        **{key: answer[key] for key in _ENERGY if key in answer},
        **{
            key: answer[key]
            for key in (
                "peak_memory_bytes",
                "emulated",
                "batch",
                "runtime",
                "device",
                "governor",
                "temperature_c_start",
                "temperature_c_end",
                "throttled",
                "throttled_under_load",
                "load_ms",
                "first_invoke_ms",
                "model_sha256",
                "frequency_mhz_start",
                "frequency_mhz_end",
                "quota",
                "sustained_p90_ms",
            )
        },
    )


_HELD = "a quota of"
_WAITED = "it waited for memory on disk"
_SHARED = "other processes had the processor for"
_HALVES = "the two halves of the runs differ by"
_LOST = "not all was measured:"
_DIFFERS = "the output differs from the host's by"


def what_helps(reasons: Collection[str]) -> str:
    """What to do where figures cannot be trusted, before measuring again; no quieter hour changes what is computed."""
    if any(_DIFFERS in reason for reason in reasons):
        return "update the machine's runtime, which computes something else"
    if reasons and all(reason.startswith(_LOST) for reason in reasons):
        return "look after the meter and the connection"
    if any(_WAITED in reason for reason in reasons):
        return "end other programs there or give it more memory, so that it does not swap (free -m)"
    return "quiet and cool the machine"


def invalid_reasons(
    samples: np.ndarray[Any, np.dtype[np.float64]],
    *,
    throttled: bool | None,
    clock_tick_ms: float,
    cpu_share: float | None = None,
    quota: float | None = None,
    disk_waits: int = 0,
    seconds: float = 0.0,
    output_difference: float | None = None,
    max_output_levels: float = MAX_OUTPUT_LEVELS,
) -> tuple[str, ...]:
    """Why figures cannot be trusted; empty when they can.

    Args:
        samples: Timed runs in ms, shape (n,).
        throttled: Whether the machine was throttled until the timed runs ended; None: unknown.
        clock_tick_ms: Smallest step of the clock in ms.
        cpu_share: Share of the time that the process had a processor; None: it says nothing.
        quota: Processors' worth of time to which a container's quota held the process back; None: it did not.
        disk_waits: How often it waited meanwhile for a page of memory that was on disk.
        seconds: How long that time was.
        output_difference: Largest difference from the host's outputs in 8-bit levels, or None.
        max_output_levels: How many of these it may be.
    """
    reasons = []
    if throttled:
        reasons.append("the machine was throttled")
    if quota is not None:
        share = "" if cpu_share is None else f" for {100 * (1 - cpu_share):.0f} % of the time"
        reasons.append(f"{_HELD} {quota:g} processors held it back{share}")
    elif cpu_share is not None and cpu_share < MIN_CPU_SHARE:
        paged = disk_waits * DISK_WAIT_SECONDS > (1 - cpu_share) * seconds / 2
        waited = f"{_WAITED} {disk_waits} times, and had no processor for" if paged else _SHARED
        reasons.append(f"{waited} {100 * (1 - cpu_share):.0f} % of the time")
    difference = halves_difference(samples)
    if difference > MAX_HALVES_DIFFERENCE:
        reasons.append(f"{_HALVES} {100 * difference:.1f} %")
    median = float(np.median(samples))
    if clock_tick_ms > MAX_CLOCK_SHARE * median:
        reasons.append(f"the clock ticks every {1000 * clock_tick_ms:g} us, the median is {1000 * median:g} us")
    if output_difference is not None and not output_difference <= max_output_levels:
        reasons.append(f"{_DIFFERS} {output_difference:g} levels")
    return tuple(reasons)


def output_difference(
    got: Sequence[np.ndarray[Any, np.dtype[Any]]], expected: Sequence[np.ndarray[Any, np.dtype[Any]]]
) -> float:
    """Largest difference between the outputs of two machines, in 8-bit levels.

    A level is 1 of an 8-bit output, 256 of a 16-bit one, and of a float one a thousandth of its largest value, but
    no less than a thousandth. Infinite where shapes, types or NaNs differ.
    """
    if [(a.shape, a.dtype) for a in got] != [(b.shape, b.dtype) for b in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(got, expected, strict=True):
        if a.size == 0 or np.array_equal(a, b, equal_nan=a.dtype.kind == "f"):
            continue
        x, y = a.astype(np.float64), b.astype(np.float64)
        level = 256.0 if a.dtype == np.int16 else 1.0
        if a.dtype.kind == "f":
            level = float_level(y)
        with np.errstate(invalid="ignore"):
            differences = np.where((x == y) | (np.isnan(x) & np.isnan(y)), 0.0, np.abs(x - y))
        largest = float(differences.max()) / level
        worst = max(worst, largest) if largest == largest else float("inf")
    return worst


def cpu_share(answer: Mapping[str, Any], *, threads: int, edgetpu: bool) -> float | None:
    """Share of the time that one computing thread had a processor; None where waiting is part of the work."""
    return None if threads > 1 or edgetpu else float(answer["cpu_share"])


def is_steady(answer: Mapping[str, Any], *, threads: int, edgetpu: bool) -> bool:
    """Whether nothing else worked on the machine meanwhile, as far as can be told."""
    share = cpu_share(answer, threads=threads, edgetpu=edgetpu)
    alone = share is None or share >= MIN_CPU_SHARE
    return alone and halves_difference(answer["samples_ms"]) <= MAX_HALVES_DIFFERENCE


def halves_difference(samples: Sequence[float] | np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """Relative difference between the medians of the first and the second half."""
    middle = len(samples) // 2
    if middle == 0:
        return 0.0
    first, second = float(np.median(samples[:middle])), float(np.median(samples[middle:]))
    return abs(first - second) / min(first, second)


def undisturbed(samples: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The runs that nothing disturbed, as far as can be told; on a quiet machine all.

    A machine that shares its processor is slower for a second or a minute, by up to half: the runs fall in two groups
    with nothing between them. A run counts where the median of the `WINDOW_RUNS` around it is
    at most `MAX_HALVES_DIFFERENCE` above the least such median.

    Args:
        samples: Timed runs in ms, in order, shape (n,).

    Examples:
        >>> from foxnas_mlflow.devices import undisturbed
        >>> [float(ms) for ms in undisturbed(np.array([2.0] * 7 + [3.0] * 9))]
        [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0]
    """
    if len(samples) <= WINDOW_RUNS:
        return samples
    windows = np.lib.stride_tricks.sliding_window_view(samples, WINDOW_RUNS)
    medians = np.median(windows, axis=1)
    fast = medians <= (1 + MAX_HALVES_DIFFERENCE) * medians.min()
    runs: np.ndarray[Any, np.dtype[np.float64]] = samples[np.pad(fast, WINDOW_RUNS // 2, mode="edge")]
    return runs


def median_interval(samples: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float]:
    """95 % interval of the median: order statistics at n/2 -+ 0.98 sqrt(n), the binomial's normal limits."""
    ordered = np.sort(samples)
    n = len(ordered)
    low = max(int(np.floor(n / 2 - 0.98 * np.sqrt(n))) - 1, 0)
    high = min(int(np.ceil(n / 2 + 0.98 * np.sqrt(n))), n - 1)
    return float(ordered[low]), float(ordered[high])
