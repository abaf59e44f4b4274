"""Files written in one step, files that one process works on at a time, and digests that find them again."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from foxnas_mlflow.core.errors import InvalidInputError


def cache_directory(*parts: str) -> Path:
    """A directory that outlives the process, made where the system keeps caches.

    Args:
        parts: Its place below ``$XDG_CACHE_HOME/foxnas_mlflow``, by default ``~/.cache/foxnas_mlflow``.
    """
    directory = cache_root().joinpath(*parts)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def cache_root() -> Path:
    """Where all such directories are; it may not be there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "foxnas_mlflow")


def sought(path: str | Path, error: OSError) -> str:
    """A file that could not be read as an error names it: where it was looked for, and why."""
    path = Path(path).expanduser()
    place = str(path) if path.is_absolute() else f"{path} in {Path.cwd()}"
    return f"{place}: {error.strerror or error}"


def json_digest(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file's content."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def cells_end_with(header: str) -> str:
    """What separates the cells of a table with this first line: a comma, or a semicolon, as in some countries."""
    return ";" if header.count(";") > header.count(",") else ","


def write_atomically(path: str | Path, data: bytes | str | Callable[[BinaryIO], None]) -> None:
    """Write a file so that readers, and a crash, see the old content or the new, never half of it.

    Args:
        path: The file.
        data: Its content, or what writes it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            if callable(data):
                data(file)
            else:
                file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def write_csv(path: str | Path, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a table with the names of its columns; None becomes an empty cell."""
    with Path(path).open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        writer.writerows(rows)


@contextlib.contextmanager
def worked_on(path: str | Path, what: str) -> Iterator[None]:
    """Hold a lock while the block runs; the system lets go of it when the process ends, however it ends.

    Args:
        path: The lock's file, made where there is none.
        what: What the lock protects, for the message.

    Raises:
        InvalidInputError: If another process holds it.
    """
    import fcntl

    with Path(path).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InvalidInputError(
                f"one process at a time works on {what}", received="a second one", remedy="wait until the other ends"
            ) from None
        yield


@contextlib.contextmanager
def in_turn(path: str | Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """As `worked_on`, but a second process waits until the first is done.

    Args:
        path: The lock's file, made where there is none.
        on_wait: Called before it waits.
    """
    import fcntl

    with Path(path).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            on_wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
