"""D-optimal designs against brute force, and against random samples."""

from __future__ import annotations

import numpy as np
import pytest

from foxnas_mlflow.core.design import choose_samples, d_optimal
from foxnas_mlflow.core.errors import InvalidInputError
from foxnas_mlflow.core.predictors._formulas import get_formula
from foxnas_mlflow.core.space import CPU_SPACE, StageSpec

FORMULAS = [get_formula("calibrated", "accuracy"), get_formula("calibrated", "latency_ms")]


def test_each_row_is_the_one_that_raises_the_determinant_most(rng: np.random.Generator) -> None:
    x = rng.normal(size=(30, 4)) * [1.0, 100.0, 1e-3, 1e6]
    added = d_optimal(x, 9)
    assert len(set(added)) == 9
    scaled = x / np.sqrt(np.mean(x**2, axis=0))

    def determinant(rows: list[int]) -> float:
        return float(np.linalg.det(scaled[rows].T @ scaled[rows]))

    for i in range(4, 9):
        rest = [j for j in range(30) if j not in added[:i]]
        assert added[i] == max(rest, key=lambda j: determinant([*added[:i], j]))


def test_rows_that_are_there_are_counted_and_not_taken_again(rng: np.random.Generator) -> None:
    x = rng.normal(size=(20, 3))
    first = d_optimal(x, 5)
    assert d_optimal(x, 5) + d_optimal(x, 4, chosen=first) == d_optimal(x, 9)


@pytest.mark.parametrize("n", [60, 100])
def test_a_design_knows_predictions_better_than_random_samples(n: int) -> None:
    (accuracy, _) = FORMULAS
    test = accuracy.design(CPU_SPACE, CPU_SPACE.sample(np.random.default_rng(9), n=300))

    def worst_variance(method: str, seed: int) -> float:
        rows = choose_samples(CPU_SPACE, FORMULAS, n, method=method, image_sizes=[192], seed=seed)
        x = accuracy.design(CPU_SPACE, rows)
        return float(np.max(np.einsum("ij,jk,ik->i", test, np.linalg.pinv(x.T @ x), test)))

    designed = [worst_variance("design", seed) for seed in range(3)]
    drawn = [worst_variance("random", seed) for seed in range(3)]
    assert max(designed) < 0.6 * min(drawn)


def test_samples_are_distinct_new_and_repeatable() -> None:
    first = choose_samples(CPU_SPACE, FORMULAS, 20, image_sizes=[160, 192], n_candidates=300)
    assert first == choose_samples(CPU_SPACE, FORMULAS, 20, image_sizes=[160, 192], n_candidates=300)
    assert {a.image_size for a in first} == {160, 192}
    more = choose_samples(CPU_SPACE, FORMULAS, 20, image_sizes=[160, 192], n_candidates=300, measured=first)
    assert len({*first, *more}) == 40


def test_a_design_of_more_subnets_than_it_usually_chooses_among_has_candidates_enough() -> None:
    space = CPU_SPACE.replace(stages=CPU_SPACE.stages[:2])
    samples = choose_samples(space, [get_formula("paper", "latency_ms")], 60, n_candidates=30, image_sizes=[192])
    assert len(set(samples)) == 60


def test_a_space_with_fewer_subnets_is_refused() -> None:
    tiny = CPU_SPACE.replace(
        image_sizes=(32,), kernels=(3,), expansions=(2, 4), depths=(1,), stages=(StageSpec(24, 2, "mbconv"),)
    )
    both = choose_samples(tiny, FORMULAS, 2)
    assert len(set(both)) == 2
    for known, other in (both, both[::-1]):
        assert choose_samples(tiny, FORMULAS, 1, measured=[known], method="random") == [other]
    for n in (0, 3):
        with pytest.raises(InvalidInputError):
            choose_samples(tiny, FORMULAS, n)
