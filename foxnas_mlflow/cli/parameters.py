"""How a subcommand declares its parameters.

The same declaration makes the command line option and must agree with the parameter of the
MLproject entry point (a test compares them). MLflow passes every parameter as text, so types are
checked here, with one line that names the rule, the value and the remedy.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass
from typing import Any

from foxnas_mlflow.core.errors import InvalidInputError


@dataclass(frozen=True)
class Parameter:
    """One parameter of a subcommand.

    Attributes:
        name: Name in MLproject, with underscores; the option is ``--name-with-dashes`` (the
            underscored spelling, which `mlflow run -P` produces for undeclared parameters, works too).
        default: Default value; the empty string means not given.
        help: What it is, with its unit.
        type: str, int, float or bool.
        choices: The only values allowed.
        positional: Given without its name, as the action of a tool is; an entry point has none.
    """

    name: str
    default: str | int | float | bool
    help: str
    type: type = str
    choices: tuple[str, ...] | None = None
    positional: bool = False

    def parse(self, text: str) -> str | int | float | bool:
        """Convert text to the parameter's type.

        Raises:
            InvalidInputError: If the text is not a value of that type, or not among the choices.
        """
        value = text.strip()
        if value == "" and self.default == "":
            return ""
        if self.choices is not None and value not in self.choices:
            raise InvalidInputError(f"{self.name} must be one of {list(self.choices)}", received=text)
        if self.type is bool:
            lowered = value.lower()
            if lowered not in ("true", "false", "1", "0", "yes", "no"):
                raise InvalidInputError(f"{self.name} must be true or false", received=text)
            return lowered in ("true", "1", "yes")
        if self.type is int:
            try:
                return int(value)
            except ValueError:
                raise InvalidInputError(f"{self.name} must be an integer", received=repr(text)) from None
        if self.type is float:
            try:
                number = float(value)
            except ValueError:
                raise InvalidInputError(f"{self.name} must be a number", received=repr(text)) from None
            if not math.isfinite(number):
                raise InvalidInputError(f"{self.name} must be a finite number", received=repr(text))
            return number
        return value

    def add_to(self, parser: argparse.ArgumentParser) -> None:
        """Add the option to a parser; the value arrives as text and is checked by `parse`."""
        dashed = "--" + self.name.replace("_", "-")
        flags = [dashed] if "_" not in self.name else [dashed, "--" + self.name]
        shown = "" if self.default == "" else f" (default: {self.default})"
        text = (self.help + shown).replace("%", "%%")
        choices = "" if self.choices is None else f" One of: {', '.join(self.choices)}."
        if self.positional:
            parser.add_argument(self.name, metavar=self.name.upper(), help=text + choices)
        elif self.type is bool:
            parser.add_argument(
                *flags, dest=self.name, default=str(self.default), nargs="?", const="true", help=text + choices
            )
        else:
            parser.add_argument(
                *flags,
                dest=self.name,
                default=str(self.default),
                metavar=self.type.__name__.upper(),
                help=text + choices,
            )


COMPILER_IMAGE = Parameter(
    "compiler_image", "", "Docker image with edgetpu_compiler, for the target edgetpu; empty: the one on PATH."
)


def resolve(parameters: tuple[Parameter, ...], namespace: argparse.Namespace) -> dict[str, Any]:
    """The checked values of all parameters, by name."""
    return {parameter.name: parameter.parse(getattr(namespace, parameter.name)) for parameter in parameters}


def image_sizes(text: str) -> list[int] | None:
    """The image sizes of a comma separated list, or None when it is empty.

    Raises:
        InvalidInputError: If it is not a list of integers.
    """
    if not text:
        return None
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError("image_size must be integers in px, comma separated", received=text) from None
