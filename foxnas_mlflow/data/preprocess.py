"""From an encoded image to a network's input: one code path for training, evaluation and serving.

Needs NumPy, and Pillow where an image is decoded or resized; never torch or tensorflow.

| step      | from                       | to                                                |
|-----------|----------------------------|---------------------------------------------------|
| decode    | bytes, JPEG or PNG         | uint8 (height, width, channels), 0..255           |
| resize    | uint8 (height, width, c)   | uint8 (image_size, image_size, c)                 |
| normalise | uint8 (..., c)             | float32 (..., c), (value / 255 - mean) / std      |
| quantize  | float32 (..., c)           | int8 or uint8 (..., c), for a quantized network   |
"""

from __future__ import annotations

import io
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, import_or_raise

MAX_PIXELS = 40_000_000
"""Default limit of an untrusted image, width x height; checked before its pixels are decoded."""

FORMATS = ("JPEG", "PNG")
"""Image formats that are read; every other decoder of Pillow stays closed to untrusted bytes."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MODES_OF_EIGHT_BITS = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def decode_image(data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decode a JPEG or PNG image.

    Args:
        data: The encoded image.
        channels: 3 for colour, 1 for grey; the image is converted. Transparency is dropped.
        max_pixels: Largest width x height accepted.

    Returns:
        uint8 (height, width, channels).

    Raises:
        InvalidInputError: If the bytes are not a whole image of a known format within the limit.
    """
    image = import_or_raise("PIL.Image", extra="serve", feature="decoding images")
    pillow = import_or_raise("PIL", extra="serve", feature="decoding images")
    try:
        with image.open(io.BytesIO(data), formats=FORMATS) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise InvalidInputError(
                    f"an image has at most {max_pixels} pixels", received=f"{width} x {height}", remedy="scale it down"
                )
            if opened.mode not in _MODES_OF_EIGHT_BITS:
                raise InvalidInputError("an image has 8 bits a channel", received=f"mode {opened.mode}")
            pixels = np.asarray(opened.convert("RGB" if channels == 3 else "L"), dtype=np.uint8)
    except InvalidInputError:
        raise
    except (image.DecompressionBombError, image.DecompressionBombWarning) as error:
        raise InvalidInputError(
            f"an image has at most {max_pixels} pixels", received=str(error), remedy="scale it down"
        ) from error
    except pillow.UnidentifiedImageError:
        raise InvalidInputError(
            f"an image must be {' or '.join(FORMATS)}", received=f"{len(data)} bytes of something else"
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        # Pillow raises these for truncated and damaged files.
        raise InvalidInputError("an image must be whole and undamaged", received=str(error)) from error
    return pixels.reshape(height, width, channels)


def resize(image: NDArray[np.uint8], size: int, *, crop: float = 1.0) -> NDArray[np.uint8]:
    """Scale the shorter side to size / crop with antialiased bilinear filtering, and cut out the centre.

    Args:
        image: uint8 (height, width, channels).
        size: Height and width of the result in pixels.
        crop: Share of the shorter side that is kept, in (0, 1]; 0.875 is ImageNet's habit.

    Returns:
        uint8 (size, size, channels). An image that already has the scaled size is not resampled.

    Raises:
        InvalidInputError: If it is so narrow that it would have more than `MAX_PIXELS` when scaled.
    """
    height, width, channels = image.shape
    shorter = math.floor(size / crop + 0.5)
    scale = shorter / min(height, width)
    scaled = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise InvalidInputError(
            f"an image has at most {MAX_PIXELS} pixels when its shorter side is scaled to {shorter}",
            received=f"{width} x {height}",
            remedy="cut out a part that is closer to a square",
        )
    if scaled != (width, height):
        pillow = import_or_raise("PIL.Image", extra="serve", feature="resizing images")
        source = pillow.fromarray(image if channels == 3 else image[..., 0])
        image = np.asarray(source.resize(scaled, pillow.Resampling.BILINEAR)).reshape(scaled[1], scaled[0], channels)
    top, left = (scaled[1] - size) // 2, (scaled[0] - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


@dataclass(frozen=True, slots=True)
class Normalization:
    """Per-channel mean and standard deviation of values in 0..1.

    Attributes:
        mean: One number a channel.
        std: One positive number a channel.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            values = getattr(self, name)
            if not all(isinstance(v, numbers.Real) and math.isfinite(v) for v in values):
                raise InvalidInputError(f"a normalization's {name} must be finite numbers", received=repr(values))
            object.__setattr__(self, name, tuple(float(v) for v in values))
        if len(self.mean) != len(self.std) or len(self.mean) not in (1, 3):
            raise InvalidInputError("mean and std have one number for each of 1 or 3 channels", received=repr(self))
        if min(self.std) <= 0:
            raise InvalidInputError("a normalization's std must be positive", received=repr(self.std))

    def __call__(self, image: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Normalise uint8 (..., channels) to float32 of the same shape."""
        return self.of_unit(image.astype(np.float32) / np.float32(255))

    def of_levels(self) -> NDArray[np.float32]:
        """float32 (256, channels): what becomes of each value that a pixel can have."""
        return self(np.repeat(np.arange(256, dtype=np.uint8)[:, None], len(self.mean), axis=1))

    def of_unit(self, image: NDArray[np.floating[Any]]) -> NDArray[np.float32]:
        """Normalise floats in 0..1 (..., channels)."""
        mean, std = np.asarray(self.mean, np.float32), np.asarray(self.std, np.float32)
        normalized: NDArray[np.float32] = (image.astype(np.float32, copy=False) - mean) / std
        return normalized


def quantize(values: NDArray[np.floating[Any]], dtype: Any, scale: float, zero_point: int) -> NDArray[Any]:
    """Real values as a quantized network's integers: round half away from zero, saturated.

    Halves are no rare case: of -1..1 at the scale 1 / 127.5, every sixth pixel value lies between two integers.
    """
    limits = np.iinfo(dtype)
    scaled = values.astype(np.float64) / scale
    rounded = np.trunc(scaled + np.copysign(0.5, scaled)) + zero_point
    levels: NDArray[Any] = np.clip(rounded, limits.min, limits.max).astype(dtype)
    return levels


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """What happens to an image before a network sees it; stored beside every served model.

    Attributes:
        image_size: Height and width of the input in pixels.
        channels: 3 for colour, 1 for grey.
        crop: Share of the shorter side that is kept, see `resize`.
        normalization: Mean and std.
    """

    image_size: int
    channels: int = 3
    crop: float = 1.0
    normalization: Normalization = Normalization()

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise InvalidInputError("image_size must be a positive integer (px)", received=repr(self.image_size))
        if not isinstance(self.crop, numbers.Real) or not 0.0 < self.crop <= 1.0:
            raise InvalidInputError("crop must be in (0, 1]", received=repr(self.crop))
        if self.channels != len(self.normalization.mean):
            raise InvalidInputError(
                "a normalization has one mean and std a channel",
                received=f"{self.channels} channels, {len(self.normalization.mean)} means",
            )

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Decode and resize: bytes to uint8 (image_size, image_size, channels)."""
        image = decode_image(data, channels=self.channels, max_pixels=max_pixels)
        return resize(image, self.image_size, crop=self.crop)

    def __call__(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.float32]:
        """Decode, resize and normalise: bytes to float32 (image_size, image_size, channels)."""
        return self.normalization(self.decode(data, max_pixels=max_pixels))

    def to_dict(self) -> dict[str, Any]:
        """The JSON object of this description."""
        return {
            "image_size": self.image_size,
            "channels": self.channels,
            "crop": self.crop,
            "mean": list(self.normalization.mean),
            "std": list(self.normalization.std),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote.

        Raises:
            InvalidFormatError: If keys are missing or unknown.
            InvalidInputError: If a value breaks a rule.
        """
        keys = {"image_size", "channels", "crop", "mean", "std"}
        if not isinstance(data, Mapping) or set(data) != keys:
            raise InvalidFormatError(f"a preprocessing has exactly the keys {sorted(keys)}", received=data)
        return cls(
            data["image_size"], data["channels"], data["crop"], Normalization(tuple(data["mean"]), tuple(data["std"]))
        )
