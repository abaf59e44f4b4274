"""What a device and a supernet said of a search, and its table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from foxnas_mlflow.core.files import write_csv
from foxnas_mlflow.core.searchers import Candidate
from foxnas_mlflow.flavor import SubnetModel
from foxnas_mlflow.tracking.inputs import TrainedSupernet
from foxnas_mlflow.tracking.run import EntryRun

TABLE = "verification.csv"


@dataclass(frozen=True, eq=False)
class Verification:
    """What a device and a supernet said of a search.

    Attributes:
        candidates: All networks that were looked at; one is chosen.
        device: Address of the device, or empty.
        supernet: The supernet, or None.
        model: The chosen network with its own batch norm statistics, or None without a supernet.
        reason: Why it was chosen, in one sentence.
        dominated: Whether another that was looked at beats it on measured figures.
    """

    candidates: tuple[Candidate, ...]
    device: str = ""
    supernet: TrainedSupernet | None = None
    model: SubnetModel | None = None
    reason: str = ""
    dominated: bool = False

    @property
    def chosen(self) -> Candidate:
        """The network that won."""
        return next(candidate for candidate in self.candidates if candidate.chosen)

    @property
    def emulated(self) -> bool:
        """Whether an emulator measured it."""
        return self.chosen.timing is not None and self.chosen.timing.emulated


def write_verification(candidates: Sequence[Candidate], path: Path) -> None:
    """Write ``verification.csv``."""
    rows = [candidate.to_row() for candidate in candidates]
    columns = list(rows[0])
    write_csv(path, columns, ([row[column] for column in columns] for row in rows))


def log_verification(run: EntryRun, looked: Sequence[Candidate], place: str = "") -> None:
    """Log what was looked at, however the verification ended.

    Args:
        run: The open run.
        looked: The networks.
        place: Directory of the run that has the table; empty: its root.
    """
    if looked:
        path = run.directory / place / TABLE
        path.parent.mkdir(exist_ok=True)
        write_verification(looked, path)
        run.log_artifact(path, place or None)
