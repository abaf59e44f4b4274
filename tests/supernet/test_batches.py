"""What training sees: crops, mirror images, colours and erased parts, the same in one process and in several."""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
image = pytest.importorskip("PIL.Image")

from foxnas_mlflow.core.errors import InvalidInputError, WorkerLostError  # noqa: E402
from foxnas_mlflow.data import ArrayImages, FileImages, ImageSet, Normalization, Variations, load_dataset  # noqa: E402
from foxnas_mlflow.data._vary import colour_matrix  # noqa: E402
from foxnas_mlflow.supernet import Batches  # noqa: E402

PLAIN = Normalization((0.0,) * 3, (1.0,) * 3)


def batches_of(images: ImageSet, **changes: Any) -> Batches:
    values = {"normalization": PLAIN, "image_size": 64, "batch_size": 8, "seed": 5} | changes
    return Batches(images, **values)


def pictures(n: int = 24, size: int = 64) -> ArrayImages:
    rng = np.random.default_rng(0)
    low = rng.integers(0, 256, (n, 5, 6, 3), dtype=np.uint8)
    images = np.stack([np.asarray(image.fromarray(x).resize((size + 9, size), 3)) for x in low])
    return ArrayImages(images, np.arange(n))


def test_processes_read_the_same_batches_in_the_same_order() -> None:
    alone, several = (list(batches_of(pictures(), workers=n).epoch(3)) for n in (0, 2))
    assert len(alone) == 3
    for (x, t), (y, u) in zip(alone, several, strict=True):
        assert torch.equal(x, y)
        assert torch.equal(t, u)
    # An epoch that is gone on with in its middle.
    rest = list(batches_of(pictures()).epoch(3, start=2))
    assert torch.equal(rest[0][0], alone[2][0])
    assert not torch.equal(next(batches_of(pictures()).epoch(4))[0], alone[0][0])


def test_a_reader_that_ends_is_told_between_two_batches() -> None:
    before, others = signal.getsignal(signal.SIGCHLD), set(multiprocessing.active_children())
    batches = batches_of(pictures(), batch_size=2, workers=1).epoch(0)
    next(batches)
    assert signal.getsignal(signal.SIGCHLD) == before, "PyTorch's handler would raise anywhere"
    (reader,) = set(multiprocessing.active_children()) - others
    reader.kill()
    with pytest.raises(WorkerLostError, match=r"must go on to the end; received .*same command"):
        list(batches)


def test_ranks_share_an_epoch() -> None:
    ranks = [[t for _, t in batches_of(pictures(), batch_size=4, rank=r, world_size=2).epoch(0)] for r in (0, 1)]
    assert sorted(torch.cat([*ranks[0], *ranks[1]]).tolist()) == list(range(24))


def only(boxes: list[list[float]], mirrored: bool = False, colours: Any = 1.0, holes: Any = 0.0) -> Variations:
    n = len(boxes)
    return Variations(
        np.array(boxes), np.full(n, mirrored), np.broadcast_to(colours, (n, 3)), np.broadcast_to(holes, (n, 4))
    )


def test_a_whole_crop_is_the_picture_and_a_mirrored_one_its_mirror_image() -> None:
    picture = np.asarray(image.fromarray(pictures(1).images[0]).resize((40, 32)))
    square = picture[:, 4:36]
    np.testing.assert_array_equal(only([[0, 0, 1, 1.0]]).applied(0, image.fromarray(picture), 32), square)
    np.testing.assert_array_equal(
        only([[0, 0, 1, 1.0]], mirrored=True).applied(0, image.fromarray(picture), 32), square[:, ::-1]
    )
    # A quarter of a picture, without scaling.
    np.testing.assert_array_equal(
        only([[0.5, 0.5, 0.5, 0.5]]).applied(0, image.fromarray(picture), 16), square[16:, 16:]
    )
    expected = square.copy()
    expected[8:24, 0:8] = 0
    np.testing.assert_array_equal(
        only([[0, 0, 1, 1.0]], holes=[0, 0.25, 0.25, 0.5]).applied(0, image.fromarray(picture), 32), expected
    )
    assert only([[0, 0, 1, 1.0]]).applied(0, image.fromarray(picture[..., 0]), 16).shape == (16, 16, 1)


def test_what_is_drawn_lies_inside_and_has_the_asked_shares(rng: np.random.Generator) -> None:
    drawn = Variations.drawn(10_000, rng, least=0.6, mirror=True)
    for boxes in (drawn.boxes, drawn.holes):
        x, y, w, h = boxes.T
        assert min(x.min(), y.min()) >= 0
        assert max((x + w).max(), (y + h).max()) <= 1 + 1e-12
    area = drawn.boxes[:, 2] * drawn.boxes[:, 3]
    assert area.min() > 0.6 * 0.85
    assert 0.75 < area.mean() < 0.8
    assert drawn.mirrored.mean() == pytest.approx(0.5, abs=0.05)
    assert 0.8 <= drawn.colours.min() < drawn.colours.max() <= 1.2
    holes = drawn.holes[:, 2] * drawn.holes[:, 3]
    assert (holes > 0).mean() == pytest.approx(0.1, abs=0.02)
    assert 0.02 <= holes[holes > 0].min() < holes.max() <= 0.1
    assert not Variations.drawn(100, rng, least=0.6, mirror=False).mirrored.any()


def test_colours_are_those_of_one_change_after_the_other(rng: np.random.Generator) -> None:
    picture = pictures(1).images[0][:, :64]
    saturation, contrast, brightness = factors = rng.uniform(0.8, 1.2, 3)
    values = picture.astype(float)
    grey = values @ [0.299, 0.587, 0.114]
    expected = grey[..., None] + saturation * (values - grey[..., None])
    expected = grey.mean() + contrast * (expected - grey.mean())
    expected = np.clip(brightness * expected, 0, 255)
    varied = only([[0, 0, 1, 1.0]], colours=factors).applied(0, image.fromarray(picture), 64)
    np.testing.assert_allclose(varied, expected, atol=1.6)
    np.testing.assert_allclose(np.reshape(colour_matrix(np.ones(3), 99), (3, 4)), np.eye(3, 4), atol=1e-12)


def test_crops_of_kept_pixels_and_of_files_show_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for k, name in enumerate("ab"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, x in enumerate(pictures(12).images):
            image.fromarray(np.roll(x, k, axis=2)).resize((120, 100)).save(tmp_path / "data" / name / f"{i}.png")
    sets = [load_dataset(str(tmp_path / "data"), sizes=(64,), keep=keep).train for keep in (False, True)]
    (x, t), (y, u) = (next(batches_of(images).epoch(0)) for images in sets)
    assert torch.equal(t, u)
    # Scaled once or twice: the same part of the picture, mirrored alike.
    assert float((x - y).abs().mean()) < 0.02
    unchanged = [next(batches_of(images, augment=False).epoch(0))[0] for images in sets]
    assert torch.equal(*unchanged)


def test_no_batch_is_left_out_where_pictures_break(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A training counts its steps by them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i, x in enumerate(pictures(12).images):
            image.fromarray(np.roll(x, ord(name), axis=2)).save(tmp_path / "data" / name / f"{i}.png")
    images = load_dataset(str(tmp_path / "data"), sizes=(64,), keep=False).train
    assert isinstance(images, FileImages)
    batches = batches_of(images, batch_size=4)
    first = np.random.default_rng([5, 0]).permutation(len(images))[:4]
    for i in first[1:]:
        Path(images.paths[int(i)]).write_bytes(b"broken")
    epoch = list(batches.epoch(0))
    assert len(epoch) == len(batches)
    # Batch norm has no variance of one image.
    assert epoch[0][1].tolist() == [images.targets[first[0]]] * 2
    Path(images.paths[int(first[0])]).write_bytes(b"broken")
    with pytest.raises(InvalidInputError, match="must be readable; received none of 4; look"):
        next(batches.epoch(0))


def test_balanced_sampling_shows_every_class_as_often_and_its_images_in_turn() -> None:
    targets = np.repeat([0, 1, 2], [40, 7, 3])
    images = ArrayImages(np.arange(50, dtype=np.uint8).reshape(50, 1, 1, 1) * np.ones((1, 8, 8, 1), np.uint8), targets)
    values = {"normalization": Normalization((0.0,), (1.0,)), "image_size": 8, "flip": False, "augment": False}
    balanced = batches_of(images, **values, batch_size=10, balanced=True)
    seen = [(x[:, 0, 0, 0] * 255).round().int().tolist() for x, _ in balanced.epoch(0)]
    order = np.concatenate(seen)
    assert sorted(np.bincount(targets[order])) == [16, 17, 17]
    times = np.bincount(order, minlength=50)
    for label in range(3):
        assert np.ptp(times[targets == label]) <= 1
    # Classes come mixed, and the batches again the same.
    assert all(len(set(targets[batch])) > 1 for batch in seen)
    again = batches_of(images, **values, batch_size=10, balanced=True).epoch(0, start=4)
    np.testing.assert_array_equal((next(iter(again))[0][:, 0, 0, 0] * 255).round().int(), seen[4])
