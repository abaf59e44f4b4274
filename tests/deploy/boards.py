"""Directories of deployments, whose services end with the test."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from foxnas_mlflow.deploy.runner import delete


@contextlib.contextmanager
def board(root: Path) -> Iterator[str]:
    """The target URI of a board that is a directory."""
    try:
        yield f"edge://local?root={root}"
    finally:
        clear(root)


def clear(root: Path) -> None:
    """Delete all deployments."""
    for place in root.glob("*/versions"):
        delete(root, place.parent.name)
