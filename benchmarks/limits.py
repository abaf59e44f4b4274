"""Several limits at once: time of the exact method with its proof, and what annealing leaves.

    python benchmarks/limits.py [--problems 50] [--n-limits 3] [--image-size 256] [--budget 0]

CPU space at one image size, packaged predictors, confidence 0.95. Each problem's limits are what a random network uses
of that many quantities, times 0.9 to 1.3: some bind, some do not. With a budget, annealing solves the same problems.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from foxnas_mlflow.core.errors import InfeasibleConstraintError
from foxnas_mlflow.core.predictors import reference_predictors
from foxnas_mlflow.core.searchers import Limit, Objective, Problem, SimulatedAnnealing, solve

QUANTITIES = ("latency_ms", "int8_size_bytes", "macs", "peak_activation_bytes", "params")

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--problems", type=int, default=50)
parser.add_argument("--n-limits", type=int, default=3)
parser.add_argument("--image-size", type=int, default=256)
parser.add_argument("--budget", type=int, default=0)
args = parser.parse_args()

predictors = reference_predictors("rpi4")
rng = np.random.default_rng(0)
objective = Objective(predictors, image_sizes=[args.image_size], quantities=QUANTITIES)
seconds, cpu_seconds, open_gaps, gaps, infeasible = [], [], [], [], 0
while len(seconds) < args.problems:
    network = objective.space.sample(rng, image_size=args.image_size)
    amounts = objective.sizes[0].evaluate(objective.index_of(network)[None])[1][0]
    known = dict(zip(objective.quantities, amounts, strict=True))
    names = ["latency_ms", *rng.permutation(QUANTITIES[1:])[: args.n_limits - 1]]
    limits = tuple(Limit(str(name), float(known[name] * rng.uniform(0.9, 1.3))) for name in names)
    own = Objective(predictors, image_sizes=[args.image_size], quantities=[limit.quantity for limit in limits])
    problem = Problem(own, limits)
    wall, cpu = time.perf_counter(), time.process_time()
    try:
        optimum = solve(problem)
    except InfeasibleConstraintError:
        infeasible += 1
        continue
    seconds.append(time.perf_counter() - wall)
    cpu_seconds.append(time.process_time() - cpu)
    open_gaps.append(optimum.proof_gap)
    if args.budget:
        found = SimulatedAnnealing().search(problem, evaluations=args.budget, seed=len(seconds))
        gaps.append(optimum.accuracy - found.accuracy)
print(f"{args.problems} problems of {args.n_limits} limits at {args.image_size} px, {infeasible} others infeasible")
for name, values in (("wall", seconds), ("processor", cpu_seconds)):
    print(f"{name} seconds: median {np.median(values):.3f}, worst {max(values):.3f}")
print(f"proven: {sum(gap == 0 for gap in open_gaps)} of {args.problems}, largest open gap {max(open_gaps):.4f} points")
if gaps:
    print(
        f"annealing, {args.budget:,} evaluations: gap <= 0.01 in {np.mean(np.array(gaps) <= 0.01):.0%}, "
        f"median {np.median(gaps):.4f}, largest {max(gaps):.4f}, never below 0: {min(gaps) > -1e-9}"
    )
