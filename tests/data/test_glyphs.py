"""The drawn data set: balanced, the same every time, its fonts divided, its letters legible."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import ArrayImages, load_dataset
from foxnas_mlflow.data import _glyphs as drawn


@pytest.fixture(autouse=True)
def few(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(drawn, "N_TRAIN", 4)
    monkeypatch.setattr(drawn, "N_VALIDATION", 2)


def test_every_letter_is_drawn_as_often_and_the_same_every_time() -> None:
    first = load_dataset("glyphs")
    assert first.labels == tuple(drawn.LETTERS)
    assert (len(first.train), len(first.val), first.channels) == (4 * 18, 2 * 18, 3)
    for images, n in ((first.train, 4), (first.val, 2)):
        assert (np.bincount(images.targets) == n).all()
        assert images[0].shape == (drawn.SIZE, drawn.SIZE, 3)
    assert first.drawn
    fonts = drawn._font_files()
    again = drawn._draw(np.arange(3), 3, fonts)
    assert isinstance(first.train, ArrayImages)
    np.testing.assert_array_equal(first.train.images[:3], again)
    # A torn file of the cache is drawn again.
    (kept,) = (Path(drawn.cache_directory("glyphs"))).iterdir()
    kept.write_bytes(kept.read_bytes()[:100])
    assert load_dataset("glyphs", seed=7).digest == first.digest


def test_validation_letters_are_of_other_fonts_and_all_are_there() -> None:
    assert not set(drawn.TRAIN_FONTS) & set(drawn.VALIDATION_FONTS)
    assert set(drawn._font_files()) == {*drawn.TRAIN_FONTS, *drawn.VALIDATION_FONTS}


def test_a_letter_is_darker_than_what_is_behind_it(rng: np.random.Generator) -> None:
    for _ in range(200):
        behind, ink = (np.array(c) / 255 @ drawn._BRIGHTNESS for c in drawn._colours(rng))
        assert behind - ink >= drawn._CONTRAST - 0.01


def test_the_projective_map_takes_places_to_sources(rng: np.random.Generator) -> None:
    places = np.array([[0, 0], [32, 0], [32, 32], [0, 32]], float)
    sources = places + rng.uniform(-3, 3, (4, 2))
    a, b, c, d, e, f, g, h = drawn._perspective(places, sources)
    for (x, y), source in zip(places, sources, strict=True):
        w = g * x + h * y + 1
        np.testing.assert_allclose([(a * x + b * y + c) / w, (d * x + e * y + f) / w], source, atol=1e-9)


def test_fonts_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "TRAIN_FONTS", ("NoSuchFont", *drawn.TRAIN_FONTS))
    with pytest.raises(InvalidInputError, match=r"no NoSuchFont\.ttf.*install matplotlib"):
        load_dataset("glyphs")
