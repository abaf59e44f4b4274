"""Work that began with some pictures goes on with them after files were mended, broke or were removed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.data import FileImages, ImageDataset, Preprocessing, earlier_digests, load_dataset, prepared_batches

image = pytest.importorskip("PIL.Image")

N = 30


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> Path:
    """Two classes of 30 pictures, one of which is torn."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "pictures"
    for label in ("cat", "dog"):
        (root / label).mkdir(parents=True)
        for i in range(N):
            image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(root / label / f"{i:02}.png")
    whole = (root / "cat/07.png").read_bytes()
    (root / "cat/07.png").write_bytes(whole[:-30])
    (tmp_path / "whole.png").write_bytes(whole)
    return root


def names(images: object) -> list[str]:
    assert isinstance(images, FileImages)
    return [f"{path.parent.name}/{path.name}" for path in images.paths]


def mend(root: Path) -> None:
    (root / "cat/07.png").write_bytes((root.parent / "whole.png").read_bytes())


def same(one: ImageDataset, other: ImageDataset) -> bool:
    return (one.digest, one.normalization, names(one.train), names(one.val)) == (
        other.digest,
        other.normalization,
        names(other.train),
        names(other.val),
    )


def test_a_mended_file_is_left_out_of_what_began_without_it(folder: Path) -> None:
    begun = load_dataset(str(folder), keep=True)
    assert earlier_digests(str(folder), begun.digest) == []
    mend(folder)
    now = load_dataset(str(folder), keep=True)
    assert len(now.train) + len(now.val) == 2 * N
    assert now.digest != begun.digest
    assert earlier_digests(str(folder), now.digest) == [begun.digest]
    again = load_dataset(str(folder), digest=begun.digest)
    assert same(again, begun)
    assert "1 pictures that were damaged or not there when work on them began are left out" in again.warnings()


def remove(path: Path) -> None:
    path.unlink()


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


@pytest.mark.parametrize("harm", [remove, tear])
def test_what_broke_or_is_gone_is_skipped_and_all_others_keep_their_side(
    folder: Path, harm: Callable[[Path], None]
) -> None:
    begun = load_dataset(str(folder), keep=True)
    assert isinstance(begun.val, FileImages)
    lost = begun.val.paths[3]
    harm(lost)
    now = load_dataset(str(folder), keep=True)
    # Removing a whole file may be a user's wish: only who asks for the former set gets it.
    assert earlier_digests(str(folder), now.digest) == ([] if harm is remove else [begun.digest])
    again = load_dataset(str(folder), digest=begun.digest)
    assert same(again, begun)
    assert again.broken == (str(lost),)
    assert any(str(lost) in warning for warning in again.warnings())
    assert sum(len(targets) for _, targets in prepared_batches(again.val, Preprocessing(8))) == len(begun.val) - 1


def test_other_pictures_are_other_data(folder: Path) -> None:
    begun = load_dataset(str(folder), keep=True)
    for i in range(4):
        (folder / f"dog/{i:02}.png").unlink()
    assert load_dataset(str(folder), digest=begun.digest).digest != begun.digest
    assert load_dataset(str(folder), digest="0" * 64).digest != begun.digest


def test_a_list_with_groups_goes_on_too(folder: Path) -> None:
    rows = [f"pictures/{k}/{i:02}.png,{k},{i // 3}" for k in ("cat", "dog") for i in range(N)]
    path = folder.parent / "list.csv"
    path.write_text("\n".join(["file,label,group", *rows]))
    begun = load_dataset(str(path), keep=True)
    mend(folder)
    assert same(load_dataset(str(path), digest=begun.digest), begun)


def test_other_groups_or_classes_of_the_same_files_are_other_data(folder: Path) -> None:
    path = folder.parent / "list.csv"

    def written(cat: str = "cat", n_together: int = 3, n: int = N) -> ImageDataset:
        rows = [
            f"pictures/{k}/{i:02}.png,{cat if i % 2 else k},{i // n_together if n_together else ''}"
            for k in ("cat", "dog")
            for i in range(N - n, N)
        ]
        path.write_text("\n".join(["file,label,group", *rows]))
        return load_dataset(str(path), keep=True)

    alone, three, five, relabelled = written(n_together=0), written(), written(n_together=5), written(cat="dog")
    digests = [dataset.digest for dataset in (alone, three, five, relabelled)]
    assert len(set(digests)) == 4
    for begun in digests[:3]:
        assert earlier_digests(str(path), relabelled.digest) == []
        assert load_dataset(str(path), digest=begun).digest == relabelled.digest
    assert written(n_together=0).digest == alone.digest
    # Without the first group all others are what they were, under other numbers.
    pairs = written(n_together=1)
    written(n_together=1, n=N - 1)
    assert same(load_dataset(str(path), digest=pairs.digest), pairs)
