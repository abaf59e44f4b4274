"""Search from published measurements: fit predictors to a table, find the best networks, prove them.

    python examples/01_published_measurements.py [TABLE.csv]

TABLE.csv is the FOX-NAS authors' table (300 networks on a Raspberry Pi 4) or your own
measurements.csv. Without it the packaged predictors, fitted to that table, are used.
"""

import sys

from foxnas_mlflow import exact_front, fit_predictors, get_space, read_measurements, reference_predictors, search

if len(sys.argv) > 1:
    fit = fit_predictors(read_measurements(sys.argv[1]), get_space("cpu"), target="rpi4")
    for quantity, report in fit.reports.items():
        print(f"{quantity}: {report.metrics['n_samples']:.0f} rows, cross-validated R2 {report.metrics['cv_r2']:.3f}")
    predictors = fit.predictors
else:
    predictors = reference_predictors("rpi4")

front = exact_front(predictors)
print(f"front: {len(front)} networks from {front.latency_ms[0]:.1f} to {front.latency_ms[-1]:.1f} ms")
print(f"{'asked ms':>9}{'predicted ms':>14}{'at most':>9}{'top-1 %':>9}{'proof gap':>11}  depths")
for latency_ms in (60, 80, 110):
    outcome = search(predictors, latency_ms, evaluations=50_000)
    depths = "-".join(str(stage.depth) for stage in outcome.architecture.stages)
    print(
        f"{latency_ms:>9}{outcome.latency_ms:>14.1f}{outcome.latency_upper_ms:>9.1f}{outcome.accuracy:>9.2f}"
        f"{outcome.optimum.proof_gap:>11.4f}  {depths}"
    )
