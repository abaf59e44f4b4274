"""An image as clients send it: bytes, base64 text, nested lists, arrays. The same rules wherever a model is served."""

from __future__ import annotations

import base64
import contextlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.errors import InvalidInputError

if TYPE_CHECKING:
    from numpy.typing import NDArray  # boards have older NumPy

_URL_SAFE = str.maketrans("-_", "+/")


def received_image(image: Any) -> bytes | NDArray[Any]:
    """An item of the column ``image``: base64 text as the bytes that it means, nested lists as an array."""
    if isinstance(image, np.ndarray) and image.ndim == 0:
        image = image.item()  # MLflow wraps each text of ``instances``
    if isinstance(image, str):
        return _base64(image)
    if isinstance(image, (bytes, bytearray, memoryview)):
        return bytes(image)
    if isinstance(image, np.ndarray) and image.dtype == object:
        image = image.tolist()
    if isinstance(image, list):
        image = _array(image)
    if not isinstance(image, np.ndarray):
        raise InvalidInputError("an image must be bytes, base64 text or an array", received=f"a {type(image).__name__}")
    return image


def _base64(text: str) -> bytes:
    """Base64 as people have it: in a data URI, with the characters of URLs, with or without padding."""
    # Most clients send it as its standard has it, and then one pass is enough.
    with contextlib.suppress(ValueError):
        return base64.b64decode(text, validate=True)
    compact = re.sub(r"^data:[^,]*;base64,", "", "".join(text.split())).translate(_URL_SAFE).rstrip("=")
    try:
        return base64.b64decode(compact + "=" * (-len(compact) % 4), validate=True)
    except ValueError:
        raise InvalidInputError("an image given as text must be base64", received=text[:40]) from None


def _array(nested: list[Any]) -> NDArray[Any]:
    try:
        return np.asarray(nested)
    except ValueError:
        raise InvalidInputError("an image given as nested lists must be rectangular") from None


def checked_pixels(image: NDArray[Any]) -> NDArray[Any]:
    """Refuse what is neither uint8 nor float in 0..1: guessing would classify noise with confidence."""
    rule = "an image array must be uint8 in 0..255 or float in 0..1"
    if image.dtype.kind in "iu" and image.size and image.max() == 1:
        raise InvalidInputError(
            rule,
            received="whole numbers of which none is above 1, which may be either",
            remedy="send a JPEG or PNG file, or values in 0..255 where white is 255",
        )
    if image.dtype == np.uint8:
        return image
    if image.dtype == np.int8:
        raise InvalidInputError(rule, received="int8", remedy="send the image before quantization")
    if image.dtype.kind in "iu":
        # JSON knows no uint8: whole numbers arrive as int64.
        if image.size and (image.min() < 0 or image.max() > 255):
            raise InvalidInputError(rule, received=f"{image.dtype} in {image.min()}..{image.max()}")
        return image.astype(np.uint8)
    if image.dtype.kind != "f":
        raise InvalidInputError(rule, received=str(image.dtype))
    if not np.isfinite(image).all():
        raise InvalidInputError(rule, received="values that are not finite")
    if image.size and (image.min() < 0 or image.max() > 1):
        raise InvalidInputError(
            rule,
            received=f"{image.dtype} in {image.min():g}..{image.max():g}",
            remedy="send uint8, or divide by 255; normalising and quantizing is the model's own work",
        )
    return image
