"""Prices of starts: cost models of a GPU at batch 1 and 64, and of the authors' Raspberry Pi, from few rows.

    python benchmarks/launches.py DATA [--rows 13] [--draws 40]

DATA is the folder of ``ofa_mbv3_v100_latency.csv`` (once-for-all's networks on a V100, measured by the authors of
HELP, NeurIPS 2021) and ``foxnas_rpi4_cpu256.csv``. Each draw fits random rows and predicts all others; medians are
printed, and how many networks keep the bounds of calibrations from such rows.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from foxnas_mlflow.core.calibration import calibrate
from foxnas_mlflow.core.measurements import Measurement, read_measurements
from foxnas_mlflow.core.predictors import fit_family
from foxnas_mlflow.core.space import CPU_SPACE, SearchSpace

OFA_SPACE = CPU_SPACE.replace(name="ofa", expansions=(3, 4, 6), image_sizes=tuple(range(128, 225, 4)))


def v100_rows(path: Path, batch: int) -> list[Measurement]:
    """Rows of the V100's table at a batch size, 1 or 64."""
    rows = []
    for row in pd.read_csv(path).to_dict("records"):
        depths, kernels, expansions = (
            list(map(int, row[name].split())) for name in ("depths", "kernels", "expansions")
        )
        blocks = iter(zip(expansions, kernels, strict=True))
        stages = [[next(blocks) for _ in range(depth)] for depth in depths]
        architecture = OFA_SPACE.architecture(row["image_size"], stages)
        rows.append(Measurement(architecture, None, row[f"v100_batch{batch}_ms"], "measured"))
    return rows


def held_out(rows: list[Measurement], space: SearchSpace, *, n: int, draws: int) -> tuple[float, float, Counter[str]]:
    """Median error (percent) and rank correlation of fits to n random rows on all others, and the formulas taken."""
    errors, correlations, formulas = [], [], Counter[str]()
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(rows))
        (report,) = fit_family("calibrated", "latency_ms", [rows[i] for i in order[:n]], space)
        others = [rows[i] for i in order[n:]]
        observed = np.array([row.latency_ms for row in others])
        predicted = report.predictor.predict([row.architecture for row in others])
        errors.append(100 * np.mean(np.abs(predicted / observed - 1)))
        correlations.append(spearmanr(predicted, observed).statistic)
        formulas[report.predictor.formula] += 1
    return float(np.median(errors)), float(np.median(correlations)), formulas


def bounds(rows: list[Measurement], space: SearchSpace, *, draws: int) -> tuple[float, float]:
    """Of calibrations from 12 random rows, with 20 more that they are held against.

    Returns:
        Percent of all other rows within the bound at 95 %, and percent that it lies above the prediction.
    """
    kept, above = [], []
    for draw in range(draws):
        order = np.random.default_rng(draw).permutation(len(rows))
        known, outside, others = ([rows[i] for i in part] for part in np.split(order, (12, 32)))
        (latency,) = calibrate(known, space, target="gpu", outside=outside, seed=draw).latency
        networks = [row.architecture for row in others]
        bound = latency.upper_bound(networks, 0.95)
        kept.append(100 * np.mean(np.array([row.latency_ms for row in others]) <= bound))
        above.append(100 * np.mean(bound / latency.predict(networks) - 1))
    return float(np.mean(kept)), float(np.mean(above))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=13)
    parser.add_argument("--draws", type=int, default=40)
    args = parser.parse_args()
    tables = [
        (f"V100, batch {batch}", v100_rows(args.data / "ofa_mbv3_v100_latency.csv", batch), OFA_SPACE)
        for batch in (1, 64)
    ]
    pi = read_measurements(args.data / "foxnas_rpi4_cpu256.csv")
    print(f"{args.rows} random rows, median of {args.draws} draws")
    for name, rows, space in [*tables, ("Raspberry Pi 4", pi, CPU_SPACE)]:
        error, correlation, formulas = held_out(rows, space, n=args.rows, draws=args.draws)
        print(
            f"{name:<16} error {error:.2f} %, rank correlation {correlation:.4f}, formulas {dict(formulas)}", flush=True
        )
        kept, above = bounds(rows, space, draws=max(args.draws // 4, 1))
        print(f"{'':<16} bound at 95 % kept by {kept:.1f} %, {above:.1f} % above the prediction", flush=True)
    (report,) = fit_family("calibrated", "latency_ms", pi, CPU_SPACE)
    print(f"Raspberry Pi 4, all rows: {report.predictor.formula}, cross-validated {report.metrics['cv_mape']:.3f} %")


if __name__ == "__main__":
    main()
