"""SGD as all trainings here use it, and its velocities by name, as checkpoints keep them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


def sgd(module: nn.Module, *, learning_rate: float, momentum: float, weight_decay: float) -> torch.optim.SGD:
    """SGD with Nesterov's momentum; weights decay, norms and biases do not."""
    parameters = list(module.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=learning_rate, momentum=momentum, nesterov=True, foreach=True)


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
