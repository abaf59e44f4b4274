"""Pictures as they were listed when work on them began, which goes on after some were mended, broke or were removed.

The digest of a data set is of the names and content of its whole files: one that is mended or removed makes it another.
Training that began with the former one is gone on with by its listing: the split stays, what broke since is skipped,
what was mended since is left out.

    listings/FOLDER/DIGEST.npz
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.files import cache_directory, write_atomically
from foxnas_mlflow.data._names import Names

_KEPT = 8
"""Listings of one folder; the oldest are removed."""

_OPTIONAL = ("groups", "contents")


@dataclass(frozen=True, eq=False)
class ListedPart:
    """The pictures of a part of a data set.

    Attributes:
        names: Names of all files, damaged ones too.
        n_bytes: Their sizes in bytes (n,).
        whole: Whether each could be decoded (n,).
        targets: Class indices (n,).
        groups: Groups (n,), or None.
        contents: Digests of the files (n, 2); None in listings of releases before.
    """

    names: Names
    n_bytes: NDArray[np.int64]
    whole: NDArray[np.bool_]
    targets: NDArray[np.int64]
    groups: NDArray[np.int64] | None = None
    contents: NDArray[np.uint64] | None = None

    def files(self, whole: bool) -> dict[str, bytes]:
        """By name what is known of the files that are whole, or of those that are damaged: sizes, and contents."""
        facts = self.n_bytes.reshape(-1, 1).astype(np.uint64)
        if self.contents is not None:
            facts = np.hstack([facts, self.contents])
        return {self.names[i]: facts[i].tobytes() for i in map(int, np.flatnonzero(self.whole == whole))}

    def beside(self, other: ListedPart) -> ListedPart:
        """This part as far as it can be compared with another one: by content where both know it."""
        return self if other.contents is not None else dataclasses.replace(self, contents=None)

    def belongs_as(self, other: ListedPart) -> bool:
        """Whether the files of both are of the same classes, and together in the same groups."""
        if (self.groups is None) != (other.groups is None):
            return False
        # A list may name a file twice: its first row is that of the first there.
        theirs: dict[str, list[int]] = {}
        for i in reversed(range(len(other.names))):
            theirs.setdefault(other.names[i], []).append(i)
        both = [(i, theirs[name].pop()) for i, name in enumerate(self.names) if theirs.get(name)]
        ours, its = np.array(both, np.int64).reshape(-1, 2).T
        if (self.targets[ours] != other.targets[its]).any():
            return False
        if self.groups is None or other.groups is None:
            return True
        # Groups have other numbers where one is gone.
        pairs = np.unique(np.stack([self.groups[ours], other.groups[its]]), axis=1)
        return all(len(np.unique(groups)) == len(groups) for groups in pairs)


@dataclass(frozen=True, eq=False)
class Listing:
    """The pictures of a data set.

    Attributes:
        labels: Class names.
        parts: By name: ``train``, ``val``, ``test``, or empty where there is no split.
        mean, std: Of the training images.
    """

    labels: tuple[str, ...]
    parts: Mapping[str, ListedPart]
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def n_whole(self) -> int:
        """Number of pictures that are whole."""
        return sum(int(part.whole.sum()) for part in self.parts.values())

    def is_like(self, other: Listing) -> bool:
        """Whether both have the same classes and parts, and the files of both belong to the same classes and groups."""
        if self.labels != other.labels or set(self.parts) != set(other.parts):
            return False
        return all(part.belongs_as(other.parts[name]) for name, part in self.parts.items())

    def n_lost(self, now: Listing) -> int:
        """How many of the whole pictures are not there any more as they were."""
        lost = 0
        for name, then in self.parts.items():
            part, then = now.parts[name].beside(then), then.beside(now.parts[name])
            lost += len(then.files(True).items() - part.files(True).items())
        return lost

    def is_mended_to(self, now: Listing) -> bool:
        """Whether nothing but damage makes the difference: files that were damaged then, or are now."""
        if not self.is_like(now):
            return False
        for name, then in self.parts.items():
            part, then = now.parts[name].beside(then), then.beside(now.parts[name])
            lost = then.files(True).items() - part.files(True).items()
            new = part.files(True).items() - then.files(True).items()
            if not {file for file, _ in lost} <= set(part.files(False)) | {file for file, _ in new}:
                return False
            if not {file for file, _ in new} <= set(then.files(False)):
                return False
        return True


def keep_listing(source: Path, digest: str, listing: Listing) -> None:
    """Keep what a data set was when it had this digest."""
    path = _place(source) / f"{digest}.npz"
    if path.is_file():
        os.utime(path)
        return
    facts = {"labels": listing.labels, "parts": list(listing.parts), "mean": listing.mean, "std": listing.std}
    arrays: dict[str, NDArray[Any]] = {"facts": np.frombuffer(json.dumps(facts).encode(), np.uint8)}
    for i, part in enumerate(listing.parts.values()):
        text, ends = part.names.arrays()
        arrays |= {f"{i}.text": text, f"{i}.ends": ends, f"{i}.n_bytes": part.n_bytes, f"{i}.whole": part.whole}
        arrays[f"{i}.targets"] = part.targets
        arrays |= {f"{i}.{key}": value for key in _OPTIONAL if (value := getattr(part, key)) is not None}
    write_atomically(path, lambda file: np.savez(file, **arrays))  # type: ignore[arg-type]
    for old in _kept(source)[_KEPT:]:
        old.unlink(missing_ok=True)


def open_listing(source: Path, digest: str) -> Listing | None:
    """What a data set was when it had this digest, where that is known."""
    try:
        with np.load(_place(source) / f"{digest}.npz") as stored:
            facts = json.loads(stored["facts"].tobytes())
            parts = {
                name: ListedPart(
                    Names.of(stored[f"{i}.text"], stored[f"{i}.ends"]),
                    stored[f"{i}.n_bytes"],
                    stored[f"{i}.whole"],
                    stored[f"{i}.targets"],
                    **{key: stored.get(f"{i}.{key}") for key in _OPTIONAL},
                )
                for i, name in enumerate(facts["parts"])
            }
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
    return Listing(tuple(facts["labels"]), parts, tuple(facts["mean"]), tuple(facts["std"]))


def earlier_digests(source: str, digest: str) -> list[str]:
    """Digests that a data set had before damage to its files was done or mended, the newest first.

    Args:
        source: The folder or list.
        digest: The one that it has now, whose listing is kept.
    """
    path = Path(source).expanduser()
    now = open_listing(path, digest) if path.exists() else None
    if now is None:
        return []
    found = []
    for file in _kept(path):
        then = open_listing(path, file.stem)
        if file.stem != digest and then is not None and then.is_mended_to(now):
            found.append(file.stem)
    return found


def _place(source: Path) -> Path:
    return cache_directory("listings", hashlib.sha256(os.fsencode(source.absolute())).hexdigest()[:32])


def _kept(source: Path) -> list[Path]:
    """Files of listings, the newest first."""
    return sorted(_place(source).glob("*.npz"), key=lambda path: path.stat().st_mtime, reverse=True)
