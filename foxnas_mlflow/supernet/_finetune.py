"""Training one subnet alone: what its weights lose by being shared."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from foxnas_mlflow.supernet._network import PlainNetwork
from foxnas_mlflow.supernet._state import TrainConfig, TrainingState, load_alone
from foxnas_mlflow.supernet._step import Teacher
from foxnas_mlflow.supernet._strategy import Alone
from foxnas_mlflow.supernet._trainer import Observer, Trainer, TrainingBatches


def finetune(
    plain: PlainNetwork,
    batches: TrainingBatches,
    *,
    epochs: int,
    learning_rate: float,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
    device: str | None = None,
    teacher: Teacher | None = None,
    class_weights: tuple[float, ...] = (),
) -> PlainNetwork:
    """Go on training a network from the weights that it has, with those of no other network in between.

    SGD as in the training of the supernet, its learning rate falling to zero by a cosine.

    Args:
        plain: The network, which is changed.
        batches: Training batches of its image size.
        epochs: Passes over the training images.
        learning_rate: The first, largest learning rate.
        progress: Called with steps done, all steps and the loss.
        checkpoint: A file of this training alone, which is written as it goes and, where it is there
            already, gone on from.
        checkpoint_seconds: Seconds between two writes of it.
        device: Where to compute; None: on a GPU where there is one.
        teacher: Probabilities for batches, which the network learns beside the labels.
        class_weights: Weight of each class's images in the loss; empty: all alike.

    Returns:
        The network, in evaluation mode on the processor.

    Raises:
        InvalidInputError: If epochs is not positive.
        TrainingError: If the loss is not finite.
    """
    config = alone(epochs, learning_rate, class_weights)
    return train_alone(
        plain,
        batches,
        config,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        device=device,
        teacher=teacher,
    )


def alone(epochs: int, learning_rate: float, class_weights: tuple[float, ...]) -> TrainConfig:
    """How one network is trained; arguments as of `finetune`."""
    return TrainConfig(
        Alone.name, epochs, learning_rate, warmup=0.0, mode="float32", workers=1, class_weights=class_weights
    )


def train_alone(
    plain: PlainNetwork,
    batches: TrainingBatches,
    config: TrainConfig,
    *,
    progress: Callable[[int, int, float], None] | None = None,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 120.0,
    device: str | None = None,
    teacher: Teacher | None = None,
) -> PlainNetwork:
    """Train one network by a configuration whose strategy is ``alone``; arguments as of `finetune`.

    Batches of another size are resized to the network's.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint is None:
        state, paths = TrainingState(plain, config), []
    else:
        state, paths = load_alone(checkpoint, plain, config), [checkpoint]
    Trainer(
        state,
        batches,
        paths=paths,
        observer=Observer(progress=progress),
        checkpoint_seconds=checkpoint_seconds,
        device=device,
        teacher=teacher,
    ).run()
    return plain.to("cpu").eval()
