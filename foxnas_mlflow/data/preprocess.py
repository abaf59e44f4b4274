"""From an encoded image to a network's input: one code path for training, evaluation and serving.

Needs NumPy, and Pillow where an image is decoded or resized; never torch or tensorflow.

| step      | from                       | to                                                |
|-----------|----------------------------|---------------------------------------------------|
| decode    | bytes of a known format    | uint8 (height, width, channels), 0..255, upright  |
| resize    | uint8 (height, width, c)   | uint8 (image_size, image_size, c)                 |
| normalise | uint8 (..., c)             | float32 (..., c), (value / 255 - mean) / std      |
| quantize  | float32 (..., c)           | int8 or uint8 (..., c), for a quantized network   |
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import io
import math
import numbers
import struct
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from foxnas_mlflow.core.errors import InvalidFormatError, InvalidInputError, MissingDependencyError, import_or_raise

if TYPE_CHECKING:
    from numpy.typing import NDArray  # boards have older NumPy

MAX_PIXELS = 40_000_000
"""Default limit of an untrusted image, width x height; checked before its pixels are decoded."""

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "HEIF")
"""Image formats that are read, the last two where Pillow has a decoder; every other decoder of Pillow stays closed."""

READERS = {"AVIF": "pip install --upgrade pillow", "HEIF": "pip install pillow-heif"}
"""What brings the decoders that a Pillow may lack."""

OLDEST_PILLOW = 8
"""Release of Pillow from which on a file is opened as one of the formats above only."""

WHITE = 255
"""What shows through where an image is transparent."""

REDUCING_GAP = 3.0
"""A JPEG is decoded at a half, a quarter or an eighth while that leaves so many times the pixels that are asked for."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# A JPEG is read row by row at the reduced size, a progressive one is not: its whole content is held in memory.
_LARGEST_REDUCTION = 8
_MODES_OF_EIGHT_BITS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")
_MODES_OF_SIXTEEN_BITS = ("I;16", "I;16B", "I;16L", "I;16N")
_ORIENTATION = 0x0112
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF", b"heic": "HEIF", b"heix": "HEIF", b"mif1": "HEIF"}


def decode_image(
    data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS, background: int = WHITE, shorter: int = 0
) -> NDArray[np.uint8]:
    """Decode an image as a viewer shows it: upright, on a background where it is transparent.

    Of an animation it is the first frame. 16 bits a channel are scaled to 8.

    Args:
        data: The encoded image.
        channels: 3 for colour, 1 for grey; the image is converted.
        max_pixels: Largest width x height that is decoded.
        background: Grey level behind transparent parts, 0..255.
        shorter: Shorter side in pixels that the image will be scaled to, or 0. A JPEG of more than
            `REDUCING_GAP` times that is decoded at a reduced size, so that a large photo takes little
            memory and time; the limit then is on the pixels that are decoded.

    Returns:
        uint8 (height, width, channels).

    Raises:
        InvalidInputError: If the bytes are not a whole image of a known format within the limit.
    """
    return decode_each(data, [shorter], channels=channels, max_pixels=max_pixels, background=background)[0]


def decode_picture(
    data: bytes, *, channels: int = 3, max_pixels: int = MAX_PIXELS, shorter: int = 0, background: int = WHITE
) -> Any:
    """`decode_image`, as a Pillow image of mode RGB or L."""
    with _opened(data, max_pixels) as opened:
        scale = _scale(opened, shorter, max_pixels)
        return _loaded(opened, scale, channels=channels, max_pixels=max_pixels, background=background)


def decode_each(
    data: bytes,
    shorter: Sequence[int],
    *,
    channels: int = 3,
    max_pixels: int = MAX_PIXELS,
    background: int = WHITE,
) -> list[NDArray[np.uint8]]:
    """`decode_image` for several shorter sides, decoded once for all those that take the same reduction.

    Returns:
        One image for each of `shorter`; some may be the same object.
    """
    decoded: dict[int, NDArray[np.uint8]] = {}
    scales: list[int] = []
    while not decoded or not decoded.keys() >= set(scales):
        with _opened(data, max_pixels) as opened:
            scales = scales or [_scale(opened, side, max_pixels) for side in shorter]
            scale = next(scale for scale in scales if scale not in decoded)
            picture = _loaded(opened, scale, channels=channels, max_pixels=max_pixels, background=background)
        decoded[scale] = _pixels(picture)
    return [decoded[scale] for scale in scales]


def is_too_large(data: bytes, *, max_pixels: int = MAX_PIXELS, shorter: int = 0) -> bool:
    """Whether `decode_image` refuses an image for its size alone. Nothing is decoded."""
    try:
        with warnings.catch_warnings():
            # Pillow has words of its own for large images.
            warnings.simplefilter("ignore")
            with _opened(data, max_pixels) as opened:
                _reduce(opened, _scale(opened, shorter, max_pixels), max_pixels)
    except _TooLargeError:
        return True
    except InvalidInputError:
        pass
    return False


@functools.lru_cache(maxsize=None)
def read_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that are decoded here: AVIF and HEIF need a newer Pillow, or the package pillow-heif.

    Raises:
        MissingDependencyError: If there is no Pillow, or one that is too old.
    """
    image = import_or_raise("PIL.Image", extra="serve", feature="decoding images")
    if int(image.__version__.split(".")[0]) < OLDEST_PILLOW:
        raise MissingDependencyError(
            f"decoding images needs Pillow {OLDEST_PILLOW} or newer",
            received=image.__version__,
            remedy="install it with: pip install --upgrade Pillow",
        )
    if "HEIF" not in image.OPEN and importlib.util.find_spec("pillow_heif") is not None:
        importlib.import_module("pillow_heif").register_heif_opener()
    image.init()
    # Pillow knows of WebP and AVIF also where it was built without their decoders.
    plugins = {name: sys.modules.get(image.OPEN[name][0].__module__) for name in FORMATS if name in image.OPEN}
    return tuple(name for name, plugin in plugins.items() if getattr(plugin, "SUPPORTED", True))


@contextlib.contextmanager
def _opened(data: bytes, max_pixels: int) -> Iterator[Any]:
    """An opened Pillow image; what is wrong with its bytes is an `InvalidInputError`."""
    image = import_or_raise("PIL.Image", extra="serve", feature="decoding images")
    pillow = import_or_raise("PIL", extra="serve", feature="decoding images")
    try:
        with image.open(io.BytesIO(data), formats=read_formats()) as opened:
            yield opened
    except InvalidInputError:
        raise
    except (image.DecompressionBombError, image.DecompressionBombWarning) as error:
        raise _too_large(str(error), max_pixels) from error
    except pillow.UnidentifiedImageError:
        formats = read_formats()
        name = _BRANDS.get(data[8:12], "something else")
        raise InvalidInputError(
            f"an image must be {', '.join(formats[:-1])} or {formats[-1]}",
            received=f"{len(data)} bytes of {name}",
            remedy=None if name in formats else READERS.get(name),
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError, struct.error) as error:
        # Pillow raises these for truncated and damaged files, the fifth for AVIF.
        raise InvalidInputError("an image must be whole and undamaged", received=str(error)) from error


def _loaded(opened: Any, scale: int, *, channels: int, max_pixels: int, background: int) -> Any:
    """A Pillow image of mode RGB or L."""
    _reduce(opened, scale, max_pixels)
    opened.load()
    return _shown(opened, channels, background)


def _reduce(opened: Any, scale: int, max_pixels: int) -> None:
    """Have an opened image decoded at a reduced size, if that is within the limit."""
    if scale > 1:
        opened.draft(None, (opened.width // scale, opened.height // scale))
    width, height = opened.size
    if width * height > max_pixels:
        raise _too_large(f"{width} x {height}", max_pixels)


class _TooLargeError(InvalidInputError):
    """An image is beyond the limit of what is decoded."""


def _too_large(received: str, max_pixels: int) -> _TooLargeError:
    return _TooLargeError(f"an image has at most {max_pixels} pixels", received=received, remedy="scale it down")


def _scale(opened: Any, shorter: int, max_pixels: int) -> int:
    """By how much JPEG's decoder may reduce an image that is scaled to `shorter`; 1: not at all."""
    if not shorter or opened.format not in ("JPEG", "MPO") or opened.info.get("progressive"):
        return 1
    width, height = opened.size
    if width * height > _LARGEST_REDUCTION * max_pixels:
        raise _too_large(f"{width} x {height}", max_pixels)
    least = math.ceil(REDUCING_GAP * shorter)
    return next((s for s in (8, 4, 2) if min(width, height) >= s * least), 1)


def _shown(opened: Any, channels: int, background: int) -> Any:
    """What a viewer shows of an opened image, as RGB or L."""
    image = import_or_raise("PIL.Image", extra="serve", feature="decoding images")
    picture = opened
    # Older releases of Pillow open a PNG of 16 bits as I.
    if opened.mode in _MODES_OF_SIXTEEN_BITS or (opened.mode == "I" and opened.format == "PNG"):
        levels = np.asarray(opened).astype(np.uint32)
        picture = image.fromarray(((levels * 255 + 32767) // 65535).astype(np.uint8))
    elif opened.mode not in _MODES_OF_EIGHT_BITS:
        raise InvalidInputError("an image has 8 or 16 bits a channel", received=f"mode {opened.mode}")
    picture = _upright(picture, opened)
    mode = "RGB" if channels == 3 else "L"
    if picture.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in opened.info:
        layer = picture.convert("RGBA") if picture.mode not in ("La", "RGBa") else _straight(picture)
        picture = image.alpha_composite(image.new("RGBA", layer.size, (background,) * 3 + (255,)), layer)
    return picture.convert(mode)


def _straight(picture: Any) -> Any:
    """From premultiplied to straight alpha."""
    return picture.convert("LA" if picture.mode == "La" else "RGBA").convert("RGBA")


def _upright(picture: Any, opened: Any) -> Any:
    """Turned as the camera says that it was held."""
    image = import_or_raise("PIL.Image", extra="serve", feature="decoding images")
    turn = getattr(image, "Transpose", image)  # of the module itself before Pillow 9.1, which boards have
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    try:
        orientation = opened.getexif().get(_ORIENTATION, 1)
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return picture  # A damaged note about an image that is whole.
    return picture.transpose(turns[orientation]) if orientation in turns else picture


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
    scaled = _scaled((width, height), size, crop)
    if scaled != (width, height):
        pillow = import_or_raise("PIL.Image", extra="serve", feature="resizing images")
        source = pillow.fromarray(image if channels == 3 else image[..., 0])
        image = _pixels(source.resize(scaled, _bilinear()))
    return _centre(image, size)


def _scaled(shape: tuple[int, int], size: int, crop: float) -> tuple[int, int]:
    """Width and height that an image of `shape` (width, height) is scaled to, see `resize`."""
    width, height = shape
    shorter = scaled_side(size, crop)
    scale = shorter / min(height, width)
    scaled = (max(shorter, round(width * scale)), max(shorter, round(height * scale)))
    if scaled[0] * scaled[1] > MAX_PIXELS:
        raise InvalidInputError(
            f"an image has at most {MAX_PIXELS} pixels when its shorter side is scaled to {shorter}",
            received=f"{width} x {height}",
            remedy="cut out a part that is closer to a square",
        )
    return scaled


def _bilinear() -> Any:
    pillow = import_or_raise("PIL.Image", extra="serve", feature="resizing images")
    return getattr(pillow, "Resampling", pillow).BILINEAR


def _pixels(picture: Any) -> NDArray[np.uint8]:
    """A Pillow image of mode RGB or L as (height, width, channels)."""
    return np.asarray(picture, dtype=np.uint8).reshape(picture.height, picture.width, -1)


def _centre(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return np.ascontiguousarray(image[top : top + size, left : left + size])


def scaled_side(size: int, crop: float = 1.0) -> int:
    """The shorter side in pixels that an image is scaled to before its centre of `size` px is cut out."""
    return math.floor(size / crop + 0.5)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Preprocessing:
    """What happens to an image before a network sees it; stored beside every served model.

    Attributes:
        image_size: Height and width of the input in pixels.
        channels: 3 for colour, 1 for grey.
        crop: Share of the shorter side that is kept, see `resize`.
        normalization: Mean and std.
        background: Grey level behind transparent parts, 0..255.
    """

    image_size: int
    channels: int = 3
    crop: float = 1.0
    normalization: Normalization = Normalization()
    background: int = WHITE

    def __post_init__(self) -> None:
        if isinstance(self.image_size, bool) or not isinstance(self.image_size, int) or self.image_size < 1:
            raise InvalidInputError("image_size must be a positive integer (px)", received=repr(self.image_size))
        if not isinstance(self.crop, numbers.Real) or not 0.0 < self.crop <= 1.0:
            raise InvalidInputError("crop must be in (0, 1]", received=repr(self.crop))
        if isinstance(self.background, bool) or self.background not in range(256):
            raise InvalidInputError("background must be a grey level in 0..255", received=repr(self.background))
        if self.channels != len(self.normalization.mean):
            raise InvalidInputError(
                "a normalization has one mean and std a channel",
                received=f"{self.channels} channels, {len(self.normalization.mean)} means",
            )

    def decode(self, data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
        """Decode and resize: bytes to uint8 (image_size, image_size, channels)."""
        picture = decode_picture(
            data,
            channels=self.channels,
            max_pixels=max_pixels,
            background=self.background,
            shorter=scaled_side(self.image_size, self.crop),
        )
        # As `resize` does, without an array in between.
        scaled = _scaled(picture.size, self.image_size, self.crop)
        if scaled != picture.size:
            picture = picture.resize(scaled, _bilinear())
        return _centre(_pixels(picture), self.image_size)

    def resize(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Resize what is decoded: uint8 (height, width, channels) to (image_size, image_size, channels)."""
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
            "background": self.background,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Preprocessing:
        """Read what `to_dict` wrote.

        Raises:
            InvalidFormatError: If keys are missing or unknown.
            InvalidInputError: If a value breaks a rule.
        """
        keys = {"image_size", "channels", "crop", "mean", "std", "background"}
        # Descriptions before 0.2 do not tell the background.
        if not isinstance(data, Mapping) or set(data) | {"background"} != keys:
            raise InvalidFormatError(f"a preprocessing has exactly the keys {sorted(keys)}", received=data)
        return cls(
            data["image_size"],
            data["channels"],
            data["crop"],
            Normalization(tuple(data["mean"]), tuple(data["std"])),
            data.get("background", WHITE),
        )
