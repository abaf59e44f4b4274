"""`foxnas fit` on a large table: seconds and memory of the whole command, store and plots included.

    python benchmarks/fit.py [--rows 16000] [--image-sizes 192,256] [--profile fit.prof]

The rows are networks of the CPU space with what the packaged predictors say of them, and noise: 0.15 points of
accuracy, 1 % of latency. The fitted predictors are held against them at the end.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from foxnas_mlflow.core.measurements import Measurement, write_measurements
from foxnas_mlflow.core.predictors import PredictorSet, reference_predictors
from foxnas_mlflow.flavor import load_model

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--rows", type=int, default=16_000)
parser.add_argument("--image-sizes", default="192,256")
parser.add_argument("--profile", default="", help="also write where the time went, for pstats")
args = parser.parse_args()

known, rng = reference_predictors("rpi4"), np.random.default_rng(0)
sizes = [int(size) for size in args.image_sizes.split(",")]
networks = [a for size in sizes for a in known.space.sample(rng, n=args.rows // len(sizes), image_size=size)]
table = known.predict_table(networks)
accuracy = table["accuracy"] + rng.normal(0, 0.15, len(networks))
latency_ms = table["latency_ms"] * rng.normal(1, 0.01, len(networks))
with tempfile.TemporaryDirectory() as directory:
    rows = [
        Measurement(a, float(x), float(y), "measured") for a, x, y in zip(networks, accuracy, latency_ms, strict=True)
    ]
    write_measurements(rows, Path(directory, "measurements.csv"))
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
    # The store's tables are made once, by its owner.
    subprocess.run([sys.executable, "-m", "mlflow", "db", "upgrade", os.environ["MLFLOW_TRACKING_URI"]], check=True)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    profiled = ["-m", "cProfile", "-o", os.path.abspath(args.profile)] if args.profile else []
    start = time.perf_counter()
    subprocess.run(
        [sys.executable, *profiled, "-m", "foxnas_mlflow", "fit", "--measurements", "measurements.csv"],
        check=True,
        cwd=directory,
    )
    seconds = time.perf_counter() - start
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    fitted = load_model("models:/foxnas-predictors-rpi4/1")
    assert isinstance(fitted, PredictorSet)
    found = fitted.predict_table(networks[::16])
cpu = used.ru_utime + used.ru_stime - before.ru_utime - before.ru_stime
print(f"{len(rows)} rows: {seconds:.1f} s, {cpu:.1f} s of processor, peak {used.ru_maxrss / 1024:.0f} MB")
for name, unit in (("accuracy", "points"), ("latency_ms", "ms")):
    difference = np.abs(np.subtract(found[name], table[name][::16])).mean()
    print(f"{name}: fitted and true differ by {difference:.3f} {unit} in the mean")
