"""Pictures as people have them, decoded as a viewer shows them."""

from __future__ import annotations

import io
import sys
import types
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError, MissingDependencyError
from foxnas_mlflow.data.preprocess import Normalization, Preprocessing, decode_image, read_formats, resize

image = pytest.importorskip("PIL.Image")


def picture(height: int = 24, width: int = 36, *, seed: int = 0) -> np.ndarray:
    """Smooth colours, which a lossy format keeps."""
    corners = np.random.default_rng(seed).integers(40, 216, (3, 4, 3), dtype=np.uint8)
    return np.asarray(image.fromarray(corners).resize((width, height), image.Resampling.BICUBIC))


def encoded(pixels: Any, file_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    given = image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    given.save(buffer, format=file_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("file_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("WEBP", {"lossless": True}, 0),
        ("JPEG", {"quality": 98, "subsampling": 0}, 6),
        ("AVIF", {"quality": 95}, 12),
        ("GIF", {}, 60),
    ],
)
def test_every_format_gives_the_picture(file_format: str, options: dict[str, Any], tolerance: int) -> None:
    if file_format not in read_formats():
        pytest.skip(f"this Pillow decodes no {file_format}")
    pixels = picture()
    got = decode_image(encoded(pixels, file_format, **options))
    assert got.shape == pixels.shape
    assert np.abs(got.astype(int) - pixels).max() <= tolerance


def test_of_an_animation_the_first_frame_is_taken() -> None:
    frames = [image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photo_has_the_pixels_of_the_upright_one(file_format: str, orientation: int) -> None:
    upright = picture()
    # How the sensor saw it, by the meaning of the tag in the Exif standard (row 0, column 0).
    seen = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: upright.transpose(1, 0, 2)[::-1],
        7: upright.transpose(1, 0, 2)[::-1, ::-1],
        8: upright.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}.get(file_format, {})
    got = decode_image(encoded(np.ascontiguousarray(seen), file_format, exif=exif, **options))
    assert got.shape == upright.shape
    assert np.abs(got.astype(int) - upright).max() <= (6 if file_format == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_a_damaged_note_of_the_camera_spoils_no_picture() -> None:
    data = encoded(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\x7f")
    assert decode_image(data).shape == (24, 36, 3)


def test_transparent_parts_show_the_background() -> None:
    drawing = np.zeros((10, 10, 4), np.uint8)
    drawing[2:4, 2:8, 3] = 255
    drawing[6, 6] = 0, 0, 0, 128
    for channels in (3, 1):
        got = decode_image(encoded(drawing, "PNG"), channels=channels)
        assert (got[2:4, 2:8] == 0).all()
        assert (got[0] == 255).all()
        assert (np.abs(got[6, 6].astype(int) - 127) <= 1).all()
    assert (decode_image(encoded(drawing, "PNG"), background=0) == 0).all()
    grey = np.dstack([np.full((4, 4), 7, np.uint8), np.zeros((4, 4), np.uint8)])
    assert (decode_image(encoded(grey, "PNG")) == 255).all()
    palette = image.new("P", (4, 4), 0)
    palette.putpalette([9, 9, 9, 200, 0, 0])
    assert (decode_image(encoded(palette, "PNG", transparency=0)) == 255).all()
    # What is opaque everywhere has the pixels that it has without the channel.
    opaque = np.dstack([picture(), np.full((24, 36), 255, np.uint8)])
    np.testing.assert_array_equal(decode_image(encoded(opaque, "PNG")), picture())


@pytest.mark.parametrize("file_format", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_to_eight(file_format: str) -> None:
    levels = np.array([[0, 255, 257, 32768], [65535, 128, 129, 65000]], np.uint16)
    got = decode_image(encoded(levels, file_format), channels=1)[..., 0]
    np.testing.assert_array_equal(got, np.round(levels / 257).astype(np.uint8))


def test_cmyk_is_read_in_the_right_sense() -> None:
    red = encoded(image.new("RGB", (16, 16), (255, 0, 0)).convert("CMYK"), "JPEG", quality=95)
    assert np.abs(decode_image(red).astype(int) - [255, 0, 0]).max() <= 4


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("height", "width"), [(24, 36), (36, 24), (16, 16), (32, 32), (301, 97)])
def test_decoding_gives_the_pixels_that_are_decoded_and_resized(height: int, width: int, channels: int) -> None:
    preprocessing = Preprocessing(
        16, channels, crop=0.5, normalization=Normalization((0.0,) * channels, (1.0,) * channels)
    )
    data = encoded(picture(height, width), "PNG")
    expected = resize(decode_image(data, channels=channels), 16, crop=0.5)
    assert expected.shape == (16, 16, channels)
    np.testing.assert_array_equal(preprocessing.decode(data), expected)


def test_a_large_photo_is_decoded_at_a_reduced_size() -> None:
    data = encoded(picture(1200, 1600), "JPEG", quality=90)
    assert decode_image(data, shorter=32).shape == (150, 200, 3)
    assert decode_image(data, shorter=130).shape == (600, 800, 3)
    assert decode_image(data, shorter=300).shape == (1200, 1600, 3)
    # Within the limit on what is decoded, though the file claims more.
    assert decode_image(data, shorter=32, max_pixels=1200 * 1600 // 8).shape == (150, 200, 3)
    with pytest.raises(InvalidInputError, match="at most 30000 pixels; received 1600 x 1200"):
        decode_image(data, shorter=32, max_pixels=30_000)
    with pytest.raises(InvalidInputError, match="at most 240000 pixels"):
        decode_image(encoded(picture(1200, 1600), "JPEG", progressive=True), shorter=32, max_pixels=240_000)
    # Scaled to its purpose it is the picture that it is at full size.
    exact = resize(decode_image(data), 32).astype(int)
    assert np.abs(Preprocessing(32).decode(data) - exact).max() <= 3


def test_a_description_tells_the_background_and_old_ones_are_read() -> None:
    given = Preprocessing(8, background=0)
    assert Preprocessing.from_dict(given.to_dict()) == given
    old = {key: value for key, value in given.to_dict().items() if key != "background"}
    assert Preprocessing.from_dict(old) == Preprocessing(8)
    with pytest.raises(InvalidInputError, match="background must be a grey level"):
        Preprocessing(8, background=256)


@pytest.mark.parametrize("file_format", ["AVIF", "JPEG", "PNG", "WEBP"])
def test_a_byte_that_is_wrong_ends_in_no_other_error_than_ours(file_format: str) -> None:
    if file_format not in read_formats():
        pytest.skip(f"this Pillow decodes no {file_format}")
    data = encoded(picture(12, 18), file_format)
    refused = 0
    for i in range(min(len(data), 500)):
        try:
            assert decode_image(data[:i] + bytes([data[i] ^ 255]) + data[i + 1 :], max_pixels=10**6).shape[2] == 3
        except InvalidInputError:
            refused += 1
    assert refused > 30


def test_a_format_without_its_reader_is_told_what_reads_it() -> None:
    if "HEIF" in read_formats():
        pytest.skip("pillow-heif is installed")
    told = f"an image must be JPEG, .* or {read_formats()[-1]}; received 20 bytes of HEIF; pip install pillow-heif"
    with pytest.raises(InvalidInputError, match=told):
        decode_image(b"\0\0\0\x14ftypheic" + b"\0" * 8)
    with pytest.raises(InvalidInputError, match="received 5 bytes of something else"):
        decode_image(b"hello")


def test_a_format_whose_decoder_pillow_lacks_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow that was built without them lists them all the same."""
    for name in ("Avif", "WebP"):
        monkeypatch.setattr(pytest.importorskip(f"PIL.{name}ImagePlugin"), "SUPPORTED", False)
    read_formats.cache_clear()
    try:
        assert not {"AVIF", "WEBP"} & set(read_formats())
        with pytest.raises(InvalidInputError, match="received 20 bytes of AVIF; pip install --upgrade pillow"):
            decode_image(b"\0\0\0\x14ftypavif" + b"\0" * 8)
    finally:
        read_formats.cache_clear()


def test_an_older_pillow_has_its_constants_elsewhere_and_one_that_is_too_old_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As Debian 11 has it, 8.1, and Debian 10, 5.4."""
    exif = image.Exif()
    exif[0x0112] = 6
    data = encoded(picture(), "PNG", exif=exif)
    expected = Preprocessing(16).decode(data)

    def older(version: str) -> None:
        values = {key: value for key, value in vars(image).items() if key not in ("Transpose", "Resampling")}
        module = types.ModuleType("PIL.Image")
        vars(module).update(values | {"__version__": version})
        monkeypatch.setitem(sys.modules, "PIL.Image", module)
        read_formats.cache_clear()

    try:
        older("8.1.2")
        np.testing.assert_array_equal(Preprocessing(16).decode(data), expected)
        older("5.4.1")
        with pytest.raises(MissingDependencyError, match=r"needs Pillow 8 or newer; received 5\.4\.1; install it with"):
            decode_image(data)
    finally:
        read_formats.cache_clear()
