"""What is searched for: a goal under limits, on the quantities of an `Objective`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.options import IndexArray
from foxnas_mlflow.core.searchers._limits import Limit, describe_limits
from foxnas_mlflow.core.searchers._objective import FloatArray, Objective

POINTS_OF_LOG = 3.0
"""Points of accuracy that a network e times as costly has more, about: brings all goals to one scale, so that what
anneals accuracies anneals other goals too."""


@dataclass(frozen=True)
class Scored:
    """What a population is worth.

    Attributes:
        score: What is to be largest, shape (n,): accuracy in percent, or `POINTS_OF_LOG` times -log of the
            quantity that is to be least.
        accuracy: Predicted accuracy in percent, shape (n,).
        amounts: The objective's quantities, shape (n, n_quantities).
        meets: Whether all limits are met, shape (n,).
    """

    score: FloatArray
    accuracy: FloatArray
    amounts: FloatArray
    meets: NDArray[np.bool_]


@dataclass(frozen=True)
class Problem:
    """A goal under limits.

    Attributes:
        objective: Accuracy and the quantities.
        limits: Each on a quantity of the objective.
        goal: ``accuracy``, to be largest, or a quantity of the objective, to be least as predicted.
        min_accuracy: Least predicted accuracy in percent, or None.

    Raises:
        InvalidInputError: If the goal is no quantity of the objective, or least of a quantity is asked for
            without a least accuracy.

    Examples:
        >>> from foxnas_mlflow import pose, reference_predictors
        >>> [limit.quantity for limit in pose(reference_predictors("rpi4"), 60, limits="macs<=3e8").limits]
        ['latency_ms', 'macs']
    """

    objective: Objective
    limits: tuple[Limit, ...]
    goal: str = "accuracy"
    min_accuracy: float | None = None

    def __post_init__(self) -> None:
        if self.goal != "accuracy" and self.min_accuracy is None:
            raise InvalidInputError(
                f"the least of {self.goal} is asked for at an accuracy", remedy="give min_accuracy in percent"
            )
        if not self.limits and self.min_accuracy is None:
            raise InvalidInputError("a search needs a limit", remedy="give latency_ms, limits, or min_accuracy")
        for quantity in (*(limit.quantity for limit in self.limits), self.goal):
            if quantity != "accuracy" and quantity not in self.objective.quantities:
                raise InvalidInputError(
                    f"a problem is on the quantities of its objective, {list(self.objective.quantities)}",
                    received=quantity,
                )

    @property
    def room(self) -> FloatArray:
        """The most of each of the objective's quantities, infinite without a limit, shape (n_quantities,)."""
        given = {limit.quantity: limit.value for limit in self.limits}
        return np.array([given.get(quantity, np.inf) for quantity in self.objective.quantities])

    @property
    def only_latency(self) -> bool:
        """Whether it is the paper's problem: the most accurate network under one latency."""
        return (
            self.goal == "accuracy"
            and self.min_accuracy is None
            and tuple(limit.quantity for limit in self.limits) == ("latency_ms",)
        )

    def allows(self, architecture: Architecture) -> bool:
        """Whether a network of the objective's sizes meets all limits but that on latency, which a device judges."""
        amounts = self.objective.amounts(architecture)
        return all(amounts[limit.quantity] <= limit.value for limit in self.limits if limit.quantity != "latency_ms")

    def stands_in(self, architecture: Architecture, other: Architecture) -> bool:
        """Whether a network answers in place of another one, given that it is no worse as measured.

        Latency and accuracy are measured; it must be of the objective's sizes, be allowed, and have no more of any
        other quantity that is to be least.
        """
        if architecture.image_size not in self.objective.image_sizes or not self.allows(architecture):
            return False
        if self.goal in ("accuracy", "latency_ms"):
            return True
        return self.objective.amounts(architecture)[self.goal] <= self.objective.amounts(other)[self.goal]

    def __str__(self) -> str:
        wanted = "most accurate" if self.goal == "accuracy" else f"least {self.goal}"
        least = "" if self.min_accuracy is None else f", accuracy >= {self.min_accuracy:g}"
        return f"{wanted} under {describe_limits(self.limits)}{least}"

    def evaluate(self, size_index: NDArray[np.integer], index: IndexArray) -> Scored:
        """Evaluate a population.

        Args:
            size_index: Index into the objective's sizes, shape (n,).
            index: Stage options, shape (n, n_stages).
        """
        objective = self.objective
        accuracy, score = np.empty(len(index)), np.empty(len(index))
        amounts = np.empty((len(index), len(objective.quantities)))
        for i, size in enumerate(objective.sizes):
            rows = np.flatnonzero(size_index == i)
            if len(rows):
                z, amounts[rows] = size.evaluate(index[rows])
                accuracy[rows] = size.accuracy.from_linear(z)
                if self.goal != "accuracy":
                    score[rows] = -POINTS_OF_LOG * np.log(np.maximum(size.point(self.goal, index[rows]), 1e-300))
        meets: NDArray[np.bool_] = np.asarray((amounts <= self.room).all(axis=1))
        if self.min_accuracy is not None:
            meets &= accuracy >= self.min_accuracy
        return Scored(accuracy if self.goal == "accuracy" else score, accuracy, amounts, meets)
