"""What a classifier's answers are worth, class by class; NumPy only.

| symbol | in code    | shape                  | what                                              |
|--------|------------|------------------------|---------------------------------------------------|
| n_kl   | ``counts`` | (n_classes, n_classes) | images of class k (row) that were answered l      |
| r_k    | recall     | (n_classes,)           | share of class k's images that were answered k    |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

TEST_ACCURACY, TEST_IMAGES = "accuracy/test_int8_top1", "accuracy/test_n_images"
"""Metrics: top-1 in percent of the int8 file on held-out images, and their number."""


def confusion(truth: NDArray[np.integer[Any]], predicted: NDArray[Any], n_classes: int) -> NDArray[np.int64]:
    """Counts (n_classes, n_classes): rows are the right classes, columns the predicted ones."""
    counts = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(counts, (truth, predicted), 1)
    return counts


def balanced_percent(counts: NDArray[np.int64]) -> float:
    """Mean recall over the classes that have images, in percent: every class weighs the same."""
    images = counts.sum(axis=1)
    seen = images > 0
    return 100 * float(np.mean(np.diag(counts)[seen] / images[seen]))


def majority_percent(counts: NDArray[np.int64]) -> float:
    """Top-1 in percent of always answering the most frequent class."""
    return 100 * float(counts.sum(axis=1).max() / counts.sum())


def class_table(counts: NDArray[np.int64], names: Sequence[str]) -> list[dict[str, Any]]:
    """One row a class: images, recall, precision, F1 (percent; none where undefined), most frequent mistake."""
    rows = []
    for k, name in enumerate(names):
        images, predicted, right = int(counts[k].sum()), int(counts[:, k].sum()), int(counts[k, k])
        mistakes = counts[k].copy()
        mistakes[k] = 0
        rows.append(
            {
                "label": name,
                "images": images,
                "recall": 100 * right / images if images else None,
                "precision": 100 * right / predicted if predicted else None,
                "f1": 200 * right / (images + predicted) if images + predicted else None,
                "taken_for": names[int(mistakes.argmax())] if mistakes.any() else "",
            }
        )
    return rows


def worst_classes(counts: NDArray[np.int64], names: Sequence[str], n: int = 3) -> str:
    """The classes with the least recall, for people; empty where every image is answered right."""
    images, right, rows = counts.sum(axis=1), np.diag(counts), class_table(counts, names)
    worst = sorted(map(int, np.flatnonzero(right < images)), key=lambda k: (right[k] / images[k], names[k]))
    return ", ".join(
        f"{names[k]} {images[k] - right[k]:,} of {images[k]:,} wrong (taken for {rows[k]['taken_for']})"
        for k in worst[:n]
    )


def no_better_than_majority(counts: NDArray[np.int64], names: Sequence[str]) -> str:
    """What to say of a classifier that beats the most frequent class by no more than chance may; else empty.

    Chance is one standard error of its top-1.
    """
    n = int(counts.sum())
    share = float(np.trace(counts)) / n
    majority = majority_percent(counts)
    if 100 * (share - np.sqrt(share * (1 - share) / n)) > majority:
        return ""
    name = names[int(counts.sum(axis=1).argmax())]
    return (
        f"{100 * share:.2f} % top-1 is no better than always answering {name!r}: "
        f"{majority:.2f} % of the images are of that class"
    )


def held_out(metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """A row for people: what the int8 file answers to images by which nothing was chosen; none where there are none."""
    if TEST_ACCURACY not in metrics:
        return []
    return [("int8 top-1, held-out test", f"{metrics[TEST_ACCURACY]:.2f} % of {metrics[TEST_IMAGES]:,.0f} images")]
