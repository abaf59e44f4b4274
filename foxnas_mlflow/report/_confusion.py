"""The picture of a confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from foxnas_mlflow.core.errors import import_or_raise

_MAX_NUMBERS, _MAX_NAMES = 20, 60
"""Classes up to which counts are written into the cells, and names beside them."""


def draw_confusion_matrix(counts: NDArray[np.int64], labels: Sequence[str], path: Path) -> None:
    """Draw a confusion matrix: shades are shares of the right class, numbers are images.

    Args:
        counts: (n_classes, n_classes): rows are the right classes, columns the predicted ones.
        labels: Names of the classes.
        path: PNG to write.
    """
    import_or_raise("matplotlib", extra="report", feature="drawing a confusion matrix")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n = len(labels)
    images = counts.sum(axis=1, keepdims=True)
    shares = counts / np.maximum(images, 1)
    side = min(max(4.5, 2.5 + 0.42 * n), 14.0)
    figure = Figure(figsize=(side + 1.0, side), layout="constrained", dpi=130)
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    shading = axis.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100)
    figure.colorbar(shading, ax=axis, label="share of the right class (%)", shrink=0.8)
    if n <= _MAX_NUMBERS:
        for row, column in np.argwhere(counts > 0):
            shade = "white" if shares[row, column] > 0.5 else "black"
            axis.text(column, row, f"{counts[row, column]}", ha="center", va="center", color=shade, fontsize=8)
    if n <= _MAX_NAMES:
        names = [label if len(label) <= 20 else label[:19] + "…" for label in labels]
        size = 9 if n <= _MAX_NUMBERS else 6
        axis.set_xticks(range(n), names, rotation=90 if max(map(len, names)) > 3 else 0, fontsize=size)
        axis.set_yticks(range(n), names, fontsize=size)
    right = int(np.trace(counts))
    total = int(counts.sum())
    axis.set(
        xlabel="predicted class",
        ylabel="right class",
        title=f"{right} of {total} images right ({100 * right / max(total, 1):.1f} %)",
    )
    figure.savefig(path)
