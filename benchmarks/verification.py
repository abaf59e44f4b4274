"""Choosing under noise, on a simulated truth: is the chosen network beaten, and how many evaluations does it need?

    python benchmarks/verification.py [--searches 200] [--first-seed 1000] [--candidates 3] [--rounds 2]
        [--images 50000] [--workers 2]

The truth is the packaged model of the CPU space at 256 px and, for each network, a misfit of its own (sd 0.15 points of
accuracy, 0.4 % of latency). Evaluations are answers to the same images: a network answers an image right when a latent
ease, four fifths of whose variance all networks share, is below its true accuracy's quantile. With 50,000 images the
part of that noise that networks do not share is 0.13 points, and the residuals of a fit have a standard deviation of
0.2 points, as in the authors' table (0.187). Latencies are measured within 0.3 %.

`one-shot` fits predictors to rows of random networks, as the paper does, and takes the optimum under a random limit.
`loop` fits to fewer rows, chosen by a D-optimal design, looks at candidates along the front, refits with them and
searches again, as `main` does; its evaluations are all networks that were evaluated, looked-at ones too. `auto` and
`strict` are its choices within one standard error and with a tolerance of 0. A gap is to the best network of the model
without misfit. A choice is beaten when another looked-at network is truly more accurate and truly faster.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import numpy as np
from scipy.special import ndtri

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.design import choose_samples
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import PredictorSet, fit_formula, get_formula, reference_predictors
from foxnas_mlflow.core.searchers import (
    Evaluated,
    Objective,
    RandomSearch,
    SearchOutcome,
    Verdict,
    choose,
    closed_loop,
    exact_optimum,
    search,
    verify,
)

SIZE = 256
MISFIT_POINTS, MISFIT_LATENCY, TIMING_ERROR, SHARED = 0.15, 0.004, 0.003, 0.8
ONE_SHOT = (60, 90, 120, 180, 240)
LOOP = (55, 65)
FORMULAS = tuple(get_formula("calibrated", quantity) for quantity in ("accuracy", "latency_ms"))


class Truth:
    """True accuracies and latencies, and evaluations and measurements of them."""

    def __init__(self, seed: int, n_images: int) -> None:
        self.known = reference_predictors("rpi4")
        self.space = self.known.space
        self.rng = np.random.default_rng(seed)
        self.ease = self.rng.normal(size=n_images)
        self._true: dict[Architecture, tuple[float, float]] = {}

    def meet(self, architectures: Sequence[Architecture]) -> None:
        """Draw the misfits of networks that were not met before."""
        new = [a for a in dict.fromkeys(architectures) if a not in self._true]
        accuracies, latencies = (self.known.of(q, SIZE).predict(new) for q in ("accuracy", "latency_ms"))
        for architecture, accuracy, latency in zip(new, accuracies, latencies, strict=True):
            misfit = self.rng.normal(size=2)
            self._true[architecture] = (
                float(accuracy + MISFIT_POINTS * misfit[0]),
                float(latency * (1 + MISFIT_LATENCY * misfit[1])),
            )

    def of(self, architecture: Architecture) -> tuple[float, float]:
        """Accuracy in percent and latency in ms."""
        if architecture not in self._true:
            self.meet([architecture])
        return self._true[architecture]

    def evaluate(self, architecture: Architecture) -> Evaluated:
        own = self.rng.normal(size=len(self.ease))
        ease = np.sqrt(SHARED) * self.ease + np.sqrt(1 - SHARED) * own
        correct = ease < ndtri(self.of(architecture)[0] / 100)
        share = float(correct.mean())
        return Evaluated(100 * share, 100 * float(np.sqrt(share * (1 - share) / len(correct))), correct)

    def time(self, architecture: Architecture) -> Timing:
        ms = self.of(architecture)[1] * (1 + TIMING_ERROR * float(self.rng.normal()))
        return Timing(ms, "measured", "simulated", n_runs=100)

    def rows(self, networks: Sequence[Architecture]) -> list[Measurement]:
        """What a board and a supernet say of networks."""
        self.meet(networks)
        return [Measurement.of(a, self.time(a), self.evaluate(a).accuracy) for a in networks]

    def fit(self, rows: Sequence[Measurement]) -> PredictorSet:
        accuracy, latency = (fit_formula(formula, rows, self.space).predictor for formula in FORMULAS)
        return PredictorSet("simulated", self.space, (accuracy,), (latency,))


@dataclass(frozen=True)
class Answer:
    """A network that a method answers with.

    Attributes:
        method: The method, and the rows of random networks that it began with.
        evaluations: Networks evaluated.
        gap: What it is truly less accurate than the best network without misfit, in points.
        exceeds: Whether its true latency exceeds the limit.
        beaten: Whether another looked-at network truly beats it.
    """

    method: tuple[str, int]
    evaluations: int
    gap: float
    exceeds: bool
    beaten: bool


def answers(seed: int, args: argparse.Namespace) -> list[Answer]:
    """What all methods answer to one problem."""
    truth = Truth(seed, args.images)
    limit = float(truth.rng.uniform(60, 160))
    best = exact_optimum(Objective(truth.known, confidence=0.5, image_sizes=[SIZE]), limit).accuracy
    drawn = truth.rows(truth.space.sample(truth.rng, n=max(ONE_SHOT), image_size=SIZE))
    designed = truth.rows(choose_samples(truth.space, FORMULAS, max(LOOP), image_sizes=[SIZE], seed=seed))
    found = []

    def answer(method: str, n_rows: int, n: int, chosen: Architecture, others: Sequence[Architecture] = ()) -> None:
        accuracy, latency = truth.of(chosen)
        beaten = any(a > accuracy and ms < latency for a, ms in map(truth.of, others))
        found.append(Answer((method, n_rows), n, best - accuracy, latency > limit, beaten))

    def searched(predictors: PredictorSet) -> list[SearchOutcome]:
        return [search(predictors, limit, algorithm=RandomSearch(), evaluations=1)]

    def looked(outcome: SearchOutcome, before: Sequence[Architecture]) -> Verdict:
        return verify(outcome, n_candidates=args.candidates, time=truth.time, evaluate=truth.evaluate, also=before)

    for n in ONE_SHOT:
        answer("one-shot", n, n, searched(truth.fit(drawn[:n]))[0].architecture)
    for n in LOOP:
        # A design is made one row after the other: its first n are the design of n.
        rows = designed[:n]
        loop = closed_loop(truth.fit(rows), rows, rounds=args.rounds, search=searched, look=looked, refit=truth.fit)
        seen = loop.looked[0].candidates
        for method, verdict in (
            ("auto", loop.looked[0]),
            ("strict", choose(searched(loop.predictors)[0], seen, tolerance_points=0.0)),
        ):
            others = [c.architecture for c in seen]
            answer(method, n, len(loop.rows), verdict.chosen.architecture, others)
    return found


def show(found: Sequence[Answer]) -> None:
    """Print what each method came to."""
    print(
        f"{'':<10}{'rows':>6}{'evaluations':>13}{'mean gap':>10}{'median':>8}{'90 %':>7}{'over limit':>12}{'beaten':>8}"
    )
    for method in sorted({a.method for a in found}, key=lambda m: (m[0] != "one-shot", m)):
        same = [a for a in found if a.method == method]
        gap = [a.gap for a in same]
        print(
            f"{method[0]:<10}{method[1]:>6}{np.mean([a.evaluations for a in same]):>13.1f}{np.mean(gap):>10.3f}"
            f"{np.median(gap):>8.3f}{np.quantile(gap, 0.9):>7.3f}{np.mean([a.exceeds for a in same]):>12.1%}"
            f"{np.mean([a.beaten for a in same]):>8.1%}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--candidates", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--workers", type=int, default=min(2, os.cpu_count() or 1))
    args = parser.parse_args()
    start = time.perf_counter()
    found: list[Answer] = []
    with get_context("spawn").Pool(args.workers) as pool:
        seeds = range(args.first_seed, args.first_seed + args.searches)
        for n, part in enumerate(pool.imap_unordered(partial(answers, args=args), seeds), start=1):
            found += part
            if n % 20 == 0 or n == args.searches:
                print(f"{n} searches, {time.perf_counter() - start:.0f} s")
                show(found)
    print(f"{args.candidates} looked at in each of at most {args.rounds} rounds, {args.images:,} images")


if __name__ == "__main__":
    main()
