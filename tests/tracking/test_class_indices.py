"""What labels of an evaluation mean."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.tracking.evaluator import class_indices

DIGITS = [str(i) for i in range(10)]
MONTHS = [f"{i:03d}" for i in range(1, 13)]


@pytest.mark.parametrize(
    ("labels", "names", "expected"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (np.array([1, 0]), ["cat", "dog"], [1, 0]),
        (np.array([7, 0]), DIGITS, [7, 0]),
        (["7", "0"], DIGITS, [7, 0]),
        (["001", "012"], MONTHS, [0, 11]),
    ],
)
def test_names_and_indices(labels: Any, names: list[str], expected: list[int]) -> None:
    assert class_indices(labels, names).tolist() == expected


@pytest.mark.parametrize("labels", [np.arange(1, 13), np.arange(12), [1]])
@pytest.mark.parametrize("names", [MONTHS, [str(i) for i in range(1, 13)]])
def test_numbers_that_may_be_names_or_indices_are_refused(labels: Any, names: list[str]) -> None:
    with pytest.raises(InvalidInputError, match="named by other numbers than their indices"):
        class_indices(labels, names)
