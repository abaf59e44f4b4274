"""Right and wrong answers of classifiers: the one place where top-1 is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import InvalidInputError

_Images = TypeVar("_Images")


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Accuracy of a network on validation images.

    Attributes:
        top1_percent: Share of images whose most probable class is right, in percent.
        standard_error: How far that share may lie from the one of all images of this kind, in
            percentage points: one standard error of a share.
        n_images: Number of validation images.
        correct: Whether each of them was answered right, in their order, shape (n_images,).
    """

    top1_percent: float
    standard_error: float
    n_images: int
    correct: NDArray[np.bool_] = field(compare=False)

    @classmethod
    def of(cls, correct: NDArray[np.bool_]) -> Evaluation:
        """From right and wrong answers."""
        share = int(correct.sum()) / len(correct)
        return cls(100 * share, 100 * math.sqrt(share * (1 - share) / len(correct)), len(correct), correct)


def evaluate(
    batches: Iterable[tuple[_Images, NDArray[np.integer]]], *networks: Callable[[_Images], NDArray[Any]]
) -> list[Evaluation]:
    """Let networks answer the same images, each batch read once.

    Args:
        batches: Images as the networks take them, and the index of the class of each.
        *networks: Images of a batch to scores (n, n_classes).

    Returns:
        One evaluation a network.

    Raises:
        InvalidInputError: If there are no images.
    """
    correct: list[list[NDArray[np.bool_]]] = [[] for _ in networks]
    for images, targets in batches:
        for answers, scores in zip(correct, networks, strict=True):
            answers.append(scores(images).argmax(axis=1) == targets)
    if not all(correct):
        raise InvalidInputError("there must be at least one image to evaluate on")
    return [Evaluation.of(np.concatenate(answers)) for answers in correct]
