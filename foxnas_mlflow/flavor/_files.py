"""The manifest of a model: ``data/foxnas.json``, which lists every file of it with its SHA-256.

    MLmodel, conda.yaml, ...      MLflow's description, the environment, the example of an input
    code/foxnas_mlflow.zip        the package, as one archive that Python imports from
    data/foxnas.json              this manifest
    data/model.tflite, ...        the model

The manifest's own SHA-256 is kept where the model is not, in the registry (see `_seal`): who can write
to the artifacts cannot make a changed model look as it was logged.

Format versions, and when to raise the number: a reader of format n must read every format <= n; any
change that an older reader would misread raises it. New optional metadata does not.

1. kinds ``predictors`` and ``subnet``; keys format, kind, files.
2. all kinds; a further key ``metadata``, an object that belongs to the kind.
3. a further key ``model_files``: the files around ``data``, by their path in the model.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError
from foxnas_mlflow.core.files import file_digest

MODEL_FORMAT = 3
KINDS = ("supernet", "predictors", "subnet", "tflite", "edgetpu")
DATA = "data"
"""Directory of a model's own files, below that of MLflow's description."""

DESCRIPTION = "foxnas.json"
CODE = "code/foxnas_mlflow.zip"

_KEYS = {
    1: {"format", "kind", "files"},
    2: {"format", "kind", "files", "metadata"},
    3: {"format", "kind", "files", "metadata", "model_files"},
}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What ``foxnas.json`` says.

    Attributes:
        kind: One of `KINDS`.
        files: SHA-256 of every file beside it, by name.
        metadata: What the kind needs beside its files.
        model_files: SHA-256 of every file around, by its path in the model; empty before format 3.
        format: Format version that the directory was written in.
        sha256: Of the manifest itself.
    """

    kind: str
    files: Mapping[str, str]
    metadata: Mapping[str, Any]
    model_files: Mapping[str, str]
    format: int
    sha256: str


def check_kind(kind: object) -> str:
    """Return a known kind.

    Raises:
        InvalidInputError: If it is not one of `KINDS`.
    """
    if kind not in KINDS:
        raise InvalidInputError(f"kind must be one of {list(KINDS)}", received=repr(kind))
    return str(kind)


def write_manifest(model: Path, kind: str, metadata: Mapping[str, Any]) -> None:
    """Describe the files that are in a model's directory now; nothing may change after it."""
    data = model / DATA
    document = {
        "format": MODEL_FORMAT,
        "kind": check_kind(kind),
        "files": {file.name: file_digest(file) for file in sorted(data.iterdir())},
        "metadata": dict(metadata),
        "model_files": {path: file_digest(model / path) for path in _around(model)},
    }
    (data / DESCRIPTION).write_text(json.dumps(document, indent=1, allow_nan=False), encoding="utf-8")


def read_manifest(directory: Path) -> Manifest:
    """Read ``foxnas.json`` and check every file that it lists.

    Args:
        directory: The directory ``data`` of a model.

    Raises:
        InvalidFormatError: If it cannot be read, its format or kind is unknown, or a file is
            missing, not as it was logged, or one more than was logged.
    """
    try:
        text = (directory / DESCRIPTION).read_bytes()
        data = json.loads(text)
    except (OSError, ValueError) as error:
        raise InvalidFormatError(f"a foxnas model must hold a readable {DESCRIPTION}") from error
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, bool) or not isinstance(version, int) or not 1 <= version <= MODEL_FORMAT:
        raise InvalidFormatError(
            f"a foxnas model must have a format from 1 to {MODEL_FORMAT}",
            received=f"format {version!r}",
            remedy="load it with the release of foxnas-mlflow that wrote it, or a later one",
        )
    around = data.get("model_files", {})
    if set(data) != _KEYS[version] or not isinstance(data["files"], dict) or not isinstance(around, dict):
        raise InvalidFormatError(
            f"{DESCRIPTION} of format {version} has exactly the keys {sorted(_KEYS[version])}", received=sorted(data)
        )
    if data["kind"] not in KINDS:
        raise InvalidFormatError(
            f"a foxnas model's kind must be one of {list(KINDS)}",
            received=repr(data["kind"]),
            remedy="load it with the release of foxnas-mlflow that wrote it, or a later one",
        )
    for name, expected in data["files"].items():
        # A name with a separator would let a manifest point outside of its model.
        if Path(name).name != name or not _is(directory / name, expected):
            raise _changed(f"{Path(name).name} changed or missing")
    for name, expected in around.items():
        if Path(name).is_absolute() or ".." in Path(name).parts or not _is(directory.parent / name, expected):
            raise _changed(f"{Path(name).name} changed or missing")
    if version >= 3:
        # Python would import, and a kind would read, what was put beside the files that were logged.
        here = {file.name for file in directory.iterdir()} - {DESCRIPTION} - set(data["files"])
        code = {path for path in _around(directory.parent) if path.startswith("code/")} - set(around)
        for name in sorted(here | code):
            raise _changed(f"{Path(name).name}, which was not logged")
    return Manifest(
        data["kind"],
        data["files"],
        data.get("metadata", {}),
        around,
        version,
        hashlib.sha256(text).hexdigest(),
    )


def write_code(model: Path) -> None:
    """Put this package into a model as one archive; the same code always gives the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, file in sorted(_sources(importlib.resources.files("foxnas_mlflow"), "foxnas_mlflow")):
            archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), file.read_bytes(), zipfile.ZIP_DEFLATED)
    target = model / CODE
    target.parent.mkdir()
    target.write_bytes(buffer.getvalue())


def _sources(directory: Traversable, name: str) -> Iterator[tuple[str, Traversable]]:
    for entry in directory.iterdir():
        path = f"{name}/{entry.name}"
        if entry.is_dir():
            yield from _sources(entry, path)
        elif entry.name.endswith((".py", ".json", ".typed")):
            yield path, entry


def _around(model: Path) -> list[str]:
    """Paths of a model's files outside of ``data``; what Python compiled while it was loaded is none of them."""
    files = (file.relative_to(model) for file in model.rglob("*") if file.is_file())
    return sorted(file.as_posix() for file in files if file.parts[0] != DATA and "__pycache__" not in file.parts)


def _is(file: Path, expected: str) -> bool:
    return file.is_file() and file_digest(file) == expected


def _changed(received: str) -> InvalidFormatError:
    return InvalidFormatError(
        "a model's files must be as they were logged",
        received=received,
        remedy="log the model again, or download it again",
    )
