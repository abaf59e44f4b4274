"""Glyphs: capital letters of Matplotlib's fonts in colour, turned, shifted, behind lines and noise.

The data set that comes without a download and on which architecture matters: where digits are so easy that the
smallest network is as good as the largest, here it is not. Validation images show letters of fonts that no training
image has, so that what is measured is what letters have in common.

All is drawn from one seed: every machine with the same fonts and the same Pillow has the same images.
"""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError, import_or_raise
from foxnas_mlflow.core.files import cache_directory, file_digest, json_digest, write_atomically
from foxnas_mlflow.core.random import Stream, stream

LETTERS = "ABDEGHKLMNPRSTUVXZ"
"""The classes; C, F, I, J, O, Q, W and Y are left out: turned or hidden in part they are others."""

TRAIN_FONTS = (
    "DejaVuSans",
    "DejaVuSans-Oblique",
    "DejaVuSans-BoldOblique",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-BoldOblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-BoldItalic",
    "STIXGeneral",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
    "cmr10",
    "cmb10",
    "cmmi10",
    "cmtt10",
)
VALIDATION_FONTS = (
    "DejaVuSans-Bold",
    "DejaVuSansMono-Oblique",
    "DejaVuSerif-Italic",
    "STIXGeneralBol",
    "cmss10",
    "cmti10",
)

SIZE = 32
"""Height and width of the images in pixels."""

N_TRAIN, N_VALIDATION = 100, 120
"""Images of each letter."""

_HEIGHT = (0.55, 0.75)  # of a letter, as a share of the image's
_TURN_DEGREES = 15
_SHIFT = 0.08  # of the letter's centre, as a share of the image's side
_SLANT = 0.08  # largest change of a corner's place in perspective, likewise
_LINES, _BLOBS = 3, 5
_CONTRAST = 0.4  # least difference in brightness of a letter and the lighter background, black to white is 1
_NOISE = 0.06  # standard deviation, likewise
_BRIGHTNESS = np.array([0.299, 0.587, 0.114])
_DRAWN_COLOURS = 64  # pairs, of which the first with that contrast is taken
_SCALE = 2  # drawn so many times as large, then averaged
_SEED = 20


def glyphs() -> tuple[NDArray[np.uint8], NDArray[np.int64], int]:
    """All images, drawn once and kept in the cache.

    Returns:
        uint8 (n, SIZE, SIZE, 3), class indices (n,), and how many of them come first as training images.

    Raises:
        InvalidInputError: If Matplotlib's fonts are not there.
    """
    fonts = _font_files()
    n = len(LETTERS) * N_TRAIN
    targets = np.concatenate([np.arange(n) % len(LETTERS), np.arange(len(LETTERS) * N_VALIDATION) % len(LETTERS)])
    path = cache_directory("glyphs") / f"{_identity(fonts)[:32]}.bin"
    shape = (len(targets), SIZE, SIZE, 3)
    if not path.is_file() or path.stat().st_size != math.prod(shape):
        write_atomically(path, _draw(targets, n, fonts).tobytes())
    return np.fromfile(path, np.uint8).reshape(shape), targets.astype(np.int64), n


def _font_files() -> dict[str, Path]:
    import_or_raise("PIL.Image", extra="train", feature="the glyphs data set")
    found = importlib.util.find_spec("matplotlib")
    if found is None or not found.submodule_search_locations:
        import_or_raise("matplotlib", extra="train", feature="the fonts of the glyphs data set")
        raise InvalidInputError("the glyphs data set needs Matplotlib's fonts", received="no matplotlib")
    root = Path(found.submodule_search_locations[0], "mpl-data", "fonts", "ttf")
    fonts = {name: root / f"{name}.ttf" for name in (*TRAIN_FONTS, *VALIDATION_FONTS)}
    missing = [name for name, path in fonts.items() if not path.is_file()]
    if missing:
        raise InvalidInputError(
            "the glyphs data set needs Matplotlib's fonts",
            received=f"no {missing[0]}.ttf in {root}",
            remedy="install matplotlib from PyPI, or give other data",
        )
    return fonts


def _identity(fonts: dict[str, Path]) -> str:
    """What the pixels depend on."""
    import PIL
    from PIL import features

    facts = [file_digest(path) for path in fonts.values()]
    numbers = [LETTERS, SIZE, N_TRAIN, N_VALIDATION, _HEIGHT, _TURN_DEGREES, _SHIFT, _SLANT, _LINES, _BLOBS]
    numbers += [_CONTRAST, _NOISE, _SCALE, _SEED, PIL.__version__, features.version("freetype2")]
    return json_digest([facts, numbers])


def _draw(targets: NDArray[np.integer[Any]], n_train: int, fonts: dict[str, Path]) -> NDArray[np.uint8]:
    images = np.empty((len(targets), SIZE, SIZE, 3), np.uint8)
    for i, target in enumerate(map(int, targets)):
        rng = stream(_SEED, Stream.GLYPHS, i)
        names = TRAIN_FONTS if i < n_train else VALIDATION_FONTS
        images[i] = _image(LETTERS[target], fonts[names[rng.integers(len(names))]], rng)
    return images


def _image(letter: str, font: Path, rng: np.random.Generator) -> NDArray[np.uint8]:
    """One letter as uint8 (SIZE, SIZE, 3)."""
    from PIL import Image, ImageDraw

    side = SIZE * _SCALE
    behind, ink = _colours(rng)
    picture = Image.new("RGB", (side, side), behind)
    draw = ImageDraw.Draw(picture)
    for _ in range(_BLOBS):
        # Near the background, so that no blob hides a letter.
        colour = tuple(int(c) for c in np.clip(np.array(behind) + rng.normal(0, 20, 3), 0, 255))
        x, y = rng.uniform(-0.2, 1.0, 2) * side
        w, h = rng.uniform(0.2, 0.6, 2) * side
        draw.ellipse((x, y, x + w, y + h), fill=colour)
    picture.paste(Image.new("RGB", (side, side), ink), (0, 0), _mask(letter, font, rng, side))
    draw = ImageDraw.Draw(picture)
    for _ in range(_LINES):
        ends = rng.uniform(0, 1, 4) * side
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        draw.line([float(v) for v in ends], fill=colour, width=int(rng.integers(1, 2 * _SCALE)))
    pixels = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.BOX), np.float64) / 255
    pixels += rng.normal(0, _NOISE, pixels.shape)
    return np.round(255 * np.clip(pixels, 0, 1)).astype(np.uint8)


def _colours(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Background and letter, which is darker by enough."""
    pairs = rng.uniform(0, 1, (_DRAWN_COLOURS, 2, 3))
    fitting = pairs[(pairs[:, 0] - pairs[:, 1]) @ _BRIGHTNESS >= _CONTRAST]
    behind, ink = fitting[0] if len(fitting) else np.array([[1.0] * 3, [0.0] * 3])
    return tuple(int(255 * c) for c in behind), tuple(int(255 * c) for c in ink)


def _mask(letter: str, font: Path, rng: np.random.Generator, side: int) -> Any:
    """Where the letter's ink is: turned, slanted in perspective and shifted, as an image of coverage."""
    from PIL import Image, ImageDraw, ImageFont

    height = rng.uniform(*_HEIGHT) * side
    loaded = ImageFont.truetype(str(font), round(1.4 * height))
    left, top, right, bottom = loaded.getbbox(letter, anchor="ls")
    scale = height / (bottom - top)
    plain = Image.new("L", (side, side))
    ImageDraw.Draw(plain).text(((side - left - right) / 2, (side - top - bottom) / 2), letter, 255, loaded, anchor="ls")
    # From places in the result to places in the plain letter, corner by corner.
    turn = math.radians(rng.uniform(-_TURN_DEGREES, _TURN_DEGREES))
    turned = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]]) / scale
    corners = np.array([[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]])
    shift = rng.uniform(-_SHIFT, _SHIFT, 2)
    source = (corners - shift) @ turned.T + rng.uniform(-_SLANT, _SLANT, (4, 2))
    return plain.transform(
        (side, side),
        Image.Transform.PERSPECTIVE,
        _perspective((corners + 0.5) * side, (source + 0.5) * side),
        Image.Resampling.BILINEAR,
    )


def _perspective(places: NDArray[np.float64], sources: NDArray[np.float64]) -> list[float]:
    """The eight numbers of the projective map that takes four places (4, 2) to four sources (4, 2)."""
    rows, values = [], []
    for (x, y), (u, v) in zip(places, sources, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        values += [u, v]
    return [float(c) for c in np.linalg.solve(np.array(rows), np.array(values))]
