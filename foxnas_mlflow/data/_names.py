"""Names of many files in little memory: an object for each of 1.28 million paths would take 400 MB."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray


class Names:
    """Names one after the other in one string of bytes; grows at its end.

    Args:
        names: The first ones.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._text, self._ends = bytearray(), array("q", [0])
        for name in names:
            self.append(name)

    @classmethod
    def of(cls, text: NDArray[np.uint8], ends: NDArray[np.int64]) -> Names:
        """Those that `arrays` gave."""
        names = cls()
        names._text, names._ends = bytearray(text.tobytes()), array("q", ends.tobytes())
        return names

    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """All names one after the other, and where each ends, (n + 1,)."""
        return np.frombuffer(bytes(self._text), np.uint8), np.array(self._ends, np.int64)

    def append(self, name: str) -> None:
        """Add one."""
        self._text += os.fsencode(name)
        self._ends.append(len(self._text))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(bytes(self._text[self._ends[i] : self._ends[i + 1]]))

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class Paths(Sequence[Path]):
    """Files below a folder, a path made when one is asked for.

    Args:
        root: The folder.
        names: Their names and others', relative to it.
        rows: Which of the names; None: all.
    """

    def __init__(self, root: Path, names: Names, rows: NDArray[np.int64] | None = None) -> None:
        self.root, self.names = root, names
        self.rows = np.arange(len(names)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, i: int) -> Path: ...

    @overload
    def __getitem__(self, i: slice) -> Paths: ...

    def __getitem__(self, i: int | slice) -> Path | Paths:
        return self.take(np.arange(len(self))[i]) if isinstance(i, slice) else self.root / self.names[int(self.rows[i])]

    def take(self, index: NDArray[np.int64]) -> Paths:
        """Some of them, in this order."""
        return Paths(self.root, self.names, self.rows[index])
