"""Parameters that say where a step's work is done: here, in processes of this machine, or on Ray."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.workflows._request import Request, parameter

if TYPE_CHECKING:
    from foxnas_mlflow.core.workers import Executor


@dataclass(frozen=True, kw_only=True)
class ClusterRequest(Request):
    """From where boards are reached; base of the requests that measure."""

    executor: Literal["local", "ray"] = parameter("local", "Where workers live: processes of this machine, or Ray.")
    ray_address: str = parameter(
        "", "The Ray cluster: host:port, ray://host:port, auto; empty: RAY_ADDRESS, else one of this machine alone."
    )

    def check(self) -> None:
        """An address of Ray belongs to Ray."""
        super().check()
        if self.ray_address and self.executor != "ray":
            raise InvalidInputError(
                "ray_address is that of executor=ray", received=self.ray_address, remedy="give --executor ray too"
            )


@dataclass(frozen=True, kw_only=True)
class ExecutorRequest(ClusterRequest):
    """Where work on networks is done; base of the requests that evaluate, convert or search for many."""

    workers: int = parameter(1, "Workers for networks, several at once; 1: this process alone.", at_least=1)


WORKING = ("workers", "executor", "ray_address")
"""Parameters that say who works and change no result."""


@contextlib.contextmanager
def open_executor(request: ClusterRequest) -> Iterator[Executor | None]:
    """Starts the workers of a step; None: this process does the work.

    Raises:
        InvalidInputError: If a Ray cluster does not answer, or cannot do the work.
        MissingDependencyError: If Ray is not installed.
    """
    from foxnas_mlflow.core.workers import LocalExecutor

    workers = request.workers if isinstance(request, ExecutorRequest) else 1
    if request.executor == "ray":
        from foxnas_mlflow.workflows._ray import open_ray

        with open_ray(request.ray_address, workers=workers) as executor:
            yield executor
    else:
        yield LocalExecutor() if workers > 1 else None
