"""Choosing under noise, on a simulated truth: is the chosen network beaten, and how good is it?

    python benchmarks/verification.py [--searches 200] [--rows 60] [--candidates 5] [--images 10000]

The truth is the packaged model of the CPU space at 256 px and, for each network, a misfit of its own (sd 0.15 points of
accuracy, 0.4 % of latency). Evaluations are answers to the same images: a network answers an image right when a latent
ease, four fifths of which all networks share, is below its true accuracy's quantile. Each search fits predictors to
rows of random networks, finds the optimum under a random limit, looks at candidates of the front (latencies measured
within 0.3 %) and chooses. `one-shot` is the same with twice the rows and no look.
"""

from __future__ import annotations

import argparse
from collections import Counter

import numpy as np
from scipy.special import ndtri

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.measurements import Measurement, Timing
from foxnas_mlflow.core.predictors import PredictorSet, fit_formula, get_formula, reference_predictors
from foxnas_mlflow.core.searchers import Evaluated, Objective, RandomSearch, choose, exact_optimum, search, verify

SIZE = 256
MISFIT_POINTS, MISFIT_LATENCY, TIMING_ERROR, SHARED = 0.15, 0.004, 0.003, 0.8


class Truth:
    """True accuracies and latencies, and evaluations and measurements of them."""

    def __init__(self, seed: int, n_images: int) -> None:
        self.known = reference_predictors("rpi4")
        self.space = self.known.space
        self.rng = np.random.default_rng(seed)
        self.ease = self.rng.normal(size=n_images)
        self._true: dict[Architecture, tuple[float, float]] = {}

    def of(self, architecture: Architecture) -> tuple[float, float]:
        """Accuracy in percent and latency in ms."""
        if architecture not in self._true:
            accuracy, latency = (float(self.known.of(q, SIZE).predict([architecture])[0]) for q in self.known.groups)
            misfit = self.rng.normal(size=2)
            true = accuracy + MISFIT_POINTS * float(misfit[0]), latency * (1 + MISFIT_LATENCY * float(misfit[1]))
            self._true[architecture] = true
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

    def fit(self, n: int) -> PredictorSet:
        rows = []
        for a in self.space.sample(self.rng, n=n, image_size=SIZE):
            rows.append(Measurement.of(a, self.time(a), self.evaluate(a).accuracy))
        predictors = [
            fit_formula(get_formula(name, quantity), rows, self.space).predictor
            for name, quantity in (("calibrated", "accuracy"), ("calibrated", "latency_ms"))
        ]
        return PredictorSet("simulated", self.space, (predictors[0],), (predictors[1],))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=200)
    parser.add_argument("--rows", type=int, default=60)
    parser.add_argument("--candidates", type=int, default=5)
    parser.add_argument("--images", type=int, default=10_000)
    args = parser.parse_args()
    beaten: Counter[str] = Counter()
    gaps: dict[str, list[float]] = {"auto": [], "strict": [], "first": [], "one-shot": []}
    for seed in range(args.searches):
        truth = Truth(seed, args.images)
        limit = float(truth.rng.uniform(60, 160))
        best = exact_optimum(Objective(truth.known, confidence=0.5, image_sizes=[SIZE]), limit).accuracy
        outcome = search(truth.fit(args.rows), limit, algorithm=RandomSearch(), evaluations=1)
        looked = verify(outcome, n_candidates=args.candidates, time=truth.time, evaluate=truth.evaluate)
        for name, verdict in (("auto", looked), ("strict", choose(outcome, looked.candidates, tolerance_points=0.0))):
            accuracy, latency = truth.of(verdict.chosen.architecture)
            others = [truth.of(c.architecture) for c in verdict.candidates if not c.chosen]
            beaten[name] += any(a > accuracy and ms < latency for a, ms in others)
            gaps[name].append(best - accuracy)
        gaps["first"].append(best - truth.of(outcome.architecture)[0])
        one_shot = search(truth.fit(2 * args.rows), limit, algorithm=RandomSearch(), evaluations=1)
        gaps["one-shot"].append(best - truth.of(one_shot.architecture)[0])
    print(f"{args.searches} searches, {args.rows} rows, {args.candidates} looked at, {args.images:,} images")
    print("gap to the best network of the model without misfit, in points:")
    for name, gap in gaps.items():
        note = (
            f", beaten on both true figures in {beaten[name] / args.searches:.1%}" if name in ("auto", "strict") else ""
        )
        print(
            f"{name:<10} mean {np.mean(gap):.3f}, median {np.median(gap):.3f}, 90 % {np.quantile(gap, 0.9):.3f}{note}"
        )


if __name__ == "__main__":
    main()
