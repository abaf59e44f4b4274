"""Data sets: built-in ones, folders, IDX files, and what is wrong with them."""

from __future__ import annotations

import gzip
import itertools
import logging
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import (
    Preprocessing,
    choose_by_class,
    images_digest,
    load_dataset,
    packed,
    prepared_batches,
    unpacked,
)
from foxnas_mlflow.data._datasets import grouped_split, stratified_split

image = pytest.importorskip("PIL.Image")


def test_answers_are_kept_as_one_bit_an_image() -> None:
    correct = np.array([True, False, True, True, False, False, False, True, True])
    # Files of earlier releases have it so.
    assert packed(correct) == "b180"
    np.testing.assert_array_equal(unpacked("b180", 9), correct)


def write_images(folder: Path, n: int, *, seed: int = 0, suffix: str = ".png", size: int = 12) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(n):
        image.fromarray(rng.integers(0, 256, (size, size + 4, 3), dtype=np.uint8)).save(folder / f"{i}{suffix}")


def test_digits_are_those_of_scikit_learn() -> None:
    sklearn = pytest.importorskip("sklearn.datasets")
    bunch = sklearn.load_digits()
    dataset = load_dataset("digits")
    images = np.concatenate([np.stack([part[i] for i in range(len(part))]) for part in (dataset.train, dataset.val)])
    theirs = np.round(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
    targets = np.concatenate([dataset.train.targets, dataset.val.targets])
    # In another order.
    ours = sorted((image.tobytes(), target) for image, target in zip(images, targets, strict=True))
    assert ours == sorted((image.tobytes(), target) for image, target in zip(theirs, bunch.target, strict=True))


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


@pytest.mark.parametrize(
    ("sizes", "limit", "counts"),
    [
        ([40, 1], 20, [19, 1]),
        ([50, 10, 2], 31, [25, 5, 1]),
        ([11, 11], 11, [5, 6]),
        ([4] * 1000, 200, [0] * 800 + [1] * 200),
        ([3, 2, 1], 1, [0, 0, 1]),
    ],
)
def test_a_choice_has_every_class_and_no_more_than_asked_for(
    sizes: list[int], limit: int, counts: list[int], rng: np.random.Generator
) -> None:
    targets = np.repeat(np.arange(len(sizes)), sizes)
    chosen = choose_by_class(targets, limit, rng)
    assert len(set(chosen.tolist())) == len(chosen)
    assert sorted(np.bincount(targets[chosen], minlength=len(sizes))) == sorted(counts)


def test_a_limit_leaves_rare_classes(tmp_path: Path) -> None:
    for n, name in ((50, "cat"), (2, "dog")):
        write_images(tmp_path / name, n, size=4)
    few = load_dataset(str(tmp_path), max_train=20, max_val=5)
    assert (np.bincount(few.train.targets).tolist(), np.bincount(few.val.targets).tolist()) == ([19, 1], [4, 1])
    with pytest.raises(InvalidInputError, match=r"an image of every class.*max_train=1 for 2 classes"):
        load_dataset(str(tmp_path), max_train=1)


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
    # Also the one that only shows when it is decoded, and before anything is trained.
    assert sorted(Path(p).name for p in dataset.unreadable) == ["broken.png", "torn.png"]
    memory = dataset.in_memory(8)
    assert sorted(Path(p).name for p in memory.unreadable) == ["broken.png", "torn.png"]
    assert len(memory.train) + len(memory.val) == 80
    for i in range(6):
        (tmp_path / "a" / f"more{i}.jpg").write_bytes(b"")
    with pytest.raises(InvalidInputError, match=r"at most 5%.*8 of"):
        load_dataset(str(tmp_path))


def write_idx(folder: Path, part: str, images: np.ndarray, targets: np.ndarray, *, compress: bool = False) -> None:
    for name, array in ((f"{part}-images-idx3-ubyte", images), (f"{part}-labels-idx1-ubyte", targets)):
        data = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
        data += array.astype(np.uint8).tobytes()
        (folder / f"{name}{'.gz' if compress else ''}").write_bytes(gzip.compress(data) if compress else data)


@pytest.mark.parametrize("compress", [True, False])
def test_idx_files(tmp_path: Path, rng: np.random.Generator, compress: bool) -> None:
    images = rng.integers(0, 256, (30, 6, 6), dtype=np.uint8)
    write_idx(tmp_path, "train", images, np.tile([0, 1, 2], 10), compress=compress)
    dataset = load_dataset(str(tmp_path))
    assert dataset.n_classes == 3
    assert len(dataset.val) == 6
    got = {dataset.train[i].tobytes() for i in range(len(dataset.train))}
    assert got < {x.tobytes() for x in images}
    assert not dataset.notes


def test_idx_labels_that_begin_with_one_are_classes(tmp_path: Path, rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (30, 6, 6), dtype=np.uint8), np.tile([1, 2, 26], 10)
    write_idx(tmp_path, "train", images, labels)
    write_idx(tmp_path, "t10k", images[:3], labels[:3])
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("1", "2", "26")
    assert dataset.train.targets.tolist() == [0, 1, 2] * 10
    assert dataset.val.targets.tolist() == [0, 1, 2]
    assert dataset.notes == (
        "t10k is validated on, as there is no val: networks are chosen by it, and no images are held out",
    )
    write_idx(tmp_path, "t10k", images[:3], np.array([1, 2, 3]))
    with pytest.raises(InvalidInputError, match="must be in the training files; received class 3 in"):
        load_dataset(str(tmp_path))


def test_idx_files_of_emnist_go_by_its_names_one_set_a_folder(tmp_path: Path, rng: np.random.Generator) -> None:
    images, labels = rng.integers(0, 256, (30, 6, 6)), np.tile([1, 2], 15)
    write_idx(tmp_path, "emnist-letters-train", images, labels, compress=True)
    write_idx(tmp_path, "emnist-letters-test", images[:4], labels[:4], compress=True)
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.val), list(dataset.labels)) == (30, 4, ["1", "2"])
    write_idx(tmp_path, "emnist-digits-train", images, labels, compress=True)
    with pytest.raises(InvalidInputError, match="must hold one data set; received emnist-digits"):
        load_dataset(str(tmp_path))


def test_an_idx_file_is_known_by_what_it_begins_with(tmp_path: Path, rng: np.random.Generator) -> None:
    write_idx(tmp_path, "train", rng.integers(0, 256, (30, 6, 6)), np.tile([0, 1], 15), compress=True)
    images, labels = tmp_path / "train-images-idx3-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.decompress(labels.read_bytes()))
    assert load_dataset(str(tmp_path)).n_classes == 2
    packed = bytearray(images.read_bytes())
    packed[len(packed) // 2 :] = b"\xff" * (len(packed) - len(packed) // 2)
    images.write_bytes(packed)
    with pytest.raises(InvalidInputError, match=r"must be readable; received train-images-idx3-ubyte\.gz"):
        load_dataset(str(tmp_path))


def test_an_archive_that_is_damaged_spoils_no_folder_of_pictures(tmp_path: Path) -> None:
    write_classes(tmp_path, 4)
    (tmp_path / "backup.gz").write_bytes(gzip.compress(b"")[:10] + b"\xff" * 20)
    assert load_dataset(str(tmp_path)).labels == ("cat", "dog")


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


def write_classes(root: Path, n: int, *, seed: int = 0) -> None:
    for k, name in enumerate(("cat", "dog")):
        write_images(root / name, n, seed=seed + k)


@pytest.mark.parametrize(
    ("train", "val"), [("training", "validation"), ("Train", "Test"), ("TRAIN_images", "val_images"), ("train", "dev")]
)
def test_a_split_under_any_usual_name(tmp_path: Path, train: str, val: str) -> None:
    write_classes(tmp_path / train, 6)
    write_classes(tmp_path / val, 2, seed=9)
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val), dataset.test) == (12, 4, None)


def test_a_third_part_is_held_out_and_one_wrapping_folder_is_opened(tmp_path: Path) -> None:
    for n, part in ((6, "train"), (3, "val"), (2, "test")):
        write_classes(tmp_path / "archive" / part, n, seed=n)
    dataset = load_dataset(str(tmp_path))
    assert dataset.test is not None
    assert (len(dataset.train), len(dataset.val), len(dataset.test)) == (12, 6, 4)
    assert dataset.labels == ("cat", "dog")


def test_a_part_without_class_folders_is_not_used_and_said(tmp_path: Path) -> None:
    data = tmp_path / "imgs"
    write_classes(data / "train", 15)
    write_images(data / "test", 5, seed=7)
    unused = "test is not used: it has no class folders of a part"
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val), dataset.test) == (24, 6, None)
    assert dataset.warnings() == [unused]
    write_classes(data / "val", 5, seed=9)
    dataset = load_dataset(str(tmp_path))
    assert (len(dataset.train), len(dataset.val), dataset.test) == (30, 10, None)
    assert dataset.warnings() == [unused]
    # Pictures of which nothing tells the classes.
    write_images(tmp_path / "flat" / "train", 5)
    write_images(tmp_path / "flat" / "test", 5)
    with pytest.raises(InvalidInputError, match=r"'train' and 'val', with one folder a class in each; received \["):
        load_dataset(str(tmp_path / "flat"))


def test_parts_behind_a_common_prefix_in_folders_of_their_own_names(tmp_path: Path) -> None:
    write_classes(tmp_path / "seg_train" / "seg_train", 12)
    write_classes(tmp_path / "seg_test" / "seg_test", 3, seed=5)
    write_images(tmp_path / "seg_pred" / "seg_pred", 5, seed=9)
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("cat", "dog")
    assert (len(dataset.train), len(dataset.val)) == (24, 6)
    assert dataset.warnings() == [
        "seg_pred is not used: it has no class folders of a part",
        "seg_test is validated on, as there is no val: networks are chosen by it, and no images are held out",
    ]


def test_classes_that_may_be_parts_are_named(tmp_path: Path) -> None:
    write_classes(tmp_path / "north", 12)
    write_classes(tmp_path / "south", 12, seed=5)
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("north", "south")
    assert dataset.warnings() == [
        "north, south are read as classes, and have the same folders inside: if they are parts of a split, name them "
        "train and val"
    ]
    (tmp_path / "north").rename(tmp_path / "train")
    (tmp_path / "south" / "dog").rename(tmp_path / "south" / "wolf")
    dataset = load_dataset(str(tmp_path))
    assert dataset.labels == ("south", "train")
    assert dataset.warnings() == ["train is read as a class, like all folders beside it"]


def test_junk_and_class_maps_are_no_pictures(tmp_path: Path) -> None:
    write_classes(tmp_path, 12)
    before = load_dataset(str(tmp_path)).digest
    (tmp_path / "class_to_idx.json").write_text("{}")
    (tmp_path / "idx.txt").write_text("cat dog")
    picture = (tmp_path / "cat" / "0.png").read_bytes()
    for place in (".ipynb_checkpoints", "@eaDir/x.jpg"):
        (tmp_path / "cat" / place).mkdir(parents=True)
        (tmp_path / "cat" / place / "THUMB.png").write_bytes(picture)
    (tmp_path / "__MACOSX" / "cat").mkdir(parents=True)
    (tmp_path / "dog" / "._0.png").write_bytes(b"\0")
    dataset = load_dataset(str(tmp_path))
    assert dataset.digest == before
    assert dataset.unreadable == ()
    assert dataset.warnings() == []
    (tmp_path / "dog" / "notes.psd").write_bytes(b"8BPS")
    assert "files that are not read: 1 .psd" in load_dataset(str(tmp_path)).warnings()


def test_all_formats_are_trained_on(tmp_path: Path) -> None:
    write_images(tmp_path / "a", 3, suffix=".jpg")
    write_images(tmp_path / "b", 3, suffix=".webp")
    write_images(tmp_path / "b" / "more", 4, seed=4, suffix=".JPEG")
    dataset = load_dataset(str(tmp_path))
    assert np.bincount(np.concatenate([dataset.train.targets, dataset.val.targets])).tolist() == [3, 7]


def test_a_class_of_two_is_enough_and_rare_classes_are_named(tmp_path: Path) -> None:
    write_images(tmp_path / "many", 50)
    write_images(tmp_path / "two", 2, seed=1)
    dataset = load_dataset(str(tmp_path))
    assert np.bincount(dataset.val.targets).tolist() == [10, 1]
    assert dataset.warnings() == [
        "classes are unbalanced: 40 training images of many, 1 of two",
        "classes with fewer than 10 training images: two (1)",
    ]


def test_a_removed_broken_file_leaves_the_same_data(tmp_path: Path) -> None:
    write_classes(tmp_path, 30)
    whole = load_dataset(str(tmp_path))
    torn = tmp_path / "cat" / "torn.png"
    torn.write_bytes((tmp_path / "cat" / "1.png").read_bytes()[:-40])
    assert load_dataset(str(tmp_path)).digest == whole.digest
    torn.unlink()
    assert load_dataset(str(tmp_path)).digest == whole.digest


@pytest.mark.parametrize("suffix", [".csv", ".jsonl"])
def test_a_list_of_pictures(tmp_path: Path, suffix: str) -> None:
    import json

    write_images(tmp_path / "all", 12)
    rows = [{"file": f"all/{i}.png", "label": "ab"[i % 2], "split": ("train", "Test")[i > 7]} for i in range(12)]
    path = tmp_path / f"list{suffix}"
    if suffix == ".csv":
        lines = ["\ufefffile,label,split", *(",".join(row.values()) for row in rows)]
    else:
        lines = [json.dumps(row) for row in rows]
    path.write_text("\r\n".join(lines), encoding="utf-8")
    dataset = load_dataset(str(path))
    assert dataset.labels == ("a", "b")
    assert (len(dataset.train), len(dataset.val)) == (8, 4)
    assert "test is validated on, as there is no val" in " ".join(dataset.notes)
    path.write_text(lines[0].replace("label", "other") + "\n" + lines[1].replace("label", "other"), encoding="utf-8")
    columns = r"received line . of list.*, whose columns are file, other, split"
    with pytest.raises(InvalidInputError, match=f"needs a 'file' and a 'label'; {columns}"):
        load_dataset(str(path))


def test_a_list_as_programs_of_some_countries_and_people_write_it(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 12)
    labels = ("ape", "ape ", " bee", "bee", "Bee", "bee")
    lines = [f"all/{i}.png;{labels[i % 6]}" for i in range(12)]
    (tmp_path / "list.csv").write_text("\n".join(["file;label", *lines]), encoding="utf-8")
    dataset = load_dataset(str(tmp_path / "list.csv"))
    # As they are written: digests of lists, and so supernets that were trained on them, know classes by that.
    assert dataset.labels == (" bee", "Bee", "ape", "ape ", "bee")
    for names in ("' bee', 'Bee', 'bee'", "'ape', 'ape '"):
        assert f"classes whose names differ by case or spaces alone: {names}" in dataset.warnings()


def test_images_are_known_by_their_contents_and_classes(tmp_path: Path) -> None:
    for seed, place in enumerate(("train/ape", "train/bee", "val/ape", "val/bee")):
        write_images(tmp_path / place, 40, seed=seed)

    def now(**options: Any) -> tuple[str, str]:
        dataset = load_dataset(str(tmp_path), **options)
        return dataset.digest, images_digest(dataset.val)

    first = now()
    # The training images may change, and names.
    write_images(tmp_path / "train" / "ape" / "more", 1, seed=4)
    (tmp_path / "val/ape/0.png").rename(tmp_path / "val/ape/99.png")
    assert now()[0] != first[0]
    assert now()[1] == first[1]
    chosen = [now(max_val=10, seed=seed) for seed in (0, 0, 1)]
    assert len({digest for _, digest in chosen} | {first[1]}) == 3
    # A picture whose class is another one.
    (tmp_path / "val/ape/99.png").rename(tmp_path / "val/bee/99.png")
    assert now()[1] != first[1]
    dataset = load_dataset(str(tmp_path))
    (tmp_path / "val/bee/99.png").write_bytes(b"broken")
    for _ in prepared_batches(dataset.val, dataset.preprocessing(8)):
        pass
    without = images_digest(dataset.val)
    (tmp_path / "val/bee/99.png").unlink()
    assert without == now()[1]
    digits = [load_dataset("digits", seed=seed) for seed in (0, 0, 1)]
    assert len({images_digest(each.val) for each in digits}) == 2


def test_a_class_whose_name_cannot_be_written_is_refused(tmp_path: Path) -> None:
    for name in (b"caf\xe9", b"tea"):
        write_images(tmp_path / os.fsdecode(name), 4)
    with pytest.raises(InvalidInputError, match=r"must be UTF-8; received 'caf\\udce9'; rename it") as caught:
        load_dataset(str(tmp_path))
    str(caught.value).encode()


@pytest.mark.parametrize(
    ("text", "received"),
    [
        ('[{"file": "all/0.png", "label": "a"}, {"file": "all/1.png", "label": "b"}]', "in line 1 of list.jsonl"),
        ('{"file": "all/0.png", "label": "a"}\n\n"all/1.png"', "in line 3 of list.jsonl"),
    ],
)
def test_a_line_of_a_list_that_is_no_object_is_refused_by_its_number(text: str, received: str, tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text(text)
    with pytest.raises(InvalidInputError, match=f"every line of a list is one JSON object; received .* {received}"):
        load_dataset(str(tmp_path / "list.jsonl"))


def test_a_list_with_other_labels_is_other_data(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 12)
    path = tmp_path / "list.csv"
    digests = set()
    for labels in ("ab", "ab", "ba"):
        path.write_text("file,label\n" + "".join(f"all/{i}.png,{labels[i % 2]}\n" for i in range(12)), encoding="utf-8")
        digests.add(load_dataset(str(path)).digest)
    assert len(digests) == 2


def photo(seed: int) -> Any:
    """A picture with large shapes, as photos have them."""
    low = np.random.default_rng(seed).integers(0, 256, (7, 9, 3), dtype=np.uint8)
    return image.fromarray(low).resize((90, 70), 3)


def test_pictures_that_are_there_twice_are_named(tmp_path: Path) -> None:
    import shutil

    for seed, (part, name) in enumerate(itertools.product(("train", "val"), ("cat", "dog"))):
        folder = tmp_path / part / name
        folder.mkdir(parents=True)
        for i in range(12):
            photo(100 * seed + i).save(folder / f"{i}.png")
    assert load_dataset(str(tmp_path)).warnings() == []
    shutil.copy(tmp_path / "train/cat/1.png", tmp_path / "train/dog/copy.png")
    shutil.copy(tmp_path / "train/cat/2.png", tmp_path / "val/cat/copy.png")
    # The same photo, smaller and compressed.
    photo(3).resize((60, 50)).save(tmp_path / "val/cat/near.jpg", quality=80)
    photo(104).save(tmp_path / "train/cat/near.jpg", quality=70)
    # A picture of one colour looks like any other of one colour.
    image.new("RGB", (50, 50), "white").save(tmp_path / "train/cat/white.png")
    image.new("RGB", (50, 50), "black").save(tmp_path / "val/dog/black.png")
    assert load_dataset(str(tmp_path)).warnings() == [
        "identical pictures of different classes: 1 (train/cat/1.png = train/dog/copy.png)",
        "identical pictures in both training and validation images: 1 (train/cat/2.png = val/cat/copy.png)",
        "nearly identical pictures of different classes: 1 (train/cat/near.jpg = train/dog/4.png)",
        "nearly identical pictures in both training and validation images: 1 (train/cat/3.png = val/cat/near.jpg)",
    ]


def test_of_many_nearly_identical_pictures_some_of_every_kind_are_compared_and_said(tmp_path: Path) -> None:
    # A film of 20 frames in two classes, and one picture of another that is in both parts.
    for k, name in enumerate(("cat", "dog", "eel")):
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            photo(10 + k).save(tmp_path / part / name / "own.png")
        (tmp_path / "val" / name / "own.png").unlink()
        photo(20 + k).save(tmp_path / "val" / name / "own.png")
    for name in ("cat", "dog"):
        for i in range(20):
            photo(7).save(tmp_path / "train" / name / f"{i}.jpg", quality=(60 if name == "cat" else 75) + i // 2)
    photo(12).save(tmp_path / "val/eel/again.jpg", quality=80)
    classes, parts = [text for text in load_dataset(str(tmp_path)).warnings() if text.startswith("nearly")]
    many = r"at least \d+, of [34]\d\d pairs that may be 200 were compared \(train/cat/0\.jpg = .*, \.\.\.\)"
    assert re.fullmatch(f"nearly identical pictures of different classes: {many}", classes)
    assert parts.startswith("nearly identical pictures in both training and validation images: at least 1, of ")
    assert parts.endswith(" (train/eel/own.png = val/eel/again.jpg)")


def test_a_group_stays_on_one_side_of_a_split(rng: np.random.Generator) -> None:
    groups = rng.integers(0, 80, 1000)
    targets = (groups % 3 + (rng.random(1000) < 0.1)) % 3
    rest, taken = grouped_split(targets, groups, 0.2, rng)
    assert sorted([*rest, *taken]) == list(range(1000))
    assert not set(groups[rest]) & set(groups[taken])
    np.testing.assert_allclose(np.bincount(targets[taken]) / np.bincount(targets), 0.2, atol=0.07)
    # Groups of one are a split by class.
    alone = grouped_split(targets, np.arange(1000), 0.2, rng)[1]
    np.testing.assert_allclose(np.bincount(targets[alone]) / np.bincount(targets), 0.2, atol=0.01)


def test_a_list_with_groups(tmp_path: Path) -> None:
    write_images(tmp_path / "all", 40)
    path = tmp_path / "list.csv"

    def write(row: Callable[[int], str], header: str = "file,label,group") -> None:
        path.write_text("\n".join([header, *(f"all/{i}.png,{'ab'[i % 2]},{row(i)}" for i in range(40))]))

    write(lambda i: f"person{i // 4}")
    dataset = load_dataset(str(path))
    sides = [{int(p.stem) // 4 for p in images.paths} for images in (dataset.train, dataset.val)]  # type: ignore[attr-defined]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == 2
    write(lambda i: f"person{i % 2}")
    with pytest.raises(InvalidInputError, match=r"images in two groups or more.*received a"):
        load_dataset(str(path))
    write(lambda i: "" if i == 7 else "one")
    with pytest.raises(InvalidInputError, match="every line of a list has a group, or none has"):
        load_dataset(str(path))
    write(lambda i: f"p{i // 10},{'train' if i < 25 else 'val'}", "file,label,group,split")
    assert "groups in both train and val images: 1 (p2)" in load_dataset(str(path)).warnings()


@pytest.mark.train
def test_a_file_that_breaks_later_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("torch")
    from foxnas_mlflow.supernet import Batches

    write_classes(tmp_path, 20)
    dataset = load_dataset(str(tmp_path))
    batches = Batches(
        dataset.train,
        normalization=dataset.normalization,
        image_size=8,
        batch_size=8,
        flip=False,
        augment=False,
    )
    broken = dataset.train.paths[3], dataset.val.paths[1]  # type: ignore[attr-defined]
    for path in broken:
        path.write_bytes(b"torn")
    with caplog.at_level(logging.WARNING, "foxnas_mlflow"):
        for epoch in range(2):
            assert sum(len(targets) for _, targets in batches.epoch(epoch)) == 31
            assert sum(len(targets) for _, targets in prepared_batches(dataset.val, Preprocessing(8))) == 7
    # Each is named once, in the data set and in words.
    assert dataset.broken == tuple(sorted(map(str, broken)))
    assert caplog.messages == [f"1 pictures cannot be read any more and are skipped: {path}" for path in broken]
