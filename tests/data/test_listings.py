"""Listings of pictures: which files they name, and what those belong to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from foxnas_mlflow.data import FileImages, load_dataset
from foxnas_mlflow.data._listings import ListedPart
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
