"""Files written in one step."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path


def cache_directory(*parts: str) -> Path:
    """A directory that outlives the process, made where the system keeps caches.

    Args:
        parts: Its place below ``$XDG_CACHE_HOME/foxnas_mlflow``, by default ``~/.cache/foxnas_mlflow``.
    """
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    directory = Path(root, "foxnas_mlflow", *parts)
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def write_atomically(path: str | Path, data: bytes | str) -> None:
    """Write a file so that readers, and a crash, see the old content or the new, never half of it."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode("utf-8") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
