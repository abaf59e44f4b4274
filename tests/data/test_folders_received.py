"""Folders as people have them: what became of each picture is seen in the data set and in the pixels that it gives."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import FileImages, ImageDataset, Preprocessing, load_dataset
from foxnas_mlflow.data.preprocess import read_formats

image = pytest.importorskip("PIL.Image")

SIZE = 24


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(seed: int, width: int = 40, height: int = 30) -> Any:
    low = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return image.fromarray(low).resize((width, height), 3)


def folder(root: Path, n: int = 12, suffix: str = ".jpg") -> Path:
    """Two classes of n pictures."""
    for k, label in enumerate(("cat", "dog")):
        (root / label).mkdir(parents=True)
        for i in range(n):
            picture(10_000 * k + i).save(root / label / f"{i:03}{suffix}", quality=95)
    return root


def pixels_of(dataset: ImageDataset, name: str) -> np.ndarray:
    """What training, evaluation and serving see of a file."""
    for images in (dataset.train, dataset.val):
        assert isinstance(images, FileImages)
        for i, path in enumerate(images.paths):
            if path.name == name:
                return images.prepared(i, Preprocessing(SIZE))
    raise AssertionError(name)


@pytest.mark.parametrize("keep", [True, False])
def test_one_file_cut_off_among_many_is_named_before_training(tmp_path: Path, keep: bool) -> None:
    root = folder(tmp_path / "data", 30)
    torn = root / "cat/007.jpg"
    torn.write_bytes(torn.read_bytes()[: int(0.6 * torn.stat().st_size)])
    dataset = load_dataset(str(root), sizes=(SIZE,), keep=keep)
    assert dataset.unreadable == (str(torn),)
    assert len(dataset.train) + len(dataset.val) == 59
    assert f"1 damaged files are left out: {torn}" in dataset.warnings()
    # Many of them are no accident.
    for i in range(4):
        (root / f"dog/{i:03}.jpg").write_bytes(b"\xff\xd8\xff")
    with pytest.raises(InvalidInputError, match=r"at most 5% of the images may be unreadable; received 5 of 60"):
        load_dataset(str(root), sizes=(SIZE,), keep=keep)


def test_a_picture_that_is_too_large_is_not_called_damaged(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 30)
    # 56 and 90 million pixels; Pillow itself has something to say of the second. A JPEG is read at a reduced size.
    for name, size in (("a.png", (8_000, 7_000)), ("b.png", (10_000, 9_000)), ("c.jpg", (8_000, 7_000))):
        image.new("1", size).save(root / "cat" / name)
    torn = root / "cat/007.jpg"
    torn.write_bytes(torn.read_bytes()[:400])
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        dataset = load_dataset(str(root), sizes=(SIZE,))
        left_out = [text for text in dataset.warnings() if "left out" in text]
    assert not said, "Pillow's own words of large pictures are ours here"
    large = f"{root / 'cat/a.png'}, {root / 'cat/b.png'}"
    assert left_out == [
        f"2 pictures of more than 40 million pixels are left out, scale them down: {large}",
        f"1 damaged files are left out: {torn}",
    ]
    assert any(path.name == "c.jpg" for part in (dataset.train, dataset.val) for path in part.paths)
    image.new("1", (8_000, 7_000)).save(root / "cat" / "000.png")
    with pytest.raises(InvalidInputError, match=r"received 4 of 64, the first is \S+, which has too many pixels"):
        load_dataset(str(root), sizes=(SIZE,))


def test_all_pictures_of_a_class_in_two_formats_are_trained_on(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 5)
    for k, label in enumerate(("cat", "dog")):
        for i in range(45):
            picture(20_000 * (k + 1) + i).save(root / label / f"w{i}.webp")
    dataset = load_dataset(str(root))
    counts = np.bincount(np.concatenate([dataset.train.targets, dataset.val.targets]))
    assert counts.tolist() == [50, 50]
    assert dataset.unread == {}


def test_photos_of_a_telephone_without_their_reader_are_told_what_reads_them(tmp_path: Path) -> None:
    if "HEIF" in read_formats():
        pytest.skip("pillow-heif is installed")
    root = folder(tmp_path / "data", 15)
    for label in ("cat", "fox"):
        (root / label).mkdir(exist_ok=True)
        for i in range(3):
            (root / label / f"IMG_{i}.HEIC").write_bytes(b"\0\0\0\x18ftypheic")
    reader = r"\(read with: pip install pillow-heif\)"
    with pytest.raises(InvalidInputError, match=rf"training images; received fox, beside 6 \.heic {reader}\."):
        load_dataset(str(root))
    (root / "fox").rename(tmp_path / "fox")
    assert load_dataset(str(root)).warnings() == [
        "files that are not read: 3 .heic (read with: pip install pillow-heif)"
    ]
    (tmp_path / "photos").mkdir()
    (tmp_path / "fox").rename(tmp_path / "photos" / "fox")
    with pytest.raises(InvalidInputError, match=rf"received no image in \S+, beside 3 \.heic {reader}\."):
        load_dataset(str(tmp_path / "photos"))
    listed = tmp_path / "list.csv"
    listed.write_text("file,label\ndata/cat/IMG_0.HEIC,cat\ndata/dog/001.jpg,dog\n")
    with pytest.raises(InvalidInputError, match=r"received 1 of 2, the first is \S+HEIC; pip install pillow-heif\."):
        load_dataset(str(listed))


def test_a_turned_photo_a_drawing_without_background_and_sixteen_bits_look_as_a_viewer_shows_them(
    tmp_path: Path,
) -> None:
    root = folder(tmp_path / "data")
    exif = image.Exif()
    exif[0x0112] = 6
    upright = picture(7, 48, 64)
    upright.save(root / "cat/upright.png")
    upright.transpose(image.Transpose.ROTATE_90).save(root / "cat/turned.png", exif=exif)
    drawing = image.new("RGBA", (40, 40))
    drawing.paste((0, 0, 0, 255), (10, 10, 30, 30))
    drawing.save(root / "cat/drawing.png")
    levels = np.arange(40 * 40, dtype=np.uint16).reshape(40, 40) * 40
    image.fromarray(levels).save(root / "dog/deep.png")
    dataset = load_dataset(str(root), sizes=(SIZE,), keep=True)
    assert dataset.unreadable == ()
    np.testing.assert_array_equal(pixels_of(dataset, "turned.png"), pixels_of(dataset, "upright.png"))
    seen = pixels_of(dataset, "drawing.png")
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[SIZE // 2, SIZE // 2].tolist() == [0, 0, 0]
    deep = pixels_of(dataset, "deep.png")[..., 0]
    np.testing.assert_allclose(deep.mean(), (levels / 257).mean(), atol=1)
    assert np.ptp(deep) > 200


def test_photos_larger_than_what_is_decoded_whole_are_read_at_a_reduced_size(tmp_path: Path) -> None:
    root = folder(tmp_path / "data", 9)
    large = picture(3, 806, 604).resize((8064, 6048), image.Resampling.NEAREST)
    for label in ("cat", "dog"):
        large.save(root / label / "large.jpg", quality=50)
    dataset = load_dataset(str(root), sizes=(SIZE,), keep=True)
    assert dataset.unreadable == ()
    assert len(dataset.train) + len(dataset.val) == 20
    expected = Preprocessing(SIZE).resize(np.asarray(picture(3, 806, 604))).astype(int)
    assert np.abs(pixels_of(dataset, "large.jpg") - expected).mean() < 4


def test_a_rare_class_is_warned_of_and_weighs_as_much_in_balanced_accuracy(tmp_path: Path) -> None:
    from foxnas_mlflow.core.classification import balanced_percent, majority_percent, no_better_than_majority

    root = folder(tmp_path / "data", 200, suffix=".png")
    for i in range(5, 200):
        (root / f"dog/{i:03}.png").unlink()
    dataset = load_dataset(str(root))
    assert dataset.warnings() == [
        "classes are unbalanced: 160 training images of cat, 4 of dog",
        "classes with fewer than 10 training images: dog (4)",
    ]
    # Always "cat": 97.6 % right, and no better than that.
    counts = np.stack([np.bincount(dataset.val.targets), [0, 0]], axis=1)
    assert majority_percent(counts) == pytest.approx(100 * 40 / 41)
    assert balanced_percent(counts) == 50
    assert "always answering 'cat'" in no_better_than_majority(counts, dataset.labels)


def test_transparent_parts_show_the_background_that_is_asked_for_in_training_evaluation_and_serving(
    tmp_path: Path,
) -> None:
    pytest.importorskip("torch")
    from foxnas_mlflow.data import prepared_batches
    from foxnas_mlflow.supernet import Batches

    root = tmp_path / "data"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(10):
            image.new("RGBA", (30, 30)).save(root / label / f"{i}.png")
    for background, expected in ((0, 0), (90, 90)):
        dataset = load_dataset(str(root), sizes=(SIZE,), keep=True, background=background)
        assert dataset.preprocessing(SIZE).background == background
        pixels, _ = next(prepared_batches(dataset.val, dataset.preprocessing(SIZE)))
        assert (pixels == expected).all()
        assert (dataset.train[0] == expected).all()
        for augment in (False, True):
            batches = Batches(
                dataset.train, normalization=dataset.normalization, image_size=SIZE, batch_size=8, augment=augment
            )
            normalized = next(batches.epoch(0))[0].permute(0, 2, 3, 1).numpy()
            seen = 255 * (normalized * dataset.normalization.std + np.array(dataset.normalization.mean))
            assert abs(np.median(seen) - expected) <= (0.2 * expected + 1 if augment else 0.5)
