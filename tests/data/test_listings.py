"""Listings of pictures: which files they name, and what those belong to."""

from __future__ import annotations

import numpy as np

from foxnas_mlflow.data._listings import ListedPart


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
