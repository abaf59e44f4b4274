"""Searchers side by side on the reference predictors: gap to the exact optimum, evaluations, time.

    python benchmarks/search.py [--pairs 200] [--budget 1000000] [--searchers annealing evolution] [--plot gaps.png]

Each (seed, constraint) pair is one search. Constraints are spread over the reachable latencies. The second table is
the paper's figure 8: the median gap after each number of evaluations.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import SEARCHERS, Limit, Objective, Problem, exact_optimum, fastest, front_of

TOLERANCES = (0.1, 0.01)
COUNTS = (50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000, 1_000_000)

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--pairs", type=int, default=200)
parser.add_argument("--budget", type=int, default=1_000_000)
parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=list(SEARCHERS))
parser.add_argument("--plot", default="")
args = parser.parse_args()

predictors = reference_predictors("rpi4")
for sizes in ([256], [192, 256]):
    seconds = []
    for _ in range(7):
        objective = Objective(predictors, confidence=0.5, image_sizes=sizes)
        start = time.perf_counter()
        front = front_of(objective)
        seconds.append(time.perf_counter() - start)
    print(f"exact front at {sizes} px: {len(front)} networks, median {1000 * np.median(seconds):.1f} ms")

objective = Objective(predictors, confidence=0.95)
low = fastest(objective).latency_upper_ms
limits = np.linspace(1.1 * low, 6 * low, args.pairs)
optima = [exact_optimum(objective, float(limit)).accuracy for limit in limits]
print(f"constraints {limits[0]:.1f} to {limits[-1]:.1f} ms, {args.pairs} pairs, budget {args.budget:,}")
print(
    f"{'searcher':<20}{'gap <= 0.01':>12}{'largest gap':>13}{'evals to 0.1':>14}{'evals to 0.01':>15}{'median s':>10}"
)
gaps = {}
best_so_far = {}
grid = np.unique(np.geomspace(50, args.budget, 400).astype(int))
for name, searcher in ((name, SEARCHERS[name]) for name in args.searchers):
    gap, seconds, curves = [], [], []
    evaluations: dict[float, list[float]] = {tolerance: [] for tolerance in TOLERANCES}
    for seed, (limit, optimum) in enumerate(zip(limits, optima, strict=True)):
        result = searcher.search(
            Problem(objective, (Limit("latency_ms", float(limit)),)), evaluations=args.budget, seed=seed
        )
        gap.append(optimum - result.accuracy)
        seconds.append(result.seconds)
        steps = np.array([p.evaluation for p in result.trace])
        best = np.array([-np.inf, *(p.best_accuracy for p in result.trace)])
        curves.append(optimum - best[np.searchsorted(steps, grid, side="right")])
        for tolerance, spent in evaluations.items():
            hits = [p.evaluation for p in result.trace if p.best_accuracy >= optimum - tolerance]
            spent.append(hits[0] if hits else np.inf)
    gaps[name] = gap
    best_so_far[name] = np.median(curves, axis=0)
    print(
        f"{name:<20}{np.mean(np.array(gap) <= TOLERANCES[-1]):>12.1%}{max(gap):>13.4f}"
        f"{np.median(evaluations[0.1]):>14,.0f}{np.median(evaluations[0.01]):>15,.0f}{np.median(seconds):>10.2f}",
        flush=True,
    )
shown = [int(np.searchsorted(grid, n, side="right")) - 1 for n in COUNTS if n <= args.budget]
print("\nmedian gap (points) after so many evaluations")
print(f"{'':<20}" + "".join(f"{grid[i]:>9,}" for i in shown))
for name, curve in best_so_far.items():
    print(f"{name:<20}" + "".join(f"{curve[i]:>9.4f}" for i in shown))
if {"annealing", "evolution"} <= set(best_so_far):
    behind = grid[best_so_far["annealing"] > best_so_far["evolution"]]
    print(
        f"guided annealing is behind evolution after {list(map(int, behind)) or 'no number of'} evaluations, from 50 on"
    )
if args.plot:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for name, gap in gaps.items():
        axis.semilogy(limits, np.maximum(gap, 1e-4), ".", label=name)
    axis.axhline(TOLERANCES[-1], color="grey", linewidth=1)
    axis.set(xlabel="latency constraint (ms)", ylabel="gap to the exact optimum (points)")
    axis.legend(frameon=False)
    figure.savefig(args.plot)
