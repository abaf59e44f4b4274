"""Predicted against real on this host: ranks, the found network against random ones, budgets kept.

    python benchmarks/pipeline.py --supernet models:/foxnas-supernet/1 [--measurements runs:/RUN/measurements.csv]

1. Kendall's tau between predicted and real over networks that no predictor saw.
2. The found network against random networks that meet its constraint, on real figures.
3. Of networks found for random constraints at a confidence, how many exceed it when measured.

Accuracy is that of subnets on validation images, latency the median on the device. Measurements are
taken in one shuffled order, so that a drift of the machine meets all alike; run it on a quiet one.
Without --measurements the samples that predictors are fitted to are taken here first.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy.stats import kendalltau

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.design import choose_samples
from foxnas_mlflow.core.measurements import Measurement
from foxnas_mlflow.core.predictors import fit_predictors, widest_formula
from foxnas_mlflow.core.searchers import Objective, exact_optimum, fastest, front_of
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.tracking.inputs import open_measurements, open_supernet
from foxnas_mlflow.workflows._evaluation import evaluator_making
from foxnas_mlflow.workflows._timers import open_device

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--supernet", required=True)
parser.add_argument("--data", default="")
parser.add_argument("--measurements", default="")
parser.add_argument("--target", default="cpu")
parser.add_argument("--device", default="local")
parser.add_argument("--samples", type=int, default=60)
parser.add_argument("--unseen", type=int, default=30)
parser.add_argument("--constraints", type=int, default=100)
parser.add_argument("--confidence", type=float, default=0.95)
parser.add_argument("--validation-images", type=int, default=2000)
parser.add_argument("--seed", type=int, default=0)
args = parser.parse_args()

begin = time.monotonic()
rng = np.random.default_rng([args.seed, 7])
target = get_target(args.target)
supernet = open_supernet(args.supernet, data=args.data)
space = supernet.space
evaluator = evaluator_making(
    supernet, image_sizes=space.image_sizes, validation_images=args.validation_images, seed=args.seed
).evaluator()


def accuracies(networks: list[Architecture]) -> list[float]:
    return [evaluator.evaluate(network).top1_percent for network in networks]


with open_device(target, space, args.device) as timer:
    untrusted = 0

    def latencies(networks: list[Architecture]) -> dict[Architecture, float]:
        """Median latency of each network; one that cannot be trusted is measured once more."""
        global untrusted
        found = {}
        for i in rng.permutation(len(networks)):
            timing = timer.time(networks[i])
            if timing.problems:
                timing = timer.time(networks[i])
                untrusted += bool(timing.problems)
            found[networks[i]] = timing.latency_ms
        return found

    if args.measurements:
        with tempfile.TemporaryDirectory() as directory:
            rows, _ = open_measurements(args.measurements, Path(directory))
    else:
        n_sizes = len(space.image_sizes)
        formulas = [widest_formula("calibrated", q, space, n_sizes) for q in ("accuracy", "latency_ms")]
        chosen = choose_samples(space, formulas, args.samples, image_sizes=list(space.image_sizes), seed=args.seed)
        timed = latencies(chosen)
        rows = [
            Measurement(network, accuracy, timed[network], "measured")
            for network, accuracy in zip(chosen, accuracies(chosen), strict=True)
        ]
    fit = fit_predictors(rows, space, target=target.name, seed=args.seed)
    predictors = fit.predictors
    for quantity, report in fit.reports.items():
        shown = {key: round(report.metrics[key], 3) for key in ("n_samples", "r2_adjusted", "cv_mape", "kendall_tau")}
        print(f"{quantity}: {shown}")
    print(f"samples and fit: {time.monotonic() - begin:.0f} s", flush=True)

    seen = {row.architecture for row in rows}
    unseen = [a for a in space.sample(rng, n=args.unseen + len(seen)) if a not in seen][: args.unseen]
    # The constraint of 2 is the median of these, so that half of them serve there too.
    predicted = predictors.predict_table(unseen)
    limit = float(np.median(predicted["latency_ms"]))
    found = exact_optimum(Objective(predictors, confidence=args.confidence), limit).architecture
    candidates = space.sample(rng, n=50 * args.unseen)
    bounds = predictors.predict_table(candidates)["latency_ms"]
    within = [a for a, latency in zip(unseen, predicted["latency_ms"], strict=True) if latency <= limit]
    within += [a for a, latency in zip(candidates, bounds, strict=True) if latency <= limit and a not in within]
    within = within[: args.unseen]
    objective = Objective(predictors, confidence=args.confidence)
    front = front_of(objective)
    low = fastest(objective).latency_upper_ms
    high = predictors.latency_bound_ms(front.architecture(len(front) - 1), args.confidence)
    limits = np.exp(rng.uniform(np.log(1.02 * low), np.log(high), size=args.constraints))
    optima = [exact_optimum(objective, float(x)).architecture for x in limits]
    everything = list(dict.fromkeys([found, *unseen, *within, *optima]))
    real_ms = latencies(everything)
    print(f"{len(everything)} networks measured ({untrusted} untrusted): {time.monotonic() - begin:.0f} s", flush=True)

judged = list(dict.fromkeys([found, *unseen, *within]))
real_top1 = dict(zip(judged, accuracies(judged), strict=True))

print(f"1. {len(unseen)} networks that no predictor saw")
for name, key, real, aim in (
    ("latency", "latency_ms", real_ms, 0.8),
    ("accuracy", "accuracy", real_top1, 0.6),
):
    values = [real[a] for a in unseen]
    tau = kendalltau(predicted[key], values).statistic
    error = 100 * np.mean(np.abs(np.array(predicted[key]) / values - 1))
    print(f"   {name:<9} Kendall tau {tau:.3f} (aim {aim}), mean error {error:.2f} %")

meeting = [a for a in within if real_ms[a] <= limit and a != found]
beaten = [a for a in meeting if real_ms[a] <= real_ms[found] and real_top1[a] > real_top1[found]]
better = [a for a in meeting if real_top1[a] > real_top1[found]]
print(f"2. found within {limit:.4g} ms: {real_top1[found]:.2f} %, {real_ms[found]:.4g} ms measured")
print(f"   of {len(meeting)} random networks that meet it {len(beaten)} beat it on both figures (aim 0)")
print(f"   {len(better)} are more accurate; the best has {max((real_top1[a] for a in meeting), default=0):.2f} %")

over = [real_ms[a] / x for a, x in zip(optima, limits, strict=True) if real_ms[a] > x]
worst = f", the worst by {100 * (max(over) - 1):.1f} %" if over else ""
print(f"3. {len(over)} of {len(optima)} found at confidence {args.confidence:g} exceed their constraint{worst} (aim 5)")
print(f"in all {time.monotonic() - begin:.0f} s")
