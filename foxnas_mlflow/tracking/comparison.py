"""Logging what predictions were worth: ``predicted_vs_real.csv`` and how well it agrees."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from foxnas_mlflow.core.comparison import Check, Comparison, agreement, write_comparisons
from foxnas_mlflow.tracking.run import EntryRun

COMPARISON = "predicted_vs_real.csv"


def log_comparison(
    run: EntryRun, rows: Sequence[Comparison], latency_ms: float | None, checks: Sequence[Check]
) -> dict[str, float]:
    """Log ``predicted_vs_real.csv`` and how well it agrees.

    Args:
        run: The open run.
        rows: The networks, the found ones first.
        latency_ms: The limit of the first one, or None.
        checks: For each found one whether another beats it.

    Returns:
        The figures.
    """
    path = run.directory / COMPARISON
    write_comparisons(rows, path)
    run.log_artifact(path)
    run.log_table(pd.read_csv(path), "tables/predicted_vs_real.json")
    metrics = agreement(rows, latency_ms)
    if all(check.checked for check in checks):
        metrics["found_dominated"] = float(any(check.beaten_by is not None for check in checks))
    run.set_tags({"foxnas.check": " ".join(check.sentence for check in checks)})
    run.log_metrics({f"pipeline/{key}": value for key, value in metrics.items()})
    return metrics
