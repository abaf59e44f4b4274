"""Keeps deployed models on a board and answers from them; travels as ``runner.pyz`` with what it needs.

    python3 runner.pyz list ROOT
    python3 ROOT/NAME/current/runner.pyz classify photo.jpg

It needs Python 3.10, NumPy and a TFLite runtime, and Pillow to decode images; without it an image is
a .npy file of the network's input: (height, width, channels), uint8 or float in 0..1. Every command prints
one JSON document; an error is JSON too, ``{"error": kind, "message": text}``, with exit status 3.

    ROOT/.lock                           held while something changes
    ROOT/NAME/.incoming-*                a copy that is under way, or that was interrupted
    ROOT/NAME/versions/N/                model.tflite, runner.pyz, smoke.npz, deployment.json, state.json
    ROOT/NAME/current -> versions/N      the active version; replaced in one step, or not at all
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import importlib
import io
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

STALE_SECONDS = 900.0
"""What nothing has been written to for so long was interrupted: the next deployment removes it. One file takes less."""


class RunnerError(Exception):
    """Something that a deployment needs and that is not so."""

    def __init__(self, kind: str, message: str) -> None:
        self.kind = kind
        super().__init__(message)


def main() -> int:
    """Run one command."""
    parser = argparse.ArgumentParser(prog="runner.pyz")
    commands = parser.add_subparsers(dest="command", required=True)
    listing = commands.add_parser("list")
    listing.add_argument("root")
    for name in ("begin", "activate", "discard", "get", "rollback", "delete", "predict"):
        command = commands.add_parser(name)
        command.add_argument("root")
        command.add_argument("name")
        if name in ("begin", "activate"):
            command.add_argument("--new", action="store_true", help="refuse a name that is taken, not one that is free")
        if name in ("activate", "discard"):
            command.add_argument("directory")
        if name == "activate":
            command.add_argument("--sha256", required=True, help="of deployment.json, which has those of the files")
        if name == "predict":
            command.add_argument("request")
    classifying = commands.add_parser("classify", help="answer from the version that this runner lies beside")
    classifying.add_argument("images", nargs="+")
    options = parser.parse_args()
    # Libraries print to standard output as they like: the JSON gets a descriptor of its own.
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    status = 0
    try:
        result = run(options)
    except RunnerError as error:
        result, status = {"error": error.kind, "message": str(error)}, 3
    except OSError as error:
        result, status = {"error": "system", "message": f"{error.strerror}: {error.filename}"}, 3
    answer.write(json.dumps(result) + "\n")
    answer.flush()
    # Without interpreter shutdown: some runtimes crash while they unload.
    os._exit(status)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """The answer to a command."""
    if options.command == "classify":
        here = Path(sys.argv[0]).resolve().parent
        return {"predictions": classify(here, [read_file(Path(image)) for image in options.images])}
    root = Path(options.root).expanduser()
    if options.command == "list":
        return {"deployments": [describe(root, path.parent.name) for path in sorted(root.glob("*/current"))]}
    name = options.name
    if options.command == "begin":
        return begin(root, name, new=options.new)
    if options.command == "activate":
        return activate(root, name, Path(options.directory), sha256=options.sha256, new=options.new)
    if options.command == "discard":
        shutil.rmtree(options.directory, ignore_errors=True)
        return {}
    if options.command == "get":
        return describe(root, name)
    if options.command == "rollback":
        return roll_back(root, name)
    if options.command == "delete":
        return delete(root, name)
    request = json.loads(Path(options.request).read_text())
    return {"predictions": classify(current(root, name), [read_image(image) for image in request["images"]])}


def begin(root: Path, name: str, *, new: bool) -> dict[str, Any]:
    """A directory to copy a version to, where nothing looks for one."""
    check_taken(root, name, new=new)
    place = root / name
    place.mkdir(parents=True, exist_ok=True)
    # First, because what was interrupted may have filled the disk.
    remove_stale(root)
    return {"directory": tempfile.mkdtemp(prefix=".incoming-", dir=place)}


def activate(root: Path, name: str, incoming: Path, *, sha256: str, new: bool) -> dict[str, Any]:
    """Check a copied version, try it, and make it the active one in one step."""
    if digest(incoming / "deployment.json") != sha256:
        raise RunnerError("damaged", "deployment.json")
    smoke = check(incoming)
    with locked(root):
        check_taken(root, name, new=new)
        versions = root / name / "versions"
        versions.mkdir(exist_ok=True)
        numbers = [int(path.name) for path in versions.iterdir() if path.name.isdigit()]
        target = versions / f"{max(numbers, default=0) + 1:04d}"
        replaces = None if new else current(root, name).name
        write_json(incoming / "state.json", {"replaces": replaces, "activated": time.time(), "smoke": smoke})
        # On a board the power goes at any time: the files first, then the pointer to them.
        os.sync()
        os.rename(incoming, target)
        point_to(root, name, target)
        for path in versions.iterdir():
            if path.name not in (target.name, replaces):
                shutil.rmtree(path, ignore_errors=True)
    return describe(root, name)


def remove_stale(root: Path) -> None:
    """Remove what interrupted copies and deletions left."""
    for path in (*root.glob("*/.incoming-*"), *root.glob(".deleted-*")):
        with contextlib.suppress(FileNotFoundError):
            written = max(each.stat().st_mtime for each in (path, *path.rglob("*")))
            if time.time() - written > STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def roll_back(root: Path, name: str) -> dict[str, Any]:
    """Make the version that the active one replaced the active one again."""
    current(root, name)
    with locked(root):
        active = current(root, name)
        replaced = read_json(active / "state.json")["replaces"]
        previous = active.parent / str(replaced)
        if replaced is None or not previous.is_dir():
            raise RunnerError("no_previous", name)
        check(previous)
        point_to(root, name, previous)
    return describe(root, name)


def delete(root: Path, name: str) -> dict[str, Any]:
    """Remove a deployment with all its versions; one that is not there is no error."""
    if not (root / name).exists():
        return {"deleted": False}
    with locked(root):
        # Out of sight in one step; then the files.
        gone = tempfile.mkdtemp(prefix=".deleted-", dir=root)
        os.rename(root / name, Path(gone, name))
    shutil.rmtree(gone)
    return {"deleted": True}


def describe(root: Path, name: str) -> dict[str, Any]:
    """What is known of a deployment."""
    active = current(root, name)
    deployment, state = read_json(active / "deployment.json"), read_json(active / "state.json")
    replaced = state["replaces"]
    previous = active.parent / replaced / "deployment.json" if replaced else None
    return {
        **{key: deployment[key] for key in ("name", "flavor", "kind", "model_uri", "model_id", "threads", "delegate")},
        "sha256": deployment["files"]["model.tflite"],
        "preprocessing": deployment["preprocessing"],
        "directory": str(root / name / "current"),
        "version": active.name,
        "activated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(state["activated"])),
        "previous": read_json(previous)["model_uri"] if previous is not None and previous.is_file() else None,
        "smoke": state["smoke"],
        "decodes_images": decodes_images(),
    }


def check(version: Path) -> dict[str, Any]:
    """Check the files of a version and compare its answers with those of the host.

    Raises:
        RunnerError: If a file is not as it was sent, or an answer is another one.
    """
    deployment = read_json(version / "deployment.json")
    for name, expected in deployment["files"].items():
        if digest(version / name) != expected:
            raise RunnerError("damaged", name)
    np = numpy()
    classifier = open_classifier(version, deployment)
    with np.load(version / "smoke.npz", allow_pickle=False) as smoke:
        images, outputs = smoke["images"], smoke["outputs"]
    start = time.perf_counter()
    got = np.stack([classifier.raw(image) for image in images])
    milliseconds = 1e3 * (time.perf_counter() - start) / len(images)
    difference = float(np.abs(got.astype(np.float64) - outputs.astype(np.float64)).max())
    if got.dtype != outputs.dtype or not difference <= deployment["tolerance"]:
        raise RunnerError(
            "wrong_answer", f"the outputs differ by {difference:g}, tolerance {deployment['tolerance']:g}"
        )
    return {"images": len(images), "largest_difference": difference, "milliseconds_an_image": round(milliseconds, 3)}


def classify(version: Path, images: list[Any]) -> list[dict[str, Any]]:
    """Labels and probabilities of images: files as bytes, or arrays at the network's size."""
    from foxnas_mlflow.core.errors import InvalidInputError, MissingDependencyError
    from foxnas_mlflow.data.preprocess import Preprocessing

    deployment = read_json(version / "deployment.json")
    classifier = open_classifier(version, deployment)
    preprocessing, labels = Preprocessing.from_dict(deployment["preprocessing"]), deployment["labels"]
    rows = []
    for image in images:
        try:
            pixels = preprocessing.decode(image) if isinstance(image, bytes) else image
        except MissingDependencyError as error:
            raise RunnerError(
                "no_pillow",
                f"decoding JPEG and PNG needs Pillow, which {sys.executable} lacks; install it with: "
                f"{sys.executable} -m pip install Pillow, or give .npy files of shape {classifier.input_shape}",
            ) from error
        except InvalidInputError as error:
            raise RunnerError("bad_image", str(error)) from error
        if pixels.shape != classifier.input_shape or pixels.dtype.kind not in "uf":
            raise RunnerError("bad_image", f"{pixels.dtype} of shape {pixels.shape}")
        probabilities = classifier(pixels)
        best = int(probabilities.argmax())
        rows.append(
            {
                "label": labels[best],
                "probability": float(probabilities[best]),
                "probabilities": probabilities.tolist(),
            }
        )
    return rows


def open_classifier(version: Path, deployment: dict[str, Any]) -> Any:
    """The interpreter of a version."""
    numpy()
    from foxnas_mlflow.core.errors import DeviceError, InvalidFormatError, MissingDependencyError
    from foxnas_mlflow.data.preprocess import Preprocessing
    from foxnas_mlflow.runtime import Classifier

    try:
        return Classifier(
            version / "model.tflite",
            Preprocessing.from_dict(deployment["preprocessing"]).normalization,
            deployment["output"],
            threads=deployment["threads"],
            delegate=deployment["delegate"],
        )
    except (MissingDependencyError, DeviceError) as error:
        raise RunnerError("missing", str(error)) from error
    except InvalidFormatError as error:
        raise RunnerError("bad_model", str(error)) from error


def read_image(item: dict[str, str]) -> Any:
    """An image of a request: a file's bytes, or an array in NumPy's format."""
    data = base64.b64decode(next(iter(item.values())))
    return read_array(data) if "array" in item else data


def read_file(path: Path) -> Any:
    """An image of a file: its bytes, or the array of a ``.npy`` file."""
    data = path.read_bytes()
    return read_array(data) if path.suffix == ".npy" else data


def read_array(data: bytes) -> Any:
    """An array in NumPy's format."""
    try:
        return numpy().load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise RunnerError("bad_image", f"no array of NumPy: {error}") from error


def decodes_images() -> bool:
    """Whether there is Pillow."""
    try:
        importlib.import_module("PIL.Image")
    except ImportError:
        return False
    return True


def numpy() -> Any:
    """NumPy, or what is missing."""
    try:
        import numpy as np
    except ImportError as error:
        raise RunnerError("missing", f"NumPy: {error}") from error
    return np


def check_taken(root: Path, name: str, *, new: bool) -> None:
    """Refuse a new deployment under a name that is taken, and an update of one that is not there."""
    if new and (root / name / "current").exists():
        raise RunnerError("exists", name)
    if not new:
        current(root, name)


def current(root: Path, name: str) -> Path:
    """Directory of the active version."""
    pointer = root / name / "current"
    if not pointer.exists():
        raise RunnerError("no_deployment", name)
    return pointer.resolve()


def point_to(root: Path, name: str, version: Path) -> None:
    """Replace the pointer to the active version: readers see the old or the new one."""
    pointer = root / name / ".next"
    with contextlib.suppress(FileNotFoundError):
        pointer.unlink()
    pointer.symlink_to(Path("versions", version.name))
    os.replace(pointer, root / name / "current")
    os.sync()


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Let one process at a time change what is deployed."""
    descriptor = os.open(root / ".lock", os.O_CREAT | os.O_RDWR, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal; empty if there is none."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except FileNotFoundError:
        return ""


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object."""
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a JSON object."""
    path.write_text(json.dumps(value), encoding="utf-8")


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036 - the board's Python, not ours
        print(json.dumps({"error": "old_python", "message": sys.version.split()[0]}))
        sys.exit(3)
    sys.exit(main())
