"""What every source of latencies must do: say what its numbers are."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement, Timing, append_measurement, read_measurements
from foxnas_mlflow.core.space import SearchSpace


class TimerSuite:
    """Tests of a function from an architecture to a `Timing`; a subclass says which."""

    def space(self) -> SearchSpace:
        """The space whose networks it times.

        Raises:
            NotImplementedError: If the subclass does not say which.
        """
        raise NotImplementedError

    def timer(self) -> Callable[[Architecture], Timing]:
        """The source of latencies.

        Raises:
            NotImplementedError: If the subclass does not say which.
        """
        raise NotImplementedError

    def test_latencies_are_positive_and_say_what_they_are(self) -> None:
        """A measurement names its device, runtime and number of runs; an estimate claims none of them."""
        for architecture, timing in self._timed():
            assert math.isfinite(timing.latency_ms), architecture
            assert timing.latency_ms > 0, architecture
            assert timing.source in ("measured", "cost_model")
            if timing.source == "measured":
                assert timing.device
                assert timing.runtime
                assert timing.n_runs >= 1
            else:
                assert (timing.device, timing.n_runs, timing.emulated) == ("", 0, False)

    def test_an_estimate_is_the_same_again(self) -> None:
        """A cost model has no noise."""
        time = self.timer()
        for architecture, timing in self._timed():
            if timing.source == "cost_model":
                assert time(architecture) == timing

    def test_rows_keep_a_latency_and_leave_out_what_is_not_to_be_trusted(self) -> None:
        """A row of ``measurements.csv`` has the latency and its source, or none where it has problems."""
        with tempfile.TemporaryDirectory(prefix="foxnas-") as directory:
            path = Path(directory, "measurements.csv")
            timed = self._timed()
            for architecture, timing in timed:
                append_measurement(Measurement.of(architecture, timing, accuracy=50.0), path)
            for row, (architecture, timing) in zip(read_measurements(path), timed, strict=True):
                assert row.architecture == architecture
                assert row.timing == (None if timing.problems else timing)

    def _timed(self) -> list[tuple[Architecture, Timing]]:
        time, space = self.timer(), self.space()
        drawn = space.sample(np.random.default_rng(0), n=2, image_size=space.image_sizes[0])
        return [(a, time(a)) for a in (space.smallest(space.image_sizes[0]), *drawn)]
