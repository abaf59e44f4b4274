"""What is known of a user's pictures, and their decoded pixels, kept from one step to the next.

Below the cache directory:

    pictures/FOLDER.npy                facts of the pictures below a folder, see `FACTS`
    pictures/FOLDER.lock               held while they are looked at
    pixels/CONTENT-SIZE/contents.npy   digest of the picture in each row, (n, 2) uint64
    pixels/CONTENT-SIZE/pixels         (n, size, size, 3) uint8, mapped into memory
    pixels/.FOLDER-..., .old-...       half made, or half removed

CONTENT is the digest of what all pictures of a data set contain, wherever they lie. A directory gets its name when
it is whole. All pixels together take `FOXNAS_CACHE_GIB`; what was used least recently goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.core.files import cache_directory, in_turn, write_atomically
from foxnas_mlflow.data._look import FACTS, look_at_all
from foxnas_mlflow.data._names import Paths
from foxnas_mlflow.data.preprocess import read_formats

CACHE_GIB = "FOXNAS_CACHE_GIB"
"""Environment variable: GiB that decoded pixels may take on disk; 0 keeps none."""

DEFAULT_CACHE_GIB = 20.0
KEPT_FREE_BYTES = 2**30
"""So much is left free on the disk."""

_FEW_OTHERS = 10_000

logger = logging.getLogger("foxnas_mlflow")

Contents = NDArray[np.uint64]
"""Digest of what each picture contains, shape (n, 2)."""


@dataclass(frozen=True, eq=False)
class Pixels:
    """Decoded pixels of one size.

    Attributes:
        array: uint8 (rows, size, size, 3), mapped into memory.
        rows: Row of each name of the pictures' `Paths`, -1 where there is none.
    """

    array: NDArray[np.uint8]
    rows: NDArray[np.int64]


def cache_limit_bytes() -> int:
    """What decoded pixels may take on disk.

    Raises:
        InvalidInputError: If the environment variable is no such number.
    """
    text = os.environ.get(CACHE_GIB, "")
    try:
        limit = float(text) if text else DEFAULT_CACHE_GIB
    except ValueError:
        limit = -1.0
    if not 0 <= limit < float("inf"):
        raise InvalidInputError(f"{CACHE_GIB} must be a number of GiB, 0 or more", received=repr(text))
    return int(limit * 2**30)


def look_through(
    paths: Paths, sizes: Sequence[int] = (), *, keep: bool = False
) -> tuple[NDArray[Any], NDArray[np.int64], dict[int, Pixels]]:
    """Facts of pictures, and their pixels where they are kept; what is not known yet is looked at once.

    Args:
        paths: The pictures.
        sizes: Sizes in pixels that will be asked for.
        keep: Make the pixels that are not there, as far as there is room.

    Returns:
        Facts (n,); sizes of the files in bytes (n,), -1 where there is none; pixels by size.
    """
    folder = hashlib.sha256(os.fsencode(paths.root.absolute())).hexdigest()[:32]
    place = cache_directory("pictures")

    def waiting() -> None:
        logger.info("waiting for another process that looks through the pictures of %s", paths.root)

    with in_turn(place / f"{folder}.lock", waiting):
        _clean_up(folder)
        keys, n_bytes = _keys(paths)
        facts, unknown = _known(place / f"{folder}.npy", keys)
        making: _Making | None = None
        if len(unknown) == len(paths) and keep and sizes:
            # One pass for everything; what is damaged leaves its row empty.
            making = _room_for(folder, len(paths), sizes)
        if len(unknown):
            outputs = making.outputs if making else []
            with _bar(len(unknown), "looking at pictures") as progress:
                facts[unknown] = look_at_all(paths.take(unknown), outputs, progress=progress)
            facts["key"] = keys
            _remember(place / f"{folder}.npy", facts)
        content = _digest(facts)
        if making:
            making.finish(content, facts["content"])
        found = _open_all(content, sizes, paths, facts)
        missing = [size for size in sizes if size not in found]
        if keep and missing and making is None and facts["whole"].any():
            whole = np.flatnonzero(facts["whole"])
            making = _room_for(folder, len(whole), missing, content)
            if making:
                with _bar(len(whole), "decoding pictures") as progress:
                    look_at_all(paths.take(whole), making.outputs, progress=progress)
                making.finish(content, facts["content"][whole])
                found = _open_all(content, sizes, paths, facts)
        if keep and sizes and not found:
            _say_no_room(len(paths), max(sizes))
    return facts, n_bytes, found


def _keys(paths: Paths) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """What a file is known by: its name, size and time of change; and its size."""
    keys, sizes = np.empty(len(paths), np.uint64), np.empty(len(paths), np.int64)
    root, decoder = os.fspath(paths.root), _decoder()
    for i, row in enumerate(paths.rows):
        name = paths.names[int(row)]
        try:
            stat = os.stat(os.path.join(root, name))
            fact, sizes[i] = f"{name}:{stat.st_size}:{stat.st_mtime_ns}:{decoder}", stat.st_size
        except OSError:
            fact, sizes[i] = f"{name}:gone", -1
        keys[i] = int.from_bytes(hashlib.blake2b(os.fsencode(fact), digest_size=8).digest(), "little")
    return keys, sizes


def _known(path: Path, keys: NDArray[np.uint64]) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Facts of files, and the indices of those that nothing is known of.

    What could not be read is looked at again: rights, memory or a disk may have been the cause, and no key tells.
    """
    facts, stored = np.zeros(len(keys), FACTS), _stored(path)
    if not len(stored):
        return facts, np.arange(len(keys))
    at = np.minimum(np.searchsorted(stored["key"], keys), len(stored) - 1)
    here = (stored["key"][at] == keys) & stored["whole"][at]
    facts[here] = stored[at[here]]
    return facts, np.flatnonzero(~here)


def _remember(path: Path, facts: NDArray[Any]) -> None:
    """Keep facts, and those of other files of the folder, which another list may name, while they are not too many."""
    stored = _stored(path)
    others = stored[~np.isin(stored["key"], facts["key"])]
    if len(others) <= len(facts) + _FEW_OTHERS:
        facts = np.concatenate([facts, others])
    facts = facts[np.argsort(facts["key"])]
    write_atomically(path, lambda file: np.save(file, facts))


def _stored(path: Path) -> NDArray[Any]:
    try:
        stored: NDArray[Any] = np.load(path)
    except (OSError, ValueError, EOFError):
        return np.zeros(0, FACTS)
    return stored if stored.dtype == FACTS else np.zeros(0, FACTS)


def _digest(facts: NDArray[Any]) -> str:
    """Of what the pictures that are whole contain, in whatever order."""
    contents = facts["content"][facts["whole"]]
    return hashlib.sha256(_decoder().encode() + np.sort(_as_one(contents)).tobytes()).hexdigest()[:32]


def _decoder() -> str:
    """What decodes: other formats, and another release of Pillow, may see other pixels or none."""
    pillow = import_or_raise("PIL", extra="train", feature="reading images")
    return f"1 {pillow.__version__} {' '.join(read_formats())}"


def _as_one(contents: Contents) -> NDArray[np.bytes_]:
    """Each digest as one value that can be sorted, shape (n,)."""
    return np.ascontiguousarray(contents).view("S16").ravel()


def _open_all(content: str, sizes: Sequence[int], paths: Paths, facts: NDArray[Any]) -> dict[int, Pixels]:
    opened = {size: _open(content, size, paths, facts["content"]) for size in sizes}
    return {size: pixels for size, pixels in opened.items() if pixels is not None}


def _open(content: str, size: int, paths: Paths, contents: Contents) -> Pixels | None:
    """Kept pixels of a data set."""
    directory = cache_directory("pixels") / f"{content}-{size}"
    try:
        stored = _as_one(np.load(directory / "contents.npy"))
        array = np.memmap(directory / "pixels", np.uint8, "r", shape=(len(stored), size, size, 3))
        os.utime(directory)
    except (OSError, ValueError, EOFError):
        return None
    order = np.argsort(stored)
    wanted = _as_one(contents)
    at = np.minimum(np.searchsorted(stored, wanted, sorter=order), len(stored) - 1)
    rows = np.full(len(paths.names), -1)
    rows[paths.rows] = np.where(stored[order[at]] == wanted, order[at], -1)
    return Pixels(array, rows)


@dataclass(frozen=True)
class _Making:
    """Pixels that are being decoded: a directory a size."""

    directories: Mapping[int, Path]

    @property
    def outputs(self) -> list[tuple[int, str]]:
        """Sizes and the files of their pixels."""
        return [(size, str(directory / "pixels")) for size, directory in self.directories.items()]

    def finish(self, content: str, contents: Contents) -> None:
        """Give them the name by which they are found."""
        for size, directory in self.directories.items():
            np.save(directory / "contents.npy", contents)
            try:
                os.rename(directory, directory.with_name(f"{content}-{size}"))
            except OSError:  # The same pictures of another folder were faster.
                shutil.rmtree(directory, ignore_errors=True)


def _room_for(folder: str, n: int, sizes: Sequence[int], content: str = "-") -> _Making | None:
    """Files for the pixels of all sizes, of the largest alone, or none: as there is room beside what `content` has."""
    place, limit = cache_directory("pixels"), cache_limit_bytes()
    for chosen in dict.fromkeys([tuple(sorted(set(sizes))), (max(sizes),)]):
        needed = sum(n * size * size * 3 for size in chosen)
        if not _evict(place, limit - needed, content) or needed > shutil.disk_usage(place).free - KEPT_FREE_BYTES:
            continue
        made: dict[int, Path] = {}
        try:
            for size in chosen:
                made[size] = Path(tempfile.mkdtemp(prefix=f".{folder}-", dir=place))
                with (made[size] / "pixels").open("wb") as file:
                    # A disk that is full says so now, not by a signal when a page is written.
                    os.posix_fallocate(file.fileno(), 0, max(n * size * size * 3, 1))
        except OSError:
            for directory in made.values():
                shutil.rmtree(directory, ignore_errors=True)
            continue
        return _Making(made)
    return None


def _say_no_room(n: int, size: int) -> None:
    place = cache_directory("pixels")
    logger.warning(
        "%s decoded pictures are not kept: at %d px they take %.3f GiB, %s allows %g and %s has %.1f free; "
        "each is decoded again whenever it is needed",
        f"{n:,}",
        size,
        n * size * size * 3 / 2**30,
        CACHE_GIB,
        cache_limit_bytes() / 2**30,
        place,
        shutil.disk_usage(place).free / 2**30,
    )


def _evict(place: Path, limit: int, spared: str) -> bool:
    """Remove what was used least recently, `spared` not, until all takes at most so many bytes; whether it does."""
    kept, total = [], 0
    for directory in place.iterdir():
        with contextlib.suppress(OSError):
            n_bytes = (directory / "pixels").stat().st_size
            total += n_bytes
            if not directory.name.startswith((".", spared)):
                kept.append((directory.stat().st_mtime, n_bytes, directory))
    if total - sum(n_bytes for _, n_bytes, _ in kept) > limit:
        return False
    for _, n_bytes, directory in sorted(kept):
        if total <= limit:
            break
        total -= n_bytes
        with contextlib.suppress(OSError):
            # Whoever has it open keeps what it has mapped.
            gone = directory.with_name(f".old-{directory.name}-{os.getpid()}")
            directory.rename(gone)
            shutil.rmtree(gone, ignore_errors=True)
    return total <= limit


def _clean_up(folder: str) -> None:
    """Remove what a process that was killed left of this folder's pixels."""
    for pattern in (f".{folder}-*", ".old-*"):
        for directory in cache_directory("pixels").glob(pattern):
            shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def _bar(n: int, what: str) -> Iterator[Any]:
    """Shows how far a pass over pictures is: a bar on a terminal, nothing elsewhere."""
    from tqdm import tqdm

    with tqdm(desc=what, total=n, unit="picture", disable=None, dynamic_ncols=True) as bar:
        yield bar.update
