"""Figures by class: closed forms on counts that can be checked by hand."""

from __future__ import annotations

import numpy as np
import pytest

from foxnas_mlflow.core.classification import (
    balanced_percent,
    confusion,
    majority_percent,
    no_better_than_majority,
    worst_classes,
)

NAMES = ("cat", "dog", "owl")


def test_a_rare_class_weighs_as_much_as_a_frequent_one() -> None:
    truth = np.repeat([0, 1, 2], [90, 8, 2])
    counts = confusion(truth, np.where(truth == 2, 0, truth), 3)
    assert np.trace(counts) == 98
    assert balanced_percent(counts) == pytest.approx(100 * 2 / 3)
    assert majority_percent(counts) == 90
    assert worst_classes(counts, NAMES) == "owl 2 of 2 wrong (taken for cat)"
    assert no_better_than_majority(counts, NAMES) == ""


def test_one_mistake_among_many_is_told_as_one() -> None:
    counts = np.array([[1999, 1, 0], [2, 8, 0], [0, 0, 9]])
    assert worst_classes(counts, NAMES) == "dog 2 of 10 wrong (taken for cat), cat 1 of 2,000 wrong (taken for dog)"
    assert worst_classes(np.diag([3, 0, 2]), NAMES) == ""


def test_classes_without_images_do_not_count() -> None:
    counts = confusion(np.array([0, 0, 1, 1]), np.array([0, 0, 1, 0]), 3)
    assert balanced_percent(counts) == 75


def test_always_the_same_answer_is_called_what_it_is() -> None:
    truth = np.repeat([0, 1, 2], [20, 60, 20])
    said = no_better_than_majority(confusion(truth, np.ones(100, np.int64), 3), NAMES)
    assert said == "60.00 % top-1 is no better than always answering 'dog': 60.00 % of the images are of that class"
    # Four images more are within one standard error, ten are not.
    answers = np.ones(100, np.int64)
    answers[:4] = 0
    assert no_better_than_majority(confusion(truth, answers, 3), NAMES)
    answers[:10] = 0
    assert not no_better_than_majority(confusion(truth, answers, 3), NAMES)
