"""What is copied to a board: the model, a smoke test, the runner, and a description with checksums."""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.flavor import TfliteModel
from foxnas_mlflow.runtime import EDGETPU_DELEGATE, Classifier

DEPLOYMENT_FORMAT = 1
SMOKE_IMAGES = 3

_SHIPPED = ("_version.py", "core/errors.py", "data/preprocess.py", "runtime.py")
_PACKAGES = ("__init__.py", "core/__init__.py", "data/__init__.py")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Configuration of a deployment.

    Attributes:
        threads: Threads of one inference.
        delegate: Shared library of a delegate on the board, empty for its processor, or None for
            the one that the kind needs.
        tolerance: Largest difference between the board's output and the host's, in the output's
            own steps. Equal kernels give 0; other ones round differently by 1.
    """

    threads: int = 1
    delegate: str | None = None
    tolerance: float = 2.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Options:
        """Read the strings of ``-C key=value``.

        Raises:
            InvalidInputError: If a key is unknown or a value breaks a rule.
        """
        unknown = sorted(set(config) - set(cls.__dataclass_fields__))
        if unknown:
            raise InvalidInputError(
                f"the configuration of a deployment has only the keys {sorted(cls.__dataclass_fields__)}",
                received=unknown,
            )
        try:
            threads, tolerance = int(config.get("threads", 1)), float(config.get("tolerance", 2.0))
        except (TypeError, ValueError):
            raise InvalidInputError("threads and tolerance must be numbers", received=dict(config)) from None
        if threads < 1 or not tolerance >= 0:
            raise InvalidInputError("threads must be 1 or more and tolerance 0 or more", received=dict(config))
        return cls(threads=threads, delegate=config.get("delegate"), tolerance=tolerance)


def bundle(
    model: TfliteModel, options: Options, *, name: str, kind: str, source: str, model_id: str | None
) -> dict[str, bytes]:
    """The files of a deployment, ``deployment.json`` with the checksums of the others last.

    Args:
        model: The model.
        options: Configuration.
        name: Name of the deployment.
        kind: ``tflite`` or ``edgetpu``.
        source: URI of the model.
        model_id: Id of the logged model, if it has one.

    Raises:
        InvalidInputError: If an Edge TPU model has no twin that this host could answer with.
    """
    twin = model.fallback if kind == "edgetpu" else model.path
    if twin is None:
        raise InvalidInputError(
            "a compiled model needs its processor twin, to know the right answers on a board",
            remedy="log it with fallback=, as foxnas quantize does",
        )
    classifier = Classifier(twin, model.preprocessing.normalization, model.output)
    images = np.random.default_rng(0).integers(0, 256, (SMOKE_IMAGES, *classifier.input_shape), dtype=np.uint8)
    smoke = io.BytesIO()
    np.savez_compressed(smoke, images=images, outputs=np.stack([classifier.raw(image) for image in images]))
    files = {"model.tflite": model.path.read_bytes(), "smoke.npz": smoke.getvalue(), "runner.pyz": runner()}
    default = EDGETPU_DELEGATE if kind == "edgetpu" else ""
    description = {
        "format": DEPLOYMENT_FORMAT,
        "name": name,
        "flavor": "foxnas",
        "foxnas_version": __version__,
        "kind": kind,
        "model_uri": source,
        "model_id": model_id,
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        "labels": list(model.labels),
        "preprocessing": model.preprocessing.to_dict(),
        "output": model.output,
        "threads": options.threads,
        "delegate": default if options.delegate is None else options.delegate,
        "tolerance": options.tolerance,
    }
    return {**files, "deployment.json": json.dumps(description, indent=1).encode()}


def runner() -> bytes:
    """The runner as one zip that Python runs, with the modules of this package that it uses.

    The same files in the same order always give the same bytes.
    """
    package = importlib.resources.files("foxnas_mlflow")
    contents = {"__main__.py": package.joinpath("deploy", "runner.py").read_bytes()}
    contents |= {f"foxnas_mlflow/{path}": b"" for path in _PACKAGES}
    contents |= {f"foxnas_mlflow/{path}": package.joinpath(*path.split("/")).read_bytes() for path in _SHIPPED}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in contents.items():
            archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
