"""What a network is searched for, as `search` and `main` are asked."""

from __future__ import annotations

from dataclasses import dataclass

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter


@dataclass(frozen=True, kw_only=True)
class GoalRequest(Request):
    """Limits and a goal; base of the requests that search."""

    latency_ms: tuple[float, ...] = parameter(
        (), "Latency limit in milliseconds, or several (10,20,40): a network each.", above=0
    )
    limits: str = parameter(
        "", "Further limits, comma separated: latency_ms<=20, int8_size_bytes<=2MB, peak_activation_bytes<=400kB."
    )
    objective: str = parameter(
        "accuracy",
        "What is to be best: accuracy, the least of a quantity (latency_ms, macs, ...) at min_accuracy, or the knee.",
    )
    min_accuracy: float | None = parameter(
        None,
        "Least predicted accuracy in percent; alone: the fastest network of it is found; empty: none.",
        above=0,
        below=100,
    )
    tolerance_points: str = parameter(
        "auto",
        "The fastest network at most so many points below the best one wins; auto: one standard error of the two.",
    )

    def check(self) -> None:
        """Limits can be read and stand once, and a goal has what it needs."""
        from foxnas_mlflow.core.searchers import KNEE, check_latencies, parse_limits

        super().check()
        _tolerance(self.tolerance_points)
        for latency_ms in self.latency_ms or (None,):
            parse_limits(self.limits, latency_ms=latency_ms)
        check_latencies(self.latency_ms or (None,), self.objective)
        if self.objective not in ("accuracy", KNEE) and self.min_accuracy is None:
            raise InvalidInputError(
                f"the least of {self.objective} is asked for at an accuracy", remedy="give min_accuracy in percent"
            )

    @property
    def is_open(self) -> bool:
        """Whether accuracy is to be largest and nothing limits it."""
        return self._is_unlimited and self.min_accuracy is None

    @property
    def goal(self) -> str:
        """What is to be best: the objective; where a least accuracy alone is given, the least latency."""
        return "latency_ms" if self._is_unlimited and self.min_accuracy is not None else self.objective

    @property
    def _is_unlimited(self) -> bool:
        return not self.latency_ms and not self.limits and self.objective == "accuracy"

    @property
    def asked_latency_ms(self) -> float | None:
        """The latency that was asked for, the first of several; None where none was."""
        from foxnas_mlflow.core.searchers import parse_limits

        limits = parse_limits(self.limits, latency_ms=next(iter(self.latency_ms), None))
        return next((limit.value for limit in limits if limit.quantity == "latency_ms"), None)

    @property
    def tolerance(self) -> float | None:
        """Points that a faster network may be below the best one; None: what the evidence cannot tell apart."""
        return _tolerance(self.tolerance_points)


def _tolerance(text: str) -> float | None:
    if text == "auto":
        return None
    try:
        points = float(text)
    except ValueError:
        points = -1.0
    if not 0 <= points <= 100:
        raise InvalidInputError("tolerance_points must be auto, or 0 to 100 points", received=text)
    return points
