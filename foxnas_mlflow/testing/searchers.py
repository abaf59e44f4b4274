"""What every searcher must do, whatever its method."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.cost import network_cost
from foxnas_mlflow.core.errors import InfeasibleConstraintError, InvalidInputError
from foxnas_mlflow.core.network import build_network
from foxnas_mlflow.core.options import IndexArray
from foxnas_mlflow.core.predictors import PredictorSet, reference_predictors
from foxnas_mlflow.core.searchers import Problem, Searcher, pose, solve
from foxnas_mlflow.core.searchers._problem import Scored

BUDGETS = (1, 7, 100, 3000)
CONFIDENCE = 0.9


@dataclass(frozen=True)
class CountingProblem(Problem):
    """A problem that counts what it is asked, whoever asks."""

    asked: list[int] = field(default_factory=list)

    def evaluate(self, size_index: NDArray[np.integer], index: IndexArray) -> Scored:
        """As of `Problem`."""
        self.asked.append(len(index))
        return super().evaluate(size_index, index)


class SearcherSuite:
    """Tests of a `Searcher`; a subclass says which."""

    limits = ("latency_ms<=60", "latency_ms<=90, params<=4.5e6, peak_activation_bytes<=1.2e6")
    """Limits to search under, on the packaged predictors of ``rpi4``."""

    def searcher(self) -> Searcher:
        """A new searcher.

        Raises:
            NotImplementedError: If the subclass does not say which.
        """
        raise NotImplementedError

    def predictors(self) -> PredictorSet:
        """What is searched on."""
        return reference_predictors("rpi4")

    def problem(self, limits: str) -> CountingProblem:
        """A problem at a confidence of 0.9."""
        posed = pose(self.predictors(), limits=limits, confidence=CONFIDENCE)
        return CountingProblem(posed.objective, posed.limits, posed.goal, posed.min_accuracy)

    def _amounts(self, architecture: Architecture) -> dict[str, float]:
        predictors = self.predictors()
        cost = network_cost(build_network(predictors.space, architecture))
        return {
            "latency_ms": predictors.latency_bound_ms(architecture, CONFIDENCE),
            "params": cost.params,
            "peak_activation_bytes": cost.peak_activation_bytes,
        }

    def test_has_a_name(self) -> None:
        """It is named in traces, tables and tags."""
        assert self.searcher().name.strip()

    def test_meets_the_limits(self) -> None:
        """What it returns belongs to the space, and meets every limit by the predictors and counts themselves."""
        for limits in self.limits:
            problem = self.problem(limits)
            found = self.searcher().search(problem, evaluations=2000, seed=3)
            problem.objective.space.validate(found.architecture)
            amounts = self._amounts(found.architecture)
            for limit in problem.limits:
                assert amounts[limit.quantity] <= limit.value * (1 + 1e-9)
                np.testing.assert_allclose(found.amounts[limit.quantity], amounts[limit.quantity])

    def test_says_the_accuracy_that_is_predicted(self) -> None:
        """The accuracy in the result is that of the network in the result."""
        found = self.searcher().search(self.problem(self.limits[0]), evaluations=500, seed=1)
        size = found.architecture.image_size
        (accuracy,) = self.predictors().of("accuracy", size).predict([found.architecture])
        np.testing.assert_allclose(found.accuracy, accuracy)

    def test_keeps_its_budget(self) -> None:
        """It asks about no more networks than it may, counted where they are asked about."""
        for budget in BUDGETS:
            problem = self.problem(self.limits[0])
            found = self.searcher().search(problem, evaluations=budget, seed=2)
            assert sum(problem.asked) <= budget
            assert found.evaluations == sum(problem.asked)

    def test_is_never_better_than_the_exact_optimum(self) -> None:
        """Nothing beats the proven optimum."""
        for limits in self.limits:
            problem = self.problem(limits)
            found = self.searcher().search(problem, evaluations=3000, seed=4)
            assert found.accuracy <= solve(problem).accuracy_bound + 1e-9

    def test_a_seed_finds_the_same_network_again(self) -> None:
        """The same seed gives the same network, trace and count."""
        first, again = (
            self.searcher().search(self.problem(self.limits[0]), evaluations=1500, seed=5) for _ in range(2)
        )
        assert (first.architecture, first.trace, first.evaluations) == (
            again.architecture,
            again.trace,
            again.evaluations,
        )

    def test_its_trace_ends_with_what_it_returns(self) -> None:
        """The trace rises, within the budget, to the result."""
        found = self.searcher().search(self.problem(self.limits[0]), evaluations=1500, seed=6)
        evaluations = [point.evaluation for point in found.trace]
        accuracies = [point.best_accuracy for point in found.trace]
        assert evaluations == sorted(set(evaluations))
        assert accuracies == sorted(set(accuracies))
        assert evaluations[0] >= 1
        assert evaluations[-1] <= found.evaluations
        assert accuracies[-1] == found.accuracy

    def test_refuses_what_nothing_meets(self) -> None:
        """A limit below what is reachable is an error that names what can be reached."""
        with pytest.raises(InfeasibleConstraintError, match="smallest reachable"):
            self.searcher().search(self.problem("latency_ms<=1"), evaluations=100)

    def test_refuses_a_budget_of_nothing(self) -> None:
        """A budget is positive."""
        with pytest.raises(InvalidInputError, match="evaluations"):
            self.searcher().search(self.problem(self.limits[0]), evaluations=0)
