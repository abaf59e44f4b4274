"""Decoded pictures are kept, found again by what they contain, bounded, and the same as without."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.data import FileImages, ImageDataset, ImageSet, Preprocessing, load_dataset
from foxnas_mlflow.data import _cache as cache
from foxnas_mlflow.data._look import look_at_all
from foxnas_mlflow.data._names import Names, Paths

image = pytest.importorskip("PIL.Image")

SIZES = (16, 24)
CROPPED = Preprocessing(16, crop=0.8, background=0)


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where pixels are kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(cache.CACHE_GIB, raising=False)
    # How full the disk of a test is, is not asked.
    monkeypatch.setattr(cache, "KEPT_FREE_BYTES", 0)
    return tmp_path / "cache" / "foxnas_mlflow" / "pixels"


def write_pictures(root: Path, n: int, *, size: int = 40, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    for name in ("cat", "dog"):
        (root / name).mkdir(parents=True)
        for i in range(n):
            low = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            picture = image.fromarray(low).resize((size + 10, size), 3)
            if i % 3 == 0:
                picture.save(root / name / f"{i}.png")
            elif i % 3 == 1:
                exif = image.Exif()
                exif[0x0112] = 6
                picture.save(root / name / f"{i}.jpg", exif=exif, quality=90)
            else:
                picture.resize((900, 700)).save(root / name / f"{i}.jpg", quality=80)
    return root


def kept(images: ImageSet) -> list[int]:
    assert isinstance(images, FileImages)
    return sorted(images.pixels)


def same_pixels(one: ImageDataset, other: ImageDataset, sizes: tuple[int, ...]) -> None:
    for a, b in ((one.train, other.train), (one.val, other.val)):
        assert (a.targets == b.targets).all()
        for i in range(len(a)):
            for size in sizes:
                np.testing.assert_array_equal(a.prepared(i, Preprocessing(size)), b.prepared(i, Preprocessing(size)))
            np.testing.assert_array_equal(a.prepared(i, CROPPED), b.prepared(i, CROPPED))


@pytest.mark.parametrize("n", [12, 40], ids=["here", "in processes"])
def test_pixels_are_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    data = write_pictures(tmp_path / "data", n)
    torn = data / "cat" / "torn.png"
    torn.write_bytes((data / "cat" / "0.png").read_bytes()[:-60])
    with_cache = load_dataset(str(data), sizes=SIZES, keep=True)
    assert kept(with_cache.train) == kept(with_cache.val) == list(SIZES)
    assert with_cache.unreadable == (str(torn),)
    monkeypatch.setenv(cache.CACHE_GIB, "0")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "none"))
    without = load_dataset(str(data), sizes=SIZES, keep=True)
    assert kept(without.train) == []
    assert without.digest == with_cache.digest
    assert without.normalization == with_cache.normalization
    assert without.unreadable == with_cache.unreadable
    # 20 px is no size of the cache.
    same_pixels(with_cache, without, (16, 20, 24))


def test_pictures_are_found_by_their_content(tmp_path: Path, place: Path) -> None:
    data = write_pictures(tmp_path / "data", 5)
    first = load_dataset(str(data), sizes=SIZES, keep=True)
    assert len(list(place.iterdir())) == 2
    written = {path: path.stat().st_mtime_ns for path in place.glob("*/pixels")}
    for source in (data, shutil.copytree(data, tmp_path / "copy")):
        for seed in (0, 1):
            again = load_dataset(str(source), sizes=SIZES, seed=seed)
            assert kept(again.train) == list(SIZES)
        same_pixels(first, load_dataset(str(source), sizes=SIZES), SIZES)
    assert {path: path.stat().st_mtime_ns for path in place.glob("*/pixels")} == written
    # The content counts, not the name, size or time of a file.
    path = data / "cat" / "0.png"
    path.write_bytes((data / "cat" / "3.png").read_bytes())
    assert kept(load_dataset(str(data), sizes=SIZES).train) == []
    changed = load_dataset(str(data), sizes=SIZES, keep=True)
    monkey = load_dataset(str(data))
    same_pixels(changed, monkey, SIZES)


def test_a_choice_of_the_images_is_kept_alone(tmp_path: Path, place: Path) -> None:
    data = write_pictures(tmp_path / "data", 20)
    chosen = load_dataset(str(data), max_train=10, max_val=4, sizes=(16,), keep=True)
    assert sum(path.stat().st_size for path in place.glob("*/pixels")) == 14 * 16 * 16 * 3
    again = load_dataset(str(data), max_train=10, max_val=4, sizes=(16,))
    assert kept(again.train) == [16]
    same_pixels(again, load_dataset(str(data), max_train=10, max_val=4), (16,))
    assert len(chosen.train) == 10


def test_a_file_that_breaks_later_is_still_known(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 5)
    dataset = load_dataset(str(data), sizes=(16,), keep=True)
    before = [dataset.train.prepared(i, Preprocessing(16)).copy() for i in range(len(dataset.train))]
    for path in data.rglob("*.*"):
        path.write_bytes(b"")
    for i, pixels in enumerate(before):
        np.testing.assert_array_equal(dataset.train.prepared(i, Preprocessing(16)), pixels)


CHILD = """
import sys
from foxnas_mlflow.data import load_dataset
print(sorted(load_dataset(sys.argv[1], sizes=(16, 24, 200), keep=True).train.pixels))
"""

WAITING = """
import time
from foxnas_mlflow.data import _cache
_cache._Making.finish = lambda *arguments: time.sleep(600)
"""


def child(data: Path) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(data)], stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(tmp_path: Path, place: Path) -> None:
    data = write_pictures(tmp_path / "data", 12)
    children = [child(data) for _ in range(2)]
    assert [process.communicate(timeout=120)[0] for process in children] == ["[16, 24, 200]\n"] * 2
    assert len(list(place.iterdir())) == 3
    same_pixels(load_dataset(str(data), sizes=SIZES), load_dataset(str(data)), (200,))


def test_a_killed_process_leaves_nothing_wrong(tmp_path: Path, place: Path) -> None:
    data = write_pictures(tmp_path / "data", 30)
    process = subprocess.Popen([sys.executable, "-c", WAITING + CHILD, str(data)], stdout=subprocess.PIPE, text=True)
    while not list(place.glob(".*/pixels")) and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert list(place.glob(".*/pixels"))
    dataset = load_dataset(str(data), sizes=SIZES, keep=True)
    assert kept(dataset.train) == list(SIZES)
    assert not list(place.glob(".*"))
    same_pixels(dataset, load_dataset(str(data)), SIZES)


def test_what_was_used_least_recently_goes_first(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sources = [write_pictures(tmp_path / str(k), 5, seed=k) for k in range(3)]
    one = 10 * 16 * 16 * 3
    monkeypatch.setenv(cache.CACHE_GIB, str(2.5 * one / 2**30))
    for k, source in enumerate((*sources[:2], sources[0])):
        load_dataset(str(source), sizes=(16,), keep=True)
        for directory in place.iterdir():
            os.utime(directory, ns=(k, directory.stat().st_mtime_ns - 10**9))
    load_dataset(str(sources[2]), sizes=(16,), keep=True)
    assert [bool(kept(load_dataset(str(source), sizes=(16,)).train)) for source in sources] == [True, False, True]
    # Larger than the whole cache: nothing is thrown away for it.
    with caplog.at_level(logging.WARNING, "foxnas_mlflow"):
        assert kept(load_dataset(str(sources[0]), sizes=(200,), keep=True).train) == []
    assert "10 decoded pictures are not kept: at 200 px they take 0.001 GiB" in caplog.text
    assert "decoded again whenever it is needed" in caplog.text
    assert len(list(place.iterdir())) == 2


def test_the_largest_size_alone_is_kept_where_all_are_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_pictures(tmp_path / "data", 5)
    monkeypatch.setenv(cache.CACHE_GIB, str(10 * 24 * 24 * 3 * 1.1 / 2**30))
    for _ in range(2):
        assert kept(load_dataset(str(data), sizes=SIZES, keep=True).train) == [24]


def test_a_full_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(cache, "KEPT_FREE_BYTES", 2**62)
    data = write_pictures(tmp_path / "data", 5)
    with caplog.at_level(logging.WARNING, "foxnas_mlflow"):
        dataset = load_dataset(str(data), sizes=SIZES, keep=True)
    assert kept(dataset.train) == []
    assert dataset.train.prepared(0, Preprocessing(16)).shape == (16, 16, 3)
    assert "decoded pictures are not kept" in caplog.text


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(cache.CACHE_GIB, text)
    with pytest.raises(
        InvalidInputError, match=f"FOXNAS_CACHE_GIB must be a number of GiB, 0 or more; received '{text}'"
    ):
        load_dataset(str(write_pictures(tmp_path / "data", 3)), sizes=(16,), keep=True)


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_huge_picture_is_left_out_without_words_of_pillow(
    n_processes: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    # Pillow warns from 89 million pixels on, and refuses twice as many.
    image.new("1", (10_000, 9_000)).save(tmp_path / "huge.png")
    image.new("1", (8, 8)).save(tmp_path / "small.png")
    n_small = 1 if n_processes == 1 else 80
    paths = [tmp_path / "huge.png", *[tmp_path / "small.png"] * n_small]
    facts = look_at_all(paths, n_processes=n_processes)
    assert facts["whole"].tolist() == [False, *[True] * n_small]
    assert capfd.readouterr().err == ""


def test_only_what_changed_is_looked_at_again(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 12)
    load_dataset(str(data))
    # Unreadable now, but known: neither size nor time of change tells.
    for path in (data / "cat").iterdir():
        stat = path.stat()
        path.write_bytes(b"x" * stat.st_size)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    image.new("RGB", (20, 20), "red").save(data / "dog" / "new.png")
    (data / "dog" / "bad.png").write_bytes(b"nothing")
    dataset = load_dataset(str(data))
    assert [Path(name).name for name in dataset.unreadable] == ["bad.png"]
    assert len(dataset.train) + len(dataset.val) == 25


def test_a_file_that_could_not_be_read_once_is_looked_at_again(tmp_path: Path) -> None:
    data = write_pictures(tmp_path / "data", 12)
    path = data / "cat" / "0.png"
    stat, whole = path.stat(), path.read_bytes()
    path.write_bytes(bytes(len(whole)))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert load_dataset(str(data)).unreadable == (str(path),)
    # Restored with its size and time of change, as rights are given back or a copy brings it.
    path.write_bytes(whole)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    dataset = load_dataset(str(data))
    assert dataset.unreadable == ()
    assert len(dataset.train) + len(dataset.val) == 24


def test_a_picture_that_brings_its_process_down_is_damaged(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(80)]
    for name in names:
        image.new("RGB", (20, 20), "red").save(tmp_path / name)
    # No picture has this path: what is sent cannot even be read.
    paths = Paths(tmp_path, Names([*names[:40], "bad\0name", *names[40:]]))
    facts = look_at_all(paths, n_processes=2)
    assert np.flatnonzero(~facts["whole"]).tolist() == [40]
