"""Tables of measured subnets: the rows of ``measurements.csv``.

A row never mixes a measurement with an estimate: `latency_source` says which its latency is.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import FoxNasError, InvalidMeasurementsError
from foxnas_mlflow.core.files import cells_end_with, sought, write_atomically
from foxnas_mlflow.core.space import CPU_SPACE

COLUMNS: tuple[str, ...] = (
    "architecture",
    "image_size",
    "accuracy",
    "latency_ms",
    "latency_source",
    "device",
    "runtime",
    "n_runs",
)
"""Columns of ``measurements.csv`` that are known; further ones are measured quantities."""

_QUANTITY = re.compile(r"[a-z][a-z0-9_]*(@[A-Za-z0-9._-]+)?")
"""Names of further quantities: ``energy_mj``, ``latency_ms@second-board``."""

_EMULATED = " (emulated)"
"""What a row's device ends with where an emulator measured it."""

_TAIL_BYTES = 4096
"""How much of a table's end is read at once; a row has about one kilobyte."""

_DECIMAL_COMMA = re.compile(r"-?\d+,\d+")
_LEAST_SHARE = 0.2
"""A median accuracy above this in a table without any above 1 is a share, and no percentage."""

LATENCY_SOURCES = ("measured", "cost_model", "")


@dataclass(frozen=True, slots=True)
class Timing:
    """The latency of one subnet, and what it is.

    Attributes:
        latency_ms: Median of a measurement, or an estimate.
        source: ``measured`` or ``cost_model``.
        device: Where it was measured; a name that ends with `` (emulated)`` is kept without it.
        runtime: Runtime and version.
        n_runs: Timed runs behind it.
        problems: Why a measurement is not to be trusted; empty for a valid one and for an estimate.
        emulated: Whether the device is an emulator: its times say nothing of real hardware.
        quantities: What was measured besides, by name, the unit in the name (``energy_mj``), positive.
    """

    latency_ms: float
    source: str
    device: str = ""
    runtime: str = ""
    n_runs: int = 0
    problems: tuple[str, ...] = ()
    emulated: bool = False
    quantities: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        # Boards say it in their name, and rows do; here it is said once.
        if self.device.endswith(_EMULATED):
            object.__setattr__(self, "device", self.device.removesuffix(_EMULATED))
            object.__setattr__(self, "emulated", True)

    def with_others(self, others: Sequence[Timing]) -> Timing:
        """The mean of this measurement and others of the same network; those with problems do not count."""
        good = [timing for timing in (self, *others) if not timing.problems]
        if not good:
            return self
        mean = sum(timing.latency_ms for timing in good) / len(good)
        return dataclasses.replace(good[0], latency_ms=mean, n_runs=sum(timing.n_runs for timing in good))


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is known of one subnet.

    Attributes:
        architecture: The subnet.
        accuracy: Top-1 in percent, or None when it was not evaluated.
        latency_ms: Latency in milliseconds, or None when it is not known.
        latency_source: ``measured``, ``cost_model``, or empty without a latency.
        device: Where it was measured.
        runtime: Runtime and version.
        n_runs: Timed runs behind the latency.
        quantities: Further measured quantities by name, the unit in the name (``energy_mj``), positive.

    Examples:
        >>> from foxnas_mlflow import Measurement, get_space
        >>> row = Measurement(get_space("cpu").smallest(192), accuracy=66.1, latency_ms=34.2, latency_source="measured")
        >>> row.latency_ms
        34.2
    """

    architecture: Architecture
    accuracy: float | None = None
    latency_ms: float | None = None
    latency_source: str = ""
    device: str = ""
    runtime: str = ""
    n_runs: int = 0
    quantities: Mapping[str, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name, value in self.quantities.items():
            if not _QUANTITY.fullmatch(name):
                raise InvalidMeasurementsError(
                    "a quantity is named by small letters, digits and _, with @device where it is of another one",
                    received=name,
                )
            if not (math.isfinite(value) and value > 0):
                raise InvalidMeasurementsError(f"{name} must be a positive number", received=value)
        if self.accuracy is not None and not 0 <= self.accuracy <= 100:
            raise InvalidMeasurementsError("an accuracy must be between 0 and 100 percent", received=self.accuracy)
        if self.latency_ms is not None and not (math.isfinite(self.latency_ms) and self.latency_ms > 0):
            raise InvalidMeasurementsError("a latency must be a positive number of ms", received=self.latency_ms)
        if self.latency_source not in LATENCY_SOURCES:
            raise InvalidMeasurementsError(
                f"latency_source must be one of {list(LATENCY_SOURCES)}", received=self.latency_source
            )

    @classmethod
    def of(cls, architecture: Architecture, timing: Timing | None, accuracy: float | None = None) -> Measurement:
        """A subnet's row; a latency with problems does not get into it."""
        if timing is None or timing.problems:
            return cls(architecture, accuracy)
        device = timing.device + _EMULATED if timing.emulated else timing.device
        return cls(
            architecture,
            accuracy,
            timing.latency_ms,
            timing.source,
            device,
            timing.runtime,
            timing.n_runs,
            timing.quantities,
        )

    def value(self, quantity: str) -> float | None:
        """What was measured of ``accuracy``, ``latency_ms`` or a further quantity, None where nothing was."""
        if quantity == "accuracy":
            return self.accuracy
        return self.latency_ms if quantity == "latency_ms" else self.quantities.get(quantity)

    @property
    def timing(self) -> Timing | None:
        """Its latency, as it came to `of`."""
        if self.latency_ms is None:
            return None
        return Timing(self.latency_ms, self.latency_source, self.device, self.runtime, self.n_runs)


def read_measurements(path: str | Path) -> list[Measurement]:
    """Read ``measurements.csv``, or the FOX-NAS authors' table of the CPU space at 256 px.

    Columns of ``measurements.csv`` beyond the known ones are measured quantities, whose cells are numbers or empty.
    Semicolons may separate cells, commas mark decimals then; ``latency_s`` is read in seconds.

    Raises:
        InvalidMeasurementsError: If the file cannot be read or is neither table, or its accuracies are no percentages;
            the message names the row or column.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import pandas as pd
        >>> from foxnas_mlflow import get_space, read_measurements
        >>> network = get_space("cpu").smallest(192).to_json()
        >>> row = {"architecture": network, "image_size": 192, "accuracy": 66.1, "latency_ms": 34.2}
        >>> path = Path(tempfile.mkdtemp(), "measurements.csv")
        >>> pd.DataFrame([row]).to_csv(path, index=False)
        >>> [(row.accuracy, row.latency_ms) for row in read_measurements(path)]
        [(66.1, 34.2)]
    """
    import pandas as pd

    try:
        separator, decimal = _punctuation(Path(path))
        frame = pd.read_csv(
            path,
            dtype={"architecture": str, "device": str, "runtime": str, "latency_source": str},
            encoding="utf-8-sig",
            sep=separator,
            decimal=decimal,
        )
    except OSError as error:
        raise InvalidMeasurementsError("a measurements file must be readable", received=sought(path, error)) from error
    except (ValueError, UnicodeDecodeError) as error:
        raise InvalidMeasurementsError("a measurements file must be CSV", received=str(path)) from error
    if frame.empty:
        raise InvalidMeasurementsError("a measurements file must have rows", received=str(path))
    if "latency_s" in frame.columns and "latency_ms" not in frame.columns:
        frame = frame.assign(latency_ms=1000 * frame["latency_s"]).drop(columns="latency_s")
    if "architecture" in frame.columns:
        for column in map(str, frame.columns):
            if column not in COLUMNS and not (
                _QUANTITY.fullmatch(column) and pd.api.types.is_numeric_dtype(frame[column])
            ):
                raise InvalidMeasurementsError(
                    f"columns beyond {list(COLUMNS)} must be numbers, each named as a quantity (energy_mj)",
                    received=f"a column {column!r}",
                    remedy="remove it, or mend its name and its cells",
                )
        parse = _contract_row
    elif {"acc", "latency", "tot_24", "avg_e_24"} <= set(frame.columns):
        parse = _authors_row
    else:
        raise InvalidMeasurementsError(
            f"measurements must have the columns {list(COLUMNS)}, or those of the authors' table",
            received=[str(c) for c in frame.columns[:8]],
        )
    rows = []
    for number, row in enumerate(frame.to_dict("records"), start=2):
        try:
            rows.append(parse({str(key): value for key, value in row.items()}))
        except (FoxNasError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise InvalidMeasurementsError(
                f"line {number} of {Path(path).name} is not a measurement", received=str(error).rstrip(".")
            ) from error
    _check_units(rows, Path(path).name)
    return rows


def _punctuation(path: Path) -> tuple[str, str]:
    """What separates cells and marks decimals: semicolons, and perhaps commas, as programs of some countries write."""
    import csv

    with path.open(encoding="utf-8-sig", newline="") as file:
        separator = cells_end_with(file.readline())
        if separator == ",":
            return ",", "."
        cells = (cell for row in csv.reader(file, delimiter=separator) for cell in row)
        commas = any(_DECIMAL_COMMA.fullmatch(cell) for cell in cells)
    return separator, "," if commas else "."


def _check_units(rows: Sequence[Measurement], name: str) -> None:
    """Refuse shares in the place of percent: networks that are right at less than 1 % of images need no predictors."""
    known = [row.accuracy for row in rows if row.accuracy is not None]
    if known and max(known) <= 1 and statistics.median(known) > _LEAST_SHARE:
        raise InvalidMeasurementsError(
            f"the column 'accuracy' of {name} must be in percent",
            received=f"values from {min(known):g} to {max(known):g}, which look like shares",
            remedy="multiply them by 100",
        )


def read_finished(path: str | Path) -> list[Measurement]:
    """The rows that `append_measurement` finished, none when there is no file yet."""
    path = Path(path)
    if not path.exists():
        return []
    _mend_last_line(path)
    # A kill before the first row leaves nothing, or the header alone.
    return read_measurements(path) if path.read_bytes().count(b"\n") > 1 else []


def write_measurements(rows: Sequence[Measurement], path: str | Path, *, quantities: Iterable[str] = ()) -> None:
    """Write ``measurements.csv`` in one step: readers see the old file or the new one.

    Args:
        rows: The rows.
        path: The file.
        quantities: Further quantities that rows to be appended have.
    """
    write_atomically(path, _csv_text(rows, _columns(rows, quantities), header=True))


def fastest(rows: Iterable[Measurement]) -> dict[Architecture, Measurement]:
    """Of each network the row with the least latency: what disturbs a machine adds to it."""
    found: dict[Architecture, Measurement] = {}
    for row in rows:
        before = found.get(row.architecture)
        if before is None or (row.latency_ms or math.inf) < (before.latency_ms or math.inf):
            found[row.architecture] = row
    return found


def append_measurement(row: Measurement, path: str | Path) -> None:
    """Append one row and force it to disk, so that a kill loses no finished measurement.

    A last row that a kill tore in the middle was never finished: it is dropped first, so that it
    does not swallow this one.
    """
    path = Path(path)
    if path.exists():
        _mend_last_line(path)
    new = not path.exists() or path.stat().st_size == 0
    columns = _columns([row]) if new else _header(path)
    unknown = set(row.quantities) - set(columns)
    if unknown:
        raise InvalidMeasurementsError(
            f"a row has only quantities that {path.name} has columns of", received=sorted(unknown)
        )
    with path.open("a", encoding="utf-8") as file:
        file.write(_csv_text([row], columns, header=new))
        file.flush()
        os.fsync(file.fileno())


def measurements_digest(rows: Iterable[Measurement]) -> str:
    """SHA-256 of the rows' content, independent of the file they came from."""
    text = "\n".join(sorted(map(_digested, rows)))
    return hashlib.sha256(text.encode()).hexdigest()


def _digested(row: Measurement) -> str:
    further = "".join(f" {name}={value}" for name, value in sorted(row.quantities.items()))
    return f"{row.architecture.to_json()} {row.accuracy} {row.latency_ms} {row.latency_source}{further}"


def _columns(rows: Sequence[Measurement], further: Iterable[str] = ()) -> list[str]:
    """Columns of a table of rows: quantities that any of them has come last, by name, with further ones."""
    return [*COLUMNS, *sorted({name for row in rows for name in row.quantities}.union(further))]


def _header(path: Path) -> list[str]:
    """Columns of a file."""
    import csv

    with path.open(encoding="utf-8", newline="") as file:
        return next(csv.reader(file), [])


def _csv_text(rows: Sequence[Measurement], columns: Sequence[str], *, header: bool) -> str:
    import csv
    import io

    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if header:
        writer.writerow(columns)
    for row in rows:
        values = {f.name: getattr(row, f.name) for f in dataclasses.fields(row)} | dict(row.quantities)
        values["architecture"] = row.architecture.to_json()
        values["image_size"] = row.architecture.image_size
        writer.writerow(["" if values.get(c) is None else values[c] for c in columns])
    return out.getvalue()


def _mend_last_line(path: Path) -> None:
    """End a last line that lacks its newline, or drop it when it is not a whole row.

    Reads no more than that line: a table of thousands of rows is appended to as fast as a new one.
    """
    import csv

    with path.open("rb+") as file:
        start = file.seek(0, os.SEEK_END)
        tail = b""
        while start > 0 and b"\n" not in tail:
            length = min(start, _TAIL_BYTES)
            start = file.seek(start - length)
            tail = file.read(length) + tail
        end = tail.rfind(b"\n") + 1
        start, tail = start + end, tail[end:]
        if not tail:
            return
        # Rows written by an editor may lack the newline: a row with all its cells is kept.
        cells = next(csv.reader([tail.decode("utf-8", errors="replace")]))
        if len(cells) == len(COLUMNS if start == 0 else _header(path)):
            file.seek(0, os.SEEK_END)
            file.write(b"\n")
        else:
            file.truncate(start)


def _number(value: Any) -> float | None:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    return float(value)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _contract_row(row: dict[str, Any]) -> Measurement:
    architecture = Architecture.from_json(row["architecture"])
    size = _number(row.get("image_size"))
    if size is not None and int(size) != architecture.image_size:
        raise InvalidMeasurementsError(
            f"image_size must be the architecture's, {architecture.image_size} px", received=size
        )
    return Measurement(
        architecture,
        accuracy=_number(row.get("accuracy")),
        latency_ms=_number(row.get("latency_ms")),
        latency_source=_text(row.get("latency_source")),
        device=_text(row.get("device")),
        runtime=_text(row.get("runtime")),
        n_runs=int(_number(row.get("n_runs")) or 0),
        quantities={name: number for name in row if name not in COLUMNS and (number := _number(row[name])) is not None},
    )


_AUTHORS_PREFIX = ("mbcv", "se", "mbcv", "se", "se")
_AUTHORS_IMAGE_SIZE = 256


def _authors_row(row: dict[str, Any]) -> Measurement:
    """A row of the authors' table: counts of blocks per stage.

    Their suffix ``_I`` marks identity blocks; the columns without it count the first block. The
    order of identity blocks is not recorded; they are listed by expansion ratio and kernel size.
    """
    space = CPU_SPACE
    stages = []
    for spec, prefix in zip(space.stages, _AUTHORS_PREFIX, strict=True):
        first: list[tuple[int, int]] = []
        rest: list[tuple[int, int]] = []
        for block in space.kinds:
            name = f"{prefix}_e{block.expansion}_k{block.kernel}_{spec.width}"
            first += [(block.expansion, block.kernel)] * int(row[name])
            rest += [(block.expansion, block.kernel)] * int(row[f"{name}_I"])
        if len(first) != 1 or 1 + len(rest) != int(row[f"tot_{spec.width}"]):
            raise InvalidMeasurementsError(
                f"stage {spec.width} must have one first block and tot_{spec.width} blocks in all",
                received=f"{len(first)} and {len(rest)}",
            )
        stages.append(first + rest)
    return Measurement(
        space.architecture(_AUTHORS_IMAGE_SIZE, stages),
        accuracy=float(row["acc"]),
        latency_ms=float(row["latency"]),
        latency_source="measured",
        device="Raspberry Pi 4",
        runtime="TFLite int8 (2021)",
    )
