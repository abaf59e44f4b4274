"""SGD as all trainings here use it: its groups, its learning rate, its velocities by name."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from foxnas_mlflow.supernet._state import TrainConfig


class Sgd:
    """What `torch.optim.SGD` does with Nesterov's momentum.

    PyTorch's own imports a compiler of a second and a half when it is made.

    Attributes:
        param_groups: ``params``, their ``lr`` and ``weight_decay``, and what else the caller wants to know of them.
        velocity: The velocity of each parameter that was updated at least once.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], momentum: float) -> None:
        self.param_groups = list(groups)
        self.velocity: dict[nn.Parameter, Tensor] = {}
        self._momentum = momentum

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient; the gradients are changed too."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            gradients = [p.grad for p in parameters]
            velocity = [self.velocity.setdefault(p, torch.zeros_like(p)) for p in parameters]
            if group["weight_decay"]:
                torch._foreach_add_(gradients, parameters, alpha=group["weight_decay"])
            torch._foreach_mul_(velocity, self._momentum)
            torch._foreach_add_(velocity, gradients)
            torch._foreach_add_(gradients, velocity, alpha=self._momentum)
            torch._foreach_add_(parameters, gradients, alpha=-group["lr"])


def sgd(module: nn.Module, config: TrainConfig) -> Sgd:
    """SGD with Nesterov's momentum; weights decay, norms and biases do not.

    A group of parameters is ``early`` if it learns from the first step on where others wait for the head
    (`TrainConfig.head_first`).
    """
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        early = not config.head_first or parameter.ndim <= 1 or name.startswith("head.")
        decay = config.weight_decay if parameter.ndim > 1 else 0.0
        groups.setdefault((early, decay), []).append(parameter)
    return Sgd(
        [
            {"params": parameters, "early": early, "weight_decay": decay, "lr": config.learning_rate}
            for (early, decay), parameters in groups.items()
        ],
        config.momentum,
    )


def set_learning_rate(optimizer: Sgd, config: TrainConfig, step: int, n_steps: int) -> float:
    """Set each group's learning rate of a step: all have the one that is returned, or wait."""
    rate = learning_rate(config, step, n_steps)
    waiting = step < config.head_first * n_steps
    for group in optimizer.param_groups:
        group["lr"] = 0.0 if waiting and not group["early"] else rate
    return rate


def learning_rate(config: TrainConfig, step: int, n_steps: int) -> float:
    """Learning rate of a step: a linear warm-up, then a cosine to zero."""
    warmup = max(int(config.warmup * n_steps), 1) if config.warmup else 0
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(n_steps - warmup, 1)))


def velocities(module: nn.Module, optimizer: Sgd) -> dict[str, Tensor]:
    """The velocity of each parameter that was updated at least once."""
    return {name: optimizer.velocity[p] for name, p in module.named_parameters() if p in optimizer.velocity}


def set_velocities(module: nn.Module, optimizer: Sgd, saved: Mapping[str, Tensor]) -> None:
    """Go on with the velocities that `velocities` returned."""
    parameters = dict(module.named_parameters())
    for name, velocity in saved.items():
        parameter = parameters[name]
        optimizer.velocity[parameter] = velocity.to(parameter.device)


def drop_waiting_gradients(optimizer: Sgd) -> None:
    """Forget the gradients of what does not learn yet: neither the norm nor a velocity is of them."""
    for group in optimizer.param_groups:
        if group["lr"] == 0.0:
            for parameter in group["params"]:
                parameter.grad = None
