"""Where a step's work is done, as it is typed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from foxnas_mlflow.workflows._request import Request, parameter

if TYPE_CHECKING:
    from foxnas_mlflow.core.workers import Executor


@dataclass(frozen=True, kw_only=True)
class ExecutorRequest(Request):
    """Where networks are evaluated; base of the requests that evaluate many."""

    workers: int = parameter(
        1, "Processes that evaluate networks, each with its share of the processors; 1: this one alone.", at_least=1
    )

    @property
    def executor_of_workers(self) -> Executor | None:
        """Starts workers; None: the work is done in this process."""
        from foxnas_mlflow.core.workers import LocalExecutor

        return LocalExecutor() if self.workers > 1 else None
