"""The error hierarchy.

Every error that a user can cause says three things in one line: the rule, the value that was
received, and the remedy. The command line prints that line and exits with status 2.

    FoxNasError
    +-- InvalidInputError              a value given by the user breaks a rule
    |   +-- InvalidArchitectureError   an architecture that is malformed or outside its space
    |   +-- InvalidSpaceError          a search space that cannot be built
    |   +-- InvalidMeasurementsError   a measurements table that cannot be used
    |   +-- UnknownTargetError         a target that is neither built in nor a file
    |   +-- InvalidFormatError         a file of an unknown, newer or damaged format
    |   +-- OutOfDomainError           a predictor is asked for what it was not fitted for
    +-- InfeasibleConstraintError      no architecture meets the constraint
    |   +-- InfeasibleLimitsError      no architecture meets several limits, or an accuracy under them
    +-- FitError                       predictors cannot be fitted from these rows
    |   +-- TooFewSamplesError
    |   +-- RankDeficientError
    +-- MissingDependencyError         an optional package is not installed
    +-- TrainingError                  training cannot go on (NaN loss, foreign checkpoint)
    +-- ConversionError                a network cannot be converted, or a check on it failed
    +-- DeviceError                    a board, a connection to it, or a measurement on it
    |   +-- ConnectionLostError        the board went away; finished measurements are kept
    +-- WorkerLostError                a worker process or node ended before its work
    +-- RegistrationError              the registry does not take a model, or its figures; the run is kept
    +-- PromotionError                 a version does not pass the gates, or cannot be moved
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType

from foxnas_mlflow.core.redaction import redacted


class FoxNasError(Exception):
    """Root of all errors raised on purpose.

    Args:
        rule: What must hold.
        received: The value that broke the rule, if there is one.
        remedy: What the user can do about it.

    Examples:
        >>> from foxnas_mlflow import FoxNasError, reference_predictors, search
        >>> try:
        ...     search(reference_predictors("rpi4"), latency_ms=1)
        ... except FoxNasError as error:
        ...     print(type(error).__name__)
        InfeasibleConstraintError
    """

    def __init__(self, rule: str, *, received: object = None, remedy: str | None = None) -> None:
        # A message goes to logs, tags and files: none carries a password.
        rule, remedy = redacted(rule), None if remedy is None else redacted(remedy)
        self.rule = rule
        self.received = redacted(received) if isinstance(received, str) else received
        self.remedy = remedy
        text = rule.rstrip(".")
        if received is not None:
            text += f"; received {_short(received)}"
        if remedy is not None:
            text += f"; {remedy.rstrip('.')}"
        super().__init__(text + ".")

    def __reduce__(self) -> tuple[object, ...]:
        """The same error where a worker's caller reads it, whatever its class is made of."""
        return _made_again, (type(self), self.args, self.__dict__)


def _made_again(kind: type[FoxNasError], args: tuple[object, ...], values: Mapping[str, object]) -> FoxNasError:
    error = kind.__new__(kind, *args)
    error.__dict__.update(values)
    return error


class InvalidInputError(FoxNasError):
    """A value given by the user breaks a rule."""


class InvalidArchitectureError(InvalidInputError):
    """An architecture is malformed or does not belong to its space."""


class InvalidSpaceError(InvalidInputError):
    """A search space cannot be built from its description."""


class InvalidMeasurementsError(InvalidInputError):
    """A table of measurements cannot be used."""


class UnknownTargetError(InvalidInputError):
    """A target is neither built in nor a readable file."""


class InvalidFormatError(InvalidInputError):
    """A file has an unknown or newer format, unknown keys, or was changed after it was written."""


class InfeasibleConstraintError(FoxNasError):
    """No architecture meets the latency constraint.

    Attributes:
        smallest_latency_ms: The smallest latency (at the asked confidence) that can be reached.
    """

    def __init__(self, latency_ms: float, smallest_latency_ms: float, *, context: str = "") -> None:
        self.latency_ms = latency_ms
        self.smallest_latency_ms = smallest_latency_ms
        super().__init__(
            f"no architecture{context} meets the latency constraint",
            received=f"latency_ms={latency_ms:g}",
            remedy=f"the smallest reachable latency is {smallest_latency_ms:.4g} ms: ask for at least that",
        )


class InfeasibleLimitsError(InfeasibleConstraintError):
    """No architecture meets all limits.

    Attributes:
        smallest: The least of each limited quantity that any architecture reaches.
        clash: Two limits that cannot be met together, or empty.
        reachable_accuracy: The best predicted accuracy (percent) under the limits, where only that misses.
    """

    def __init__(
        self,
        limits: Sequence[str],
        *,
        smallest: Mapping[str, float],
        clash: Sequence[str] = (),
        beside: Sequence[str] = (),
        min_accuracy: float | None = None,
        reachable_accuracy: float | None = None,
    ) -> None:
        self.latency_ms = self.smallest_latency_ms = float("nan")
        if "latency_ms" in smallest:
            self.smallest_latency_ms = smallest["latency_ms"]
        self.smallest = dict(smallest)
        self.clash = tuple(clash)
        self.reachable_accuracy = reachable_accuracy
        asked = ", ".join([*limits, *([] if min_accuracy is None else [f"accuracy >= {min_accuracy:g}"])])
        alone = ", ".join(f"{quantity} {value:.6g}" for quantity, value in smallest.items())
        if reachable_accuracy is not None:
            remedy = (
                f"under these limits the most accurate network is predicted {reachable_accuracy:.4f} %: ask for less"
            )
        else:
            remedy = f"the smallest that each can reach alone: {alone}"
            if clash:
                remedy += f"; these two cannot be met together: {clash[0]} and {clash[1]}"
            if beside:
                remedy += f"; possible is {', or '.join(beside)}"
        FoxNasError.__init__(self, "no architecture meets all limits", received=asked, remedy=remedy)


class FitError(FoxNasError):
    """Predictors cannot be fitted from the rows given."""


class TooFewSamplesError(FitError):
    """Fewer rows than the formula needs."""


class RankDeficientError(FitError):
    """Columns of the design are linear combinations of others."""


class OutOfDomainError(InvalidInputError):
    """A predictor is asked for an image size or a space that it was not fitted for."""


class MissingDependencyError(FoxNasError):
    """An optional package that this feature needs is not installed."""


class TrainingError(FoxNasError):
    """Training cannot go on."""


class ConversionError(FoxNasError):
    """A network cannot be converted for its target, or a check on the result failed."""


class DeviceError(FoxNasError):
    """A board, the connection to it, or a measurement on it failed."""


class ConnectionLostError(DeviceError):
    """The board went away; what was measured before is kept."""


class WorkerLostError(FoxNasError):
    """A worker process or node ended before its work; what was finished is kept."""


class RegistrationError(FoxNasError):
    """The registry does not take a model, or figures of one; the run and what is logged in it are kept."""


class PromotionError(FoxNasError):
    """A model version does not pass the gates of a stage, or cannot be moved."""


def import_or_raise(module: str, *, extra: str, feature: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name of the module.
        extra: Name of the extra of this package that installs it.
        feature: What needs it, for the message.

    Raises:
        MissingDependencyError: If the module is not installed. An error raised *inside* an
            installed module is not hidden.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] != error.name.split(".")[0]:
            raise
        raise MissingDependencyError(
            f"{feature} needs the package {module.split('.')[0]!r}, which is not installed",
            remedy=f"install it with: pip install 'foxnas-mlflow[{extra}]'",
        ) from error


def _short(value: object, limit: int = 200) -> str:
    text = redacted(value if isinstance(value, str) else repr(value))
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
