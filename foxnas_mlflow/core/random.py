"""Where random numbers come from: one named stream for each purpose, so that no two of them draw the same numbers.

A seed says which experiment it is, a stream what the numbers are for, and further numbers which one of many (an
epoch, a step, a repeat). They reach NumPy as a spawn key and not as a list of seeds: a list is filled up with zeros,
so that the streams ``[seed, 2]`` and ``[seed, 2, 0]`` would be one. Where images are chosen and a supernet trains
(`listed_stream`, and the order and variation of batches) seeds are such lists still, so that the same command draws
what it always drew: an epoch may have the numbers of another purpose.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")


@enum.unique
class Stream(enum.IntEnum):
    """What random numbers are for. Numbers are never used again: a new purpose takes the next free one."""

    VALIDATION_SPLIT = 0  # which training images become validation images
    IMAGE_LIMIT = 1  # which images are kept where a limit is given
    EVALUATION_IMAGES = 2  # images for batch norm's statistics and for evaluations
    TRAINED_SUBNETS = 3  # subnets of a training step
    SHOWN_SUBNETS = 4  # subnets that are evaluated while a supernet trains
    QUANTIZATION_IMAGES = 5  # images that int8 ranges are measured on
    # 6, 7, 12, 13 and 14 were purposes of earlier releases.
    DESIGN_CANDIDATES = 8  # subnets among which a design chooses
    PROBES = 9  # random probes of a calibration
    CHECKS = 10  # networks that a calibration is held against
    FOLDS = 11  # folds of a cross-validation
    GLYPHS = 15  # letters, colours and clutter of the drawn data set
    POSSIBLE_ROWS = 16  # networks that show which columns of a formula a space tells apart


def stream(seed: int, purpose: Stream, *numbers: int) -> np.random.Generator:
    """The random numbers of a purpose.

    Args:
        seed: Seed of the experiment, 0 or more.
        purpose: What they are for.
        numbers: Which one of many, each 0 or more: an epoch, a step, a repeat.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(int(purpose), *numbers)))


def listed_stream(seed: int, purpose: Stream, *numbers: int) -> np.random.Generator:
    """As `stream`, from a list of seeds: purposes 0 to 5 alone, which always drew so."""
    return np.random.default_rng([seed, int(purpose), *numbers])


def pick(rng: np.random.Generator, values: Sequence[T]) -> T:
    """One of some values: what ``rng.choice(values)`` draws, without the array that it makes of them first."""
    return values[int(rng.integers(len(values)))]
