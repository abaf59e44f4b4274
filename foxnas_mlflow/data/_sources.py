"""What a user's folder holds: its parts, its classes, its pictures, and what is none of these."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, cast

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.files import cells_end_with
from foxnas_mlflow.data._names import Names
from foxnas_mlflow.data.preprocess import READERS, read_formats

PARTS: Mapping[str, str] = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
"""Usual names of the parts of a data set, in small letters and without what is usually appended."""

LIST_SUFFIXES = (".csv", ".jsonl", ".ndjson")
"""A list of pictures with their labels."""

_SUFFIXES: Mapping[str, str] = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".avif": "AVIF",
    ".heic": "HEIF",
    ".heif": "HEIF",
}
_JUNK = frozenset({"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found"})
UNREADABLE = (OSError, EOFError, zlib.error)
"""What reading a file that may be packed with gzip raises where it is damaged."""

_IDX_HEADERS = tuple(bytes((0, 0, 8, n)) for n in (1, 3))


@dataclass
class Pictures:
    """Pictures with their classes, in the order in which they are counted.

    Attributes:
        root: Folder that the names are relative to.
        names: One a picture.
        labels: Its class.
        parts: ``train``, ``val`` or ``test``; empty where the source does not say.
        groups: The group that each belongs to; none where the source has no groups.
        unread: How many files of each suffix are not read.
        notes: What a user should know of the source.
    """

    root: Path
    names: Names = field(default_factory=Names)
    labels: list[str] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def is_junk(name: str) -> bool:
    """Whether systems and programs leave a file or folder of this name beside a user's own."""
    return name.startswith(".") or name.lower() in _JUNK


def is_idx(path: Path) -> bool:
    """Whether a file begins as an IDX file of labels or grey images does, compressed with gzip or not."""
    try:
        with open_unpacked(path) as file:
            return file.read(4) in _IDX_HEADERS
    except UNREADABLE:
        return False


def open_unpacked(path: Path) -> BinaryIO:
    """A file's bytes; unpacked where they begin as gzip does, whatever its name ends with.

    Raises:
        OSError: If it cannot be opened; reading it may raise any of `UNREADABLE`.
    """
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return cast(BinaryIO, gzip.open(path, "rb")) if packed else path.open("rb")


def find_root(path: Path) -> Path:
    """The folder that holds parts or classes: the given one, or the only one inside it that has folders itself."""
    folders = list(subfolders(path).values())
    return folders[0] if len(folders) == 1 and subfolders(folders[0]) and _part(folders[0].name) is None else path


def subfolders(path: Path) -> dict[str, Path]:
    """Folders by name, in order, without what is junk."""
    with os.scandir(path) as entries:
        # What an entry is costs nothing to ask, but of a link, and classes have thousands of files.
        found = [e.name for e in entries if not is_junk(e.name) and (Path(e) if e.is_symlink() else e).is_dir()]
    return {name: path / name for name in sorted(found)}


def find_parts(root: Path) -> tuple[dict[str, Path], list[str]]:
    """The folders ``train``, ``val`` and ``test`` under whatever usual names they have.

    Where there is no ``val``, ``test`` is what a network is validated on. Where that has no class folders either, as
    images have that are to be labelled, ``train`` is all there is.

    Returns:
        Folders of classes by part, one under an empty name where there is no split; and what a user should know of
        the other folders.

    Raises:
        InvalidInputError: If a part is missing, or two folders mean the same part.
    """
    folders = subfolders(root)
    inside = {name: tuple(subfolders(folder)) for name, folder in folders.items()}
    meant = dict(zip(folders, _parts_meant(list(folders)), strict=True))
    found: dict[str, Path] = {}
    others: list[str] = []
    for name, folder in folders.items():
        part, classes = meant[name], inside[name]
        if classes == (name,):  # as an archive is unpacked
            folder = folder / name
            classes = tuple(subfolders(folder))
        # A class may be called so too; a part has folders inside.
        if part is None or not classes:
            others.append(name)
            continue
        if part in found:
            raise InvalidInputError(
                f"one folder is the part '{part}'", received=f"{found[part].name} and {name}", remedy="remove one"
            )
        found[part] = folder
    notes = [f"{name} is not used: it has no class folders of a part" for name in others]
    if "val" not in found and "train" in found and "test" in found:
        found["val"] = found.pop("test")
        notes.append(validated_on(found["val"].name))
    if {"train", "val"} <= set(found):
        return found, notes
    if (found or len(folders) > 1) and None not in meant.values():
        if "train" in found and others:
            return {"": found["train"]}, notes
        raise InvalidInputError(
            "a folder with a split needs both 'train' and 'val', with one folder a class in each",
            received=sorted(folders),
            remedy="add the other, or put the class folders at the top",
        )
    return {"": root}, _doubts(inside, found)


def validated_on(test: str) -> str:
    """What a user should know where test images are all that there is to validate on."""
    return f"{test} is validated on, as there is no val: networks are chosen by it, and no images are held out"


def _doubts(inside: Mapping[str, tuple[str, ...]], parts: Mapping[str, Path]) -> list[str]:
    """What lets folders that are read as classes be parts of a split: a name, or the same folders inside."""
    found = [f"{folder.name} is read as a class, like all folders beside it" for folder in parts.values()]
    for folders in sorted({names for names in inside.values() if len(names) > 1}):
        alike = [name for name, names in inside.items() if names == folders]
        if len(alike) > 1:
            found.append(
                f"{', '.join(alike[:3])} are read as classes, and have the same folders inside: if they are parts of a "
                "split, name them train and val"
            )
    return found


def _parts_meant(names: list[str]) -> list[str | None]:
    """The part that each of some folders' names means, also behind what they all begin with."""
    heads = {name[: 1 + max(name.rfind(mark) for mark in "_ -")] for name in names}
    begin = len(heads.pop()) if len(heads) == 1 < len(names) else 0
    return [_part(name) or _part(name[begin:]) for name in names]


def _part(name: str) -> str | None:
    """The part that a folder's name means."""
    return PARTS.get(re.sub(r"[_ -]?(images|imgs|set|data)$", "", name.lower()))


def pictures_of(root: Path, labels: list[str]) -> Pictures:
    """The pictures of class folders, those in folders inside them too."""
    found, formats = Pictures(root), read_formats()
    for label in labels:
        for name in sorted(_files(root / label, label), key=lambda name: name.split("/")):
            suffix = os.path.splitext(name)[1].lower()
            if _SUFFIXES.get(suffix) not in formats:
                found.unread[suffix or "no suffix"] += 1
                continue
            found.names.append(name)
            found.labels.append(label)
            found.parts.append("")
    return found


def reader_for(suffixes: Iterable[str]) -> str | None:
    """What brings the decoders of these suffixes that are not here; None where nothing is known to."""
    lacking = {_SUFFIXES.get(suffix) for suffix in suffixes} - set(read_formats())
    return " and ".join(how for name, how in READERS.items() if name in lacking) or None


def unread_words(unread: Mapping[str, int]) -> str:
    """How many files of each suffix are not read, and what would read them."""
    reader = reader_for(unread)
    listed = ", ".join(f"{n} {suffix}" for suffix, n in sorted(unread.items()))
    return listed + (f" (read with: {reader})" if reader else "")


def pictures_below(folder: Path) -> Pictures:
    """The pictures in a folder and in folders inside it, which have no classes."""
    folder = folder.resolve()
    return pictures_of(folder.parent, [folder.name])


def _files(folder: Path, prefix: str) -> list[str]:
    names = []
    for entry in os.scandir(folder):
        if is_junk(entry.name):
            continue
        name = f"{prefix}/{entry.name}"
        names.extend(_files(Path(entry.path), name) if entry.is_dir() else [name])
    return names


def pictures_of_list(path: Path) -> Pictures:
    """The pictures of a CSV or JSON Lines list with the columns ``file``, ``label``, perhaps ``split`` and ``group``.

    Files are relative to the list.

    Raises:
        InvalidInputError: If a column is missing or a split has an unknown name; the message names the line.
    """
    found = Pictures(path.parent)
    for number, row in _rows(path):
        # As it is written: names of classes are in the digests of lists that supernets were trained on.
        label = "" if row.get("label") is None else str(row["label"])
        if not row.get("file") or not label.strip():
            columns = "" if {"file", "label"} <= set(row) else f", whose columns are {', '.join(map(str, row))}"
            raise InvalidInputError(
                "every line of a list needs a 'file' and a 'label'", received=f"line {number} of {path.name}{columns}"
            )
        part = str(row.get("split") or "").lower()
        if part and part not in PARTS:
            raise InvalidInputError(
                f"a split is one of {', '.join(PARTS)}", received=f"{part!r} in line {number} of {path.name}"
            )
        found.names.append(str(row["file"]))
        found.labels.append(sys.intern(label))
        found.parts.append(PARTS.get(part, ""))
        if (group := row.get("group")) not in (None, ""):
            found.groups.append(sys.intern(str(group)))
    if found.groups and len(found.groups) < len(found.names):
        raise InvalidInputError("every line of a list has a group, or none has", received=path.name)
    if any(found.parts) and not all(found.parts):
        raise InvalidInputError("every line of a list has a split, or none has", received=path.name)
    if "val" not in found.parts and "test" in found.parts:
        found.notes.append(validated_on("test"))
        found.parts = ["val" if part == "test" else part for part in found.parts]
    if any(found.parts) and not {"train", "val"} <= set(found.parts):
        raise InvalidInputError("a list with a split needs both 'train' and 'val'", received=sorted(set(found.parts)))
    return found


def _rows(path: Path) -> list[tuple[int, Mapping[str, object]]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".csv":
            lines = text.splitlines()
            return list(enumerate(csv.DictReader(lines, delimiter=cells_end_with("".join(lines[:1]))), 2))
        rows = [(i, json.loads(line)) for i, line in enumerate(text.splitlines(), 1) if line.strip()]
    except (OSError, ValueError, csv.Error) as error:
        raise InvalidInputError("a list of pictures must be readable", received=f"{path.name}: {error}") from error
    for number, row in rows:
        if not isinstance(row, dict):
            raise InvalidInputError(
                "every line of a list is one JSON object", received=f"another value in line {number} of {path.name}"
            )
    return rows
