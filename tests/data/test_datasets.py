"""Data sets: built-in ones, folders, IDX files, and what is wrong with them."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import load_dataset, stratified_split

image = pytest.importorskip("PIL.Image")


def write_images(folder: Path, n: int, *, seed: int = 0, suffix: str = ".png", size: int = 12) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        image.fromarray(rng.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)).save(folder / f"{i}{suffix}")


def test_digits_are_split_by_class() -> None:
    pytest.importorskip("sklearn")
    dataset = load_dataset("digits")
    assert len(dataset.train) + len(dataset.val) == 1797
    assert dataset.labels == tuple("0123456789")
    assert dataset.train[0].shape == (8, 8, 1)
    share = np.bincount(dataset.val.targets) / (np.bincount(dataset.train.targets) + np.bincount(dataset.val.targets))
    np.testing.assert_allclose(share, 0.2, atol=0.01)
    pixels = np.stack([dataset.train[i] for i in range(len(dataset.train))]) / 255
    np.testing.assert_allclose(dataset.normalization.mean, pixels.mean(), atol=1e-5)
    np.testing.assert_allclose(dataset.normalization.std, pixels.std(), atol=1e-5)
    assert (
        load_dataset("digits", seed=1).val[0].tobytes() != dataset.val[0].tobytes()
        or (load_dataset("digits", seed=1).val.targets != dataset.val.targets).any()
    )


def test_a_split_takes_the_asked_share_of_every_class(rng: np.random.Generator) -> None:
    targets = np.repeat([0, 1, 2], [50, 10, 2]).astype(np.int64)
    rest, taken = stratified_split(targets, 0.2, rng)
    assert sorted([*rest, *taken]) == list(range(62))
    assert list(np.bincount(targets[taken])) == [10, 2, 1]


def test_a_folder_of_classes(tmp_path: Path) -> None:
    for seed, name in enumerate(("dog", "cat")):
        write_images(tmp_path / name, 10, seed=seed, suffix=(".png", ".jpg")[seed])
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val)) == (16, 4)
    assert dataset.train[0].shape == (12, 16, 3)
    memory = dataset.in_memory(8)
    assert memory.train[0].shape == (8, 8, 3)
    assert (memory.train.targets == dataset.train.targets).all()
    same = load_dataset(str(tmp_path))
    assert same.digest == dataset.digest
    assert (same.val.targets == dataset.val.targets).all()
    (tmp_path / "cat" / "0.jpg").unlink()
    assert load_dataset(str(tmp_path)).digest != dataset.digest


def test_a_folder_with_its_own_split(tmp_path: Path) -> None:
    for part, n in (("train", 6), ("val", 3)):
        for name in ("a", "b"):
            write_images(tmp_path / part / name, n)
    dataset = load_dataset(str(tmp_path), max_train=6)
    assert (len(dataset.train), len(dataset.val)) == (6, 6)
    write_images(tmp_path / "val" / "c", 1)
    with pytest.raises(InvalidInputError, match="must be in the training folder; received c"):
        load_dataset(str(tmp_path))


def test_damaged_files_are_named_and_left_out_below_a_limit(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_images(tmp_path / name, 40)
    (tmp_path / "a" / "broken.png").write_bytes(b"not a picture")
    whole = (tmp_path / "b" / "0.png").read_bytes()
    (tmp_path / "b" / "torn.png").write_bytes(whole[: len(whole) // 2])
    dataset = load_dataset(str(tmp_path))
    assert [Path(p).name for p in dataset.unreadable] == ["broken.png"]
    memory = dataset.in_memory(8)
    assert sorted(Path(p).name for p in memory.unreadable) == ["broken.png", "torn.png"]
    assert len(memory.train) + len(memory.val) == 80
    for i in range(6):
        (tmp_path / "a" / f"more{i}.jpg").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"at most 5%.*7 of"):
        load_dataset(str(tmp_path))


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path: Path, rng: np.random.Generator, compress: bool) -> None:
    images, targets = rng.integers(0, 256, (30, 6, 6), dtype=np.uint8), np.tile([0, 1, 2], 10).astype(np.uint8)
    for name, array in (("train-images-idx3-ubyte", images), ("train-labels-idx1-ubyte", targets)):
        data = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
        if compress:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (tmp_path / name).write_bytes(data)
    dataset = load_dataset(str(tmp_path))
    assert dataset.n_classes == 3
    assert len(dataset.val) == 6
    got = {dataset.train[i].tobytes() for i in range(len(dataset.train))}
    assert got < {x.tobytes() for x in images}


def test_unusable_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="path of a folder"):
        load_dataset(str(tmp_path / "nothing"))
    with pytest.raises(InvalidInputError, match="no image in"):
        load_dataset(str(tmp_path))
    write_images(tmp_path / "one", 5)
    with pytest.raises(InvalidInputError, match="at least two classes"):
        load_dataset(str(tmp_path))
    write_images(tmp_path / "two", 1)
    with pytest.raises(InvalidInputError, match="received two"):
        load_dataset(str(tmp_path))
    only = tmp_path / "only"
    write_images(only / "train" / "a", 3)
    with pytest.raises(InvalidInputError, match="both 'train' and 'val'"):
        load_dataset(str(only))


def test_fashion_mnist() -> None:
    from foxnas_mlflow.data._datasets import FASHION_MNIST

    if not FASHION_MNIST.is_dir():
        pytest.skip("Debian's dataset-fashion-mnist is not installed")
    dataset = load_dataset("fashion-mnist", max_train=1000)
    assert len(dataset.val) == 10_000
    assert (np.bincount(dataset.train.targets) == 100).all()
    assert dataset.labels[9] == "Ankle boot"
