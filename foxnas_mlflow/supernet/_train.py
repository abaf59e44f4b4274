"""Training of the supernet: progressive shrinking (paper section 3.2) or the sandwich rule."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from foxnas_mlflow.supernet._network import Supernet
from foxnas_mlflow.supernet._state import CHECKPOINTS, TrainingState
from foxnas_mlflow.supernet._step import Teacher
from foxnas_mlflow.supernet._trainer import Observer, Trainer, TrainingBatches


def train_supernet(
    state: TrainingState,
    batches: TrainingBatches,
    *,
    checkpoints: Path,
    log: Callable[[Mapping[str, float], int], None] | None = None,
    end_of_epoch: Callable[[int], None] | None = None,
    on_checkpoint: Callable[[Path], None] | None = None,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint_seconds: float = 120.0,
    device: str = "cpu",
    teacher: Teacher | None = None,
) -> Supernet:
    """Train a supernet to the end of the configured epochs, from wherever the state is.

    Args:
        state: A new state, or one of `load_checkpoint`.
        batches: Training batches of the largest image size; smaller ones are resized from them.
        checkpoints: Directory of the checkpoints.
        log, end_of_epoch, on_checkpoint, progress: See `Observer`.
        checkpoint_seconds: Seconds between checkpoints; the end of training writes one too.
        device: Where to compute.
        teacher: Probabilities for batches, which the largest network learns beside the labels.

    Returns:
        The supernet, in evaluation mode.

    Raises:
        TrainingError: If the loss is not finite; the last good checkpoint stays.
    """
    observer = Observer(log, end_of_epoch, on_checkpoint, progress)
    paths = [checkpoints / name for name in CHECKPOINTS]
    Trainer(
        state,
        batches,
        paths=paths,
        observer=observer,
        checkpoint_seconds=checkpoint_seconds,
        device=device,
        teacher=teacher,
    ).run()
    return state.supernet.eval()
