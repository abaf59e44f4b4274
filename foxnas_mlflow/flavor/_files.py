"""The model directory: ``foxnas.json`` beside the files that it lists, each with its SHA-256.

Format versions, and when to raise the number: a reader of format n must read every format <= n; any
change that an older reader would misread raises it. New optional metadata does not.

1. kinds ``predictors`` and ``subnet``; keys format, kind, files.
2. all kinds; a further key ``metadata``, an object that belongs to the kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError

MODEL_FORMAT = 2
KINDS = ("supernet", "predictors", "subnet", "tflite", "edgetpu")
DESCRIPTION = "foxnas.json"


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``foxnas.json`` says.

    Attributes:
        kind: One of `KINDS`.
        files: SHA-256 of every file, by name.
        metadata: What the kind needs beside its files.
        format: Format version that the directory was written in.
    """

    kind: str
    files: Mapping[str, str]
    metadata: Mapping[str, Any]
    format: int = MODEL_FORMAT


def check_kind(kind: object) -> str:
    """Return a known kind.

    Raises:
        InvalidInputError: If it is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"kind must be one of {list(KINDS)}", received=repr(kind))
    return str(kind)


def write_manifest(directory: Path, kind: str, metadata: Mapping[str, Any]) -> Manifest:
    """Describe the files that are in the directory now."""
    files = {file.name: sha256(file) for file in sorted(directory.iterdir())}
    manifest = Manifest(check_kind(kind), files, dict(metadata))
    text = json.dumps(
        {"format": MODEL_FORMAT, "kind": kind, "files": files, "metadata": dict(metadata)}, indent=1, allow_nan=False
    )
    (directory / DESCRIPTION).write_text(text, encoding="utf-8")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """Read ``foxnas.json`` and check every file that it lists.

    Raises:
        InvalidFormatError: If it cannot be read, its format or kind is unknown, or a file is
            missing or not as it was logged.
    """
    try:
        data = json.loads((directory / DESCRIPTION).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidFormatError(f"a foxnas model must hold a readable {DESCRIPTION}") from error
    keys = {1: {"format", "kind", "files"}, 2: {"format", "kind", "files", "metadata"}}
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= MODEL_FORMAT:
        raise InvalidFormatError(
            f"a foxnas model must have a format from 1 to {MODEL_FORMAT}",
            received=f"format {version!r}",
            remedy="load it with the release of foxnas-mlflow that wrote it, or a later one",
        )
    if set(data) != keys[version] or not isinstance(data["files"], dict):
        raise InvalidFormatError(
            f"{DESCRIPTION} of format {version} has exactly the keys {sorted(keys[version])}", received=sorted(data)
        )
    if data["kind"] not in KINDS:
        raise InvalidFormatError(
            f"a foxnas model's kind must be one of {list(KINDS)}",
            received=repr(data["kind"]),
            remedy="load it with the release of foxnas-mlflow that wrote it, or a later one",
        )
    for name, expected in data["files"].items():
        file = directory / name
        # A name with a separator would let a manifest point outside of its model.
        if Path(name).name != name or not file.is_file() or sha256(file) != expected:
            raise InvalidFormatError(
                "a model's files must be as they were logged",
                received=f"{Path(name).name} changed or missing",
                remedy="log the model again, or download it again",
            )
    return Manifest(data["kind"], data["files"], data.get("metadata", {}), version)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
