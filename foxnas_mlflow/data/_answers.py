"""Right and wrong answers of classifiers: the one place where top-1 is counted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.classification import balanced_percent, confusion
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
        scores: What the network gave for each class, shape (n_images, n_classes).
        targets: Index of the right class of each image, shape (n_images,).
    """

    top1_percent: float
    standard_error: float
    n_images: int
    correct: NDArray[np.bool_] = field(compare=False)
    scores: NDArray[Any] = field(compare=False, repr=False)
    targets: NDArray[np.int64] = field(compare=False, repr=False)

    @classmethod
    def of(cls, scores: NDArray[Any], targets: NDArray[np.integer]) -> Evaluation:
        """From the scores (n, n_classes) and the right class (n,) of n images."""
        correct = scores.argmax(axis=1) == targets
        share = int(correct.sum()) / len(correct)
        error = 100 * math.sqrt(share * (1 - share) / len(correct))
        return cls(100 * share, error, len(correct), correct, scores, targets.astype(np.int64))

    @property
    def counts(self) -> NDArray[np.int64]:
        """Images by right (row) and predicted class, shape (n_classes, n_classes)."""
        return confusion(self.targets, self.scores.argmax(axis=1), self.scores.shape[1])

    @property
    def balanced_percent(self) -> float:
        """Mean of the classes' accuracies in percent."""
        return balanced_percent(self.counts)


def packed(correct: NDArray[np.bool_]) -> str:
    """Right and wrong answers as text: a bit an image, in hex."""
    return np.packbits(correct).tobytes().hex()


def unpacked(text: str, n_images: int) -> NDArray[np.bool_]:
    """The answers (n_images,) that were `packed`."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n_images).astype(bool)


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
    given: list[list[NDArray[Any]]] = [[] for _ in networks]
    truth: list[NDArray[np.integer]] = []
    for images, targets in batches:
        truth.append(targets)
        for answers, scores in zip(given, networks, strict=True):
            answers.append(scores(images))
    if not truth:
        raise InvalidInputError("there must be at least one image to evaluate on")
    right = np.concatenate(truth)
    return [Evaluation.of(np.concatenate(answers), right) for answers in given]
