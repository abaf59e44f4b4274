"""Listings of pictures: which files they name, and what those belong to."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.data import FileImages, earlier_digests, load_dataset
from foxnas_mlflow.data._listings import ListedPart, keep_listing, open_listing
from tests.data.test_datasets import write_images


def part(names: list[str], targets: list[int], groups: list[int] | None = None) -> ListedPart:
    n = len(names)
    whole = np.ones(n, np.bool_)
    return ListedPart(
        names, np.ones(n, np.int64), whole, np.array(targets), None if groups is None else np.array(groups)
    )


def test_files_belong_together_whatever_their_groups_are_numbered() -> None:
    ours = part(["a", "b", "c"], [0, 1, 1], [5, 5, 7])
    assert ours.belongs_as(part(["c", "b"], [1, 1], [2, 1]))
    assert not ours.belongs_as(part(["a", "b"], [0, 1], [1, 2]))
    assert not ours.belongs_as(part(["a", "b"], [0, 0], [1, 1]))
    assert not ours.belongs_as(part(["a", "b"], [0, 1]))


def test_a_file_that_is_named_twice_belongs_to_both_classes() -> None:
    twice = part(["a", "a", "b"], [0, 1, 1])
    assert twice.belongs_as(twice)
    assert not twice.belongs_as(part(["a", "a", "b"], [1, 0, 1]))
    assert twice.belongs_as(part(["a"], [0]))


def test_what_became_of_pictures_since_is_told_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    for seed, name in enumerate(("cat", "dog")):
        write_images(root / name, 30, seed=seed)
    begun = load_dataset(str(root), keep=True)
    write_images(tmp_path / "other", 1, size=20)
    gone, replaced = root / "cat/3.png", root / "dog/4.png"
    gone.unlink()
    (tmp_path / "other/0.png").rename(replaced)
    (root / "dog/new.png").write_bytes((root / "dog/5.png").read_bytes())
    now = load_dataset(str(root), digest=begun.digest)
    assert now.notes == (
        f"1 pictures of when work on them began are not whole any more and are skipped: {gone}",
        f"1 pictures were replaced since work on them began, and are used as they are now: {replaced}",
        "1 pictures that were damaged or not there when work on them began are left out",
    )
    assert now.broken == (str(gone),)
    assert isinstance(now.train, FileImages)
    (shown,) = (now.train[i] for i, path in enumerate(now.train.paths) if path == replaced)
    assert shown.shape == (20, 24, 3)


@pytest.fixture
def bitmaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures without compression: of one size in bytes."""
    from PIL import Image

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for i in range(40):
            image = Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8))
            image.save(tmp_path / "pictures" / name / f"{i}.bmp")
    return tmp_path / "pictures"


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    assert len(first) == len(second)
    one.write_bytes(second)
    other.write_bytes(first)


def test_exchanged_pictures_of_one_size_make_another_set(bitmaps: Path) -> None:
    begun = load_dataset(str(bitmaps), keep=True)
    assert load_dataset(str(bitmaps)).digest == begun.digest
    exchange(bitmaps / "cat/3.bmp", bitmaps / "dog/3.bmp")
    now = load_dataset(str(bitmaps), keep=True)
    assert now.digest != begun.digest
    # What was exchanged is not what was mended.
    assert earlier_digests(str(bitmaps), now.digest) == []
    gone_on_with = load_dataset(str(bitmaps), digest=begun.digest)
    assert gone_on_with.digest == begun.digest
    assert "2 pictures were replaced" in gone_on_with.notes[0]


def test_a_set_keeps_the_digest_that_a_release_before_gave_it(bitmaps: Path) -> None:
    names = sorted(path.relative_to(bitmaps).as_posix() for path in bitmaps.rglob("*.bmp"))
    size = (bitmaps / "cat/0.bmp").stat().st_size
    before = hashlib.sha256("".join(f"{name}:{size}\n" for name in names).encode()).hexdigest()
    now = load_dataset(str(bitmaps), keep=True)
    assert now.digest != before
    # On a host without that release's listing too.
    assert now.earlier_digest == before
    assert load_dataset(str(bitmaps), max_train=6).earlier_digest == before
    # The listing of that release had no contents.
    listing = open_listing(bitmaps, now.digest)
    assert listing is not None
    parts = {name: dataclasses.replace(part, contents=None) for name, part in listing.parts.items()}
    keep_listing(bitmaps, before, dataclasses.replace(listing, parts=parts))
    assert earlier_digests(str(bitmaps), now.digest) == [before]
    assert load_dataset(str(bitmaps), digest=before).digest == before
    (bitmaps / "cat/3.bmp").unlink()
    gone_on_with = load_dataset(str(bitmaps), digest=before)
    assert gone_on_with.digest == before
    assert "1 pictures of when work on them began are not whole any more" in gone_on_with.notes[0]
