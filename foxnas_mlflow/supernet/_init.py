"""Beginning with known weights: one entry for every kind of source."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.space import SearchSpace
from foxnas_mlflow.supernet._download import download
from foxnas_mlflow.supernet._network import Supernet
from foxnas_mlflow.supernet._once_for_all import from_once_for_all, is_once_for_all
from foxnas_mlflow.supernet._placement import place, same_shape
from foxnas_mlflow.supernet._published import from_published
from foxnas_mlflow.supernet._source import Source, of_supernet

_PICKLES = (b"PK\x03\x04", b"\x80")
"""How files of `torch.save` begin; the other kind that is read is safetensors."""


@dataclass(frozen=True)
class KnownSupernet:
    """A supernet to begin with.

    Attributes:
        space: Its space.
        weights: Its weights by name, as `Supernet.numpy_weights` gives them.
        labels: Its class names; with those of the new data the classifier is kept.
    """

    space: SearchSpace
    weights: Mapping[str, NDArray[Any]]
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class InitReport:
    """What a supernet begins with.

    Attributes:
        family: What the weights are of.
        placed: Names of the supernet's tensors that hold known values, whole or in part.
        new: Names of those that hold none.
        differences: What differs from the network that the weights were trained in.
        architecture: The subnet that computes what the source's network computed, until training begins;
            None where the space has none.
        size_bytes, sha256: Of the file; None where there is none.
    """

    family: str
    placed: tuple[str, ...]
    new: tuple[str, ...]
    differences: tuple[str, ...]
    architecture: Architecture | None
    size_bytes: int | None = None
    sha256: str | None = None


def load_init(source: str | Path | KnownSupernet, supernet: Supernet, *, labels: tuple[str, ...] = ()) -> InitReport:
    """Put known weights into a new supernet.

    Args:
        source: ``timm:NAME`` or ``torchvision:NAME``, which are downloaded; the path of a checkpoint
            (safetensors, or a file of `torch.save`, from which only tensors are read, never code); or a
            supernet. TensorFlow's weights under timm's names are known by the file's name, ``tf_...``, or by the
            folder of Hugging Face's cache, ``models--timm--tf_...``.
        supernet: Takes the weights; its activations and padding are the source's until training begins.
        labels: Class names of the new data.

    Returns:
        What was placed, what is new, and what differs.

    Raises:
        InvalidInputError: If the source cannot be read, or its blocks are not the space's: the first layer
            that differs is named, and the supernet stays as it was.
    """
    size_bytes = sha256 = None
    if isinstance(source, KnownSupernet):
        known = of_supernet(source.space, source.weights)
        other_classes = bool(source.labels and labels and source.labels != labels)
    else:
        by_name = str(source).startswith(("timm:", "torchvision:"))
        path = download(str(source)) if by_name else Path(source).expanduser()
        content = _content(path)
        size_bytes, sha256 = len(content), hashlib.sha256(content).hexdigest()
        known, other_classes = _source(_state_dict(content, path), path), False
    placement = place(known, supernet, new_classifier=other_classes)
    space = supernet.space
    strides = (space.stem_stride, space.first_stride, *(stage.stride for stage in space.stages))
    return InitReport(
        known.family,
        placement.placed,
        placement.new,
        placement.differences,
        same_shape(known, space) if known.strides == strides else None,
        size_bytes,
        sha256,
    )


def _source(tensors: dict[str, Tensor], path: Path) -> Source:
    if is_once_for_all(tensors):
        return from_once_for_all(tensors)
    # timm's own files are tf_NAME-DIGEST.pth, Hugging Face's models--timm--tf_NAME/snapshots/.../model.safetensors.
    of_tensorflow = path.name.startswith("tf_") or any("--timm--tf_" in part for part in path.absolute().parts)
    return from_published(tensors, of_tensorflow=of_tensorflow)


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidInputError(
            "init must be timm:NAME, torchvision:NAME, models:/NAME/VERSION or the path of a checkpoint",
            received=f"{path} ({error.strerror})",
        ) from error


def _state_dict(content: bytes, path: Path) -> dict[str, Tensor]:
    """The state dict of a file, its tensors as float32."""
    try:
        # The length before a safetensors' header may begin as a pickle does.
        if content.startswith(_PICKLES) and content[8:9] != b"{":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                data: Any = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        else:
            data = load_safetensors(content)
    except Exception as error:  # Torn and foreign files raise anything.
        reason = "not a file of tensors alone" if not isinstance(error, SafetensorError) else "not a whole safetensors"
        raise InvalidInputError("init must be the path of a checkpoint", received=f"{path} ({reason})") from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not data or not all(isinstance(t, Tensor) for t in data.values()):
        raise InvalidInputError("init must hold a state dict of tensors", received=str(path))
    return {str(name): tensor.float() for name, tensor in data.items()}
