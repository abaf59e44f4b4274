"""What all heuristic searchers share: populations, budgets, traces.

A population is an array of genes. For each stage: the depth, then for each of `max_depth` blocks
an expansion ratio and a kernel size; the image size comes last. Genes of blocks beyond the depth
sleep: they have no effect.

| name      | shape                      | meaning                                            |
|-----------|----------------------------|----------------------------------------------------|
| ``genes`` | (n, n_genes)               | index of the chosen candidate of every parameter   |
| ``choices`` | (n_genes,)               | number of candidates of every parameter            |
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.errors import InfeasibleConstraintError, InvalidInputError
from foxnas_mlflow.core.options import IndexArray, KindArray, decode
from foxnas_mlflow.core.searchers._exact import fastest
from foxnas_mlflow.core.searchers._limited import least_loaded
from foxnas_mlflow.core.searchers._objective import FloatArray
from foxnas_mlflow.core.searchers._problem import Problem, Scored

Genes = NDArray[np.int16]


@dataclass(frozen=True)
class TracePoint:
    """A new best architecture.

    Attributes:
        evaluation: Evaluations spent when it was found, from 1.
        best_accuracy: Its predicted accuracy in percent.
        latency_ms: Its upper latency bound in ms.
        chain: The annealing chain that found it; 0 for searchers without chains.
    """

    evaluation: int
    best_accuracy: float
    latency_ms: float
    chain: int


@dataclass(frozen=True)
class SearchResult:
    """What a heuristic searcher found.

    Attributes:
        algorithm: Name of the searcher.
        architecture: The best architecture that meets the constraint.
        accuracy: Its predicted accuracy in percent.
        amounts: Every quantity of the objective: upper bounds of predicted ones, counts of the others.
        evaluations: Evaluations spent.
        seconds: Wall time.
        trace: Improvements in order.
        seed: Seed of the search.
    """

    algorithm: str
    architecture: Architecture
    accuracy: float
    amounts: Mapping[str, float]
    evaluations: int
    seconds: float
    trace: tuple[TracePoint, ...]
    seed: int

    @property
    def latency_upper_ms(self) -> float:
        """Its upper latency bound in ms."""
        return self.amounts["latency_ms"]


class GeneSpace:
    """The genes of a space and the image sizes searched."""

    def __init__(self, problem: Problem) -> None:
        objective = problem.objective
        space = objective.space
        self.problem, self.objective = problem, objective
        self.n_stages, self.max_depth = space.n_stages, space.max_depth
        per_stage = [len(space.depths)] + [len(space.expansions), len(space.kernels)] * space.max_depth
        self.choices = np.array(per_stage * space.n_stages + [len(objective.sizes)], dtype=np.int16)
        self.variable = np.flatnonzero(self.choices > 1)
        self._depths = np.array(space.depths, dtype=np.int16)
        self._n_kernels = len(space.kernels)
        # Codes of all blocks, sleeping ones too, are linear in the genes; what sleeps are their highest digits.
        weights = objective.options.weights
        of_stage = np.concatenate([[0], np.column_stack([self._n_kernels * weights, weights]).ravel()])
        self._codes = np.vstack([np.kron(np.eye(space.n_stages), of_stage[:, None]), np.zeros((1, space.n_stages))])
        self._code_base = float(weights.sum())
        self._awake = (len(space.kinds) + 1) ** self._depths.astype(np.int64)

    @property
    def n_genes(self) -> int:
        """Number of parameters, sleeping ones included."""
        return len(self.choices)

    def sample(self, rng: np.random.Generator, n: int) -> Genes:
        """Draw n individuals, every parameter uniform."""
        return (rng.random((n, self.n_genes)) * self.choices).astype(np.int16)

    def active(self, genes: Genes) -> NDArray[np.bool_]:
        """Whether each parameter of individuals has an effect: shape (n, n_genes)."""
        stages = genes[:, :-1].reshape(len(genes), self.n_stages, -1)
        depth = self._depths[stages[:, :, :1]]
        block = np.concatenate([[0], np.repeat(np.arange(self.max_depth), 2)])
        return np.hstack([(block < depth).reshape(len(genes), -1), np.ones((len(genes), 1), dtype=bool)])

    def settle(self, genes: Genes) -> Genes:
        """Let sleeping blocks copy the stage's last block, which is what a deeper stage starts from."""
        settled = genes.copy()
        stages = settled[:, :-1].reshape(len(genes), self.n_stages, -1)
        depth = self._depths[stages[:, :, 0]]
        for i in range(1, self.max_depth):
            asleep = (i >= depth)[:, :, None]
            block = stages[:, :, 1 + 2 * i : 3 + 2 * i]
            block[:] = np.where(asleep, stages[:, :, 2 * i - 1 : 2 * i + 1], block)
        return settled

    def kinds(self, genes: Genes) -> KindArray:
        """Blocks of individuals: shape (n, n_stages, max_depth), -1 beyond the depth."""
        stages = genes[:, :-1].reshape(len(genes), self.n_stages, -1)
        depth = self._depths[stages[:, :, 0]]
        kinds = stages[:, :, 1::2] * self._n_kernels + stages[:, :, 2::2]
        return np.where(np.arange(self.max_depth) < depth[:, :, None], kinds, -1).astype(np.int16)

    def index(self, genes: Genes) -> IndexArray:
        """Stage options of individuals, shape (n, n_stages)."""
        codes = (genes.astype(np.float64) @ self._codes + self._code_base).astype(np.int64)
        depths = genes[:, : -1 : 1 + 2 * self.max_depth]
        rows: IndexArray = self.objective.options.rows[codes % self._awake[depths]]
        return rows

    def evaluate(self, genes: Genes) -> Scored:
        """What individuals are worth."""
        return self.problem.evaluate(genes[:, -1], self.index(genes))

    def architecture(self, genes: Genes) -> Architecture:
        """The architecture of one individual, shape (n_genes,)."""
        size = self.objective.image_sizes[int(genes[-1])]
        return decode(self.objective.space, size, self.kinds(genes[None])[0])

    def genes(self, size: int, index: IndexArray) -> Genes:
        """The individual of an image size's position and stage options; its sleeping parameters are 0."""
        kinds = self.objective.options.kinds[index].astype(np.int16)
        stages = np.zeros((self.n_stages, 1 + 2 * self.max_depth), dtype=np.int16)
        stages[:, 0] = np.searchsorted(self._depths, (kinds >= 0).sum(axis=1))
        stages[:, 1::2], stages[:, 2::2] = np.divmod(np.maximum(kinds, 0), self._n_kernels)
        return np.append(stages.ravel(), size).astype(np.int16)


@dataclass
class Recorder:
    """Counts evaluations against a budget and keeps the best individual that meets the limits.

    `n_chains` is the number of chains whose individuals take turns in a batch.
    """

    space: GeneSpace
    budget: int
    n_chains: int = 1
    evaluations: int = 0
    best: Genes | None = None
    best_score: float = -np.inf
    best_accuracy: float = -np.inf
    best_amounts: FloatArray = field(default_factory=lambda: np.zeros(0))
    trace: list[TracePoint] = field(default_factory=list)

    @property
    def left(self) -> int:
        """Evaluations left."""
        return self.budget - self.evaluations

    def evaluate(self, genes: Genes) -> FloatArray:
        """Scores of individuals, -inf where a limit is not met, shape (n,)."""
        return _scores(self.ask(genes))

    def ask(self, genes: Genes) -> Scored:
        """What individuals are worth; all that is asked about counts."""
        found = self.space.evaluate(genes)
        scores = _scores(found)
        if scores.max() > self.best_score:
            # Walk the batch in order, so that the trace says which evaluation improved.
            running = np.maximum.accumulate(np.maximum(scores, self.best_score))
            previous = np.concatenate([[self.best_score], running[:-1]])
            for i in map(int, np.flatnonzero(running > previous)):
                accuracy, latency = float(found.accuracy[i]), float(found.amounts[i, 0])
                self.trace.append(TracePoint(self.evaluations + i + 1, accuracy, latency, i % self.n_chains))
            top = int(np.argmax(scores))
            self.best = genes[top].copy()
            self.best_score, self.best_accuracy = float(scores[top]), float(found.accuracy[top])
            self.best_amounts = found.amounts[top]
        self.evaluations += len(genes)
        return found

    def feasible_start(self, rng: np.random.Generator, genes: Genes) -> tuple[Genes, FloatArray]:
        """Individuals moved towards one that meets the limits, at random, until they meet them too.

        Raises:
            InfeasibleConstraintError: If no network meets the limits.
        """
        refuge = self.space.genes(*_refuge(self.space.problem))
        genes = genes.copy()
        # The first is the refuge, or the best so far: a budget of one evaluation finds something.
        genes[0] = refuge if self.best is None else self.best
        scores = self.evaluate(genes)
        for _ in range(64):
            bad = np.flatnonzero(np.isneginf(scores))
            if not len(bad) or self.left < len(bad):
                break
            shrink = rng.random((len(bad), self.space.n_genes)) < 0.25
            genes[bad] = np.where(shrink, refuge, genes[bad])
            scores[bad] = self.evaluate(genes[bad])
        stuck = np.isneginf(scores)
        genes[stuck], scores[stuck] = genes[0], scores[0]
        return genes, scores


def _scores(found: Scored) -> FloatArray:
    return np.where(found.meets, found.score, -np.inf)


def _refuge(problem: Problem) -> tuple[int, IndexArray]:
    """Size and stage options of a network that meets the limits: under one latency the fastest."""
    if not problem.only_latency:
        return least_loaded(problem)
    limit = problem.limits[0].value
    quickest = fastest(problem.objective)
    if quickest.amount > limit:
        raise InfeasibleConstraintError(limit, quickest.amount)
    return quickest.size, quickest.index


class Searcher(ABC):
    """A heuristic searcher: run it with a budget and a seed.

    Attributes:
        name: Name in traces, tables and tags.

    Examples:
        >>> from foxnas_mlflow import Searcher, get_searcher
        >>> isinstance(get_searcher("evolution"), Searcher)
        True
    """

    name: str

    @abstractmethod
    def run(self, space: GeneSpace, recorder: Recorder, rng: np.random.Generator) -> None:
        """Spend the recorder's budget; the recorder keeps the best."""

    def search(self, problem: Problem, *, evaluations: int, seed: int = 0) -> SearchResult:
        """Search under limits.

        Args:
            problem: The goal and the limits.
            evaluations: Budget, a positive number of evaluations.
            seed: Seed of all randomness: the same seed finds the same network.

        Raises:
            InfeasibleConstraintError: If no architecture meets the limits.
        """
        if evaluations < 1:
            raise InvalidInputError("evaluations must be a positive integer", received=evaluations)
        start = time.perf_counter()
        space = GeneSpace(problem)
        recorder = Recorder(space, evaluations)
        self.run(space, recorder, np.random.default_rng(seed))
        if recorder.best is None:
            raise AssertionError("unreachable: a searcher starts from a network that meets the limits")
        return SearchResult(
            algorithm=self.name,
            architecture=space.architecture(recorder.best),
            accuracy=recorder.best_accuracy,
            amounts=dict(zip(problem.objective.quantities, map(float, recorder.best_amounts), strict=True)),
            evaluations=recorder.evaluations,
            seconds=time.perf_counter() - start,
            trace=tuple(recorder.trace),
            seed=seed,
        )
