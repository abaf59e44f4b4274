"""Do the bounds of calibrated boards hold? Several calibrations, held against networks that none of them saw.

    python benchmarks/coverage.py --out coverage/ [--calibrations 5] [--tests 40]

Runs `foxnas device calibrate` with the seeds 0, 1, ... and measures `--tests` random networks of other seeds, all of
them after every calibration, `--passes` times at most; of each network the least latency counts, so that a slow minute
of the machine changes none. The calibrations share the tests: none of them fits any. Rows are kept in `--out`: the same
command goes on where it was ended, and with `--fit-only` nothing is measured and all calibrations are fitted anew to
the rows that are there.

Printed for each calibration and over all: share of the tests within the upper bound at 0.95 and how far that lies above
the prediction, mean absolute error against the least of a network's latencies and against their median, mean error by
image size (above 0: predicted too slow), seconds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.architecture import Architecture
from foxnas_mlflow.core.calibration import calibrate, choose_checks
from foxnas_mlflow.core.measurements import Measurement, append_measurement, fastest, read_finished
from foxnas_mlflow.core.predictors import LinearPredictor
from foxnas_mlflow.core.space import get_space
from foxnas_mlflow.core.targets import get_target
from foxnas_mlflow.workflows._timers import open_device
from foxnas_mlflow.workflows.device import CHECKS, MEASUREMENTS, DeviceRequest, run_device

CONFIDENCE = 0.95
TEST_SEED = 1000
"""Far from those of the calibrations, whose own random networks are drawn from the same stream."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="local")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--calibrations", type=int, default=5)
    parser.add_argument("--tests", type=int, default=40)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("coverage"))
    parser.add_argument("--fit-only", action="store_true")
    args = parser.parse_args()

    space = get_space(get_target(args.target).space)
    args.out.mkdir(parents=True, exist_ok=True)
    tests = choose_checks(space, args.tests, seed=TEST_SEED)
    if not args.fit_only:
        for seed in range(args.calibrations):
            _calibrate(args, seed)
            _measure(args, tests, seed)
    wanted = set(tests)
    measured = [row for row in read_finished(args.out / "tests.csv") if row.architecture in wanted]
    rows = list(fastest(measured).values())
    medians = np.array([np.median([o.latency_ms for o in measured if o.architecture == r.architecture]) for r in rows])
    print(f"{rows[0].device}, {rows[0].runtime}; {len(rows)} networks that no calibration fits\n")
    print(f"{'seed':>4} {'within %':>9} {'above %':>8} {'error %':>8} {'median %':>8} {'bias %':>7} {'seconds':>8}")
    found, typical = [], []
    for seed in range(args.calibrations):
        tables = (read_finished(args.out / f"board{seed}-{name}") for name in (MEASUREMENTS, CHECKS))
        probes, checks = (list(fastest(table).values()) for table in tables)
        if not probes or not checks:
            continue
        (latency,) = calibrate(probes, space, target=f"board{seed}", outside=checks, seed=seed).latency
        found.append(_held_against(latency, rows))
        share, width, errors = found[-1]
        typical.append(100 * np.abs(latency.predict([row.architecture for row in rows]) / medians - 1).mean())
        clock = args.out / f"board{seed}.json"
        seconds = f"{json.loads(clock.read_text())['seconds']:.0f}" if clock.exists() else "-"
        print(
            f"{seed:>4} {100 * share.mean():>9.1f} {100 * width.mean():>8.2f} {100 * np.abs(errors).mean():>8.2f} "
            f"{typical[-1]:>8.2f} {100 * errors.mean():>7.2f} {seconds:>8}"
        )
    share, width, errors = (np.array(each) for each in zip(*found, strict=True))
    print(
        f" all {100 * share.mean():>9.1f} {100 * width.mean():>8.2f} {100 * np.abs(errors).mean():>8.2f} "
        f"{np.mean(typical):>8.2f} {100 * errors.mean():>7.2f}"
    )
    sizes = np.array([row.architecture.image_size for row in rows])
    print("\n  px networks within %  error %  bias %")
    for size in np.unique(sizes):
        at = sizes == size
        print(
            f"{size:>4} {at.sum():>8} {100 * share[:, at].mean():>8.1f} {100 * np.abs(errors[:, at]).mean():>8.2f} "
            f"{100 * errors[:, at].mean():>7.2f}"
        )


def _calibrate(args: argparse.Namespace, seed: int) -> None:
    out, clock = args.out / f"board{seed}.yaml", args.out / f"board{seed}.json"
    if clock.exists():
        return
    start = time.monotonic()
    resumed = out.with_name(f"board{seed}-{MEASUREMENTS}").exists()
    result = run_device(
        DeviceRequest(action="calibrate", device=args.device, target=args.target, out=str(out), seed=seed)
    )
    # An interrupted calibration's time is not that of one.
    seconds = float("nan") if resumed else time.monotonic() - start
    clock.write_text(json.dumps({"seconds": seconds}))
    print(f"{seconds:.0f} s\n{result.describe()}\n", flush=True)


def _measure(args: argparse.Namespace, networks: list[Architecture], seed: int) -> None:
    """Measure all networks once more, unless that was done after this calibration."""
    target, table, done = get_target(args.target), args.out / "tests.csv", args.out / f"tests{seed}.json"
    if seed >= args.passes or done.exists():
        return
    with open_device(target, get_space(target.space), args.device) as timer:
        for network in networks:
            timing = timer.time(network)
            if timing.problems:
                print(f"left out, {'; '.join(timing.problems)}: {network}", flush=True)
            else:
                append_measurement(Measurement.of(network, timing), table)
    done.write_text("{}")


def _held_against(latency: LinearPredictor, rows: list[Measurement]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Whether each network is within its bound, how far that lies above the prediction, and the prediction's error."""
    networks = [row.architecture for row in rows]
    observed = np.array([row.latency_ms for row in rows], dtype=np.float64)
    predicted, bound = latency.predict(networks), latency.upper_bound(networks, CONFIDENCE)
    return observed <= bound, bound / predicted - 1, predicted / observed - 1


if __name__ == "__main__":
    main()
