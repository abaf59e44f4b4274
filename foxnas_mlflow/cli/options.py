"""Options of the command line, derived from the requests of the steps."""

from __future__ import annotations

import argparse
import logging
import sys
from typing import Any

from foxnas_mlflow.core.redaction import redacted
from foxnas_mlflow.workflows import AnyWorkflow, Parameter, Request


def add_workflow(subparsers: Any, workflow: AnyWorkflow) -> None:
    """Add the subcommand of a step or tool."""
    parser = subparsers.add_parser(
        workflow.name, help=workflow.summary, description=workflow.summary, allow_abbrev=False
    )
    for parameter in workflow.request.parameters():
        _add(parser, parameter)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(workflow=workflow)


def requested(arguments: argparse.Namespace) -> Request:
    """The request that parsed arguments make.

    Raises:
        InvalidInputError: If a value breaks a rule.
    """
    request: type[Request] = arguments.workflow.request
    return request.parse({p.name: getattr(arguments, p.name) for p in request.parameters()})


def _add(parser: argparse.ArgumentParser, parameter: Parameter) -> None:
    """One option; its value arrives as text and is checked by the request."""
    rules, default = parameter.rules, parameter.default_text
    shown = "" if default == "" else f" (default: {default})"
    choices = "" if parameter.choices is None else f" One of: {', '.join(parameter.choices)}."
    text = (rules.help + shown).replace("%", "%%") + choices
    dashed = "--" + parameter.name.replace("_", "-")
    # `mlflow run -P` hands undeclared parameters over with underscores.
    flags = list(dict.fromkeys([dashed, "--" + parameter.name]))
    if rules.positional:
        parser.add_argument(parameter.name, metavar=parameter.name.upper(), help=text)
    elif parameter.type is bool:
        parser.add_argument(*flags, dest=parameter.name, default=default, nargs="?", const="true", help=text)
    else:
        metavar = parameter.type.__name__.upper() + ("[,...]" if parameter.many else "")
        parser.add_argument(*flags, dest=parameter.name, default=default, metavar=metavar, help=text)


class _Stdout(logging.Handler):
    """Prints what the steps tell while they work to whatever stdout is now."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record, at once: a pipe's reader follows the work."""
        print(redacted(self.format(record)), file=sys.stdout, flush=True)


def tell_on_stdout() -> None:
    """Print the steps' progress; calling it again changes nothing."""
    logger = logging.getLogger("foxnas_mlflow")
    if not any(isinstance(handler, _Stdout) for handler in logger.handlers):
        logger.addHandler(_Stdout())
        logger.setLevel(logging.INFO)
        logger.propagate = False
