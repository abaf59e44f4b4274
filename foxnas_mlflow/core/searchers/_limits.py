"""Limits on what a network may cost, read from text: ``latency_ms<=20, int8_size_bytes<=2MB``."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from foxnas_mlflow.core.errors import InvalidInputError

_UNITS: Mapping[str, Mapping[str, float]] = {
    "_ms": {"us": 1e-3, "ms": 1.0, "s": 1e3},
    "_bytes": {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30},
    "_mj": {"uJ": 1e-3, "mJ": 1.0, "J": 1e3},
    "": {"k": 1e3, "M": 1e6, "G": 1e9},
}
"""Units that a value may carry, by the ending of its quantity; an empty ending is any other quantity."""

_TERM = re.compile(r"([A-Za-z_][\w@.-]*)\s*<=?\s*([+-]?[\d.][\d._]*(?:[eE][+-]?\d+)?)\s*([A-Za-z%]*)")


@dataclass(frozen=True, slots=True)
class Limit:
    """The most that a network may have of a quantity.

    Attributes:
        quantity: ``latency_ms``, ``int8_size_bytes``, ``params``, ``macs``, ``peak_activation_bytes``,
            or a further quantity of the predictors.
        value: In the quantity's unit, positive.

    Examples:
        >>> from foxnas_mlflow import Limit, reference_predictors, search
        >>> limits = (Limit("latency_ms", 60), Limit("int8_size_bytes", 4.5e6))
        >>> search(reference_predictors("rpi4"), limits=limits, evaluations=2_000).latency_upper_ms <= 60
        True
    """

    quantity: str
    value: float

    def __post_init__(self) -> None:
        if isinstance(self.value, bool) or not isinstance(self.value, int | float):
            raise InvalidInputError(f"a limit of {self.quantity} must be one number", received=repr(self.value))
        if not (math.isfinite(self.value) and self.value > 0):
            raise InvalidInputError(f"{self.quantity} must be limited to a positive number", received=self.value)

    def __str__(self) -> str:
        return f"{self.quantity} <= {self.value:.10g}"


def parse_limits(
    limits: str | Mapping[str, float] | Iterable[Limit] = "", *, latency_ms: float | None = None
) -> tuple[Limit, ...]:
    """Limits from text, a mapping or limits.

    Args:
        limits: ``quantity<=value`` terms with a comma between, quantities with their values, or limits. A
            value in text may carry a unit of its quantity: ms, s, kB, MiB, mJ, and k, M, G for counts.
        latency_ms: Short form of a limit of ``latency_ms``.

    Raises:
        InvalidInputError: If a term cannot be read, a value is not positive, or a quantity has two limits.

    Examples:
        >>> from foxnas_mlflow import parse_limits
        >>> [(limit.quantity, limit.value) for limit in parse_limits("int8_size_bytes<=2MB, macs<=1e8", latency_ms=20)]
        [('latency_ms', 20.0), ('int8_size_bytes', 2000000.0), ('macs', 100000000.0)]
    """
    if isinstance(limits, str):
        parsed = [_term(term) for term in filter(None, (part.strip() for part in limits.split(",")))]
    elif isinstance(limits, Mapping):
        parsed = [Limit(quantity, value) for quantity, value in limits.items()]
    else:
        parsed = list(limits)
    if latency_ms is not None:
        _check_latency(latency_ms)
        parsed.insert(0, Limit("latency_ms", float(latency_ms)))
    for i, limit in enumerate(parsed):
        for other in parsed[:i]:
            if limit.quantity == other.quantity:
                raise InvalidInputError(
                    "a quantity has one limit", received=f"{other} and {limit}", remedy="leave one of the two out"
                )
    return tuple(parsed)


def describe_limits(limits: Iterable[Limit]) -> str:
    """Limits as text that `parse_limits` reads, or ``no limit``."""
    return ", ".join(map(str, limits)) or "no limit"


def _check_latency(latency_ms: object) -> None:
    if isinstance(latency_ms, list | tuple):
        raise InvalidInputError(
            "latency_ms must be one number of milliseconds",
            received=list(latency_ms),
            remedy="for one network each call foxnas_mlflow.search_each with that list",
        )
    if isinstance(latency_ms, bool) or not isinstance(latency_ms, int | float):
        raise InvalidInputError("latency_ms must be a positive number of milliseconds", received=repr(latency_ms))
    if not (math.isfinite(latency_ms) and latency_ms > 0):
        raise InvalidInputError("latency_ms must be a positive number of milliseconds", received=latency_ms)


def _term(text: str) -> Limit:
    match = _TERM.fullmatch(text)
    if match is None:
        raise InvalidInputError(
            "a limit reads quantity<=value", received=text, remedy="for example: latency_ms<=20, int8_size_bytes<=2e6"
        )
    quantity, number, unit = match.groups()
    try:
        value = float(number)
    except ValueError:
        raise InvalidInputError(f"a limit of {quantity} needs a number", received=number) from None
    if not unit:
        return Limit(quantity, value)
    base = quantity.split("@")[0]
    units = next(units for ending, units in _UNITS.items() if base.endswith(ending))
    if unit not in units:
        raise InvalidInputError(
            f"a limit of {quantity} has one of the units {list(units)}, or none", received=f"{number} {unit}"
        )
    return Limit(quantity, value * units[unit])
