"""How training pictures are varied: drawn for a whole batch, done with bytes where they are decoded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import import_or_raise

RATIOS = (0.85, 1.18)
"""Width by height of a crop."""

COLOUR = 0.2
"""Brightness, contrast and saturation are multiplied by 1 - COLOUR to 1 + COLOUR."""

ERASED, ERASED_AREA = 0.1, (0.02, 0.1)
"""Share of the pictures that lose a part, and the part's share of the picture."""

_GREY = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True, eq=False)
class Variations:
    """What happens to each picture of a batch, in this order.

    Attributes:
        boxes: Left, top, width and height of what is cut out, as shares of the central square (n, 4).
        mirrored: Whether left and right change places (n,).
        colours: Factors of saturation, contrast and brightness (n, 3).
        holes: Left, top, width and height of the part that is erased, as shares of what was cut out (n, 4).
    """

    boxes: NDArray[np.float64]
    mirrored: NDArray[np.bool_]
    colours: NDArray[np.float64]
    holes: NDArray[np.float64]

    @classmethod
    def drawn(cls, n: int, rng: np.random.Generator, *, least: float, mirror: bool) -> Variations:
        """Crops of a share of the area from `least` to 1, anywhere; half of them mirrored if asked for."""
        boxes = _boxes(n, rng, (least, 1.0), RATIOS)
        mirrored = (rng.random(n) < 0.5) & mirror
        colours = rng.uniform(1 - COLOUR, 1 + COLOUR, (n, 3))
        holes = _boxes(n, rng, ERASED_AREA, (0.4, 2.5)) * (rng.random((n, 1)) < ERASED)
        return cls(boxes, mirrored, colours, holes)

    def applied(self, i: int, picture: Any, size: int) -> NDArray[np.uint8]:
        """Picture i varied.

        Args:
            i: Its place in the batch.
            picture: A Pillow image of mode RGB, or L, which keeps its levels.
            size: Height and width of the result in pixels, scaled with antialiasing.

        Returns:
            uint8 (size, size, channels).
        """
        pillow = import_or_raise("PIL.Image", extra="train", feature="varying images")
        width, height = picture.size
        side = min(height, width)
        x, y, w, h = side * self.boxes[i]
        left, top = (width - side) / 2 + x, (height - side) / 2 + y
        # Sums of floats may end a little outside.
        box = (left, top, min(left + w, width), min(top + h, height))
        picture = picture.resize((size, size), pillow.Resampling.BILINEAR, box)
        if picture.mode == "RGB":
            mean = np.asarray(picture.resize((1, 1), pillow.Resampling.BOX)).ravel() @ _GREY
            picture = picture.convert("RGB", colour_matrix(self.colours[i], mean))
        pixels = np.asarray(picture).reshape(size, size, -1)
        x, y, w, h = np.round(size * self.holes[i]).astype(int)
        if w and h:
            pixels = pixels.copy()
            pixels[y : y + h, x : x + w] = 0
        return pixels[:, ::-1] if self.mirrored[i] else pixels


def colour_matrix(factors: NDArray[np.float64], mean: float) -> tuple[float, ...]:
    """Three changes of colour in one step: they are linear in a pixel, its grey and the mean of that.

    Args:
        factors: Saturation, of the distance of each colour from its grey; contrast, of the distance from the picture's
            mean; brightness, of what comes out.
        mean: Grey of the picture's mean colour, 0..255.

    Returns:
        Rows (red, green, blue, constant) for each of red, green and blue, as Pillow's ``convert`` takes them.
    """
    saturation, contrast, brightness = factors
    mixed = saturation * np.eye(3) + (1 - saturation) * _GREY
    rows = brightness * np.column_stack([contrast * mixed, np.full(3, (1 - contrast) * mean)])
    return tuple(rows.ravel().tolist())


def _boxes(
    n: int, rng: np.random.Generator, areas: tuple[float, float], ratios: tuple[float, float]
) -> NDArray[np.float64]:
    """Left, top, width and height inside a unit square (n, 4)."""
    area = rng.uniform(*areas, n)
    ratio = np.exp(rng.uniform(np.log(ratios[0]), np.log(ratios[1]), n))
    sides = np.minimum(np.sqrt(np.stack([area * ratio, area / ratio], axis=1)), 1)
    return np.concatenate([rng.random((n, 2)) * (1 - sides), sides], axis=1)
