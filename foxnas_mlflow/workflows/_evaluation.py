"""A registered supernet's subnets, ready to be evaluated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from foxnas_mlflow.supernet import SubnetEvaluator
    from foxnas_mlflow.tracking.inputs import TrainedSupernet

_CACHED_BYTES = 2**30


def supernet_evaluator(
    trained: TrainedSupernet, *, image_sizes: Sequence[int], validation_images: int = 0, seed: int = 0
) -> SubnetEvaluator:
    """Evaluates a supernet's subnets, on a GPU where there is one.

    Args:
        trained: The supernet and its images.
        image_sizes: Image sizes in pixels that it will be asked for.
        validation_images: At most so many validation images; 0: as many as memory holds.
        seed: Seed of the choice of calibration and validation images.
    """
    import torch

    from foxnas_mlflow.supernet import SubnetEvaluator, Supernet

    n_bytes = sum(size * size * trained.space.in_channels for size in image_sizes)
    limit = max(_CACHED_BYTES // n_bytes, 1)
    return SubnetEvaluator(
        Supernet.from_weights(trained.space, trained.model.weights),
        trained.dataset,
        validation_images=min(validation_images or limit, limit),
        seed=seed,
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
