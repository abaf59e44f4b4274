"""How many measured probes a cost model of this host's CPU needs.

Measures `--probes` D-optimal probes and `--tests` random networks outside of them (all in the CPU
space, all image sizes), interleaved in one run, and prints the error on the outside networks by the
number of probes, next to the error of as many random probes and to what repeating a measurement
scatters. Rows are kept in `--out`: an interrupted run goes on.

    python benchmarks/calibration.py --out calibration/
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.calibration import SPARE_PROBES, choose_probes
from foxnas_mlflow.core.measurements import Measurement, append_measurement, read_finished
from foxnas_mlflow.core.predictors import fit_family, widest_formula
from foxnas_mlflow.core.space import SearchSpace, get_space
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.workflows._timers import open_device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="local")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--probes", type=int, default=40)
    parser.add_argument("--tests", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=8, help="outside networks that are measured twice")
    parser.add_argument("--image-sizes", default="", help="comma separated; empty: all")
    parser.add_argument("--out", type=Path, default=Path("calibration"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    target = get_target(args.target)
    space = get_space(target.space)
    sizes = [int(size) for size in args.image_sizes.split(",")] if args.image_sizes else list(space.image_sizes)
    probes = choose_probes(space, args.probes, image_sizes=sizes, seed=args.seed)
    rng = np.random.default_rng([args.seed, 1])
    outside = [space.sample(rng, image_size=int(rng.choice(sizes))) for _ in range(args.tests + args.probes)]
    tests, random_probes = outside[: args.tests], outside[args.tests :]
    args.out.mkdir(parents=True, exist_ok=True)

    # Interleaved, so that a slow minute of the machine hits all kinds alike.
    groups = {"probes": probes, "tests": tests, "random": random_probes, "again": tests[: args.repeats]}
    done = {name: read_finished(args.out / f"{name}.csv") for name in groups}
    unsteady = 0
    with open_device(target, space, args.device) as timer:
        for i in range(max(map(len, groups.values()))):
            for name, architectures in groups.items():
                if i >= len(architectures) or architectures[i] in {row.architecture for row in done[name]}:
                    continue
                timing = timer.time(architectures[i])
                if timing.problems:
                    unsteady += 1
                    continue
                row = Measurement.of(architectures[i], timing)
                append_measurement(row, args.out / f"{name}.csv")
                done[name].append(row)
                print(f"{name} {i + 1}/{len(architectures)}: {timing.latency_ms:.2f} ms", flush=True)

    times = {row.architecture: row.latency_ms or 0.0 for row in done["tests"]}
    again = [row for row in done["again"] if row.architecture in times]
    scatter = [abs((row.latency_ms or 0.0) / times[row.architecture] - 1) for row in again]
    in_order = {row.architecture: row for row in done["probes"]}
    designed = [in_order[a] for a in probes if a in in_order]
    least = len(widest_formula("calibrated", "latency_ms", space, len(sizes)).columns(space)) + SPARE_PROBES
    curve = []
    for n in (10, 12, 14, 16, 20, 24, 30, 40):
        if least <= n <= min(len(designed), len(done["random"])):
            mape = error(designed[:n], done["tests"], space)
            drawn = [error(draw, done["tests"], space) for draw in draws(done["random"], n, rng)]
            curve.append({"n_probes": n, "designed_mape": mape, "random_mape": float(np.median(drawn))})
    device = designed[0]
    result = {
        "device": device.device,
        "runtime": device.runtime,
        "n_tests": len(times),
        "fastest_ms": min(times.values()),
        "slowest_ms": max(times.values()),
        "repeat_scatter_percent": 100 * float(np.mean(scatter)) if scatter else None,
        "unsteady": unsteady,
        "curve": curve,
    }
    (args.out / "calibration.json").write_text(json.dumps(result, indent=2))
    print(f"\n{device.device}, {device.runtime}; {len(times)} networks outside, ", end="")
    print(f"{result['fastest_ms']:.2f} to {result['slowest_ms']:.2f} ms; {unsteady} measurements not steady")
    print(f"the same network measured twice differs by {result['repeat_scatter_percent'] or float('nan'):.2f} %")
    print("probes   designed   random (median of 20 draws)   mean absolute error in %")
    for point in curve:
        print(f"{point['n_probes']:>6} {point['designed_mape']:>10.2f} {point['random_mape']:>8.2f}")


def error(rows: Sequence[Measurement], tests: Sequence[Measurement], space: SearchSpace) -> float:
    """Mean absolute error in percent on networks outside of the fit."""
    (report,) = fit_family("calibrated", "latency_ms", rows, space, spare_rows=SPARE_PROBES)
    predictor = report.predictor
    known = {row.architecture for row in rows}
    outside = [row for row in tests if row.architecture not in known]
    observed = np.array([row.latency_ms for row in outside], dtype=np.float64)
    predicted = predictor.predict([row.architecture for row in outside])
    return 100 * float(np.mean(np.abs(predicted / observed - 1)))


def draws(rows: Sequence[Measurement], n: int, rng: np.random.Generator) -> list[list[Measurement]]:
    return [[rows[i] for i in rng.choice(len(rows), n, replace=False)] for _ in range(20)]


if __name__ == "__main__":
    main()
