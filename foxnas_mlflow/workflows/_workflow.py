"""What every step is: a name, a request, a function and a result that can tell what it made."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from foxnas_mlflow.workflows._request import Request

logger = logging.getLogger("foxnas_mlflow")
"""Tells how long work goes on; the command line prints it, a Python program decides itself."""


class Result(Protocol):
    """What a step made: a frozen dataclass that carries all that the next step needs."""

    def describe(self) -> str:
        """The lines that a person reads, with the command to type next."""
        ...


R = TypeVar("R", bound=Request)
S = TypeVar("S", bound=Result)


@dataclass(frozen=True)
class Workflow(Generic[R, S]):
    """A step as the command line and MLproject see it.

    Attributes:
        name: Name of the subcommand, and of the entry point.
        summary: One line for ``foxnas --help``.
        request: Class of its request.
        run: Does it.
        entry_point: Whether MLproject has it; a tool that makes no run is none.
    """

    name: str
    summary: str
    request: type[R]
    run: Callable[[R], S]
    entry_point: bool = True


@contextlib.contextmanager
def progress_bar(label: str, unit: str) -> Iterator[Callable[[int, int, str], None]]:
    """Show how far a long work is, with the time left: a bar on a terminal, nothing elsewhere.

    Yields:
        A function of the units done, all units, and a word on the state.
    """
    from tqdm import tqdm

    with tqdm(desc=label, unit=unit, disable=None, dynamic_ncols=True) as bar:

        def show(done: int, total: int, state: str) -> None:
            if bar.total is None:
                # What an earlier run did must not make this one look fast.
                bar.total, bar.initial, bar.n = total, done - 1, done - 1
            bar.set_postfix_str(state, refresh=False)
            bar.update(done - bar.n)

        yield show


AnyWorkflow = Workflow[Any, Any]
