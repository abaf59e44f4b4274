"""What every step is: a name, a request, a function and a result that can tell what it made."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, Self, TypeVar

from foxnas_mlflow.workflows._request import Request

logger = logging.getLogger("foxnas_mlflow")
"""Reports progress; the command line prints it, a Python program configures the logger."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of what a step made: JSON values that carry all that the next step needs.

    `main` keeps them in ``outputs.json`` of the step's run, from where a later run finds them again.

    Attributes:
        run_id: The step's run; empty where it made none.
        summary: The lines that a person reads, with the command to type next; not kept.
    """

    run_id: str
    summary: str = ""

    def describe(self) -> str:
        """The lines that a person reads."""
        return self.summary

    @property
    def exit_status(self) -> int:
        """Status of the command that made it."""
        return 0

    def to_dict(self) -> dict[str, Any]:
        """All but the summary, as JSON values."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "summary"}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """What `to_dict` made."""
        return cls(**values)


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
        torchrun: Whether MLproject has it a second time, as several processes that torchrun starts.
    """

    name: str
    summary: str
    request: type[R]
    run: Callable[[R], S]
    entry_point: bool = True
    torchrun: bool = False


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
