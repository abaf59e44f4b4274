"""What is copied to a board: the model, a smoke test, the runner, and a description with checksums."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from foxnas_mlflow._version import __version__
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.flavor import TfliteModel
from foxnas_mlflow.runtime import EDGETPU_DELEGATE, Classifier

DEPLOYMENT_FORMAT = 1
SMOKE_IMAGES = 3

_SHIPPED = (
    "_version.py",
    "core/errors.py",
    "core/places.py",
    "core/redaction.py",
    "core/rejection.py",
    "data/preprocess.py",
    "data/received.py",
    "deploy/boot.py",
    "deploy/foxnas_edge.py",
    "deploy/layout.py",
    "deploy/runner.py",
    "deploy/service.py",
    "deploy/worker.py",
    "runtime.py",
)
_PACKAGES = ("__init__.py", "core/__init__.py", "data/__init__.py", "deploy/__init__.py")

_MAIN = """\
import sys

if sys.version_info < (3, 7):
    print('{"error": "old_python", "message": "%s"}' % sys.version.split()[0])
    sys.exit(3)

from foxnas_mlflow.deploy.runner import main

sys.exit(main())
"""

_EDGE = "from foxnas_mlflow.deploy.foxnas_edge import Model, Version, load\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Configuration of a deployment.

    Attributes:
        threads: Threads of one inference; None: those of the target that the model was made for.
        delegate: Shared library of a delegate on the board, empty for its processor, or None for
            the one that the kind needs.
        tolerance: Largest difference between the board's output and the host's, in the output's
            own steps, of floats in thousandths of the largest one. Equal kernels give 0; other ones round
            differently by 1.
        serve: Whether the board serves it; None: as it does now, and a new deployment is served.
        host: Address to listen at, or None: as now, at first 127.0.0.1.
        port: Port, or None: as now, at first the first free one from 5001 on.
        workers: Requests that are answered at a time, or None: as now, at first 1.
        account: The board's account that serves, or None: as now, at first the one that deploys.
        verify_key: Public key that the model must be signed with, or None.
    """

    threads: int | None = None
    delegate: str | None = None
    tolerance: float = 2.0
    serve: bool | None = None
    host: str | None = None
    port: int | None = None
    workers: int | None = None
    account: str | None = None
    verify_key: Path | None = None

    @property
    def service(self) -> dict[str, Any]:
        """What is asked of the service there."""
        values = {name: getattr(self, name) for name in ("serve", "host", "port", "workers", "account")}
        return {name: value for name, value in values.items() if value is not None}

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
            tolerance = float(config.get("tolerance", 2.0))
            threads, port, workers = (
                None if config.get(key) is None else int(config[key]) for key in ("threads", "port", "workers")
            )
        except (TypeError, ValueError):
            raise InvalidInputError(
                "threads, tolerance, port and workers must be numbers", received=dict(config)
            ) from None
        if (threads is not None and threads < 1) or not tolerance >= 0:
            raise InvalidInputError("threads must be 1 or more and tolerance 0 or more", received=dict(config))
        if (port is not None and not 1 <= port <= 65535) or (workers is not None and not 1 <= workers <= 64):
            raise InvalidInputError("port must be in 1..65535 and workers in 1..64", received=dict(config))
        serve = str(config.get("serve", "")).lower()
        if serve not in ("", "true", "false"):
            raise InvalidInputError("serve must be true or false", received=serve)
        return cls(
            threads=threads,
            delegate=config.get("delegate"),
            tolerance=tolerance,
            serve=None if not serve else serve == "true",
            host=config.get("host"),
            port=port,
            workers=workers,
            account=config.get("account"),
            verify_key=Path(config["verify_key"]) if config.get("verify_key") else None,
        )


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
        "mlflow_version": importlib.metadata.version("mlflow"),
        "kind": kind,
        "model_uri": source,
        "model_id": model_id,
        "files": {file: hashlib.sha256(data).hexdigest() for file, data in files.items()},
        "labels": list(model.labels),
        "preprocessing": model.preprocessing.to_dict(),
        "output": model.output,
        "rejection": None if model.rejection is None else model.rejection.to_dict(),
        "threads": options.threads or int(model.details.get("threads", 1)),
        "delegate": default if options.delegate is None else options.delegate,
        "tolerance": options.tolerance,
    }
    return {**files, "deployment.json": json.dumps(description, indent=1).encode()}


def runner() -> bytes:
    """The runner as one zip that Python runs, with the modules of this package that it uses.

    The same files in the same order always give the same bytes.
    """
    package = importlib.resources.files("foxnas_mlflow")
    contents = {"__main__.py": _MAIN.encode(), "foxnas_edge.py": _EDGE.encode()}
    contents |= {f"foxnas_mlflow/{path}": b"" for path in _PACKAGES}
    contents |= {f"foxnas_mlflow/{path}": package.joinpath(*path.split("/")).read_bytes() for path in _SHIPPED}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, data in contents.items():
            archive.writestr(zipfile.ZipInfo(path, (1980, 1, 1, 0, 0, 0)), data, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()
