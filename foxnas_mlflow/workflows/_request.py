"""What a step is asked for, declared once.

A request is a frozen dataclass whose fields are made by `parameter`: name, type, default, bounds
and help stand in one place. The command line and MLproject derive their options from it, and a
request that is built in Python is held against the same rules, with the same one-line errors.

| annotation          | text on the command line   | empty text means |
|---------------------|----------------------------|------------------|
| str                 | itself, stripped           | not given        |
| Literal["a", "b"]   | one of these               | refused          |
| int, float          | a finite number            | refused          |
| float | None        | a finite number            | None: not given  |
| bool                | true/false, yes/no, 1/0    | refused          |
| tuple[int, ...]     | integers, comma separated  | (): not given    |
| tuple[float, ...]   | numbers, comma separated   | (): not given    |

In Python one number stands for a tuple of one.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import shlex
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._addresses import addresses

PresetName = Literal["tiny", "small", "medium", "paper"]
"""What a user may name; `foxnas_mlflow.supernet.PRESETS` has them."""


@dataclass(frozen=True)
class Rules:
    """What holds for a parameter beside its type.

    Attributes:
        help: What it is, with its unit.
        at_least: Smallest value allowed.
        above: Values must be greater than this.
        below: Values must be smaller than this.
        positional: Given without its name, as the action of a tool is; an entry point has none.
    """

    help: str
    at_least: float | None = None
    above: float | None = None
    below: float | None = None
    positional: bool = False


def parameter(
    default: Any,
    help: str,
    *,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    positional: bool = False,
) -> Any:
    """Declare a field of a request; the arguments are the attributes of `Rules`."""
    return dataclasses.field(default=default, metadata={"rules": Rules(help, at_least, above, below, positional)})


@dataclass(frozen=True)
class Parameter:
    """A declared field of a request.

    Attributes:
        name: Name in MLproject and in Python, with underscores.
        type: Class of one value: str, int, float or bool.
        many: Whether it is a tuple of such values.
        optional: Whether it may be None.
        default: Default value.
        rules: What holds beside the type.
        choices: The only values allowed, of a ``Literal``.
    """

    name: str
    type: Any
    many: bool
    optional: bool
    default: Any
    rules: Rules
    choices: tuple[str, ...] | None = None

    @property
    def default_text(self) -> str:
        """The default as it is typed; the empty text means not given."""
        return to_text(self.default)

    def parse(self, text: str) -> Any:
        """The value of a text.

        Raises:
            InvalidInputError: If it is none of this type, or breaks a rule.
        """
        value = text.strip()
        if value == "" and self.many:
            return ()
        if value == "" and self.optional:
            return None
        parts = value.split(",") if self.many else [value]
        values = tuple(self._parse_one(part.strip(), text) for part in parts)
        return self.check(values if self.many else values[0])

    def check(self, value: Any) -> Any:
        """The value, held against type and rules; whole numbers pass as float.

        Raises:
            InvalidInputError: If it breaks one.
        """
        if value is None and self.optional:
            return None
        if not self.many:
            return self._check_one(value)
        if isinstance(value, int | float) and self.type is not str:
            value = (value,)
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise InvalidInputError(f"{self.name} must be a tuple of {_KINDS[self.type]}s", received=repr(value))
        return tuple(self._check_one(one) for one in value)

    def _parse_one(self, value: str, text: str) -> Any:
        if self.type is bool:
            if value.lower() not in _TRUE + _FALSE:
                raise InvalidInputError(f"{self.name} must be true or false", received=text)
            return value.lower() in _TRUE
        if self.type is str:
            return value
        try:
            return self.type(value)
        except ValueError:
            raise InvalidInputError(f"{self.name} must be {self._kind()}", received=repr(text)) from None

    def _check_one(self, value: Any) -> Any:
        if self.type is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if type(value) is not self.type:  # bool is no int here
            raise InvalidInputError(f"{self.name} must be {self._kind()}", received=repr(value))
        if self.choices is not None and value not in self.choices:
            raise InvalidInputError(f"{self.name} must be one of {list(self.choices)}", received=value)
        if self.type is float and not math.isfinite(value):
            raise InvalidInputError(f"{self.name} must be a finite number", received=repr(value))
        if self.type in (int, float) and not self._within(value):
            raise InvalidInputError(f"{self.name} must be {self._range()}", received=value)
        return value

    def _within(self, value: float) -> bool:
        rules = self.rules
        return (
            (rules.at_least is None or value >= rules.at_least)
            and (rules.above is None or value > rules.above)
            and (rules.below is None or value < rules.below)
        )

    def _range(self) -> str:
        rules = self.rules
        if rules.below is None and (rules.above == 0 or (self.type is int and rules.at_least == 1)):
            return "a positive number" if self.type is float else "positive"
        if rules.below is None and rules.at_least == 0:
            return "0 or more"
        words = [
            *([] if rules.at_least is None else [f"at least {rules.at_least:g}"]),
            *([] if rules.above is None else [f"above {rules.above:g}"]),
            *([] if rules.below is None else [f"below {rules.below:g}"]),
        ]
        return " and ".join(words)

    def _kind(self) -> str:
        return f"{_KINDS[self.type]}s, comma separated" if self.many else _ARTICLES[self.type] + _KINDS[self.type]


_TRUE, _FALSE = ("true", "1", "yes"), ("false", "0", "no")
_KINDS: Mapping[type, str] = {str: "text", int: "integer", float: "number", bool: "true or false"}
_ARTICLES: Mapping[type, str] = {str: "a ", int: "an ", float: "a ", bool: ""}


@dataclass(frozen=True, kw_only=True)
class Request:
    """Base of all requests; a subclass declares its fields with `parameter`."""

    def __post_init__(self) -> None:
        for declared in self.parameters():
            object.__setattr__(self, declared.name, declared.check(getattr(self, declared.name)))
        self.check()

    def check(self) -> None:
        """Rules that hold between fields; a subclass that has some says so here.

        Raises:
            InvalidInputError: If one is broken.
        """

    @classmethod
    @functools.cache
    def parameters(cls) -> tuple[Parameter, ...]:
        """The declared fields, in order."""
        hints = typing.get_type_hints(cls)
        return tuple(_declared(f.name, hints[f.name], f) for f in dataclasses.fields(cls))

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Self:
        """A request from texts, as a command line or MLflow hands them over; what is absent has its default.

        Raises:
            InvalidInputError: If a text is no value of its parameter, or breaks a rule.
        """
        return cls(**{p.name: p.parse(texts[p.name]) for p in cls.parameters() if p.name in texts})

    def replace(self, **changes: Any) -> Self:
        """This request with other values for some fields."""
        return dataclasses.replace(self, **changes)

    def values(self) -> dict[str, Any]:
        """All values by name, as JSON has them: a tuple is a list."""
        return {
            p.name: list(value) if isinstance(value := getattr(self, p.name), tuple) else value
            for p in self.parameters()
        }

    def options(self, *names: str) -> str:
        """These parameters as they are typed after a command, each after a space; those at their default not."""
        typed = []
        for p in self.parameters():
            if p.name in names and (value := getattr(self, p.name)) != p.default:
                typed.append(f" --{p.name.replace('_', '-')} {shlex.quote(to_text(value))}")
        return "".join(typed)

    def texts(self) -> dict[str, str]:
        """All values as they are typed; `parse` reads them back."""
        return {p.name: to_text(getattr(self, p.name)) for p in self.parameters()}


def to_text(value: Any) -> str:
    """A parameter's value as it is typed on a command line."""
    if value is None:
        return ""
    if isinstance(value, tuple):
        return ",".join(map(to_text, value))
    return str(value)


def _declared(name: str, hint: Any, field: dataclasses.Field[Any]) -> Parameter:
    arguments = typing.get_args(hint)
    optional = type(None) in arguments
    many = typing.get_origin(hint) is tuple
    choices = arguments if typing.get_origin(hint) is typing.Literal else None
    one = str if choices else arguments[0] if optional or many else hint
    return Parameter(name, one, many, optional, field.default, field.metadata["rules"], choices)


NO_DEVICE = "none"
"""Given as device: nothing is measured, also where the target has a device of its own."""


def chosen_device(given: str, default: str = "") -> str:
    """The device that was given, or the default where none was; empty: none. It may be a list of boards.

    Raises:
        DeviceError: If a board is listed twice.
    """
    return "" if given == NO_DEVICE else ",".join(addresses(given or default))


def compiler_image() -> Any:
    """The parameter of every step that may need the Edge TPU's compiler."""
    return parameter("", "Docker image with edgetpu_compiler, for the target edgetpu; empty: the one on PATH.")


def energy_parameter(what: str) -> Any:
    """The parameter of every step that may measure energy; `what` says of what."""
    return parameter(
        "", f"{what}: auto (RAPL, INA sensors, Jetson rails), or a command on the device that prints watts."
    )


def sustained_parameter() -> Any:
    """The parameter of every step that benchmarks."""
    return parameter(
        0.0,
        "Seconds under load without a pause after the timed runs; from 60 on a promotion judges them. 0: none.",
        at_least=0,
    )
