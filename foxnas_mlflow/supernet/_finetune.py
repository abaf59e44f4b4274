"""Training one subnet alone: what its weights lose by being shared."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own name
from torch import nn

from foxnas_mlflow.core.errors import InvalidInputError, TrainingError
from foxnas_mlflow.supernet._batches import Batches
from foxnas_mlflow.supernet._network import PlainNetwork

_MOMENTUM, _WEIGHT_DECAY, _SMOOTHING, _CLIP = 0.9, 3e-5, 0.1, 2.0


def finetune(
    plain: PlainNetwork,
    batches: Batches,
    *,
    epochs: int,
    learning_rate: float,
    progress: Callable[[int, int, float], None] | None = None,
    device: str = "cpu",
) -> PlainNetwork:
    """Go on training a network from the weights that it has, with those of no other network in between.

    SGD as in the training of the supernet, its learning rate falling to zero by a cosine.

    Args:
        plain: The network, which is changed.
        batches: Training batches of its image size.
        epochs: Passes over the training images.
        learning_rate: The first, largest learning rate.
        progress: Called with steps done, all steps and the loss.
        device: Where to compute.

    Returns:
        The network, in evaluation mode on the processor.

    Raises:
        InvalidInputError: If epochs is not positive.
        TrainingError: If the loss is not finite.
    """
    if epochs < 1:
        raise InvalidInputError("epochs must be positive", received=epochs)
    plain = plain.to(device).train()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": _WEIGHT_DECAY},
            {"params": [p for p in plain.parameters() if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=learning_rate,
        momentum=_MOMENTUM,
        nesterov=True,
    )
    n_steps, step = epochs * len(batches), 0
    for epoch in range(epochs):
        for images, targets in batches.epoch(epoch):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * step / n_steps))
            optimizer.zero_grad(set_to_none=True)
            loss = F.cross_entropy(plain(images.to(device)), targets.to(device), label_smoothing=_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(plain.parameters(), _CLIP)
            optimizer.step()
            step += 1
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError("the loss must stay finite", received=value, remedy="take fewer epochs")
            if progress is not None:
                progress(step, n_steps, value)
    return plain.to("cpu").eval()
