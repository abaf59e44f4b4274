"""The same picture, or nearly the same, where it should be once: in two classes, or trained on and validated on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.data._names import Paths
from foxnas_mlflow.data.preprocess import decode_image

NEAR_BITS = 6
"""Bits of 128 in which two looks may differ."""

NEAR_LEVELS = 8.0
"""Mean difference of grey levels, of 255, up to which two pictures of nearly the same look are nearly the same."""

_BANDS = 8  # Two looks of at most 7 differing bits have one of 8 bands in common.
_NEIGHBOURS = 32
_CONFIRMED = 200
_NAMED = 3
_SIDE = 32


@dataclass(frozen=True, eq=False)
class Listed:
    """Pictures of all parts, one after the other.

    Attributes:
        content: Digest of each file, (n, 2) uint64.
        look: Its look, (n, 2) uint64.
        part: Index of its part (n,).
        label: Index of its class (n,).
        parts: Names of the parts.
        path: Path of a picture.
        name: What a picture is called for a user.
    """

    content: NDArray[np.uint64]
    look: NDArray[np.uint64]
    part: NDArray[np.int64]
    label: NDArray[np.int64]
    parts: tuple[str, ...]
    path: Callable[[int], Path]
    name: Callable[[int], str]


def listed(parts: Mapping[str, tuple[Paths, NDArray[np.int64], NDArray[np.void]]], source: str) -> Listed:
    """Pictures of parts with their classes, and the facts of every name of their paths."""
    paths = [paths for paths, _, _ in parts.values()]
    starts = np.cumsum([0, *map(len, paths)])

    def path(i: int) -> Path:
        k = int(np.searchsorted(starts, i, "right")) - 1
        return paths[k][i - int(starts[k])]

    def name(i: int) -> str:
        found, root = path(i), Path(source).expanduser()
        root = root if root.is_dir() else root.parent
        return str(found.relative_to(root)) if found.is_relative_to(root) else str(found)

    return Listed(
        np.concatenate([facts["content"][p.rows] for p, _, facts in parts.values()]),
        np.concatenate([facts["look"][p.rows] for p, _, facts in parts.values()]),
        np.repeat(np.arange(len(paths)), np.diff(starts)),
        np.concatenate([label for _, label, _ in parts.values()]),
        tuple(parts),
        path,
        name,
    )


def duplicate_warnings(pictures: Listed) -> list[str]:
    """What a user should know of pictures that are there more than once, each with numbers and names."""
    near, n_alike = _nearly_identical(pictures)
    found = _told(pictures, _identical(pictures), "identical pictures")
    return found + _told(pictures, near, "nearly identical pictures", n_alike)


def _told(pictures: Listed, pairs: NDArray[np.int64], what: str, n_alike: int = 0) -> list[str]:
    found = []
    one, other = pairs.T
    classes = pictures.label[one] != pictures.label[other]
    if classes.any():
        found.append(f"{what} of different classes: {_named(pictures, pairs[classes], n_alike)}")
    for k in range(1, len(pictures.parts)):
        for j in range(k):
            split = (np.minimum(pictures.part[one], pictures.part[other]) == j) & (
                np.maximum(pictures.part[one], pictures.part[other]) == k
            )
            if split.any():
                names = f"both {pictures.parts[j]} and {pictures.parts[k]}"
                found.append(f"{what} in {names} images: {_named(pictures, pairs[split], n_alike)}")
    return found


def _named(pictures: Listed, pairs: NDArray[np.int64], n_alike: int) -> str:
    names = [f"{pictures.name(int(i))} = {pictures.name(int(j))}" for i, j in pairs[:_NAMED]]
    some = f", of {n_alike:,} pairs that may be {_CONFIRMED} were compared" if n_alike > _CONFIRMED else ""
    least = "at least " if some else ""
    return f"{least}{len(pairs)}{some} ({', '.join(names)}{', ...' if len(pairs) > _NAMED else ''})"


def _identical(pictures: Listed) -> NDArray[np.int64]:
    """Each picture that differs in part or class from the first of the same content, with that one; (k, 2)."""
    whole = np.ascontiguousarray(pictures.content).view("S16").ravel()
    _, first, inverse = np.unique(whole, return_index=True, return_inverse=True)
    return _telling(pictures, np.stack([first[inverse], np.arange(len(whole))], axis=1))


def _telling(pictures: Listed, pairs: NDArray[np.int64]) -> NDArray[np.int64]:
    one, other = pairs.T
    telling = (pictures.part[one] != pictures.part[other]) | (pictures.label[one] != pictures.label[other])
    return pairs.compress(telling, axis=0)


def _nearly_identical(pictures: Listed) -> tuple[NDArray[np.int64], int]:
    """Pairs of nearly the same look in different parts or classes that their pixels confirm, (k, 2); of how many.

    Not all are compared where they are many, and of all parts and classes as many.
    """
    alike = _alike(pictures)
    kinds = np.concatenate([np.sort(pictures.part[alike]), np.sort(pictures.label[alike])], axis=1)
    _, kind = np.unique(kinds, axis=0, return_inverse=True)
    kind = kind.ravel()  # of one dimension in every NumPy
    order = np.argsort(kind, kind="stable")
    turn = np.empty(len(alike), np.int64)
    turn[order] = np.arange(len(alike)) - np.searchsorted(kind[order], kind[order])
    chosen = np.sort(np.argsort(turn, kind="stable")[:_CONFIRMED])
    confirmed = [(i, j) for i, j in alike[chosen].tolist() if _confirmed(pictures.path(i), pictures.path(j))]
    return np.array(confirmed, np.int64).reshape(-1, 2), len(alike)


def _alike(pictures: Listed) -> NDArray[np.int64]:
    """Pairs in different parts or classes whose looks differ in a few bits and whose files differ, (k, 2)."""
    index = np.flatnonzero(pictures.look.any(axis=1))
    looks = pictures.look[index]
    bands = np.ascontiguousarray(looks).view(np.uint16).reshape(-1, _BANDS)
    found = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        order = np.lexsort((looks[:, 1], looks[:, 0], band))
        for step in range(1, min(_NEIGHBOURS, len(order) - 1) + 1):
            one, other = order[:-step], order[step:]
            same = band[one] == band[other]
            if not same.any():
                break
            one, other = one[same], other[same]
            bits = np.bitwise_count(looks[one] ^ looks[other]).sum(axis=1)
            pairs = np.sort(index[np.stack([one, other], axis=1)[bits <= NEAR_BITS]], axis=1)
            pairs = _telling(pictures, pairs)
            found.append(pairs[(pictures.content[pairs[:, 0]] != pictures.content[pairs[:, 1]]).any(axis=1)])
    return np.unique(np.concatenate(found), axis=0)


def _confirmed(one: Path, other: Path) -> bool:
    try:
        small = [_small(path) for path in (one, other)]
    except (InvalidInputError, OSError):
        return False
    return float(np.abs(small[0] - small[1]).mean()) <= NEAR_LEVELS


def _small(path: Path) -> NDArray[np.float64]:
    """A picture squeezed into a small grey square, (side, side)."""
    picture = import_or_raise("PIL.Image", extra="train", feature="reading images").fromarray(
        decode_image(path.read_bytes(), channels=3, shorter=_SIDE)
    )
    return np.asarray(picture.convert("L").resize((_SIDE, _SIDE), 2), np.float64)
