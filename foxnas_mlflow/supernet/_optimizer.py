"""SGD as all trainings here use it: its groups, its learning rate, its velocities by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from foxnas_mlflow.supernet._state import TrainConfig


def sgd(module: nn.Module, config: TrainConfig) -> torch.optim.SGD:
    """SGD with Nesterov's momentum; weights decay, norms and biases do not."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.learning_rate, momentum=config.momentum, nesterov=True, foreach=True)


def learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    """Learning rate of a step: a linear warm-up, then a cosine to zero."""
    warmup = max(int(config.warmup * n_steps), 1) if config.warmup else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1)))


def velocities(module: nn.Module, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
    """The velocity of each parameter that was updated at least once."""
    found = {name: optimizer.state[p].get("momentum_buffer") for name, p in module.named_parameters()}
    return {name: velocity for name, velocity in found.items() if velocity is not None}


def set_velocities(module: nn.Module, optimizer: torch.optim.SGD, saved: Mapping[str, Tensor]) -> None:
    """Go on with the velocities that `velocities` returned."""
    parameters = dict(module.named_parameters())
    for name, velocity in saved.items():
        parameter = parameters[name]
        optimizer.state[parameter]["momentum_buffer"] = velocity.to(parameter.device)
