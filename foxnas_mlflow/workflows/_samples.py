"""Logging sampled subnets: a metric a row, the table while it grows, and what it says in the end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import DeviceError
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.sampling import front_width
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.core.targets import Target
from foxnas_mlflow.tracking.inputs import MEASUREMENTS, NOISE_FLOOR, TrainedSupernet
from foxnas_mlflow.tracking.run import EntryRun, best_effort
from foxnas_mlflow.workflows._timers import Timer

_UPLOAD_SECONDS = 30
_LOG_SECONDS = 2
_STOP_EVERY = 5
"""Rows between two looks at the front."""


class SampleLog:
    """Logs a sampling's rows, metrics and problems while it runs.

    Args:
        run: The open run.
        path: ``measurements.csv``, copied to the run now and then.
        timer: Where latencies come from.
        n_images: Validation images behind each accuracy.
        before: Rows of an earlier sampling.

    Attributes:
        n_before: How many these are.
        problems: Why a measurement of a subnet does not count, by subnet; others of it may.
        width: Widest prediction interval (points) on the front, when it was looked at last.
        stopped: Whether it was narrow enough.
    """

    def __init__(
        self, run: EntryRun, path: Path, timer: Timer, *, n_images: int, before: Sequence[Measurement]
    ) -> None:
        self.timer, self.n_images, self.n_before = timer, n_images, len(before)
        # Of several boards each row names its own.
        measured = [row for row in before if row.latency_source == "measured" and timer.n_boards == 1]
        self._machines = {row.device.partition(" at ")[0] for row in measured if row.device}
        self.problems: dict[Architecture, str] = {}
        self.emulated = False
        self.width: float | None = None
        self.stopped = False
        self.path = path
        self._run = run
        self._uploaded = self._logged = time.monotonic()
        self._pending: dict[str, dict[int, float]] = {}
        self._series = best_effort(run.log_series)
        self._metrics, self._artifact = best_effort(run.log_metrics), best_effort(run.log_artifact)

    def time(self, architecture: Architecture) -> Timing:
        """The subnet's latency; what is wrong with it is kept.

        Raises:
            DeviceError: If another machine measured the rows of before: an address may lead to another board.
        """
        timing = self.timer.time(architecture)
        if self._machines and timing.source == "measured" and timing.device not in self._machines:
            raise DeviceError(
                "the rows of a sampling are measured on one machine",
                received=f"{timing.device}, and {self.n_before} rows of {', '.join(sorted(self._machines))}",
                remedy="measure on that machine again, or begin anew with another --seed",
            )
        self.emulated |= timing.emulated
        if timing.problems:
            self.problems[architecture] = "; ".join(timing.problems)
        return timing

    def add(self, row: Measurement, n: int) -> None:
        """Log the n-th row; a tracking server that is away does not stop the work."""
        values = {"accuracy": row.accuracy, "latency_ms": row.latency_ms}
        known = {f"sample/{key}": value for key, value in values.items() if value is not None}
        for key, value in {**known, "sample/standard_error": self.standard_error([row])}.items():
            self._pending.setdefault(key, {})[n] = value
        if time.monotonic() - self._logged > _LOG_SECONDS:
            self._log_pending()
        if time.monotonic() - self._uploaded > _UPLOAD_SECONDS:
            self._artifact(self.path)
            self._uploaded = time.monotonic()

    def _log_pending(self) -> None:
        """Log the metrics of the rows since the last time, in batches."""
        for key, values in self._pending.items():
            self._series(key, values)
        self._pending = {}
        self._logged = time.monotonic()

    def upload(self) -> None:
        """Copy the rows and their metrics to the run."""
        self._log_pending()
        if self.path.exists():
            self._run.log_artifact(self.path)

    def narrow(self, rows: Sequence[Measurement], space: SearchSpace, width: float, seed: int) -> bool:
        """Whether predictors fitted to the rows know accuracies along their front to `width` points."""
        if len(rows) % _STOP_EVERY:
            return False
        self.width = front_width(rows, space, latency=self.timer.predictors, seed=seed)
        if self.width is not None:
            self._metrics({"sample/front_width": self.width}, step=len(rows))
        self.stopped = self.width is not None and self.width <= width
        return self.stopped

    def standard_error(self, rows: Sequence[Measurement]) -> float:
        """Root mean square of the accuracies' standard errors, in points: the noise that no fit can explain."""
        shares = np.array([row.accuracy for row in rows if row.accuracy is not None]) / 100
        return 100 * math.sqrt(float(np.mean(shares * (1 - shares))) / self.n_images)


def log_samples(
    run: EntryRun, rows: Sequence[Measurement], log: SampleLog, *, supernet: TrainedSupernet, target: Target
) -> tuple[str, str]:
    """Log the whole table, and say what was found.

    Returns:
        URI of the table, and the lines that a person reads.
    """
    log.upload()
    run.log_table(pd.read_csv(log.path), "tables/measurements.json")
    floor = log.standard_error(rows)
    problems = [log.problems[r.architecture] for r in rows if r.latency_ms is None and r.architecture in log.problems]
    run.log_metrics({"sample/n_samples": len(rows), NOISE_FLOOR: floor})
    run.set_tags(
        {
            **({"foxnas.emulated": "true"} if log.emulated else {}),
            **({"foxnas.invalid_measurements": len(problems)} if problems else {}),
            **({"foxnas.stopped_early": "true"} if log.stopped else {}),
            **({"foxnas.boards_set_aside": ", ".join(log.timer.aside)} if log.timer.aside else {}),
        }
    )
    uri = f"runs:/{run.run_id}/{MEASUREMENTS}"
    accuracies = [row.accuracy for row in rows if row.accuracy is not None]
    latencies = [row.latency_ms for row in rows if row.latency_ms is not None]
    before = f", {log.n_before} of them from before" if log.n_before else ""
    lines = [
        f"Sampled {len(rows)} subnets of {supernet.uri}{before}.",
        f"  accuracy    {min(accuracies):.2f} to {max(accuracies):.2f} % top-1 of {log.n_images:,} validation images "
        f"of {supernet.dataset.source}, standard error {floor:.2f} points",
    ]
    if latencies:
        word = {"measured": "measured on", "cost_model": "estimated by the"}[log.timer.source]
        lines.append(
            f"  latency     {min(latencies):.3g} to {max(latencies):.3g} ms, {len(latencies)} subnets {word} "
            f"{log.timer.where}{' (emulated: no real times)' if log.emulated else ''}"
        )
    for name in sorted({name for row in rows for name in row.quantities}):
        values = [row.quantities[name] for row in rows if name in row.quantities]
        lines.append(f"  {name:<11} {min(values):.3g} to {max(values):.3g}, {len(values)} subnets")
    lines += [f"  set aside   {board}: {why}" for board, why in log.timer.aside.items()]
    if problems:
        lines.append(f"  left out    {len(problems)} latencies that cannot be trusted, the last: {problems[-1]}")
    if log.width is not None:
        early = "stopped: " if log.stopped else ""
        lines.append(f"  front       {early}accuracies along it are known to {log.width:.2f} points (95 % intervals)")
    lines.append(f"  rows        {uri}")
    lines.append(f"Next: foxnas fit --measurements {uri} --target {target.argument}")
    return uri, "\n".join(lines)
