"""The conformance suites: the project's own parts pass them, and seeded faults do not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.predictors import FORMULAS, Formula, get_formula, reference_predictors
from foxnas_mlflow.core.searchers import SEARCHERS, RandomSearch, Searcher
from foxnas_mlflow.core.searchers._base import GeneSpace, Recorder
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace
from foxnas_mlflow.testing import FormulaSuite, ModelKindSuite, SearcherSuite


class TestAnnealing(SearcherSuite):
    def searcher(self) -> Searcher:
        return SEARCHERS["annealing"]


class TestAnnealingUnguided(SearcherSuite):
    def searcher(self) -> Searcher:
        return SEARCHERS["annealing-unguided"]


class TestEvolution(SearcherSuite):
    def searcher(self) -> Searcher:
        return SEARCHERS["evolution"]


class TestRandom(SearcherSuite):
    def searcher(self) -> Searcher:
        return SEARCHERS["random"]


FAMILIES = sorted(key for key in FORMULAS if get_formula(*key).applies(FormulaSuite.space, 1))


@pytest.mark.parametrize("family", FAMILIES, ids="-".join)
class TestFormulas(FormulaSuite):
    @pytest.fixture(autouse=True)
    def _family(self, family: tuple[str, str]) -> None:
        self._name = family

    def formula(self) -> Formula:
        return get_formula(*self._name)


class TestPredictorsKind(ModelKindSuite):
    def model(self, directory: Path) -> Any:
        return reference_predictors("rpi4")

    def inputs(self) -> pd.DataFrame:
        drawn = CPU_SPACE.sample(np.random.default_rng(0), n=3, image_size=256)
        return pd.DataFrame({"architecture": [a.to_json() for a in drawn]})


class TestSubnetKind(ModelKindSuite):
    def model(self, directory: Path) -> Any:
        from foxnas_mlflow.flavor import SubnetModel

        return SubnetModel(CPU_SPACE.smallest(256), CPU_SPACE, {"predicted_accuracy": 70.0})

    def inputs(self) -> pd.DataFrame:
        return pd.DataFrame({"architecture": [CPU_SPACE.smallest(256).to_json()]})


class Spendthrift(RandomSearch):
    """Looks at networks that nobody counts."""

    name = "spendthrift"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        space.evaluate(space.sample(rng, 64))
        super().run(space, recorder, rng)


class Forgetful(RandomSearch):
    """Draws from the clock in place of its seed."""

    name = "forgetful"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        super().run(space, recorder, np.random.default_rng())


class Careless(RandomSearch):
    """Returns the largest network, whatever the limit."""

    name = "careless"

    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        super().run(space, recorder, rng)
        recorder.best = space.choices - 1


class Product(Formula):
    """Adds a column that multiplies the depths of all stages: no sum over stages."""

    name = "product"
    quantity = "accuracy"

    def __init__(self) -> None:
        self._base = get_formula("paper", "accuracy")

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return ("depths", *self._base.columns(space))

    def stage(self, *args: Any) -> Any:
        columns, values = self._base.stage(*args)
        return [column + 1 for column in columns], values

    def design(self, space: SearchSpace, architectures: Any) -> NDArray[np.float64]:
        design = super().design(space, architectures)
        design[:, 0] = [np.prod([len(stage.blocks) for stage in a.stages]) for a in architectures]
        return design


class Drifting(Formula):
    """A column that depends on how many networks are described at once."""

    name = "drifting"
    quantity = "accuracy"

    def columns(self, space: SearchSpace) -> tuple[str, ...]:
        return get_formula("paper", "accuracy").columns(space)

    def stage(self, *args: Any) -> Any:
        return get_formula("paper", "accuracy").stage(*args)

    def design(self, space: SearchSpace, architectures: Any) -> NDArray[np.float64]:
        design = super().design(space, architectures)
        design[:, 0] += len(architectures)
        return design


def searcher_suite(searcher: Searcher) -> SearcherSuite:
    suite = SearcherSuite()
    suite.searcher = lambda: searcher  # type: ignore[method-assign]
    return suite


def formula_suite(formula: Formula) -> FormulaSuite:
    suite = FormulaSuite()
    suite.formula = lambda: formula  # type: ignore[method-assign]
    return suite


@pytest.mark.parametrize(
    "test",
    [
        searcher_suite(Spendthrift()).test_keeps_its_budget,
        searcher_suite(Forgetful()).test_a_seed_finds_the_same_network_again,
        searcher_suite(Careless()).test_meets_the_limits,
        formula_suite(Product()).test_is_a_sum_over_stages,
        formula_suite(Drifting()).test_does_not_depend_on_its_neighbours_in_the_batch,
    ],
    ids=["budget", "seed", "limits", "sum", "neighbours"],
)
def test_a_seeded_fault_fails_its_suite(test: Callable[[], None]) -> None:
    with pytest.raises(AssertionError):
        test()


def test_a_model_whose_files_are_not_watched_fails_its_suite(tmp_path: Path) -> None:
    class Unwatched(TestSubnetKind):
        def _load(self, path: Path) -> Any:
            return Architecture.from_json((path / "data" / "architecture.json").read_text())

    with pytest.raises(pytest.fail.Exception):
        Unwatched().test_a_changed_byte_is_refused(tmp_path)
