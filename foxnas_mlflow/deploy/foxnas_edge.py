"""A deployed model in a program's own process; travels in ``runner.pyz``.

    import sys
    sys.path.insert(0, "/home/pi/.foxnas/deployments/camera/current/runner.pyz")
    import foxnas_edge

    model = foxnas_edge.load("/home/pi/.foxnas/deployments/camera")
    model.classify(pixels)     # {"label": "cat", "probability": 0.97, "probabilities": [...]}

It needs a TFLite runtime (ai-edge-litert or tflite-runtime), NumPy and Python 3.7; Pillow only for JPEG and PNG.
"""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.errors import DeviceError, InvalidFormatError, InvalidInputError, MissingDependencyError
from foxnas_mlflow.core.rejection import Rejection
from foxnas_mlflow.data.preprocess import MAX_PIXELS, Preprocessing
from foxnas_mlflow.data.received import checked_pixels, received_image
from foxnas_mlflow.deploy.layout import RunnerError, current, kind_of, read_json
from foxnas_mlflow.runtime import Classifier, float_level

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Model", "Version", "load"]


def load(directory: str | Path) -> Model:
    """Open a deployment.

    Args:
        directory: ``ROOT/NAME`` on the board.

    Raises:
        RunnerError: If there is none, or the runtime cannot open the model.
    """
    return Model(Path(directory).expanduser().absolute())


class Version:
    """One version, opened: for one thread at a time.

    Args:
        directory: ``ROOT/NAME/versions/N``.

    Raises:
        RunnerError: If a runtime is missing, or cannot open the model.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.deployment = read_json(directory / "deployment.json")
        self.preprocessing = Preprocessing.from_dict(self.deployment["preprocessing"])
        self.labels = list(self.deployment["labels"])
        # A deployment of an earlier release does not reject.
        found = self.deployment.get("rejection")
        self.rejection = None if found is None else Rejection.from_dict(found)
        try:
            self.classifier = Classifier(
                directory / "model.tflite",
                self.preprocessing.normalization,
                self.deployment["output"],
                threads=self.deployment["threads"],
                delegate=self.deployment["delegate"],
            )
        except MissingDependencyError as error:
            raise RunnerError("missing", str(error)) from error
        except DeviceError as error:
            raise RunnerError("accelerator", f"no device answered to {self.deployment['delegate']}") from error
        except (ImportError, SystemError) as error:
            raise RunnerError("numpy", f"NumPy {np.__version__}: {error}") from error
        except InvalidFormatError as error:
            if "tflite_runtime" in sys.modules and int(np.__version__.split(".")[0]) >= 2:
                # Built for NumPy 1: it fails at the first array, in words about tensors.
                raise RunnerError("numpy", f"NumPy {np.__version__}: {error.__cause__}") from error
            raise RunnerError("bad_model", str(error)) from error

    def try_out(self) -> dict[str, Any]:
        """Compare the answers to some images with those of the host that deployed.

        Raises:
            RunnerError: If one is another, or an accelerator gives none.
        """
        with np.load(str(self.directory / "smoke.npz"), allow_pickle=False) as smoke:
            images, outputs = smoke["images"], smoke["outputs"]
        start = time.perf_counter()
        try:
            got = np.stack([self.classifier.raw(image) for image in images])
        except RuntimeError as error:
            if not self.deployment["delegate"]:
                raise
            # It was found, and failed at its first inference.
            raise RunnerError("accelerator", str(error)) from error
        milliseconds = 1e3 * (time.perf_counter() - start) / len(images)
        step = float_level(outputs) if outputs.dtype.kind == "f" else 1.0
        difference = float(np.abs(got.astype(np.float64) - outputs.astype(np.float64)).max()) / step
        tolerance = self.deployment["tolerance"]
        if got.dtype != outputs.dtype or not difference <= tolerance:
            raise RunnerError("wrong_answer", f"the outputs differ by {difference:g} steps, tolerance {tolerance:g}")
        return {
            "images": len(images),
            "largest_difference": difference,
            "milliseconds_an_image": round(milliseconds, 3),
        }

    def pixels(self, image: Any, *, max_pixels: int = MAX_PIXELS) -> NDArray[Any]:
        """An image as the network's input: uint8, or float in 0..1, of shape (height, width, channels).

        Args:
            image: A JPEG's or PNG's bytes or base64 text, or an array or nested lists of that shape.
            max_pixels: Largest width x height that is decoded.

        Raises:
            InvalidInputError: If it is no such image.
            MissingDependencyError: If it must be decoded and there is no Pillow.
        """
        image = received_image(image)
        if isinstance(image, bytes):
            return self.preprocessing.decode(image, max_pixels=max_pixels)
        if image.shape != self.classifier.input_shape:
            raise InvalidInputError(
                f"an image array must have the shape {self.classifier.input_shape} (height, width, channels)",
                received=f"shape {image.shape}",
                remedy="resize it, or send the JPEG or PNG file itself",
            )
        return checked_pixels(image)

    def classify(self, images: Sequence[Any], *, top_k: int = 1, max_pixels: int = MAX_PIXELS) -> list[dict[str, Any]]:
        """Label and probabilities of images, see `pixels`.

        Args:
            images: The images.
            top_k: Above 1: ``top_labels`` and ``top_probabilities`` too.
            max_pixels: Largest width x height that is decoded.

        Returns:
            A row an image: ``label``, ``probability``, ``probabilities`` in the order of the labels; ``rejected``
            where the model knows when an image is none of them.
        """
        rows = []
        for image in images:
            probabilities = self.classifier(self.pixels(image, max_pixels=max_pixels))
            best = int(probabilities.argmax())
            row = {
                "label": self.labels[best],
                "probability": float(probabilities[best]),
                "probabilities": probabilities.tolist(),
            }
            if self.rejection is not None:
                row["rejected"] = bool(self.rejection.rejects(probabilities[None])[0])
            if top_k > 1:
                # Stable, so that ties come in the order of the labels, as argmax has them.
                order = np.argsort(-probabilities, kind="stable")[:top_k]
                row["top_labels"] = [self.labels[i] for i in order]
                row["top_probabilities"] = probabilities[order].tolist()
            rows.append(row)
        return rows


class Model:
    """The active version of a deployment; after a switch the next call answers from the new one.

    Threads may share it: calls are made one after the other.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._opened, self._version = self._open_active()
        self._refused: tuple[Any, ...] = ()

    @property
    def version(self) -> str:
        """Number of the version that answered last."""
        return self._version.directory.name

    @property
    def labels(self) -> list[str]:
        """Names of the classes."""
        return list(self._version.labels)

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an array to classify."""
        return self._version.classifier.input_shape

    def classify(self, image: Any, *, top_k: int = 1) -> dict[str, Any]:
        """Label and probabilities of an image: see `Version.classify`.

        An active version that cannot be opened is warned of once, and the one before goes on answering.
        """
        with self._lock:
            active = _identity(self._active())
            if active not in (self._opened, self._refused):
                try:
                    self._opened, self._version = self._open_active()
                except Exception as error:
                    # Whatever is wrong with it: also its description, of which nothing was compared. Memory may be
                    # there at the next call.
                    self._refused = () if kind_of(error) == "busy" else active
                    why = str(error) if isinstance(error, RunnerError) else f"{type(error).__name__}: {error}"
                    warnings.warn(f"version {self.version} goes on answering: {why}", RuntimeWarning, stacklevel=2)
            (row,) = self._version.classify([image], top_k=top_k)
            return row

    def _open_active(self) -> tuple[tuple[Any, ...], Version]:
        active = self._active()
        # Taken first: what takes its place while it is opened is another one at the next call.
        return _identity(active), Version(active)

    def _active(self) -> Path:
        return current(self._directory.parent, self._directory.name)


def _identity(version: Path) -> tuple[Any, ...]:
    """What tells a version from all others: numbers begin anew in a deployment that was deleted and made again."""
    description = version / "deployment.json"
    status = (description if description.exists() else version).stat()
    return version, status.st_dev, status.st_ino, status.st_ctime_ns
